"""The command line of both scripts: shared options, their checks, the device, and errors."""

import argparse
import contextlib
import ctypes
import io
import os
import re
import sys
import tempfile
from pathlib import Path

import torch

from support.files import UserError


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show each default, and the description as it is written."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, without the usage text."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Formatter, allow_abbrev=False)

    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(kind, low, high=float("inf")):
    """A converter for argparse: text to a `kind` (int or float) from low to high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low} to {high}")
        return value

    convert.__name__ = kind.__name__  # argparse then says: invalid int value
    return convert


count = number(int, 1, 10**9)
count_or_0 = number(int, 0, 10**9)
positive = number(float, 1e-12, 1e12)
share = number(float, 0.0, 0.999)
decay = number(float, 0.0, 1000.0)

PATIENCE_HELP = "stop after this many epochs without a better validation score; 0: never"
FALL_HELP = "steps in which the rate rises and falls to a twentieth; 0: constant rate"
DATA_HELP = "CSV, or a zip of one; else: RNN_DATA_DIR, data/, a download, the made-up sample"
RESUME_HELP = "go on after the last finished epoch; the other options as before"
OLD_NAMES = {"bilstm": "bi_lstm"}  # of --model


def make_parser(description, cells):
    """A parser with the options that mean the same in both scripts; cells: what --model offers."""
    parser = Parser(description)
    add = parser.add_argument
    names = [*cells, "all"]
    add("--model", type=current_name, choices=names, default="lstm", help="recurrence; all: each")
    add("--seed", type=count_or_0, default=0, help="of initialisation, shuffling and dropout")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N; auto: a GPU if one works")
    add("--data", type=Path, help=DATA_HELP)
    add("--out", type=Path, default=Path("runs"), help="folder of the results")
    add("--resume", action="store_true", help=RESUME_HELP)
    return parser


def current_name(cell):
    """The name of a cell for a name that it has or once had."""
    return OLD_NAMES.get(cell, cell)


def parse(parser, arguments, presets):
    """Parse the command line into a namespace.

    presets: {name: {option: default}} of the option --preset; options beside it win. Raises
    UserError for options that do not go together.
    """
    args = parser.parse_args(arguments)
    if args.preset:
        parser.set_defaults(**presets[args.preset])
        args = parser.parse_args(arguments)
    if (args.predict is None) != (args.checkpoint is None):
        raise UserError("--predict and --checkpoint belong together; to train give neither")
    if args.predict is not None:
        changed = {name for name, value in vars(args).items() if value != parser.get_default(name)}
        useless = changed - {"predict", "checkpoint", "device"}
        if useless:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(useless))
            raise UserError(f"leave out {names}: no effect on --predict")
    return args


def pick_device(name):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:N", after one small operation on it.

    "auto" falls back to the CPU, with a line on stderr if there is a GPU that does not work.
    Under torchrun, "auto" and "cuda" give each process of a machine its own GPU.
    Raises UserError for a device that is not there or does not work.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not re.fullmatch(r"auto|cuda|cuda:(0|[1-9]\d?)", name):
        raise UserError(f"--device {name} is not one of auto, cpu, cuda, cuda:N")
    under_torchrun = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if under_torchrun and name.startswith("cuda:"):
        raise UserError(f"--device {name} would be the GPU of all processes; write --device cuda")
    own_gpu = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = torch.device(own_gpu if name in ("auto", "cuda") else name)
    try:
        torch.ones(1, device=device).add(1).item()
    except (RuntimeError, AssertionError) as error:  # no such GPU, or one without kernels here
        reason = str(error).splitlines()[0]
        if name != "auto" or under_torchrun:  # all processes must train on the same kind
            raise UserError(f"--device {name} does not work here: {reason}") from error
        print(
            f"the GPU does not work with this torch, so the CPU trains: {reason}", file=sys.stderr
        )
        return torch.device("cpu")
    return device


def check_folder(folder):
    """Raise UserError unless files can be written into a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(
            f"cannot write into {folder}: {error.strerror}; use another --out"
        ) from error


def tune_allocator():
    """Let glibc keep freed memory for the next tensors, which saves up to a quarter of a training
    step on a CPU; call this once, when a program starts.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc: Windows, macOS, musl
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: tensors up to 32 MiB come from the heap
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: keep up to 1 GiB of freed heap


def run_script(main):
    """Call a script's main; end with one line on stderr and status 2 for what a user can mend."""
    tune_allocator()
    if isinstance(sys.stdout, io.TextIOWrapper):
        encoding = None if sys.stdout.isatty() else "utf-8"  # a file is UTF-8 on Windows, too
        # A console that lacks a character shows "?".
        sys.stdout.reconfigure(encoding=encoding, errors="replace")
    try:
        main()
        sys.stdout.flush()  # shows a full disk or a closed pipe now, not at the exit
        return
    except (UserError, OSError) as error:
        message = f"error: {error}"
        status = 2
    except KeyboardInterrupt:
        message = "interrupted; --resume goes on after a training's last finished epoch"
        status = 130
    except (MemoryError, RuntimeError) as error:
        is_full = re.search(
            "(can't allocate|not enough|out of) memory", str(error)
        )  # torch's words
        if not isinstance(error, MemoryError) and not is_full:
            raise
        message = "error: the memory is full; lower --batch-size or --hidden"
        status = 2
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(status)
