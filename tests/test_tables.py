"""The tables of report.py and bench.py by hand."""

import types

import pytest
import torch
from conftest import exit_status, run_main

import bench
import report
import training


def table_rows(capsys):
    """The cells of all Markdown rows that were printed."""
    lines = capsys.readouterr().out.splitlines()
    return [line[2:-2].split(" | ") for line in lines if line[:1] == "|"]


def test_the_report_shows_mean_and_spread_of_the_seeds_by_hand(tmp_path, capsys):
    scores = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
    for seed, model, score in ((0, "lstm", 0.1), (0, "rnn", 0.2), (1, "rnn", 0.4)):
        run, test = tmp_path / f"{seed}", dict.fromkeys(scores, score)
        argv = ["--epochs", "20", f"--seed={seed}", "--resume", "--data", "/x/shop.zip"]
        common = {"argv": argv, "data": {"path": "/x/shop.zip"}}
        rows = [{}, dict.fromkeys(scores, 0.5)]
        training.write_json(run / "text_all" / "comparison.json", common | {"rows": rows})
        test["per_class"] = {"书籍": {"f1": score, "support": 7}}
        metrics = common | {"task": "text", "model": model, "test": test, "best_epoch": 3}
        training.write_json(run / f"text_{model}" / "metrics.json", metrics)
    lab = metrics | {"argv": ["--preset", "lab"], "model": "gru"}  # beside another comparison
    training.write_json(tmp_path / "1" / "text_gru" / "metrics.json", lab)
    parts = {}
    for part, mean in (("segments", 1), ("daily_origins", 3)):
        errors = {"mean_error": mean, "median_error": mean + 1}
        baselines = {"seasonal_naive": dict.fromkeys(errors, mean + 4)}
        parts[part] = errors | {"coverage_80": mean / 5, "baselines": baselines}
    for data, freq in (("/x/hours.csv", "h"), ("bundled sample", "D")):
        argv = ["--out", "a", "--data", data, "--freq", freq]
        metrics = {"task": "temp", "model": "gru", "argv": argv, "data": {"path": data}}
        metrics["test"] = parts
        training.write_json(tmp_path / freq / "temp_gru" / "metrics.json", metrics)
    run_main(report, tmp_path)
    assert [row for row in table_rows(capsys) if row[0] not in ("---", "设置")] == [
        ["shop --epochs 20", "RNN", "2", *["0.3000 ± 0.1414"] * 4, "3/3"],
        ["shop --epochs 20", "LSTM", "1", *["0.1000"] * 4, "3"],
        ["shop --epochs 20", "四者平均", "2", *["0.5000 ± 0.0000"] * 4, ""],
        ["shop --preset lab", "GRU", "1", *["0.4000"] * 4, "3"],
        ["类别", "测试条数", "RNN", "LSTM"],
        ["书籍", "7", "0.300 ± 0.141", "0.100"],
        ["bundled sample --freq D", "GRU", "1", "1.000", "2.000", "3.000", "4.000", "0.600"],
        ["bundled sample --freq D", "seasonal naive", "", "5.000", "5.000", "7.000", "7.000", ""],
        ["hours --freq h", "GRU", "1", "1.000", "2.000", "3.000", "4.000", "0.600"],
        ["hours --freq h", "seasonal naive", "", "5.000", "5.000", "7.000", "7.000", ""],
    ]


def test_the_speed_table_by_hand(monkeypatch, capsys):
    now = [0.0]

    def takes(ours):
        """A step that takes these milliseconds: two warm-ups and three rounds of four cells."""
        rounds = [
            [(99, 99, 99)] * 2 + [(2**k * ours, 4, 9), (0, 9, 8), (99, 1, 1)] for k in range(4)
        ]
        times = iter([time for cell in rounds for times in cell for time in times])

        def step(*arguments):
            now[0] += next(times) / 1000

        return step

    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench, "SHAPES", [(3, 2, 4, 5)])
    monkeypatch.setattr(bench, "train_step", takes(1))
    monkeypatch.setattr(bench, "inference", takes(8))
    run_main(bench, "--quick", "--threads", 1)
    output = capsys.readouterr().out
    train, inference = ["4.00", "4.00", "8.00", "1.00"], ["32.00", "4.00", "8.00", "8.00"]
    rows = [line[2:-2].split(" | ") for line in output.splitlines() if line[:1] == "|"]
    assert rows[4] == ["3, 2, 4, 5", "lstm", *train, *inference]
    assert "train, ours/torch: geometric mean 0.71, largest 2.00" in output  # 8**0.5 / 4
    assert "inference, ours/torch: geometric mean 5.66, largest 16.00" in output
    assert exit_status(bench, "--cuda-graphs") == 2


@pytest.mark.parametrize("cell", bench.LAYERS)
def test_the_kinds_that_are_timed_do_the_same_work(cell):
    inputs, found = torch.randn(3, 2, 4, requires_grad=True), {}
    for kind in bench.KINDS:
        torch.manual_seed(0)
        function, params = bench.make(kind, cell, (3, 2, 4, 5), torch.device("cpu"))
        for _ in range(2):  # the second time adds nothing to the first one's gradients
            bench.train_step(function, params, inputs)
        found[kind] = [function(inputs), inputs.grad, *(param.grad for param in params)]
    torch.testing.assert_close(found["ours"], found["plain"])
    assert found["torch"][0].shape == (3, 2, bench.OUTPUTS)
    assert all(tensor.any() for tensor in found["torch"])
