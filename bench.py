"""Our recurrences beside torch's own layers: time of a training step, of inference, and peak memory.

    python bench.py                                       the table, on two threads of the CPU
    python bench.py --device cuda                         the same on a GPU
    python bench.py --quick --json bench.json             fewer repetitions; the numbers as a file

Ours, torch's and the plain loop (`rnn_models.PLAIN`, under autograd) take turns within one run, and medians are
compared: other work on the machine then disturbs all three alike. Each has a linear head on its states.
"""

import argparse
import json
import math
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from rnn_models import PLAIN, Recurrence, hidden_states, init_state

SHAPES = [(50, 64, 128, 128), (100, 64, 300, 256), (120, 256, 1, 64)]  # T, B, D, h
GPU_SHAPES = [*SHAPES, (100, 256, 128, 256)]
OUTPUTS = 10
LAYERS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM, "bi_lstm": nn.LSTM}


def make(kind, cell, shape, device):
    """A function inputs -> outputs (T, B, OUTPUTS) of this kind (ours, torch, plain), and its parameters."""
    _, _, D, h = shape
    if kind == "torch":
        layer = LAYERS[cell](D, h, bidirectional=cell == "bi_lstm").to(device)
        head = nn.Linear(h * (2 if cell == "bi_lstm" else 1), OUTPUTS).to(device)
        return lambda inputs: head(layer(inputs)[0]), [*layer.parameters(), *head.parameters()]
    recurrence = Recurrence(cell, D, h, OUTPUTS).to(device)
    if kind == "ours":
        return lambda inputs: recurrence.output(recurrence(inputs)), list(recurrence.parameters())

    def plain(inputs):
        state = init_state(cell, inputs.shape[1], h, device)
        return recurrence.output(hidden_states(cell, inputs, state, recurrence.params, steps=PLAIN)[0])

    return plain, list(recurrence.parameters())


def train_step(function, params, inputs):
    """Forward and backward, as in training: fresh gradients of all parameters and of the inputs."""
    for tensor in (*params, inputs):
        tensor.grad = None
    function(inputs).square().mean().backward()


@torch.no_grad()
def inference(function, params, inputs):
    """Forward alone."""
    function(inputs)


def measure(kinds, cell, shape, device, rounds):
    """{kind: {"train": ms, "inference": ms}}: medians over rounds in which the kinds take turns."""
    T, B, D, _ = shape
    inputs = torch.randn(T, B, D, device=device, requires_grad=True)
    made = {kind: make(kind, cell, shape, device) for kind in kinds}
    result = {kind: {} for kind in kinds}
    for name, step in (("train", train_step), ("inference", inference)):
        times = {kind: [] for kind in kinds}
        for turn in range(rounds + 2):
            for kind, (function, params) in made.items():
                start = time.perf_counter()
                step(function, params, inputs)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn >= 2:  # the first two warm up
                    times[kind].append(1000 * (time.perf_counter() - start))
        for kind in kinds:
            result[kind][name] = statistics.median(times[kind])
    return result


def peak_memory(kind, cell, shape, device):
    """MiB that training steps add, at their peak, to what a process holds that has the libraries and the inputs."""
    T, B, D, _ = shape
    inputs = torch.randn(T, B, D, device=device, requires_grad=True)
    function, params = make(kind, cell, shape, device)
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        train_step(function, params, inputs)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    tiny = torch.randn(2, 2, D, requires_grad=True)
    train_step(function, params, tiny)  # loads the libraries
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from here
    before = _resident_peak()
    for _ in range(2):
        train_step(function, params, inputs)
    return _resident_peak() - before


def _resident_peak():
    """The largest resident memory of this process so far, MiB."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 2**10


def geometric_mean(values):
    """The number whose logarithm is the mean of the values' logarithms."""
    return math.exp(statistics.fmean(map(math.log, values)))


def main():
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="three rounds instead of fifteen, without memory")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too")
    parser.add_argument("--memory-of", nargs=2, metavar=("KIND", "CASE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if args.memory_of:  # a process of its own for each: a peak is never forgotten
        kind, (cell, *shape) = args.memory_of[0], args.memory_of[1].split(",")
        print(peak_memory(kind, cell, tuple(map(int, shape)), device))
        return

    rows = []
    print(f"{'T, B, D, h':20}{'cell':9}| {'training step, ms':^42} | {'inference, ms':^42} | {'peak memory, MiB':^24}")
    print(
        f"{'':29}"
        + f"| {'ours':>8}{'torch':>9}{'plain':>9}{'ours/torch':>16} " * 2
        + f"| {'ours':>7}{'torch':>8}{'ratio':>9}"
    )
    for shape in GPU_SHAPES if device.type == "cuda" else SHAPES:
        for cell in LAYERS:
            result = measure(("ours", "torch", "plain"), cell, shape, device, 3 if args.quick else 15)
            row = {"shape": shape, "cell": cell, **result}
            line = f"{', '.join(map(str, shape)):20}{cell:9}"
            for name in ("train", "inference"):
                row[f"{name}_ratio"] = result["ours"][name] / result["torch"][name]
                line += f"| {result['ours'][name]:8.2f}{result['torch'][name]:9.2f}{result['plain'][name]:9.2f}"
                line += f"{row[f'{name}_ratio']:16.2f} "
            if not args.quick:
                case = ",".join(map(str, (cell, *shape)))
                command = [
                    sys.executable,
                    __file__,
                    "--device",
                    args.device,
                    "--threads",
                    str(args.threads),
                    "--memory-of",
                ]
                for kind in ("ours", "torch"):
                    output = subprocess.run([*command, kind, case], capture_output=True, check=True, text=True).stdout
                    row[kind]["memory"] = float(output)
                row["memory_ratio"] = row["ours"]["memory"] / row["torch"]["memory"]
                line += f"| {row['ours']['memory']:7.1f}{row['torch']['memory']:8.1f}{row['memory_ratio']:9.2f}"
            print(line, flush=True)
            rows.append(row)
    means = {
        name: geometric_mean([row[name] for row in rows])
        for name in ("train_ratio", "inference_ratio", "memory_ratio")
        if name in rows[0]
    }
    print("geometric means of ours/torch: " + ", ".join(f"{name[:-6]} {value:.2f}" for name, value in means.items()))
    print(f"largest training ratio: {max(row['train_ratio'] for row in rows):.2f}")
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or platform.machine()}"
    )
    machine = f"{name}, {args.threads} threads, Python {platform.python_version()}, torch {torch.__version__}"
    print(machine)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as stream:
            json.dump({"machine": machine, "rows": rows, "geometric_means": means}, stream, indent=2)


if __name__ == "__main__":
    main()
