"""Temperature forecasting: series, windows, linear models and baselines by hand; the script from arguments to files."""

import csv
import json
import random
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT

import plots
import samples
import temp_forecast
import training
from datasets import UserError
from temp_forecast import (
    STAMP,
    TARGET,
    Weather,
    baseline_forecasts,
    build_model,
    calendar,
    fill_short_gaps,
    fit_climatology,
    fit_linear_models,
    fit_ridge,
    forecast,
    harmonics,
    parse_args,
    prepare,
    read_series,
    window_starts,
)
from temp_forecast import test_errors as errors_of


def table(stamps, temperatures, **columns):
    """A frame in the file's form."""
    stamps = pd.DatetimeIndex(stamps).strftime(STAMP)
    return pd.DataFrame({"Date Time": stamps, TARGET: temperatures, **columns})


def rows_every(minutes, values, **columns):
    """A series with a row every so many minutes; a value "gone" is a row that is not there."""
    stamps = pd.date_range("2009-01-01", periods=len(values), freq=f"{minutes}min")
    kept = [i for i, value in enumerate(values) if value != "gone"]
    return table(stamps[kept], [values[i] for i in kept], **columns)


# --- the series ---------------------------------------------------------------------------------


def test_flaws_of_a_series_by_hand(capsys):
    values = [1, 2, -9999, 3, 60.01, -90.01, 9, 9, 7, 7, 7, 6, "--", "1,5", 60, -90, 5, np.inf, 5, 5]
    pressures = [1000] * 8 + [-998.9, 4000, -999, -np.inf] + [1000] * 4 + ["x", None] + [1000] * 2
    frame = rows_every(15, values, p=pressures)
    frame = pd.concat([frame, frame.iloc[[11]].assign(**{TARGET: 8, "p": 1000})])  # 02:45 once more
    order = np.random.default_rng(0).permutation(len(frame))
    series = read_series(frame.iloc[order].reset_index(drop=True), "x.csv", "h")
    # An hour needs three of its four rows. 0: 1, 2, 3. 1: two, missing. 2: 7, 7, 7 and the mean of 6 and 8.
    # 3: two, missing. 4: three times 5. Between them the missing hours are interpolated.
    assert series[TARGET].tolist() == [2, 4.5, 7, 6, 5]
    assert series.index[0] == pd.Timestamp("2009-01-01") and len(series) == 5
    # Hour 2: -998.9, 4000, missing and 1000. Hour 4: two rows, missing, and nothing behind it.
    assert series["p"].iloc[:4].to_numpy() == pytest.approx([1000, 1000, (-998.9 + 4000 + 1000) / 3, 1000])
    assert np.isnan(series["p"].iloc[4])
    output = capsys.readouterr().out
    for part in ("21 rows, 2009-01-01 00:00 to 2009-01-01 04:00", "1 repeated stamps", "6 impossible values",
                 f"2 in {TARGET}, 1 in p;", "5 steps, 2 of 2 missing"):  # fmt: skip
        assert part in output


@pytest.mark.parametrize(("freq", "longest"), [("h", 3), ("10min", 18), ("D", 0)])
def test_gaps_of_up_to_three_hours_are_filled(freq, longest):
    minutes = {"h": 60, "10min": 10, "D": 1440}[freq]
    gap = longest + 1
    values = np.arange(4.0 * longest + 40) / 8
    shown = values.astype(object)
    shown[5 : 5 + longest] = shown[longest + 10 : longest + 10 + gap] = "gone"
    series = read_series(rows_every(minutes, shown.tolist()), "x.csv", freq)[TARGET].to_numpy()
    expected = values.copy()
    expected[longest + 10 : longest + 10 + gap] = np.nan
    assert np.allclose(series, expected, equal_nan=True)


def test_gaps_at_the_ends_stay():
    column = fill_short_gaps(pd.Series([np.nan, 1, np.nan, np.nan, 4, np.nan]), 3)
    assert column.tolist()[1:5] == [1, 2, 3, 4] and column.isna().tolist() == [True, *[False] * 4, True]


def test_directions_are_averaged_around_north(capsys):
    series = read_series(rows_every(30, [1, 1, 2, 2], **{"wd (deg)": [350, 10, 80, 100]}), "x.csv", "h")
    assert list(series) == [TARGET, "wd (deg) sine", "wd (deg) cosine"]
    cos_10 = np.cos(np.pi / 18)
    assert series.to_numpy() == pytest.approx(np.array([[1, 0, cos_10], [2, cos_10, 0]]))


