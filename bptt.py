"""Back-propagation through time by hand: the recurrences of `rnn_models` again, with derived gradients, and fast.

`rnn`, `gru` and `lstm` here take and return what `rnn_steps`, `gru_steps` and `lstm_steps` do, and a test proves them
equal in values, states and gradients. What makes them fast on a CPU:

- The pass back through time is derived by hand, so autograd records one node instead of a dozen for every step. A step
  has one product with the state each way (the GRU two); the weights' gradients are one product after the loop.
- Everything is kept transposed, (T, gates * h, B): a gate is one contiguous block of memory, and operations on it are
  as fast as they can be. Memory is taken from a pool (`_buffer`).
- tanh(x) = 2 s(2x) - 1: torch's sigmoid is several times faster than its tanh.
- Products in float32 go to oneDNN, whose kernels are up to twice as fast as the BLAS behind `@`, where torch has it.

Names: A is what a gate's squashing function is applied to, dX the gradient of the loss with respect to X; primes in
the comments are derivatives, H_t the state of step t, and W^T the transpose. T steps, B sequences, D inputs, h units.
"""

import math
import warnings
import weakref

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input  # (dS, S) -> dS * S * (1 - S)
tanh_backward = torch.ops.aten.tanh_backward.grad_input  # (dS, S) -> dS * (1 - S^2)
# torch's own compiler calls this operator; the pinned version of torch has it wherever it has oneDNN.
_onednn_linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
ONE, TWO = torch.tensor(1.0), torch.tensor(2.0)  # as tensors they cost half of what Python's numbers cost
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


def _product(W, X, plus=None):
    """W @ X, or plus + W @ X, for matrices."""
    if _onednn_linear is not None and W.device.type == "cpu" and W.dtype == torch.float32:
        product = _onednn_linear(W, X.t(), None, "none", [], "")
        return product if plus is None else product.add_(plus)
    return W @ X if plus is None else torch.addmm(plus, W, X)


def _input_products(W, b, inputs):
    """W X_t + b for every step of inputs (T, B, D), one product: (T, rows of W, B), each step a strided view."""
    T, B, D = inputs.shape
    return _product(W, inputs.reshape(T * B, D).t()).add_(b[:, None]).view(-1, T, B).transpose(0, 1)


def _across_steps(X):
    """X (T, D, B) as a matrix (D, T * B)."""
    T, D, B = X.shape
    out = _buffer(X, D, T, B)
    return out.copy_(X.transpose(0, 1)).view(D, T * B)


def _input_gradients(ctx, dA, inputs, W_x):
    """The gradients of inputs (T, B, D), W_x and b in A = W_x X + b, from dA (G, T * B)."""
    T, B, D = inputs.shape
    d_inputs = _product(W_x.t().contiguous(), dA).view(D, T, B).permute(1, 2, 0) if ctx.needs_input_grad[0] else None
    return d_inputs, _product(dA, inputs.reshape(T * B, D)), dA.sum(dim=1)


def _tanh(X, out):
    """tanh(X), written to `out`."""
    return torch.mul(X, TWO, out=out).sigmoid_().mul_(TWO).sub_(ONE)


def _steps(*tensors):
    """The steps (first dimension) of several tensors, side by side: views, made once before a loop."""
    return list(zip(*(tensor.unbind(0) for tensor in tensors), strict=True))


def _with_first(H_0, states):
    """H_{t-1} for every step: H_0 and all states but the last, as a matrix (h, T * B)."""
    T, h, B = states.shape
    out = _buffer(states, h, T, B)
    out[:, 0] = H_0
    out[:, 1:] = states[:-1].transpose(0, 1)
    return out.view(h, T * B)


