"""Back-propagation through time by hand: the recurrences of `rnn_models` again, with derived gradients, and fast.

`rnn`, `gru` and `lstm` here take and return what `rnn_steps`, `gru_steps` and `lstm_steps` do, and a test proves them
equal in values, states and gradients. What makes them fast on a CPU:

- The pass back through time is derived by hand, so autograd records one node instead of a dozen for every step.
- Input and state lie side by side in one buffer, XH = [X H]: a step has one product, XH W + b with W_x above W_h (the
  GRU two), into which each new state is written where the next step reads it. Backwards, a step has one product with
  W_h^T (the GRU two); the gradients of inputs and weights are one large product each after the loop.
- Few operations a step, each on a whole gate or on all gates at once, in memory from a pool (`_buffer`).
- tanh(x) = 2 s(2x) - 1: torch's sigmoid is several times faster than its tanh.
- Products in float32 go to oneDNN, whose kernels are up to twice as fast as the BLAS behind `@`, where torch has it.

Names: A is what a gate's squashing function is applied to, dX the gradient of the loss with respect to X, H_t the state
of step t, W^T the transpose. T steps, B sequences, D inputs, h units.
"""

import math
import warnings
import weakref

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # (dS, S) -> dS * S * (1 - S)
tanh_backward = torch.ops.aten.tanh_backward.grad_input  # (dS, S) -> dS * (1 - S^2)
# torch's own compiler calls these operators; the pinned version of torch has them wherever it has oneDNN.
_onednn = torch.ops.mkldnn if hasattr(torch.ops.mkldnn, "_linear_pointwise") else None
MINUS_ONE = torch.tensor(-1.0)  # as a tensor it costs half of what Python's number costs
_free = []  # memory that no tensor uses any more


def _buffer(like, *shape):
    """An uninitialised tensor of the kind of `like`, in memory that is used again when the tensor is gone.

    A large tensor's memory goes back to the operating system with it, and each page of the next one's is cleared and
    mapped anew: on a CPU that takes longer than what the loop does with it. CUDA's allocator reuses memory by itself.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    size = math.prod(shape) * like.element_size()
    fitting = [i for i, block in enumerate(_free) if len(block) >= size]
    if fitting:
        block = _free.pop(min(fitting, key=lambda i: len(_free[i])))
    else:
        block = torch.empty(size, dtype=torch.uint8).numpy()
    used = block[:size]  # the tensor keeps this view alive, and nothing else does
    weakref.finalize(used, _free.append, block).atexit = False
    return torch.from_numpy(used).view(like.dtype).view(shape)


def _for_onednn(W):
    return _onednn and W.device.type == "cpu" and W.dtype == torch.float32


def _packed(W):
    """W for many products X W: in the order of memory in which oneDNN reads it fastest, where oneDNN is used."""
    return _onednn._reorder_linear_weight(W.t().contiguous()) if _for_onednn(W) else W


def _product(X, W, b=None, squash="none"):
    """squash(X W + b) for matrices; W may come from `_packed`; squash: "none" or "tanh"."""
    if _for_onednn(W):
        return _onednn._linear_pointwise(X, W if W.is_mkldnn else W.t(), b, squash, [], "")
    Y = X @ W if b is None else torch.addmm(b, X, W)
    return Y.tanh_() if squash == "tanh" else Y


def _beside(inputs, H_0):
    """The buffer XH (T + 1, B, D + h) with the inputs (T, B, D) and the first state (B, h) in place; and its part H."""
    T, B, D = inputs.shape
    XH = _buffer(inputs, T + 1, B, D + H_0.shape[1])
    XH[:-1, :, :D] = inputs
    H = XH[:, :, D:]
    H[0] = H_0
    return XH, H


def _kept(like, keep, T, *shape):
    """A buffer (T, *shape) for what the pass back needs; where there will be none, the same memory for all T steps."""
    return _buffer(like, T if keep else 1, *shape).expand(T, *shape)


def _steps(*tensors):
    """The steps (first dimension) of several tensors, side by side: views, made once before a loop."""
    return list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))


def _tanh_of(S, out):
    """tanh(x) from S = s(2x), written to `out`."""
    return torch.add(MINUS_ONE, S, alpha=2, out=out)


def _gradients(XH, dA):
    """The gradients of W and b in A = XH W + b, from all steps' XH (T, B, K) and dA (T, B, G): sums over T and B."""
    XH, dA = XH.flatten(0, 1), dA.flatten(0, 1)
    return _product(_buffer(XH, *XH.t().shape).copy_(XH.t()), dA), dA.sum(dim=0)


