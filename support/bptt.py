"""Back-propagation through time by hand (Werbos 1990): RNN, GRU and LSTM with derived gradients.

`fast_hidden_states` computes what the loops of `rnn_models` compute, but autograd sees one node:
`forward` runs the recurrence, `backward` goes from the last step to the first. The large products
that need no other step stand outside the loop: that of all inputs with W_x before it, those for the
gradients of the weights after it.

G directions side by side, T steps, B sequences, D inputs, h units. X is a step's input, H its
state, H_prev the state before. A is the sum inside a gate, s the logistic sigmoid, * the
elementwise product. dV is the gradient of the loss with respect to V. dH has two parts: dH_out,
that of the step's output, and dH_next, what the next step passes back.
W_x, W_h and b hold all gates and the candidate side by side, the LSTM's for example
W_x = [W_xi W_xf W_xo W_xc]. The gates' values lie so, too: I, F, O and IFO = [I F O] are views of
the same storage, so to write IFO is to write I, F and O. Their gradients dI, dF, dO and dIFO
likewise lie where dA lies: `sigmoid_backward` turns dIFO into dA_i, dA_f and dA_o in place.
"""

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# S = s(A) gives dA = dS * S * (1 - S), S = tanh(A) gives dA = dS * (1 - S^2): (dS, S) -> dA.
# `.grad_input` is the variant that writes dA into the tensor given as grad_input.
sigmoid_backward = torch.ops.aten.sigmoid_backward.grad_input
tanh_backward = torch.ops.aten.tanh_backward.grad_input
new_tanh_backward = torch.ops.aten.tanh_backward.default  # returns dA as a new tensor
MINUS_ONE = torch.tensor(-1.0)


def tanh(A, out):
    """tanh(A); float32 on the CPU as 2 s(2A) - 1, faster there, with absolute errors below 2e-7."""
    if A.is_cpu and A.dtype == torch.float32:
        torch.sigmoid(A + A, out=out)
        return torch.add(MINUS_ONE, out, alpha=2, out=out)  # -1 + 2 out, in one pass
    return torch.tanh(A, out=out)


def input_product(inputs, W_x, b):
    """X W_x + b of all steps, (G, T, B, gates * h)."""
    T, B = inputs.shape[1:3]
    product = torch.baddbmm(b[:, None], inputs.flatten(1, 2), W_x)  # (G, T * B, gates * h)
    return product.unflatten(1, (T, B))


def by_step(*tensors):
    """For each step a tuple of its slices (G, B, ...) of the tensors (G, T, B, ...)."""
    return list(zip(*[tensor.unbind(1) for tensor in tensors], strict=True))


def before(V_0, V):
    """The values before each step, from V_0 (G, B, h) and those after each step V (G, T, B, h)."""
    return torch.cat([V_0[:, None], V[:, :-1]], dim=1)


def sum_of_products(V, dA):
    """The sum of V^T dA over all steps and sequences, (G, columns of V, columns of dA)."""
    return V.flatten(1, 2).mT @ dA.flatten(1, 2)


def input_gradients(inputs, W_x, dA):
    """dX = dA W_x^T, dW_x = sum of X^T dA and db = sum of dA."""
    dX = torch.bmm(dA.flatten(1, 2), W_x.mT).view_as(inputs)
    dW_x = sum_of_products(inputs, dA)
    db = dA.sum(dim=(1, 2))
    return dX, dW_x, db


class RNN(Function):
    """H = tanh(X W_x + H_prev W_h + b)"""

    @staticmethod
    def forward(ctx, inputs, W_x, W_h, b, H_0):
        states = input_product(inputs, W_x, b)  # X W_x + b, later H
        H = H_0  # (G, B, h)
        for A in states.unbind(1):
            # H = tanh(X W_x + H_prev W_h + b)
            A.baddbmm_(H, W_h)
            H = tanh(A, out=A)
        ctx.save_for_backward(inputs, W_x, W_h, H_0, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, dH_out_all):
        inputs, W_x, W_h, H_0, states = ctx.saved_tensors
        dA_all = torch.empty_like(states)
        dH_next = torch.zeros_like(H_0)
        steps = by_step(states, dH_out_all, dA_all)
        for H, dH_out, dA in reversed(steps):
            # dH = dH_out + dH_next;  dA = dH * (1 - H^2)
            dH = dH_out + dH_next
            tanh_backward(dH, H, grad_input=dA)
            # dH_prev = dA W_h^T, which the step before calls dH_next
            dH_next = torch.bmm(dA, W_h.mT)
        dX, dW_x, db = input_gradients(inputs, W_x, dA_all)
        # dW_h = sum of H_prev^T dA
        dW_h = sum_of_products(before(H_0, states), dA_all)
        return dX, dW_x, dW_h, db, dH_next  # the last: of H_0


