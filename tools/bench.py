"""Time our recurrences beside torch's own layers: a training step and inference.

    python bench.py                              the table, on two threads of the CPU
    python bench.py --device cuda --cuda-graphs  on a GPU, our recurrences recorded as CUDA graphs
    python bench.py --quick                      fewer rounds

Ours, torch's and the plain loops (under autograd) take turns within one process, and medians are
compared, so that other work on the machine disturbs all three alike. Each has a linear head.
The GRUs differ: ours resets the state before the product, torch.nn.GRU after it.
"""

import argparse
import platform
import statistics
import time

import torch
import training
from torch import nn

from rnn_models import Recurrence

SHAPES = [(50, 64, 128, 128), (100, 64, 300, 256), (120, 256, 1, 64)]  # T, B, D, h
GPU_SHAPES = [*SHAPES, (100, 256, 128, 256)]
OUTPUTS = 10
LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM, "bi_lstm": nn.LSTM}
KINDS = {"ours": "fast", "torch": None, "plain": "plain"}  # and the loops of `Recurrence`
COLUMNS = "| ours | torch | plain | ours/torch " * 2  # ms of a training step, then of inference
HEADER = f"| T, B, D, h | cell {COLUMNS}|\n| --- | --- {'| ---: ' * 8}|"


def make(kind, cell, shape, device, cuda_graphs=False):
    """Return a function inputs -> outputs (T, B, OUTPUTS) of this kind, and its parameters."""
    T, B, D, h = shape
    if kind != "torch":
        recurrence = model = Recurrence(cell, D, h, OUTPUTS, KINDS[kind]).to(device)
        if cuda_graphs and kind == "ours":
            sample = torch.randn(T, B, D, device=device, requires_grad=True)
            options = {"sample_args": (sample,), "allow_unused_input": True}
            recurrence = torch.cuda.make_graphed_callables(model, **options)
        return lambda inputs: model.output(recurrence(inputs)), list(model.parameters())
    both = cell == "bi_lstm"
    layer = LAYERS[cell](D, h, bidirectional=both).to(device)
    head = nn.Linear(2 * h if both else h, OUTPUTS).to(device)
    return lambda inputs: head(layer(inputs)[0]), [*layer.parameters(), *head.parameters()]


def train_step(function, params, inputs):
    """Run forward and backward, with fresh gradients of all parameters and of the inputs."""
    for tensor in (*params, inputs):
        tensor.grad = None
    function(inputs).square().mean().backward()


@torch.no_grad()
def inference(function, params, inputs):
    """Run forward alone."""
    function(inputs)


def measure(cell, shape, device, rounds, cuda_graphs=False):
    """Return {"train": {kind: ms}, "inference": {kind: ms}}, medians over rounds of all kinds."""
    inputs = torch.randn(shape[:3], device=device, requires_grad=True)
    made = {kind: make(kind, cell, shape, device, cuda_graphs) for kind in KINDS}
    result = {}
    for name, step in (("train", train_step), ("inference", inference)):
        times = {kind: [] for kind in KINDS}
        for turn in range(rounds + 2):
            for kind, (function, params) in made.items():
                start = time.perf_counter()
                step(function, params, inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn >= 2:  # the first two warm up
                    times[kind].append(1000 * (time.perf_counter() - start))
        result[name] = {kind: statistics.median(times[kind]) for kind in KINDS}
    return result


def main():
    """Measure all cells at all shapes; print the table row by row."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = training.Parser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    add("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    add("--threads", type=training.number(int, 1, 1024), default=2, help="CPU threads (default: 2)")
    add("--quick", action="store_true", help="3 rounds instead of 15")
    add("--cuda-graphs", action="store_true", help="record ours as CUDA graphs; needs a GPU")
    args = parser.parse_args()
    device = training.pick_device(args.device)
    if args.cuda_graphs and device.type != "cuda":
        raise training.UserError(f"--cuda-graphs needs --device cuda, not {args.device}")
    torch.set_num_threads(args.threads)
    cuda, ratios = device.type == "cuda", {"train": [], "inference": []}
    name = torch.cuda.get_device_name(device) if cuda else platform.machine()
    print(f"{name}, {args.threads} threads, torch {torch.__version__}; milliseconds, first of a "
          f"training step, then of inference\n\n{HEADER}")  # fmt: skip
    for shape in GPU_SHAPES if cuda else SHAPES:
        for cell in LAYERS:
            times = measure(cell, shape, device, 3 if args.quick else 15, args.cuda_graphs)
            numbers = []
            for mode, own in times.items():
                ratios[mode].append(own["ours"] / own["torch"])
                numbers += [*own.values(), ratios[mode][-1]]
            texts = [", ".join(map(str, shape)), cell, *(f"{number:.2f}" for number in numbers)]
            print(f"| {' | '.join(texts)} |", flush=True)
    for mode, own in ratios.items():
        mean = statistics.geometric_mean(own)
        print(f"\n{mode}, ours/torch: geometric mean {mean:.2f}, largest {max(own):.2f}")


if __name__ == "__main__":
    training.run_script(main)
