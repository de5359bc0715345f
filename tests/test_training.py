"""What both scripts share: options, rate, average, checkpoints, resuming, folders, pictures."""

import argparse
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
from matplotlib import font_manager
from matplotlib.figure import Figure
from torch import nn

import plots
import temp_forecast
import text_classify
import training
from datasets import UserError
from training import Run, load_checkpoint, save_checkpoint


def options(**changed):
    """The options that Run reads, with plain values."""
    values = {
        "lr": 0.1, "weight_decay": 0.0, "average": 0.0, "clip": 1e9, "epochs": 3, "patience": 0,
        "descent": 0, "seed": 0, "resume": False, "batch_size": 2, "data": "a.csv", "out": "runs",
    }  # fmt: skip
    return argparse.Namespace(**values | changed)


def start(folder, model=None, sha256="0", **changed):
    torch.manual_seed(3)
    config = {"task": "text", "options": {"model": "rnn"}, "sha256": sha256}
    return Run(options(**changed), folder, config, model or nn.Linear(2, 1))


def random_loss(model):
    X = torch.randn(4, 2)
    return (model(X) - X.sum(1, keepdim=True)).square().mean()


def train(run, scores=None, steps=3, mode="min", loss=random_loss, after=lambda: None):
    """Train and return the run. scores: one an epoch; after: called after each step."""
    for epoch in run.epochs():
        for _ in run.progress(range(steps)):
            run.step(loss(run.model))
            after()
        score = scores[epoch - 1] if scores else 1 / epoch
        run.finish_epoch({"other": 0.5, "score": score}, "score", mode)
    return run


def one_weight():
    """A model of one weight w = 1: model[0]."""
    return nn.ParameterList([torch.ones(1)])


def names(folder):
    return {path.name for path in folder.iterdir()}


def fail(error):
    def function(*arguments, **options):
        raise error

    return function


# --- one step, the rate, the average ------------------------------------------------------------

FALL = [12.0, *range(22, 1, -1), 1.2, 1.2]  # of 24: x 12 / 24, then 1 - step / 24, then a twentieth


@pytest.mark.parametrize(
    ("descent", "steps", "expected"),
    [(24, 13, [*FALL, 1.2, 1.2]), (99, 12, FALL), (1, 2, [1.2] * 4), (0, 2, [24.0] * 4)],
)  # 99: never longer than the run, 2 epochs
def test_the_rate_rises_then_falls_to_a_twentieth(tmp_path, descent, steps, expected):
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
    run, w = start(tmp_path, one_weight(), epochs=1, **changed), []
    train(
        run, steps=2, loss=lambda model: 3 * model[0], after=lambda: w.append(run.model[0].item())
    )
    assert w == pytest.approx(expected)
    assert run.averaged.module[0].item() == w[-1]  # --average 0


def test_the_moving_average_as_by_hand(tmp_path):
    run, w = start(tmp_path, one_weight(), average=0.7, epochs=2), [1.0]

    def loss(model):
        return w[-1] ** 2 * model[0]

    train(run, steps=7, loss=loss, after=lambda: w.append(run.model[0].item()))
    average = w[5]  # the first time a copy, then every five steps and at the end of each epoch
    average = 1 / 11 * average + 10 / 11 * w[7]
    average = 2 / 12 * average + 10 / 12 * w[10]
    average = 0.7**5 * average + (1 - 0.7**5) * w[14]  # less than 3 / 13
    assert run.averaged.module[0].item() == pytest.approx(average, rel=1e-6)


# --- epochs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "scores"), [("min", [3, 1, 1, 2]), ("max", [1, 3, 3, 2])])
def test_patience_ends_a_run_and_says_so(tmp_path, capsys, mode, scores):
    run = train(start(tmp_path, epochs=6, patience=2), scores, mode=mode)
    assert [record["epoch"] for record in run.history] == [1, 2, 3, 4]  # equal is no better
    assert run.best == {"epoch": 2, "score": scores[1]}
    output = capsys.readouterr().out.splitlines()[2:]
    assert [line.endswith("*") for line in output] == [True, True, False, False, False]
    assert "score 2.0000" in output[3] and "--patience" in output[4]


