"""The four cells: shapes, steps by hand, torch's own layers, properties; then the two models."""

import ast
import copy
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rnn_models import (
    POOLS,
    Forecaster,
    Recurrence,
    TextClassifier,
    bi_lstm,
    grad_clipping,
    gru,
    init_params,
    init_state,
    lstm,
    param_names,
    pool_states,
    reverse,
    rnn,
)

CELLS = {"rnn": rnn, "gru": gru, "lstm": lstm, "bi_lstm": bi_lstm}
T, B, D, h, Q = 7, 5, 4, 6, 3
LENGTHS = torch.tensor([7, 1, 4, 6, 2])

all_cells = pytest.mark.parametrize("cell", CELLS)
both_loops = pytest.mark.parametrize("loops", ["fast", "plain"])


def test_outputs_are_T_B_Q_and_the_state_keeps_its_form():
    H = (B, h)
    state_shapes = {"rnn": (H,), "gru": (H,), "lstm": (H, H), "bi_lstm": ((H, H), (H, H))}
    for cell, function in CELLS.items():
        first = init_state(cell, B, h)
        outputs, last = function(torch.randn(T, B, D), first, init_params(cell, D, h, Q))
        assert outputs.shape == (T, B, Q)
        assert shapes(first) == shapes(last) == state_shapes[cell]
        assert not any(tensor.any() for tensor in flatten(first))


def shapes(state):
    return tuple(shapes(part) if isinstance(part, tuple) else tuple(part.shape) for part in state)


def flatten(state):
    return [tensor for part in state for tensor in (part if isinstance(part, tuple) else (part,))]


# --- two steps by hand --------------------------------------------------------------------------
# One sequence, one input, one unit, one output: X = 1, then -2; H = 0.5 at the start; Y = 2 H - 1.


def s(a):
    """The logistic sigmoid."""
    return 1 / (1 + math.exp(-a))


def number(n):
    return torch.tensor([[n]], dtype=torch.float64)  # (1, 1)


X = torch.tensor([[[1.0]], [[-2.0]]], dtype=torch.float64)  # (T, B, D) = (2, 1, 1)


def scalars(*rows):
    """The parameters from a row W_x, W_h, b for each gate; then W_hq = 2 and b_q = -1."""
    gates = [p for W_x, W_h, b in rows for p in (number(W_x), number(W_h), number(b)[0])]
    return [*gates, number(2), number(-1)[0]]


def test_rnn_by_hand():
    H1 = math.tanh(0.5 * 1 + 0.4 * 0.5 + 0.1)  # tanh(0.8) = 0.66404
    H2 = math.tanh(0.5 * -2 + 0.4 * H1 + 0.1)  # tanh(-0.63439) = -0.56106
    outputs, (H,) = rnn(X, (number(0.5),), scalars((0.5, 0.4, 0.1)))
    assert outputs.flatten().tolist() == pytest.approx([2 * H1 - 1, 2 * H2 - 1])
    assert H.item() == pytest.approx(-0.56106, abs=1e-5)


def test_gru_by_hand():
    Z = s(0.6 * 1 - 0.4 * 0.5 + 0.2)  # s(0.6) = 0.64566
    R = s(-0.5 * 1 + 0.8 * 0.5 + 0.3)  # s(0.2) = 0.54983
    H_tilde = math.tanh(0.7 * 1 + 0.9 * (R * 0.5) - 0.1)  # tanh(0.84743) = 0.68972
    H1 = Z * 0.5 + (1 - Z) * H_tilde  # 0.56723
    Z = s(0.6 * -2 - 0.4 * H1 + 0.2)  # s(-1.22689) = 0.22673
    R = s(-0.5 * -2 + 0.8 * H1 + 0.3)  # s(1.75378) = 0.85243
    H_tilde = math.tanh(0.7 * -2 + 0.9 * (R * H1) - 0.1)  # tanh(-1.06483) = -0.78751
    H2 = Z * H1 + (1 - Z) * H_tilde  # -0.48035
    params = scalars((0.6, -0.4, 0.2), (-0.5, 0.8, 0.3), (0.7, 0.9, -0.1))
    outputs, (H,) = gru(X, (number(0.5),), params)
    assert outputs.flatten().tolist() == pytest.approx([2 * H1 - 1, 2 * H2 - 1])
    assert H.item() == pytest.approx(-0.48035, abs=1e-5)


