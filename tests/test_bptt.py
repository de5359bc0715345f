"""The derived gradients against autograd through the plain loops and against finite differences."""

import threading

import pytest
import torch

import bptt
import rnn_models

FAST = {"rnn": bptt.rnn, "gru": bptt.gru, "lstm": bptt.lstm}
PLAIN = {"rnn": rnn_models.rnn, "gru": rnn_models.gru, "lstm": rnn_models.lstm}
# T, B, D, h; products with both sides from 256 on take another way in float32.
SIZES = [(1, 1, 1, 1), (1, 4, 3, 2), (5, 1, 3, 2), (2, 3, 256, 256), (30, 7, 2, 8)]
each_cell = pytest.mark.parametrize("cell", FAST)


def example(cell, T=6, B=5, D=4, h=3, dtype=torch.float64):
    """Random inputs (T, B, D), a state and parameters without W_hq, b_q; all require gradients."""
    torch.manual_seed(T + B + D + h)
    params = [param.detach().to(dtype) for param in rnn_models.init_params(cell, D, h, 1)[:-2]]
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
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(part.shape, generator=generator) for part in (states, *last)]
    loss = sum((part * W).sum() for part, W in zip((states, *last), weights, strict=True))
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
def test_a_second_backward_pass_gives_the_same_but_a_second_derivative_is_refused(cell):
    inputs, state, params = example(cell)
    states, last = FAST[cell](inputs, state, params)
    loss, leaves = states.square().sum() + last[-1].sum(), [inputs, *state, *params]
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, create_graph=True)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="twice"):
        second[0].sum().backward()


@each_cell
def test_without_gradients_and_in_threads_the_states_are_the_same(cell):
    inputs, state, params = example(cell)
    leaves, results = [inputs, *state, *params], []

    def run():
        results.append(values_and_gradients(FAST[cell](inputs, state, params), leaves))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = values_and_gradients(plain(cell, inputs, state, params), leaves)
    torch.testing.assert_close(results, [expected] * 4)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            found, _ = FAST[cell](inputs, state, params)
        assert torch.equal(found, results[0][0]) and not found.requires_grad


def test_tuning_the_allocator_may_be_called_anywhere():
    bptt.tune_allocator()
