"""RNN, GRU, LSTM and Bi-LSTM as the lecture writes them: parameter lists and plain loops.

T steps, B sequences, D inputs, h hidden units, Q outputs. Inputs are time-major (T, B, D).
Each cell is a function of (inputs, state, params), its loop over the steps, and returns (outputs,
state), outputs (T, B, Q). The equations are those of Dive into Deep Learning, chapters 9 and 10.
Below the cells: their parameters, the clipping of gradients, a cell as a module (`Recurrence`), and
pooling over time. There, `cell` is a cell's name, "lstm" for example.
"""

import sys
from functools import partial

import torch
from torch import nn

from support import bptt

# fmt: off


def rnn(inputs, state, params):
    """Elman network: the new state is a squashed mix of the input and of the state before.

    inputs (T, B, D), state (H,) with H (B, h); returns outputs (T, B, Q) and the last state (H,).
    """
    W_xh, W_hh, b_h, W_hq, b_q = params
    (H,) = state
    outputs = []
    for X in inputs:                                # (B, D)
        H = torch.tanh(X @ W_xh + H @ W_hh + b_h)   # (B, h)
        Y = H @ W_hq + b_q                          # (B, Q)
        outputs.append(Y)
    return torch.stack(outputs), (H,)


def gru(inputs, state, params):
    """Gated recurrent unit (Cho et al. 2014): Z keeps the old state, R shows it to the candidate.

    inputs (T, B, D), state (H,) with H (B, h); returns outputs (T, B, Q) and the last state (H,).
    The state is reset before the product with W_hh; torch's own layer resets after it, which is
    another function.
    """
    W_xz, W_hz, b_z, W_xr, W_hr, b_r, W_xh, W_hh, b_h, W_hq, b_q = params
    (H,) = state
    outputs = []
    for X in inputs:                                            # (B, D)
        Z = torch.sigmoid(X @ W_xz + H @ W_hz + b_z)            # (B, h), update gate
        R = torch.sigmoid(X @ W_xr + H @ W_hr + b_r)            # (B, h), reset gate
        H_tilde = torch.tanh(X @ W_xh + (R * H) @ W_hh + b_h)   # (B, h), candidate
        H = Z * H + (1 - Z) * H_tilde
        Y = H @ W_hq + b_q                                      # (B, Q)
        outputs.append(Y)
    return torch.stack(outputs), (H,)


def lstm(inputs, state, params):
    """Long short-term memory: gates write, keep and read the memory C (Hochreiter and Schmidhuber
    1997; the forget gate is of Gers et al. 2000).

    inputs (T, B, D), state (H, C) of (B, h) each; returns outputs (T, B, Q) and the last (H, C).
    """
    W_xi, W_hi, b_i, W_xf, W_hf, b_f, W_xo, W_ho, b_o, W_xc, W_hc, b_c, W_hq, b_q = params
    H, C = state
    outputs = []
    for X in inputs:                                        # (B, D)
        I = torch.sigmoid(X @ W_xi + H @ W_hi + b_i)        # (B, h), input gate
        F = torch.sigmoid(X @ W_xf + H @ W_hf + b_f)        # (B, h), forget gate
        O = torch.sigmoid(X @ W_xo + H @ W_ho + b_o)        # (B, h), output gate
        C_tilde = torch.tanh(X @ W_xc + H @ W_hc + b_c)     # (B, h), candidate
        C = F * C + I * C_tilde
        H = O * torch.tanh(C)
        Y = H @ W_hq + b_q                                  # (B, Q)
        outputs.append(Y)
    return torch.stack(outputs), (H, C)


