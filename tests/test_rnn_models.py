"""The four cells: shapes, two steps by hand, torch's layers; their parameters; `Recurrence`."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, tensor
from torch.testing import assert_close

import rnn_models
from rnn_models import (
    CELLS,
    GATES,
    Recurrence,
    bi_lstm,
    grad_clipping,
    gru,
    init_params,
    init_state,
    lstm,
    pool_states,
    reverse,
    rnn,
)

T = 5
B = 3
D = 40
h = 16
Q = 20

FORWARD = "W_xi W_hi b_i W_xf W_hf b_f W_xo W_ho b_o W_xc W_hc b_c"
BACKWARD = "W_xi_b W_hi_b b_i_b W_xf_b W_hf_b b_f_b W_xo_b W_ho_b b_o_b W_xc_b W_hc_b b_c_b"
NAMES = {
    "rnn": "W_xh W_hh b_h W_hq b_q",
    "gru": "W_xz W_hz b_z W_xr W_hr b_r W_xh W_hh b_h W_hq b_q",
    "lstm": f"{FORWARD} W_hq b_q",
    "bi_lstm": f"{FORWARD} {BACKWARD} W_hq b_q",
}
all_cells = pytest.mark.parametrize("cell", NAMES)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def new_params(cell):
    return init_params(cell, num_inputs=D, num_hiddens=h, num_outputs=Q)


def new_recurrence(cell):
    return Recurrence(cell, num_inputs=D, num_hiddens=h, num_outputs=Q)


# --- shapes -------------------------------------------------------------------------------------


def test_the_first_state_is_zero():
    zeros = torch.zeros(B, h)
    state = init_state("bi_lstm", B, h)
    assert_close(state, ((zeros, zeros), (zeros, zeros)))


# --- two steps by hand --------------------------------------------------------------------------

# One sequence, one input, one unit, one output: X = 1, then X = -2. s is the logistic sigmoid.
INPUTS = tensor([[[1.0]], [[-2.0]]])
H_0 = tensor([[0.5]])
C_0 = tensor([[-1.0]])
W_HQ = tensor([[2.0]])
B_Q = tensor([-1.0])


def gate(W_x, W_h, b):
    return [tensor([[W_x]]), tensor([[W_h]]), tensor([b])]


LSTM_GATES = [
    *gate(0.6, -0.4, 0.2),  # input gate
    *gate(-0.5, 0.8, 0.3),  # forget gate
    *gate(0.3, 0.5, -0.2),  # output gate
    *gate(0.7, 0.9, -0.1),  # candidate
]


def assert_numbers(values, expected):
    numbers = [value.item() for value in values]
    assert numbers == pytest.approx(expected, abs=5e-5)


def test_two_steps_of_the_rnn_by_hand():
    params = [*gate(0.5, 0.4, 0.1), W_HQ, B_Q]
    outputs, (H,) = rnn(INPUTS, (H_0,), params)
    # H = tanh(0.5 * 1 + 0.4 * 0.5 + 0.1) = tanh(0.8) = 0.66404;  Y = 2 H - 1 = 0.32808
    # H = tanh(0.5 * -2 + 0.4 * 0.66404 + 0.1) = tanh(-0.63438) = -0.56106;  Y = -2.12212
    assert_numbers(outputs, [0.32808, -2.12212])
    assert_numbers(H, [-0.56106])


def test_two_steps_of_the_gru_by_hand():
    update_gate = gate(0.6, -0.4, 0.2)
    reset_gate = gate(-0.5, 0.8, 0.3)
    candidate = gate(0.7, 0.9, -0.1)
    outputs, (H,) = gru(INPUTS, (H_0,), [*update_gate, *reset_gate, *candidate, W_HQ, B_Q])
    # Z = s(0.6 * 1 - 0.4 * 0.5 + 0.2) = s(0.6) = 0.64566
    # R = s(-0.5 * 1 + 0.8 * 0.5 + 0.3) = s(0.2) = 0.54983
    # H~ = tanh(0.7 * 1 + 0.9 * (0.54983 * 0.5) - 0.1) = tanh(0.84743) = 0.68972
    # H = 0.64566 * 0.5 + (1 - 0.64566) * 0.68972 = 0.56723;  Y = 2 H - 1 = 0.13446
    # Z = s(0.6 * -2 - 0.4 * 0.56723 + 0.2) = s(-1.22689) = 0.22673
    # R = s(-0.5 * -2 + 0.8 * 0.56723 + 0.3) = s(1.75378) = 0.85243
    # H~ = tanh(0.7 * -2 + 0.9 * (0.85243 * 0.56723) - 0.1) = tanh(-1.06483) = -0.78751
    # H = 0.22673 * 0.56723 + (1 - 0.22673) * -0.78751 = -0.48035;  Y = -1.96070
    assert_numbers(outputs, [0.13446, -1.96070])
    assert_numbers(H, [-0.48035])


def test_the_gru_resets_the_state_before_the_product_by_hand():
    no_weights = [torch.zeros(1, 2), torch.zeros(2, 2)]
    update_gate = [*no_weights, tensor([-100.0, -100.0])]  # Z = (0, 0)
    reset_gate = [*no_weights, tensor([100.0, -100.0])]  # R = (1, 0)
    swap = tensor([[0.0, 1.0], [1.0, 0.0]])
    candidate = [torch.zeros(1, 2), swap, torch.zeros(2)]
    params = [*update_gate, *reset_gate, *candidate, torch.eye(2), torch.zeros(2)]
    _, (H,) = gru(INPUTS[:1], (tensor([[0.5, 0.25]]),), params)
    # R * H = (0.5, 0), swapped (0, 0.5), and tanh(0.5) = 0.46212. Swapped first it is (0.25, 0).
    assert_numbers(H[0], [0.0, 0.46212])


def test_two_steps_of_the_lstm_by_hand():
    outputs, (H, C) = lstm(INPUTS, (H_0, C_0), [*LSTM_GATES, W_HQ, B_Q])
    # I = s(0.6 * 1 - 0.4 * 0.5 + 0.2) = s(0.6) = 0.64566
    # F = s(-0.5 * 1 + 0.8 * 0.5 + 0.3) = s(0.2) = 0.54983
    # O = s(0.3 * 1 + 0.5 * 0.5 - 0.2) = s(0.35) = 0.58662
    # C~ = tanh(0.7 * 1 + 0.9 * 0.5 - 0.1) = tanh(1.05) = 0.78181
    # C = 0.54983 * -1 + 0.64566 * 0.78181 = -0.04506
    # H = 0.58662 * tanh(-0.04506) = -0.02641;  Y = 2 H - 1 = -1.05282
    # I = s(-0.98943) = 0.27102;  F = s(1.27887) = 0.78226
    # O = s(-0.81321) = 0.30721;  C~ = tanh(-1.52377) = -0.90935
    # C = 0.78226 * -0.04506 - 0.27102 * 0.90935 = -0.28170
    # H = 0.30721 * tanh(-0.28170) = -0.08432;  Y = -1.16864
    assert_numbers(outputs, [-1.05282, -1.16864])
    assert_numbers([H, C], [-0.08432, -0.28170])


def test_two_steps_of_the_bi_lstm_by_hand():
    state_b = (tensor([[0.4]]), tensor([[0.6]]))
    W_hq = tensor([[2.0], [3.0]])
    params = [*LSTM_GATES, *LSTM_GATES, W_hq, B_Q]
    outputs, (state_f, state_b) = bi_lstm(INPUTS, ((H_0, C_0), state_b), params)
    # Forward as above: H = -0.02641, then -0.08432. Backward it reads X = -2, then X = 1:
    # I = s(-1.16) = 0.23867;  F = s(1.62) = 0.83480;  O = s(-0.6) = 0.35434
    # C~ = tanh(-1.14) = -0.81441;  C_b = 0.30650;  H_b = 0.35434 * 0.29725 = 0.10533
    # I = s(0.75787) = 0.68089;  F = s(-0.11574) = 0.47110;  O = s(0.15266) = 0.53809
    # C~ = tanh(0.69480) = 0.60105;  C_b = 0.55365;  H_b = 0.53809 * 0.50325 = 0.27079
    # Y = 2 H + 3 H_b - 1 = -0.05282 + 0.81237 - 1, then -0.16864 + 0.31599 - 1
    assert_numbers(outputs, [-0.24045, -0.85265])
    assert_numbers(state_f, [-0.08432, -0.28170])
    assert_numbers(state_b, [0.27079, 0.55365])


# --- torch's own layers, and NumPy where torch has another function ----------------------------


def lecture_params(layer, order):
    """torch's weights as the lecture's parameters, with outputs Y = H; order: of torch's gates."""
    params = []
    for W_x, W_h, b_x, b_h in layer.all_weights:  # of each direction
        for number in order:
            rows = slice(number * h, number * h + h)
            params += [W_x[rows].T, W_h[rows].T, b_x[rows] + b_h[rows]]
    width = h * len(layer.all_weights)
    return [*params, torch.eye(width).double(), torch.zeros(width)]


