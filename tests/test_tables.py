"""The tables of report.py and bench.py by hand."""

import types

import bench
import pytest
import report
import torch
import training
from conftest import run_main


def table_rows(output):
    """The cells of all Markdown rows."""
    return [line[2:-2].split(" | ") for line in output.splitlines() if line[:1] == "|"]


def test_the_report_shows_mean_and_spread_of_the_seeds_by_hand(tmp_path, capsys):
    def write(name, argv, path="/x/shop.zip", **content):
        content |= {"argv": argv.split(), "data": {"path": path}}
        training.write_json(tmp_path / name, content)

    scores = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
    for seed, model, score in ((0, "lstm", 0.1), (0, "rnn", 0.2), (1, "rnn", 0.4)):
        argv = f"--seed={seed} --resume --epochs=20 --data /x/shop.zip"
        write(f"{seed}/text_all/comparison.json", argv, rows=[{}, dict.fromkeys(scores, 0.5)])
        test = dict.fromkeys(scores, score) | {"per_class": {"书籍": {"f1": score, "support": 7}}}
        run = {"task": "text", "test": test, "best_epoch": 3}
        write(f"{seed}/text_{model}/metrics.json", argv, **run, model=model)
    write("1/text_gru/metrics.json", "--preset lab", **run, model="gru")  # not compared
    parts = {}
    for part, mean in (("segments", 1), ("daily_origins", 3)):
        baselines = {"seasonal_naive": {"mean_error": mean + 4, "median_error": mean + 5}}
        errors = {"mean_error": mean, "median_error": mean + 1, "coverage_80": mean / 5}
        parts[part] = errors | {"baselines": baselines}
    for freq in ("h", "D"):
        run = {"task": "temp", "model": "gru", "test": parts}
        write(f"{freq}/metrics.json", f"--out a --freq {freq}", "bundled sample", **run)
    run_main(report, tmp_path)
    rows = table_rows(capsys.readouterr().out)
    assert [row for row in rows if row[0] not in ("---", "设置")] == [
        ["shop: --epochs 20", "RNN", "2", *["0.3000 ± 0.1414"] * 4, "3/3"],
        ["shop: --epochs 20", "LSTM", "1", *["0.1000"] * 4, "3"],
        ["shop: --epochs 20", "四者平均", "2", *["0.5000 ± 0.0000"] * 4, ""],
        ["shop: --preset lab", "GRU", "1", *["0.4000"] * 4, "3"],
        ["类别", "测试条数", "RNN", "LSTM"],
        ["书籍", "7", "0.300 ± 0.141", "0.100"],
        ["bundled sample: --freq D", "GRU", "1", "1.000", "2.000", "3.000", "4.000", "0.600"],
        ["bundled sample: --freq D", "seasonal naive", "", "5.000", "6.000", "7.000", "8.000", ""],
        ["bundled sample: --freq h", "GRU", "1", "1.000", "2.000", "3.000", "4.000", "0.600"],
        ["bundled sample: --freq h", "seasonal naive", "", "5.000", "6.000", "7.000", "8.000", ""],
    ]


def test_seeds_and_data_sets_in_the_report(tmp_path, capsys):
    keys = ("mean_error", "median_error", "coverage_80")
    for n, argv in enumerate(["--lr 1 --freq D --model all --device cpu",
                              "--freq D --lr 1 --model lstm --device cuda"]):  # fmt: skip
        part = dict.fromkeys(keys, 2 * n + 1) | {"baselines": {}}
        run = {"task": "temp", "model": "lstm", "argv": argv.split(), "data": {"path": "x.csv"}}
        run["test"] = {"segments": part, "daily_origins": part}
        training.write_json(tmp_path / f"{n}/metrics.json", run)
    run_main(report, tmp_path)
    (row,) = table_rows(capsys.readouterr().out)[2:]
    assert row == ["x: --freq D --lr 1", "LSTM", "2", *["2.000 ± 1.414"] * 5]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        run_main(report, tmp_path / "empty")
    assert "holds no metrics.json" in capsys.readouterr().err


def test_the_speed_table_by_hand(monkeypatch, capsys):
    now, times = [0.0], []
    for k in range(4):  # each cell trains, then infers: two warm-ups, three rounds of all kinds
        times += [*[99] * 6, 2**k, 4, 9, 0, 9, 8, 99, 1, 1] * 2

    def takes(ms):
        def step(*arguments):
            now[0] += ms * times.pop(0) / 1000

        return step

    monkeypatch.setattr(bench, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(bench, "SHAPES", [(3, 2, 4, 5)])
    monkeypatch.setattr(bench, "train_step", takes(1))
    monkeypatch.setattr(bench, "inference", takes(10))
    run_main(bench, "--quick", "--threads", 1)
    output = capsys.readouterr().out
    train, inference = ["4.00", "4.00", "8.00", "1.00"], ["40.00", "40.00", "80.00", "1.00"]
    assert table_rows(output)[4] == ["3, 2, 4, 5", "lstm", *train, *inference]
    for mode in ("train", "inference"):  # 8**0.5 / 4 and 8 / 4
        assert f"{mode}, ours/torch: geometric mean 0.71, largest 2.00" in output


@pytest.mark.parametrize("cell", bench.LAYERS)
def test_the_kinds_that_are_timed_do_the_same_work(cell):
    inputs, found = torch.randn(3, 2, 4, requires_grad=True), {}
    for kind in bench.KINDS:
        torch.manual_seed(0)
        function, params = bench.make(kind, cell, (3, 2, 4, 5), torch.device("cpu"))
        for _ in range(2):  # the second time adds nothing to the first one's gradients
            bench.train_step(function, params, inputs)
        found[kind] = [function(inputs), inputs.grad.clone(), *(param.grad for param in params)]
    torch.testing.assert_close(found["ours"], found["plain"])
    assert found["torch"][0].shape == found["ours"][0].shape
    assert all(tensor.any() for tensor in found["torch"])
