"""The derived gradients against autograd through the plain loops and finite differences."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import bptt
import pytest
import torch
from test_rnn_models import NAMES, all_cells, assert_close, both_loops, random_case
from torch import nn

from rnn_models import CELLS, Recurrence, init_state

SIZES = [(1, 1, 1, 1), (30, 7, 2, 8), (2, 0, 3, 2)]  # T, B, D, h; an empty batch


@all_cells
@both_loops
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_recurrence_is_the_cell_and_has_its_gradients(cell, loops, size, dtype, rtol):
    torch.manual_seed(2)
    T, B, D, h = size
    recurrence = Recurrence(cell, D, h, 2, loops).to(dtype)
    params = [nn.init.normal_(param, std=h**-0.5) for param in recurrence.parameters()]
    assert " ".join(recurrence.state_dict()) == NAMES[cell]
    inputs = torch.randn(D, B, T, dtype=dtype).transpose(0, 2).requires_grad_()  # not contiguous
    lengths = torch.randint(1, T + 1, (B,))
    outputs = recurrence.output(recurrence(inputs, lengths))
    options = [lengths] if cell == "bi_lstm" else []
    expected, _ = CELLS[cell](inputs, init_state(cell, B, h, dtype=dtype), params, *options)
    assert_close([outputs], [expected], tolerance=rtol)
    weights = torch.randn_like(expected)
    gradients = [torch.autograd.grad(Y, [inputs, *params], weights) for Y in (outputs, expected)]
    assert_close(*gradients, tolerance=rtol)


@pytest.mark.parametrize("cell", ["rnn", "gru", "lstm"])
def test_from_any_state_values_are_the_plain_loops_and_gradients_finite_differences(cell):
    inputs, state, params = random_case(cell)
    leaves = [inputs, *state, *params[:-2]]

    def fast(inputs, *rest):
        states, last = getattr(bptt, cell)(inputs, rest[: len(state)], rest[len(state) :])
        return states, *last

    outputs, last = CELLS[cell](inputs, state, params)
    found, *found_last = fast(*leaves)
    assert_close([found @ params[-2] + params[-1], *found_last], [outputs, *last])
    assert torch.autograd.gradcheck(fast, leaves, fast_mode=True)
    first = torch.autograd.grad(found.square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="twice"):  # a second derivative is refused
        first[0].sum().backward()


@all_cells
def test_a_recurrence_is_the_same_when_copied_pickled_compiled_or_run_in_threads(cell):
    torch.manual_seed(2)
    recurrence, inputs = Recurrence(cell, 4, 6, 3), torch.randn(3, 5, 4)

    def run(module):
        states = module(inputs, torch.tensor([3, 1, 2, 2, 3]))
        return [states, *torch.autograd.grad(states.square().sum(), module.params[:-2])]

    expected = run(recurrence)
    pickled = pickle.loads(pickle.dumps(recurrence))
    compiled = torch.compile(recurrence, backend="eager")
    results = [run(module) for module in (copy.deepcopy(recurrence), pickled, compiled)]
    with ThreadPoolExecutor(4) as executor:
        results += executor.map(run, [recurrence] * 20)
    for result in results:
        assert_close(result, expected, tolerance=1e-5)


@all_cells
@both_loops
def test_a_recurrence_trains_under_autocast_to_bfloat16(cell, loops):
    torch.manual_seed(3)
    recurrence, inputs = Recurrence(cell, 4, 6, 3, loops), torch.randn(3, 5, 4).bfloat16()

    def with_gradients(states):
        return [states, *torch.autograd.grad(states.sum() / 5, recurrence.params[:-2])]

    expected = with_gradients(recurrence(inputs.float()))
    for values in (inputs, inputs.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            states = recurrence(values).float()
        # The fast loops keep the parameters' precision, the plain ones compute in bfloat16.
        assert_close(with_gradients(states), expected, 1e-6 if loops == "fast" else 0.05)
