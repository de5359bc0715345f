"""Temperature forecasting: series, windows and baselines by hand; no look ahead; the script's command line."""

import csv
import json

import numpy as np
import pandas as pd
import pytest
import torch

import datasets
import samples
from datasets import UserError
from temp_forecast import parse_args
from weather import (
    STAMP,
    TARGET,
    baseline_forecasts,
    fit_climatology,
    fit_linear,
    harmonics,
    prepare,
    read_series,
    window_starts,
)


def table(stamps, temperatures, **columns):
    """A frame in the file's form."""
    return pd.DataFrame(
        {"Date Time": pd.DatetimeIndex(stamps).strftime(STAMP), TARGET: temperatures, **columns}
    )


# --- the series -------------------------------------------------------------------------------------------------------


def test_rows_are_sorted_repeats_averaged_impossible_values_missing(capsys):
    stamps = [
        "2009-01-01 02:00",
        "2009-01-01 00:10",
        "2009-01-01 00:50",
        "2009-01-01 00:50",
        "2009-01-01 01:00",
    ]
    series = read_series(table(stamps, [5.0, 1.0, 2.0, 4.0, -9999.0]), "x.csv", "h")
    # Hour 0: 1 and the mean of 2 and 4, so (1 + 3) / 2 = 2. Hour 1: missing, interpolated between 2 and 5. Hour 2: 5.
    assert series[TARGET].tolist() == [2.0, 3.5, 5.0]
    assert series.index[0] == pd.Timestamp("2009-01-01 00:00")
    output = capsys.readouterr().out
    assert (
        "1 repeated stamps averaged, 1 impossible values; 3 steps, 1 of 1 missing ones interpolated"
        in output
    )


def test_gaps_of_three_hours_are_filled_and_longer_ones_are_left():
    hours = [0, 4, 5, 10]  # gaps of three and of four hours
    stamps = pd.Timestamp("2009-01-01") + pd.to_timedelta(hours, unit="h")
    values = read_series(table(stamps, [0.0, 4.0, 5.0, 10.0]), "x.csv", "h")[TARGET].to_numpy()
    assert values[:6].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0] and values[10] == 10.0
    assert np.isnan(values[6:10]).all()
    daily = read_series(table(["2009-01-01", "2009-01-03"], [1.0, 3.0]), "x.csv", "D")[TARGET]
    assert np.isnan(daily.iloc[1])


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (pd.DataFrame({"Date Time": ["01.01.2009 00:00:00"]}), "no column 'T"),
        (
            table(["2009-01-01"], [1.0]).rename(columns={"Date Time": "date"}),
            "no column 'Date Time'",
        ),
        (
            pd.DataFrame({"Date Time": ["2009-01-01"], TARGET: [1.0]}),
            "row 1 has the date '2009-01-01'",
        ),
        (table(["2009-01-01"] * 3, ["warm", "cold", ""]), "no temperatures"),
        (table(["2009-01-01"] * 2, [-9999, np.inf]), "no temperatures"),
    ],
)
def test_unfit_series_are_refused(frame, message):
    with pytest.raises(UserError, match=message):
        read_series(frame, "x.csv", "h")


# --- windows ----------------------------------------------------------------------------------------------------------


def test_window_starts_by_hand():
    complete = np.ones(20, bool)
    assert [values.tolist() for values in window_starts(complete, 0, 20, 7, 7)[:1]] == [[0, 7]]
    assert window_starts(complete, 3, 20, 7, 5)[0].tolist() == [3, 8, 13]
    complete[9] = False  # of the windows 3..9, 8..14, 13..19 the first two touch it
    starts, left_out = window_starts(complete, 3, 20, 7, 5)
    assert starts.tolist() == [13] and left_out == 2
    assert window_starts(complete, 0, 6, 7, 1)[0].tolist() == []


def daily_args(**options):
    arguments = ["--freq", "D", "--train-years", "1"]
    return parse_args(arguments + [str(part) for option in options.items() for part in option])


def test_segments_and_origins_by_hand():
    # 2009 trains; 45 days of 2010 test, of which day 9 (10 January) is missing.
    stamps = pd.date_range("2009-01-01", "2010-02-14", freq="D")
    values = np.arange(len(stamps), dtype=float) % 17
    keep = stamps != pd.Timestamp("2010-01-10")
    weather = prepare(daily_args(), table(stamps[keep], values[keep]), "x.csv")
    first = 365  # 1 January 2010
    assert weather.index[weather.split] == pd.Timestamp("2010-01-01")
    # Segments of seven days: days 0-6, 7-13 (touches day 9), 14-20, ..., 35-41; the last three days are no segment.
    assert weather.starts["segments"].tolist() == [first + day for day in (0, 14, 21, 28, 35)]
    # Origins: 45 - 7 + 1 = 39 windows, those that begin on days 3..9 touch day 9.
    assert weather.starts["daily_origins"].tolist() == [
        first + day for day in (*range(3), *range(10, 39))
    ]
    for part in ("train", "validation"):
        assert weather.starts[part].max() + 7 <= weather.split