class GRU(Function):
    """Z = s(X W_xz + H_prev W_hz + b_z), R likewise;  M = R * H_prev;
    H~ = tanh(X W_xh + M W_hh + b_h);  H = Z * H_prev + (1 - Z) * H~
    """

    @staticmethod
    def forward(ctx, inputs, W_x, W_h, b, H_0):
        h = H_0.shape[2]
        W_hzr, W_hh = W_h.split([2 * h, h], dim=2)
        gates = input_product(inputs, W_x, b)  # X W_x + b, later Z R H~
        states = torch.empty_like(gates[..., :h])
        H = H_0  # (G, B, h)
        steps = by_step(gates[..., : 2 * h], *gates.chunk(3, dim=3), states)
        for ZR, Z, R, H_tilde, H_new in steps:
            # Z = s(X W_xz + H_prev W_hz + b_z), R likewise
            ZR.baddbmm_(H, W_hzr)
            ZR.sigmoid_()
            # H~ = tanh(X W_xh + M W_hh + b_h)
            M = R * H
            H_tilde.baddbmm_(M, W_hh)
            tanh(H_tilde, out=H_tilde)
            # H = Z * H_prev + (1 - Z) * H~
            H = torch.lerp(H_tilde, H, Z, out=H_new)
        ctx.save_for_backward(inputs, W_x, W_h, H_0, gates, states)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, dH_out_all):
        inputs, W_x, W_h, H_0, gates, states = ctx.saved_tensors
        h = H_0.shape[2]
        W_hzr, W_hh = W_h.split([2 * h, h], dim=2)
        H_before = before(H_0, states)
        dA_all = torch.empty_like(gates)
        dA_zr_all = dA_all[..., : 2 * h]
        dH_next = torch.zeros_like(H_0)
        values = by_step(gates[..., : 2 * h], *gates.chunk(3, dim=3), H_before)
        gradients = by_step(dH_out_all, dA_zr_all, *dA_all.chunk(3, dim=3))
        for t in reversed(range(len(values))):
            ZR, Z, R, H_tilde, H_prev = values[t]
            dH_out, dZR, dZ, dR, dA_h = gradients[t]
            # dH = dH_out + dH_next;  dH~ = dH * (1 - Z)
            dH = dH_out + dH_next
            dH_Z = dH * Z
            dH_tilde = dH - dH_Z
            # dA_h = dH~ * (1 - H~^2);  dM = dA_h W_hh^T
            tanh_backward(dH_tilde, H_tilde, grad_input=dA_h)
            dM = torch.bmm(dA_h, W_hh.mT)
            # dZ = dH * (H_prev - H~);  dR = dM * H_prev
            difference = H_prev - H_tilde
            torch.mul(dH, difference, out=dZ)
            torch.mul(dM, H_prev, out=dR)
            # dA_z = dZ * Z * (1 - Z), dA_r likewise, in place of dZ and dR
            dA_zr = sigmoid_backward(dZR, ZR, grad_input=dZR)
            # dH_prev = dH * Z + dM * R + dA_zr W_hzr^T
            dH_next = dH_Z.addcmul_(dM, R)
            dH_next.baddbmm_(dA_zr, W_hzr.mT)
        dX, dW_x, db = input_gradients(inputs, W_x, dA_all)
        # dW_hzr = sum of H_prev^T dA_zr;  dW_hh = sum of M^T dA_h
        _, R_all, _ = gates.chunk(3, dim=3)
        dW_hzr = sum_of_products(H_before, dA_zr_all)
        dW_hh = sum_of_products(R_all * H_before, dA_all[..., 2 * h :])
        dW_h = torch.cat([dW_hzr, dW_hh], dim=2)
        return dX, dW_x, dW_h, db, dH_next  # the last: of H_0


