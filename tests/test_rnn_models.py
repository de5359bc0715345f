"""The recurrences against numbers worked out by hand, torch's own layers, a NumPy re-derivation, and properties."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch

import rnn_models
from rnn_models import (
    GATES,
    POOLS,
    TextClassifier,
    bi_lstm,
    grad_clipping,
    gru,
    hidden_states,
    init_params,
    init_state,
    lstm,
    param_names,
    pool_states,
    reverse,
    rnn,
)

CELLS = {"rnn": rnn, "gru": gru, "lstm": lstm, "bi_lstm": bi_lstm}


def column(*numbers):
    """Inputs (T, 1, 1) of one sequence with one input a step."""
    return torch.tensor(numbers, dtype=torch.float64).reshape(-1, 1, 1)


def scalars(*numbers):
    """A parameter list for D = h = Q = 1: biases are vectors, weights 1 x 1, in threes W_x, W_h, b, then W_hq, b_q."""
    is_bias = [i % 3 == 2 for i in range(len(numbers) - 2)] + [False, True]
    return [
        torch.tensor([n], dtype=torch.float64).reshape((1,) if bias else (1, 1))
        for n, bias in zip(numbers, is_bias, strict=True)
    ]


ONE = torch.ones(1, 1, dtype=torch.float64)


# --- by hand: D = h = Q = 1, two steps, four decimals -----------------------------------------------------------------


def test_rnn_by_hand():
    # W_xh 0.5, W_hh 0.4, b_h 0.1, W_hq 2, b_q -1; X = 1, -1; H_0 = 1
    # H_1 = tanh(0.5 + 0.4 + 0.1) = tanh(1) = 0.76159
    # H_2 = tanh(-0.5 + 0.4 * 0.76159 + 0.1) = tanh(-0.09536) = -0.09508
    # Y = 2 H - 1: 0.52319, -1.19015
    outputs, (H,) = rnn(column(1, -1), (ONE,), scalars(0.5, 0.4, 0.1, 2, -1))
    assert outputs.flatten().tolist() == pytest.approx([0.52319, -1.19015], abs=2e-5)
    assert H.item() == pytest.approx(-0.09508, abs=2e-5)


def test_gru_by_hand():
    # z: 1, 0, 0;  r: 0, 1, 0;  h: 0.5, 2, 0;  W_hq 1, b_q 0; X = 1, 0; H_0 = 1
    # Step 1: Z = s(1) = 0.73106, R = s(1) = 0.73106, H~ = tanh(0.5 + 2 * 0.73106) = tanh(1.96212) = 0.96124
    #         H = 0.73106 * 1 + 0.26894 * 0.96124 = 0.98958
    # Step 2: Z = s(0) = 0.5, R = s(0.98958) = 0.72900, H~ = tanh(2 * 0.72900 * 0.98958) = tanh(1.44280) = 0.89431
    #         H = 0.5 * 0.98958 + 0.5 * 0.89431 = 0.94194
    outputs, (H,) = gru(column(1, 0), (ONE,), scalars(1, 0, 0, 0, 1, 0, 0.5, 2, 0, 1, 0))
    assert outputs.flatten().tolist() == pytest.approx([0.98958, 0.94194], abs=3e-5)
    assert H.item() == pytest.approx(0.94194, abs=3e-5)


# i: 1, 0, 0;  f: 0, 0, 1;  o: 0, 1, 0;  c: 0.5, 0.5, 0
LSTM_GATES = (1, 0, 0, 0, 0, 1, 0, 1, 0, 0.5, 0.5, 0)


def test_lstm_by_hand():
    # X = 1, 0; H_0 = 0, C_0 = 1; F = s(1) = 0.73106 throughout
    # Step 1: I = s(1) = 0.73106, O = s(0) = 0.5, C~ = tanh(0.5) = 0.46212
    #         C = 0.73106 + 0.73106 * 0.46212 = 1.06890, H = 0.5 * tanh(1.06890) = 0.5 * 0.78909 = 0.39455
    # Step 2: I = s(0) = 0.5, O = s(0.39455) = 0.59738, C~ = tanh(0.19727) = 0.19475
    #         C = 0.73106 * 1.06890 + 0.5 * 0.19475 = 0.87880, H = 0.59738 * tanh(0.87880) = 0.59738 * 0.70582 = 0.42164
    outputs, (H, C) = lstm(column(1, 0), (0 * ONE, ONE), scalars(*LSTM_GATES, 10, 1))
    assert outputs.flatten().tolist() == pytest.approx([4.9455, 5.2164], abs=3e-4)
    assert (H.item(), C.item()) == pytest.approx((0.42164, 0.87880), abs=3e-5)


def test_bi_lstm_by_hand():
    # The forward half is the one above. The backward half, with the same weights and state, reads 0, then 1:
    # Step t=2 (X = 0): I = 0.5, O = 0.5, C~ = 0; C = 0.73106, H = 0.5 * tanh(0.73106) = 0.5 * 0.62371 = 0.31185
    # Step t=1 (X = 1): I = 0.73106, O = s(0.31185) = 0.57734, C~ = tanh(0.5 + 0.15593) = tanh(0.65593) = 0.57565
    #   C = 0.73106 * 0.73106 + 0.73106 * 0.57565 = 0.53445 + 0.42084 = 0.95528
    #   H = 0.57734 * tanh(0.95528) = 0.57734 * 0.74217 = 0.42848
    # Y = H + 100 H_b: t=1: 0.39455 + 42.848, t=2: 0.42164 + 31.185
    params = [*scalars(*LSTM_GATES, 0, 0)[:-2] * 2, torch.tensor([[1.0], [100.0]], dtype=torch.float64), ONE[0] * 0]
    outputs, ((H, C), (H_b, C_b)) = bi_lstm(column(1, 0), ((0 * ONE, ONE), (0 * ONE, ONE)), params)
    assert outputs.flatten().tolist() == pytest.approx([0.39455 + 42.848, 0.42164 + 31.185], abs=3e-3)
    assert (H.item(), C.item()) == pytest.approx((0.42164, 0.87880), abs=3e-5)
    assert (H_b.item(), C_b.item()) == pytest.approx((0.42848, 0.95528), abs=3e-5)


# --- against torch's own layers ---------------------------------------------------------------------------------------

T, B, D, H_UNITS, Q = 7, 5, 4, 6, 3


def random_case(cell, seed=0, T=T, B=B):
    """Parameters, inputs and a state other than zero, all float64 leaves that require gradients."""
    torch.manual_seed(seed)
    params = [p.detach().double().requires_grad_() for p in init_params(cell, D, H_UNITS, Q)]
    for p in params:
        p.data += 0.1 * torch.randn_like(p)  # biases other than zero
    inputs = torch.randn(T, B, D, dtype=torch.float64, requires_grad=True)
    flat = [torch.randn(B, H_UNITS, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    state = {"rnn": (flat[0],), "gru": (flat[0],), "lstm": (flat[0], flat[1])}.get(
        cell, (tuple(flat[:2]), tuple(flat[2:]))
    )
    return inputs, state, params


def flatten(state):
    return [tensor for part in state for tensor in (part if isinstance(part, tuple) else (part,))]


def torch_layer(cell, params):
    """torch's layer with the weights of our list: its gates stand i f c o, and its weights are transposed."""
    layer = {"rnn": torch.nn.RNN, "lstm": torch.nn.LSTM, "bi_lstm": torch.nn.LSTM}[cell]
    layer = layer(D, H_UNITS, bidirectional=cell == "bi_lstm").double()
    order = [0] if cell == "rnn" else [0, 1, 3, 2]
    named = dict(zip(param_names(cell), params, strict=True))
    for ours, theirs in (("", ""), ("_b", "_reverse"))[: 2 if cell == "bi_lstm" else 1]:
        gates = [GATES[cell][k] for k in order]
        for kind, name in (("W_x", "weight_ih_l0"), ("W_h", "weight_hh_l0"), ("b_", "bias_ih_l0")):
            parts = [named[f"{kind}{gate}{ours}"] for gate in gates]
            getattr(layer, name + theirs).data = torch.cat(
                [p.detach().t() if p.ndim == 2 else p.detach() for p in parts]
            )
        getattr(layer, "bias_hh_l0" + theirs).data.zero_()
    return layer


