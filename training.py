"""What both scripts share: options, device, a run with its folder and checkpoints, the way out."""

import argparse
import contextlib
import ctypes
import io
import json
import math
import os
import re
import shutil
import sys
import time
import zipfile
from pathlib import Path

import pandas as pd
import torch
from torch import distributed
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

import plots
from datasets import UserError, whole_file
from rnn_models import LOOPS, grad_clipping

FORMAT = 5  # of the checkpoints; raise it when what they hold changes
CELL_OF = {"rnn": "rnn", "gru": "gru", "lstm": "lstm", "bilstm": "bi_lstm"}  # --model: its cell
NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "bilstm": "Bi-LSTM"}
AVERAGE_EVERY = 5  # steps; the moving average then costs next to nothing
LOWEST_RATE = 0.05  # of --lr, after the descent


# --- options ------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, without the usage text."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(kind, low, high):
    """A converter for argparse: text to a `kind` (int or float) between low and high."""

    def convert(text):
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not from {low:,} to {high:,}")
        return value

    convert.__name__ = kind.__name__  # argparse then says: invalid int value
    return convert


def make_parser(description, **defaults):
    """A parser with the options that both scripts share; defaults: those of this script."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=formatter, allow_abbrev=False)
    add = parser.add_argument
    share = number(float, 0, 0.999)
    add("--model", choices=[*CELL_OF, "all"], help="the recurrence, or all four one after another")
    add("--loops", choices=LOOPS, help="gradients by hand (fast), or the lecture's loops (plain)")
    add("--epochs", type=number(int, 1, 10_000), help="passes over the training data at most")
    add("--patience", type=number(int, 0, 10_000), help="stop after so many epochs without a "
        "better validation score; 0: never")  # fmt: skip
    add("--batch-size", type=number(int, 1, 100_000), help="sequences in one step")
    add("--hidden", type=number(int, 1, 8192), help="hidden units h of one direction")
    add("--dropout", type=share, help="share of inputs and last states set to zero in training")
    add("--lr", type=number(float, 1e-12, 1e6), help="learning rate of AdamW")
    add("--descent", type=number(int, 0, 10**9), help="steps in which the rate rises and falls to "
        "a twentieth, at most all steps; 0: constant rate")  # fmt: skip
    add("--weight-decay", type=number(float, 0, 1000), help="weight decay of AdamW")
    add("--clip", type=number(float, 1e-12, 1e12), help="largest norm of the gradient")
    add("--average", type=share, help="decay of the weights' moving average; 0: none")
    add("--seed", type=number(int, 0, 2**31), help="of initialisation, shuffling and dropout")
    add("--device", help="auto, cpu, cuda or cuda:N; auto takes a GPU that torch can use")
    add("--data", type=Path, help="CSV, or a zip that holds one; without it: RNN_DATA_DIR, data/, "
        "a download, the made-up sample")  # fmt: skip
    add("--out", type=Path, help="folder of the results")
    add("--resume", action="store_true", help="go on after the last finished epoch of this run")
    add("--checkpoint", type=Path, help="the best.pt of an earlier run, for --predict")
    shared = {"loops": "fast", "device": "auto", "out": Path("runs"), "seed": 0, "clip": 1.0}
    parser.set_defaults(**shared | defaults)
    return parser


def parse(parser, arguments=None, presets=None):
    """Parse the command line into a namespace; give every option's help its default.

    presets: {name: {option: default}} of the option --preset; options beside it win.
    Raises UserError for arguments that do not go together.
    """
    for action in parser._actions:
        if str(action.default) not in ("None", "False", argparse.SUPPRESS):
            action.help += " (default: %(default)s)"
    args = parser.parse_args(arguments)
    if presets and args.preset:
        parser.set_defaults(**presets[args.preset])
        args = parser.parse_args(arguments)
    if (args.predict is None) != (args.checkpoint is None):
        raise UserError("--predict and --checkpoint belong together; give both, or none to train")
    given = [name for name, value in vars(args).items() if value != parser.get_default(name)]
    useless = [name for name in given if name not in ("predict", "checkpoint", "device")]
    if args.predict is not None and useless:
        option = useless[0].replace("_", "-")
        raise UserError(f"--{option} has no effect on --predict; leave it out")
    return args


# --- device and processes -----------------------------------------------------------------------


def pick_device(name):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:N"; UserError if it is not there.

    Of torchrun's processes on a machine, "auto" and "cuda" give each its own GPU.
    """
    if name == "auto" and not torch.cuda.is_available():
        if torch.version.cuda is None and shutil.which("nvidia-smi"):
            print("the NVIDIA card is not used: this torch has no CUDA; "
                  "see https://pytorch.org/get-started/locally", file=sys.stderr)  # fmt: skip
        name = "cpu"
    if name in ("auto", "cuda"):
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    there = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in there:
        raise UserError(f"--device {name} is not there; this machine has {', '.join(there)}")
    return torch.device(name)


