"""One training's folder, history and checkpoints; the rate; the average; torchrun's processes."""

import argparse
import os
import socket

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from support import run as runs
from support.files import UserError
from support.run import Run, load_checkpoint


def make_run(folder, inputs=2, sha256="0", **changes):
    """A run of a small linear model, not yet trained; changes: of its options."""
    torch.manual_seed(0)
    model = nn.Linear(inputs, 1)
    stateful = {
        "model": model,
        "average": runs.MovingAverage(model, decay=0.9),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1),
    }
    config = {"task": "text", "model": "rnn", "sha256": sha256}
    options = {"model": "all", "seed": 0, "epochs": 9, "batch_size": 4, "data": "a.csv"}
    args = argparse.Namespace(**{**options, **changes})
    return Run(folder, config, args, stateful)


def train(run, scores, patience=0):
    """Train until every score has had its epoch, two steps each; returns the run."""
    model = run.stateful["model"]
    for epoch in run.epochs(len(scores), patience):
        for _ in run.progress([1, 2]):
            run.stateful["optimizer"].zero_grad()
            model(torch.randn(4, 2)).square().mean().backward()
            run.stateful["optimizer"].step()
            run.stateful["average"].update(model)
        score = scores[epoch - 1]
        run.end_epoch({"f1": score}, score)
    return run


def names(folder):
    """The names of all files in a folder."""
    return {path.name for path in folder.iterdir()}


def assert_equal(states, expected):
    """Compare the tensors of two state dicts to the last bit."""
    torch.testing.assert_close(states, expected, rtol=0, atol=0)


# --- rate and average of the weights ------------------------------------------------------------


def test_the_rate_rises_then_falls_to_a_twentieth():
    factor = runs.rise_and_fall(24)
    expected = [12, *range(22, 1, -1), 1.2, 1.2, 1.2]  # of 24; 1.2 is a twentieth
    assert [24 * factor(step) for step in range(25)] == pytest.approx(expected)


def test_a_rate_without_steps_is_constant():
    factor = runs.rise_and_fall(0)
    assert factor(0) == factor(1000) == 1


def test_the_moving_average_by_hand():
    model = nn.ParameterList([torch.zeros(1)])
    average = runs.MovingAverage(model, decay=0.15)
    averages = []
    for weight in [11, 22, 41]:
        model[0].data.fill_(weight)
        average.update(model)
        averages.append(average.module[0].item())
    # A copy; then 1/11 of it stays, as 1/11 < 0.15; then 0.15 of the average stays, as 0.15 < 2/12.
    assert averages == pytest.approx([11, 11 / 11 + 22 * 10 / 11, 0.15 * 21 + 0.85 * 41])


# --- history and best epoch ---------------------------------------------------------------------


def test_the_highest_score_is_the_best_and_an_equal_one_is_no_better(tmp_path):
    run = train(make_run(tmp_path), [0.1, 0.3, 0.3, 0.2])
    assert run.best["epoch"] == 2
    assert run.best["score"] == 0.3
    assert [record["f1"] for record in run.history] == [0.1, 0.3, 0.3, 0.2]


def test_patience_ends_a_run(tmp_path, capsys):
    run = train(make_run(tmp_path), [0.1, 0.3, 0.3, 0.2, 0.9], patience=2)
    assert len(run.history) == 4
    assert "no better validation score for 2 epochs" in capsys.readouterr().out


def test_every_seed_and_epoch_draws_its_own_random_numbers(tmp_path):
    numbers = set()
    for seed in (0, 1, 2):
        run = make_run(tmp_path, seed=seed)
        for _ in run.epochs(3, patience=0):
            numbers.add(torch.rand(1).item())
            run.end_epoch({}, score=0)
    assert len(numbers) == 9


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_end_a_run(value):
    model = nn.Linear(2, 2)
    runs.check_finite(model, epoch=5)
    model.bias.data[1] = value
    with pytest.raises(UserError, match="weights of epoch 5 are not finite"):
        runs.check_finite(model, epoch=5)


def test_the_metrics_hold_the_mean_of_the_seconds_and_what_they_are_given(tmp_path, read_json):
    run = train(make_run(tmp_path), [1, 2])
    run.history[0]["seconds"] = 1.0
    run.history[1]["seconds"] = 4.0
    given = {"data": {"rows": 5}, "split": {"test": 1}, "test": {"f1": 2}, "lead": [7]}
    metrics = run.write_metrics(**given)
    expected = {"seed": 0, "parameters": 3, "best_epoch": 2, "seconds_per_epoch": 2.5, **given}
    for name, value in expected.items():
        assert metrics[name] == value
    assert metrics == read_json(tmp_path / "metrics.json")


# --- a second run in the same folder ------------------------------------------------------------

RESULTS = (
    "last.pt best.pt metrics.json history.csv predictions.csv curves.png confusion.png "
    "forecasts.png lead_time.png comparison.json comparison.png gradients.png"
)


def test_what_earlier_runs_left_is_removed_and_nothing_else(tmp_path):
    for name in [*RESULTS.split(), "notes.txt", "holiday.png"]:
        (tmp_path / name).touch()
    runs.remove_results([tmp_path / "absent", tmp_path])
    assert names(tmp_path) == {"notes.txt", "holiday.png"}


