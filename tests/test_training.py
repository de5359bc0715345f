"""What both scripts share: options, rate, average, checkpoints, resuming, folders, pictures."""

import argparse
import contextlib
import math
import os
import random
import re
import shutil
import socket
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import read_json
from matplotlib import font_manager
from matplotlib.figure import Figure
from torch import nn

import plots
import temp_forecast
import text_classify
import training
from datasets import UserError
from training import Run, load_checkpoint, save_checkpoint


def start(folder, model=None, sha256="0", **changed):
    """A run of a small model, by default with a constant rate and without an average."""
    torch.manual_seed(3)
    config = {"task": "text", "options": {"model": "rnn"}, "sha256": sha256}
    options = {
        "lr": 0.1, "weight_decay": 0.0, "average": 0.0, "clip": 1e9, "epochs": 3, "patience": 0,
        "descent": 0, "seed": 0, "resume": False, "batch_size": 2, "data": "a.csv", "out": "runs",
    }  # fmt: skip
    return Run(argparse.Namespace(**options | changed), folder, config, model or nn.Linear(2, 1))


def random_loss(model, batch):
    X = torch.randn(4, 2)
    return (model(X) - X.sum(1, keepdim=True)).square().mean()


def train(run, scores=None, batches=range(3), mode="min", loss=random_loss, after=lambda: None):
    """Train and return the run. scores: one an epoch; after: called after each step."""
    for epoch in run.epochs():
        for batch in run.progress(batches):
            run.step(loss(run.model, batch))
            after()
        score = scores[epoch - 1] if scores else 1 / epoch
        run.finish_epoch({"other": 0.5, "score": score}, "score", mode)
    return run


def train_one_weight(run, steps, gradient):
    """Train a weight w = 1 on the losses gradient(step) w; returns w after each step."""
    found = []

    def loss(model, step):
        return gradient(step) * model[0]

    train(run, batches=range(steps), loss=loss, after=lambda: found.append(run.model[0].item()))
    return found


def one_weight():
    return nn.ParameterList([torch.ones(1)])


def names(folder):
    return {path.name for path in folder.iterdir()}


def fail(error):
    def function(*arguments, **options):
        raise error

    return function


FALL = [12.0, *range(22, 1, -1), 1.2, 1.2]  # of 24: x 12 / 24, then 1 - step / 24, then a twentieth


@pytest.mark.parametrize(
    ("descent", "steps", "expected"),
    [(24, 13, [*FALL, 1.2, 1.2]), (99, 12, FALL), (1, 2, [1.2] * 4), (0, 2, [24.0] * 4)],
)  # 99: never longer than the run, 2 epochs
def test_the_rate_rises_then_falls_to_a_twentieth(tmp_path, descent, steps, expected):
    run, rates = start(tmp_path, lr=24.0, epochs=2, descent=descent), []
    (group,) = run.optimizer.param_groups
    train(run, batches=range(steps), after=lambda: rates.append(group["lr"]))
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
    run = start(tmp_path, one_weight(), epochs=1, **changed)
    assert train_one_weight(run, 2, lambda step: 3) == pytest.approx(expected)
    assert run.averaged.module[0].item() == run.model[0].item()  # --average 0


def test_the_moving_average_as_by_hand(tmp_path):
    run = start(tmp_path, one_weight(), average=0.7, epochs=2)
    w = [1.0, *train_one_weight(run, 7, lambda step: (step + 1) ** 2)]
    average = w[5]  # the first time a copy, then every five steps and at the end of each epoch
    average = 1 / 11 * average + 10 / 11 * w[7]
    average = 2 / 12 * average + 10 / 12 * w[10]
    average = 0.7**5 * average + (1 - 0.7**5) * w[14]  # less than 3 / 13
    assert run.averaged.module[0].item() == pytest.approx(average, rel=1e-6)


@pytest.mark.parametrize(("mode", "scores"), [("min", [3, 1, 1, 2]), ("max", [1, 3, 3, 2])])
def test_patience_ends_a_run_and_the_best_weights_are_loaded(tmp_path, capsys, mode, scores):
    weights, run = [], start(tmp_path, epochs=6, patience=2)
    train(run, scores, mode=mode, after=lambda: weights.append(run.model.weight.tolist()))
    assert [record["epoch"] for record in run.history] == [1, 2, 3, 4]  # equal is no better
    output = capsys.readouterr().out.splitlines()[2:]
    assert [line.endswith("*") for line in output] == [True, True, False, False, False]
    assert "score 2.0000" in output[3] and "--patience" in output[4]
    run.load_best()
    assert run.model.weight.tolist() == weights[5]  # after two epochs of three steps
    metrics, seconds = run.write_metrics("gru", {}, {}, {}), [r["seconds"] for r in run.history]
    assert metrics["best_epoch"] == 2
    assert metrics["seconds_per_epoch"] == pytest.approx(np.mean(seconds))


