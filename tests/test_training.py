"""What both scripts share: options, rate, average, checkpoints, resuming, folders, pictures."""

import argparse
import json
import math
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys

import matplotlib.figure
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT
from matplotlib import cbook, font_manager
from torch import nn

import plots
import temp_forecast
import text_classify
import training
from datasets import UserError
from training import Run, clear_folder, hold_folder, load_checkpoint, number, save_checkpoint


def options(**changed):
    """The options that Run reads, with plain values."""
    values = {
        "lr": 0.1, "weight_decay": 0.0, "average": 0.0, "clip": 1e9, "epochs": 3, "patience": 0,
        "descent": 0, "seed": 0, "resume": False, "batch_size": 2, "data": "a.csv", "out": "runs",
    }  # fmt: skip
    return argparse.Namespace(**values | changed)


def start(folder, model=None, sha256="0", **changed):
    torch.manual_seed(3)
    config = {"task": "text", "sha256": sha256}
    return Run(options(**changed), folder, config, model or nn.Linear(2, 1))


def train(run, scores=None, steps=3, after=lambda: None, mode="min"):
    """Train on random batches; scores: one an epoch; after: called after each step."""
    for epoch in run.epochs():
        for _ in run.progress(range(steps)):
            X = torch.randn(4, 2)
            run.step((run.model(X) - X.sum(1, keepdim=True)).square().mean())
            after()
        score = scores[epoch - 1] if scores else 1 / epoch
        run.finish_epoch({"other": 0.5, "score": score}, "score", mode)
    return run


