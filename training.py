"""What both scripts share: options, device, seed, the epoch loop with its checkpoints, curves, and the way out."""

import argparse
import contextlib
import csv
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from datasets import UserError, whole_file
from rnn_models import grad_clipping

try:
    import fcntl
except ImportError:  # Windows: two runs into one folder are not told apart there
    fcntl = None

FORMAT = 2  # of the checkpoints; raise it when what they hold changes
CELLS = {"rnn": "rnn", "gru": "gru", "lstm": "lstm", "bilstm": "bi_lstm"}  # --model, and its name in rnn_models
NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "bilstm": "Bi-LSTM"}


# --- options ----------------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are UserErrors: one line, without the usage text."""

    def error(self, message):
        raise UserError(f"{message}; see --help")


def number(kind, low, high=math.inf, below=False):
    """A converter for argparse: text to a finite `kind` (int, float) in low..high, `high` excluded with `below`."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or math.isinf(value) or (below and value == high):
            limit = f"from {low:g} on" if math.isinf(high) else f"from {low:g} {'to below' if below else 'to'} {high:g}"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not {'a whole number' if kind is int else 'a number'} {limit}"
            )
        return value

    return convert


def add_training_options(parser, **defaults):
    """The options that both scripts have in common."""
    positive = sys.float_info.min
    add = parser.add_argument
    add("--model", choices=[*CELLS, "all"], help="the recurrence, or all four one after another")
    add("--epochs", type=number(int, 1), help="passes over the training data")
    add("--batch-size", type=number(int, 1), help="sequences in a step of the optimiser")
    add("--hidden", type=number(int, 1), help="hidden units of a direction")
    add("--dropout", type=number(float, 0, 1, below=True), help="share of inputs and pooled states set to zero")
    add("--lr", type=number(float, positive), help="learning rate of AdamW")
    add("--weight-decay", type=number(float, 0), help="weight decay of AdamW")
    add(
        "--schedule", choices=["linear", "constant"], help="rate: up over a tenth of the steps, then down to 0; or flat"
    )
    add("--clip", type=number(float, positive), help="largest norm of the gradient")
    add("--average", type=number(float, 0, 1, below=True), help="decay of the weights' moving average; 0 for none")
    add("--seed", type=number(int, 0, 2**31), help="of initialisation, shuffling and dropout")
    add("--device", help="auto, cpu, cuda or cuda:N; auto takes the GPU where there is one")
    add("--data", type=Path, help="CSV, or a zip that holds one; without it: RNN_DATA_DIR, data/, download, sample")
    add("--out", type=Path, help="folder of the results")
    add("--resume", action="store_true", help="go on after the last finished epoch of the same run")
    add("--checkpoint", type=Path, help="a best.pt of an earlier run, for --predict")
    parser.set_defaults(
        **{"device": "auto", "out": Path("runs"), "seed": 0, "weight_decay": 1e-4, "clip": 1.0} | defaults
    )
    for action in parser._actions:  # every help text ends with its default
        if action.help and parser.get_default(action.dest) not in (None, False, argparse.SUPPRESS):
            action.help += " (default: %(default)s)"


def pick_device(name):
    """The torch.device of "auto", "cpu", "cuda" or "cuda:N"; UserError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name} is none of auto, cpu, cuda, cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"--device {name} is not there: this machine has {torch.cuda.device_count()} GPUs; use cpu or auto"
        )
    return device


def seed_all(*numbers):
    """Seed torch's generators, on every device, with a mix of whole numbers."""
    mixed = 0
    for value in numbers:
        mixed = (mixed * 1_000_003 + value) % 2**63
    torch.manual_seed(mixed)


def run(main):
    """Call a script's main; turn what a user can cause into one line on stderr and the right exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a console that lacks a character shows a question mark
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        sys.exit(_said(f"error: {error}", 2))
    except KeyboardInterrupt:
        sys.exit(_said("interrupted; the same command with --resume goes on after the last finished epoch", 130))
    except torch.OutOfMemoryError:
        sys.exit(_said("error: the GPU's memory is full; lower --batch-size or --hidden, or use --device cpu", 2))
    except BrokenPipeError:  # the reader, `head` for one, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet():
    """A context in which what is printed goes to stderr: stdout then holds nothing but results."""
    return contextlib.redirect_stdout(sys.stderr)


def _said(line, status):
    print(line, file=sys.stderr)
    return status


# --- files ------------------------------------------------------------------------------------------------------------


def lock_folder(folder):
    """Make the folder this process's own until it ends; UserError if another process holds it. Returns the lock."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "a+")  # noqa: SIM115 - held open until the process ends, however it ends
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; name another folder with --out") from error
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise UserError(f"{folder} is in use by process {holder}; wait for it, or name another --out") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def write_json(path, content):
    """Write a JSON file whole."""
    with whole_file(path, "w", encoding="utf-8") as stream:
        json.dump(content, stream, ensure_ascii=False, indent=2, allow_nan=False)
        stream.write("\n")


