"""A training's folder, its checkpoints, resuming; torchrun; the rate and the weights' average."""

import atexit
import contextlib
import copy
import io
import os
import sys
import time
import zipfile

import pandas as pd
import torch
from torch import distributed
from tqdm import tqdm

from support import plots
from support.files import UserError, whole_file, write_csv, write_json

FORMAT = 10  # of the checkpoints; raise it when their content or the training changes
# What a run or a comparison leaves in its folder.
RESULTS = (
    "last.pt", "best.pt", "metrics.json", "history.csv", "predictions.csv", "curves.png",
    "confusion.png", "forecasts.png", "lead_time.png", "comparison.json", "comparison.png",
    "gradients.png",
)  # fmt: skip


# --- torchrun's processes -----------------------------------------------------------------------


def join_processes(device):
    """Join torchrun's other processes (NCCL on GPUs, gloo on CPUs); only the first prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL works on the current device
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    atexit.register(distributed.destroy_process_group)
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def rank():
    """The number of this process among torchrun's, 0 without it."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size():
    """The number of torchrun's processes, 1 without it."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first():
    """Whether this process tests, writes and prints: the only one, or torchrun's first."""
    return rank() == 0


def from_first(value):
    """The first process's value, in all processes."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def check_same_data(data):
    """Raise UserError if this process has read other data than the first one."""
    if from_first(data["sha256"]) != data["sha256"]:
        raise UserError("the processes have read different data; give all of them the same --data")


# --- checkpoints --------------------------------------------------------------------------------


def save_checkpoint(path, content):
    """Write a checkpoint whole: plain values and tensors only, so that `weights_only` loads it."""
    packed = io.BytesIO()  # torch.save into a file raises no OSError when the disk is full
    torch.save({"format": FORMAT, **content}, packed)
    with whole_file(path) as stream:
        stream.write(packed.getbuffer())


def load_checkpoint(path, task, key="weights"):
    """The dict in a checkpoint of this task ("text" or "temp"). Code in the file is never run.

    key: what must be in it, "weights" for best.pt and "states" for last.pt.
    Raises UserError for a file that is missing, damaged, foreign or of another version.
    """
    if not path.is_file():
        raise UserError(f"{path} is no file; name a best.pt that this script wrote")
    try:
        damaged_member = zipfile.ZipFile(path).testzip()  # compares check sums
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes lead to every kind of error
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(f"{path} cannot be read ({reason}); train again") from error
    if damaged_member:
        raise UserError(f"{path} is damaged in {damaged_member}; train again")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is no checkpoint of this version; train again")
    if content["task"] != task or key not in content:
        raise UserError(f"{path} is no such file of this script; name a best.pt that it wrote")
    return content


def load_weights(target, weights, path):
    """Put weights into a model, or a state into an optimiser; UserError if they do not fit."""
    try:
        target.load_state_dict(weights)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit this program ({reason}); train again") from error


# --- a run --------------------------------------------------------------------------------------


def check_finite(model, epoch):
    """Raise UserError unless all weights are finite.

    A loss that is not finite makes its step's gradients and so all weights not finite, for good:
    one look at the end of an epoch is enough, and no step waits for a GPU.
    """
    is_finite = all(torch.isfinite(param).all() for param in model.parameters())
    if not is_finite:
        raise UserError(f"the weights of epoch {epoch} are not finite; try a lower --lr")


def remove_results(folders):
    """Remove what earlier runs left in these folders, so that old and new never stand together.

    Raises UserError for a file that cannot be removed.
    """
    if not is_first():
        return
    try:
        for folder in folders:
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {error.filename}: {error.strerror}; close it") from error


def start(args, config, stateful):
    """A `Run` of these options; with --resume it goes on where an earlier one stopped."""
    model = stateful["model"]
    num_params = sum(param.numel() for param in model.parameters())
    device = next(model.parameters()).device
    print(f"\n{title_of(config['model'])}: {num_params:,} parameters, {device}", flush=True)
    run = Run(args.out / f"{config['task']}_{config['model']}", config, args, stateful)
    for path in run.folder.glob(".*.part"):  # what a killed run left half-written
        with contextlib.suppress(OSError):
            path.unlink()
    if args.resume:
        run.restore()
    return run


class Run:
    """The folder of one training, its history, and its checkpoints.

    `history` has a dict for each finished epoch; `best` is {"epoch", "score", "weights"} of the
    best one, None before the first.
    """

    def __init__(self, folder, config, args, stateful):
        """config: what best.pt holds beside the weights, "task", "model" and "sha256" of the data
        among it; args: the options; stateful: {name: object with a state_dict} that last.pt saves
        and `restore` restores, "model" and "average", a MovingAverage, among them.
        """
        self.folder = folder
        self.config = config
        self.args = args
        self.stateful = stateful
        self.history = []
        self.best = None
        self.epoch_start = time.perf_counter()
        # A resumed run must have the same options and data; the folder is that of one model.
        may_change = ("resume", "out", "device", "data", "model")
        options = {name: value for name, value in vars(args).items() if name not in may_change}
        # The path of the data may change, their content may not.
        self.options = {**options, "nproc_per_node": world_size(), "data": config["sha256"]}

    def restore(self):
        """Go on after the last finished epoch, if there is one.

        Raises UserError if the run in the folder had other options or data.
        """
        path = self.folder / "last.pt"
        last = None
        if is_first() and path.exists():
            last = load_checkpoint(path, self.config["task"], "states")
        last = from_first(last)
        if last is None:
            return
        earlier = last["options"]
        changed = [name for name, value in self.options.items() if value != earlier.get(name)]
        if changed:
            option = f"--{changed[0].replace('_', '-')}"
            difference = f"the run in {self.folder} began with another value of {option}"
            raise UserError(f"{difference}; use the same or leave out --resume")
        for name, target in self.stateful.items():
            load_weights(target, last["states"][name], path)
        self.history = last["history"]
        self.best = last["best"]
        if is_first():  # a run killed between checkpoint and table left the table an epoch short
            write_csv(self.folder / "history.csv", pd.DataFrame(self.history))

    def epochs(self, limit, patience):
        """Yield the numbers of the epochs to do, each with random numbers of its own.

        Ends after `limit` epochs, or `patience` epochs (if not 0) without a better score. The
        generators are seeded from (seed, epoch), so a resumed run repeats the run left alone.
        """
        while len(self.history) < limit:
            epoch = len(self.history) + 1
            waited = 0  # epochs since the best one
            if self.best:
                waited = len(self.history) - self.best["epoch"]
            if patience and waited >= patience:
                print(f"stopped: no better validation score for {waited} epochs (--patience)")
                return
            torch.manual_seed(self.args.seed * 1_000_003 + epoch)
            self.epoch_start = time.perf_counter()
            yield epoch

    def progress(self, batches):
        """Yield this process's share of a list of batches, under a progress bar.

        Raises UserError if there are fewer batches than processes.
        """
        epoch = len(self.history) + 1
        if len(batches) < world_size():
            raise UserError("an epoch has no batch; lower --batch-size or the number of processes")
        if world_size() > 1:  # each takes every world-th batch, and draws random numbers of its own
            whole_rounds = len(batches) - len(batches) % world_size()
            batches = batches[rank() : whole_rounds : world_size()]
            torch.manual_seed(self.args.seed * 1_000_003 + epoch + 10_007 * rank())
        disable = None if is_first() else True  # None: no bar if stderr is no terminal
        title = f"epoch {epoch}/{self.args.epochs}"
        yield from tqdm(batches, title, unit="step", disable=disable, leave=False)

    def end_epoch(self, scores, score):
        """Record an epoch's scores, keep the average's weights if they are the best, save, print.

        scores: {name: number}; score: the number that decides, the higher the better.
        """
        epoch = len(self.history) + 1
        scores, score = from_first((scores, score))
        seconds = time.perf_counter() - self.epoch_start
        self.history.append({"epoch": epoch, **scores, "seconds": seconds})
        is_best = self.best is None or score > self.best["score"]
        if is_best:
            averaged = self.stateful["average"].module.state_dict()
            weights = {name: tensor.cpu().clone() for name, tensor in averaged.items()}
            self.best = {"epoch": epoch, "score": score, "weights": weights}
        if not is_first():
            return
        last = {
            "task": self.config["task"],
            "options": self.options,
            "history": self.history,
            "best": self.best,
            "states": {name: target.state_dict() for name, target in self.stateful.items()},
        }
        # The checkpoint first: the epoch stays even if Excel has the table open (Windows).
        save_checkpoint(self.folder / "last.pt", last)
        write_csv(self.folder / "history.csv", pd.DataFrame(self.history))
        numbers = "  ".join(f"{k.replace('_', ' ')} {value:.4f}" for k, value in scores.items())
        print(f"epoch {epoch:2}  {numbers}  {seconds:.0f} s{'  *' if is_best else ''}", flush=True)

    def save_best(self, **content):
        """Write best.pt: config, the best epoch's weights, and `content`."""
        epoch = self.best["epoch"]
        content = {**self.config, **content, "epoch": epoch, "weights": self.best["weights"]}
        save_checkpoint(self.folder / "best.pt", content)

    def write_metrics(self, data, split, test, **more):
        """Write metrics.json; returns its content."""
        model = self.stateful["model"]
        params = list(model.parameters())
        seconds = [record["seconds"] for record in self.history]
        metrics = {
            "task": self.config["task"],
            "model": self.config["model"],
            "seed": self.args.seed,
            "argv": sys.argv[1:],
            "device": str(params[0].device),
            "torch": torch.__version__,
            "parameters": sum(param.numel() for param in params),
            "epochs": self.args.epochs,
            "best_epoch": self.best["epoch"],
            "seconds_per_epoch": sum(seconds) / len(seconds),
            "data": data,
            "split": split,
            "test": test,
            **more,
        }
        write_json(self.folder / "metrics.json", metrics)
        return metrics


