"""The derived gradients against autograd through loops, torch's layers, finite differences."""

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import bptt
import rnn_models
from rnn_models import Recurrence, init_params

CELLS = ["rnn", "gru", "lstm"]
FAST = {"rnn": bptt.rnn, "gru": bptt.gru, "lstm": bptt.lstm}
PLAIN = {"rnn": rnn_models.rnn, "gru": rnn_models.gru, "lstm": rnn_models.lstm}
SIZES = [(1, 1, 1, 1), (1, 4, 3, 2), (5, 1, 3, 2), (4, 3, 250, 5), (6, 5, 4, 60), (30, 7, 2, 8)]
each_cell = pytest.mark.parametrize("cell", CELLS)


def example(cell, T=6, B=5, D=4, h=3, dtype=torch.float64):
    """Random inputs (T, B, D), a state and parameters without W_hq, b_q; all require gradients."""
    torch.manual_seed(T + B + D + h)
    params = [param.detach().to(dtype) for param in init_params(cell, D, h, 1)[:-2]]
    params = [(param + 0.1 * torch.randn_like(param)).requires_grad_() for param in params]
    inputs = torch.randn(T, B, D, dtype=dtype, requires_grad=True)
    parts = 2 if cell == "lstm" else 1
    state = tuple(torch.randn(B, h, dtype=dtype, requires_grad=True) for _ in range(parts))
    return inputs, state, params


def plain(cell, inputs, state, params):
    """All states and the last one by the plain loops: outputs are H if W_hq is the identity."""
    h = state[0].shape[1]
    head = [torch.eye(h, dtype=params[0].dtype), torch.zeros(h, dtype=params[0].dtype)]
    return PLAIN[cell](inputs, state, [*params, *head])


def values_and_gradients(result, leaves):
    """The states, the last state, and the gradients of a weighted sum of both."""
    states, last = result
    torch.manual_seed(0)
    loss = sum((part * torch.randn_like(part)).sum() for part in (states, *last))
    return [states, *last, *torch.autograd.grad(loss, leaves)]


@each_cell
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_equals_autograd_through_the_plain_loops(cell, size, dtype, tolerance):
    inputs, state, params = example(cell, *size, dtype)
    leaves = [inputs, *state, *params]
    expected = values_and_gradients(plain(cell, inputs, state, params), leaves)
    found = values_and_gradients(FAST[cell](inputs, state, params), leaves)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@each_cell
def test_gradients_equal_finite_differences(cell):
    inputs, state, params = example(cell, 4, 3, 2, 3)

    def function(inputs, *rest):
        states, last = FAST[cell](inputs, rest[: len(state)], rest[len(state) :])
        return states, *last

    assert torch.autograd.gradcheck(function, (inputs, *state, *params))


@pytest.mark.parametrize(("cell", "order"), [("rnn", [0]), ("lstm", [0, 1, 3, 2])])
def test_equals_the_layer_of_torch(cell, order):
    # torch's gates stand in the order i f c o; its GRU is another function.
    inputs, state, params = example(cell)
    layer = {"rnn": nn.RNN, "lstm": nn.LSTM}[cell](4, 3).double()
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.cat([params[3 * gate] for gate in order], dim=1).t())
        layer.weight_hh_l0.copy_(torch.cat([params[3 * gate + 1] for gate in order], dim=1).t())
        layer.bias_ih_l0.copy_(torch.cat([params[3 * gate + 2] for gate in order]))
        layer.bias_hh_l0.zero_()
    first = tuple(part[None] for part in state)
    expected, last = layer(inputs, first if cell == "lstm" else first[0])
    last = tuple(part[0] for part in (last if cell == "lstm" else (last,)))
    expected = values_and_gradients((expected, last), [inputs, *state])
    found = values_and_gradients(FAST[cell](inputs, state, params), [inputs, *state])
    torch.testing.assert_close(found, expected)


@each_cell
def test_accepts_any_memory_layout(cell):
    _, state, params = example(cell)
    inputs = torch.randn(5, 4, 6, dtype=torch.float64).permute(2, 0, 1).requires_grad_()
    leaves = [inputs, *params]
    for view in (lambda states: states, lambda states: states.transpose(0, 2)[:, :, ::2]):
        expected = torch.autograd.grad(view(plain(cell, inputs, state, params)[0]).sum(), leaves)
        found = torch.autograd.grad(view(FAST[cell](inputs, state, params)[0]).sum(), leaves)
        torch.testing.assert_close(found, expected)


@each_cell
def test_a_second_backward_pass_gives_the_same_gradients(cell):
    inputs, state, params = example(cell)
    states, last = FAST[cell](inputs, state, params)
    loss = states.square().sum() + last[-1].sum()
    first = torch.autograd.grad(loss, [inputs, *state, *params], retain_graph=True)
    second = torch.autograd.grad(loss, [inputs, *state, *params])
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@each_cell
def test_a_second_derivative_is_refused(cell):
    inputs, state, params = example(cell)
    loss = FAST[cell](inputs, state, params)[0].square().sum()
    (gradient,) = torch.autograd.grad(loss, [inputs], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_empty_batch_gives_empty_states_and_zero_gradients(cell, dtype):
    inputs, state, params = example(cell, 6, 0, dtype=dtype)
    states, last = FAST[cell](inputs, state, params)
    assert states.shape == (6, 0, 3) and all(part.shape == (0, 3) for part in last)
    assert not any(gradient.any() for gradient in torch.autograd.grad(states.sum(), params))


@each_cell
def test_inputs_without_a_step_are_refused(cell):
    inputs, state, params = example(cell)
    with pytest.raises(ValueError, match="at least one step"):
        FAST[cell](inputs[:0], state, params)


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_what_the_plain_loops_give(cell, dtype):
    inputs, state, params = example(cell, 20, 16, 8, 16, torch.float32)
    leaves = [inputs, *state, *params]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(cell, inputs.to(dtype), state, params)
        found = FAST[cell](inputs.to(dtype), state, params)
    for a, b in zip(*(values_and_gradients(x, leaves) for x in (found, expected)), strict=True):
        assert (a.float() - b.float()).abs().max() <= 0.05 * b.float().abs().max() + 1e-3


@each_cell
def test_without_gradients_the_states_are_the_same(cell):
    inputs, state, params = example(cell)
    expected, _ = FAST[cell](inputs, state, params)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found, _ = FAST[cell](inputs, state, params)
        assert torch.equal(found, expected) and not found.requires_grad


@each_cell
def test_modules_survive_copying_pickling_and_threads(cell):
    module, inputs = Recurrence(cell, 4, 3, 2), torch.randn(6, 5, 4)
    results = []

    def run(recurrence):
        recurrence.zero_grad()
        states = recurrence(inputs)
        states.square().sum().backward()
        gradients = [param.grad for param in recurrence.parameters() if param.grad is not None]
        results.append([states.detach(), *gradients])

    for recurrence in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        run(recurrence)
    threads = [threading.Thread(target=run, args=(copy.deepcopy(module),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 7
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-4, atol=1e-5)


def test_tuning_the_allocator_may_be_called_anywhere():
    assert bptt.tune_allocator() is None
