"""What both scripts share: options, rate, average, checkpoints, resuming, folders, pictures."""

import argparse
import math
import os
import re
import shutil
import socket
import sys
import types
from unittest.mock import Mock

import numpy as np
import pandas as pd
import plots
import pytest
import torch
import training
from conftest import NAMES, exit_status, read_json
from datasets import UserError
from matplotlib import font_manager
from matplotlib.figure import Figure
from torch import nn
from training import Run, load_checkpoint

import temp_forecast
import text_classify


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
    return model(torch.randn(4, 2)).square().mean()


def train(run, scores=None, batches=range(3), mode="min", loss=random_loss, after=lambda: None):
    """Train and return the run. scores: one an epoch; after: called after each step."""
    for epoch in run.epochs():
        for batch in run.progress(batches):
            run.step(loss(run.model, batch))
            after()
        score = scores[epoch - 1] if scores else 1 / epoch
        run.finish_epoch({"other": 0.5, "score": score}, "score", mode)
    return run


def train_one_weight(folder, steps, gradient, scores=None, **changed):
    """Train a weight w = 1 on losses gradient(step) w; returns the run, and w after each step."""
    run, w = start(folder, nn.ParameterList([torch.ones(1)]), **changed), []

    def loss(model, step):
        return gradient(step) * model[0]

    train(run, scores, range(steps), loss=loss, after=lambda: w.append(run.model[0].item()))
    return run, w


def names(folder):
    return {path.name for path in folder.iterdir()}


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
    run, w = train_one_weight(tmp_path, 2, lambda step: 3, epochs=1, **changed)
    assert w == pytest.approx(expected)
    assert run.averaged.module[0].item() == w[-1]  # --average 0


def test_the_moving_average_as_by_hand(tmp_path):
    run, w = train_one_weight(tmp_path, 7, lambda step: (step + 1) ** 2, average=0.7, epochs=2)
    w = [1, *w]
    average = w[5]  # the first time a copy, then every five steps and at the end of each epoch
    average = 1 / 11 * average + 10 / 11 * w[7]
    average = 2 / 12 * average + 10 / 12 * w[10]
    average = 0.7**5 * average + (1 - 0.7**5) * w[14]  # less than 3 / 13
    run.load_best()  # the averaged weights are kept
    assert run.model[0].item() == pytest.approx(average, rel=1e-6)


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
    metrics, seconds = run.write_metrics({}, {}, {}), [r["seconds"] for r in run.history]
    assert metrics["best_epoch"] == 2
    assert metrics["seconds_per_epoch"] == pytest.approx(np.mean(seconds))
    torch.save(torch.load(tmp_path / "best.pt") | {"epoch": 1}, tmp_path / "best.pt")
    with pytest.raises(UserError, match="another epoch"):
        run.load_best()


def test_a_run_without_finite_numbers_or_batches_ends(tmp_path):
    gradients = iter([1, 1, 1, 1, -math.inf])
    with pytest.raises(UserError, match=r"loss is not finite in epoch 2, step 5 of .*--lr"):
        train_one_weight(tmp_path, 3, lambda step: next(gradients))
    with pytest.raises(UserError, match=r"scores of epoch 2 are not finite.*--lr"):
        train(start(tmp_path), [1, math.nan, 1])
    assert len(load_checkpoint(tmp_path / "last.pt", "text")["history"]) == 1
    with pytest.raises(UserError, match=r"weights of epoch 1 are not finite.*--lr"):
        train(start(tmp_path, lr=1e30, weight_decay=1e30), batches=range(1))
    with pytest.raises(UserError, match="no batch"):
        train(start(tmp_path), batches=[])


def test_every_seed_and_epoch_draws_its_own_random_numbers(tmp_path):
    runs = [start(tmp_path, seed=seed) for seed in (0, 1, 2**31)]
    assert len({torch.rand(1).item() for run in runs for _ in run.epochs()}) == 9