class One(nn.Module):
    """A model of one weight w = 1; its loss is slope * w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))


# --- one step, the rate, the average ------------------------------------------------------------


FALL = [12.0, *range(22, 1, -1), 1.2, 1.2]  # of 24: x 12 / 24, then 1 - step / 24, then a twentieth


@pytest.mark.parametrize(
    ("descent", "steps", "expected"),
    [
        (24, 13, [*FALL, 1.2, 1.2]),
        (99, 12, FALL),  # never longer than the run, 2 epochs
        (1, 2, [1.2] * 4),
        (0, 2, [24.0] * 4),
    ],
)
def test_the_rate_rises_in_a_twelfth_and_falls_to_a_twentieth(tmp_path, descent, steps, expected):
    run, rates = start(tmp_path, lr=24.0, epochs=2, descent=descent), []
    train(run, steps=steps, after=lambda: rates.append(run.optimizer.param_groups[0]["lr"]))
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [0.9, 0.8]),  # the gradient stays 3, so Adam moves by the rate, 0.1
        ({"weight_decay": 0.5}, [1 - 0.05 - 0.1, 0.85 - 0.0425 - 0.1]),
        ({"clip": 1e-8}, [0.95, 0.9]),  # as small as Adam's epsilon: half as far
    ],
)
def test_steps_of_adamw_as_by_hand(tmp_path, changed, expected):
    run, w = start(tmp_path, One(), epochs=1, **changed), []
    for _ in run.epochs():
        for _ in run.progress(range(2)):
            run.step(3 * run.model.w.sum())
            w.append(run.model.w.item())
    assert w == pytest.approx(expected)


def test_the_moving_average_as_by_hand(tmp_path):
    run, w = start(tmp_path, One(), average=0.7, epochs=2), [1.0]
    for _ in run.epochs():
        for _ in run.progress(range(7)):
            run.step(w[-1] ** 2 * run.model.w.sum())
            w.append(run.model.w.item())
        run.finish_epoch({"score": 1.0}, "score", "min")
    average = w[5]  # the first time a copy, then every five steps and at the end of each epoch
    average = 1 / 11 * average + 10 / 11 * w[7]
    average = 2 / 12 * average + 10 / 12 * w[10]
    average = 0.7**5 * average + (1 - 0.7**5) * w[14]  # less than 3 / 13
    assert run.averaged.module.w.item() == pytest.approx(average, rel=1e-6)
    assert len(set(w)) == 15


def test_without_averaging_the_average_is_the_model(tmp_path):
    run = train(start(tmp_path))
    assert torch.equal(run.averaged.module.weight, run.model.weight)


# --- epochs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "scores"), [("min", [3, 1, 1, 2, 0, 0]), ("max", [1, 3, 3, 2, 4, 4])]
)
def test_patience_ends_a_run_and_says_so(tmp_path, capsys, mode, scores):
    run = train(start(tmp_path, epochs=6, patience=2), scores, mode=mode)
    assert [record["epoch"] for record in run.history] == [1, 2, 3, 4]  # equal is no better
    assert run.best == {"epoch": 2, "score": scores[1]}
    output = capsys.readouterr().out.splitlines()
    assert "no better validation score for 2 epochs (--patience)" in output[-1]
    assert [line.endswith("*") for line in output] == [True, True, False, False, False]
    assert "other 0.5000  score 2.0000" in output[3]


def test_without_patience_all_epochs_run_and_the_best_is_loaded(tmp_path, capsys):
    weights, run = [], start(tmp_path, epochs=6)
    train(run, [3, 1, 2, 2, 2, 2], after=lambda: weights.append(run.model.weight.tolist()))
    assert len(run.history) == 6 and "patience" not in capsys.readouterr().out
    run.load_best()
    assert run.model.weight.tolist() == weights[5]  # after two epochs of three steps
    assert load_checkpoint(tmp_path / "best.pt", "text")["epoch"] == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_at_any_step(tmp_path, bad):
    for step in range(3):
        run, steps = start(tmp_path, One()), 0
        with pytest.raises(UserError, match=f"epoch 1, step {step + 1}; .*--lr"):
            for _ in run.epochs():
                for batch in run.progress(range(3)):
                    run.step(run.model.w.sum() * (bad if batch == step else 1))
                    steps += 1
        assert steps == step and not list(tmp_path.iterdir())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_ends_the_run(tmp_path, bad):
    with pytest.raises(UserError, match=r"scores of epoch 2 are not finite.*--lr"):
        train(start(tmp_path), [1, bad, 1])
    assert load_checkpoint(tmp_path / "last.pt", "text")["history"][-1]["epoch"] == 1


def test_an_epoch_without_a_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="no batch"):
        train(start(tmp_path), steps=0)


def test_seeds_give_their_own_random_numbers():
    draws = {}
    for numbers in [(0, 1), (1, 0), (1, 1), (1, 1, 0), (1, 1, 1), (2**31, 9), (2**31, 10)]:
        training.seed_all(*numbers)
        draws[numbers] = torch.rand(1).item()
        training.seed_all(*numbers)
        assert torch.rand(1).item() == draws[numbers]
    assert len(set(draws.values())) == len(draws)


def test_metrics_are_written_with_what_the_run_knows(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--data", "\udcff.csv"])  # a path that is no UTF-8
    run = train(start(tmp_path, seed=7), [3, 1, 2])
    for record, seconds in zip(run.history, (1.0, 2.0, 6.0), strict=True):
        record["seconds"] = seconds
    run.write_metrics("gru", {"rows": 5}, {"train": 3}, {"x": 1})
    assert json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8")) == {
        "task": "text", "model": "gru", "seed": 7, "argv": ["--data", "\udcff.csv"],
        "device": "cpu", "torch": torch.__version__, "parameters": 3, "epochs": 3, "best_epoch": 2,
        "seconds_per_epoch": 3.0, "data": {"rows": 5}, "split": {"train": 3}, "test": {"x": 1},
    }  # fmt: skip


# --- resuming -----------------------------------------------------------------------------------

LONG = {"epochs": 4, "average": 0.9, "descent": 13, "weight_decay": 0.1}


def state(run):
    parts = run.model, run.averaged, run.optimizer
    return [part.state_dict() for part in parts], [r["score"] for r in run.history], run.best


def same(a, b):
    """Whether nested values with tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_resumed_run_is_the_run_left_alone_to_the_bit(tmp_path):
    scores = [3, 2, 4, 1]
    alone = train(start(tmp_path / "alone", **LONG), scores, steps=4)
    for last_step in (5, 12, 15):  # in the second, at the end of the third, in the fourth epoch
        folder = tmp_path / str(last_step)
        run = start(folder, **LONG)

        def stop(run=run, last_step=last_step):
            if run.steps == last_step:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train(run, scores, 4, after=stop)
        changed = {"resume": True, "data": "b.csv", "out": "elsewhere"}  # a path may change
        run = start(folder, nn.Linear(2, 1), **LONG | changed)
        assert len(run.history) == (last_step - 1) // 4
        train(run, scores, steps=4)
        assert same(state(run), state(alone))
        for name in ("best.pt", "last.pt"):
            both = [load_checkpoint(path / name, "text") for path in (folder, tmp_path / "alone")]
            for content in both:
                content.pop("history", None)  # it holds seconds
            assert same(*both)


