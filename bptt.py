"""Back-propagation through time by hand: RNN, GRU and LSTM with derived gradients.

`rnn`, `gru` and `lstm` compute what the loops of `rnn_models` compute, but autograd sees one node.
`forward` runs the recurrence; `backward` goes from the last step to the first (Werbos 1990,
"Backpropagation through time: what it does and how to do it"), in the form of NX-AI/flashrnn's
vanilla backward: one product of all inputs with W_x before the loop, one for each weight after it.

T steps, B sequences, D inputs, h units. X is a step's input, H its state, H_prev the state before.
dV is the gradient of the loss with respect to V, dY the part of dH that comes from above, A the sum
inside a gate, s the logistic sigmoid, * the elementwise product, W^T the transpose.
Through a gate: S = s(A) gives dA = dS * S * (1 - S), and S = tanh(A) gives dA = dS * (1 - S^2).
After the loop, for all cells: dX = dA W_x^T, and summed over the steps dW_x = X^T dA, db = dA.
The right-hand dH and dC of a backward formula come from the step after; dH starts at zero.
"""

import ctypes

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # (dS, S) -> dS * S * (1 - S)
tanh_backward = torch.ops.aten.tanh_backward.grad_input  # (dS, S) -> dS * (1 - S^2)
onednn_product = getattr(torch.ops.mkldnn, "_linear_pointwise", None)  # private: may be missing
MINUS_ONE = torch.tensor(-1.0)


def tune_allocator():
    """Let glibc keep freed memory for the next tensors; call this once, when a program starts."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return  # not glibc: Windows, macOS, musl
    mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: tensors up to 32 MiB come from the heap
    mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: keep up to 1 GiB of freed heap


def _fast_cpu(X):
    return X.device.type == "cpu" and X.dtype == torch.float32 and not torch.compiler.is_compiling()


def _product(X, W, b=None):
    """X W + b for X (..., n), W (n, m), b (m,).

    At T, B, D, h = 100, 64, 300, 256 a training step without oneDNN's kernel takes 7 to 15 % longer
    on one thread of an AMD EPYC. For W with a side below 256 `@` is up to 25 % faster.
    """
    if onednn_product and min(W.shape) >= 256 and X.numel() and _fast_cpu(X):
        return onednn_product(X, W.t(), b, "none", [], "")
    return X @ W if b is None else X @ W + b


def _tanh(X, out):
    """tanh(X); float32 on the CPU as 2 s(2X) - 1, which saves 3 to 5 % of a training step."""
    if _fast_cpu(X):
        return torch.add(MINUS_ONE, torch.sigmoid(X + X, out=out), alpha=2, out=out)
    return torch.tanh(X, out=out)


def _before(H_0, states):
    """The state before each step, from H_0 (B, h) and the states after each step (T, B, h)."""
    return torch.cat([H_0[None], states[:-1]])  # (T, B, h)


def _summed(X, dA):
    """X^T dA summed over the steps, X (T, B, n) and dA (T, B, m): the gradient of W in A = X W."""
    return X.flatten(0, 1).t() @ dA.flatten(0, 1)  # (n, m)


def _input_gradients(ctx, inputs, W_x, dA):
    """dX, dW_x and db from all steps' dA (T, B, gates * h)."""
    dX = _product(dA, W_x.t()) if ctx.needs_input_grad[0] else None  # (T, B, D)
    return dX, _summed(inputs, dA), dA.sum(dim=(0, 1))


