"""RNN, GRU, LSTM and Bi-LSTM by hand: parameter lists, initialisation, recurrences, and the two models built on them.

Each recurrence is a function of (inputs, state, params): `inputs` is time-major, (T, B, D); `params` is a plain list,
unpacked by name at the top of its loop; `state` is a tuple; the result is (outputs, state) with outputs (T, B, Q).
T steps, B sequences in the batch, D inputs, h hidden units, Q outputs. `s` in the equations is the logistic sigmoid and
`*` the elementwise product. The equations are those of Dive into Deep Learning, chapters 9 and 10.
"""

import torch
from torch import nn

import bptt

# For each cell the gates in the order of its parameters (each has W_x., W_h. and b_.), and its number of directions.
GATES = {"rnn": "h", "gru": "zrh", "lstm": "ifoc", "bi_lstm": "ifoc"}
DIRECTIONS = {"rnn": 1, "gru": 1, "lstm": 1, "bi_lstm": 2}


# --- parameters -------------------------------------------------------------------------------------------------------


def _checked_cell(cell):
    if cell not in GATES:
        raise ValueError(f"cell must be one of {', '.join(GATES)}, not {cell!r}")
    return cell


def param_names(cell):
    """Names of the cell's parameters in the order of its list: ["W_xh", "W_hh", "b_h", "W_hq", "b_q"] for "rnn".

    The backward direction's names end in "_b". Raises ValueError for an unknown cell.
    """
    suffixes = ("", "_b")[: DIRECTIONS[_checked_cell(cell)]]
    gates = [f"{name}{gate}{suffix}" for suffix in suffixes for gate in GATES[cell] for name in ("W_x", "W_h", "b_")]
    return [*gates, "W_hq", "b_q"]


def init_params(cell, num_inputs, num_hiddens, num_outputs, device=None):
    """The cell's parameters as a list of leaf tensors that require gradients, drawn from torch's global generator.

    W_x. (D, h) and W_hq are uniform in +-1/sqrt(h), as in torch; W_h. (h, h) are orthogonal, which keeps the length of
    a state that passes through many steps (Saxe et al. 2014); biases (h,) are 0, the LSTM's forget bias 1, so that
    the memory is kept until training says otherwise (Jozefowicz et al. 2015). W_hq is (h, Q), (2h, Q) for "bi_lstm".
    Raises ValueError for an unknown cell or a size below 1.
    """
    if min(num_inputs, num_hiddens, num_outputs) < 1:
        raise ValueError("num_inputs, num_hiddens and num_outputs must be at least 1")
    bound = num_hiddens**-0.5
    directions = DIRECTIONS[_checked_cell(cell)]

    def create(name):
        if name == "W_hq":
            return torch.empty(directions * num_hiddens, num_outputs).uniform_(-bound, bound)
        if name == "b_q":
            return torch.zeros(num_outputs)
        if name.startswith("W_x"):
            return torch.empty(num_inputs, num_hiddens).uniform_(-bound, bound)
        if name.startswith("W_h"):
            return nn.init.orthogonal_(torch.empty(num_hiddens, num_hiddens))
        return torch.ones(num_hiddens) if name.startswith("b_f") else torch.zeros(num_hiddens)

    # Drawn on the CPU and then moved: the same seed gives the same parameters on every device.
    return [create(name).to(device).requires_grad_() for name in param_names(cell)]


def init_state(cell, batch_size, num_hiddens, device=None, dtype=None):
    """The state before the first step, all zeros (B, h): (H,), (H, C) for "lstm", ((H, C), (H_b, C_b)) for "bi_lstm".

    Raises ValueError for an unknown cell.
    """

    def zeros():
        return torch.zeros(batch_size, num_hiddens, device=device, dtype=dtype)

    if _checked_cell(cell) == "bi_lstm":
        return (zeros(), zeros()), (zeros(), zeros())
    return (zeros(), zeros()) if cell == "lstm" else (zeros(),)


def grad_clipping(params, theta):
    """Scale all gradients in place so that their joint L2 norm is at most theta; return the norm they had.

    g <- min(1, theta / ||g||) g  (Pascanu et al. 2013). The norm is a tensor without dimensions, on the parameters'
    device: nothing waits for the device here. Parameters without a gradient are passed over.
    Raises ValueError if theta is not above 0.
    """
    if not theta > 0:
        raise ValueError(f"theta must be above 0, not {theta}")
    grads = [param.grad for param in params if param.grad is not None]
    if not grads:
        return torch.zeros(())
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, (theta / norm).clamp(max=1.0))
    return norm