@pytest.mark.parametrize(
    ("minutes", "freq", "size", "enough"), [(60, "D", 24, 18), (10, "h", 6, 5), (15, "h", 4, 3), (1, "10min", 10, 8)]
)
def test_a_step_needs_three_quarters_of_its_rows(minutes, freq, size, enough):
    values = (np.arange(20.0 * size) / 8).astype(object)
    for step, rows in ((3, enough), (8, enough - 1)):
        values[step * size + rows : (step + 1) * size] = "gone"
    means = read_series(rows_every(minutes, values.tolist()), "x.csv", freq)[TARGET].to_numpy()
    assert len(means) == 20 and means[3] == pytest.approx((3 * size + (enough - 1) / 2) / 8)
    between = (8 * size + (size - 1) / 2) / 8  # a missing hour is interpolated, a day is not
    assert means[8] == pytest.approx(np.nan if freq == "D" else between, nan_ok=True)
    assert np.isfinite(np.delete(means, 8)).all()


@pytest.mark.parametrize("date", ["31.12.9999 23:00:00", "01.01.1700 00:00:00"])
def test_a_date_centuries_away_is_refused_with_its_row(date):
    frame = rows_every(60, list(range(30)))
    frame.loc[17, "Date Time"] = date
    with pytest.raises(UserError, match=f"row 18 .*{date}"):
        read_series(frame, "x.csv", "h")


def test_more_than_half_of_the_steps_missing_is_refused():
    assert read_series(rows_every(60, [1, "gone", "gone", 4]), "x.csv", "h")[TARGET].tolist() == [1, 2, 3, 4]
    with pytest.raises(UserError, match="more than half of the steps"):
        read_series(rows_every(60, [1, "gone", "gone", "gone", 5]), "x.csv", "h")


# --- climatology and windows --------------------------------------------------------------------


def test_the_calendar_by_hand():
    index = pd.DatetimeIndex(["2009-01-01 00:00", "2009-01-01 06:00", "2009-01-01 12:00", "2011-04-02 00:30"])
    year, day = 2 * np.pi * np.array([0, 0.25, 0.5, 91 + 1 / 48]) / 365.25, 2 * np.pi * np.array([0, 6, 12, 0.5]) / 24
    assert calendar(index) == pytest.approx(np.stack([np.sin(year), np.cos(year), np.sin(day), np.cos(day)], 1))


def test_the_climatology_finds_the_cycles_that_made_a_series():
    for freq, steps_a_day in (("h", 24), ("D", 1)):
        index = pd.date_range("2009-01-01", "2011-12-31", freq=freq)
        year, day = calendar(index)[:, :2], calendar(index)[:, 2:]
        year, day = np.arctan2(*year.T), np.arctan2(*day.T)
        cycle = 9 - 8 * np.cos(year) + 2 * np.sin(year) + np.sin(2 * year) - 3 * np.cos(2 * year)
        if freq == "h":
            cycle += (3 - 2 * np.cos(year) + np.sin(year)) * np.sin(day) + (1 + np.cos(year)) * np.cos(day)
            cycle += np.cos(2 * day) * (0.5 - np.sin(year)) + (0.2 + 0.4 * np.cos(year)) * np.sin(2 * day)
        design = harmonics(index, steps_a_day)
        assert design.shape == (len(index), 17 if freq == "h" else 5)
        values = np.stack([cycle, -2 * cycle], axis=1)
        holes = values.copy()
        holes[100:200, 0] = holes[300:400, 1] = np.nan
        assert np.allclose(design @ fit_climatology(design, holes), values, atol=1e-8)


def test_window_starts_by_hand():
    complete = np.ones(21, bool)
    assert window_starts(complete, 0, 21, 7, 7)[0].tolist() == [0, 7, 14]
    assert window_starts(complete, 0, 20, 7, 7)[0].tolist() == [0, 7]
    assert window_starts(complete, 3, 20, 7, 5)[0].tolist() == [3, 8, 13]
    assert window_starts(complete, 12, 20, 7, 1)[0].tolist() == [12, 13]
    assert [x.tolist() for x in window_starts(complete, 0, 6, 7, 1)[:1]] == [[]]
    for missing, left, out in ((2, [3, 8, 13], 0), (3, [8, 13], 1), (9, [13], 2), (14, [3], 2), (15, [3, 8], 1),
                               (19, [3, 8], 1), (20, [3, 8, 13], 0)):  # of 3..9, 8..14 and 13..19  # fmt: skip
        starts, number = window_starts(np.arange(21) != missing, 3, 20, 7, 5)
        assert (starts.tolist(), number) == (left, out)