@pytest.mark.parametrize("cell", ["rnn", "lstm", "bi_lstm"])
def test_outputs_states_and_gradients_are_those_of_torch(cell):
    inputs, state, params = random_case(cell)
    outputs, last = CELLS[cell](inputs, state, params)
    torch.manual_seed(9)
    weight = torch.randn_like(outputs)
    state_weights = [torch.randn_like(tensor) for tensor in flatten(last)]
    loss = (outputs * weight).sum() + sum((s * w).sum() for s, w in zip(flatten(last), state_weights, strict=True))
    ours = torch.autograd.grad(loss, [inputs, *flatten(state), *params])

    layer = torch_layer(cell, params)
    if cell == "rnn":
        hidden, last_torch = layer(inputs, state[0][None])
        flat_torch = [last_torch[0]]
    else:
        pairs = [state] if cell == "lstm" else list(state)
        hidden, (H, C) = layer(inputs, tuple(torch.stack(parts) for parts in zip(*pairs, strict=True)))
        flat_torch = [tensor[k] for k in range(len(pairs)) for tensor in (H, C)]
    W_hq, b_q = params[-2:]
    outputs_torch = hidden @ W_hq + b_q
    loss = (outputs_torch * weight).sum() + sum((s * w).sum() for s, w in zip(flat_torch, state_weights, strict=True))
    theirs = torch.autograd.grad(loss, [inputs, *flatten(state), *layer.parameters(), W_hq, b_q])

    assert torch.allclose(outputs, outputs_torch, atol=1e-12)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(flatten(last), flat_torch, strict=True))
    count = 1 + len(flatten(state))
    for a, b in zip((*ours[:count], *ours[-2:]), (*theirs[:count], *theirs[-2:]), strict=True):
        assert torch.allclose(a, b, atol=1e-10)
    # The gradients of the weights, brought into torch's order.
    named = dict(zip(param_names(cell), ours[count:], strict=True))
    order = [GATES[cell][k] for k in ([0] if cell == "rnn" else [0, 1, 3, 2])]
    got = iter(theirs[count:-2])
    for suffix in ("", "_b")[: 2 if cell == "bi_lstm" else 1]:
        for kind in ("W_x", "W_h", "b_", "b_"):
            parts = [named[f"{kind}{gate}{suffix}"] for gate in order]
            assert torch.allclose(torch.cat([p.t() if p.ndim == 2 else p for p in parts]), next(got), atol=1e-10)