# --- the recurrences --------------------------------------------------------------------------------------------------
#
# These loops are the definition. Only the products with the state depend on the step before: the products with the
# inputs, of all gates and all steps, are one large product before the loop, and a step has one product with the state
# (two for the GRU, whose reset gate must be known before the second).


def rnn_steps(inputs, state, params):
    """Elman network: the new state is a squashed mix of the input and the state before.

    H = tanh(X W_xh + H W_hh + b_h)
    inputs (T, B, D), state (H (B, h),), params without W_hq, b_q; returns all states (T, B, h) and the last (H,).
    """
    W_xh, W_hh, b_h = params
    (H,) = state
    states = []
    for X_t in inputs @ W_xh + b_h:  # (B, h)
        H = torch.tanh(X_t + H @ W_hh)
        states.append(H)
    return torch.stack(states), (H,)


def gru_steps(inputs, state, params):
    """Gated recurrent unit (Cho et al. 2014): Z says how much of the state stays, R how much of it the candidate sees.

    Z = s(X W_xz + H W_hz + b_z);  R = s(X W_xr + H W_hr + b_r)
    H~ = tanh(X W_xh + (R * H) W_hh + b_h);  H = Z * H + (1 - Z) * H~
    The state is reset before the product with W_hh; torch.nn.GRU resets after it and is another function.
    inputs (T, B, D), state (H (B, h),), params without W_hq, b_q; returns all states (T, B, h) and the last (H,).
    """
    W_xz, W_hz, b_z, W_xr, W_hr, b_r, W_xh, W_hh, b_h = params
    (H,) = state
    X = inputs @ torch.cat([W_xz, W_xr, W_xh], dim=1) + torch.cat([b_z, b_r, b_h])  # (T, B, 3h)
    W_hzr = torch.cat([W_hz, W_hr], dim=1)  # (h, 2h)
    h = H.shape[1]
    states = []
    for X_t in X:
        Z, R = torch.sigmoid(X_t[:, : 2 * h] + H @ W_hzr).chunk(2, dim=1)  # (B, h) each
        H_tilde = torch.tanh(X_t[:, 2 * h :] + (R * H) @ W_hh)
        H = Z * H + (1 - Z) * H_tilde
        states.append(H)
    return torch.stack(states), (H,)


def lstm_steps(inputs, state, params):
    """Long short-term memory (Hochreiter and Schmidhuber 1997): a memory C that gates write, keep and read.

    I, F, O = s(X W_x. + H W_h. + b_.);  C~ = tanh(X W_xc + H W_hc + b_c)
    C = F * C + I * C~;  H = O * tanh(C)
    inputs (T, B, D), state (H, C) of (B, h) each, params without W_hq, b_q; returns all states H (T, B, h) and (H, C).
    """
    W_xi, W_hi, b_i, W_xf, W_hf, b_f, W_xo, W_ho, b_o, W_xc, W_hc, b_c = params
    H, C = state
    X = inputs @ torch.cat([W_xi, W_xf, W_xo, W_xc], dim=1) + torch.cat([b_i, b_f, b_o, b_c])  # (T, B, 4h)
    W_h = torch.cat([W_hi, W_hf, W_ho, W_hc], dim=1)  # (h, 4h)
    h = H.shape[1]
    states = []
    for X_t in X:
        A = X_t + H @ W_h  # (B, 4h)
        I, F, O = torch.sigmoid(A[:, : 3 * h]).chunk(3, dim=1)  # (B, h) each
        C_tilde = torch.tanh(A[:, 3 * h :])
        C = F * C + I * C_tilde
        H = O * torch.tanh(C)
        states.append(H)
    return torch.stack(states), (H, C)


PLAIN = {"rnn": rnn_steps, "gru": gru_steps, "lstm": lstm_steps}
FAST = {"rnn": bptt.rnn, "gru": bptt.gru, "lstm": bptt.lstm}  # the same functions, differentiated by hand


def hidden_states(cell, inputs, state, params, lengths=None, steps=FAST):
    """All hidden states (T, B, h), (T, B, 2h) for "bi_lstm", and the last state: a recurrence without Y = H W_hq + b_q.

    lengths (B,), for batches of sequences padded on the right: the backward direction then starts at each sequence's
    own last step. Up to its length a sequence's states do not depend on the padding; behind it they mean nothing.
    steps: the loops to use, FAST or PLAIN.
    """
    if _checked_cell(cell) != "bi_lstm":
        return steps[cell](inputs, state, params[:-2])
    forward, backward = state
    H, forward = steps["lstm"](inputs, forward, params[:12])
    H_b, backward = steps["lstm"](reverse(inputs, lengths), backward, params[12:24])
    return torch.cat([H, reverse(H_b, lengths)], dim=2), (forward, backward)