def daily_args(**options):
    arguments = ["--freq", "D", "--train-years", "1"]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    return parse_args(arguments)


def weather_of(args, frame):
    return prepare(args, read_series(frame, "x.csv", args.freq), "x.csv")


def test_the_parts_of_a_daily_series_by_hand(capsys):
    # 2009 trains, 73 days at its end validate; 45 days of 2010 test, of which day 9 (10 January) is missing.
    stamps = pd.date_range("2009-01-01", "2010-02-14", freq="D")
    values = np.arange(len(stamps), dtype=float) % 17
    keep = stamps != pd.Timestamp("2010-01-10")
    weather = weather_of(daily_args(), table(stamps[keep], values[keep]))
    parts = {name: starts.tolist() for name, starts in weather.starts.items()}
    assert parts["train"] == list(range(292 - 6)) and parts["validation"] == list(range(292, 365 - 6))
    # Segments of seven days: days 0-6, 7-13 (touches day 9), 14-20, ..., 35-41; the last three are no segment.
    assert parts["segments"] == [365 + day for day in (0, 14, 21, 28, 35)]
    # 45 - 7 + 1 = 39 windows; those that begin on days 3..9 touch day 9.
    assert parts["daily_origins"] == [365 + day for day in (*range(3), *range(10, 39))]
    assert (weather.known, weather.horizon, weather.steps_a_day) == (5, 2, 1)
    assert weather.past([10]).tolist() == [[10, 11, 12, 13, 14]] and weather.future([10]).tolist() == [[15, 16]]
    output = capsys.readouterr().out
    assert "5 segments (-1)" in output and "32 daily origins (-7)" in output


@pytest.mark.parametrize(("begin", "first"), [("2009-01-01 05:00", "2010-01-02"), ("2009-01-01 00:00", "2010-01-01")])
def test_the_segments_begin_at_the_first_midnight_of_the_test_years(begin, first):
    stamps = pd.date_range(begin, "2010-03-10", freq="h")
    weather = weather_of(parse_args(["--train-years", "1"]), table(stamps, np.sin(np.arange(len(stamps)))))
    starts = weather.index[weather.starts["segments"]]
    assert starts[0] == pd.Timestamp(first) and (np.diff(starts) == np.timedelta64(7, "D")).all()
    assert starts[-1] + pd.Timedelta(days=14) > stamps[-1]
    origins = weather.index[weather.starts["daily_origins"]]
    assert origins[0] == pd.Timestamp(first) and (np.diff(origins) == np.timedelta64(1, "D")).all()
    assert weather.starts["train"][-1] + 168 == 365 * 24 * 4 // 5 == weather.starts["validation"][0]
    assert weather.starts["validation"][-1] + 168 == 365 * 24


@pytest.mark.parametrize(("days", "enough"), [(365 + 34, False), (365 + 35, True)])
def test_fewer_than_five_segments_are_refused(days, enough):
    frame = table(pd.date_range("2009-01-01", periods=days, freq="D"), np.arange(days) % 7.0)
    if enough:
        assert len(weather_of(daily_args(), frame).starts["segments"]) == 5
    else:
        with pytest.raises(UserError, match="4 whole windows for segments"):
            weather_of(daily_args(), frame)


def wandering(days=800, seed=0):
    """A frame of days whose temperature returns to 10 degC: x_t = 0.8 x_t-1 + noise."""
    noise, x = np.random.default_rng(seed).standard_normal(days), np.zeros(days)
    for t in range(1, days):
        x[t] = 0.8 * x[t - 1] + noise[t]
    return table(pd.date_range("2009-01-01", periods=days, freq="D"), 10 + x)