def test_gru_is_the_numpy_rederivation():
    inputs, state, params = random_case("gru")
    outputs, (last,) = gru(inputs, state, params)
    W_xz, W_hz, b_z, W_xr, W_hr, b_r, W_xh, W_hh, b_h, W_hq, b_q = (p.detach().numpy() for p in params)
    H = state[0].detach().numpy()
    for t, X in enumerate(inputs.detach().numpy()):
        Z = 1 / (1 + np.exp(-(X @ W_xz + H @ W_hz + b_z)))
        R = 1 / (1 + np.exp(-(X @ W_xr + H @ W_hr + b_r)))
        H_tilde = np.tanh(X @ W_xh + (R * H) @ W_hh + b_h)
        H = Z * H + (1 - Z) * H_tilde
        assert np.allclose(outputs[t].detach().numpy(), H @ W_hq + b_q, atol=1e-12)
    assert np.allclose(last.detach().numpy(), H, atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize(("steps", "batch"), [(1, 1), (3, 2)])
def test_gradients_are_those_of_finite_differences(cell, steps, batch):
    inputs, state, params = random_case(cell, T=steps, B=batch)
    state = [s.detach()[:batch].requires_grad_() for s in flatten(state)]

    def outputs_and_states(inputs, *rest):
        flat, params = rest[: len(state)], list(rest[len(state) :])
        packed = (tuple(flat[:2]), tuple(flat[2:])) if cell == "bi_lstm" else tuple(flat)
        outputs, last = CELLS[cell](inputs, packed, params)
        return outputs, *flatten(last)

    assert torch.autograd.gradcheck(outputs_and_states, (inputs, *state, *params))


# --- parameters, states, clipping -------------------------------------------------------------------------------------


def test_the_order_and_shapes_of_the_parameters():
    gates = "W_xi W_hi b_i W_xf W_hf b_f W_xo W_ho b_o W_xc W_hc b_c"
    backward = "W_xi_b W_hi_b b_i_b W_xf_b W_hf_b b_f_b W_xo_b W_ho_b b_o_b W_xc_b W_hc_b b_c_b"
    assert " ".join(param_names("rnn")) == "W_xh W_hh b_h W_hq b_q"
    assert " ".join(param_names("gru")) == "W_xz W_hz b_z W_xr W_hr b_r W_xh W_hh b_h W_hq b_q"
    assert " ".join(param_names("lstm")) == f"{gates} W_hq b_q"
    assert " ".join(param_names("bi_lstm")) == f"{gates} {backward} W_hq b_q"
    for cell in CELLS:
        for name, param in zip(param_names(cell), init_params(cell, 3, 4, 2), strict=True):
            outputs = {"W_hq": (8 if cell == "bi_lstm" else 4, 2), "b_q": (2,)}
            assert param.shape == outputs.get(name, {"W_x": (3, 4), "W_h": (4, 4)}.get(name[:3], (4,)))
            assert param.is_leaf and param.requires_grad


def test_initialisation():
    torch.manual_seed(1)
    first = init_params("lstm", 3, 16, 2)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(first, init_params("lstm", 3, 16, 2), strict=True))
    named = dict(zip(param_names("lstm"), first, strict=True))
    for gate in "ifoc":
        assert named[f"W_x{gate}"].abs().max() <= 0.25  # 1 / sqrt(16)
        assert torch.allclose(named[f"W_h{gate}"] @ named[f"W_h{gate}"].t(), torch.eye(16), atol=1e-5)
        assert torch.equal(named[f"b_{gate}"], torch.full((16,), float(gate == "f")))