class RNNScan(Function):
    """H_t = tanh(A_t),  A_t = W_x X_t + b + W_h H_{t-1}.

    Backwards, with dH_t the sum of what comes from above and from step t + 1:
    dA_t = dH_t * (1 - H_t^2);  dH_{t-1} += W_h^T dA_t;  dW_h = sum_t dA_t H_{t-1}^T.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, b, W_h, H_0):
        H, X = H_0, _input_products(W_x, b, inputs)
        states = _buffer(X, *X.shape)  # (T, h, B)
        for X_t, H_new in _steps(X, states):
            H = _tanh(_product(W_h, H, plus=X_t), out=H_new)
        ctx.save_for_backward(inputs, W_x, W_h, H_0, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states):
        inputs, W_x, W_h, H_0, states = ctx.saved_tensors
        W_hT = W_h.t().contiguous()
        dA_all = _buffer(states, *states.shape)
        dA = torch.zeros_like(H_0)
        for dA_new, H, dY in reversed(_steps(dA_all, states, d_states)):
            dH = _product(W_hT, dA, plus=dY)
            dA = tanh_backward(dH, H, grad_input=dA_new)
        dH_0 = _product(W_hT, dA)
        dA = _across_steps(dA_all)
        return *_input_gradients(ctx, dA, inputs, W_x), _product(dA, _with_first(H_0, states).t()), dH_0


class GRUScan(Function):
    """Z, R = s(A_z), s(A_r);  H~ = tanh(A_h),  A_h = ... + W_hh (R * H_{t-1});  H_t = Z * H_{t-1} + (1 - Z) * H~.

    Backwards: dZ = dH_t * (H_{t-1} - H~);  dA_h = dH_t * (1 - Z) * (1 - H~^2);
    with M = R * H_{t-1}: dM = W_hh^T dA_h;  dR = dM * H_{t-1};  dA_z, dA_r = dZ * Z * (1 - Z), dR * R * (1 - R);
    dH_{t-1} += dH_t * Z + dM * R + W_hz^T dA_z + W_hr^T dA_r.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, b, W_hzr, W_hh, H_0):
        h, H, X = len(H_0), H_0, _input_products(W_x, b, inputs)
        gates, states = _buffer(X, *X.shape), _buffer(X, len(X), *H_0.shape)  # (T, 3h, B): z, r, h; (T, h, B)
        parts = _steps(X[:, : 2 * h], X[:, 2 * h :], gates[:, : 2 * h], *gates.chunk(3, dim=1), states)
        for X_zr, X_h, ZR, Z, R, H_tilde, H_new in parts:
            torch.sigmoid(_product(W_hzr, H, plus=X_zr), out=ZR)
            _tanh(_product(W_hh, R * H, plus=X_h), out=H_tilde)
            H = torch.lerp(H_tilde, H, Z, out=H_new)  # H~ + Z * (H - H~)
        ctx.save_for_backward(inputs, W_x, W_hzr, W_hh, H_0, gates, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states):
        inputs, W_x, W_hzr, W_hh, H_0, gates, states = ctx.saved_tensors
        h = len(H_0)
        W_hzrT, W_hhT = W_hzr.t().contiguous(), W_hh.t().contiguous()
        before = torch.cat([H_0[None], states[:-1]])  # H_{t-1}
        dA_all = torch.empty_like(gates)
        parts = _steps(gates[:, : 2 * h], *gates.chunk(3, dim=1), before, d_states)
        d_parts = _steps(dA_all[:, : 2 * h], *dA_all.chunk(3, dim=1))
        dH = torch.zeros_like(H_0)
        for (ZR, Z, R, H_tilde, H, dY), (dA_zr, dA_z, dA_r, dA_h) in zip(
            reversed(parts), reversed(d_parts), strict=True
        ):
            dH = dH + dY
            torch.sub(H, H_tilde, out=dA_z).mul_(dH)
            torch.addcmul(dH, dH, Z, value=-1, out=dA_h)
            tanh_backward(dA_h, H_tilde, grad_input=dA_h)
            dM = _product(W_hhT, dA_h)
            torch.mul(dM, H, out=dA_r)
            sigmoid_backward(dA_zr, ZR, grad_input=dA_zr)
            dH = _product(W_hzrT, dA_zr, plus=dH.mul_(Z).addcmul_(dM, R))
        dA, H = _across_steps(dA_all), _with_first(H_0, states)
        dW_hzr = _product(dA[: 2 * h], H.t())
        dW_hh = _product(dA[2 * h :], H.mul_(_across_steps(gates[:, h : 2 * h])).t())
        return *_input_gradients(ctx, dA, inputs, W_x), dW_hzr, dW_hh, dH