def test_resume_refuses_other_options_other_data_and_damaged_files(tmp_path):
    train(start(tmp_path))
    path, last = tmp_path / "last.pt", torch.load(tmp_path / "last.pt")
    start(tmp_path, resume=True, data="b.csv", out="elsewhere")  # a path may change
    changes = {"--lr": {"lr": 0.2}, "--batch-size": {"batch_size": 3}, "the data": {"sha256": "1"}}
    for name, changed in changes.items():
        with pytest.raises(UserError, match=f"another value of {name};"):
            start(tmp_path, resume=True, **changed)
    weight = last["weights"]["weight"].numpy().tobytes()
    path.write_bytes(path.read_bytes().replace(weight, weight[::-1]))
    with pytest.raises(UserError, match=r"last\.pt .*is damaged.*train again"):
        start(tmp_path, resume=True)
    for part in ("options", "averaged", "optimizer", "weights"):
        torch.save(last | {part: "x"}, path)
        with pytest.raises(UserError, match=r"last\.pt cannot be used .* train again"):
            start(tmp_path, resume=True)


def test_a_new_run_removes_old_results_and_a_resumed_one_does_not(tmp_path):
    old = (
        "metrics.json history.csv predictions.csv best.pt last.pt comparison.json comparison.png "
        "gradients.png curves.png confusion.png forecasts.png lead_time.png .best.pt.k2_x.part"
    )
    own = {"notes.txt", "holiday.png", "my.part"}
    for name in [*old.split(), *own]:
        (tmp_path / name).write_text("old")
    run = start(tmp_path)
    assert names(tmp_path) == own
    train(run)
    start(tmp_path, resume=True)
    assert names(tmp_path) == own | {"best.pt", "last.pt", "history.csv"}
    (tmp_path / "last.pt").unlink()
    start(tmp_path, resume=True)  # begins anew
    assert names(tmp_path) == own
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(UserError, match=r"cannot replace .*metrics.json"):
        start(tmp_path)


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
    defaults = map(str, vars(script.parse_args([])).values())
    expected = [text for text in defaults if text not in ("None", "False")]
    assert re.findall(r"\(default: (.*?)\)", text) == expected


def test_devices_that_are_there_are_taken_and_others_refused(monkeypatch, capsys):
    pick = training.pick_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick("cuda") == torch.device("cuda", 0) and pick("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick("auto") == pick("cuda") == pick("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="this machine has cpu, cuda:0, cuda:1"):
        pick("cuda:2")
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
        (Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory")), 2, "--batch-size"),
        (Mock(side_effect=RuntimeError("not enough memory")), 2, "--batch-size"),  # on Windows
        (Mock(side_effect=UserError("a\nb\tc")), 2, "error: a b c\n"),
        (Mock(side_effect=KeyboardInterrupt), 130, "--resume"),
    ],
)
def test_what_a_user_can_mend_ends_with_one_line(main, status, words, capsys):
    assert exit_status(types.SimpleNamespace(main=main, __file__="")) == status
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_other_errors_are_not_hidden_and_any_text_is_printed(capsys):
    with pytest.raises(RuntimeError, match="shapes"):
        training.run_script(Mock(side_effect=RuntimeError("shapes do not fit")))
    training.run_script(lambda: print("\udcd6 printed"))  # no console has this character
    assert "printed" in capsys.readouterr().out


def test_a_table_with_any_text_is_read_back(tmp_path):
    texts = ["a\rb", "a\nb", 'a,"b"', "NA"]
    training.write_csv(tmp_path / "x.csv", pd.DataFrame({"text": texts}))
    assert pd.read_csv(tmp_path / "x.csv", keep_default_na=False)["text"].tolist() == texts
    path = "\udcd6\udcd0.csv"  # GB18030 bytes in a path, as Linux gives them
    training.write_json(tmp_path / "x.json", path)
    assert read_json(tmp_path / "x.json") == path


def test_a_script_whose_reader_has_gone_ends_quietly(tmp_path, monkeypatch, capsys):
    script = types.SimpleNamespace(main=Mock(side_effect=BrokenPipeError), __file__="")
    with open(tmp_path / "out", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert exit_status(script) == 1
        print("what was still to print")
    assert (tmp_path / "out").read_text() == "" and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("model", "resume", "left"),
    [("rnn", False, ["rnn", "gru", "all"]), ("all", True, ["rnn", "gru"]), ("all", False, [])],
)
def test_a_new_start_of_all_four_removes_their_results(model, resume, left, tmp_path):
    paths = {name: tmp_path / f"text_{name}" / "metrics.json" for name in ("rnn", "gru", "all")}
    for path in paths.values():
        training.write_json(path, "old")
    args = argparse.Namespace(model=model, resume=resume, out=tmp_path)
    assert training.structures(args, "text") == (list(NAMES) if model == "all" else ["rnn"])
    assert [name for name, path in paths.items() if path.exists()] == left


