"""The fast recurrences against their definition, the plain loops of `rnn_models`."""

import gc

import pytest
import torch

import bptt
from rnn_models import FAST, PLAIN, Recurrence, hidden_states, init_params, init_state, param_names

SIZES = [(1, 1, 1, 1), (1, 4, 3, 2), (5, 1, 3, 2), (4, 3, 250, 5), (6, 5, 4, 60)]  # T, B, D, h
SIZES += [tuple(torch.randint(1, 9, (4,), generator=torch.Generator().manual_seed(k)).tolist()) for k in range(8)]


def values_and_gradients(steps, cell, inputs, state, params, weights):
    """All states, the last state, and the gradients of a weighted sum of both, as one list."""
    states, last = steps[cell](inputs, state, params)
    loss = sum((part * weight).sum() for part, weight in zip((states, *last), weights, strict=True))
    return [states, *last, *torch.autograd.grad(loss, [inputs, *state, *params])]


@pytest.mark.parametrize("cell", FAST)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_the_fast_form_is_the_plain_loop(cell, size, dtype, tolerance):
    T, B, D, h = size
    torch.manual_seed(sum(size))
    params = [param.detach().to(dtype) for param in init_params(cell, D, h, 1)[:-2]]
    params = [(param + 0.1 * torch.randn_like(param)).requires_grad_() for param in params]
    inputs = torch.randn(T, B, D, dtype=dtype, requires_grad=True)
    state = tuple(torch.randn(B, h, dtype=dtype, requires_grad=True) for _ in range(2 if cell == "lstm" else 1))
    weights = [torch.randn(T, B, h, dtype=dtype), *(torch.randn(B, h, dtype=dtype) for _ in state)]
    plain = values_and_gradients(PLAIN, cell, inputs, state, params, weights)
    fast = values_and_gradients(FAST, cell, inputs, state, params, weights)
    for expected, found in zip(plain, fast, strict=True):
        assert torch.allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_both_forms_agree_in_both_directions_on_padded_sequences():
    torch.manual_seed(0)
    params = [param.detach().double() for param in init_params("bi_lstm", 3, 4, 2)]
    inputs, lengths = torch.randn(6, 3, 3, dtype=torch.float64), torch.tensor([6, 1, 4])
    state = init_state("bi_lstm", 3, 4, dtype=torch.float64)
    plain, fast = (hidden_states("bi_lstm", inputs, state, params, lengths, steps)[0] for steps in (PLAIN, FAST))
    assert torch.allclose(plain, fast, atol=1e-12)


@pytest.mark.parametrize("cell", FAST)
def test_memory_that_is_used_again_is_never_still_in_use(cell):
    # Results are kept while more are computed in the memory that was given back; a backward pass comes late.
    torch.manual_seed(1)
    params = [param.detach().requires_grad_() for param in init_params(cell, 3, 4, 1)[:-2]]
    state = init_state(cell, 2, 4)
    inputs = [torch.randn(7, 2, 3) for _ in range(6)]
    kept = []
    for X in inputs:
        FAST[cell](torch.randn(7, 2, 3), state, params)[0].sum().backward()  # its memory is free at once
        gc.collect()
        kept.append(FAST[cell](X, state, params)[0])
    assert bptt._free, "no memory has been given back"
    for X, states in zip(inputs, kept, strict=True):
        plain = PLAIN[cell](X, state, params)[0]
        assert torch.allclose(states, plain, atol=1e-5)
        fast_gradients = torch.autograd.grad(states.square().sum(), params)
        for found, expected in zip(fast_gradients, torch.autograd.grad(plain.square().sum(), params), strict=True):
            assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("cell", FAST)
def test_without_gradients_the_states_are_the_same(cell):
    torch.manual_seed(3)
    params = init_params(cell, 3, 4, 1)[:-2]
    inputs, state = torch.randn(7, 2, 3), init_state(cell, 2, 4)
    states, last = FAST[cell](inputs, state, params)
    with torch.no_grad():
        again, last_again = FAST[cell](inputs, state, params)
    for found, expected in zip((again, *last_again), (states, *last), strict=True):
        assert torch.equal(found, expected) and not found.requires_grad


def test_a_second_derivative_is_refused():
    params = init_params("rnn", 2, 3, 1)[:-2]
    states, _ = FAST["rnn"](torch.randn(4, 2, 2), init_state("rnn", 2, 3), params)
    (gradient,) = torch.autograd.grad(states.square().sum(), params[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()


# --- the path that only a GPU takes, with its recording replaced: what is left is the same on a CPU -------------------


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm", "bi_lstm"])
@pytest.mark.parametrize("steps", [1, 16, 21])
def test_the_replayed_states_are_the_states(cell, steps, monkeypatch, recwarn):
    recorded = []

    def record(function, samples, allow_unused_input=False):
        recorded.append([sample.shape for sample in samples])
        wanted = [sample for sample in samples if sample.requires_grad]  # recorded backwards too, as torch.cuda does
        torch.autograd.grad(function(*samples).sum(), wanted, allow_unused=allow_unused_input)
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    torch.manual_seed(2)
    recurrence = Recurrence(cell, 3, 4, 1).double()
    inputs, lengths = torch.randn(steps, 3, 3, dtype=torch.float64), torch.tensor([steps, 1, max(1, steps // 2)])
    results = []
    for function in (recurrence._replayed, recurrence._replayed, recurrence):
        recurrence.zero_grad()
        states = function(inputs, lengths)
        there = (torch.arange(steps)[:, None] < lengths)[:, :, None]
        (states * there).square().sum().backward()
        results.append([states * there, *(getattr(recurrence, name).grad for name in param_names(cell)[:-2])])
    assert all(torch.allclose(a, b, atol=1e-12) for pair in results[:2] for a, b in zip(pair, results[2], strict=True))
    assert not recwarn.list, "the recording failed"
    assert len(recorded) == 1 and recorded[0][0] == ((steps + 15) // 16 * 16, 3, 3)


def test_a_recording_that_fails_is_warned_of_once(monkeypatch, recwarn):
    def fail(function, samples, allow_unused_input):
        raise RuntimeError("capture is not possible")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    recurrence = Recurrence("gru", 3, 4, 1)
    for steps in (5, 5, 40):
        inputs = torch.randn(steps, 2, 3)
        assert torch.allclose(
            recurrence._replayed(inputs, torch.tensor([steps, 1]))[0], recurrence(inputs)[0], atol=1e-6
        )
    assert [str(w.message) for w in recwarn] == [
        "no CUDA graph (capture is not possible): the recurrence runs step by step, slower"
    ]
