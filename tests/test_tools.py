"""The tables of tools.report and tools.bench."""

from types import SimpleNamespace

import pytest
import torch

from support.files import UserError, write_json
from tools import bench, report

# --- report -------------------------------------------------------------------------------------


def write_text_run(folder, argv, score, sha256="a1b2c3", label="书籍"):
    """Write a run of the text classifier in which all scores are the same, and its comparison."""
    scores = dict.fromkeys(["accuracy", "precision_macro", "recall_macro", "f1_macro"], score)
    content = {"task": "text", "model": "rnn", "argv": argv.split()}
    content["data"] = {"path": "x/shop.zip", "sha256": sha256}
    content["rows"] = [{}, scores]
    write_json(folder / "text_all" / "comparison.json", content)
    content["test"] = {**scores, "per_class": {label: {"f1": score}}}
    write_json(folder / "text_rnn" / "metrics.json", content)


def test_seeds_are_one_line_with_mean_and_deviation(tmp_path, capsys, run_main):
    write_text_run(tmp_path / "0", argv="--seed 0 --out a --epochs 5", score=0.2)
    write_text_run(tmp_path / "1", argv="--epochs=5 --resume --seed=1 --device cpu", score=0.4)
    run_main(report, tmp_path)
    output = capsys.readouterr().out
    scores = " | ".join(["0.3000 ± 0.1414"] * 4)  # the square root of 0.1^2 + 0.1^2
    assert f"\n| shop a1b2: --epochs 5 | RNN | 2 | {scores} |\n" in output
    assert f"\n| shop a1b2: --epochs 5 | MEAN | 2 | {scores} |\n" in output  # of all structures
    assert "\n| shop a1b2: --epochs 5 | RNN | 0.300 ± 0.141 |\n" in output  # F1 of the class
    assert output.count("shop") == 3


def test_files_of_one_name_stay_apart_and_so_do_other_classes(tmp_path, capsys, run_main):
    write_text_run(tmp_path / "0", argv="--seed 0", score=0.2)
    write_text_run(tmp_path / "1", argv="--seed 1", score=0.4, sha256="d4", label="水果")
    run_main(report, tmp_path)
    output = capsys.readouterr().out
    assert "| 设置 | 模型 | 书籍 |\n| --- | --- | --- |\n| shop a1b2:  | RNN | 0.200 |\n" in output
    assert "| 设置 | 模型 | 水果 |\n| --- | --- | --- |\n| shop d4:  | RNN | 0.400 |\n" in output


def forecast_errors(mean):
    """One part of a forecasting run's test."""
    errors = {"mean_error": mean, "median_error": mean + 1}
    baseline = {"mean_error": mean + 4, "median_error": mean + 5}
    return {**errors, "coverage_80": 0.8, "baselines": {"seasonal_naive": baseline}}


def test_forecasts_stand_above_their_baselines(tmp_path, capsys, run_main):
    content = {"task": "temp", "model": "gru", "argv": ["--freq", "D"]}
    content["data"] = {"path": "jena.csv", "sha256": "e5f6a7"}
    content["test"] = {"segments": forecast_errors(1), "daily_origins": forecast_errors(3)}
    write_json(tmp_path / "metrics.json", content)
    run_main(report, tmp_path)
    forecast = "| jena e5f6: --freq D | GRU | 1 | 1.000 | 2.000 | 3.000 | 4.000 | 0.800 |"
    baseline = "| jena e5f6: --freq D | seasonal naive | 1 | 5.000 | 6.000 | 7.000 | 8.000 |  |"
    assert f"{forecast}\n{baseline}\n" in capsys.readouterr().out


def test_a_folder_without_runs_is_refused(tmp_path, run_main):
    with pytest.raises(UserError, match=r"holds no metrics\.json"):
        run_main(report, tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", '{"accuracy": 0.9}'])
def test_a_file_of_another_program_is_refused_by_its_name(content, tmp_path, run_main):
    (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json is no result"):
        run_main(report, tmp_path)


# --- bench --------------------------------------------------------------------------------------

SHAPE = (3, 2, 4, 5)  # T, B, D, h


def outputs_and_gradients(kind, cell):
    """What a kind computes from the same seed: its outputs, and the gradients after a step."""
    torch.manual_seed(0)
    inputs = torch.randn(SHAPE[:3], requires_grad=True)
    function, params = bench.make(kind, cell, SHAPE, "cpu")
    bench.train_step(function, params, inputs)
    return [function(inputs), inputs.grad, *[param.grad for param in params]]


@pytest.mark.parametrize("cell", bench.LAYERS)
def test_ours_and_the_loop_do_the_same_work(cell):
    ours = outputs_and_gradients("ours", cell)
    torch.testing.assert_close(ours, outputs_and_gradients("loop", cell))


@pytest.mark.parametrize("cell", bench.LAYERS)
def test_torchs_layer_has_outputs_of_the_same_shape_and_all_gradients(cell):
    outputs, *gradients = outputs_and_gradients("torch", cell)
    assert outputs.shape == (3, 2, bench.OUTPUTS)
    assert all(gradient.any() for gradient in gradients)


def test_a_training_step_starts_from_fresh_gradients():
    w = torch.tensor(3.0, requires_grad=True)
    x = torch.ones(2, requires_grad=True)
    for _ in range(2):
        bench.train_step(lambda inputs: w * inputs, [w], x)
    assert w.grad == 6  # d(w^2) / dw
    assert x.grad.tolist() == [9, 9]  # of the mean of (3 x)^2


def test_measure_gives_medians_without_the_first_two_rounds(monkeypatch):
    clock = SimpleNamespace(now=0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(bench, "time", clock)

    def step(seconds, params, inputs):
        clock.now += seconds.pop(0)

    functions = {}
    functions["ours"] = ([99, 99, 1, 2, 9], None)
    functions["torch"] = ([99, 99, 5, 4, 3], None)
    functions["loop"] = ([0, 0, 6, 8, 7], None)
    medians = bench.measure(step, functions, torch.ones(1), rounds=3)
    assert medians == {"ours": 2000, "torch": 4000, "loop": 7000}


def test_what_is_kept_for_the_backward_pass_counts_once():
    def square_of_a_part(inputs):
        return inputs.tanh()[:10].square()  # tanh keeps its result; square keeps a part of it

    megabytes = bench.kept_megabytes(square_of_a_part, torch.ones(500_000, requires_grad=True))
    assert megabytes == 2  # 500,000 numbers of four bytes