def one_of_two(rank, folder, port):
    """What one of two processes does; it keeps what it found in a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    training.join_processes(torch.device("cpu"))
    own, gradients = folder / f"run_{rank}", [-1e-8, 5e-8, 1]
    with training.hold_folder(own):
        scores = [rank + 3, rank + 2, rank + 1]  # of the first: 3, 2, 1
        run, w = train_one_weight(own, 3, gradients.__getitem__, scores, clip=3e-8)
        found = [w, [record["score"] for record in run.history], torch.rand(1).item()]
        with pytest.raises(UserError, match="different data, options or finished epochs"):
            train_one_weight(own, 3, None, clip=3e-8, resume=True)  # the second has no folder
    torch.save(found, folder / f"{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="torch for Windows starts gloo in another way")
def test_two_processes_train_as_one_and_only_the_first_writes_and_prints(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(one_of_two, (tmp_path, port), nprocs=2)
    assert capfd.readouterr().out.count("epoch") == 3
    assert names(tmp_path) == {"0", "1", "run_0"}
    first, second = [torch.load(tmp_path / name) for name in ("0", "1")]
    assert first[:2] == second[:2] and first[2] != second[2]
    # The mean, 2e-8, is less than clip and twice Adam's epsilon; the third batch has no partner.
    assert first[0] == pytest.approx([1 - 0.2 / 3, 1 - 0.4 / 3, 1 - 0.6 / 3])
    assert first[1] == [3, 2, 1]


def lines(draw, *arguments):
    """{name: [x, y]} of the named lines that a function of plots draws on each axes."""
    figure = Figure()
    draw.__wrapped__(figure, *arguments)
    found = [{} for _ in figure.axes]
    for axes, own in zip(figure.axes, found, strict=True):
        for line in axes.get_lines():
            if line.get_label()[0] != "_":
                own[line.get_label()] = line.get_xydata().T.tolist()
    return found


def test_the_lines_of_the_diagrams():
    panels = {"loss": {"RNN": [1, 3], "Bi-LSTM": [5]}, "F1": {"RNN": [2, 4], "Bi-LSTM": [6]}}
    loss, f1 = lines(plots.draw_curves, panels)
    assert loss == {"RNN": [[1, 2], [1, 3]], "Bi-LSTM": [[1], [5]]}
    assert f1 == {"RNN": [[1, 2], [2, 4]], "Bi-LSTM": [[1], [6]]}
    assert lines(plots.draw_gradients, {"RNN": [1, 0.5]}, "") == [{"RNN": [[0, 1], [1, 0.5]]}]
    errors = {"LSTM": np.array([[1, 5], [2, 5], [6, 11.0]])}  # three windows, two hours
    mean, median = {"LSTM": [[1, 2], [3, 7]]}, {"LSTM": [[1, 2], [2, 5]]}
    assert lines(plots.draw_lead_time, [1, 2], errors, "") == [mean, median]
    window = pd.date_range("1970-01-01", periods=5), np.arange(5), np.array([8, 9])
    band = np.array([[-1, -1], [1, 1]])
    expected = {"truth": [[*range(5)], [*range(5)]], "forecast": [[3, 4], [8, 9]]}
    assert lines(plots.draw_forecasts, [window], band, 1, "")[0] == expected


def test_a_confusion_matrix_has_truth_down_and_names_with_dollar_signs(monkeypatch):
    classes, matrix = ["a$b$", "5$", r"\$\frac$"], np.array([[1, 2, 0], [0, 3, 0], [4, 0, 5]])
    figure = Figure()
    plots.draw_confusion.__wrapped__(figure, matrix, classes, "")
    axes = figure.axes[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == [r"a\$b\$", r"5\$", r"\\$\frac\$"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "1", (1, 0): "2", (1, 1): "3", (0, 2): "4", (2, 2): "5"}
    shares = np.array([[1 / 3, 2 / 3, 0], [0, 1, 0], [4 / 9, 0, 5 / 9]])  # of the true class
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(shares)
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])  # no Chinese font
    assert plots.label_font(["书籍", "a$", "别的"]) == (["books", r"a\$", "class 3"], None)