# --- rate and average of the weights ------------------------------------------------------------


def rise_and_fall(steps):
    """The rate's factor at each step, for LambdaLR.

    d is the share of `steps` that are done with this one. The factor rises as 12 d until
    d = 1/13, falls as 1 - d, and stays at 0.05. With steps 0 it is always 1.
    """

    def factor(step):
        if steps == 0:
            return 1.0
        done = (step + 1) / steps
        return min(12 * done, max(0.05, 1 - done))

    return factor


class MovingAverage:
    """A copy of a model whose weights are the moving average of the model's weights.

    The average is an exponential one, which at first goes over about the last tenth of the steps
    so far, so that short runs have one too. torch's AveragedModel would copy its counter to the GPU
    in every step and wait for it; here the counter is a Python number.
    """

    def __init__(self, model, decay):
        """decay: the share that the average keeps in each step; 0: no average."""
        self.module = copy.deepcopy(model)
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, model):
        """Move the average towards the weights of the model."""
        decay = min(self.decay, self.steps / (self.steps + 10))
        for average, weight in zip(self.module.parameters(), model.parameters(), strict=True):
            average.lerp_(weight, 1 - decay)
        self.steps += 1

    def state_dict(self):
        """What last.pt holds."""
        return {"steps": self.steps, "module": self.module.state_dict()}

    def load_state_dict(self, state):
        """Go on from a `state_dict`."""
        self.steps = state["steps"]
        self.module.load_state_dict(state["module"])