LSTM_ROWS = (0.6, -0.4, 0.2), (-0.5, 0.8, 0.3), (0.3, 0.5, -0.2), (0.7, 0.9, -0.1)  # i, f, o, c


def lstm_step(X, H, C):
    I = s(0.6 * X - 0.4 * H + 0.2)
    F = s(-0.5 * X + 0.8 * H + 0.3)
    O = s(0.3 * X + 0.5 * H - 0.2)
    C_tilde = math.tanh(0.7 * X + 0.9 * H - 0.1)
    C = F * C + I * C_tilde
    return O * math.tanh(C), C


def test_lstm_by_hand():
    # Step 1, C = -1 before: I = s(0.6) = 0.64566, F = s(0.2) = 0.54983, O = s(0.35) = 0.58662,
    #   C~ = tanh(1.05) = 0.78181, C = -0.54983 + 0.64566 * 0.78181 = -0.04506, H = -0.02641
    # Step 2: I = s(-0.98943) = 0.27102, F = s(1.27887) = 0.78226, O = s(-0.81321) = 0.30721,
    #   C~ = tanh(-1.52377) = -0.90935, C = 0.78226 * -0.04506 - 0.27102 * 0.90935 = -0.28170
    H1, C1 = lstm_step(1, 0.5, -1)
    H2, C2 = lstm_step(-2, H1, C1)
    steps = H1, C1, H2, C2
    assert steps == pytest.approx((-0.02641, -0.04506, -0.08432, -0.28170), abs=1e-5)
    outputs, (H, C) = lstm(X, (number(0.5), number(-1)), scalars(*LSTM_ROWS))
    assert outputs.flatten().tolist() == pytest.approx([2 * H1 - 1, 2 * H2 - 1])
    assert (H.item(), C.item()) == pytest.approx((H2, C2))


def test_bi_lstm_by_hand():
    # The same gates in both directions; the backward one reads -2, then 1. Y = 2 H + 30 H_b - 1.
    H1, C1 = lstm_step(1, 0.5, -1)
    H2, C2 = lstm_step(-2, H1, C1)
    H_b2, C_b2 = lstm_step(-2, 0.4, 0.6)
    H_b1, C_b1 = lstm_step(1, H_b2, C_b2)
    assert (H_b2, C_b2, H_b1, C_b1) == pytest.approx((0.10533, 0.30650, 0.27079, 0.55365), abs=1e-5)
    *gates, _, b_q = scalars(*LSTM_ROWS)
    params = [*gates, *gates, torch.cat([number(2), number(30)]), b_q]
    state = (number(0.5), number(-1)), (number(0.4), number(0.6))
    outputs, ((H, C), (H_b, C_b)) = bi_lstm(X, state, params)
    Y1, Y2 = 2 * H1 + 30 * H_b1 - 1, 2 * H2 + 30 * H_b2 - 1
    assert outputs.flatten().tolist() == pytest.approx([Y1, Y2])
    assert (H.item(), C.item(), H_b.item(), C_b.item()) == pytest.approx((H2, C2, H_b1, C_b1))


# --- against torch's own layers -----------------------------------------------------------------


def random_case(cell):
    """Inputs, a state and parameters other than zero, all float64 leaves with gradients."""
    torch.manual_seed(0)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    params = [leaf(*param.shape) for param in init_params(cell, D, h, Q)]
    pair, pair_b = [(leaf(B, h), leaf(B, h)) for _ in range(2)]
    states = {"rnn": pair[:1], "gru": pair[:1], "lstm": pair, "bi_lstm": (pair, pair_b)}
    return leaf(T, B, D), states[cell], params


def assert_close(ours, theirs, tolerance=1e-10):
    torch.testing.assert_close(list(ours), list(theirs), rtol=tolerance, atol=tolerance)