class RNN(Function):
    """Forward: H = tanh(X W_x + H_prev W_h + b)

    Backward: dH = dY + dH;  dA = dH * (1 - H^2);  dH_prev = dA W_h^T.  dW_h = sum of H_prev^T dA.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, b, W_h, H_0):
        states = _product(inputs, W_x, b)  # (T, B, h): X W_x + b, later H
        H = H_0  # (B, h)
        for A in states:
            A += _product(H, W_h)
            H = _tanh(A, out=A)
        ctx.save_for_backward(inputs, W_x, W_h, H_0, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, dY_all):
        inputs, W_x, W_h, H_0, states = ctx.saved_tensors
        dA_all = torch.empty_like(states)
        dH = torch.zeros_like(H_0)
        for H, dY, dA in reversed(list(zip(states, dY_all, dA_all, strict=True))):
            dH = dY + dH
            tanh_backward(dH, H, grad_input=dA)
            dH = _product(dA, W_h.t())
        dW_h = _summed(_before(H_0, states), dA_all)
        return *_input_gradients(ctx, inputs, W_x, dA_all), dW_h, dH


class GRU(Function):
    """Forward: Z = s(X W_xz + H_prev W_hz + b_z), R likewise;  H~ = tanh(X W_xh + M W_hh + b_h)
    with M = R * H_prev;  H = Z * H_prev + (1 - Z) * H~

    Backward: dH = dY + dH;  dZ = dH * (H_prev - H~);  dH~ = dH * (1 - Z);
    dM = dA_h W_hh^T;  dR = dM * H_prev;  dH_prev = dH * Z + dM * R + dA_zr W_hzr^T.
    dW_hzr = sum of H_prev^T dA_zr;  dW_hh = sum of M^T dA_h.  W_hzr = [W_hz W_hr], dA_zr likewise.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, b, W_hzr, W_hh, H_0):
        h = len(W_hh)
        gates = _product(inputs, W_x, b)  # (T, B, 3h): X W_x + b, later Z R H~
        states = torch.empty_like(gates[:, :, :h])
        H = H_0  # (B, h)
        views = gates[:, :, : 2 * h], *gates.chunk(3, dim=2), states
        for ZR, Z, R, H_tilde, H_new in zip(*views, strict=True):
            ZR.add_(_product(H, W_hzr)).sigmoid_()  # (B, 2h)
            _tanh(H_tilde.add_(_product(R * H, W_hh)), out=H_tilde)  # (B, h)
            H = torch.lerp(H_tilde, H, Z, out=H_new)  # Z * H + (1 - Z) * H~
        ctx.save_for_backward(inputs, W_x, W_hzr, W_hh, H_0, gates, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, dY_all):
        inputs, W_x, W_hzr, W_hh, H_0, gates, states = ctx.saved_tensors
        h, before, dA_all = len(W_hh), _before(H_0, states), torch.empty_like(gates)
        dA_zr_all, dA_h_all = dA_all.split([2 * h, h], dim=2)
        dH = torch.zeros_like(H_0)
        views = gates[:, :, : 2 * h], *gates.chunk(3, dim=2), before, dY_all, dA_zr_all, dA_h_all
        for ZR, Z, R, H_tilde, H_prev, dY, dA_zr, dA_h in reversed(list(zip(*views, strict=True))):
            dH = dY + dH
            dZ = dH * (H_prev - H_tilde)
            dH_tilde = dH * (1 - Z)
            tanh_backward(dH_tilde, H_tilde, grad_input=dA_h)
            dM = _product(dA_h, W_hh.t())
            dR = dM * H_prev
            sigmoid_backward(torch.cat([dZ, dR], dim=1), ZR, grad_input=dA_zr)
            dH = dH * Z + dM * R + _product(dA_zr, W_hzr.t())
        M = gates[:, :, h : 2 * h] * before
        dW_hzr, dW_hh = _summed(before, dA_zr_all), _summed(M, dA_h_all)
        return *_input_gradients(ctx, inputs, W_x, dA_all), dW_hzr, dW_hh, dH