def reverse(sequences, lengths=None):
    """Sequences (T, B, D) read from their ends: of each the first `lengths` (B,) steps, its padding stays in place."""
    if lengths is None:
        return sequences.flip(0)
    T, B, _ = sequences.shape
    steps = torch.arange(T, device=sequences.device)[:, None]  # (T, 1)
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)  # (T, B)
    rows = source * B + torch.arange(B, device=sequences.device)  # of (T * B, D): whole rows move faster than elements
    return sequences.flatten(0, 1).index_select(0, rows.flatten()).view(sequences.shape)


def _outputs(cell, inputs, state, params, lengths=None, steps=FAST):
    states, state = hidden_states(cell, inputs, state, params, lengths, steps)
    W_hq, b_q = params[-2:]
    return _output(states, W_hq, b_q), state


def _output(states, W_hq, b_q):
    """Y = H W_hq + b_q for states (T, B, h), as one product over all steps: (T, B, Q)."""
    return nn.functional.linear(states, W_hq.t().contiguous(), b_q)


def rnn(inputs, state, params):
    """`rnn_steps` and Y = H W_hq + b_q: inputs (T, B, D), state (H,), params as in `param_names("rnn")`.

    Returns (outputs (T, B, Q), (H,)), H (B, h) after the last step.
    """
    return _outputs("rnn", inputs, state, params)


def gru(inputs, state, params):
    """`gru_steps` and Y = H W_hq + b_q: inputs (T, B, D), state (H,), params as in `param_names("gru")`.

    Returns (outputs (T, B, Q), (H,)), H (B, h) after the last step.
    """
    return _outputs("gru", inputs, state, params)


def lstm(inputs, state, params):
    """`lstm_steps` and Y = H W_hq + b_q: inputs (T, B, D), state (H, C), params as in `param_names("lstm")`.

    Returns (outputs (T, B, Q), (H, C)), H and C (B, h) after the last step.
    """
    return _outputs("lstm", inputs, state, params)


def bi_lstm(inputs, state, params, lengths=None):
    """One LSTM from the first step to the last, another from the last to the first, and Y = [H, H_b] W_hq + b_q.

    inputs (T, B, D), state ((H, C), (H_b, C_b)), params as in `param_names("bi_lstm")`; lengths (B,) for sequences
    that are padded on the right, as in `hidden_states`.
    Returns (outputs (T, B, Q), ((H, C), (H_b, C_b))); H_b and C_b have read the sequences down to their first steps.
    """
    return _outputs("bi_lstm", inputs, state, params, lengths)


# --- the models -------------------------------------------------------------------------------------------------------


class Recurrence(nn.Module):
    """A cell's parameter list, registered one by one under their names: state_dict, .to and optimisers see them."""

    def __init__(self, cell, num_inputs, num_hiddens, num_outputs):
        """Sizes as in `init_params`, which draws the parameters."""
        super().__init__()
        self.cell, self.num_hiddens = _checked_cell(cell), num_hiddens
        for name, param in zip(param_names(cell), init_params(cell, num_inputs, num_hiddens, num_outputs), strict=True):
            self.register_parameter(name, nn.Parameter(param.detach()))
        self.graphed = bptt.Graphed(self._states)

    @property
    def params(self):
        """The parameter list that `rnn`, `gru`, `lstm` and `bi_lstm` take."""
        return [getattr(self, name) for name in param_names(self.cell)]

    def forward(self, inputs, lengths=None):
        """Hidden states of inputs (T, B, D) from the zero state: (T, B, h), (T, B, 2h) for "bi_lstm".

        lengths (B,) as in `hidden_states`. On a GPU, training replays CUDA graphs, one for every 16 lengths T.
        """
        if lengths is None:
            lengths = torch.full((inputs.shape[1],), len(inputs), device=inputs.device)
        if inputs.is_cuda and torch.is_grad_enabled():
            return self._replayed(inputs, lengths)
        return self._states(inputs, lengths, *self.params)

    def _states(self, inputs, lengths, *params):
        state = init_state(self.cell, inputs.shape[1], self.num_hiddens, inputs.device, inputs.dtype)
        return hidden_states(self.cell, inputs, state, params, lengths)[0]

    def _replayed(self, inputs, lengths):
        """`_states` of inputs padded to the next multiple of 16 steps, as a graph; padding changes no state before."""
        T = len(inputs)
        inputs = nn.functional.pad(inputs, (0, 0, 0, 0, 0, -T % 16))
        return self.graphed(inputs, lengths, *self.params)[:T]

    def output(self, states):
        """Y = H W_hq + b_q for states (T, B, h)."""
        return _output(states, self.W_hq, self.b_q)


POOLS = ("last", "mean", "max")


