"""RNN, GRU, LSTM and Bi-LSTM as the lecture writes them: parameter lists and plain loops.

T steps, B sequences, D inputs, h hidden units, Q outputs. Inputs are time-major (T, B, D).
Each cell is a function of (inputs, state, params) and returns (outputs, state), outputs (T, B, Q).
The equations are those of Dive into Deep Learning, chapters 9 and 10. Below the cells: their
parameters, and the two models built on them.
"""

import torch
from torch import nn

import bptt

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
    The state is reset before the product with W_hh; torch.nn.GRU resets after it, which is another
    function.
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
    """Long short-term memory (Hochreiter and Schmidhuber 1997): gates write, keep and read C.

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
    on the right: the backward LSTM then starts at each sequence's own last step.
    Returns outputs (T, B, Q) and the last states of both, which have read the padding too.
    """
    forward, backward = state
    *params, W_hq, b_q = params
    half, h = len(params) // 2, len(W_hq) // 2
    # [H, H_b] W_hq is H times the upper half of W_hq plus H_b times the lower half.
    params_f = [*params[:half], W_hq[:h], b_q]
    params_b = [*params[half:], W_hq[h:], torch.zeros_like(b_q)]    # b_q is added once
    Y, forward = lstm(inputs, forward, params_f)
    Y_b, backward = lstm(reverse(inputs, lengths), backward, params_b)
    return Y + reverse(Y_b, lengths), (forward, backward)


def reverse(sequences, lengths=None):
    """Sequences (T, B, D) read from their ends: the first `lengths` (B,) steps, padding stays."""
    if lengths is None:
        return sequences.flip(0)
    T, B, _ = sequences.shape
    steps = torch.arange(T, device=sequences.device)[:, None]           # (T, 1)
    source = torch.where(steps < lengths, lengths - 1 - steps, steps)   # (T, B)
    return sequences[source, torch.arange(B, device=sequences.device)]


# fmt: on
# --- parameters ---------------------------------------------------------------------------------

CELLS = {"rnn": rnn, "gru": gru, "lstm": lstm, "bi_lstm": bi_lstm}
GATES = {"rnn": "h", "gru": "zrh", "lstm": "ifoc", "bi_lstm": "ifoc"}  # each has W_x*, W_h* and b_*


def param_names(cell):
    """Names of a cell's parameters in the order of its list: W_xh W_hh b_h W_hq b_q for "rnn".

    The backward direction's names end in "_b". Raises ValueError for an unknown cell.
    """
    if cell not in CELLS:
        raise ValueError(f"cell must be one of {', '.join(CELLS)}, not {cell!r}")
    suffixes = ("", "_b") if cell == "bi_lstm" else ("",)
    gates = [gate + suffix for suffix in suffixes for gate in GATES[cell]]
    return [name + gate for gate in gates for name in ("W_x", "W_h", "b_")] + ["W_hq", "b_q"]


def init_params(cell, num_inputs, num_hiddens, num_outputs, device=None):
    """A cell's parameters, a list of leaf tensors that require gradients, in the order of its loop.

    W_x* (D, h) and W_hq (h, Q), (2h, Q) for "bi_lstm", are uniform in +-1/sqrt(h);
    W_h* (h, h) are orthogonal, which keeps a state's length over many steps (Saxe et al. 2014);
    biases (h,) and (Q,) are 0, the LSTM's forget bias 1 (Jozefowicz et al. 2015).
    Drawn on the CPU: the same seed gives the same parameters on every device.
    Raises ValueError for an unknown cell or a size below 1.
    """
    param_names(cell)  # refuses an unknown cell
    if min(num_inputs, num_hiddens, num_outputs) < 1:
        raise ValueError("num_inputs, num_hiddens and num_outputs must be at least 1")
    directions = 2 if cell == "bi_lstm" else 1
    bound, params = num_hiddens**-0.5, []
    for gate in GATES[cell] * directions:
        W_x = torch.empty(num_inputs, num_hiddens).uniform_(-bound, bound)
        W_h = nn.init.orthogonal_(torch.empty(num_hiddens, num_hiddens))
        b = torch.full((num_hiddens,), 1.0 if gate == "f" else 0.0)
        params += [W_x, W_h, b]
    W_hq = torch.empty(directions * num_hiddens, num_outputs).uniform_(-bound, bound)
    params += [W_hq, torch.zeros(num_outputs)]
    return [param.to(device).requires_grad_() for param in params]


