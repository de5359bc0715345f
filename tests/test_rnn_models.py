"""The four cells: shapes, steps by hand, torch's own layers, properties; then the two models."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import rnn_models
from rnn_models import CELLS, POOLS, Forecaster, Recurrence, TextClassifier, init_params, init_state

T, B, D, h, Q = 7, 5, 4, 6, 3
GATES = "W_xi W_hi b_i W_xf W_hf b_f W_xo W_ho b_o W_xc W_hc b_c"
NAMES = {
    "rnn": "W_xh W_hh b_h W_hq b_q",
    "gru": "W_xz W_hz b_z W_xr W_hr b_r W_xh W_hh b_h W_hq b_q",
    "lstm": f"{GATES} W_hq b_q",
    "bi_lstm": f"{GATES} {GATES.replace(' ', '_b ')}_b W_hq b_q",
}
all_cells = pytest.mark.parametrize("cell", NAMES)
both_loops = pytest.mark.parametrize("loops", ["fast", "plain"])


def flatten(state):
    """The list H, or H C, or H C H_b C_b."""
    return [tensor for part in state for tensor in (part if isinstance(part, tuple) else (part,))]


def assert_close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(list(ours), list(theirs), rtol=tolerance, atol=tolerance)


@all_cells
def test_outputs_are_T_B_Q_and_the_tensors_of_the_state_B_h(cell):
    first = init_state(cell, B, h)
    outputs, last = CELLS[cell](torch.randn(T, B, D), first, init_params(cell, D, h, Q))
    assert outputs.shape == (T, B, Q)
    shapes = [(B, h)] * {"rnn": 1, "gru": 1, "lstm": 2, "bi_lstm": 4}[cell]
    assert shapes == [H.shape for H in flatten(first)] == [H.shape for H in flatten(last)]
    assert not any(tensor.any() for tensor in flatten(first))


# One sequence, one input, one unit, one output. X = 1, then -2. s is the logistic sigmoid.
LSTM_GATES = [(0.6, -0.4, 0.2), (-0.5, 0.8, 0.3), (0.3, 0.5, -0.2), (0.7, 0.9, -0.1)]  # i, f, o, c


def two_steps(cell, state, gates):
    """Both outputs, Y = 2 H - 1 or 2 H + 3 H_b - 1, and the last state; gates: each W_x, W_h, b."""
    parts = torch.tensor(state).view(-1, 1, 1).unbind()  # (1, 1) each
    state = (parts[:2], parts[2:]) if cell == "bi_lstm" else parts
    params = [torch.tensor(p) for W_x, W_h, b in gates for p in ([[W_x]], [[W_h]], [b])]
    params += [torch.tensor([[2.0], [3.0]] if cell == "bi_lstm" else [[2.0]]), torch.tensor([-1.0])]
    outputs, last = CELLS[cell](torch.tensor([[[1.0]], [[-2.0]]]), state, params)
    return [tensor.item() for tensor in (*outputs, *flatten(last))]


def test_rnn_by_hand():
    # H = tanh(0.5 * 1 + 0.4 * 0.5 + 0.1) = tanh(0.8) = 0.66404
    # H = tanh(0.5 * -2 + 0.4 * 0.66404 + 0.1) = tanh(-0.63438) = -0.56106
    found = two_steps("rnn", [0.5], [(0.5, 0.4, 0.1)])
    assert found == pytest.approx([2 * 0.66404 - 1, 2 * -0.56106 - 1, -0.56106], abs=3e-5)


def test_gru_by_hand():
    # Z = s(0.6 * 1 - 0.4 * 0.5 + 0.2) = s(0.6) = 0.64566;  R = s(-0.5 + 0.4 + 0.3) = 0.54983
    # H~ = tanh(0.7 * 1 + 0.9 * (0.54983 * 0.5) - 0.1) = tanh(0.84743) = 0.68972
    # H = 0.64566 * 0.5 + (1 - 0.64566) * 0.68972 = 0.56723
    # Z = s(0.6 * -2 - 0.4 * 0.56723 + 0.2) = s(-1.22689) = 0.22673;  R = s(1.75378) = 0.85243
    # H~ = tanh(0.7 * -2 + 0.9 * (0.85243 * 0.56723) - 0.1) = tanh(-1.06483) = -0.78751
    # H = 0.22673 * 0.56723 + (1 - 0.22673) * -0.78751 = -0.48035
    found = two_steps("gru", [0.5], [(0.6, -0.4, 0.2), (-0.5, 0.8, 0.3), (0.7, 0.9, -0.1)])
    assert found == pytest.approx([2 * 0.56723 - 1, 2 * -0.48035 - 1, -0.48035], abs=3e-5)


def test_lstm_by_hand():
    # I = s(0.6 * 1 - 0.4 * 0.5 + 0.2) = s(0.6) = 0.64566;  F = s(-0.5 + 0.4 + 0.3) = 0.54983
    # O = s(0.3 * 1 + 0.5 * 0.5 - 0.2) = s(0.35) = 0.58662;  C~ = tanh(1.05) = 0.78181
    # C = 0.54983 * -1 + 0.64566 * 0.78181 = -0.04506;  H = 0.58662 * tanh(-0.04506) = -0.02641
    # I = s(-0.98943) = 0.27102;  F = s(1.27887) = 0.78226
    # O = s(-0.81321) = 0.30721;  C~ = tanh(-1.52377) = -0.90935
    # C = 0.78226 * -0.04506 - 0.27102 * 0.90935 = -0.28170;  H = 0.30721 * -0.27448 = -0.08432
    found = two_steps("lstm", [0.5, -1.0], LSTM_GATES)
    expected = [2 * -0.02641 - 1, 2 * -0.08432 - 1, -0.08432, -0.28170]
    assert found == pytest.approx(expected, abs=3e-5)


def test_bi_lstm_by_hand():
    # Forward as above. Backward with the same gates, X = -2, then 1, from H_b = 0.4 and C_b = 0.6:
    # I = s(-1.16) = 0.23867;  F = s(1.62) = 0.83480;  O = s(-0.6) = 0.35434
    # C~ = tanh(-1.14) = -0.81441;  C_b = 0.30650;  H_b = 0.35434 * 0.29725 = 0.10533
    # I = s(0.75787) = 0.68089;  F = s(-0.11574) = 0.47110;  O = s(0.15266) = 0.53809
    # C~ = tanh(0.69480) = 0.60105;  C_b = 0.55365;  H_b = 0.53809 * 0.50325 = 0.27079
    found = two_steps("bi_lstm", [0.5, -1.0, 0.4, 0.6], LSTM_GATES * 2)
    outputs = [2 * -0.02641 + 3 * 0.27079 - 1, 2 * -0.08432 + 3 * 0.10533 - 1]
    assert found == pytest.approx([*outputs, -0.08432, -0.28170, 0.27079, 0.55365], abs=3e-5)


def random_case(cell):
    """Inputs, a state and parameters other than zero, all float64 leaves with gradients."""
    torch.manual_seed(0)
    shapes = [(T, B, D), *[(B, h)] * 4, *(param.shape for param in init_params(cell, D, h, Q))]
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    inputs, H, C, H_b, C_b, *params = leaves
    states = {"rnn": (H,), "gru": (H,), "lstm": (H, C), "bi_lstm": ((H, C), (H_b, C_b))}
    return inputs, states[cell], params


def torch_layer(cell):
    """torch's layer, and our parameters without W_hq and b_q as views of its weights."""
    kinds = {"rnn": (nn.RNN, [0]), "gru": (nn.GRU, [1, 0, 2])}  # its gates are r z h or i f c o
    kind, order = kinds.get(cell, (nn.LSTM, [0, 1, 3, 2]))
    layer = kind(D, h, bidirectional=cell == "bi_lstm").double()
    params = []
    for W_x, W_h, b, second_b in layer.all_weights:  # of each direction
        nn.init.zeros_(second_b)
        gates = [weight.chunk(len(order)) for weight in (W_x, W_h, b)]
        params += [weight[i].t() for i in order for weight in gates]
    if cell == "gru":  # the lecture's (R * H) W_hh is torch's R * (H W_hh) if W_hh is diagonal
        params[7].data *= torch.eye(h)
    return layer, params