def assert_same_values_and_gradients(ours, theirs, leaves):
    assert_close(ours, theirs)
    our_sum = sum(value.square().sum() for value in ours)
    their_sum = sum(value.square().sum() for value in theirs)
    assert_close(torch.autograd.grad(our_sum, leaves), torch.autograd.grad(their_sum, leaves))


def test_the_rnn_is_torchs_rnn():
    layer = nn.RNN(D, h).double()
    inputs = random(T, B, D)
    H_0 = random(1, B, h)
    ours, (H,) = rnn(inputs, (H_0[0],), lecture_params(layer, order=[0]))
    theirs, their_H = layer(inputs, H_0)
    leaves = [inputs, H_0, *layer.parameters()]
    assert_same_values_and_gradients([ours, H[None]], [theirs, their_H], leaves)


def test_the_lstm_is_torchs_lstm():
    layer = nn.LSTM(D, h).double()
    inputs = random(T, B, D)
    H_0 = random(1, B, h)
    C_0 = random(1, B, h)
    params = lecture_params(layer, order=[0, 1, 3, 2])  # torch's are i f c o
    ours, (H, C) = lstm(inputs, (H_0[0], C_0[0]), params)
    theirs, (their_H, their_C) = layer(inputs, (H_0, C_0))
    leaves = [inputs, H_0, C_0, *layer.parameters()]
    assert_same_values_and_gradients([ours, H[None], C[None]], [theirs, their_H, their_C], leaves)