def torch_layer(cell, inputs, state, params):
    """The outputs and the last state, a list of tensors, of torch's layer with our weights.

    It holds ours transposed, the gates in the order i f c o (LSTM) or r z h (GRU), and two biases.
    """
    gates = {"rnn": "h", "gru": "rzh"}.get(cell, "ifco")
    named = dict(zip(param_names(cell), params, strict=True))
    weights = {}
    for ours, theirs in [("", ""), ("_b", "_reverse")][: 2 if cell == "bi_lstm" else 1]:
        for kind, name in [("W_x", "weight_ih"), ("W_h", "weight_hh"), ("b_", "bias_ih")]:
            parts = [named[kind + gate + ours].t() for gate in gates]
            weights[f"{name}_l0{theirs}"] = torch.cat(parts)
        weights[f"bias_hh_l0{theirs}"] = torch.zeros(len(gates) * h, dtype=torch.float64)
    layer = {"rnn": nn.RNN, "gru": nn.GRU}.get(cell, nn.LSTM)
    layer = layer(D, h, bidirectional=cell == "bi_lstm").double()
    flat = flatten(state)  # H, or H C, or H C H_b C_b; torch wants all H, then all C
    first = flat[0][None] if len(flat) == 1 else (torch.stack(flat[::2]), torch.stack(flat[1::2]))
    states, last = torch.func.functional_call(layer, weights, (inputs, first))
    last = list(last) if len(flat) == 1 else [H for pair in zip(*last, strict=True) for H in pair]
    return states @ params[-2] + params[-1], last


@pytest.mark.parametrize("cell", ["rnn", "lstm", "bi_lstm"])
def test_values_states_and_gradients_are_those_of_torchs_layer(cell):
    inputs, state, params = random_case(cell)
    outputs, last = CELLS[cell](inputs, state, params)
    outputs_torch, last_torch = torch_layer(cell, inputs, state, params)
    ours, theirs = [outputs, *flatten(last)], [outputs_torch, *last_torch]
    assert_close(ours, theirs)
    leaves, weights = [inputs, *flatten(state), *params], [torch.randn_like(Y) for Y in ours]
    gradients = [torch.autograd.grad(values, leaves, weights) for values in (ours, theirs)]
    assert_close(*gradients)


def test_gru_is_the_numpy_rederivation():
    inputs, state, params = random_case("gru")
    outputs, (last,) = gru(inputs, state, params)
    arrays = [param.detach().numpy() for param in params]
    W_xz, W_hz, b_z, W_xr, W_hr, b_r, W_xh, W_hh, b_h, W_hq, b_q = arrays
    H = state[0].detach().numpy()
    for X, Y in zip(inputs.detach().numpy(), outputs.detach().numpy(), strict=True):
        Z = 1 / (1 + np.exp(-(X @ W_xz + H @ W_hz + b_z)))
        R = 1 / (1 + np.exp(-(X @ W_xr + H @ W_hr + b_r)))
        H_tilde = np.tanh(X @ W_xh + (R * H) @ W_hh + b_h)
        H = Z * H + (1 - Z) * H_tilde
        assert np.allclose(Y, H @ W_hq + b_q, rtol=0, atol=1e-12)
    assert np.allclose(last.detach().numpy(), H, rtol=0, atol=1e-12)


def test_gru_is_not_torchs_gru_unless_W_hh_is_diagonal():
    # The lecture's (R * H) W_hh is torch's R * (H W_hh) only if W_hh mixes no units.
    inputs, state, params = random_case("gru")
    for W_hh, equal in [(params[7], False), (params[7] * torch.eye(h), True)]:
        params[7] = W_hh
        outputs, _ = gru(inputs, state, params)
        outputs_torch, _ = torch_layer("gru", inputs, state, params)
        assert torch.allclose(outputs, outputs_torch, atol=1e-10 if equal else 0.1) == equal