def bi_lstm(inputs, state, params, lengths=None):
    """Two LSTMs, one from the first step to the last, one back: Y = [H, H_b] W_hq + b_q.

    inputs (T, B, D), state ((H, C), (H_b, C_b)) of (B, h) each; lengths (B,) for sequences padded
    on the right: the backward LSTM then starts at each sequence's last step, not in the padding.
    Returns outputs (T, B, Q) and the last states of both, which have read the padding too.
    """
    *weights, W_hq, b_q = params
    half = len(weights) // 2
    h = len(W_hq) // 2                                                          # W_hq is (2h, Q)
    state_f, state_b = state
    inputs_b = reverse(inputs, lengths)                                         # (T, B, D)
    H, state_f = hidden_states(lstm, inputs, state_f, weights[:half], h)        # (T, B, h)
    H_b, state_b = hidden_states(lstm, inputs_b, state_b, weights[half:], h)    # (T, B, h)
    H_b = reverse(H_b, lengths)
    Y = torch.cat([H, H_b], dim=2) @ W_hq + b_q                                 # (T, B, Q)
    return Y, (state_f, state_b)


def hidden_states(loop, inputs, state, weights, width):
    """The hidden states (T, B, width) that a cell's loop goes through, and its last state.

    A loop shows its states only in Y = H W_hq + b_q; with W_hq the identity and b_q zero, Y is H.
    width: h, or 2h for "bi_lstm".
    """
    identity = torch.eye(width, dtype=weights[0].dtype, device=inputs.device)
    zero = torch.zeros(width, dtype=weights[0].dtype, device=inputs.device)
    return loop(inputs, state, [*weights, identity, zero])


def reverse(sequences, lengths=None):
    """Sequences (T, B, D) with their first `lengths` (B,) steps in reverse order; padding stays."""
    if lengths is None:
        return sequences.flip(0)
    T, B, _ = sequences.shape
    steps = torch.arange(T, device=sequences.device)[:, None]           # (T, 1)
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)   # (T, B)
    return sequences[source, torch.arange(B, device=sequences.device)]


# fmt: on
# --- parameters ---------------------------------------------------------------------------------

# A new cell is a function above and an entry in both tables; `--model` then offers it. A name that
# begins with "bi_" has the gates of both directions, and its function takes `lengths`. The bias of
# a gate "f" starts at 1, so that the cell keeps its memory.
CELLS = {"rnn": rnn, "gru": gru, "lstm": lstm, "bi_lstm": bi_lstm}
# The gates and the candidate (h or c), in the order of the parameter list; each has W_x*, W_h* and
# b_*. A cell with a candidate "c" has a memory C beside its state H.
GATES = {"rnn": "h", "gru": "zrh", "lstm": "ifoc", "bi_lstm": "ifoc"}


def num_directions(cell):
    """2 for a cell that reads its inputs forward and backward, else 1; ValueError if unknown."""
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, not {cell!r}")
    return 2 if cell.startswith("bi_") else 1


def param_names(cell):
    """Names of a cell's parameters in the order of its list: W_xh W_hh b_h W_hq b_q for "rnn".

    The backward direction's names end in "_b". Raises ValueError for an unknown cell.
    """
    suffixes = ["", "_b"] if num_directions(cell) == 2 else [""]
    names = []
    for suffix in suffixes:
        for gate in GATES[cell]:
            names += [f"W_x{gate}{suffix}", f"W_h{gate}{suffix}", f"b_{gate}{suffix}"]
    return [*names, "W_hq", "b_q"]


def init_params(cell, num_inputs, num_hiddens, num_outputs, device=None):
    """A cell's parameters, a list of leaf tensors that require gradients, in the order of its loop.

    W_x* (D, h) and W_hq (h, Q), (2h, Q) for "bi_lstm", are uniform in +-1/sqrt(h);
    W_h* (h, h) are orthogonal: H W_h is as long as H (Saxe et al. 2014);
    biases (h,) and (Q,) are 0, the forget gate's 1 (Jozefowicz et al. 2015).
    Drawn on the CPU: the same seed gives the same parameters on every device.
    Raises ValueError for an unknown cell or a size below 1.
    """
    directions = num_directions(cell)
    if min(num_inputs, num_hiddens, num_outputs) < 1:
        raise ValueError("num_inputs, num_hiddens and num_outputs must be at least 1")
    bound = num_hiddens**-0.5
    params = []
    for gate in GATES[cell] * directions:  # each direction has all gates
        W_x = torch.empty(num_inputs, num_hiddens).uniform_(-bound, bound)
        W_h = nn.init.orthogonal_(torch.empty(num_hiddens, num_hiddens))
        b = torch.full((num_hiddens,), 1.0 if gate == "f" else 0.0)
        params += [W_x, W_h, b]
    W_hq = torch.empty(directions * num_hiddens, num_outputs).uniform_(-bound, bound)
    b_q = torch.zeros(num_outputs)
    params += [W_hq, b_q]
    return [param.to(device).requires_grad_() for param in params]