class LSTM(Function):
    """Forward: I = s(X W_xi + H_prev W_hi + b_i), F and O likewise;
    C~ = tanh(X W_xc + H_prev W_hc + b_c);  C = F * C_prev + I * C~;  H = O * tanh(C)

    Backward: dH = dY + dH;  dO = dH * tanh(C);  dC = dC + dH * O * (1 - tanh(C)^2);
    dI = dC * C~;  dF = dC * C_prev;  dC~ = dC * I;  dC_prev = dC * F;  dH_prev = dA W_h^T.
    dW_h = sum of H_prev^T dA.  W_x = [W_xi W_xf W_xo W_xc], W_h and dA likewise.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, b, W_h, H_0, C_0):
        h = len(W_h)
        gates = _product(inputs, W_x, b)  # (T, B, 4h): X W_x + b, later I F O C~
        states, memories, tanhs = gates.new_empty(3, *gates.shape[:2], h)  # H, C, tanh(C)
        H, C = H_0, C_0  # (B, h)
        views = gates, gates[:, :, : 3 * h], *gates.chunk(4, dim=2), states, memories, tanhs
        for A, IFO, I, F, O, C_tilde, H_new, C_new, tanh_C in zip(*views, strict=True):
            A += _product(H, W_h)  # (B, 4h)
            IFO.sigmoid_()
            _tanh(C_tilde, out=C_tilde)
            C = torch.addcmul(F * C, I, C_tilde, out=C_new)  # F * C + I * C~
            H = torch.mul(O, _tanh(C, out=tanh_C), out=H_new)
        ctx.save_for_backward(inputs, W_x, W_h, H_0, C_0, gates, states, memories, tanhs)
        return states, C.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, dY_all, dC):
        inputs, W_x, W_h, H_0, C_0, gates, states, memories, tanhs = ctx.saved_tensors
        dA_all = torch.empty_like(gates)
        IFO_all = gates[:, :, : -len(W_h)]
        dA_ifo_all, dA_c_all = dA_all.tensor_split([-len(W_h)], dim=2)
        views = *gates.chunk(4, dim=2), IFO_all, _before(C_0, memories), tanhs, dY_all
        steps = zip(*views, dA_all, dA_ifo_all, dA_c_all, strict=True)
        dH = torch.zeros_like(H_0)
        for I, F, O, C_tilde, IFO, C_prev, tanh_C, dY, dA, dA_ifo, dA_c in reversed(list(steps)):
            dH = dY + dH
            dO = dH * tanh_C
            dC = dC + dH * O * (1 - tanh_C**2)
            dI = dC * C_tilde
            dF = dC * C_prev
            dC_tilde = dC * I
            sigmoid_backward(torch.cat([dI, dF, dO], dim=1), IFO, grad_input=dA_ifo)
            tanh_backward(dC_tilde, C_tilde, grad_input=dA_c)
            dC = dC * F
            dH = _product(dA, W_h.t())
        dW_h = _summed(_before(H_0, states), dA_all)
        return *_input_gradients(ctx, inputs, W_x, dA_all), dW_h, dH, dC


def _apply(function, inputs, *tensors):
    """function.apply, under autocast in the parameters' own precision; ValueError for T = 0."""
    if len(inputs) == 0:
        raise ValueError("inputs (T, B, D) must have at least one step, not T = 0")
    device = inputs.device.type
    if not torch.is_autocast_enabled(device):
        return function.apply(inputs, *tensors)
    with torch.autocast(device, enabled=False):
        return function.apply(*(tensor.to(tensors[0].dtype) for tensor in (inputs, *tensors)))


def rnn(inputs, state, params):
    """inputs (T, B, D), state (H (B, h),), params W_xh W_hh b_h -> states (T, B, h), (H,).

    Raises ValueError for inputs without a step (T = 0).
    """
    W_xh, W_hh, b_h = params
    states = _apply(RNN, inputs, W_xh, b_h, W_hh, *state)
    return states, (states[-1],)


def gru(inputs, state, params):
    """As `rnn`, with params W_x. W_h. b_. of the gates z, r, h in turn."""
    W_x, b = torch.cat(params[0::3], dim=1), torch.cat(params[2::3])  # (D, 3h), (3h,)
    W_hz, W_hr, W_hh = params[1::3]
    states = _apply(GRU, inputs, W_x, b, torch.cat([W_hz, W_hr], dim=1), W_hh, *state)
    return states, (states[-1],)


def lstm(inputs, state, params):
    """As `rnn`, with params W_x. W_h. b_. of i, f, o, c in turn and state (H, C), (B, h) each."""
    W_x, b = torch.cat(params[0::3], dim=1), torch.cat(params[2::3])  # (D, 4h), (4h,)
    states, C = _apply(LSTM, inputs, W_x, b, torch.cat(params[1::3], dim=1), *state)
    return states, (states[-1], C)