def test_only_the_benchmark_uses_torchs_recurrent_layers_and_nothing_scikit_learn():
    layers = r"\bnn\.(modules\.rnn\.)?(RNN|GRU|LSTM)|from torch.*(RNN|GRU|LSTM|lstm|gru|rnn_)"
    functions = r"\b(torch|_VF|aten)\.(lstm|gru|rnn_|_thnn|mkldnn_rnn)"
    forbidden = re.compile(rf"{layers}|{functions}|\bsklearn")
    for path in Path(__file__).parent.parent.glob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))  # leaves the comments out
        kinds = ast.Attribute | ast.Import | ast.ImportFrom
        used = [ast.unparse(node) for node in nodes if isinstance(node, kinds)]
        assert any(map(forbidden.search, used)) == (path.name == "bench.py"), path


# --- properties of the cells --------------------------------------------------------------------


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_a_sequence_in_two_pieces_gives_what_the_whole_gives(cell):
    inputs, state, params = random_case(cell)
    outputs, last = CELLS[cell](inputs, state, params)
    first, middle = CELLS[cell](inputs[:3], state, params)
    second, end = CELLS[cell](inputs[3:], middle, params)
    assert_close([torch.cat([first, second]), *end], [outputs, *last])


def test_bi_lstm_with_lengths_gives_each_sequence_the_outputs_that_it_gets_alone():
    inputs, state, params = random_case("bi_lstm")
    outputs, _ = bi_lstm(inputs, state, params, LENGTHS)
    for i, n in enumerate(LENGTHS.tolist()):
        own = tuple(tuple(tensor[i : i + 1] for tensor in pair) for pair in state)
        alone, _ = bi_lstm(inputs[:n, i : i + 1], own, params)
        assert_close([outputs[:n, i : i + 1]], [alone])


def test_reverse_turns_the_first_steps_of_each_sequence_and_leaves_its_padding():
    sequences = torch.tensor([[1, 5], [2, 6], [3, 7], [4, 8]])[:, :, None]  # 1 2 3 4 and 5 6 7 8
    turned = reverse(sequences, torch.tensor([3, 1]))[:, :, 0]
    assert turned.t().tolist() == [[3, 2, 1, 4], [5, 6, 7, 8]]


# --- parameters and clipping --------------------------------------------------------------------

LSTM_NAMES = "W_xi W_hi b_i W_xf W_hf b_f W_xo W_ho b_o W_xc W_hc b_c"
NAMES = {
    "rnn": "W_xh W_hh b_h W_hq b_q",
    "gru": "W_xz W_hz b_z W_xr W_hr b_r W_xh W_hh b_h W_hq b_q",
    "lstm": f"{LSTM_NAMES} W_hq b_q",
    "bi_lstm": f"{LSTM_NAMES} {LSTM_NAMES.replace(' ', '_b ')}_b W_hq b_q",
}