@all_cells
def test_values_states_and_gradients_are_those_of_torchs_layer(cell):
    inputs, state, (*_, W_hq, b_q) = random_case(cell)
    layer, params = torch_layer(cell)
    outputs, last = CELLS[cell](inputs, state, [*params, W_hq, b_q])
    first = torch.stack(flatten(state))
    if "lstm" in cell:  # torch's states are all H and all C, (directions, B, h) each
        states, last_torch = layer(inputs, (first[0::2], first[1::2]))
        last_torch = torch.stack(last_torch, dim=1).flatten(0, 1)  # H C, H_b C_b
    else:
        states, last_torch = layer(inputs, first)
    ours, theirs = [outputs, *flatten(last)], [states @ W_hq + b_q, *last_torch]
    assert_close(ours, theirs)
    losses = [sum(value.square().sum() for value in values) for values in (ours, theirs)]
    assert_close(*(torch.autograd.grad(loss, [inputs, *flatten(state)]) for loss in losses))


def test_gru_is_the_numpy_rederivation():
    inputs, state, params = random_case("gru")
    outputs, last = rnn_models.gru(inputs, state, params)
    arrays = [tensor.detach().numpy() for tensor in (inputs, *state, *params, outputs, *last)]
    inputs, H, W_xz, W_hz, b_z, W_xr, W_hr, b_r, W_xh, W_hh, b_h, W_hq, b_q, outputs, last = arrays
    for X, Y in zip(inputs, outputs, strict=True):
        Z = 1 / (1 + np.exp(-(X @ W_xz + H @ W_hz + b_z)))
        R = 1 / (1 + np.exp(-(X @ W_xr + H @ W_hr + b_r)))
        H = Z * H + (1 - Z) * np.tanh(X @ W_xh + (R * H) @ W_hh + b_h)
        assert np.allclose(Y, H @ W_hq + b_q, rtol=0, atol=1e-12)
    assert np.allclose(last, H, rtol=0, atol=1e-12)


