"""The gradients derived by hand against autograd through the loops and finite differences."""

import copy
import pickle

import pytest
import torch
from torch.autograd import grad, gradcheck
from torch.testing import assert_close

from rnn_models import Recurrence
from support import bptt

CELLS = ["rnn", "gru", "lstm", "bi_lstm"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=CELLS)
def recurrence(request):
    return Recurrence(request.param, num_inputs=4, num_hiddens=6, num_outputs=2)


@pytest.fixture
def inputs():
    return torch.randn(2, 3, 4, requires_grad=True)


def states_and_gradients(recurrence, inputs, lengths=None):
    """The hidden states, and the gradients of the sum of their squares."""
    states = recurrence(inputs, lengths)
    leaves = [inputs, *recurrence.params[:-2]]
    with torch.autocast("cpu", enabled=False):  # a backward pass belongs outside autocast
        gradients = grad(states.square().sum(), leaves)
    return [states, *gradients]


# One step, sequence, input and unit; a usual size; an empty batch.
SIZES = [(1, 1, 1, 1), (30, 7, 2, 8), (2, 0, 3, 2)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_states_and_gradients_are_those_of_the_loop(cell, size, dtype):
    T, B, D, h = size
    recurrence = Recurrence(cell, num_inputs=D, num_hiddens=h, num_outputs=2)
    recurrence.to(dtype)
    inputs = torch.randn(D, B, T, dtype=dtype)
    inputs = inputs.transpose(0, 2).requires_grad_()  # not contiguous
    lengths = torch.randint(1, T + 1, [B])
    recurrence.use_fast_form = True  # also where it is wrong
    by_fast_form = states_and_gradients(recurrence, inputs, lengths)
    recurrence.use_fast_form = False
    by_loop = states_and_gradients(recurrence, inputs, lengths)
    # In single precision a gradient is a sum of 210 rounded terms, added in another order.
    tolerance = 1e-4 if dtype == torch.float32 else 1e-7
    assert_close(by_fast_form, by_loop, rtol=tolerance, atol=tolerance)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_gradients_are_finite_differences_from_any_first_state(cell):
    inputs = random(1, 4, 2, 3)  # G = 1, T = 4, B = 2, D = 3
    H = random(2, 2)
    C = random(2, 2)
    weights = []
    for _ in range(bptt.NUM_GATES[cell]):
        weights += [random(3, 2), random(2, 2), random(2)]

    def states_of(inputs, H, C, *weights):
        state = (H, C) if cell == "lstm" else (H,)
        return bptt.fast_hidden_states(cell, inputs=inputs, first_states=[state], weights=weights)

    assert gradcheck(states_of, [inputs, H, C, *weights])


def test_weights_have_the_same_gradients_where_inputs_need_none(recurrence, inputs):
    weights = recurrence.params[:-2]
    expected = grad(recurrence(inputs).sum(), weights)
    result = grad(recurrence(inputs.detach()).sum(), weights)
    assert_close(result, expected)


def test_states_are_the_same_without_gradients(recurrence, inputs):
    with torch.no_grad():
        states = recurrence(inputs)
    assert_close(states, recurrence(inputs))


def test_a_second_derivative_is_refused(recurrence, inputs):
    loss = recurrence(inputs).square().sum()
    (dX,) = grad(loss, inputs, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        dX.sum().backward()


def test_a_retained_graph_gives_the_same_gradients_again(recurrence, inputs):
    loss = recurrence(inputs).square().sum()
    loss.backward(retain_graph=True)
    dX = inputs.grad.clone()
    loss.backward()
    assert_close(inputs.grad, 2 * dX)


def pickled(module):
    return pickle.loads(pickle.dumps(module))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copied_recurrence_is_the_same(recurrence, inputs, copied):
    expected = states_and_gradients(recurrence, inputs)
    result = states_and_gradients(copied(recurrence), inputs)
    assert_close(result, expected)


@pytest.mark.parametrize("cell", ["gru", "lstm"])  # a compiler takes seconds for each
def test_a_compiled_recurrence_is_the_same(cell, inputs):
    recurrence = Recurrence(cell, num_inputs=4, num_hiddens=6, num_outputs=2)
    compiled = torch.compile(recurrence, backend="eager")
    expected = states_and_gradients(recurrence, inputs)
    result = states_and_gradients(compiled, inputs)
    assert_close(result, expected)


def test_autocast_leaves_the_fast_form_in_float32(recurrence, inputs):
    expected = states_and_gradients(recurrence, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = states_and_gradients(recurrence, inputs)
    assert_close(result, expected)