def test_without_patience_all_epochs_run_and_the_best_is_loaded(tmp_path):
    weights, run = [], start(tmp_path, epochs=6)
    train(run, [3, 1, 2, 2, 2, 2], after=lambda: weights.append(run.model.weight.tolist()))
    run.load_best()
    assert run.model.weight.tolist() == weights[5]  # after two epochs of three steps
    metrics, seconds = run.write_metrics("gru", {}, {}, {}), [r["seconds"] for r in run.history]
    assert metrics["best_epoch"] == 2 and len(seconds) == 6
    assert metrics["seconds_per_epoch"] == pytest.approx(np.mean(seconds))


def test_numbers_that_are_not_finite_end_the_run(tmp_path):
    run, factors = start(tmp_path, one_weight()), iter([1, 1, 1, 1, -math.inf])
    with pytest.raises(UserError, match=r"loss is not finite in epoch 2, step 2; .*--lr"):
        train(run, loss=lambda model: next(factors) * model[0])
    assert run.steps == 4 and run.model[0].isfinite()
    with pytest.raises(UserError, match=r"scores of epoch 2 are not finite.*--lr"):
        train(start(tmp_path), [1, math.nan, 1])
    assert len(load_checkpoint(tmp_path / "last.pt", "text")["history"]) == 1
    with pytest.raises(UserError, match=r"weights of epoch 1 are not finite.*--lr"):
        train(start(tmp_path, lr=1e30, weight_decay=1e30), steps=1)


def test_an_epoch_without_a_batch_is_refused(tmp_path):
    with pytest.raises(UserError, match="no batch"):
        train(start(tmp_path), steps=0)


def test_every_seed_and_epoch_draws_its_own_random_numbers(tmp_path):
    runs = [start(tmp_path, seed=seed) for seed in (0, 1, 2**31)]
    draws = [torch.rand(1).item() for run in runs for _ in run.epochs()]
    assert len(set(draws)) == len(draws) == 9


# --- resuming -----------------------------------------------------------------------------------

LONG = {"epochs": 4, "average": 0.9, "descent": 13, "weight_decay": 0.1}