# --- comparison ---------------------------------------------------------------------------------


def title_of(cell):
    """A cell's name in tables and pictures: RNN, GRU, LSTM, Bi-LSTM."""
    return cell.upper().replace("BI_", "Bi-").replace("_", " ")


def sample_note(data):
    """What titles say of the data: nothing, or that they are the sample."""
    return " (bundled sample)" if data["source"] == "sample" else ""


def write_comparison(out, task, cells, content, panels):
    """Print the table of the structures side by side; write comparison.json and comparison.png.

    cells: the structures; content: of the JSON file, "rows" among it, a dict for each line of the
    table, "model" among it; panels {title: column of history.csv} of the picture.
    """
    folder = out / f"{task}_all"
    write_json(folder / "comparison.json", content)
    table = pd.DataFrame(content["rows"], dtype=object)
    table = table.rename(columns=lambda name: name.replace("_", " "))
    print(table.to_string(index=False, float_format="{:#.4g}".format, na_rep=""))
    histories = {}
    for cell in cells:
        histories[title_of(cell)] = pd.read_csv(out / f"{task}_{cell}" / "history.csv")
    curves = {}
    for title, column in panels.items():
        curves[title] = {label: history[column] for label, history in histories.items()}
    plots.draw_curves(folder / "comparison.png", curves)
    print(f"comparison in {folder}: open its pictures")