def test_the_bi_lstm_is_torchs_bidirectional_lstm():
    layer = nn.LSTM(D, h, bidirectional=True).double()
    inputs = random(T, B, D)
    H_0 = random(2, B, h)
    C_0 = random(2, B, h)
    params = lecture_params(layer, order=[0, 1, 3, 2])
    ours, (state_f, state_b) = bi_lstm(inputs, list(zip(H_0, C_0, strict=True)), params)
    theirs, (H, C) = layer(inputs, (H_0, C_0))
    leaves = [inputs, H_0, C_0, *layer.parameters()]
    our_values = [ours, *state_f, *state_b]
    their_values = [theirs, H[0], C[0], H[1], C[1]]
    assert_same_values_and_gradients(our_values, their_values, leaves)


def test_the_gru_is_torchs_gru_where_both_orders_of_the_reset_agree():
    layer = nn.GRU(D, h).double()
    with torch.no_grad():  # W_hh diagonal and its bias 0: (R * H) W_hh = R * (H W_hh)
        layer.weight_hh_l0[2 * h :] = torch.diag(torch.randn(h))
        layer.bias_hh_l0[2 * h :] = 0
    inputs = random(T, B, D)
    H_0 = random(1, B, h)
    ours, (H,) = gru(inputs, (H_0[0],), lecture_params(layer, order=[1, 0, 2]))  # torch's are r z n
    theirs, their_H = layer(inputs, H_0)
    leaves = [inputs, H_0, layer.weight_ih_l0, layer.bias_ih_l0]
    assert_same_values_and_gradients([ours, H[None]], [theirs, their_H], leaves)


def sigmoid(A):
    return 1 / (1 + np.exp(-A))


def test_the_gru_is_its_numpy_rederivation():
    inputs = torch.randn(T, B, D)
    H = torch.randn(B, h)
    params = [0.3 * torch.randn_like(param) for param in new_params("gru")]
    outputs, (last_H,) = gru(inputs, (H,), params)
    W_xz, W_hz, b_z, W_xr, W_hr, b_r, W_xh, W_hh, b_h, W_hq, b_q = map(np.asarray, params)
    H = H.numpy()
    for X, Y in zip(inputs.numpy(), outputs.numpy(), strict=True):
        Z = sigmoid(X @ W_xz + H @ W_hz + b_z)
        R = sigmoid(X @ W_xr + H @ W_hr + b_r)
        H_tilde = np.tanh(X @ W_xh + (R * H) @ W_hh + b_h)
        H = Z * H + (1 - Z) * H_tilde
        assert np.allclose(Y, H @ W_hq + b_q, atol=1e-5)
    assert np.allclose(last_H, H, atol=1e-5)


def test_no_module_uses_torchs_recurrent_layers_or_scikit_learn():
    classes = r"\bnn\.(RNN|GRU|LSTM)\w*\(|import .*\b(RNN|GRU|LSTM)"
    functions = r"\b(torch|_VF|aten)\.(rnn_|gru|lstm)"
    forbidden = re.compile(f"{classes}|{functions}|sklearn")
    root = Path(rnn_models.__file__).parent
    for path in [*root.glob("*.py"), *root.glob("support/*.py")]:
        assert not forbidden.search(path.read_text(encoding="utf-8")), path