def same(a, b):
    """Whether nested values with tensors are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.mark.parametrize("last_step", [5, 12, 15])  # in epoch 2, at the end of 3, in 4
def test_a_resumed_run_is_the_run_left_alone_to_the_bit(tmp_path, last_step):
    scores, folders = [3, 2, 4, 1], (tmp_path / "alone", tmp_path / "resumed")
    train(start(folders[0], **LONG), scores, steps=4)
    run = start(folders[1], **LONG)

    def stop():
        if run.steps == last_step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(run, scores, steps=4, after=stop)
    moved = {"resume": True, "data": "b.csv", "out": "elsewhere"}  # a path may change
    run = start(folders[1], nn.Linear(2, 1), **LONG | moved)
    assert len(run.history) == (last_step - 1) // 4
    train(run, scores, steps=4)
    for name in ("best.pt", "last.pt"):
        alone, resumed = [load_checkpoint(folder / name, "text") for folder in folders]
        for record in alone.get("history", []) + resumed.get("history", []):
            del record["seconds"]
        assert same(alone, resumed)


def test_history_is_whole_after_a_kill_while_an_epoch_is_saved(tmp_path, monkeypatch):
    kill, run = fail(KeyboardInterrupt()), start(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        train(run, after=lambda: run.steps == 7 and patch.setattr(training, "write_csv", kill))
    assert len(pd.read_csv(tmp_path / "history.csv")) == 2
    train(start(tmp_path, resume=True)).load_best()
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
    with pytest.raises(UserError, match=f"another value of {named};"):
        start(tmp_path, resume=True, **changed)
    assert (tmp_path / "last.pt").read_bytes() == before


@pytest.mark.parametrize("part", ["options", "averaged", "optimizer", "weights"])
def test_resume_refuses_a_checkpoint_with_a_wrong_part(tmp_path, part):
    train(start(tmp_path))
    torch.save(torch.load(tmp_path / "last.pt") | {part: "x"}, tmp_path / "last.pt")
    with pytest.raises(UserError, match=r"last\.pt does not fit .* train again"):
        start(tmp_path, resume=True)


# --- a run's folder and its files ---------------------------------------------------------------


def test_a_new_run_removes_old_results_and_a_resumed_one_half_files(tmp_path):
    old = ["metrics.json", "history.csv", "predictions.csv", "best.pt", "last.pt", "confusion.png",
           "forecasts.png", "comparison.json", "curves.png"]  # fmt: skip
    own = {"notes.txt", "holiday.png", "my.part"}
    for name in [*old, ".best.pt.k2_x.part", *own]:
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
    content, whole = path.read_bytes(), load_checkpoint(path, "text")
    first, chance = content.index(weights.numpy().tobytes()), random.Random(0)
    for position in chance.sample(range(len(content)), 120):
        damaged = bytearray(content)
        damaged[position] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path, "text")
        except UserError as error:
            assert "\n" not in str(error) and "best.pt" in str(error)
        else:  # padding between the parts
            assert same(loaded, whole) and position not in range(first, first + 6400)


# --- options and device -------------------------------------------------------------------------


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


def test_an_unused_nvidia_card_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, program, announced in [(None, "x", True), (None, None, False), ("13", "x", False)]:
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(shutil, "which", {"nvidia-smi": program}.get)
        assert training.pick_device("auto") == torch.device("cpu")
        assert ("NVIDIA card is not used" in capsys.readouterr().err) == announced


def test_devices_that_are_there_are_taken_and_others_refused(monkeypatch):
    pick = training.pick_device
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert pick("auto") == torch.device("cuda", 0) and pick("cpu") == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick("auto") == pick("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="this machine has 2 GPUs"):
        pick("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="this machine has 0 GPUs"):
        pick("cuda")


# --- the way out --------------------------------------------------------------------------------


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


def test_other_errors_are_not_hidden():
    with pytest.raises(RuntimeError, match="shapes"):
        training.run_script(fail(RuntimeError("shapes do not fit")))


def test_a_reader_that_has_seen_enough_ends_the_script_quietly(tmp_path, monkeypatch, capsys):
    with open(tmp_path / "out", "w") as stream, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        training.run_script(fail(BrokenPipeError()))
        print("what was still to print")
    assert (tmp_path / "out").read_text() == "" and capsys.readouterr().err == ""


# --- two processes ------------------------------------------------------------------------------

# Gradients as small as Adam's epsilon: only so do their mean and its norm show in the weights.
CLIP = 3e-8
BATCHES = torch.randn(5, 4, 2, generator=torch.Generator().manual_seed(5))


def train_on(batches, run, score=0):
    """Train on batches (n, B, 2); returns the norms of the clipped gradients."""
    norms = []
    for epoch in run.epochs():
        for X in run.progress(list(batches)):
            run.step(1e-8 * (run.model(X) - X.prod(1, keepdim=True)).square().mean())
            norms.append(nn.utils.get_total_norm([param.grad for param in run.params]).item())
        run.finish_epoch({"score": score - epoch}, "score", "min")
    return norms


def one_of_two(rank, folder, port):
    """What one of two processes does; it keeps what it found in a file."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank), "OMP_NUM_THREADS": "1"}
    training.join_processes(torch.device("cpu"))
    with training.hold_folder(folder / f"run_{rank}"):
        run = start(folder / f"run_{rank}", clip=CLIP)
        train_on(BATCHES, run, score=rank)
    print("process", rank, flush=True)
    found = {"weights": run.model.state_dict(), "drawn": torch.rand(1).item()}
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
    assert first["scores"] == second["scores"] == [-1, -2, -3]  # the first one's

    alone = start(tmp_path / "alone", clip=CLIP)
    norms = train_on(BATCHES[:4].reshape(2, 8, 2), alone)  # the fifth has no partner
    assert min(norms) < 0.9 * CLIP and max(norms) == pytest.approx(CLIP, rel=1e-3)
    for found in (first, second):
        torch.testing.assert_close(found["weights"], alone.model.state_dict(), rtol=1e-4, atol=1e-6)