def _input_gradient(dA, W_x):
    """dX = dA W_x^T for all steps' dA (T, B, G): (T, B, D)."""
    return _product(dA.flatten(0, 1), W_x.t()).view(*dA.shape[:2], -1)


class RNNScan(Function):
    """H_t = tanh(A_t),  A_t = X_t W_x + H_{t-1} W_h + b.

    Backwards, with dH_t the sum of what comes from above and from step t + 1:
    dA_t = dH_t * (1 - H_t^2);  dH_{t-1} += dA_t W_h^T;  dW = sum_t XH_t^T dA_t.
    """

    @staticmethod
    def forward(ctx, inputs, W, b, H_0):
        XH, H = _beside(inputs, H_0)
        W_packed = _packed(W)
        for XH_t, H_new in _steps(XH[:-1], H[1:]):
            H_new.copy_(_product(XH_t, W_packed, b, "tanh"))
        ctx.save_for_backward(XH, W)
        return H[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states):
        XH, W = ctx.saved_tensors
        W_x, W_h = W.split([len(W) - W.shape[1], W.shape[1]])
        W_hT, H = _packed(W_h.t()), XH[1:, :, len(W_x) :]
        dA_all = _buffer(XH, *H.shape)
        dH_next = torch.zeros_like(d_states[0])  # dA_{t+1} W_h^T
        for H_t, dY, dA in reversed(_steps(H, d_states, dA_all)):
            tanh_backward(dH_next.add_(dY), H_t, grad_input=dA)
            dH_next = _product(dA, W_hT)
        d_inputs = _input_gradient(dA_all, W_x) if ctx.needs_input_grad[0] else None
        return d_inputs, *_gradients(XH[:-1], dA_all), dH_next


class GRUScan(Function):
    """Z, R = s(A_z), s(A_r);  H~ = tanh(A_h),  A_h = ... + (R * H_{t-1}) W_hh;  H_t = Z * H_{t-1} + (1 - Z) * H~.

    Backwards: dZ = dH_t * (H_{t-1} - H~);  dA_h = dH_t * (1 - Z) * (1 - H~^2);
    with M = R * H_{t-1}: dM = dA_h W_hh^T;  dR = dM * H_{t-1};  dA_z, dA_r = dZ * Z * (1 - Z), dR * R * (1 - R);
    dH_{t-1} += dH_t * Z + dM * R + dA_z W_hz^T + dA_r W_hr^T.
    """

    @staticmethod
    def forward(ctx, inputs, W_zr, b_zr, W_h, b_h, H_0, keep):
        (T, B, _), h = inputs.shape, H_0.shape[1]
        (XH, H), (XM, M) = _beside(inputs, H_0), _beside(inputs, H_0)
        gates, candidates = _kept(inputs, keep, T, B, 2 * h), _kept(inputs, keep, T, B, h)  # z r; H~
        W_zr_packed, W_h_packed = _packed(W_zr), _packed(W_h)
        parts = _steps(XH[:-1], XM[:-1], M[:-1], gates, *gates.chunk(2, dim=2), candidates, H[:-1], H[1:])
        for XH_t, XM_t, M_t, ZR, Z, R, H_tilde, H_t, H_new in parts:
            torch.sigmoid(_product(XH_t, W_zr_packed, b_zr), out=ZR)
            torch.mul(R, H_t, out=M_t)
            H_tilde.copy_(_product(XM_t, W_h_packed, b_h, "tanh"))
            torch.lerp(H_tilde, H_t, Z, out=H_new)  # H~ + Z * (H - H~)
        if keep:
            ctx.save_for_backward(XH, XM, gates, candidates, W_zr, W_h)
        return H[1:]

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states):
        XH, XM, gates, candidates, W_zr, W_h = ctx.saved_tensors
        h = W_h.shape[1]
        D = len(W_h) - h
        W_hzrT, W_hhT = _packed(W_zr[D:].t()), _packed(W_h[D:].t())
        dA_zr_all, dA_h_all = _buffer(XH, *gates.shape), _buffer(XH, *candidates.shape)
        parts = _steps(
            *(gates, *gates.chunk(2, dim=2), candidates, XH[:-1, :, D:], d_states),
            *(dA_zr_all, *dA_zr_all.chunk(2, dim=2), dA_h_all),
        )
        dH = torch.zeros_like(d_states[0])
        for ZR, Z, R, H_tilde, H, dY, dA_zr, dA_z, dA_r, dA_h in reversed(parts):
            dH += dY
            torch.sub(H, H_tilde, out=dA_z).mul_(dH)
            torch.addcmul(dH, dH, Z, value=-1, out=dA_h)
            tanh_backward(dA_h, H_tilde, grad_input=dA_h)
            dM = _product(dA_h, W_hhT)
            torch.mul(dM, H, out=dA_r)
            sigmoid_backward(dA_zr, ZR, grad_input=dA_zr)
            dH.mul_(Z).addcmul_(dM, R).add_(_product(dA_zr, W_hzrT))
        d_inputs = None
        if ctx.needs_input_grad[0]:
            d_inputs = _input_gradient(dA_zr_all, W_zr[:D]).add_(_input_gradient(dA_h_all, W_h[:D]))
        return d_inputs, *_gradients(XH[:-1], dA_zr_all), *_gradients(XM[:-1], dA_h_all), dH, None