def pool_states(states, lengths, pool, directions=1):
    """One vector a sequence from its states (T, B, h): (B, h), padding left out.

    "last" is the state that has read everything: the one at the sequence's end, for the backward half of two
    directions the one at its beginning. "mean" and "max" go over all steps. Raises ValueError for another `pool`.
    """
    if pool == "last":
        last = states[lengths - 1, torch.arange(states.shape[1], device=states.device)]
        if directions == 1:
            return last
        h = states.shape[2] // 2
        return torch.cat([last[:, :h], states[0, :, h:]], dim=1)
    padding = torch.arange(len(states), device=states.device)[:, None, None] >= lengths[:, None]  # (T, B, 1)
    if pool == "mean":
        return states.masked_fill(padding, 0.0).sum(0) / lengths[:, None]
    if pool == "max":
        return states.masked_fill(padding, float("-inf")).max(0).values
    raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")


class TextClassifier(nn.Module):
    """Embedding, recurrence, pooling over time, linear layer: the logits of a text's classes."""

    def __init__(self, cell, vocab_sizes, num_inputs, num_hiddens, num_classes, pool="max", dropout=0.3):
        """vocab_sizes: one size for each aspect of a token (its word; its character, ...), whose embeddings are added.

        num_inputs: D, the embedding's size; num_hiddens: h; dropout: share of the embedded inputs and of the pooled
        states that is set to zero in training. Raises ValueError for an unknown cell or pool.
        """
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
        self.pool = pool
        self.embeddings = nn.ModuleList(nn.Embedding(size, num_inputs) for size in vocab_sizes)
        for embedding in self.embeddings:  # the sum over the aspects has unit variance, as a single embedding would
            nn.init.normal_(embedding.weight, std=len(vocab_sizes) ** -0.5)
        self.dropout = nn.Dropout(dropout)
        self.recurrence = Recurrence(cell, num_inputs, num_hiddens, num_classes)

    def forward(self, tokens, lengths):
        """Logits (B, Q) of tokens (T, B, aspects), integers padded on the right to T, of lengths (B,) >= 1."""
        inputs = sum(embedding(ids) for embedding, ids in zip(self.embeddings, tokens.unbind(2), strict=True))
        states = self.recurrence(self.dropout(inputs), lengths)
        pooled = pool_states(states, lengths, self.pool, DIRECTIONS[self.recurrence.cell])
        return self.recurrence.output(self.dropout(pooled)[None])[0]


class Forecaster(nn.Module):
    """Recurrence over the known steps, and all steps ahead at once from its last state and the mean of its states."""

    def __init__(self, cell, num_inputs, num_hiddens, horizon, dropout=0.0, noise=0.0):
        """num_inputs: D features a step; num_hiddens: h; horizon: Q steps ahead; dropout: share of the pooled states
        that is set to zero in training; noise: standard deviation of what is added to the inputs then.
        Raises ValueError for an unknown cell.
        """
        super().__init__()
        self.recurrence = Recurrence(cell, num_inputs, num_hiddens, horizon)
        self.W_mq = nn.Parameter(
            torch.empty_like(self.recurrence.W_hq).uniform_(-(num_hiddens**-0.5), num_hiddens**-0.5)
        )
        self.dropout, self.noise = nn.Dropout(dropout), noise

    def forward(self, inputs):
        """Y = H_last W_hq + H_mean W_mq + b_q: forecasts (B, Q) from the known steps (T, B, D).

        The backward direction reads only those, too.
        """
        if self.training and self.noise:
            inputs = inputs + self.noise * torch.randn_like(inputs)
        states = self.recurrence(inputs)
        lengths = torch.full((inputs.shape[1],), len(inputs), device=inputs.device)
        last = pool_states(states, lengths, "last", DIRECTIONS[self.recurrence.cell])
        return self.recurrence.output(self.dropout(last)[None])[0] + self.dropout(states.mean(dim=0)) @ self.W_mq


class ForecastEnsemble(nn.Module):
    """Several forecasters whose mean is the forecast, and a linear forecast that they correct, where there is one."""

    def __init__(self, members, linear=None):
        """members: `Forecaster`s; linear: a fixed linear forecast (T + 1, Q) of the first feature from its own T known
        steps, the last row the constant, or None."""
        super().__init__()
        self.members = nn.ModuleList(members)
        self.register_buffer("linear", linear)

    def forward(self, inputs):
        """Forecasts from inputs (T, B, D): of each member (members, B, Q) in training, their mean (B, Q) otherwise."""
        outputs = torch.stack([member(inputs) for member in self.members])
        if self.linear is not None:
            outputs = outputs + inputs[:, :, 0].t() @ self.linear[:-1] + self.linear[-1]
        return outputs if self.training else outputs.mean(dim=0)