def test_history_is_whole_after_a_kill_between_last_pt_and_history_csv(tmp_path, monkeypatch):
    def kill(*arguments):
        raise KeyboardInterrupt

    run = start(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(
            run, after=lambda: run.steps == 7 and monkeypatch.setattr(training, "write_csv", kill)
        )
    monkeypatch.undo()
    assert len(pd.read_csv(tmp_path / "history.csv")) == 2
    run = train(start(tmp_path, resume=True))
    run.load_best()
    history = pd.read_csv(tmp_path / "history.csv")
    assert list(history) == ["epoch", "other", "score", "seconds"]
    assert history["score"].tolist() == pytest.approx([1, 1 / 2, 1 / 3])


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"lr": 0.2}, "--lr"), ({"batch_size": 3}, "--batch-size"), ({"sha256": "1"}, "the data")],
)
def test_resume_refuses_other_options_and_other_data(tmp_path, changed, named):
    train(start(tmp_path))
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(UserError, match=f"began with another value of {named};"):
        start(tmp_path, resume=True, **changed)
    assert (tmp_path / "last.pt").read_bytes() == before


PARTS = ["options", "history", "best", "steps", "weights", "averaged", "optimizer", "config"]


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *[(part, value) for part in PARTS for value in ("x", "absent")],
        ("history", [{"epoch": 2, "score": 1.0, "seconds": 1.0}]),
        ("best", {"epoch": 0, "score": 1.0}),
        ("best", {"epoch": 9, "score": 1.0}),
    ],
)
def test_resume_refuses_a_checkpoint_with_a_wrong_part(tmp_path, part, value):
    with pytest.raises(UserError):
        train(start(tmp_path, patience=2), [1, math.nan])
    content = torch.load(tmp_path / "last.pt") | {part: value}
    if value == "absent":
        del content[part]
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt does not fit|another value of (the data|--lr)"):
        train(start(tmp_path, resume=True, patience=2))


def test_resume_refuses_weights_that_are_not_finite(tmp_path):
    train(start(tmp_path))
    content = torch.load(tmp_path / "last.pt")
    content["weights"]["bias"].fill_(math.nan)
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match="not finite"):
        start(tmp_path, resume=True)


# --- a run's folder and its files ---------------------------------------------------------------

FILES = ["metrics.json", "history.csv", "predictions.csv", "best.pt", "last.pt", "confusion.png",
         "forecasts.png", "comparison.json", "comparison.md", "curves.png"]  # fmt: skip


@pytest.mark.parametrize("resume", [False, True])  # without a last.pt --resume begins anew
def test_a_run_removes_old_results_and_nothing_else(tmp_path, resume):
    for name in [*FILES, ".best.pt.k2_x.part", "notes.txt", "holiday.png", "my.part"]:
        if not (resume and name == "last.pt"):
            (tmp_path / name).write_text("old")
    start(tmp_path, resume=resume)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "holiday.png", "my.part"}


def test_a_resumed_run_keeps_its_results_and_removes_half_files(tmp_path):
    train(start(tmp_path))
    files = sorted(tmp_path.iterdir())
    (tmp_path / ".last.pt.abc.part").write_text("half")
    start(tmp_path, resume=True)
    assert sorted(tmp_path.iterdir()) == files