def test_the_segments_begin_at_the_first_midnight_of_the_test_years():
    stamps = pd.date_range("2009-01-01 05:00", "2010-03-10", freq="h")
    args = parse_args(["--train-years", "1"])
    weather = prepare(args, table(stamps, np.sin(np.arange(len(stamps)))), "x.csv")
    starts = weather.index[weather.starts["segments"]]
    assert weather.index[weather.split] == pd.Timestamp("2010-01-01 05:00") and starts[
        0
    ] == pd.Timestamp("2010-01-02")
    assert (starts == starts.normalize()).all() and (
        np.diff(starts) == np.timedelta64(7, "D")
    ).all()
    origins = weather.index[weather.starts["daily_origins"]]
    assert (np.diff(origins) == np.timedelta64(1, "D")).all()


def test_a_short_series_is_refused():
    with pytest.raises(UserError, match="too short"):
        prepare(
            daily_args(),
            table(pd.date_range("2009-01-01", periods=380, freq="D"), np.zeros(380)),
            "x.csv",
        )


# --- climatology and baselines ----------------------------------------------------------------------------------------


def test_the_climatology_finds_a_cycle_that_it_can_express():
    index = pd.date_range("2009-01-01", "2010-12-31", freq="h")
    year, day = (
        2 * np.pi * (index.day_of_year - 1 + index.hour / 24) / 365.25,
        2 * np.pi * index.hour / 24,
    )
    cycle = (
        9
        - 8 * np.cos(year)
        + np.sin(2 * year)
        + (3 - 2 * np.cos(year)) * np.sin(day)
        + np.cos(2 * day)
    )
    values = np.array(cycle)[:, None].copy()
    values[100:200] = np.nan
    design = harmonics(index, 24)
    assert np.allclose(
        design @ fit_climatology(design, values), np.array(cycle)[:, None], atol=1e-8
    )


def small_weather(days=800, seed=0):
    generator = np.random.default_rng(seed)
    anomalies = np.zeros(days)
    for t in range(1, days):
        anomalies[t] = 0.8 * anomalies[t - 1] + generator.standard_normal()
    return prepare(
        daily_args(),
        table(pd.date_range("2009-01-01", periods=days, freq="D"), 10 + anomalies),
        "x.csv",
    )


def test_baselines_by_hand():
    weather = small_weather()
    weather.truth, weather.climatology = np.arange(800.0), 100 + np.arange(800.0)
    weather.anomalies = (weather.truth - weather.climatology)[:, None]
    linear = np.zeros((6, 2))
    linear[4], linear[5] = (
        [0.5, 0.25],
        [1.0, 2.0],
    )  # half, a quarter of the last anomaly (-100), and a constant
    forecasts = baseline_forecasts(weather, np.array([10]), linear)
    assert forecasts["persistence"].tolist() == [[14, 14]] == forecasts["seasonal_naive"].tolist()
    assert forecasts["climatology"].tolist() == [[115, 116]]
    assert forecasts["linear"].tolist() == [[115 - 50 + 1, 116 - 25 + 2]]
    weather.known, weather.ahead, weather.steps_a_day = 10, 4, 2
    naive = baseline_forecasts(weather, np.array([0]), np.zeros((11, 4)))["seasonal_naive"]
    assert naive.tolist() == [[8, 9, 8, 9]]  # the last day has two steps


def test_the_linear_model_is_ridge_regression_refitted_on_all_training_years():
    weather = small_weather()
    both = (
        weather.starts["train"],
        np.arange(weather.split - 6),
    )  # every window that ends in the training years

    def ridge(starts, penalty):  # by centring, instead of a column of ones
        rows = weather.anomalies[starts[:, None] + np.arange(7), 0]
        X, Y = rows[:, :5], rows[:, 5:]
        centred = X - X.mean(0)
        weights = np.linalg.solve(
            centred.T @ centred + penalty * np.eye(5), centred.T @ (Y - Y.mean(0))
        )
        return np.vstack([weights, Y.mean(0) - X.mean(0) @ weights])

    for linear, starts in zip(fit_linear(weather), both, strict=True):
        assert any(
            np.allclose(linear, ridge(starts, penalty), atol=1e-8)
            for penalty in 10.0 ** np.arange(-1, 6)
        )
    assert linear[4, 0] == pytest.approx(
        0.8, abs=0.2
    )  # what made the series, less what the climatology took


# --- the command line -------------------------------------------------------------------------------------------------

QUICK = ("temp_forecast.py", "--hidden", 8, "--epochs", 2, "--device", "cpu", "--train-years", 2)


@pytest.fixture(scope="module")
def short_series(tmp_path_factory):
    """Three years of the bundled sample, hourly."""
    path = tmp_path_factory.mktemp("series") / "series.csv"
    samples.temperatures(years=3).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def run_folder(script, short_series, tmp_path_factory):
    folder = tmp_path_factory.mktemp("temp")
    result = script(
        *QUICK, "--model", "all", "--features", "all", "--data", short_series, "--out", folder
    )
    assert result.returncode == 0, result.stderr
    return folder, result