class LSTM(Function):
    """I = s(X W_xi + H_prev W_hi + b_i), F and O likewise;  C~ = tanh(X W_xc + H_prev W_hc + b_c);
    C = F * C_prev + I * C~;  H = O * tanh(C)
    """

    @staticmethod
    def forward(ctx, inputs, W_x, W_h, b, H_0, C_0):
        G, T, B, _ = inputs.shape
        h = H_0.shape[2]
        gates = input_product(inputs, W_x, b)  # X W_x + b, later I F O C~
        states = gates.new_empty(G, T, B, h)
        # C and tanh(C); where no gradient is asked for, all steps share the storage of one.
        kept_steps = T if any(ctx.needs_input_grad) else 1
        memories, tanhs = gates.new_empty(2, G, kept_steps, B, h).expand(2, G, T, B, h)
        H = H_0  # (G, B, h)
        C = C_0  # (G, B, h)
        sums = by_step(gates, gates[..., : 3 * h], *gates.chunk(4, dim=3))
        results = by_step(states, memories, tanhs)
        for t in range(T):
            A, IFO, I, F, O, C_tilde = sums[t]
            H_new, C_new, tanh_C = results[t]
            # I = s(X W_xi + H_prev W_hi + b_i), F and O likewise
            # In place is faster where A is one block of storage; with two directions it is two.
            A_new = A.baddbmm_(H, W_h) if G == 1 else torch.baddbmm(A, H, W_h)  # (G, B, 4h)
            torch.sigmoid(A_new[..., : 3 * h], out=IFO)
            # C~ = tanh(X W_xc + H_prev W_hc + b_c)
            tanh(A_new[..., 3 * h :], out=C_tilde)
            # C = F * C_prev + I * C~
            C = torch.mul(F, C, out=C_new)
            C.addcmul_(I, C_tilde)
            # H = O * tanh(C)
            tanh(C, out=tanh_C)
            H = torch.mul(O, tanh_C, out=H_new)
        ctx.save_for_backward(inputs, W_x, W_h, H_0, C_0, gates, states, memories, tanhs)
        return states

    @staticmethod
    @once_differentiable
    def backward(ctx, dH_out_all):
        inputs, W_x, W_h, H_0, C_0, gates, states, memories, tanhs = ctx.saved_tensors
        h = H_0.shape[2]
        dA_all = torch.empty_like(gates)
        dH_next = torch.zeros_like(H_0)
        dC_next = torch.zeros_like(C_0)
        C_before = before(C_0, memories)
        values = by_step(gates[..., : 3 * h], *gates.chunk(4, dim=3), C_before, tanhs)
        gradients = by_step(dH_out_all, dA_all, dA_all[..., : 3 * h], *dA_all.chunk(4, dim=3))
        for t in reversed(range(len(values))):
            IFO, I, F, O, C_tilde, C_prev, tanh_C = values[t]
            dH_out, dA, dIFO, dI, dF, dO, dA_c = gradients[t]
            # dH = dH_out + dH_next;  dC = dH * O * (1 - tanh(C)^2) + dC_next
            dH = dH_out + dH_next
            dC = new_tanh_backward(dH * O, tanh_C) + dC_next
            # dI = dC * C~;  dF = dC * C_prev;  dO = dH * tanh(C)
            torch.mul(dC, C_tilde, out=dI)
            torch.mul(dC, C_prev, out=dF)
            torch.mul(dH, tanh_C, out=dO)
            # dA_i = dI * I * (1 - I), dA_f and dA_o likewise, in place of dI, dF and dO
            sigmoid_backward(dIFO, IFO, grad_input=dIFO)
            # dC~ = dC * I;  dA_c = dC~ * (1 - C~^2)
            tanh_backward(dC * I, C_tilde, grad_input=dA_c)
            # dC_prev = dC * F;  dH_prev = dA W_h^T
            dC_next = dC * F
            dH_next = torch.bmm(dA, W_h.mT)
        dX, dW_x, db = input_gradients(inputs, W_x, dA_all)
        # dW_h = sum of H_prev^T dA
        dW_h = sum_of_products(before(H_0, states), dA_all)
        return dX, dW_x, dW_h, db, dH_next, dC_next  # the last two: of H_0 and C_0


FORMS = {"rnn": RNN, "gru": GRU, "lstm": LSTM, "bi_lstm": LSTM}
NUM_GATES = {"rnn": 1, "gru": 3, "lstm": 4, "bi_lstm": 4}


def fast_hidden_states(cell, inputs, first_states, weights):
    """Hidden states (G, T, B, h) of inputs (G, T, B, D), by the fast form of a cell.

    first_states: of each direction, (H,) or (H, C) of (B, h); weights: the parameters of the cell's
    loop without W_hq and b_q. Computes in the precision of the parameters, under autocast, too.
    Raises KeyError for a cell without a fast form.
    """
    form = FORMS[cell]
    W_x = side_by_side(weights[0::3], NUM_GATES[cell])  # (G, D, gates * h)
    W_h = side_by_side(weights[1::3], NUM_GATES[cell])  # (G, h, gates * h)
    b = side_by_side(weights[2::3], NUM_GATES[cell])  # (G, gates * h)
    # H_0 and, for the LSTM, C_0: the directions of each stacked, (G, B, h)
    initial = [torch.stack(directions) for directions in zip(*first_states, strict=True)]
    arguments = [tensor.to(b.dtype) for tensor in (inputs, W_x, W_h, b, *initial)]
    with torch.autocast(inputs.device.type, enabled=False):
        return form.apply(*arguments)


def side_by_side(tensors, num_gates):
    """The gates of each direction joined along their last dimension, the directions stacked."""
    directions = []
    for first in range(0, len(tensors), num_gates):
        directions.append(torch.cat(tensors[first : first + num_gates], dim=-1))
    return torch.stack(directions)