@all_cells
def test_names_order_and_values_of_the_first_parameters(cell):
    torch.manual_seed(1)
    params = init_params(cell, 50, 16, 40)
    for name, param in zip(NAMES[cell].split(), params, strict=True):
        assert param.is_leaf and param.requires_grad
        if name.startswith("W_x") or name == "W_hq":  # uniform in +-1/sqrt(16), mean 0
            rows = 32 if cell == "bi_lstm" else 16
            assert param.shape == ((rows, 40) if name == "W_hq" else (50, 16))
            assert -0.25 <= param.min() < -0.24 and 0.24 < param.max() <= 0.25
            assert abs(param.mean().item()) < 0.02
        elif name.startswith("W_h"):  # orthogonal
            assert torch.allclose(param @ param.t(), torch.eye(16), atol=1e-5)
        else:
            value = 1.0 if name in ("b_f", "b_f_b") else 0.0
            assert torch.equal(param, torch.full((40 if name == "b_q" else 16,), value))
    drawn = [param.flatten()[0].item() for param in params if param.ndim == 2]
    assert len(set(drawn)) == len(drawn)  # no weight is the copy of another
    torch.manual_seed(1)
    assert_close(init_params(cell, 50, 16, 40), params, tolerance=0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Recurrence("cnn", 1, 1, 1), "rnn, gru, lstm, bi_lstm, not 'cnn'"),
        (lambda: init_state("LSTM", 1, 1), "rnn, gru, lstm, bi_lstm"),
        (lambda: init_params("rnn", 1, 0, 1), "at least 1"),
        (lambda: Recurrence("rnn", 1, 1, 1, loops="slow"), "fast, plain, not 'slow'"),
        (lambda: TextClassifier("rnn", [2], 1, 1, 1, pool="sum"), "last, mean, max, not 'sum'"),
        (lambda: pool_states(torch.ones(1, 1, 1), torch.ones(1).long(), "sum"), "last, mean, max"),
        (lambda: Recurrence("gru", D, h, Q)(torch.zeros(0, B, D)), "step"),
        (lambda: Recurrence("lstm", D, h, Q, "plain")(torch.zeros(0, B, D)), "step"),
        (lambda: grad_clipping([], math.nan), "above 0"),
    ],
)
def test_wrong_names_sizes_and_inputs_without_a_step_raise_ValueError(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("theta", [0.5, 12.9, 13.1])
def test_grad_clipping_is_torchs_and_returns_the_norm(theta):
    ours = [torch.zeros(n, requires_grad=True) for n in (1, 2, 1, 1)]
    for param, grad in zip(ours, ([3.0], [0.0, -4.0], None, [12.0]), strict=True):
        param.grad = grad and torch.tensor(grad)  # the joint norm is 13
    theirs = copy.deepcopy(ours)
    assert grad_clipping(ours, theta).item() == pytest.approx(13.0)
    nn.utils.clip_grad_norm_(theirs, theta)
    ours, theirs = ([p.grad for p in params if p.grad is not None] for params in (ours, theirs))
    assert_close(ours, theirs, tolerance=1e-5)
    assert grad_clipping([torch.zeros(2, requires_grad=True)], theta).item() == 0.0


# --- Recurrence ---------------------------------------------------------------------------------


def random_recurrence(cell, loops="fast"):
    """In float64, with biases other than zero; the same numbers for both loops."""
    torch.manual_seed(2)
    recurrence = Recurrence(cell, D, h, Q, loops).double()
    for param in recurrence.parameters():
        nn.init.normal_(param)
    return recurrence, torch.randn(T, B, D, dtype=torch.float64, requires_grad=True)


@all_cells
@both_loops
def test_a_recurrence_is_the_cell_from_the_zero_state_and_has_its_gradients(cell, loops):
    recurrence, inputs = random_recurrence(cell, loops)
    names, params = zip(*recurrence.named_parameters(), strict=True)
    assert " ".join(names) == NAMES[cell]
    in_turn = [param for direction in recurrence.directions() for param in direction]
    assert all(a is b for a, b in zip(in_turn, params[:-2], strict=True))
    states = recurrence(inputs, LENGTHS)
    assert states.shape == (T, B, 2 * h if cell == "bi_lstm" else h)
    state = init_state(cell, B, h, dtype=torch.float64)
    lengths = [LENGTHS] if cell == "bi_lstm" else []
    results = []
    for outputs in (recurrence.output(states), CELLS[cell](inputs, state, params, *lengths)[0]):
        gradients = torch.autograd.grad(outputs.square().sum(), [inputs, *params])
        results.append([outputs, *gradients])
    assert_close(*results)


@all_cells
def test_a_recurrence_survives_copying_pickling_and_compiling(cell):
    recurrence, inputs = random_recurrence(cell)
    recurrence(inputs, LENGTHS)  # it has run before
    pickled = pickle.loads(pickle.dumps(recurrence))
    compiled = torch.compile(recurrence, backend="eager")
    results = []
    for module in (recurrence, copy.deepcopy(recurrence), pickled, compiled):
        states = module(inputs[:2], LENGTHS.clamp(max=2))
        gradients = torch.autograd.grad(states.square().sum(), module.params[:-2])
        results.append([states, *gradients])
    for result in results[1:]:
        assert_close(result, results[0])


@all_cells
@both_loops
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_recurrence_trains_under_autocast_to_bfloat16(cell, loops, dtype):
    torch.manual_seed(3)
    recurrence, inputs = Recurrence(cell, D, h, Q, loops), torch.randn(3, B, D).to(dtype)
    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            states = recurrence(inputs if enabled else inputs.float())
        gradients = torch.autograd.grad(states.sum(), recurrence.params[:-2])
        results.append([states.float(), *(gradient / B for gradient in gradients)])
    assert_close(*results, tolerance=0.05)


@all_cells
@both_loops
def test_an_empty_batch_gives_empty_results(cell, loops):
    no_lengths = torch.zeros(0, dtype=torch.long)
    for units in (h, 256):  # wide products take another way
        recurrence = Recurrence(cell, units, units, Q, loops)
        states = recurrence(torch.zeros(2, 0, units), no_lengths)
        assert states.shape == (2, 0, 2 * units if cell == "bi_lstm" else units)
        states.sum().backward()
        assert not any(param.grad.any() for param in recurrence.params[:-2])
    for pool in POOLS:
        model = TextClassifier(cell, [9, 9], D, h, Q, pool, loops=loops)
        assert model(torch.zeros(T, 0, 2, dtype=torch.long), no_lengths).shape == (0, Q)
    assert Forecaster(cell, D, h, T, Q, loops=loops)(torch.zeros(T, 0, D)).shape == (0, Q)


# --- pooling, TextClassifier --------------------------------------------------------------------


@pytest.mark.parametrize("bidirectional", [False, True])
def test_pooling_is_a_slow_loop_over_the_texts(bidirectional):
    states = torch.randn(T, B, 4)
    for i, n in enumerate(LENGTHS.tolist()):
        text = states[:n, i]
        last = torch.cat([text[-1, :2], text[0 if bidirectional else -1, 2:]])
        slow = {"last": last, "mean": sum(text) / n, "max": torch.stack(list(text)).max(0)[0]}
        for pool, expected in slow.items():
            found = pool_states(states, LENGTHS, pool, bidirectional)[i]
            assert torch.allclose(found, expected, atol=1e-6)


@all_cells
@pytest.mark.parametrize("pool", POOLS)
@both_loops
def test_a_texts_logits_do_not_depend_on_what_it_is_batched_with(cell, pool, loops):
    torch.manual_seed(4)
    model = TextClassifier(cell, [50, 9], 8, 6, 4, pool, loops=loops).double().eval()
    texts = [torch.randint(0, 9, (n, 1, 2)) for n in LENGTHS.tolist()]
    alone = torch.cat([model(text, torch.tensor([len(text)])) for text in texts])
    assert alone.shape == (5, 4) and alone.std(dim=0).min() > 0.01
    tokens = torch.randint(0, 9, (T + 3, 5, 2))  # random padding
    for i, text in enumerate(texts):
        tokens[: len(text), i] = text[:, 0]
    assert_close([model(tokens, LENGTHS)], [alone])
    assert_close([model(tokens[:T, [4, 0]], LENGTHS[[4, 0]])], [alone[[4, 0]]])
    alone.square().sum().backward()
    assert all(param.grad.any() for param in model.parameters())


def test_the_embeddings_of_a_tokens_aspects_are_added_and_their_sum_has_variance_1():
    torch.manual_seed(5)
    model = TextClassifier("rnn", [400, 300], 64, 2, 2).eval()
    tokens = torch.stack([torch.randint(0, n, (T, B)) for n in (400, 300)], dim=2)
    first, second = (embedding.weight for embedding in model.embeddings)
    assert torch.allclose(model.embed(tokens), first[tokens[..., 0]] + second[tokens[..., 1]])
    assert first.var().item() == pytest.approx(1 / 2, rel=0.05)
    assert second.var().item() == pytest.approx(1 / 2, rel=0.05)


def assert_dropped_a_quarter(mask):
    kept = mask.isclose(torch.tensor(4 / 3), rtol=1e-4)
    assert (kept | (mask == 0)).all() and 0.6 < kept.float().mean() < 0.9


def test_dropout_in_training_draws_one_mask_for_all_steps_and_none_in_eval():
    torch.manual_seed(6)
    model = TextClassifier("rnn", [20], 30, 30, 30, pool="last", dropout=0.25)
    tokens, lengths = torch.randint(0, 20, (T, B, 1)), torch.full((B,), T)
    embedded = model.embeddings[0].weight[tokens[..., 0]]
    mask = model.embed(tokens) / embedded
    assert_dropped_a_quarter(mask)
    assert torch.allclose(mask, mask[:1]) and not torch.allclose(mask[0], mask[0, :1])

    model.recurrence.W_hq.data, states = torch.eye(30), torch.rand(T, B, 30) + 1
    assert_dropped_a_quarter(model.classify(states, lengths) / states[-1])
    model.eval()
    assert torch.equal(model.embed(tokens), embedded)
    assert torch.equal(model.classify(states, lengths), states[-1])


# --- Forecaster ---------------------------------------------------------------------------------


@all_cells
def test_an_untrained_forecaster_is_the_linear_forecast_worked_out_by_hand(cell):
    # Two windows of three known steps. A step: temperature, another feature, sine and cosine of the
    # year, sine and cosine of the day. What counts: the temperatures, the year at the last step.
    window = [
        [1, 70, 0.11, 0.12, 0.13, 0.14],
        [-2, 80, 0.21, 0.22, 0.23, 0.24],
        [5, 90, 0.6, -0.8, 0.33, 0.34],
    ]
    windows = torch.stack([torch.tensor(window), -torch.tensor(window)], dim=1)
    model = Forecaster(cell, 6, h, known=3, horizon=2)
    assert torch.equal(model(windows), torch.zeros(2, 2))
    W_x = [[0.1, 1], [0.2, 0], [0.3, 0], [0.4, -7]]  # for the three temperatures and 1
    W_x_sine = [[1, 0], [2, 2], [3, 0], [4, 0]]
    W_x_cosine = [[10, 0], [20, 0], [30, 3], [40, 0.5]]
    model.W_xq.copy_(torch.tensor([*W_x, *W_x_sine, *W_x_cosine]))
    # 0.1 - 0.4 + 1.5 + 0.4 = 1.6;  0.6 (1 - 4 + 15 + 4) = 9.6;  -0.8 (10 - 40 + 150 + 40) = -128
    # 1 - 7 = -6;  0.6 * 2 * -2 = -2.4;  -0.8 (3 * 5 + 0.5) = -12.4
    # All signs changed: -1.2 + 0.4 = -0.8;  -0.6 (-12 + 4) = 4.8;  0.8 (-120 + 40) = -64
    # -1 - 7 = -8;  -0.6 * 2 * 2 = -2.4;  0.8 (-15 + 0.5) = -11.6
    assert model(windows).flatten().tolist() == pytest.approx([-116.8, -20.8, -60.0, -22.0])
    assert "W_xq" in model.state_dict() and "W_xq" not in dict(model.named_parameters())


@pytest.mark.parametrize("cell", ["rnn", "lstm", "bi_lstm"])
@both_loops
def test_the_last_state_of_torchs_layer_is_added_to_the_linear_forecast(cell, loops):
    # In the forward direction the state after the last known step, backward after the first.
    torch.manual_seed(8)
    model = Forecaster(cell, D, h, known=T, horizon=Q, loops=loops).double()
    model.W_xq.normal_()
    inputs = torch.randn(T, B, D).double()
    linear = model(inputs).detach()
    for param in model.parameters():
        nn.init.normal_(param)
    *_, W_hq, b_q = params = model.recurrence.params
    _, last = torch_layer(cell, inputs, init_state(cell, B, h, dtype=torch.float64), params)
    H = torch.cat(last[::2], dim=1)  # [H], or [H, H_b]
    assert_close([model(inputs)], [linear + (H @ W_hq + b_q)])


def test_a_new_forecasters_biases_are_zero_the_forget_gates_too():
    named = dict(Forecaster("bi_lstm", D, h, T, Q).recurrence.named_parameters())
    zeros = {name for name, param in named.items() if not param.any()}
    assert zeros == {"W_hq", *(name for name in named if name.startswith("b_"))}


def test_a_forecaster_drops_out_its_last_state_in_training_only():
    torch.manual_seed(9)
    model = Forecaster("rnn", D, 30, known=T, horizon=30, dropout=0.25)
    model.recurrence.W_hq.data, inputs = torch.eye(30), torch.randn(T, B, D)
    last = model.recurrence(inputs)[-1]
    assert_dropped_a_quarter(model(inputs) / last)
    assert torch.equal(model.eval()(inputs), last)