def join_processes(device):
    """Join torchrun's other processes (NCCL on GPUs, gloo on CPUs); only the first prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)  # NCCL works on the current device
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not is_first():
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def is_first():
    """Whether this process tests, writes and prints: the only one, or torchrun's first."""
    return not distributed.is_initialized() or distributed.get_rank() == 0


def world_size():
    """The number of torchrun's processes, 1 without it."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def start(args, predict, train_and_test):
    """Call predict(args, device) for --predict; otherwise train_and_test, alone in its folder."""
    device = pick_device(args.device)
    if args.predict is not None:
        return predict(args, device)
    join_processes(device)
    with hold_folder(args.out):
        train_and_test(args, device)


def tune_allocator():
    """Let glibc keep freed memory for the next tensors; call this once, when a program starts."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no glibc: Windows, macOS, musl
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD: tensors up to 32 MiB come from the heap
        mallopt(-1, 2**30)  # M_TRIM_THRESHOLD: keep up to 1 GiB of freed heap


def run_script(main):
    """Call a script's main; end with one line on stderr and status 2 for what a user can mend."""
    tune_allocator()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a character shows "?"
    status = 2
    try:
        main()
        sys.stdout.flush()
        return
    except UserError as error:
        message = f"error: {error}"
    except KeyboardInterrupt:
        message = "interrupted; with --resume a training goes on after its last finished epoch"
        status = 130
    except (MemoryError, RuntimeError) as error:
        full = re.search("(can't allocate|not enough|out of) memory", str(error))  # torch's words
        if not isinstance(error, MemoryError) and not full:
            raise
        message = "error: the memory is full; lower --batch-size or --hidden"
    except BrokenPipeError:  # the reader, `head` for one, has gone: end as Python's manual advises
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(status)


# --- files --------------------------------------------------------------------------------------

# What a run or a comparison leaves in its folder.
RESULTS = ["last.pt", "metrics.json", "history.csv", "predictions.csv", "best.pt",
           "comparison.json", "comparison.png", "gradients.png", "curves.png", "confusion.png",
           "forecasts.png", "lead_time.png"]  # fmt: skip


def hold_folder(folder):
    """Keep other runs out of a folder: `with hold_folder(folder): ...`.

    Raises UserError if another process holds it or it cannot be written.
    """
    if not is_first():
        return contextlib.nullcontext()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "ab")  # noqa: SIM115 - held open on purpose
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        reason = f"cannot write into {folder}: {error.strerror}; use another --out"
        raise UserError(f"{reason}, or wait if another run writes there") from error
    return lock