def init_state(cell, batch_size, num_hiddens, device=None, dtype=None):
    """The state before the first step, zeros (B, h): (H,), (H, C) or ((H, C), (H_b, C_b)).

    Raises ValueError for an unknown cell.
    """
    param_names(cell)  # refuses an unknown cell
    H, C, H_b, C_b = torch.zeros(4, batch_size, num_hiddens, device=device, dtype=dtype)
    return {"rnn": (H,), "gru": (H,), "lstm": (H, C), "bi_lstm": ((H, C), (H_b, C_b))}[cell]


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
    if norm > theta:
        for grad in grads:
            grad *= theta / norm
    return norm


# --- models -------------------------------------------------------------------------------------

LOOPS = ("fast", "plain")
POOLS = ("last", "mean", "max")


class Recurrence(nn.Module):
    """A cell with its parameters registered under their names; starts from the zero state."""

    def __init__(self, cell, num_inputs, num_hiddens, num_outputs, loops="fast"):
        """Sizes as in `init_params`. loops: "fast" runs `bptt`, "plain" the loops above.

        Both give the same numbers but for rounding. Raises ValueError for an unknown cell or loops.
        """
        super().__init__()
        if loops not in LOOPS:
            raise ValueError(f"loops must be one of {', '.join(LOOPS)}, not {loops!r}")
        self.cell, self.num_hiddens, self.loops = cell, num_hiddens, loops
        params = init_params(cell, num_inputs, num_hiddens, num_outputs)
        for name, param in zip(param_names(cell), params, strict=True):
            self.register_parameter(name, nn.Parameter(param))

    @property
    def params(self):
        """The parameter list that the cell's loop takes."""
        return [getattr(self, name) for name in param_names(self.cell)]

    def directions(self):
        """The parameters without W_hq and b_q, a list for each direction."""
        params = self.params[:-2]
        half = len(params) // 2
        return [params[:half], params[half:]] if self.cell == "bi_lstm" else [params]

    def forward(self, inputs, lengths=None):
        """Hidden states (T, B, h), (T, B, 2h) for "bi_lstm", of inputs (T, B, D).

        lengths (B,) as in `bi_lstm`. Raises ValueError for inputs without a step.
        """
        T, B, _ = inputs.shape
        if T == 0:
            raise ValueError("inputs (T, B, D) must have at least one step, not T = 0")
        state = init_state(self.cell, B, self.num_hiddens, inputs.device, inputs.dtype)
        if self.loops == "plain":  # with the identity as W_hq, the outputs are the hidden states
            *params, W_hq, b_q = self.params
            identity = [torch.eye(len(W_hq)).to(W_hq), torch.zeros(len(W_hq)).to(b_q)]
            options = [lengths] if self.cell == "bi_lstm" else []
            return CELLS[self.cell](inputs, state, [*params, *identity], *options)[0]
        if self.cell == "bi_lstm":
            params, params_b = self.directions()
            H, _ = bptt.lstm(inputs, state[0], params)
            H_b, _ = bptt.lstm(reverse(inputs, lengths), state[1], params_b)
            return torch.cat([H, reverse(H_b, lengths)], dim=2)
        return getattr(bptt, self.cell)(inputs, state, *self.directions())[0]

    def output(self, states):
        """Y = H W_hq + b_q: states (..., h) give (..., Q)."""
        return states @ self.W_hq + self.b_q


def pool_states(states, lengths, pool, bidirectional=False):
    """One vector a sequence (B, h) from its states (T, B, h), without the padding behind lengths;
    h is 2h where the states are those of both directions.

    "last" is the state that has read everything: at the sequence's end, and for the backward half
    of a bidirectional cell at its beginning. "mean" and "max" go over all steps.
    Raises ValueError for another `pool`.
    """
    if pool == "last":
        last = states[lengths - 1, torch.arange(states.shape[1], device=states.device)]  # (B, h)
        h = states.shape[2] // 2
        return torch.cat([last[:, :h], states[0, :, h:]], dim=1) if bidirectional else last
    steps = torch.arange(len(states), device=states.device)[:, None, None]
    padding = steps >= lengths[:, None]  # (T, B, 1)
    if pool == "mean":
        return states.masked_fill(padding, 0.0).sum(0) / lengths[:, None]
    if pool == "max":
        return states.masked_fill(padding, float("-inf")).amax(0)
    raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")