def test_the_state_is_zero_and_in_its_cells_form():
    for cell, parts in {"rnn": 1, "gru": 1, "lstm": 2, "bi_lstm": 4}.items():
        flat = flatten(init_state(cell, 3, 4))
        assert len(flat) == parts and all(torch.equal(tensor, torch.zeros(3, 4)) for tensor in flat)
    assert isinstance(init_state("bi_lstm", 1, 1)[1], tuple)


@pytest.mark.parametrize(
    "call", [lambda: init_params("cnn", 1, 1, 1), lambda: init_state("cnn", 1, 1), lambda: param_names("")]
)
def test_unknown_cells_are_refused(call):
    with pytest.raises(ValueError, match="rnn, gru, lstm, bi_lstm"):
        call()


def test_clipping_scales_a_345_triangle():
    a, b = torch.zeros(1, requires_grad=True), torch.zeros(2, requires_grad=True)
    unused = torch.zeros(1, requires_grad=True)
    for theta, factor in ((10.0, 1.0), (5.0, 1.0), (1.0, 0.2)):
        a.grad, b.grad = torch.tensor([3.0]), torch.tensor([0.0, 4.0])
        assert float(grad_clipping([a, unused, b], theta)) == pytest.approx(5.0)
        assert a.grad.tolist() == pytest.approx([3 * factor])
        assert b.grad.tolist() == pytest.approx([0, 4 * factor])
    a.grad, b.grad = torch.zeros(1), torch.zeros(2)
    assert float(grad_clipping([a, b], 1.0)) == 0.0 and a.grad.item() == 0.0
    assert float(grad_clipping([unused], 1.0)) == 0.0
    for theta in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError):
            grad_clipping([a], theta)


# --- padding ----------------------------------------------------------------------------------------------------------


def test_reverse_by_hand():
    sequences = torch.tensor([[1, 5], [2, 6], [3, 0]])[:, :, None]  # 1 2 3 and 5 6 <pad>
    assert reverse(sequences, torch.tensor([3, 2])).squeeze(2).tolist() == [[3, 6], [2, 5], [1, 0]]
    assert torch.equal(reverse(sequences), sequences.flip(0))