class LSTMScan(Function):
    """O, I, F = s(A.);  C~ = tanh(A_c);  C_t = F * C_{t-1} + I * C~;  H_t = O * tanh(C_t).

    Backwards: dO = dH_t * tanh(C_t);  dC_t += dH_t * O * (1 - tanh(C_t)^2);
    dI = dC_t * C~;  dF = dC_t * C_{t-1};  dC~ = dC_t * I;  each dA. by its gate's slope;
    dC_{t-1} = dC_t * F;  dH_{t-1} += W_h^T dA.
    W_x, b and W_h hold the gates in the order o i f c, and twice the weights of c: its s(2 A_c) comes with the other
    gates' sigmoid and makes tanh(A_c) = 2 s(2 A_c) - 1. The gradient of the doubled A_c is half that of A_c.
    """

    @staticmethod
    def forward(ctx, inputs, W_x, b, W_h, H_0, C_0):
        H, C = H_0, C_0
        gates = _input_products(W_x, b, inputs)  # (T, 4h, B), in place
        states, memories, squashed = (_buffer(gates, len(gates), *H_0.shape) for _ in range(3))  # H, C, tanh(C)
        for A, O, I, F_, C_tilde, C_new, tanh_C, H_new in _steps(gates, *gates.chunk(4, 1), memories, squashed, states):
            torch.sigmoid(_product(W_h, H, plus=A), out=A)
            C_tilde.mul_(TWO).sub_(ONE)
            C = torch.mul(F_, C, out=C_new).addcmul_(I, C_tilde)
            H = torch.mul(O, _tanh(C, out=tanh_C), out=H_new)
        ctx.save_for_backward(inputs, W_x, W_h, H_0, C_0, gates, states, memories, squashed)
        return states, C.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, d_states, dC):
        inputs, W_x, W_h, H_0, C_0, gates, states, memories, squashed = ctx.saved_tensors
        h = len(H_0)
        W_hT = W_h.t().contiguous()
        C_before = [C_0, *memories[:-1].unbind(0)]
        dA_all = _buffer(gates, *gates.shape)
        parts = _steps(gates[:, : 3 * h], *gates.chunk(4, dim=1), squashed, d_states)
        d_parts = _steps(dA_all, dA_all[:, : 3 * h], *dA_all.chunk(4, dim=1))
        dA, dC, d_tanh = torch.zeros_like(dA_all[0]), dC.clone(), torch.empty_like(C_0)
        for t in reversed(range(len(parts))):
            OIF, O, I, F_, C_tilde, tanh_C, dY = parts[t]
            dH = _product(W_hT, dA, plus=dY)
            dA, dA_oif, dA_o, dA_i, dA_f, dA_c = d_parts[t]
            torch.mul(dH, O, out=d_tanh)
            dC += tanh_backward(d_tanh, tanh_C, grad_input=d_tanh)
            torch.mul(dH, tanh_C, out=dA_o)
            torch.mul(dC, C_tilde, out=dA_i)
            torch.mul(dC, C_before[t], out=dA_f)
            torch.mul(dC, I, out=dA_c)
            sigmoid_backward(dA_oif, OIF, grad_input=dA_oif)
            tanh_backward(dA_c, C_tilde, grad_input=dA_c).div_(TWO)
            dC *= F_
        dH_0 = _product(W_hT, dA)
        dA = _across_steps(dA_all)
        return *_input_gradients(ctx, dA, inputs, W_x), _product(dA, _with_first(H_0, states).t()), dH_0, dC


def _rows(*columns):
    """Matrices (D, h) or vectors (h,) of several gates as one matrix (gates * h, D) or vector (gates * h,)."""
    return torch.cat([column.t() for column in columns])


def rnn(inputs, state, params):
    """`rnn_models.rnn_steps`: inputs (T, B, D), state (H,), params W_xh W_hh b_h -> states (T, B, h), (H,)."""
    W_xh, W_hh, b_h = params
    states = RNNScan.apply(inputs, W_xh.t().contiguous(), b_h, W_hh.t().contiguous(), state[0].t().contiguous())
    return states.transpose(1, 2), (states[-1].t(),)


def gru(inputs, state, params):
    """`rnn_models.gru_steps`: inputs (T, B, D), state (H,), params in threes for z, r, h -> states (T, B, h), (H,)."""
    W_xz, W_hz, b_z, W_xr, W_hr, b_r, W_xh, W_hh, b_h = params
    W_x, b, W_hzr = _rows(W_xz, W_xr, W_xh), _rows(b_z, b_r, b_h), _rows(W_hz, W_hr)
    states = GRUScan.apply(inputs, W_x, b, W_hzr, W_hh.t().contiguous(), state[0].t().contiguous())
    return states.transpose(1, 2), (states[-1].t(),)


def lstm(inputs, state, params):
    """`rnn_models.lstm_steps`: inputs (T, B, D), state (H, C), params in threes for i f o c -> states, (H, C)."""
    W_xi, W_hi, b_i, W_xf, W_hf, b_f, W_xo, W_ho, b_o, W_xc, W_hc, b_c = params
    W_x, b, W_h = _rows(W_xo, W_xi, W_xf, 2 * W_xc), _rows(b_o, b_i, b_f, 2 * b_c), _rows(W_ho, W_hi, W_hf, 2 * W_hc)
    states, C = LSTMScan.apply(inputs, W_x, b, W_h, *(part.t().contiguous() for part in state))
    return states.transpose(1, 2), (states[-1].t(), C.t())


class Graphed:
    """A function of tensors that on a GPU is recorded once for each shape, forward and backward, and then replayed.

    On a GPU a step's operations take less time than it takes to start them one by one; a recorded CUDA graph starts
    them all at once. Where recording fails, a warning says so once and the function runs as it is.
    """

    def __init__(self, function):
        """function: of tensors alone, with a tensor or a tuple of them as result."""
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
            return torch.cuda.make_graphed_callables(self.function, samples)
        except RuntimeError as error:
            if not self.warned:
                warnings.warn(f"no CUDA graph ({error}): the recurrence runs step by step, slower", stacklevel=4)
            self.warned = True
            return self.function