def clear_folder(folder):
    """Remove the results of an earlier run, so that old and new ones never stand side by side."""
    try:
        for name in RESULTS:
            (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot replace {folder / name}: {error.strerror}; close it") from error


def structures(args, task):
    """The names of the structures to train. Before a new run of all four the earlier results of
    all of them are removed, so that a later --resume never mixes old and new ones."""
    if args.model != "all":
        return [args.model]
    for name in ["all"] if args.resume else ["all", *NAMES]:
        if is_first():
            clear_folder(args.out / f"{task}_{name}")
    return list(NAMES)


def write_json(path, content):
    """Write a JSON file whole. Surrogates, from paths that are no UTF-8, become JSON escapes."""
    with whole_file(path, "w", encoding="utf-8", errors="backslashreplace") as stream:
        json.dump(content, stream, ensure_ascii=False, indent=2, allow_nan=False)
        stream.write("\n")


def write_csv(path, frame):
    """Write a DataFrame as a CSV file, whole."""
    with whole_file(path, "w", encoding="utf-8", newline="") as stream:
        frame.to_csv(stream, index=False, lineterminator="\r\n")  # quotes a text's own \r, too


def save_checkpoint(path, **content):
    """Write a checkpoint whole: plain values and tensors only, so that `weights_only` loads it."""
    packed = io.BytesIO()  # torch.save reports a full disk in its own words, a write by OSError
    torch.save({"format": FORMAT, **content}, packed)
    with whole_file(path) as stream:
        stream.write(packed.getbuffer())


@contextlib.contextmanager
def refuse_damaged(path):
    """Turn what goes wrong when a checkpoint is read or used into one line for the user."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError, UserError):
        raise
    except Exception as error:  # damaged bytes and wrong values lead to every kind of error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} cannot be used ({reason}); train again") from error


def load_checkpoint(path, task):
    """The dict in a checkpoint of this task ("text" or "temp"). Code in the file is never run.

    Raises UserError for a file that is missing, damaged, foreign or of another version.
    """
    if not os.path.isfile(path):  # Path.is_file fails for names that are too long
        raise UserError(f"{path} is no file; name a best.pt that this script wrote")
    with refuse_damaged(path):
        if damaged := zipfile.ZipFile(path).testzip():  # compares every part with its check sum
            raise ValueError(f"{damaged} in it is damaged")
        content = torch.load(path, map_location="cpu", weights_only=True)
        if (content["task"], content["format"]) != (task, FORMAT):
            raise ValueError("it is of another script or version")
    return content


# --- training -----------------------------------------------------------------------------------


class Run:
    """One structure's training: optimiser, rate, moving average, history, checkpoints, resuming.

    `averaged` is the model with the moving average of the weights: the one to validate and keep.
    """

    def __init__(self, args, folder, config, model):
        """config: what best.pt holds beside the weights, "task" and "sha256" of the data among it.

        Without --resume an earlier run's results are removed. Raises UserError if --resume finds a
        run with other options or data.
        """
        self.args, self.folder, self.config, self.model = args, folder, config, model
        self.name = config["options"]["model"]
        self.params = list(model.parameters())
        decay = args.weight_decay
        self.optimizer = torch.optim.AdamW(self.params, args.lr, weight_decay=decay, fused=True)
        self.averaged = AveragedModel(model, multi_avg_fn=self._average)
        self.parameters = sum(param.numel() for param in self.params)
        self.history, self.best, self.steps = [], None, 0
        skipped = ("resume", "out", "device", "data", "model")  # config holds the model's name
        self.options = {k: str(v) for k, v in vars(args).items() if k not in skipped}
        self.options["nproc_per_node"] = f"{world_size()}"
        device = self.params[0].device
        print(f"\n{NAMES[self.name]}: {self.parameters:,} parameters, {device}", flush=True)
        for path in folder.glob(".*.part"):  # what killed runs left half-written
            with contextlib.suppress(OSError):
                path.unlink()
        if args.resume and (folder / "last.pt").exists():
            self._resume()
        elif is_first():
            clear_folder(folder)
        if distributed.is_initialized():
            found = [None] * world_size()
            own = config["sha256"], self.options, len(self.history)
            distributed.all_gather_object(found, own)
            if any(other != own for other in found):
                raise UserError("the processes have different data, options or finished epochs; "
                                "give all of them the same data/ and --out")  # fmt: skip

    @torch.no_grad()
    def _average(self, averaged, current, count):
        """Move the average towards the weights; at first over a tenth of the steps so far."""
        decay = min(self.args.average**AVERAGE_EVERY, float(count) / (float(count) + 10))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def _resume(self):
        path = self.folder / "last.pt"
        last = load_checkpoint(path, self.config["task"])
        with refuse_damaged(path):
            changed = [key for key in self.options if self.options[key] != last["options"].get(key)]
            if changed or last["config"]["sha256"] != self.config["sha256"]:
                what = f"--{changed[0].replace('_', '-')}" if changed else "the data"
                raise UserError(f"the run in {self.folder} began with another value of {what}; "
                                "use the same or leave out --resume")  # fmt: skip
            self.model.load_state_dict(last["weights"])
            self.averaged.load_state_dict(last["averaged"])
            self.optimizer.load_state_dict(last["optimizer"])
            self.history, self.best, self.steps = last["history"], last["best"], last["steps"]

    def epochs(self):
        """Yield the numbers of the epochs that are still to do, each with its own random numbers.

        The generators are seeded from (seed, epoch), so a resumed run repeats the run left alone.
        """
        for epoch in range(len(self.history) + 1, self.args.epochs + 1):
            waited = epoch - 1 - self.best["epoch"] if self.best else 0
            if self.args.patience and waited >= self.args.patience:
                print(f"stopped: no better validation score for {waited} epochs (--patience)")
                return
            self.epoch = epoch
            torch.manual_seed(self.args.seed * 1_000_003 + epoch)
            yield epoch

    def progress(self, batches):
        """Yield this process's share of a list of batches, under a progress bar; then update the
        average. Raises UserError if there is no batch, or if the weights are not finite at the end.
        """
        world = world_size()
        if world > 1:  # each takes every world-th batch and draws other random numbers
            rank = distributed.get_rank()
            batches = batches[rank::world][: len(batches) // world]
            torch.manual_seed(self.args.seed * 1_000_003 + self.epoch + 10_007 * rank)
        if not batches:
            raise UserError("an epoch has no batch; lower --batch-size or the number of processes")
        self.steps_in_epoch, start = len(batches), time.perf_counter()
        quiet = None if is_first() else True  # None: quiet if stderr is no terminal
        title = f"epoch {self.epoch}/{self.args.epochs}"
        self.bar = tqdm(batches, title, unit="step", disable=quiet, leave=False)
        yield from self.bar
        self.averaged.update_parameters(self.model)
        self.seconds = time.perf_counter() - start
        if not all(torch.isfinite(param).all() for param in self.params):  # the last step's doing
            raise UserError(f"the weights of epoch {self.epoch} are not finite; try a lower --lr")

    def rate(self):
        """The next step's rate: it rises to 12/13 of --lr in a thirteenth of --descent, where the
        lines 12 done and 1 - done meet, and falls to a twentieth.
        """
        if not self.args.descent:
            return self.args.lr
        descent = min(self.args.descent, self.args.epochs * self.steps_in_epoch)
        done = (self.steps + 1) / descent
        return self.args.lr * min(12 * done, max(LOWEST_RATE, 1 - done))

    def step(self, loss):
        """One step of the optimiser down the gradient of a batch's mean loss."""
        value = loss.item()
        if not math.isfinite(value):
            where = f"epoch {self.epoch}, step {self.steps + 1} of the run"
            raise UserError(f"the loss is not finite in {where}; try a lower --lr or --clip")
        rate = self.optimizer.param_groups[0]["lr"] = self.rate()
        self.optimizer.zero_grad()
        loss.backward()
        if distributed.is_initialized():  # the mean over all processes' batches
            for param in self.params:
                if param.grad is not None:
                    distributed.all_reduce(param.grad)
                    param.grad /= world_size()
        grad_clipping(self.params, self.args.clip)
        self.optimizer.step()
        self.steps += 1
        if self.steps % AVERAGE_EVERY == 0:
            self.averaged.update_parameters(self.model)
        self.bar.set_postfix(loss=f"{value:.3f}", rate=f"{rate:.1e}", refresh=False)

    def finish_epoch(self, scores, monitor, mode):
        """Record an epoch's scores, keep the model if it is the best yet, save, print a line.

        scores: {name: number}, of the first process; monitor: the name that decides; mode: "max"
        or "min". Raises UserError if a score is not finite.
        """
        if distributed.is_initialized():
            shared = [scores]
            distributed.broadcast_object_list(shared)  # the first process has measured them
            scores = shared[0]
        if not all(map(math.isfinite, scores.values())):
            raise UserError(f"the scores of epoch {self.epoch} are not finite; try a lower --lr")
        score, sign = scores[monitor], 1 if mode == "max" else -1
        self.history.append({"epoch": self.epoch, **scores, "seconds": self.seconds})
        better = self.best is None or sign * score > sign * self.best["score"]
        if better:
            self.best = {"epoch": self.epoch, "score": score}
        if not is_first():
            return
        if better:
            self.save_best(self.averaged.module)
        write_csv(self.folder / "history.csv", pd.DataFrame(self.history))
        save_checkpoint(
            self.folder / "last.pt", task=self.config["task"], config=self.config,
            options=self.options, history=self.history, best=self.best, steps=self.steps,
            weights=self.model.state_dict(), averaged=self.averaged.state_dict(),
            optimizer=self.optimizer.state_dict(),
        )  # fmt: skip
        numbers = "  ".join(f"{k.replace('_', ' ')} {value:.4f}" for k, value in scores.items())
        mark = "  *" if better else ""
        print(f"epoch {self.epoch:2}  {numbers}  {self.seconds:.0f} s{mark}", flush=True)

    def save_best(self, model, **content):
        """Write best.pt: config, the model's weights, and `content`."""
        content |= self.config | {"epoch": self.best["epoch"], "weights": model.state_dict()}
        save_checkpoint(self.folder / "best.pt", **content)

    def load_best(self):
        """Put the best epoch's weights into the model of the first process, which tests it."""
        if is_first():
            path = self.folder / "best.pt"
            content = load_checkpoint(path, self.config["task"])
            with refuse_damaged(path):
                self.model.load_state_dict(content["weights"])
            if content["epoch"] != self.best["epoch"]:  # a GPU repeats an epoch with other rounding
                raise UserError(f"{path} is of another epoch than the best one; train again")

    def write_metrics(self, data, split, test):
        """Write metrics.json; returns its content."""
        metrics = {
            "task": self.config["task"], "model": self.name, "seed": self.args.seed,
            "argv": sys.argv[1:], "device": str(self.params[0].device), "torch": torch.__version__,
            "parameters": self.parameters, "epochs": self.args.epochs,
            "best_epoch": self.best["epoch"],
            "seconds_per_epoch": sum(r["seconds"] for r in self.history) / len(self.history),
            "data": data, "split": split, "test": test,
        }  # fmt: skip
        write_json(self.folder / "metrics.json", metrics)
        return metrics


def stamp(data):
    """What titles say behind a name: nothing, or that the data are the sample."""
    return " (bundled sample)" if data["source"] == "sample" else ""


def write_comparison(out, task, rows, content, note, panels):
    """The structures side by side: print a note and a table; comparison.json and comparison.png.

    rows: dicts, of the table; content: of the JSON file; panels {title: column of history.csv}.
    """
    folder, table = out / f"{task}_all", pd.DataFrame(rows, dtype=object)
    table = table.rename(columns=lambda name: name.replace("_", " "))
    print(f"\n{note}\n{table.to_string(index=False, float_format='{:#.4g}'.format, na_rep='')}")
    write_json(folder / "comparison.json", content)
    paths = {label: out / f"{task}_{name}" / "history.csv" for name, label in NAMES.items()}
    histories = {label: pd.read_csv(path) for label, path in paths.items()}
    plots.draw_curves(folder / "comparison.png", {
        title: {label: history[column] for label, history in histories.items()}
        for title, column in panels.items()
    })  # fmt: skip
    print(f"comparison in {folder}: open its pictures")