def test_a_result_that_cannot_be_removed_is_named(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(UserError, match=r"cannot replace .*metrics.json"):
        clear_folder(tmp_path)


def test_a_folder_is_held_by_one_process_until_it_ends(tmp_path):
    code = "import sys, pathlib, training\nlock = training.hold_folder(pathlib.Path(sys.argv[1]))\n"
    command = [sys.executable, "-c", code + "print('held', flush=True)\ninput()", tmp_path / "a"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another run writes into"):
            hold_folder(tmp_path / "a")
        other.kill()
    hold_folder(tmp_path / "a").close()


def test_a_folder_is_held_within_one_process(tmp_path):
    lock = hold_folder(tmp_path / "new" / "run")
    with pytest.raises(UserError, match="another run writes into"):
        hold_folder(tmp_path / "new" / "run")
    lock.close()
    hold_folder(tmp_path / "new" / "run").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write into .*--out"):
        hold_folder(tmp_path / "file")


def test_a_flipped_bit_in_a_checkpoint_changes_nothing_unseen(tmp_path):
    weights = {"w": torch.randn(40, 40)}
    path = tmp_path / "best.pt"
    save_checkpoint(path, task="text", weights=weights, labels=["a", "b"])
    content, whole = path.read_bytes(), load_checkpoint(path, "text")
    data = content.find(weights["w"].numpy().tobytes())
    assert data > 0
    chance, refused = random.Random(0), 0
    inside = [chance.randrange(data, data + 6400) for _ in range(60)]
    for position in inside + [chance.randrange(len(content)) for _ in range(60)]:
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path, "text")
        except UserError as error:
            assert "\n" not in str(error) and "best.pt" in str(error)
            refused += 1
        else:  # padding between the parts
            assert same(loaded, whole) and position not in inside
    assert refused >= 60


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, task="text", value=1)

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(path, task="text", value=2)
    assert load_checkpoint(path, "text")["value"] == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_spreadsheet_runs_no_cell(tmp_path):
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\r=1", "好", "a=b", "1-1", ""]
    training.write_csv(tmp_path / "x.csv", ["text", "number"], [(text, -1.5) for text in texts])
    frame = pd.read_csv(tmp_path / "x.csv", keep_default_na=False)
    assert frame["text"].tolist() == ["'" + text for text in texts[:7]] + texts[7:]
    assert frame["number"].tolist() == [-1.5] * 11


def test_json_of_any_path_is_valid(tmp_path):
    content = {"path": "a\udcff\\udc80", "中": [1.5, None]}
    training.write_json(tmp_path / "x.json", content)
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text) == content and "中" in text
    with pytest.raises(ValueError):  # NaN is no JSON
        training.write_json(tmp_path / "y.json", {"x": math.nan})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_comparison_is_written_and_printed(tmp_path, capsys):
    rows = [
        {"model": "RNN", "mean_error": 0.91, "steps": 12345},
        {"model": "GRU", "mean_error": 2.5},
    ]
    training.write_comparison(tmp_path / "all", rows, {"k": 1}, "Note.")
    table = """Note.

| model | mean error | steps |
| --- | --- | --- |
| RNN | 0.9100 | 12345 |
| GRU | 2.500 |  |
"""
    assert (tmp_path / "all" / "comparison.md").read_text() == table
    assert json.loads((tmp_path / "all" / "comparison.json").read_text()) == {"k": 1}
    assert table in capsys.readouterr().out


def test_histories_become_panels_with_a_curve_for_each_structure():
    histories = {"rnn": [{"a": 1, "b": 0}, {"a": 2, "b": 0}], "bilstm": [{"a": 3, "b": 0}]}
    panels = training.history_panels(histories, {"title": "a"})
    assert panels == {"title": {"RNN": [1, 2], "Bi-LSTM": [3]}}


# --- options and device -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text", ["", " ", "0", "3.5", "11", "1e3", "nan", "inf", "-inf", "one", "²"]
)
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a whole number from 1 to 10$"):
        number(int, 1, 10)(text)


def test_numbers_within_range_and_its_ends_are_taken():
    assert [number(int, 1, 10)(text) for text in ("1", "10", " 7 ")] == [1, 10, 7]
    assert [number(float, 0, 0.5)(text) for text in ("0", "0.5", "1e-3")] == [0, 0.5, 0.001]
    with pytest.raises(argparse.ArgumentTypeError, match=r"is not a number from 0 to 0.5$"):
        number(float, 0, 0.5)("0.51")


def test_a_preset_wins_over_defaults_and_loses_to_options():
    parse = text_classify.parse_args
    plain, lab = parse([]), parse(["--preset", "lab"])
    assert (lab.tokens, lab.pool, lab.lr, lab.average) == ("word", "last", 1e-3, 0)
    assert (lab.hidden, lab.seed) == (plain.hidden, plain.seed)
    own = parse(["--tokens", plain.tokens, "--preset", "lab", "--lr", "0.5"])
    assert (own.tokens, own.lr, own.pool) == (plain.tokens, 0.5, "last")