# --- padded sequences ---------------------------------------------------------------------------


def test_reverse_leaves_the_padding_in_its_place():
    sequence = torch.arange(4).view(4, 1, 1)
    assert reverse(sequence).flatten().tolist() == [3, 2, 1, 0]
    assert reverse(sequence, tensor([2])).flatten().tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize("use_fast_form", [True, False])
def test_a_padded_sequence_has_the_states_that_it_has_alone(use_fast_form):
    recurrence = new_recurrence("bi_lstm")
    recurrence.use_fast_form = use_fast_form
    inputs = torch.randn(T, 2, D)
    states = recurrence(inputs, tensor([T, 3]))
    alone = recurrence(inputs[:3, 1:])
    assert_close(states[:3, 1:], alone)


# Two texts of 2 and 3 steps; the states' second number is that of the backward direction.
STATES = tensor([[[-1.0, 5.0], [1.0, 2.0]], [[-3.0, 2.0], [3.0, 4.0]], [[9.0, 9.0], [5.0, 0.0]]])
LENGTHS = tensor([2, 3])


def test_pooling_by_the_last_state_by_hand():
    assert pool_states(STATES, LENGTHS, "last").tolist() == [[-3, 2], [5, 0]]


def test_the_backward_direction_has_its_last_state_at_the_first_step():
    pooled = pool_states(STATES, LENGTHS, "last", bidirectional=True)
    assert pooled.tolist() == [[-3, 5], [5, 2]]


def test_pooling_by_the_mean_by_hand():
    assert pool_states(STATES, LENGTHS, "mean").tolist() == [[-2, 3.5], [3, 2]]


def test_pooling_by_the_maximum_by_hand():
    assert pool_states(STATES, LENGTHS, "max").tolist() == [[-1, 5], [5, 4]]


def test_an_unknown_way_of_pooling_is_refused():
    with pytest.raises(ValueError, match="last, mean, max, not 'sum'"):
        pool_states(STATES, LENGTHS, "sum")


# --- parameters ---------------------------------------------------------------------------------


@all_cells
def test_the_parameters_have_their_names_in_the_order_of_the_loop(cell):
    names = new_recurrence(cell).state_dict()
    assert list(names) == NAMES[cell].split()


@all_cells
def test_weights_of_inputs_and_outputs_are_uniform_within_1_over_the_root_of_h(cell):
    *gates, W_hq, _ = new_params(cell)
    for W in [*gates[0::3], W_hq]:
        assert -0.25 <= W.min() < -0.23  # 1 / sqrt(16) = 0.25
        assert 0.23 < W.max() <= 0.25


@all_cells
def test_weights_of_states_are_orthogonal(cell):
    for W in new_params(cell)[1:-2:3]:
        assert_close(W @ W.T, torch.eye(h))


def test_biases_are_0_but_that_of_the_forget_gate_is_1():
    *gates, _, b_q = new_params("lstm")
    expected = torch.zeros(4, h)
    expected[1] = 1
    assert torch.equal(torch.stack(gates[2::3]), expected)
    assert not b_q.any()


def test_an_unknown_cell_is_refused():
    message = "rnn, gru, lstm, bi_lstm, not 'LSTM'"
    with pytest.raises(ValueError, match=message):
        new_recurrence("LSTM")
    with pytest.raises(ValueError, match=message):
        init_state("LSTM", batch_size=1, num_hiddens=1)


def test_a_size_below_1_is_refused():
    with pytest.raises(ValueError, match="at least 1"):
        init_params("rnn", num_inputs=1, num_hiddens=0, num_outputs=1)


# --- clipping -----------------------------------------------------------------------------------


@pytest.mark.parametrize("theta", [6.5, 12.99, 13.01])
def test_clipping_scales_the_joint_norm_of_13_down_to_theta(theta):
    params = [torch.zeros(1), torch.zeros(2), torch.zeros(3)]
    params[0].grad = tensor([3.0])
    params[1].grad = tensor([-4.0, 12.0])  # the third has none
    norm = grad_clipping(params, theta)
    factor = min(1, theta / 13)
    assert norm.item() == pytest.approx(13)  # the root of 9 + 16 + 144
    assert params[0].grad.tolist() == pytest.approx([3 * factor])
    assert params[1].grad.tolist() == pytest.approx([-4 * factor, 12 * factor])
    assert params[2].grad is None


def test_clipping_refuses_a_theta_of_0():
    with pytest.raises(ValueError, match="above 0"):
        grad_clipping([], theta=0)


