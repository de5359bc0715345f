"""Our recurrences beside torch's own layers: time of a training step and of inference, memory.

    python -m tools.bench                        the table, on two threads of the CPU
    python -m tools.bench --device cuda          on a GPU
    python -m tools.bench --quick                fewer rounds

Ours, torch's layer and the plain loop (under autograd) take turns in random order within one
process, and medians are compared, so that other work on the machine disturbs all three alike. Each
has a linear head. The GRUs differ: ours resets the state before the product, torch.nn.GRU after it.
The memory is what the forward pass keeps for the backward pass, parameters and inputs among it.
"""

import platform
import random
import statistics
import time

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from rnn_models import CELLS, Recurrence, init_params, init_state
from support import options

SHAPES = [(50, 64, 128, 128), (100, 64, 300, 256), (120, 256, 1, 64)]  # T, B, D, h
OUTPUTS = 10
LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM, "bi_lstm": nn.LSTM}
KINDS = ("ours", "torch", "loop")
# Milliseconds of a training step, then of inference; then megabytes.
COLUMNS = "| ours | torch | loop | ours/torch " * 2 + "| ours, MB | torch, MB | loop, MB "


def make(kind, cell, shape, device):
    """Return a function inputs -> outputs (T, B, OUTPUTS) of this kind, and its parameters."""
    _, B, D, h = shape
    if kind == "ours":
        recurrence = Recurrence(cell, D, h, OUTPUTS).to(device)

        def compute(inputs):
            return recurrence.output(recurrence(inputs))

        return compute, list(recurrence.parameters())
    if kind == "loop":
        params = init_params(cell, D, h, OUTPUTS, device)
        state = init_state(cell, B, h, device)

        def compute(inputs):
            outputs, _ = CELLS[cell](inputs, state, params)
            return outputs

        return compute, params
    is_bidirectional = cell == "bi_lstm"
    layer = LAYERS[cell](D, h, bidirectional=is_bidirectional).to(device)
    head = nn.Linear(2 * h if is_bidirectional else h, OUTPUTS).to(device)

    def compute(inputs):
        states, _ = layer(inputs)
        return head(states)

    return compute, [*layer.parameters(), *head.parameters()]


def train_step(function, params, inputs):
    """Run forward and backward, with fresh gradients of all parameters and of the inputs."""
    for tensor in (*params, inputs):
        tensor.grad = None
    function(inputs).square().mean().backward()


@torch.no_grad()
def inference(function, params, inputs):
    """Run forward alone."""
    function(inputs)


def measure(step, functions, inputs, rounds):
    """Medians {kind: ms} of a step over rounds in which all kinds take turns.

    functions: {kind: (function, params)} of `make`. The first two rounds warm up.
    """
    times = {kind: [] for kind in functions}
    for turn in range(rounds + 2):
        for kind in random.sample(KINDS, k=len(KINDS)):
            function, params = functions[kind]
            start = time.perf_counter()
            step(function, params, inputs)
            if inputs.is_cuda:
                torch.cuda.synchronize()
            if turn >= 2:
                times[kind].append(1000 * (time.perf_counter() - start))
    return {kind: statistics.median(values) for kind, values in times.items()}


def kept_megabytes(function, inputs):
    """Megabytes that autograd keeps from the forward pass for the backward pass."""
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()  # views of one tensor count once
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = function(inputs)  # alive as long as the hooks, and with it all that is kept
    del outputs
    return sum(sizes.values()) / 1e6


def parse_args():
    """The command line as a namespace."""
    parser = options.Parser(__doc__)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=options.count, default=2, help="CPU threads")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 15")
    return parser.parse_args()


def main():
    """Measure all cells at all shapes; print the table row by row."""
    args = parse_args()
    device = options.pick_device(args.device)
    torch.set_num_threads(args.threads)
    rounds = 3 if args.quick else 15
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    units = "milliseconds, first of a training step, then of inference"
    memory = "megabytes kept for the backward pass"
    print(f"{machine}, {args.threads} threads, torch {torch.__version__}; {units}; {memory}\n")
    print(f"| T, B, D, h | cell {COLUMNS}|")
    print(f"| --- | --- {'| ---: ' * 11}|")
    ratios = {"training": [], "inference": []}
    for shape in SHAPES:
        for cell in LAYERS:
            inputs = torch.randn(shape[:3], device=device, requires_grad=True)
            functions = {kind: make(kind, cell, shape, device) for kind in KINDS}
            texts = [", ".join(map(str, shape)), cell]
            for mode, step in (("training", train_step), ("inference", inference)):
                times = measure(step, functions, inputs, rounds)
                ratio = times["ours"] / times["torch"]
                ratios[mode].append(ratio)
                texts += [f"{number:.2f}" for number in (*times.values(), ratio)]
            for function, _ in functions.values():
                texts.append(f"{kept_megabytes(function, inputs):.1f}")
            print(f"| {' | '.join(texts)} |", flush=True)
    for mode, values in ratios.items():
        mean = statistics.geometric_mean(values)
        print(f"\n{mode}, ours/torch: geometric mean {mean:.2f}, largest {max(values):.2f}")


if __name__ == "__main__":
    options.run_script(main)