def test_a_result_that_cannot_be_removed_is_named(tmp_path):
    (tmp_path / "best.pt").mkdir()
    with pytest.raises(UserError, match=r"cannot remove .*best\.pt"):
        runs.remove_results([tmp_path])


@pytest.fixture
def trained(tmp_path):
    """A folder with a run of two epochs."""
    train(make_run(tmp_path), [1, 2])
    return tmp_path


def test_paths_may_change_before_a_run_is_resumed(trained):
    run = make_run(trained, model="rnn", data="b.csv", out="b", resume=True, device="cpu")
    run.restore()
    assert len(run.history) == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "another value of --seed"),
        ({"batch_size": 8}, "another value of --batch-size"),
        ({"sha256": "1"}, "another value of --data"),
        ({"inputs": 3}, "does not fit this program"),
    ],
)
def test_a_run_that_began_otherwise_is_not_resumed(trained, changes, message):
    with pytest.raises(UserError, match=message):
        make_run(trained, **changes).restore()


def test_the_table_of_a_run_killed_before_it_was_written_is_completed(trained):
    table = trained / "history.csv"
    complete = table.read_bytes()
    table.unlink()
    make_run(trained).restore()
    assert table.read_bytes() == complete


def test_without_an_earlier_run_resuming_begins_anew(tmp_path):
    run = make_run(tmp_path)
    run.restore()
    assert run.history == []


# --- checkpoints --------------------------------------------------------------------------------


def test_one_wrong_letter_in_a_checkpoint_is_noticed(trained):
    path = trained / "last.pt"
    path.write_bytes(path.read_bytes().replace(b"score", b"scope"))  # only the check sum tells
    with pytest.raises(UserError, match=r"last\.pt .*train again"):
        make_run(trained).restore()


def test_half_a_checkpoint_is_noticed(trained):
    path = trained / "last.pt"
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(UserError, match=r"last\.pt cannot be read"):
        load_checkpoint(path, "text", key="states")


def test_a_checkpoint_of_the_other_script_is_refused(trained):
    with pytest.raises(UserError, match="no such file of this script"):
        load_checkpoint(trained / "last.pt", "temp", key="states")


def test_a_checkpoint_to_go_on_from_is_no_model_to_predict_with(trained):
    with pytest.raises(UserError, match=r"name a best\.pt"):
        load_checkpoint(trained / "last.pt", "text")


def test_a_checkpoint_of_another_version_is_refused(trained, monkeypatch):
    monkeypatch.setattr(runs, "FORMAT", runs.FORMAT + 1)
    with pytest.raises(UserError, match="no checkpoint of this version"):
        load_checkpoint(trained / "last.pt", "text")


def test_code_in_a_checkpoint_is_refused(tmp_path):
    path = tmp_path / "best.pt"
    torch.save({"format": runs.FORMAT, "task": "text", "weights": print}, path)
    with pytest.raises(UserError, match="cannot be read"):
        load_checkpoint(path, "text")


# --- several processes --------------------------------------------------------------------------


def test_a_process_takes_its_share_of_the_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "world_size", lambda: 2)
    run = make_run(tmp_path)  # of the first process
    assert list(run.progress([10, 11, 12, 13, 14])) == [10, 12]  # as many for each: 14 is left out
    with pytest.raises(UserError, match="an epoch has no batch"):
        next(run.progress([10]))


def train_in_one_of_two(rank, folder, port):
    """What each process does: train on the batches 1 and 3; leave the weights in a file."""
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ["MASTER_PORT"] = str(port)
    os.environ["WORLD_SIZE"] = "2"
    os.environ["RANK"] = str(rank)
    runs.join_processes(torch.device("cpu"))
    run = make_run(folder / f"run_{rank}")
    model = run.stateful["model"]
    parallel_model = DistributedDataParallel(model)
    for _ in run.epochs(1, patience=0):
        for number in run.progress([1.0, 3.0]):
            parallel_model(torch.tensor([number, 0.0])).backward()
            run.stateful["optimizer"].step()
        run.end_epoch({"f1": rank}, score=rank)
    result = {"gradient": model.weight.grad, "weights": model.state_dict(), "history": run.history}
    torch.save(result, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(os.name == "nt", reason="torch for Windows starts gloo in another way")
def test_two_processes_train_as_one(tmp_path, capfd):
    with socket.create_server(("127.0.0.1", 0)) as free_port:
        port = free_port.getsockname()[1]
    torch.multiprocessing.spawn(train_in_one_of_two, (tmp_path, port), nprocs=2)
    first = torch.load(tmp_path / "0.pt")
    second = torch.load(tmp_path / "1.pt")
    assert first["gradient"].tolist() == [[2, 0]]  # the mean of 1 and 3
    assert_equal(second["weights"], first["weights"])
    assert second["history"][0]["f1"] == 0  # the first's score
    assert names(tmp_path) == {"0.pt", "1.pt", "run_0"}  # only the first writes
    assert capfd.readouterr().out.count("epoch") == 1  # and prints