def test_climatology_and_scale_come_from_the_training_years():
    frame = wandering().assign(p=1013.25, rh=50 + 3 * np.random.default_rng(1).standard_normal(800))
    weather = weather_of(daily_args(features="all"), frame)
    values = frame[[TARGET, "p", "rh"]].to_numpy()
    phase = 2 * np.pi * (weather.index.day_of_year.to_numpy() - 1) / 365.25
    design = np.stack([np.ones(800)] + [f(k * phase) for k in (1, 2) for f in (np.sin, np.cos)], axis=1)
    fitted = design @ np.linalg.lstsq(design[:365], values[:365], rcond=None)[0]
    assert weather.climatology == pytest.approx(fitted[:, 0]) and weather.truth.tolist() == values[:, 0].tolist()
    scale = (values - fitted)[:292].std(axis=0)
    assert weather.columns == [TARGET, "p", "rh"]
    assert weather.scale == pytest.approx([scale[0], 1, scale[2]])  # a constant column keeps its unit
    expected = (values - fitted) / [scale[0], 1, scale[2]]
    assert weather.inputs[:, :3] == pytest.approx(expected, abs=1e-4)
    assert weather.inputs[:, 3:] == pytest.approx(calendar(weather.index), abs=1e-6)


def test_columns_without_values_in_training_are_left_out_and_named(capsys):
    late, half = np.full(800, np.nan), np.full(800, 1.0)
    late[365:], half[: 292 // 2 + 1] = 1.0, np.nan
    frame = wandering().assign(late=late, blank=np.nan, half=half, zero=0.0)
    weather = weather_of(daily_args(features="all"), frame)
    assert weather.columns == [TARGET, "zero"] and weather.scale[1] == 1
    output = capsys.readouterr().out
    assert "'late'" in output and "'half'" in output and "'zero'" not in output
    assert "blank" in output
    assert weather_of(daily_args(features="T"), frame).columns == [TARGET]


# --- linear models and baselines ----------------------------------------------------------------


def ridge(X, Y, penalty):
    """Ridge regression as least squares with a row sqrt(penalty) for each coefficient."""
    rows = np.vstack([X, np.diag(np.sqrt(penalty))])
    return np.linalg.lstsq(rows, np.vstack([Y, np.zeros((X.shape[1], Y.shape[1]))]), rcond=None)[0]


def test_ridge_finds_known_coefficients():
    X = np.c_[np.random.default_rng(0).standard_normal((6000, 2)), np.ones(6000)]
    W = np.array([[2.0, -1.0], [0.5, 3.0], [-4.0, 1.0]])
    penalties = [np.array([p, p, 1e-9]) for p in (100.0, 1e-6, 1e4)]
    for found in fit_ridge(X.__getitem__, (X @ W).__getitem__, np.arange(5000), np.arange(5000, 6000), penalties):
        assert found == pytest.approx(W, abs=1e-6)


@pytest.mark.parametrize("signal", [0.0, 0.15, 3.0])
def test_ridge_takes_the_penalty_with_the_least_validation_error(signal):
    generator = np.random.default_rng(1)
    X = np.c_[generator.standard_normal((60, 8)), np.ones(60)]
    Y = signal * X[:, :2] + 1 + generator.standard_normal((60, 2))
    train, validation = np.arange(20), np.arange(20, 60)
    penalties = [np.r_[[p] * 8, 1e-9] for p in (0.01, 10.0, 1e4)]
    errors = [np.abs(Y[20:] - X[20:] @ ridge(X[:20], Y[:20], p)).mean() for p in penalties]
    best = penalties[int(np.argmin(errors))]
    first, both = fit_ridge(X.__getitem__, Y.__getitem__, train, validation, penalties)
    assert first == pytest.approx(ridge(X[:20], Y[:20], best)) and both == pytest.approx(ridge(X, Y, best))


def made_weather(values, known, horizon, steps_a_day=1, **others):
    """A Weather with these scaled anomalies as its only column; the first 60 % train, 20 % validate."""
    index = pd.date_range("2009-01-01", periods=len(values), freq={1: "D", 2: "12h"}[steps_a_day])
    inputs = np.c_[values, calendar(index)].astype(np.float32)
    fold, split = len(values) * 6 // 10, len(values) * 8 // 10
    length = known + horizon
    starts = {"train": np.arange(fold - length + 1), "validation": np.arange(fold, split - length + 1)}
    fields = {
        "index": index, "columns": [TARGET], "steps_a_day": steps_a_day, "known": known, "horizon": horizon,
        "truth": values, "coefficients": np.zeros((5, 1)), "climatology": np.zeros(len(values)),
        "scale": np.ones(1), "inputs": inputs, "starts": starts,
    }  # fmt: skip
    return Weather(**fields | others)


def test_a_series_that_is_linear_is_forecast_without_error():
    t = np.arange(2000.0)
    values = np.cos(0.7 * t) + 0.5 * np.cos(1.9 * t + 1)  # each value is linear in the four before it
    weather = made_weather(values, known=6, horizon=3)
    W_xq, linear = fit_linear_models(weather)
    starts = np.arange(1600, 1990)  # of no fit
    truth = values[starts[:, None] + np.arange(6, 9)]
    assert linear(starts) == pytest.approx(truth, abs=5e-3)
    options = {"model": "gru", "columns": [TARGET], "hidden": 4, "known": 6, "horizon": 3, "dropout": 0.5}
    model = build_model(options | {"loops": "fast"})
    model.W_xq.copy_(W_xq)
    guess = forecast(model.train(), torch.from_numpy(weather.inputs), weather.past(starts), batch_size=100)
    assert guess == pytest.approx(truth, abs=5e-3)


def test_the_network_is_added_to_the_linear_forecast():
    torch.manual_seed(0)
    options = {"model": "rnn", "columns": [TARGET, "p"], "hidden": 4, "known": 5, "horizon": 2, "dropout": 0.5}
    model = build_model(options | {"loops": "plain"})
    for tensor in (*model.parameters(), model.W_xq):
        torch.nn.init.normal_(tensor, std=0.5)
    inputs = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    past = np.array([3, 11])[:, None] + np.arange(5)
    W_xh, W_hh, b_h, W_hq, b_q = (param.detach().numpy() for param in model.recurrence.params)
    expected = []
    for steps in past:
        H = np.zeros(4)
        for x in inputs[steps]:
            H = np.tanh(x @ W_xh + H @ W_hh + b_h)
        x = np.r_[inputs[steps, 0], 1]
        sine, cosine = inputs[steps[-1], 2:4]
        expected.append(H @ W_hq + b_q + np.r_[x, x * sine, x * cosine] @ model.W_xq.numpy())
    assert forecast(model, torch.from_numpy(inputs), past) == pytest.approx(np.array(expected), abs=1e-5)


def test_baselines_by_hand():
    values = np.arange(40.0)
    weather = made_weather(values, 4, 4, 2, climatology=100 + 2 * values, scale=np.array([3.0]))

    def linear(starts):
        return np.array(starts)[:, None] * [1.0, 0, -1, 2]

    found = baseline_forecasts(weather, np.array([10, 21]), linear)  # steps 10..13 are known, 14..17 come
    assert list(found) == ["persistence", "seasonal_naive", "climatology", "linear"]
    assert found["persistence"].tolist() == [[13] * 4, [24] * 4]
    assert found["seasonal_naive"].tolist() == [[12, 13, 12, 13], [23, 24, 23, 24]]  # a day has two steps
    climate = [[128, 130, 132, 134], [150, 152, 154, 156]]
    assert found["climatology"].tolist() == climate
    assert found["linear"].tolist() == [[158, 130, 102, 194], [213, 152, 91, 282]]


def test_errors_and_coverage_by_hand():
    truth, model = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.5, 2.0], [2.0, 8.0]])
    band = np.array([[-0.5, -1.0], [0.5, 1.0]])
    # truth - model: -0.5 (on the edge) and 0 inside, 1 and -4 outside
    entry = errors_of(truth, {"model": model, "persistence": truth + 1, "linear": truth * 2}, band)
    assert entry == {
        "windows": 2, "mean_error": 1.375, "median_error": 0.75, "rmse": pytest.approx((17.25 / 4) ** 0.5),
        "coverage_80": 0.5,
        "baselines": {"persistence": {"mean_error": 1, "median_error": 1},
                      "linear": {"mean_error": 2.5, "median_error": 2.5}},
    }  # fmt: skip
    assert errors_of(truth, {"model": truth - band[1]}, band)["coverage_80"] == 1
    assert errors_of(truth, {"model": truth - band[1] - 0.125}, band)["coverage_80"] == 0
    assert errors_of(truth, {"model": truth - band[0] + 0.125}, band)["coverage_80"] == 0