def test_only_the_benchmark_uses_torchs_recurrent_layers_and_nothing_scikit_learn():
    layers = r"\bnn\.(RNN|GRU|LSTM)[^ ]|import.*(RNN|GRU|LSTM)"  # "nn.GRU " is in a sentence
    forbidden = re.compile(rf"{layers}|\b(torch|_VF|aten)\.(rnn_|gru|lstm)|sklearn")
    for path in Path(rnn_models.__file__).parent.glob("*.py"):
        found = forbidden.search(path.read_text(encoding="utf-8"))
        assert bool(found) == (path.name == "bench.py"), path


# --- parameters and models (Recurrence: test_bptt.py) -------------------------------------------


@all_cells
def test_the_first_parameters(cell):
    torch.manual_seed(1)
    for name, param in zip(NAMES[cell].split(), init_params(cell, 50, 16, 40), strict=True):
        assert param.requires_grad
        if name.startswith("W_x") or name == "W_hq":  # uniform in +-1/sqrt(16)
            assert -0.25 <= param.min() < -0.24 and 0.24 < param.max() <= 0.25
        elif name.startswith("W_h"):  # orthogonal
            assert torch.allclose(param @ param.t(), torch.eye(16), atol=1e-5)
        else:
            assert (param == (1 if name in ("b_f", "b_f_b") else 0)).all()