class LSTMScan(Function):
    """O, I, F = s(A.);  C~ = tanh(A_c);  C_t = F * C_{t-1} + I * C~;  H_t = O * tanh(C_t).

    Backwards: dO = dH_t * tanh(C_t);  dC_t += dH_t * O * (1 - tanh(C_t)^2);
    dI = dC_t * C~;  dF = dC_t * C_{t-1};  dC~ = dC_t * I;  each dA. by its gate's slope;
    dC_{t-1} = dC_t * F;  dH_{t-1} += dA W_h^T.
    W and b hold the gates in the order o i f c, and twice the weights of c: its S = s(2 A_c) comes with the other
    gates' sigmoid and makes C~ = 2 S - 1, so that dS = 2 dC~.
    """

    @staticmethod
    def forward(ctx, inputs, W, b, H_0, C_0, keep):
        (T, B, _), h = inputs.shape, H_0.shape[1]
        XH, H = _beside(inputs, H_0)
        gates = _kept(inputs, keep, T, B, 4 * h)  # o i f s
        memories, squashed = _kept(inputs, keep, T + 1, B, h), _kept(inputs, keep, T, B, h)  # C, C_0 first; tanh(C)
        memories[0] = C_0
        W_packed, C_tilde = _packed(W), torch.empty_like(C_0)
        parts = _steps(XH[:-1], gates, *gates.chunk(4, dim=2), memories[:-1], memories[1:], squashed, H[1:])
        for XH_t, OIFS, O, I, F_, S, C, C_new, tanh_C, H_new in parts:
            torch.sigmoid(_product(XH_t, W_packed, b), out=OIFS)
            _tanh_of(S, out=C_tilde)
            torch.mul(F_, C, out=C_new).addcmul_(I, C_tilde)
            _tanh_of(torch.add(C_new, C_new, out=tanh_C).sigmoid_(), out=tanh_C)
            torch.mul(O, tanh_C, out=H_new)
        if keep:
            ctx.save_for_backward(XH, gates, memories, squashed, W)
        return H[1:], memories[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states, dC):
        XH, gates, memories, squashed, W = ctx.saved_tensors
        h = squashed.shape[2]
        W_x, W_h = W.split([len(W) - h, h])
        W_hT = _packed(W_h.t())
        dA_all = _buffer(XH, *gates.shape)
        parts = _steps(gates, *gates.chunk(4, dim=2), memories[:-1], squashed, d_states, dA_all)
        d_gates = torch.empty_like(gates[0])  # one step's, in the cache; dA_all is written once
        dO, dI, dF, dS = d_gates.chunk(4, dim=1)
        dC, dH_next, zero = dC.clone(), torch.zeros_like(dC), torch.zeros_like(dC)
        C_tilde, d_tanh = torch.empty_like(zero), torch.empty_like(zero)
        for OIFS, O, I, F_, S, C, tanh_C, dY, dA in reversed(parts):
            dH = dH_next.add_(dY)
            torch.mul(dH, tanh_C, out=dO)
            torch.addcmul(dH, dO, tanh_C, value=-1, out=d_tanh)  # dH * (1 - tanh(C)^2)
            dC.addcmul_(O, d_tanh)
            torch.mul(dC, _tanh_of(S, out=C_tilde), out=dI)
            torch.mul(dC, C, out=dF)
            torch.addcmul(zero, dC, I, value=2, out=dS)  # 2 dC * I as one operation
            dC.mul_(F_)
            sigmoid_backward(d_gates, OIFS, grad_input=dA)
            dH_next = _product(dA, W_hT)
        d_inputs = _input_gradient(dA_all, W_x) if ctx.needs_input_grad[0] else None
        return d_inputs, *_gradients(XH[:-1], dA_all), dH_next, dC, None