class TextClassifier(nn.Module):
    """Embeddings, recurrence, pooling over time, linear layer: the logits of a text's classes."""

    def __init__(
        self, cell, vocab_sizes, num_inputs, num_hiddens, num_classes, pool="max", dropout=0.3,
        loops="fast",
    ):  # fmt: skip
        """vocab_sizes: a size for each aspect of a token (word, character, ...).

        num_inputs: D, an embedding's size; num_hiddens: h; dropout: share of the embedded inputs
        and of the pooled states set to zero in training.
        Raises ValueError for an unknown cell or loops.
        """
        super().__init__()
        self.pool = pool
        self.embeddings = nn.ModuleList(nn.Embedding(size, num_inputs) for size in vocab_sizes)
        for embedding in self.embeddings:  # the sum over the aspects has variance 1
            nn.init.normal_(embedding.weight, std=len(vocab_sizes) ** -0.5)
        self.dropout = nn.Dropout(dropout)
        self.recurrence = Recurrence(cell, num_inputs, num_hiddens, num_classes, loops)

    def embed(self, tokens):
        """Inputs of the recurrence (T, B, D) for tokens (T, B, aspects)."""
        pairs = zip(self.embeddings, tokens.unbind(2), strict=True)
        inputs = sum(embedding(ids) for embedding, ids in pairs)
        # One dropout mask for all steps of a text (Gal and Ghahramani 2016).
        return inputs * self.dropout(inputs.new_ones(1, *inputs.shape[1:]))

    def classify(self, states, lengths):
        """Logits (B, Q) from all hidden states (T, B, h)."""
        pooled = pool_states(states, lengths, self.pool, self.recurrence.cell == "bi_lstm")
        return self.recurrence.output(self.dropout(pooled))

    def forward(self, tokens, lengths):
        """Logits (B, Q) of tokens (T, B, aspects), padded on the right, of lengths (B,) >= 1."""
        return self.classify(self.recurrence(self.embed(tokens), lengths), lengths)


class Forecaster(nn.Module):
    """A recurrence that corrects a linear forecast: all steps ahead at once, from its last state.

    Y = f W_xq + share * (H_T W_hq + b_q), f the `linear_features` of the known steps. W_xq and
    share are set from outside and are not trained.
    """

    def __init__(
        self, cell, num_inputs, num_hiddens, known, horizon, steps_a_day, dropout=0.0, loops="fast"
    ):
        """num_inputs: D features a step, the last four sine and cosine of the year and of the day;
        num_hiddens: h; known: T, whole days; horizon: Q; dropout: share of the last state set to
        zero in training. Raises ValueError for an unknown cell or loops.
        """
        super().__init__()
        self.steps_a_day = steps_a_day
        self.recurrence = Recurrence(cell, num_inputs, num_hiddens, horizon, loops)
        nn.init.zeros_(self.recurrence.W_hq)  # training starts from the linear forecast
        for name, param in self.recurrence.named_parameters():
            if name.startswith("b_f"):  # with 1 the LSTM overfits within two epochs
                nn.init.zeros_(param)
        blocks = self.linear_features(torch.zeros(known, 1, num_inputs), steps_a_day)
        self.register_buffer("W_xq", torch.zeros(sum(f.shape[1] for f in blocks), horizon))
        self.register_buffer("share", torch.ones(()))
        self.dropout = nn.Dropout(dropout)

    @staticmethod
    def linear_features(inputs, steps_a_day):
        """Eight blocks (B, *) of features from inputs (T, B, D): x, x sin_y, x cos_y, z, z sin_y,
        z cos_y, z sin_d, z cos_d, with sine and cosine of the year and of the day at the last step.

        x: the first column, in means of an hour where steps are shorter. z: of all columns the
        daily means and the hours of the last day. Both end with a 1. The products let the weights
        change with season and hour.
        """
        per_day = min(24, steps_a_day)
        hours = inputs[:, :, :-4].unflatten(0, (-1, steps_a_day // per_day)).mean(1)
        days = hours.unflatten(0, (-1, per_day)).mean(1)  # (days, B, C), hours (days * 24, B, C)
        x, z = hours[:, :, :1], torch.cat([days, hours[-per_day:]])
        x, z = (nn.functional.pad(v.transpose(0, 1).flatten(1), (0, 1), value=1.0) for v in (x, z))
        sin_y, cos_y, sin_d, cos_d = inputs[-1, :, -4:].t()[:, :, None]  # (B, 1) each
        return x, x * sin_y, x * cos_y, z, z * sin_y, z * cos_y, z * sin_d, z * cos_d

    def forward(self, inputs):
        """Forecasts (B, Q) from the known steps (T, B, D), which both directions read alone."""
        states = self.recurrence(inputs)  # (T, B, h)
        lengths = torch.full((inputs.shape[1],), len(inputs), device=inputs.device)
        last = pool_states(states, lengths, "last", self.recurrence.cell == "bi_lstm")
        features = torch.cat(self.linear_features(inputs, self.steps_a_day), dim=1)  # (B, F)
        return features @ self.W_xq + self.share * self.recurrence.output(self.dropout(last))
