"""Back-propagation through time by hand: RNN, GRU and LSTM with derived gradients.

`rnn`, `gru` and `lstm` compute what the loops of `rnn_models` compute, but autograd sees one node:
`forward` runs the recurrence, `backward` goes from the last step to the first (Werbos 1990), in the
form of NX-AI/flashrnn's vanilla backward: one product of all inputs with W_x before the loop, one
for each weight after it.

T steps, B sequences, D inputs, h units. X is a step's input, H its state, H_prev the state before.
dV is the gradient of the loss with respect to V, dY the part of dH that comes from above, A the sum
inside a gate, s the logistic sigmoid, * the elementwise product.
Through a gate: S = s(A) gives dA = dS * S * (1 - S), and S = tanh(A) gives dA = dS * (1 - S^2).
After the loop: dX = dA W_x^T, and summed over the steps dW_x = X^T dA, db = dA.
dH starts at zero, dC at the gradient of the last C. On the right of = they are what the following
step passed back: its dH_prev and dC_prev.
"""

from functools import partial

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # (dS, S) -> dS * S * (1 - S)
tanh_backward = torch.ops.aten.tanh_backward.grad_input  # (dS, S) -> dS * (1 - S^2)
MINUS_ONE = torch.tensor(-1.0)


def _tanh(X, out):
    """tanh(X); float32 on the CPU as 2 s(2X) - 1, to 1e-7. This takes 5 to 7 % off a training step
    at T, B, D, h = 50, 64, 128, 128."""
    if X.is_cpu and X.dtype == torch.float32:
        return torch.add(MINUS_ONE, torch.sigmoid(X + X, out=out), alpha=2, out=out)
    return torch.tanh(X, out=out)


def _before(H_0, states):
    """The state before each step, from H_0 (B, h) and the states after each step (T, B, h)."""
    return torch.cat([H_0[None], states[:-1]])  # (T, B, h)


def _gradients(ctx, inputs, W_x, dA, *products):
    """dX, dW_x, dW_h and db from all steps' dA (T, B, gates * h).

    products: all steps' X and dA of A = X W_h, a pair for each block of columns of W_h.
    """
    dX = dA @ W_x.t() if ctx.needs_input_grad[0] else None  # (T, B, D)
    dW_x, *dW_h = (X.flatten(0, 1).t() @ dA.flatten(0, 1) for X, dA in ((inputs, dA), *products))
    return dX, dW_x, torch.cat(dW_h, dim=1), dA.sum(dim=(0, 1))


class RNN(Function):
    """Forward: H = tanh(X W_x + H_prev W_h + b)

    Backward: dH = dY + dH;  dA = dH * (1 - H^2);  dH_prev = dA W_h^T.  dW_h = sum of H_prev^T dA.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, W_h, b, H_0):
        states = inputs @ W_x + b  # (T, B, h): X W_x + b, later H
        H = H_0  # (B, h)
        for A in states:
            H = _tanh(A.addmm_(H, W_h), out=A)
        ctx.save_for_backward(inputs, W_x, W_h, H_0, states)
        return (states,)

    @staticmethod
    @once_differentiable
    def backward(ctx, dY_all):
        inputs, W_x, W_h, H_0, states = ctx.saved_tensors
        dA_all = torch.empty_like(states)  # (T, B, h)
        dH = torch.zeros_like(H_0)
        for H, dY, dA in reversed(list(zip(states, dY_all, dA_all, strict=True))):
            dH = dY + dH
            tanh_backward(dH, H, grad_input=dA)
            dH = dA @ W_h.t()
        return *_gradients(ctx, inputs, W_x, dA_all, (_before(H_0, states), dA_all)), dH


class GRU(Function):
    """Forward: Z = s(X W_xz + H_prev W_hz + b_z), R likewise;  H~ = tanh(X W_xh + M W_hh + b_h)
    with M = R * H_prev;  H = Z * H_prev + (1 - Z) * H~

    Backward: dH = dY + dH;  dZ = dH * (H_prev - H~);  dH~ = dH * (1 - Z);  dM = dA_h W_hh^T;
    dR = dM * H_prev;  dH_prev = dH * Z + dM * R + dA_zr W_hzr^T, W_hzr = [W_hz W_hr].
    dW_hzr = sum of H_prev^T dA_zr;  dW_hh = sum of M^T dA_h.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, W_h, b, H_0):
        h = len(W_h)
        W_hzr, W_hh = W_h.split([2 * h, h], dim=1)
        gates = inputs @ W_x + b  # (T, B, 3h): X W_x + b, later Z R H~
        states = torch.empty_like(gates[:, :, :h])
        H = H_0  # (B, h)
        views = gates[:, :, : 2 * h], *gates.chunk(3, dim=2), states
        for ZR, Z, R, H_tilde, H_new in zip(*views, strict=True):
            ZR.addmm_(H, W_hzr).sigmoid_()  # (B, 2h)
            _tanh(H_tilde.addmm_(R * H, W_hh), out=H_tilde)  # (B, h)
            H = torch.lerp(H_tilde, H, Z, out=H_new)  # Z * H + (1 - Z) * H~
        ctx.save_for_backward(inputs, W_x, W_hzr, W_hh, H_0, gates, states)
        return (states,)

    @staticmethod
    @once_differentiable
    def backward(ctx, dY_all):
        inputs, W_x, W_hzr, W_hh, H_0, gates, states = ctx.saved_tensors
        h, before = len(W_hh), _before(H_0, states)
        dA_all = torch.empty_like(gates)  # (T, B, 3h)
        dA_zr_all, dA_h_all = dA_all.split([2 * h, h], dim=2)
        R_all = gates[:, :, h : 2 * h]
        dH = torch.zeros_like(H_0)
        views = gates[:, :, : 2 * h], *gates.chunk(3, dim=2), before, dY_all, dA_zr_all, dA_h_all
        for ZR, Z, R, H_tilde, H_prev, dY, dA_zr, dA_h in reversed(list(zip(*views, strict=True))):
            dH = dY + dH
            tanh_backward(dH * (1 - Z), H_tilde, grad_input=dA_h)
            dM = dA_h @ W_hh.t()
            dZ, dR = dH * (H_prev - H_tilde), dM * H_prev
            sigmoid_backward(torch.cat([dZ, dR], dim=1), ZR, grad_input=dA_zr)
            dH = torch.addcmul(dH * Z, dM, R).addmm_(dA_zr, W_hzr.t())
        products = (before, dA_zr_all), (R_all * before, dA_h_all)
        return *_gradients(ctx, inputs, W_x, dA_all, *products), dH