def _joined(W_xs, W_hs, bs):
    """W = [W_x; W_h] (D + h, gates * h) and b (gates * h,) of several gates side by side."""
    return torch.cat([torch.cat(W_xs, dim=1), torch.cat(W_hs, dim=1)]), torch.cat(bs)


def rnn(inputs, state, params):
    """`rnn_models.rnn_steps`: inputs (T, B, D), state (H,), params W_xh W_hh b_h -> states (T, B, h), (H,)."""
    W_xh, W_hh, b_h = params
    states = RNNScan.apply(inputs, torch.cat([W_xh, W_hh]), b_h, *state)
    return states, (states[-1],)


def gru(inputs, state, params):
    """`rnn_models.gru_steps`: inputs (T, B, D), state (H,), params in threes for z, r, h -> states (T, B, h), (H,)."""
    W_xz, W_hz, b_z, W_xr, W_hr, b_r, W_xh, W_hh, b_h = params
    W_zr, b_zr = _joined([W_xz, W_xr], [W_hz, W_hr], [b_z, b_r])
    W_h = torch.cat([W_xh, W_hh])
    states = GRUScan.apply(inputs, W_zr, b_zr, W_h, b_h, *state, torch.is_grad_enabled())
    return states, (states[-1],)


def lstm(inputs, state, params):
    """`rnn_models.lstm_steps`: inputs (T, B, D), state (H, C), params in threes for i f o c -> states, (H, C)."""
    W_xi, W_hi, b_i, W_xf, W_hf, b_f, W_xo, W_ho, b_o, W_xc, W_hc, b_c = params
    W, b = _joined([W_xo, W_xi, W_xf, 2 * W_xc], [W_ho, W_hi, W_hf, 2 * W_hc], [b_o, b_i, b_f, 2 * b_c])
    states, C = LSTMScan.apply(inputs, W, b, *state, torch.is_grad_enabled())
    return states, (states[-1], C)


class Graphed:
    """A function of tensors that on a GPU is recorded once for each shape, forward and backward, and then replayed.

    On a GPU a step's operations take less time than it takes to start them one by one; a recorded CUDA graph starts
    them all at once. Where recording fails, a warning says so once and the function runs as it is.
    """

    def __init__(self, function):
        """function: of tensors alone, of which it may leave some unused, with a tensor or a tuple of them as result."""
        self.function, self.graphs, self.warned = function, {}, False

    def __call__(self, *tensors):
        """function(*tensors). The result of a graph is overwritten by its next replay."""
        key = tuple((tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors)
        if key not in self.graphs:
            self.graphs[key] = self._record(tensors)
        return self.graphs[key](*tensors)

    def _record(self, tensors):
        samples = tuple(tensor.detach().clone().requires_grad_(tensor.requires_grad) for tensor in tensors)
        try:
            return torch.cuda.make_graphed_callables(self.function, samples, allow_unused_input=True)
        except RuntimeError as error:
            if not self.warned:
                warnings.warn(f"no CUDA graph ({error}): the recurrence runs step by step, slower", stacklevel=4)
            self.warned = True
            return self.function