def write_csv(path, header, rows):
    """Write a CSV file whole. Texts that a spreadsheet would run as formulas get an apostrophe in front."""

    def safe(cell):
        return "'" + cell if isinstance(cell, str) and cell.lstrip().startswith(("=", "+", "-", "@")) else cell

    with whole_file(path, "w", encoding="utf-8", newline="", errors="replace") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows([safe(cell) for cell in row] for row in rows)


def save_figure(path, figure):
    """Write a figure as a PNG file, whole."""
    with whole_file(path) as stream:
        figure.savefig(stream, format="png", dpi=88)


def save_checkpoint(path, **content):
    """Write a checkpoint whole: plain values and tensors only, so that `weights_only` loads it."""
    packed = io.BytesIO()  # torch.save reports a full disk in its own words; a plain write raises OSError
    torch.save({"format": FORMAT, **content}, packed)
    with whole_file(path) as stream:
        stream.write(packed.getbuffer())


def load_checkpoint(path, task, schema):
    """The dict in a checkpoint of this task, checked against `schema` (key: type). Code in it is never run.

    Raises UserError for a file that is missing, broken, holds anything but plain values and tensors, belongs to the
    other task or another version of this project, or lacks a part.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}; name a best.pt with --checkpoint") from error
    except Exception as error:  # torch.load raises whatever the broken bytes lead it to
        raise UserError(f"{path} is not a checkpoint of this project, or damaged; train again to make one") from error
    if not isinstance(content, dict) or content.get("task") not in ("text", "temp"):
        raise UserError(f"{path} is not a checkpoint of this project; name a best.pt that it wrote")
    if content["task"] != task:
        raise UserError(f"{path} belongs to the other script; name a best.pt of this one")
    if content.get("format") != FORMAT:
        raise UserError(f"{path} has format {content.get('format')}, this program reads {FORMAT}; train again")
    for key, kind in schema.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{path} lacks its part {key!r}; train again to make a whole one")
    return content


def load_weights(model, weights, path):
    """Put a checkpoint's weights into the model; UserError if their names or shapes are others."""
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"the weights in {path} do not fit the options in it; train again") from error
    return model


def load_model(build, saved, path):
    """The model that build(saved) makes of a checkpoint's content, with its weights; UserError if they do not fit."""
    try:
        model = build(saved)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"the options in {path} describe no model of this program; train again") from error
    return load_weights(model, saved["weights"], path)


# --- the epoch loop ---------------------------------------------------------------------------------------------------


def learning_rate(step, steps, peak, schedule):
    """The rate of step 0..steps-1: `peak`, or with "linear" up to it over a tenth of the steps and down to 0."""
    if schedule == "constant":
        return peak
    return peak * min((step + 1) / math.ceil(0.1 * steps), 1 - step / steps)