def test_pooling_by_hand():
    # Two texts of lengths 2 and 1, two directions of one unit each; 9 is padding.
    states = torch.tensor([[[1.0, 2.0], [3.0, -4.0]], [[-5.0, 6.0], [9.0, 9.0]]])
    lengths = torch.tensor([2, 1])
    assert pool_states(states, lengths, "last").tolist() == [[-5, 6], [3, -4]]
    assert pool_states(states, lengths, "last", directions=2).tolist() == [[-5, 2], [3, -4]]
    assert pool_states(states, lengths, "mean").tolist() == [[-2, 4], [3, -4]]
    assert pool_states(states, lengths, "max").tolist() == [[1, 6], [3, -4]]
    with pytest.raises(ValueError, match="last, mean, max"):
        pool_states(states, lengths, "median")


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("pool", POOLS)
def test_logits_depend_neither_on_padding_nor_on_the_batch(cell, pool):
    torch.manual_seed(3)
    model = TextClassifier(cell, [50, 9], 8, 6, 4, pool).double().eval()
    for _ in range(5):
        lengths = torch.randint(1, 12, (6,))
        texts = [torch.stack([torch.randint(1, 50, (n,)), torch.randint(1, 9, (n,))], dim=1) for n in lengths.tolist()]
        alone = torch.cat([model(text[:, None], torch.tensor([len(text)])) for text in texts])
        for extra in (0, 3):
            padded = torch.randint(0, 9, (int(lengths.max()) + extra, 6, 2))  # whatever stands in the padding
            for column, text in enumerate(texts):
                padded[: len(text), column] = text
            assert torch.allclose(model(padded, lengths), alone, atol=1e-12)
            assert torch.allclose(model(padded[:, [4, 1]], lengths[[4, 1]]), alone[[4, 1]], atol=1e-12)


@pytest.mark.parametrize("cell", CELLS)
def test_no_gradient_comes_from_the_padding(cell):
    torch.manual_seed(4)
    inputs = torch.randn(6, 2, 3, dtype=torch.float64, requires_grad=True)
    params = [p.detach().double() for p in init_params(cell, 3, 4, 2)]
    state = tuple(
        tuple(t.double() for t in part) if isinstance(part, tuple) else part.double() for part in init_state(cell, 2, 4)
    )
    lengths = torch.tensor([6, 2])
    states, _ = hidden_states(cell, inputs, state, params, lengths)
    pool_states(states, lengths, "mean").sum().backward()
    assert torch.equal(inputs.grad[2:, 1], torch.zeros(4, 3, dtype=torch.float64))
    assert (inputs.grad[:2, 1] != 0).all() and (inputs.grad[:, 0] != 0).all()


def test_the_classifier_is_a_module_like_any_other(tmp_path):
    torch.manual_seed(5)
    model = TextClassifier("bi_lstm", [20], 4, 3, 2)
    assert {name.removeprefix("recurrence.") for name in model.state_dict()} == {
        "embeddings.0.weight",
        *param_names("bi_lstm"),
    }
    assert model.double().recurrence.W_xi_b.dtype == torch.float64
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tokens, lengths, labels = torch.randint(0, 20, (5, 3, 1)), torch.tensor([5, 4, 1]), torch.tensor([0, 1, 1])
    model.eval()
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(tokens, lengths), labels)
        optimizer.zero_grad()
        loss.backward()
        assert all(param.grad is not None for param in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = TextClassifier("bi_lstm", [20], 4, 3, 2).double().eval()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other(tokens, lengths), model(tokens, lengths))


def test_the_product_uses_no_recurrence_of_torch_and_no_scikit_learn():
    # Read, not imported: nn.RNN and its kin, their Cell classes, and the functions under them.
    forbidden = {f"{cell}{suffix}" for cell in ("RNN", "GRU", "LSTM", "RNNBase") for suffix in ("", "Cell", "CellBase")}
    functions = {f"{name}{suffix}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for suffix in ("", "_cell")}
    scripts = [path for path in Path(rnn_models.__file__).parent.glob("*.py") if path.name != "bench.py"]
    assert len(scripts) >= 6
    for path in scripts:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                assert node.attr not in forbidden, f"{path.name}:{node.lineno} uses {node.attr}"
                assert not node.attr.startswith("_thnn"), f"{path.name}:{node.lineno} uses {node.attr}"
                if node.attr in functions:
                    owner = node.value.id if isinstance(node.value, ast.Name) else getattr(node.value, "attr", "")
                    assert owner not in {"torch", "_VF", "aten"}, f"{path.name}:{node.lineno} uses {node.attr}"
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            for name in names:
                assert name.split(".")[0] != "sklearn" and name not in forbidden, (
                    f"{path.name}:{node.lineno} imports {name}"
                )