def test_a_run_without_finite_numbers_or_batches_ends(tmp_path):
    run = start(tmp_path, one_weight())
    with pytest.raises(UserError, match=r"loss is not finite in epoch 2, step 2; .*--lr"):
        train_one_weight(run, 3, lambda step: 1 if run.steps < 4 else -math.inf)
    assert run.steps == 4 and run.model[0].isfinite()
    with pytest.raises(UserError, match=r"scores of epoch 2 are not finite.*--lr"):
        train(start(tmp_path), [1, math.nan, 1])
    assert len(load_checkpoint(tmp_path / "last.pt", "text")["history"]) == 1
    with pytest.raises(UserError, match=r"weights of epoch 1 are not finite.*--lr"):
        train(start(tmp_path, lr=1e30, weight_decay=1e30), batches=range(1))
    with pytest.raises(UserError, match="no batch"):
        train(start(tmp_path), batches=[])


def test_every_seed_and_epoch_draws_its_own_random_numbers(tmp_path):
    runs = [start(tmp_path, seed=seed) for seed in (0, 1, 2**31)]
    draws = [torch.rand(1).item() for run in runs for _ in run.epochs()]
    assert len(set(draws)) == len(draws) == 9


def test_a_run_killed_while_an_epoch_is_saved_repeats_it(tmp_path, monkeypatch):
    kill, run = fail(KeyboardInterrupt()), start(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        train(run, after=lambda: run.steps == 7 and patch.setattr(training, "write_csv", kill))
    assert len(pd.read_csv(tmp_path / "history.csv")) == 2
    moved = {"data": "b.csv", "out": "elsewhere"}  # a path may change
    train(start(tmp_path, resume=True, **moved))
    history = pd.read_csv(tmp_path / "history.csv")
    assert list(history) == ["epoch", "other", "score", "seconds"]
    assert history["score"].tolist() == pytest.approx([1, 1 / 2, 1 / 3])


def test_resume_refuses_other_options_other_data_and_wrong_parts(tmp_path):
    train(start(tmp_path))
    last = torch.load(tmp_path / "last.pt")
    changes = {"--lr": {"lr": 0.2}, "--batch-size": {"batch_size": 3}, "the data": {"sha256": "1"}}
    for name, changed in changes.items():
        with pytest.raises(UserError, match=f"another value of {name};"):
            start(tmp_path, resume=True, **changed)
    for part in ("options", "averaged", "optimizer", "weights"):
        torch.save(last | {part: "x"}, tmp_path / "last.pt")
        with pytest.raises(UserError, match=r"last\.pt does not fit .* train again"):
            start(tmp_path, resume=True)


def test_a_new_run_removes_old_results_and_a_resumed_one_half_files(tmp_path):
    old = ["metrics.json", "history.csv", "predictions.csv", "best.pt", "last.pt",
           "comparison.json", "comparison.png", "gradients.png", "curves.png", "confusion.png",
           "forecasts.png", "lead_time.png", ".best.pt.k2_x.part"]  # fmt: skip
    own = {"notes.txt", "holiday.png", "my.part"}
    for name in [*old, *own]:
        (tmp_path / name).write_text("old")
    run = start(tmp_path)
    assert names(tmp_path) == own
    train(run)
    results = names(tmp_path)
    (tmp_path / ".last.pt.abc.part").write_text("half")
    start(tmp_path, resume=True)
    assert names(tmp_path) == results
    (tmp_path / "last.pt").unlink()
    start(tmp_path, resume=True)  # begins anew
    assert names(tmp_path) == own
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(UserError, match=r"cannot replace .*metrics.json"):
        start(tmp_path)


def test_a_flipped_bit_in_a_checkpoint_changes_nothing_unseen(tmp_path):
    path, weights = tmp_path / "best.pt", torch.randn(40, 40)
    save_checkpoint(path, task="text", weights=weights, labels=["a", "b"])
    content, chance = path.read_bytes(), random.Random(0)
    for position in chance.sample(range(len(content)), 120):
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path, "text")
        except UserError as error:
            assert "\n" not in str(error) and "best.pt" in str(error)
        else:  # padding between the parts
            assert torch.equal(loaded["weights"], weights) and loaded["labels"] == ["a", "b"]