# --- Recurrence: what a reader sees is what runs ------------------------------------------------


def assert_computes_its_loop(recurrence):
    inputs = torch.randn(T, B, D)
    state = init_state(recurrence.cell, B, h)
    outputs = recurrence.output(recurrence(inputs))
    expected, _ = CELLS[recurrence.cell](inputs, state, recurrence.params)
    assert_close(outputs, expected)


@all_cells
def test_a_recurrence_computes_its_cells_loop_from_the_zero_state(cell):
    assert_computes_its_loop(new_recurrence(cell))


def test_inputs_without_a_step_are_refused():
    with pytest.raises(ValueError, match="at least one step"):
        new_recurrence("gru")(torch.zeros(0, B, D))


@all_cells
def test_a_recurrence_draws_the_random_numbers_of_init_params_and_no_others(cell):
    expected = new_params(cell)
    expected_next = torch.rand(1)
    torch.manual_seed(0)
    params = new_recurrence(cell).params
    assert torch.rand(1) == expected_next
    assert_close(params, expected)


@all_cells
def test_unedited_cells_use_the_fast_form_and_print_nothing(cell, capsys):
    assert new_recurrence(cell).use_fast_form
    assert capsys.readouterr() == ("", "")


def test_the_fast_form_is_recognised_where_no_gradients_are_recorded():
    with torch.inference_mode():
        assert new_recurrence("rnn").use_fast_form


def assert_one_line_on_stderr(capsys, cell):
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"{cell}: .*loop.*\n", printed.err)


def with_swapped_gates(loop):
    def edited_loop(inputs, state, params):
        swapped = [*params[3:6], *params[:3], *params[6:]]
        return loop(inputs, state, swapped)

    return edited_loop


def test_an_edited_gru_is_what_runs(monkeypatch, capsys):
    monkeypatch.setitem(CELLS, "gru", with_swapped_gates(gru))
    assert_computes_its_loop(new_recurrence("gru"))
    assert_one_line_on_stderr(capsys, "gru")


def test_an_edited_lstm_is_what_runs_in_both_directions_of_the_bi_lstm(monkeypatch, capsys):
    monkeypatch.setattr(rnn_models, "lstm", with_swapped_gates(lstm))
    assert_computes_its_loop(new_recurrence("bi_lstm"))
    assert_one_line_on_stderr(capsys, "bi_lstm")


def test_a_loop_with_a_state_of_its_own_in_single_precision_runs(monkeypatch, capsys):
    def own_state_loop(inputs, state, params):
        H = torch.zeros(inputs.shape[1], len(params[1]))
        return rnn(inputs, (H,), params)

    monkeypatch.setitem(CELLS, "rnn", own_state_loop)
    assert_computes_its_loop(new_recurrence("rnn"))
    assert_one_line_on_stderr(capsys, "rnn")


def with_late_steps_zero(inputs, state, params):
    outputs, last = gru(inputs, state, params)
    outputs[20:] = 0
    return outputs, last


def without_gradients_of_inputs(inputs, state, params):
    return gru(inputs.detach(), state, params)


def without_gradients(inputs, state, params):
    with torch.no_grad():
        return gru(inputs, state, params)


edits = [with_late_steps_zero, without_gradients_of_inputs, without_gradients]


@pytest.mark.parametrize("edited_gru", edits)
def test_an_edit_of_late_steps_or_of_gradients_alone_is_noticed(edited_gru, monkeypatch):
    monkeypatch.setitem(CELLS, "gru", edited_gru)
    assert not new_recurrence("gru").use_fast_form


def minimal_gated_unit(inputs, state, params):
    """One gate U that updates and resets (Zhou et al. 2016)."""
    W_xu, W_hu, b_u, W_xh, W_hh, b_h, W_hq, b_q = params
    (H,) = state
    outputs = []
    for X in inputs:
        U = torch.sigmoid(X @ W_xu + H @ W_hu + b_u)
        H_tilde = torch.tanh(X @ W_xh + (U * H) @ W_hh + b_h)
        H = (1 - U) * H + U * H_tilde
        outputs.append(H @ W_hq + b_q)
    return torch.stack(outputs), (H,)


def test_a_new_cell_is_a_function_and_an_entry_in_both_tables(monkeypatch, capsys):
    monkeypatch.setitem(CELLS, "mgu", minimal_gated_unit)
    monkeypatch.setitem(GATES, "mgu", "uh")
    assert_computes_its_loop(new_recurrence("mgu"))
    assert_one_line_on_stderr(capsys, "mgu")