def init_state(cell, batch_size, num_hiddens, device=None, dtype=None):
    """The state before the first step, zeros (B, h): (H,), (H, C) or ((H, C), (H_b, C_b)).

    Raises ValueError for an unknown cell.
    """
    directions = num_directions(cell)
    names = "HC" if "c" in GATES[cell] else "H"
    states = []
    for _ in range(directions):
        zeros = [torch.zeros(batch_size, num_hiddens, device=device, dtype=dtype) for _ in names]
        states.append(tuple(zeros))
    return tuple(states) if directions == 2 else states[0]


def grad_clipping(params, theta):
    """Scale all gradients in place so that their joint L2 norm is at most theta; return the norm.

    g <- min(1, theta / ||g||) g (Pascanu et al. 2013). Parameters without a gradient are skipped.
    Raises ValueError if theta is not above 0.
    """
    if not theta > 0:
        raise ValueError(f"theta must be above 0, not {theta}")
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()
    factor = (theta / norm).clamp(max=1.0)  # `if norm > theta` would wait for the GPU
    for grad in grads:
        grad *= factor
    return norm


# --- the cell as a module -----------------------------------------------------------------------


class Recurrence(nn.Module):
    """A cell with its parameters registered under their names; starts from the zero state.

    The loop above defines the hidden states. `bptt` has a faster form of the four cells, with
    gradients derived by hand; it runs only as long as it gives the loop's numbers
    (`fast_form_agrees`). Models take H, pool it and apply `output`. Both `hidden_states` and
    `output` rely on the loop's last line, Y = H @ W_hq + b_q: whoever changes it must change them.
    """

    def __init__(self, cell, num_inputs, num_hiddens, num_outputs):
        """Sizes as in `init_params`. Raises ValueError for an unknown cell."""
        super().__init__()
        self.cell = cell
        self.num_hiddens = num_hiddens
        params = init_params(cell, num_inputs, num_hiddens, num_outputs)
        for name, param in zip(param_names(cell), params, strict=True):
            self.register_parameter(name, nn.Parameter(param))
        self.use_fast_form = fast_form_agrees(cell)

    @property
    def params(self):
        """The parameter list that the cell's loop takes."""
        return [getattr(self, name) for name in param_names(self.cell)]

    def forward(self, inputs, lengths=None):
        """Hidden states (T, B, h), (T, B, 2h) for "bi_lstm", of inputs (T, B, D).

        lengths (B,) as in `bi_lstm`; a cell of one direction does not need them.
        Raises ValueError for inputs without a step.
        """
        if len(inputs) == 0:
            raise ValueError("inputs (T, B, D) must have at least one step, not T = 0")
        _, B, _ = inputs.shape
        state = init_state(self.cell, B, self.num_hiddens, inputs.device, inputs.dtype)
        compute_states = fast_states if self.use_fast_form else loop_states
        *weights, _, _ = self.params
        return compute_states(self.cell, inputs, state, weights, lengths)

    def output(self, states):
        """Y = H W_hq + b_q: states (..., h) give (..., Q)."""
        return states @ self.W_hq + self.b_q


def loop_states(cell, inputs, state, weights, lengths=None):
    """Hidden states (T, B, h), (T, B, 2h) for "bi_lstm", by the cell's loop.

    weights: the parameter list without W_hq and b_q.
    """
    loop = CELLS[cell]
    directions = num_directions(cell)
    if directions == 2:  # in one direction, padding comes after the steps that count
        loop = partial(loop, lengths=lengths)
    h = len(weights[1])  # W_h* is (h, h)
    states, _ = hidden_states(loop, inputs, state, weights, directions * h)
    return states