class LSTM(Function):
    """Forward: I = s(X W_xi + H_prev W_hi + b_i), F and O likewise;
    C~ = tanh(X W_xc + H_prev W_hc + b_c);  C = F * C_prev + I * C~;  H = O * tanh(C)

    Backward: dH = dY + dH;  dC = dC + dH * O * (1 - tanh(C)^2);
    dI = dC * C~;  dF = dC * C_prev;  dO = dH * tanh(C);  dC~ = dC * I;
    dC_prev = dC * F;  dH_prev = dA W_h^T.  dW_h = sum of H_prev^T dA.
    W_x = [W_xi W_xf W_xo W_xc], W_h and dA likewise.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, W_h, b, H_0, C_0):
        h = len(W_h)
        gates = inputs @ W_x + b  # (T, B, 4h): X W_x + b, later I F O C~
        states, memories, tanhs = gates.new_empty(3, *gates.shape[:2], h)  # H, C, tanh(C)
        H, C = H_0, C_0  # (B, h)
        views = gates, gates[:, :, : 3 * h], *gates.chunk(4, dim=2), states, memories, tanhs
        for A, IFO, I, F, O, C_tilde, H_new, C_new, tanh_C in zip(*views, strict=True):
            A.addmm_(H, W_h)  # (B, 4h)
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
        h = len(W_h)
        dA_all = torch.empty_like(gates)  # (T, B, 4h)
        views = gates[:, :, : 3 * h], *gates.chunk(4, dim=2), _before(C_0, memories), tanhs, dY_all
        views = *views, dA_all, *dA_all.split([3 * h, h], dim=2)
        dH = torch.zeros_like(H_0)
        steps = reversed(list(zip(*views, strict=True)))
        for IFO, I, F, O, C_tilde, C_prev, tanh_C, dY, dA, dA_ifo, dA_c in steps:
            dH = dY + dH
            dC = torch.addcmul(dC, dH * O, 1 - tanh_C**2)
            dI, dF, dO = dC * C_tilde, dC * C_prev, dH * tanh_C
            sigmoid_backward(torch.cat([dI, dF, dO], dim=1), IFO, grad_input=dA_ifo)
            tanh_backward(dC * I, C_tilde, grad_input=dA_c)
            dC = dC * F
            dH = dA @ W_h.t()
        return *_gradients(ctx, inputs, W_x, dA_all, (_before(H_0, states), dA_all)), dH, dC


def run(function, inputs, state, params):
    """Hidden states (T, B, h) and the last state, as the loop of this name finds them.

    inputs (T, B, D); state (H,) or (H, C) of (B, h) each; params: the loop's without W_hq and b_q,
    W_x* W_h* b_* of the gates in turn. Computes in the parameters' precision, under autocast too.
    """
    W_x, W_h, b = (torch.cat(params[i::3], dim=-1) for i in range(3))
    with torch.autocast(inputs.device.type, enabled=False):
        tensors = (tensor.to(b.dtype) for tensor in (inputs, W_x, W_h, b, *state))
        states, *memory = function.apply(*tensors)
    return states, (states[-1], *memory)


rnn, gru, lstm = (partial(run, function) for function in (RNN, GRU, LSTM))