def fit(model, args, folder, fixed, batches, loss_of, validate, monitor, best_of, unit, until=None):
    """Train a model, epoch by epoch, and leave the weights of the best epoch in it and in `folder`/best.pt.

    args: the options of `add_training_options`; fixed: what best.pt holds beside the weights; batches(): a list of
    the batches of an epoch, shuffled by torch's global generator; loss_of(model, batch): (mean loss, its count);
    validate(model): a dict of numbers, of which `monitor` decides: best_of is max or min; unit: what is counted;
    until: the last epoch, args.epochs without it (the learning rate's schedule goes by args.epochs).
    Every epoch seeds the generators from (seed, epoch): with last.pt that makes a resumed run the run left alone.
    Returns (history, best_epoch): a list of dicts, one an epoch, and a number from 1 on. Raises UserError for a loss
    that is not finite and for a run in `folder` that --resume cannot continue.
    """
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    params = list(model.parameters())
    averaged = [param.detach().clone() for param in params] if args.average else params
    history, best = [], None
    options = {key: str(value) for key, value in vars(args).items() if key not in ("resume", "out", "device")}
    if args.resume and (folder / "last.pt").exists():
        last = load_checkpoint(folder / "last.pt", fixed["task"], {"options": dict, "history": list, "optimizer": dict})
        changed = [key for key in options if options[key] != last["options"].get(key)]
        if changed or last["fixed"] != fixed:
            name = f"--{changed[0].replace('_', '-')}" if changed else "data"
            raise UserError(
                f"--resume: {name} is not what the run in {folder} began with; use the same, or another --out"
            )
        load_weights(model, last["weights"], folder / "last.pt")
        optimizer.load_state_dict(last["optimizer"])
        averaged = [tensor.to(param.device) for tensor, param in zip(last["averaged"], params, strict=True)]
        averaged = averaged if args.average else params
        history, best = last["history"], last["best"]

    for epoch in range(len(history) + 1, (until or args.epochs) + 1):
        seed_all(args.seed, epoch)
        start = time.perf_counter()
        total, count = torch.zeros((), device=params[0].device), 0
        todo = batches()
        steps = args.epochs * len(todo)
        bar = tqdm(todo, desc=f"epoch {epoch}/{until or args.epochs}", unit="step", disable=None)
        for number_in_epoch, batch in enumerate(bar):
            step = (epoch - 1) * len(todo) + number_in_epoch
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, args.lr, args.schedule)
            loss, items = loss_of(model, batch)
            optimizer.zero_grad()
            loss.backward()
            grad_clipping(params, args.clip)
            optimizer.step()
            if args.average:  # the plain mean at first: a fixed decay would remember the random start
                torch._foreach_lerp_(averaged, [p.detach() for p in params], 1 - min(args.average, step / (step + 10)))
            total += loss.detach() * items
            count += items
            # Asking for a number makes the CPU wait for a GPU: there only now and then.
            if (total.device.type == "cpu" or number_in_epoch % 50 == 49) and not torch.isfinite(total):
                kept = f"{folder / 'best.pt'} keeps epoch {best[0]}" if best else "no epoch was finished"
                place = f"epoch {epoch}, step {number_in_epoch + 1}"
                raise UserError(f"the loss is not finite in {place}; {kept}; try a lower --lr or --clip")
        train_loss = total.item() / count
        seconds = time.perf_counter() - start
        trained = [param.detach().clone() for param in params]
        _assign(params, averaged)  # what is validated and kept is the average
        record = {"epoch": epoch, "train_loss": train_loss, **validate(model), "seconds": seconds}
        if best is None or best_of(record[monitor], best[1]) != best[1]:
            best = [epoch, record[monitor]]
            save_checkpoint(folder / "best.pt", **fixed, epoch=epoch, weights=model.state_dict())
        _assign(params, trained)
        history.append(record)
        save_checkpoint(
            folder / "last.pt",
            task=fixed["task"],
            fixed=fixed,
            options=options,
            history=history,
            best=best,
            weights=model.state_dict(),
            averaged=averaged if args.average else [],
            optimizer=optimizer.state_dict(),
        )
        write_csv(folder / "history.csv", list(history[0]), [list(entry.values()) for entry in history])
        numbers = "  ".join(f"{key} {value:.4f}" for key, value in record.items() if key not in ("epoch", "seconds"))
        line = f"{numbers}  {seconds:.1f} s  {count / seconds:.0f} {unit}/s{'  *' if best[0] == epoch else ''}"
        if bar.disable:
            print(f"epoch {epoch}/{until or args.epochs}  {line}", flush=True)
        else:
            tqdm.write(line)
    content = load_checkpoint(folder / "best.pt", fixed["task"], {"weights": dict})
    load_weights(model, content["weights"], folder / "best.pt")
    return history, best[0]


@torch.no_grad()
def _assign(params, values):
    """Give the parameters these values; nothing to do where they are the parameters themselves."""
    for param, value in zip(params, values, strict=True):
        if param is not value:
            param.copy_(value)


def write_comparison(folder, note, table, content, histories, panels, sample):
    """comparison.md, .json and .png of several structures: a note and a table; content; learning curves as below."""
    stamp, mark = ("Bundled sample: made-up data.\n\n", " (bundled sample)") if sample else ("", "")
    with whole_file(folder / "comparison.md", "w", encoding="utf-8") as stream:
        stream.write(f"{stamp}{note}\n\n{table}\n")
    write_json(folder / "comparison.json", content)
    draw_curves(folder / "comparison.png", histories, {title + mark: columns for title, columns in panels.items()})
    print(f"\n{table}\nwritten to {folder}: comparison.md comparison.json comparison.png", flush=True)


def draw_curves(path, histories, panels):
    """Learning curves: histories {name: list of dicts}; panels {title: {column: line style}}, side by side."""
    figure = Figure(figsize=(5.2 * len(panels), 3.8), layout="constrained")
    for axes, (title, columns) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for index, (name, history) in enumerate(histories.items()):
            epochs = [record["epoch"] for record in history]
            for column, style in columns.items():
                label = column.replace("_", " ") if len(histories) == 1 else name
                color = f"C{index}" if len(histories) > 1 else None
                axes.plot(epochs, [record[column] for record in history], style, label=label, color=color, markersize=3)
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save_figure(path, figure)