# --- pictures -----------------------------------------------------------------------------------


def drawn(draw, *arguments):
    """The axes that a function of plots draws, without its file."""
    figure = Figure()
    draw.__wrapped__(figure, *arguments)
    return figure.axes


def curves(axes):
    """The lines of a diagram by their labels: (x, y) as lists."""
    return {line.get_label(): line.get_xydata().T.tolist() for line in axes.get_lines()}


def test_a_confusion_matrix_has_truth_down_and_names_with_dollar_signs():
    classes, matrix = ["a$b$", "5$", r"\$\frac$"], np.array([[1, 2, 0], [0, 3, 0], [4, 0, 5]])
    axes = drawn(plots.draw_confusion, matrix, classes, "")[0]
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [label.get_text() for label in labels] == [r"a\$b\$", r"5\$", r"\\$\frac\$"]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    assert cells == {(0, 0): "1", (1, 0): "2", (1, 1): "3", (0, 2): "4", (2, 2): "5"}


def test_a_confusion_matrix_of_many_classes_is_a_small_picture_without_cells(tmp_path):
    matrix, classes = np.eye(300, dtype=int), [f"name {i}" for i in range(300)]
    assert not drawn(plots.draw_confusion, matrix, classes, "")[0].texts
    plots.draw_confusion(tmp_path / "x.png", matrix, classes, "")
    assert (tmp_path / "x.png").stat().st_size < 500_000


def test_without_a_chinese_font_labels_are_english(monkeypatch):
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [])
    assert plots.label_font(["书籍", "a$", "别的"]) == (["books", r"a\$", "class 3"], None)


def test_curves_begin_with_epoch_1():
    histories = {"rnn": [{"a": 1, "b": 2}, {"a": 3, "b": 4}], "bilstm": [{"a": 5, "b": 6}]}
    panels = training.history_panels(histories, {"loss": "a", "F1": "b"})
    left, right = drawn(plots.draw_curves, panels)
    assert curves(left) == {"RNN": [[1, 2], [1, 3]], "Bi-LSTM": [[1], [5]]}
    assert curves(right) == {"RNN": [[1, 2], [2, 4]], "Bi-LSTM": [[1], [6]]}


def test_gradients_begin_at_the_end_of_the_text():
    axes = drawn(plots.draw_gradients, {"RNN": [1, 0.5]}, "")[0]
    assert curves(axes) == {"RNN": [[0, 1], [1, 0.5]]}


def test_lead_time_shows_mean_and_median_over_windows():
    errors = {"LSTM": np.array([[1, 5], [2, 5], [6, 11.0]])}  # three windows, two hours
    mean, median = drawn(plots.draw_lead_time, [1, 2], errors, "error")
    assert (mean.get_title(), median.get_title()) == ("mean error", "median error")
    assert curves(mean) == {"LSTM": [[1, 2], [3, 7]]}
    assert curves(median) == {"LSTM": [[1, 2], [2, 5]]}


def test_a_forecast_is_drawn_over_the_last_steps():
    index, truth = pd.date_range("2015-01-01", periods=7, freq="D"), np.arange(7.0)
    forecast = np.array([8.0, 9.0])
    window = {"index": index, "truth": truth, "forecast": forecast, "low": forecast - 1,
              "high": forecast + 2, "steps_a_day": 1, "error": 3.0}  # fmt: skip
    axes = drawn(plots.draw_forecasts, [window] * 2, "title")[1]
    true_line, forecast_line = [line.get_data() for line in axes.get_lines()[:2]]
    assert list(true_line[0]) == list(index) and list(true_line[1]) == list(truth)
    assert list(forecast_line[0]) == list(index[5:]) and list(forecast_line[1]) == [8, 9]
    assert set(axes.collections[0].get_paths()[0].vertices[:, 1]) == {7, 8, 10, 11}
    assert axes.get_title() == "2015-01-06: mean error 3.00 degC"