@pytest.mark.parametrize("script", [text_classify, temp_forecast], ids=["text", "temp"])
def test_help_shows_every_default(script, capsys):
    with pytest.raises(SystemExit) as stop:
        script.parse_args(["--help"])
    assert stop.value.code == 0
    listed = capsys.readouterr().out.partition("\noptions:")[2]
    parts = re.split(r"\n  (?=-)", listed)[2:]  # without --help
    shown = {re.match("--([a-z-]+)", part)[1]: " ".join(part.split()) for part in parts}
    defaults = vars(script.parse_args([]))
    assert {name.replace("-", "_") for name in shown} == set(defaults)
    for name, text in shown.items():
        default = defaults[name.replace("-", "_")]
        if default is None or default is False:
            assert "default" not in text
        else:
            assert text.endswith(f"(default: {default})")


@pytest.mark.parametrize(
    ("cuda", "program", "lines"),
    [(None, "nvidia-smi", 1), (None, None, 0), ("13.0", "nvidia-smi", 0)],
)
def test_an_unused_nvidia_card_is_announced(monkeypatch, capsys, cuda, program, lines):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: program if name == program else None)
    assert training.pick_device("auto") == torch.device("cpu")
    error = capsys.readouterr().err
    assert error.count("NVIDIA card is not used") == error.count("\n") == lines
    assert training.pick_device("cpu") == torch.device("cpu")
    assert capsys.readouterr() == ("", "")


def test_devices_that_are_there_are_taken_and_others_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert training.pick_device("auto") == torch.device("cuda", 0)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert training.pick_device("auto") == torch.device("cuda", 1)
    assert training.pick_device("cuda:1").index == 1 and training.pick_device("cuda").type == "cuda"
    with pytest.raises(UserError, match="this machine has 2 GPUs"):
        training.pick_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="this machine has 0 GPUs"):
        training.pick_device("cuda")


# --- the way out --------------------------------------------------------------------------------


def fail(error):
    def main(*arguments, **options):
        raise error

    return main


@pytest.mark.parametrize(
    ("main", "status", "words"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), 2, "--batch-size"),
        (lambda: np.empty(2**60, np.uint8), 2, "--batch-size"),
        (fail(torch.OutOfMemoryError("CUDA out of memory")), 2, "--batch-size"),
        (
            fail(RuntimeError("DefaultCPUAllocator: not enough memory: you tried")),
            2,
            "--batch-size",
        ),
        (fail(UserError("a\nb\tc")), 2, "error: a b c\n"),
        (fail(KeyboardInterrupt()), 130, "--resume"),
    ],
    ids=["torch", "numpy", "gpu", "torch on Windows", "a mistake", "Ctrl-C"],
)
def test_what_a_user_can_mend_ends_with_one_line(main, status, words, capsys):
    with pytest.raises(SystemExit) as stop:
        training.run_script(main)
    error = capsys.readouterr().err
    assert stop.value.code == status and words in error and error.count("\n") == 1


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="shapes"):
        training.run_script(fail(RuntimeError("shapes do not fit")))
    training.run_script(lambda: None)