def test_wrong_names_sizes_and_inputs_without_a_step_raise_ValueError():
    for call, message in [
        (lambda: init_state("LSTM", 1, 1), "rnn, gru, lstm, bi_lstm, not 'LSTM'"),
        (lambda: init_params("rnn", 1, 0, 1), "at least 1"),
        (lambda: Recurrence("rnn", 1, 1, 1, loops="slow"), "fast, plain, not 'slow'"),
        (
            lambda: rnn_models.pool_states(torch.ones(1, 1, 1), torch.ones(1), "sum"),
            "last, mean, max",
        ),
        (lambda: Recurrence("gru", D, h, Q)(torch.zeros(0, B, D)), "step"),
        (lambda: Recurrence("lstm", D, h, Q, "plain")(torch.zeros(0, B, D)), "step"),
        (lambda: rnn_models.grad_clipping([], float("nan")), "above 0"),
        (lambda: rnn_models.grad_clipping([], 0), "above 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize(("theta", "factor"), [(6.5, 0.5), (12.99, 12.99 / 13), (13.01, 1)])
def test_grad_clipping_scales_the_joint_norm_down_to_theta(theta, factor):
    params = [torch.zeros(2, requires_grad=True) for _ in range(3)]  # the last has no gradient
    params[0].grad, params[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([-4.0, 12.0])
    assert rnn_models.grad_clipping(params, theta).item() == pytest.approx(13)
    clipped = [*params[0].grad.tolist(), *params[1].grad.tolist()]
    assert clipped == pytest.approx([3 * factor, 0, -4 * factor, 12 * factor])
    assert rnn_models.grad_clipping(params[2:], theta).item() == 0


def test_reversing_leaves_the_padding():
    found = rnn_models.reverse(torch.tensor([5, 6, 7, 8]).view(4, 1, 1), torch.tensor([2]))
    assert found.flatten().tolist() == [6, 5, 7, 8]


def test_pooling_by_hand():
    # A text of two steps and a step of padding; the backward half is the second number.
    states, lengths = torch.tensor([[[-1.0, 5.0]], [[-3.0, 2.0]], [[9.0, 9.0]]]), torch.tensor([2])
    for pool, expected in {"last": [-3, 2], "mean": [-2, 3.5], "max": [-1, 5]}.items():
        assert rnn_models.pool_states(states, lengths, pool).tolist() == [expected]
    assert rnn_models.pool_states(states, lengths, "last", bidirectional=True).tolist() == [[-3, 5]]


@all_cells
@pytest.mark.parametrize("pool", POOLS)
@both_loops
def test_a_texts_logits_do_not_depend_on_what_it_is_batched_with(cell, pool, loops):
    torch.manual_seed(4)
    model = TextClassifier(cell, [50, 9], 8, 6, 4, pool, loops=loops).double().eval()
    tokens, lengths = torch.randint(0, 9, (T + 3, 5, 2)), torch.tensor([7, 1, 4, 6, 2])
    alone = [model(tokens[:n, [i]], lengths[[i]]) for i, n in enumerate(lengths)]
    alone = torch.cat(alone)  # (5, 4), from texts without padding
    assert alone.std(dim=0).min() > 0.01
    assert_close([model(tokens, lengths)], [alone])
    alone.square().sum().backward()
    assert all(param.grad.any() for param in model.parameters())


def test_a_texts_inputs_are_added_embeddings_with_one_dropout_mask_for_all_steps():
    torch.manual_seed(6)
    model = TextClassifier("rnn", [400, 300], 64, 30, 30, pool="last", dropout=0.75)
    model.recurrence.W_hq.data = torch.eye(30)  # the logits are the pooled states
    first, second = (embedding.weight for embedding in model.embeddings)
    variances = first.var().item(), second.var().item()
    assert variances == pytest.approx((1 / 2, 1 / 2), rel=0.05)  # the sum has variance 1
    tokens, lengths = torch.randint(0, 300, (T, B, 2)), torch.full((B,), T)
    embedded, states = first[tokens[:, :, 0]] + second[tokens[:, :, 1]], torch.rand(T, B, 30) + 1
    mask, last_mask = model.embed(tokens) / embedded, model.classify(states, lengths) / states[-1]
    for kept in (mask, last_mask):  # a quarter, times 4
        assert kept.round(decimals=3).unique().tolist() == [0, 4]
    assert torch.allclose(mask, mask[:1]) and not torch.allclose(mask[0], mask[0, :1])
    model.eval()
    assert torch.equal(model.embed(tokens), embedded)
    assert torch.equal(model.classify(states, lengths), states[-1])


def test_the_features_of_the_linear_forecast_by_hand():
    # Two days of two steps. A step: temperature, another column, sine and cosine of the year, sine
    # and cosine of the day; of these four the last step's count.
    steps = [[1, 70, 9, 9, 9, 9], [-2, 80, 9, 9, 9, 9], [5, 90, 9, 9, 9, 9]]
    window = torch.tensor([*steps, [3, 60, 0.6, -0.8, 0.5, 2]])
    x = torch.tensor([1.0, -2, 5, 3, 1])  # the temperatures, 1
    z = torch.tensor([-0.5, 75, 4, 75, 5, 90, 3, 60, 1])  # two means, the last day, 1
    found = Forecaster.linear_features(torch.stack([torch.zeros(4, 6), window], dim=1), 2)
    expected = [x, 0.6 * x, -0.8 * x, z, 0.6 * z, -0.8 * z, 0.5 * z, 2 * z]
    assert_close([block[1] for block in found], expected, tolerance=1e-6)
    # Ten minutes are read in means of an hour, here at one time of the year and of the day.
    inputs = torch.randn(2 * 144, B, 6, dtype=torch.float64)
    inputs[..., 2:] = inputs[-1, :, 2:]
    means = inputs.view(48, 6, B, 6).mean(1)
    assert_close(Forecaster.linear_features(inputs, 144), Forecaster.linear_features(means, 24))


@all_cells
@both_loops
def test_a_forecaster_corrects_the_linear_forecast_by_its_last_state(cell, loops):
    # The last state is that after the last known step; in the backward direction, after the first.
    torch.manual_seed(9)
    horizon = 60 if cell == "bi_lstm" else 30  # W_hq is square: the output can be the state
    model, inputs = Forecaster(cell, D, 30, T, horizon, 1, 0.75, loops), torch.randn(T, B, D)
    params = dict(model.named_parameters())
    assert not any(params[name].any() for name in params if ".b_" in name)
    assert not model(inputs).any()  # at first W_hq is 0, like W_xq, which is not trained
    assert "W_xq" in model.state_dict() and "W_xq" not in params
    model.recurrence.W_hq.data, states = torch.eye(horizon), model.recurrence(inputs)
    last = torch.cat([states[-1, :, :30], states[0 if cell == "bi_lstm" else -1, :, 30:]], dim=1)
    assert (model(inputs) / last).round(decimals=3).unique().tolist() == [0, 4]  # dropout
    model.share.fill_(0.25)
    linear = torch.cat(Forecaster.linear_features(inputs, 1), dim=1) @ model.W_xq.normal_()
    assert_close([model.eval()(inputs)], [linear + 0.25 * last], tolerance=1e-5)