def test_a_preset_wins_over_defaults_and_loses_to_options():
    parse = text_classify.parse_args
    plain, lab = parse([]), parse(["--preset", "lab"])
    assert (lab.tokens, lab.lr, lab.average, lab.hidden) == ("word", 1e-3, 0, plain.hidden)
    own = parse(["--tokens", plain.tokens, "--preset", "lab", "--lr", "0.5"])
    assert (own.tokens, own.lr, own.average) == (plain.tokens, 0.5, 0)


@pytest.mark.parametrize("script", [text_classify, temp_forecast], ids=["text", "temp"])
def test_help_shows_every_default(script, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    defaults = [value for value in vars(script.parse_args([])).values() if value is not None]
    shown = [str(value) for value in defaults if value is not False]
    assert re.findall(r"\(default: (.*?)\)", text) == shown


def test_devices_that_are_there_are_taken_and_others_refused(monkeypatch, capsys):
    pick = training.pick_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick("auto") == torch.device("cuda", 0) and pick("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick("auto") == pick("cuda:1") == torch.device("cuda", 1)
    for count, name in ((2, "cuda:2"), (0, "cuda")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        with pytest.raises(UserError, match=f"this machine has {count} GPUs"):
            pick(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, program, announced in [(None, "x", True), (None, None, False), ("13", "x", False)]:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(shutil, "which", {"nvidia-smi": program}.get)
        assert pick("auto") == torch.device("cpu")
        assert ("NVIDIA card is not used" in capsys.readouterr().err) == announced


@pytest.mark.parametrize(
    ("main", "status", "words"),
    [
        (lambda: torch.empty(2**60, dtype=torch.uint8), 2, "--batch-size"),
        (lambda: np.empty(2**60, np.uint8), 2, "--batch-size"),
        (fail(torch.OutOfMemoryError("CUDA out of memory")), 2, "--batch-size"),
        (fail(RuntimeError("DefaultCPUAllocator: not enough memory")), 2, "--batch-size"),
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


def test_a_path_that_is_no_utf8_ends_nothing_and_other_errors_are_not_hidden(tmp_path, capsys):
    path = os.fsdecode(b"\xd6\xd0.csv")  # GB18030
    training.write_json(tmp_path / "x.json", {"path": path})
    assert read_json(tmp_path / "x.json") == {"path": path}
    training.run_script(lambda: print(path))
    assert ".csv" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="shapes"):
        training.run_script(fail(RuntimeError("shapes do not fit")))


def test_a_reader_that_has_gone_ends_a_prediction_quietly_and_a_training_with_a_line(
    tmp_path, monkeypatch, capsys
):
    for arguments, error in ([["--predict=x"], ""], [["--epochs", "3"], "--resume"]):
        with open(tmp_path / "out", "w") as stream, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "argv", ["script", *arguments])
            with pytest.raises(SystemExit) if error else contextlib.nullcontext() as stop:
                training.run_script(fail(BrokenPipeError()))
            print("what was still to print")
        output = capsys.readouterr().err
        assert (
            (tmp_path / "out").read_text() == "" and error in output and bool(output) == bool(error)
        )
    assert stop.value.code == 2


def test_a_table_with_any_text_is_read_back(tmp_path):
    texts = ["a\rb", "a\nb", 'a,"b"', "NA"]
    training.write_csv(tmp_path / "x.csv", pd.DataFrame({"text": texts}))
    found = pd.read_csv(tmp_path / "x.csv", keep_default_na=False)
    assert found["text"].tolist() == texts


def test_a_rerun_of_all_four_leaves_nothing_old(tmp_path):
    files = [tmp_path / f"text_{name}" / "last.pt" for name in ("rnn", "bilstm")]
    comparison = tmp_path / "text_all" / "comparison.json"
    for model, resume, left in (("rnn", False, [files[1], comparison]), ("all", True, files),
                                ("all", False, [])):  # fmt: skip
        for path in (*files, comparison):
            path.parent.mkdir(exist_ok=True)
            path.write_text("old")
        args = argparse.Namespace(model=model, resume=resume, out=tmp_path)
        expected = list(training.NAMES) if model == "all" else ["rnn"]
        assert training.chosen(args, "text") == expected
        assert [path for path in (*files, comparison) if path.exists()] == left


def test_a_best_checkpoint_of_another_epoch_is_refused(tmp_path):
    run = train(start(tmp_path))
    torch.save(torch.load(tmp_path / "best.pt") | {"epoch": 1}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="another epoch"):
        run.load_best()


# Gradients as small as Adam's epsilon: only so do their mean and its norm, in some steps above CLIP
# and in some below, show in the weights.
CLIP = 3e-8
BATCHES = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(5))


def tiny_loss(model, X):
    return 1e-8 * (model(X) - X.prod(1, keepdim=True)).square().mean()


def one_of_two(rank, folder, port):
    """What one of two processes does; it keeps what it found in a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "OMP_NUM_THREADS": "1"}
    training.join_processes(torch.device("cpu"))
    with training.hold_folder(folder / f"run_{rank}"):
        run = start(folder / f"run_{rank}", clip=CLIP)
        train(run, [rank + 3, rank + 2, rank + 1], list(BATCHES), loss=tiny_loss)
        drawn = torch.rand(1).item()
        with pytest.raises(UserError, match="different data, options or finished epochs"):
            start(folder / f"run_{rank}", clip=CLIP, resume=True)  # the second has no folder
    print("process", rank, flush=True)
    found = {"weights": run.model.state_dict(), "drawn": drawn}
    torch.save(found | {"scores": [record["score"] for record in run.history]}, folder / f"{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="torch for Windows starts gloo in another way")
def test_two_processes_train_as_one_and_only_the_first_writes_and_prints(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (tmp_path, port), nprocs=2)
    first, second = [torch.load(tmp_path / name) for name in ("0", "1")]
    assert names(tmp_path) == {"0", "1", "run_0"}
    assert {"best.pt", "last.pt", "history.csv"} <= names(tmp_path / "run_0")
    output = capfd.readouterr().out
    assert output.count("epoch") == 3 and output.endswith("process 0\n")
    assert first["drawn"] != second["drawn"]
    assert first["scores"] == second["scores"] == [3, 2, 1]  # the first one's

    alone = start(tmp_path / "alone", clip=CLIP)  # the fifth batch has no partner
    train(alone, batches=list(BATCHES[:4].reshape(2, 8, 2)), loss=tiny_loss)
    for found in (first, second):
        torch.testing.assert_close(found["weights"], alone.model.state_dict(), rtol=1e-4, atol=1e-6)


def drawn(draw, *arguments):
    """The axes that a function of plots draws, without its file."""
    figure = Figure()
    draw.__wrapped__(figure, *arguments)
    return figure.axes


HISTORIES = {"rnn": [{"a": 1, "b": 2}, {"a": 3, "b": 4}], "bilstm": [{"a": 5, "b": 6}]}
PANELS = training.history_panels(HISTORIES, {"loss": "a", "F1": "b"})
ERRORS = {"LSTM": np.array([[1, 5], [2, 5], [6, 11.0]])}  # three windows, two hours
WINDOW = {"index": pd.date_range("1970-01-01", periods=5), "truth": [0, 1, 2, 3, 4], "error": 3,
          "forecast": [8, 9], "low": [7, 8], "high": [9, 10], "steps_a_day": 1}  # fmt: skip
LINES = [  # what is drawn, and x and y of the lines by their names, on each axes
    (plots.draw_curves, [PANELS], [{"RNN": [[1, 2], [1, 3]], "Bi-LSTM": [[1], [5]]},
                                   {"RNN": [[1, 2], [2, 4]], "Bi-LSTM": [[1], [6]]}]),
    (plots.draw_gradients, [{"RNN": [1, 0.5]}, ""], [{"RNN": [[0, 1], [1, 0.5]]}]),
    (plots.draw_lead_time, [[1, 2], ERRORS, ""],  # mean and median
     [{"LSTM": [[1, 2], [3, 7]]}, {"LSTM": [[1, 2], [2, 5]]}]),
    (plots.draw_forecasts, [[WINDOW], ""],
     [{"truth": [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]], "forecast": [[3, 4], [8, 9]]}]),
]  # fmt: skip


@pytest.mark.parametrize(("draw", "arguments", "expected"), LINES)
def test_the_lines_of_a_diagram(draw, arguments, expected):
    for axes, lines in zip(drawn(draw, *arguments), expected, strict=False):
        found = {line.get_label(): line.get_xydata().T.tolist() for line in axes.get_lines()}
        assert {name: xy for name, xy in found.items() if name[0] != "_"} == lines


def test_a_confusion_matrix_has_truth_down_and_names_with_dollar_signs(monkeypatch):
    classes, matrix = ["a$b$", "5$", r"\$\frac$"], np.array([[1, 2, 0], [0, 3, 0], [4, 0, 5]])
    axes = drawn(plots.draw_confusion, matrix, classes, "")[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == [r"a\$b\$", r"5\$", r"\\$\frac\$"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "1", (1, 0): "2", (1, 1): "3", (0, 2): "4", (2, 2): "5"}
    shares = np.array([[1 / 3, 2 / 3, 0], [0, 1, 0], [4 / 9, 0, 5 / 9]])  # of the true class
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(shares)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])  # no Chinese font
    assert plots.label_font(["书籍", "a$", "别的"]) == (["books", r"a\$", "class 3"], None)