def test_a_reader_that_has_seen_enough_ends_the_script_quietly(tmp_path, monkeypatch, capsys):
    with open(tmp_path / "out", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        training.run_script(fail(BrokenPipeError()))
        print("what was still to print")
    monkeypatch.undo()
    assert (tmp_path / "out").read_text() == "" and capsys.readouterr().err == ""


# --- two processes ------------------------------------------------------------------------------

# Gradients as small as Adam's epsilon: only so do their mean and its norm show in the weights.
CLIP = 3e-8
ONE_OF_TWO = """
import argparse, pathlib, sys, torch, training
folder = pathlib.Path(sys.argv[1])
training.join_processes(torch.device("cpu"))
rank, written, whole_file = torch.distributed.get_rank(), [], training.whole_file
training.whole_file = lambda path, *a, **k: written.append(str(path)) or whole_file(path, *a, **k)
batches, args = torch.load(folder / "batches.pt"), torch.load(folder / "args.pt")
lock = training.hold_folder(folder / "run")
torch.manual_seed(3)
config = {"task": "text", "sha256": "0"}
run = training.Run(argparse.Namespace(**args), folder / "run", config, torch.nn.Linear(2, 1))
for epoch in run.epochs():
    for X in run.progress(batches):
        run.step(1e-8 * (run.model(X) - X.prod(1, keepdim=True)).square().mean())
    drawn = torch.rand(1).item()
    run.finish_epoch({"score": 1.0 + rank - epoch}, "score", "min")
result = {"weight": run.model.weight.detach().clone(), "drawn": drawn, "history": run.history}
run.load_best()
print("process", rank)
torch.save(result | {"written": written, "locked": lock is not None}, folder / f"{rank}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """What two processes found that trained together; their batches."""
    folder = tmp_path_factory.mktemp("two")
    batches = list(torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(5)))
    torch.save(batches, folder / "batches.pt")
    torch.save(vars(options(epochs=2, clip=CLIP)), folder / "args.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-c", ONE_OF_TWO, folder]
    processes = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, text=True,
            env=os.environ | where | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in (0, 1)
    ]  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    return [torch.load(folder / f"{r}.pt") | {"output": outputs[r]} for r in (0, 1)], batches


gloo = pytest.mark.skipif(os.name == "nt", reason="torch for Windows starts gloo in another way")


@gloo
def test_two_processes_train_as_one_that_saw_both_batches(two):
    results, batches = two
    torch.manual_seed(3)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1, weight_decay=0)
    norms = []
    for pair in [batches[0:2], batches[2:4]] * 2:  # the fifth has no partner
        X = torch.cat(pair)
        optimizer.zero_grad()
        (1e-8 * (model(X) - X.prod(1, keepdim=True)).square().mean()).backward()
        gradient = torch.cat([param.grad.flatten() for param in model.parameters()])
        norms.append(gradient.norm().item())
        for param in model.parameters():
            param.grad *= min(1, CLIP / norms[-1])
        optimizer.step()
    assert min(norms) < CLIP < max(norms)
    for result in results:
        torch.testing.assert_close(result["weight"], model.weight.detach(), rtol=1e-4, atol=1e-6)
        assert [record["score"] for record in result["history"]] == [0, -1]  # the first one's
    assert results[0]["drawn"] != results[1]["drawn"]


@gloo
def test_only_the_first_process_locks_writes_and_prints(two):
    first, second = two[0]
    assert first["locked"] and first["written"] and first["output"].endswith("process 0\n")
    assert not second["locked"] and second["written"] == [] and second["output"] == ""


# --- pictures -----------------------------------------------------------------------------------


def drawn(monkeypatch, path, draw, *arguments):
    """The matplotlib figure that draw(path, ...) saves."""
    figures, save = [], matplotlib.figure.Figure.savefig
    with monkeypatch.context() as patch:
        patch.setattr(
            matplotlib.figure.Figure, "savefig",
            lambda self, *args, **kw: [figures.append(self), save(self, *args, **kw)],
        )  # fmt: skip
        draw(path, *arguments)
    return figures[0]


def png_size(path):
    return struct.unpack(">II", path.read_bytes()[16:24])


def test_a_picture_that_fails_costs_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail(ValueError("first\nsecond")))
    plots.draw_curves(tmp_path / "curves.png", {"loss": {"training": [1.0, 2.0]}})
    plots.draw_confusion(tmp_path / "confusion.png", "no matrix", ["a"], "")
    output = capsys.readouterr()
    assert output.out == "" and not list(tmp_path.iterdir())
    assert [line.split()[1:2] for line in output.err.splitlines()] == [
        [str(tmp_path / "curves.png")], [str(tmp_path / "confusion.png")]
    ]  # fmt: skip


@pytest.mark.parametrize("classes", [2, 30, 31, 300])
def test_a_confusion_matrix_of_any_size_is_a_small_picture(tmp_path, monkeypatch, classes):
    path, names = tmp_path / "c.png", [f"c{i}" for i in range(classes)]
    matrix = np.eye(classes, dtype=int) * 3
    figure = drawn(monkeypatch, path, plots.draw_confusion, matrix, names, "title")
    shown = [text.get_text() for text in figure.axes[0].texts]
    assert shown == ["3"] * (classes if classes <= 30 else 0)
    labels = [text.get_text() for text in figure.axes[0].get_xticklabels()]
    assert (labels == names) == (classes <= 30)
    assert max(png_size(path)) < 2000 and path.stat().st_size < 500_000


def test_a_dollar_in_a_label_is_a_dollar_sign(tmp_path, monkeypatch):
    names, matrix = ["a$b$", "5$", r"\$\frac$"], np.array([[1, 2, 0], [0, 3, 0], [4, 0, 5]])
    figure = drawn(monkeypatch, tmp_path / "c.png", plots.draw_confusion, matrix, names, "")
    for labels in (figure.axes[0].get_xticklabels(), figure.axes[0].get_yticklabels()):
        texts = [label.get_text() for label in labels]
        assert not any(map(cbook.is_math_text, texts))
        assert [text.replace(r"\$", "$") for text in texts] == names
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert cells == {(0, 0): "1", (1, 0): "2", (1, 1): "3", (0, 2): "4", (2, 2): "5"}  # truth down


def test_without_a_chinese_font_labels_are_english(monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert plots.label_font(["书籍", "a$", "别的"]) == (["books", r"a\$", "class 3"], None)


def lines(axes):
    """The lines of a diagram by their labels: (x, y) as lists."""
    return {line.get_label(): line.get_xydata().T.tolist() for line in axes.get_lines()}


def test_curves_begin_with_epoch_1(tmp_path, monkeypatch):
    panels = {"loss": {"training": [3, 2], "validation": [4, 5]}, "F1": {"RNN": [0.5]}}
    figure = drawn(monkeypatch, tmp_path / "c.png", plots.draw_curves, panels)
    assert [axes.get_title() for axes in figure.axes] == ["loss", "F1"]
    assert lines(figure.axes[0]) == {"training": [[1, 2], [3, 2]], "validation": [[1, 2], [4, 5]]}
    assert lines(figure.axes[1]) == {"RNN": [[1], [0.5]]}


def test_gradients_begin_at_the_end_of_the_text(tmp_path, monkeypatch):
    reach = {"RNN": [1, 0.5], "GRU": [1, 0.9]}
    figure = drawn(monkeypatch, tmp_path / "c.png", plots.draw_gradients, reach, "title")
    assert lines(figure.axes[0]) == {"RNN": [[0, 1], [1, 0.5]], "GRU": [[0, 1], [1, 0.9]]}
    assert figure.axes[0].get_yscale() == "log"


def test_lead_time_shows_mean_and_median_over_windows(tmp_path, monkeypatch):
    errors = {"LSTM": np.array([[1, 5], [2, 5], [6, 11.0]])}
    figure = drawn(monkeypatch, tmp_path / "c.png", plots.draw_lead_time, [1, 2], errors, "error")
    assert [lines(axes) for axes in figure.axes] == [
        {"LSTM": [[1, 2], [3, 7]]},
        {"LSTM": [[1, 2], [2, 5]]},
    ]
    assert [axes.get_title() for axes in figure.axes] == ["mean error", "median error"]


def test_a_forecast_is_drawn_over_the_last_steps(tmp_path, monkeypatch):
    index, truth = pd.date_range("2015-01-01", periods=7, freq="D"), np.arange(7.0)
    forecast = np.array([8.0, 9.0])
    window = {"index": index, "truth": truth, "forecast": forecast, "low": forecast - 1,
              "high": forecast + 2, "steps_a_day": 1, "error": 3.0}  # fmt: skip
    figure = drawn(monkeypatch, tmp_path / "c.png", plots.draw_forecasts, [window] * 2, "title")
    assert len(figure.axes) == 6
    for axes in figure.axes[:2]:
        x, shown = [line.get_xdata() for line in axes.get_lines()], lines(axes)
        assert list(x[0]) == list(index) and list(x[1]) == list(index[5:]) and x[2][0] == index[5]
        assert shown["truth"][1] == truth.tolist() and shown["forecast"][1] == [8, 9]
        band = axes.collections[0].get_paths()[0].vertices[:, 1]
        assert set(band.tolist()) == {7, 8, 10, 11}
        assert axes.get_title() == "2015-01-06: mean error 3.00 degC"