# --- the script ---------------------------------------------------------------------------------

DAILY = ["--freq", "D", "--train-years", 1, "--hidden", 4, "--epochs", 2, "--batch-size", 64, "--device", "cpu"]


def run_main(*arguments, pictures=False):
    """Call main() with these command line arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["temp_forecast.py", *map(str, arguments)])
        for name in () if pictures else ("draw_curves", "draw_forecasts", "draw_lead_time"):
            patch.setattr(plots, name, lambda *arguments: None)
        temp_forecast.main()


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def history(folder):
    """history.csv without its times."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder / "history.csv")]


@pytest.fixture(scope="module")
def daily_path(tmp_path_factory):
    frame = wandering(800).assign(**{"p (mbar)": 1013.25, "wd (deg)": np.arange(800) * 37 % 360})
    path = tmp_path_factory.mktemp("series") / "daily.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def finished(daily_path, tmp_path_factory):
    """The folder of --model all --features all on days."""
    folder = tmp_path_factory.mktemp("runs")
    run_main(*DAILY, "--model", "all", "--features", "all", "--lr", 0.01, "--data", daily_path, "--out", folder,
             "--seed", 3, pictures=True)  # fmt: skip
    return folder


def test_the_files_of_a_run_and_the_format_of_its_metrics(finished, daily_path):
    run = finished / "temp_bilstm"
    pictures = {"curves.png", "forecasts.png", "lead_time.png"}
    files = {"metrics.json", "history.csv", "best.pt", "last.pt", "predictions.csv"} | pictures
    assert {path.name for path in run.iterdir()} == files
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    metrics = read_json(run / "metrics.json")
    keys = "task model seed argv device torch parameters epochs best_epoch seconds_per_epoch data split test"
    assert " ".join(metrics) == keys
    assert [metrics[key] for key in ("task", "model", "seed", "device", "torch", "epochs")] == [
        "temp", "bilstm", 3, "cpu", torch.__version__, 2,
    ]  # fmt: skip
    assert metrics["argv"][:2] == ["--freq", "D"] and metrics["seconds_per_epoch"] > 0
    assert {key: metrics["data"][key] for key in ("path", "source", "rows")} == {
        "path": str(daily_path), "source": "file", "rows": 800,
    }  # fmt: skip
    assert len(metrics["data"]["sha256"]) == 64 and len(metrics["data"]) == 4
    assert metrics["split"] == {"train": 286, "validation": 67, "test": 429}
    assert list(metrics["test"]) == ["segments", "daily_origins"]
    assert [entry["windows"] for entry in metrics["test"].values()] == [435 // 7, 435 - 6]
    for entry in metrics["test"].values():
        assert list(entry) == ["windows", "mean_error", "median_error", "rmse", "coverage_80", "baselines"]
        assert list(entry["baselines"]) == ["persistence", "seasonal_naive", "climatology", "linear"]
        assert all(list(errors) == ["mean_error", "median_error"] for errors in entry["baselines"].values())
    records = history(run)
    best = min(records, key=lambda record: float(record["validation_mean_error"]))
    assert len(records) == 2 and int(best["epoch"]) == metrics["best_epoch"]


def test_the_errors_can_be_counted_again_from_the_predictions(finished, daily_path):
    days = {row["Date Time"]: float(row[TARGET]) for row in read_csv(daily_path)}
    for name in ("rnn", "bilstm"):
        rows = read_csv(finished / f"temp_{name}" / "predictions.csv")
        assert [int(row["segment"]) for row in rows] == [i for i in range(1, 63) for _ in range(2)]
        assert [float(row["hours ahead"]) for row in rows] == [24, 48] * 62
        assert rows[0]["Date Time"] == "06.01.2010 00:00:00" and rows[2]["Date Time"] == "13.01.2010 00:00:00"
        truth = np.array([float(row[TARGET]) for row in rows])
        assert truth == pytest.approx([days[row["Date Time"]] for row in rows], abs=1e-3)
        columns = ("forecast (degC)", "low 10 % (degC)", "high 90 % (degC)")
        guess, low, high = (np.array([float(row[column]) for row in rows]) for column in columns)
        entry = read_json(finished / f"temp_{name}" / "metrics.json")["test"]["segments"]
        errors = np.abs(truth - guess)
        found = [entry[key] for key in ("mean_error", "median_error", "rmse", "coverage_80")]
        inside = ((truth >= low) & (truth <= high)).mean()
        expected = [errors.mean(), np.median(errors), np.sqrt((errors**2).mean()), inside]
        assert found == pytest.approx(expected, abs=2e-3) and 0.5 < inside < 1


def test_the_comparison_shows_the_four_runs_and_the_baselines(finished):
    folder = finished / "temp_all"
    assert {path.name for path in folder.iterdir()} == {"comparison.md", "comparison.json", "comparison.png"}
    names = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "bilstm": "Bi-LSTM"}
    content = read_json(folder / "comparison.json")
    assert content == {names[key]: read_json(finished / f"temp_{key}" / "metrics.json") for key in names}
    lines = (folder / "comparison.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    test = content["RNN"]["test"]
    entries = [own["test"] for own in content.values()]
    entries += [{part: test[part]["baselines"][name] for part in test} for name in test["segments"]["baselines"]]
    assert len(cells) == len(entries) == 8 and [row[0] for row in cells[:4]] == list(names.values())
    for row, entry in zip(cells, entries, strict=True):
        numbers = [entry[part][key] for part in ("segments", "daily_origins") for key in ("mean_error", "median_error")]
        assert [float(cell) for cell in row[1:5]] == pytest.approx(numbers, abs=6e-4)


def test_an_untrained_network_is_the_linear_forecast_with_the_band_of_its_validation_errors(daily_path, tmp_path):
    run_main(*DAILY, "--model", "gru", "--lr", 1e-12, "--average", 0, "--data", daily_path, "--out", tmp_path)
    weather = weather_of(daily_args(), pd.read_csv(daily_path))
    W_xq, _ = fit_linear_models(weather)

    def degrees(starts):
        x = np.c_[weather.inputs[weather.past(starts), 0], np.ones(len(starts))]
        sine, cosine = weather.inputs[starts + 4, 1:3].T[:, :, None]
        anomalies = np.concatenate([x, x * sine, x * cosine], axis=1) @ W_xq.numpy() * weather.scale[0]
        return weather.climatology[weather.future(starts)] + anomalies

    def errors(part):
        starts = weather.starts[part]
        return weather.truth[weather.future(starts)] - degrees(starts)

    run = tmp_path / "temp_gru"
    for record in history(run):
        for part in ("train", "validation"):
            assert float(record[f"{part}_mean_error"]) == pytest.approx(np.abs(errors(part)).mean(), abs=1e-4)
    band = np.sort(errors("validation"), axis=0)
    place = 0.1 * (len(band) - 1)  # quantiles by linear interpolation, each lead time for itself
    low = band[int(place)] + (place % 1) * (band[int(place) + 1] - band[int(place)])
    place = 0.9 * (len(band) - 1)
    high = band[int(place)] + (place % 1) * (band[int(place) + 1] - band[int(place)])
    rows = read_csv(run / "predictions.csv")
    expected = degrees(weather.starts["segments"])
    for column, values in (("forecast (degC)", expected), ("low 10 % (degC)", expected + low),
                           ("high 90 % (degC)", expected + high)):  # fmt: skip
        assert [float(row[column]) for row in rows] == pytest.approx(values.ravel(), abs=2e-3)
    saved = torch.load(run / "best.pt", weights_only=True)
    assert np.array(saved["band"]) == pytest.approx(np.stack([low, high]), abs=1e-4)


@pytest.mark.parametrize("model", ["rnn", "gru", "lstm", "bilstm"])
def test_plain_and_fast_loops_give_the_same_epoch(model, daily_path, tmp_path):
    for loops in ("plain", "fast"):
        run_main(*DAILY, "--epochs", 1, "--model", model, "--loops", loops, "--dropout", 0, "--lr", 0.01,
                 "--batch-size", 16, "--data", daily_path, "--out", tmp_path / loops)  # fmt: skip
    (plain,), (fast,) = (history(tmp_path / loops / f"temp_{model}") for loops in ("plain", "fast"))
    for key in plain:
        assert float(plain[key]) == pytest.approx(float(fast[key]), abs=1e-4)


def test_no_test_value_reaches_training(daily_path, tmp_path):
    # The years that test become hotter and wilder: the same weights, climatology, scale and band to the last bit.
    frame = pd.read_csv(daily_path)
    frame.loc[365:, TARGET] = 20 - 2 * frame.loc[365:, TARGET]
    frame.loc[365:, "p (mbar)"] = np.arange(435)
    frame.to_csv(tmp_path / "hot.csv", index=False)
    saved = []
    for data in (daily_path, tmp_path / "hot.csv"):
        run_main(*DAILY, "--model", "rnn", "--features", "all", "--data", data, "--out", tmp_path / data.stem)
        saved.append(torch.load(tmp_path / data.stem / "temp_rnn" / "best.pt", weights_only=True))
    assert all(saved[0][key] == saved[1][key] for key in ("climatology", "scale", "band"))
    assert all(torch.equal(saved[0]["weights"][name], saved[1]["weights"][name]) for name in saved[0]["weights"])


def outcome(folder):
    """What a run found, without what differs between machines and starts."""
    metrics = read_json(folder / "metrics.json")
    kept = {key: value for key, value in metrics.items() if key not in ("argv", "seconds_per_epoch")}
    return kept, history(folder), (folder / "predictions.csv").read_bytes()


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(daily_path, tmp_path, monkeypatch):
    options = [*DAILY, "--model", "lstm", "--epochs", 4, "--lr", 0.01, "--data", daily_path]
    run_main(*options, "--out", tmp_path / "alone")
    steps, step = iter(range(1000)), training.Run.step

    def interrupted(self, loss):
        if self.epoch == 3 and next(steps) == 2:
            raise KeyboardInterrupt
        step(self, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Run, "step", interrupted)
        run_main(*options, "--out", tmp_path / "stopped")
    run = tmp_path / "stopped" / "temp_lstm"
    assert len(history(run)) == 2 and not (run / "metrics.json").exists()
    run_main(*options, "--out", tmp_path / "stopped", "--resume")
    assert outcome(run) == outcome(tmp_path / "alone" / "temp_lstm")


@pytest.mark.slow
def test_a_run_killed_at_six_instants_ends_as_if_left_alone(daily_path, tmp_path):
    options = [*DAILY, "--model", "gru", "--epochs", 60, "--patience", 0, "--data", daily_path, "--resume", "--out"]
    command = [sys.executable, *map(str, (ROOT / "temp_forecast.py", *options))]
    subprocess.run([*command, tmp_path / "alone"], check=True, capture_output=True)
    random.seed(0)
    for _ in range(6):
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([*command, tmp_path / "killed"], **quiet)
        for line in process.stdout:
            if b"parameters" in line:  # training begins
                break
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.communicate()
    subprocess.run([*command, tmp_path / "killed"], check=True, capture_output=True)
    assert outcome(tmp_path / "killed" / "temp_gru") == outcome(tmp_path / "alone" / "temp_gru")


# --- prediction ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hourly(tmp_path_factory):
    """(folder, series) of a run on hours: two days in, one out."""
    folder = tmp_path_factory.mktemp("hourly")
    samples.temperatures(years=2).iloc[: 24 * 420].to_csv(folder / "series.csv", index=False)
    run_main(*DAILY[2:], "--epochs", 1, "--model", "gru", "--history-days", 2, "--horizon-days", 1, "--lr", 0.01,
             "--data", folder / "series.csv", "--out", folder)  # fmt: skip
    return folder, folder / "series.csv"


@pytest.mark.parametrize(
    ("kind", "known", "horizon", "last"),
    [("h", 48, 24, "the last known step begins at {} 23:00:00"), ("D", 5, 2, "the last known step begins at {} 00:00:00")],
)
def test_a_saved_model_forecasts_what_it_forecast_in_its_test(
    kind, known, horizon, last, finished, daily_path, hourly, tmp_path, capsys
):
    folder, path = hourly if kind == "h" else (finished, daily_path)
    run = folder / "temp_gru"
    rows = read_csv(run / "predictions.csv")[-horizon:]
    frame = pd.read_csv(path)
    first = int(np.flatnonzero(frame["Date Time"] == rows[0]["Date Time"])[0])
    recent = frame.iloc[first - known : first]
    recent.to_csv(tmp_path / "recent.csv", index=False)
    capsys.readouterr()
    arguments = ["--checkpoint", run / "best.pt", "--predict", tmp_path / "recent.csv", "--device", "cpu"]
    run_main(*arguments)
    output = capsys.readouterr()
    lines = list(csv.reader(output.out.splitlines()))
    assert lines[0] == ["Date Time", TARGET, "low 10 % (degC)", "high 90 % (degC)"] and len(lines) == horizon + 1
    for line, row in zip(lines[1:], rows, strict=True):
        assert line[0] == row["Date Time"]
        shown = [float(row[f"{name} (degC)"]) for name in ("forecast", "low 10 %", "high 90 %")]
        assert [float(cell) for cell in line[1:]] == pytest.approx(shown, abs=0.0056)
    said = output.err.splitlines()[-1]
    assert last.format(recent["Date Time"].iloc[-1][:10]) in said
    assert f"from {rows[0]['Date Time']} to {rows[-1]['Date Time']}" in said and "rows, 20" in output.err
    recent.iloc[1:].to_csv(tmp_path / "recent.csv", index=False)
    with pytest.raises(UserError, match=f"does not end with {2 if kind == 'h' else 5} whole days"):
        run_main(*arguments)
    assert capsys.readouterr().out == ""