def fast_states(cell, inputs, state, weights, lengths=None):
    """What `loop_states` gives, by `bptt`: the directions side by side, in the precision of the
    parameters."""
    if num_directions(cell) == 1:
        return bptt.fast_hidden_states(cell, inputs[None], [state], weights)[0]
    both_inputs = torch.stack([inputs, reverse(inputs, lengths)])  # (2, T, B, D)
    H, H_b = bptt.fast_hidden_states(cell, both_inputs, state, weights)
    return torch.cat([H, reverse(H_b, lengths)], dim=2)


@torch.inference_mode(False)  # with gradients, even under no_grad or inference_mode
def fast_form_agrees(cell):
    """Whether `bptt` has a form of this cell that gives the loop's numbers and gradients.

    Compares the hidden states of both, and the gradients of a weighted sum of them, for small
    random inputs and parameters, on the CPU in double precision (`tests/test_bptt.py` has single
    precision, too). Where they differ, there is no fast form, or the loop cannot compute such a
    batch, a line on stderr says that the loop runs.
    """
    if bptt.NUM_GATES.get(cell) != len(GATES[cell]):  # a new cell, or one with another gate
        print(f"{cell}: no fast form in support/bptt.py; the loop runs", file=sys.stderr)
        return False
    T = 50
    B = 3
    D = 2
    h = 4
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers are left alone
    random = partial(torch.randn, generator=generator, dtype=torch.float64, requires_grad=True)
    leaves = [random(T, B, D)]  # inputs, then W_x, W_h and b of each gate
    for _ in GATES[cell] * num_directions(cell):
        leaves += [random(D, h), random(h, h), random(h)]
    inputs, *weights = leaves
    state = init_state(cell, B, h, dtype=torch.float64)
    lengths = torch.tensor([T, 20, 40])
    # The weights of the sum; they have gradients, so even that of a loop without gradients has one.
    factors = random(T, B, h * num_directions(cell))
    by_fast_form = fast_states(cell, inputs, state, weights, lengths)
    try:
        by_loop = loop_states(cell, inputs, state, weights, lengths)
    except Exception:  # for example, a changed loop makes a state in single precision
        by_loop = torch.empty(0)  # differs from all states; a real mistake shows in training
    agrees = by_loop.shape == by_fast_form.shape
    agrees = agrees and torch.allclose(by_loop, by_fast_form)
    if agrees:
        loop_gradient = flat_gradient(by_loop * factors, leaves)
        fast_gradient = flat_gradient(by_fast_form * factors, leaves)
        agrees = torch.allclose(loop_gradient, fast_gradient)
    if not agrees:
        print(f"{cell}: the loop was changed; it runs, not the fast form", file=sys.stderr)
    return agrees


def flat_gradient(values, leaves):
    """The gradient of the sum of values with respect to all leaves, in one row of numbers."""
    gradients = torch.autograd.grad(values.sum(), leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


# --- pooling ------------------------------------------------------------------------------------

POOLS = ("last", "mean", "max")


def pool_states(states, lengths, pool, bidirectional=False):
    """One vector a sequence (B, width) from its states (T, B, width); the steps after its length do
    not count. lengths (B,), each at least 1; width: h, or 2h if bidirectional.

    "last" is the state that has read everything: at the sequence's end, and for the backward half
    of a bidirectional cell at its beginning. "mean" and "max" go over the steps before the padding.
    Raises ValueError for another `pool`.
    """
    if pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
    T, B, width = states.shape
    if pool == "last":
        last = states[lengths - 1, torch.arange(B, device=states.device)]  # (B, width)
        if not bidirectional:
            return last
        half = width // 2
        first = states[0]  # (B, 2h), where the backward direction ends
        return torch.cat([last[:, :half], first[:, half:]], dim=1)  # (B, 2h)
    steps = torch.arange(T, device=states.device)[:, None]  # (T, 1)
    is_padding = (steps >= lengths)[:, :, None]  # (T, B, 1)
    if pool == "mean":
        return states.masked_fill(is_padding, 0.0).sum(dim=0) / lengths[:, None]
    return states.masked_fill(is_padding, float("-inf")).amax(dim=0)