def test_the_files_of_a_run_and_what_they_hold(run_folder):
    folder, result = run_folder
    run = folder / "temp_bilstm"
    pictures = {"curves.png", "forecasts.png", "lead_time.png"}
    names = {"metrics.json", "history.csv", "best.pt", "last.pt", "predictions.csv", ".lock"}
    assert {path.name for path in run.iterdir()} == names | pictures | {"refit"}
    assert all((run / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    keys = "task model seed argv device torch parameters epochs best_epoch seconds_per_epoch data split test"
    assert " ".join(metrics) == keys and metrics["task"] == "temp"
    assert (
        metrics["test"]["segments"]["windows"] == 52
        and metrics["test"]["daily_origins"]["windows"] == 359
    )
    for entry in metrics["test"].values():
        assert set(entry) == {"windows", "mean_error", "median_error", "rmse", "baselines"}
        assert set(entry["baselines"]) == {"persistence", "seasonal_naive", "climatology", "linear"}
    # The errors counted again from predictions.csv; nothing before the training years end is tested.
    with open(run / "predictions.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 52 * 48 and [float(row["hours ahead"]) for row in rows[:48]] == list(
        range(1, 49)
    )
    absolute = [abs(float(row[TARGET]) - float(row["forecast (degC)"])) for row in rows]
    assert metrics["test"]["segments"]["mean_error"] == pytest.approx(np.mean(absolute), abs=1e-3)
    assert metrics["test"]["segments"]["median_error"] == pytest.approx(
        np.median(absolute), abs=1e-3
    )
    assert pd.to_datetime(rows[0]["Date Time"], format=STAMP) == pd.Timestamp("2011-01-06")
    assert "skill of the model" in result.stdout and "Traceback" not in result.stderr


def test_the_comparison(run_folder):
    folder, _ = run_folder
    content = (folder / "temp_all" / "comparison.md").read_text(encoding="utf-8")
    metrics = json.loads((folder / "temp_gru" / "metrics.json").read_text(encoding="utf-8"))
    assert (
        f"{metrics['test']['segments']['mean_error']:.3f}" in content
        and "seasonal naive" in content
    )
    assert (folder / "temp_all" / "comparison.png").exists()


def test_a_saved_model_forecasts_what_it_forecast_in_its_test(
    run_folder, short_series, script, tmp_path
):
    folder, _ = run_folder
    with open(folder / "temp_gru" / "predictions.csv", encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))[:48]
    frame = pd.read_csv(short_series)
    first = int(np.flatnonzero(frame["Date Time"] == rows[0]["Date Time"])[0])
    recent = tmp_path / "recent.csv"
    frame.iloc[first - 120 : first].to_csv(recent, index=False)
    checkpoint = folder / "temp_gru" / "best.pt"
    result = script("temp_forecast.py", "--checkpoint", checkpoint, "--predict", recent)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"Date Time,{TARGET}" and len(lines) == 49
    for line, row in zip(lines[1:], rows, strict=True):
        stamp, value = line.split(",")
        assert stamp == row["Date Time"]
        assert float(value) == pytest.approx(float(row["forecast (degC)"]), abs=0.01)
    frame.iloc[first - 110 : first].to_csv(recent, index=False)
    result = script("temp_forecast.py", "--checkpoint", checkpoint, "--predict", recent)
    assert (
        result.returncode == 2
        and "does not end with 5 whole days" in result.stderr
        and result.stdout == ""
    )


def test_no_test_value_reaches_training(short_series, script, tmp_path):
    # The years that test become hotter and wilder: the same weights, scaling and climatology to the last bit.
    frame = pd.read_csv(short_series)
    late = frame["Date Time"].str[6:10] == "2011"
    frame.loc[late, TARGET] = 20 - 2 * frame.loc[late, TARGET]
    frame.to_csv(tmp_path / "hot.csv", index=False)
    runs = []
    for data in (short_series, tmp_path / "hot.csv"):
        out = tmp_path / data.stem
        result = script(*QUICK, "--model", "rnn", "--data", data, "--out", out)
        assert result.returncode == 0, result.stderr
        runs.append(torch.load(out / "temp_rnn" / "best.pt", weights_only=True))
    assert runs[0]["climatology"] == runs[1]["climatology"] and runs[0]["scale"] == runs[1]["scale"]
    assert all(
        torch.equal(runs[0]["weights"][name], runs[1]["weights"][name])
        for name in runs[0]["weights"]
    )


def test_the_sample_is_found_without_a_network(script, tmp_path):
    result = script(
        "temp_forecast.py", "--hidden", 4, "--epochs", 1, "--model", "rnn", "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert "BUNDLED SAMPLE" in result.stdout and "(bundled sample)" in result.stdout
    metrics = json.loads((tmp_path / "temp_rnn" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["data"]["source"] == "sample"
    assert datasets.CLIMATE.sha256 is None  # see there
