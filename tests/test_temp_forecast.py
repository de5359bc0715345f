"""Temperature forecasting: series, windows, linear models, baselines by hand; the script itself."""

import csv
import random
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, history, outcome, read_json

import plots
import samples
import temp_forecast as script
import training
from datasets import UserError
from temp_forecast import STAMP, TARGET, Weather, calendar, read_series, window_starts


def table(stamps, temperatures, **columns):
    """A frame in the file's form."""
    stamps = pd.DatetimeIndex(stamps).strftime(STAMP)
    return pd.DataFrame({"Date Time": stamps, TARGET: temperatures, **columns})


def rows_every(minutes, values, **columns):
    """A frame with a row every so many minutes; where the value is "gone" there is no row."""
    stamps = pd.date_range("2009-01-01", periods=len(values), freq=f"{minutes}min")
    kept = [i for i, value in enumerate(values) if value != "gone"]
    return table(stamps[kept], [values[i] for i in kept], **columns)


# --- the series ---------------------------------------------------------------------------------


def test_flaws_of_a_series_by_hand(capsys):
    values = [1, 2, -9999, 3, 60.01, -90.01, 9, 9, 7, 7, 7, 6, "--", "1,5", 60, -90]
    pressures = [*[1000] * 8, -998.9, 4000, -999, np.inf, 1000, 1000, 1000, 1000, "x", None, 1, 1]
    frame = rows_every(15, [*values, 5, -np.inf, 5, 5], p=pressures)
    frame = pd.concat([frame, frame.iloc[[11]].assign(**{TARGET: 8, "p": 1000})])  # 02:45 once more
    order = np.random.default_rng(0).permutation(len(frame))
    series = read_series(frame.iloc[order].reset_index(drop=True), "x.csv", "h")
    # An hour needs three of its four rows. 0: 1, 2, 3. 1: two, missing. 2: 7, 7, 7, and the mean
    # of 6 and 8. 3: two, missing. 4: three times 5. The missing hours are interpolated.
    assert series[TARGET].tolist() == [2, 4.5, 7, 6, 5]
    assert series.index[0] == pd.Timestamp("2009-01-01") and len(series) == 5
    # Hour 2: -998.9, 4000, none and 1000. Hour 4: two rows, missing, and nothing behind it.
    expected = [1000, 1000, (-998.9 + 4000 + 1000) / 3, 1000, np.nan]
    assert series["p"].to_numpy() == pytest.approx(expected, nan_ok=True)
    output = capsys.readouterr().out
    for part in ("21 rows, 2009-01-01 00:00 to 2009-01-01 04:00", "1 repeated", "6 impossible",
                 f"2 in {TARGET}, 1 in p;", "5 steps, 2 of 2 missing"):  # fmt: skip
        assert part in output


GAPS = [("h", 60, 3), ("10min", 10, 18), ("D", 1440, 0)]


@pytest.mark.parametrize(("freq", "minutes", "longest"), GAPS)
def test_gaps_of_up_to_three_hours_are_filled(freq, minutes, longest):
    values = np.arange(4.0 * longest + 40) / 8
    shown, second = values.astype(object), slice(longest + 10, 2 * longest + 11)
    shown[5 : 5 + longest] = shown[second] = "gone"
    values[second] = np.nan
    series = read_series(rows_every(minutes, shown.tolist()), "x.csv", freq)
    assert series[TARGET].to_numpy() == pytest.approx(values, nan_ok=True)


def test_gaps_at_the_ends_stay():
    column = script.fill_short_gaps(pd.Series([np.nan, 1, np.nan, np.nan, 4, np.nan]), 3)
    assert column.to_numpy() == pytest.approx([np.nan, 1, 2, 3, 4, np.nan], nan_ok=True)


def test_directions_are_averaged_around_north():
    frame = rows_every(30, [1, 1, 2, 2], **{"wd (deg)": [350, 10, 80, 100]})
    series, cos_10 = read_series(frame, "x.csv", "h"), np.cos(np.pi / 18)
    assert list(series) == [TARGET, "wd (deg) sine", "wd (deg) cosine"]
    assert series.to_numpy() == pytest.approx(np.array([[1, 0, cos_10], [2, cos_10, 0]]))


@pytest.mark.parametrize(
    ("minutes", "freq", "size", "enough"),
    [(60, "D", 24, 18), (10, "h", 6, 5), (15, "h", 4, 3), (1, "10min", 10, 8)],
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
    half = read_series(rows_every(60, [1, "gone", "gone", 4]), "x.csv", "h")
    assert half[TARGET].tolist() == [1, 2, 3, 4]
    with pytest.raises(UserError, match="half of the steps"):
        read_series(rows_every(60, [1, "gone", "gone", "gone", 5]), "x.csv", "h")


# --- climatology and windows --------------------------------------------------------------------


def test_the_calendar_by_hand():
    index = pd.DatetimeIndex(["2009-01-01 00:00", "2009-01-01 18:00", "2011-04-02 00:30"])
    year = 2 * np.pi * np.array([0, 0.75, 91 + 1 / 48]) / 365.25
    day = 2 * np.pi * np.array([0, 18, 0.5]) / 24
    expected = np.stack([np.sin(year), np.cos(year), np.sin(day), np.cos(day)], axis=1)
    assert calendar(index) == pytest.approx(expected)


@pytest.mark.parametrize(("freq", "steps_a_day", "terms"), [("h", 24, 17), ("D", 1, 5)])
def test_the_climatology_finds_the_cycles_that_made_a_series(freq, steps_a_day, terms):
    index = pd.date_range("2009-01-01", "2011-12-31", freq=freq)
    day = 2 * np.pi * index.hour.to_numpy() / 24
    year = 2 * np.pi * (index.day_of_year.to_numpy() - 1 + index.hour.to_numpy() / 24) / 365.25
    cycle = 9 - 8 * np.cos(year) + 2 * np.sin(year) + np.sin(2 * year) - 3 * np.cos(2 * year)
    if freq == "h":
        cycle += (3 - 2 * np.cos(year) + np.sin(year)) * np.sin(day)
        cycle += (1 + np.cos(year)) * np.cos(day) + (0.5 - np.sin(year)) * np.cos(2 * day)
        cycle += (0.2 + 0.4 * np.cos(year)) * np.sin(2 * day)
    values = np.stack([cycle, -2 * cycle], axis=1)
    holes, design = values.copy(), script.harmonics(index, steps_a_day)
    holes[100:200, 0] = holes[300:400, 1] = np.nan
    assert design.shape == (len(index), terms)
    assert np.allclose(design @ script.fit_climatology(design, holes), values, atol=1e-8)


def test_window_starts_by_hand():
    complete = np.ones(21, bool)
    for arguments, expected in (((0, 21, 7, 7), [0, 7, 14]), ((0, 20, 7, 7), [0, 7]),
                                ((12, 20, 7, 1), [12, 13]), ((0, 6, 7, 1), [])):  # fmt: skip
        assert window_starts(complete, *arguments)[0].tolist() == expected
    for missing, left in ((2, [3, 8, 13]), (3, [8, 13]), (9, [13]), (14, [3]), (15, [3, 8]),
                          (19, [3, 8]), (20, [3, 8, 13])):  # of 3..9, 8..14 and 13..19  # fmt: skip
        starts, out = window_starts(np.arange(21) != missing, 3, 20, 7, 5)
        assert starts.tolist() == left and out == 3 - len(left)


def weather_of(frame, *options, daily=True):
    """A frame as `prepare` makes it, with one year of training."""
    arguments = ["--train-years", "1", *(["--freq", "D"] if daily else []), *options]
    args = script.parse_args(arguments)
    return script.prepare(args, read_series(frame, "x.csv", args.freq), "x.csv")


def test_the_parts_of_a_daily_series_by_hand(capsys):
    # 2009 trains, 73 days at its end validate; of the 45 days of 2010 day 9 (the 10th) is missing.
    stamps = pd.date_range("2009-01-01", "2010-02-14", freq="D")
    stamps = stamps[stamps != pd.Timestamp("2010-01-10")]
    weather = weather_of(table(stamps, np.arange(len(stamps)) % 17.0))
    parts = {name: starts.tolist() for name, starts in weather.starts.items()}
    assert parts["train"] == [*range(292 - 6)] and parts["validation"] == [*range(292, 365 - 6)]
    # Segments: days 0-6, 7-13 (touches day 9), 14-20, ..., 35-41; the last three are no segment.
    assert parts["segments"] == [365 + day for day in (0, 14, 21, 28, 35)]
    # 45 - 7 + 1 = 39 windows; those that begin on days 3..9 touch day 9.
    assert parts["daily_origins"] == [365 + day for day in (*range(3), *range(10, 39))]
    assert (weather.known, weather.horizon, weather.steps_a_day) == (5, 2, 1)
    assert weather.past([10]).tolist() == [[10, 11, 12, 13, 14]]
    assert weather.future([10]).tolist() == [[15, 16]]
    output = capsys.readouterr().out
    assert "5 segments (-1)" in output and "32 daily origins (-7)" in output


@pytest.mark.parametrize(("hour", "first"), [("05:00", "2010-01-02"), ("00:00", "2010-01-01")])
def test_the_segments_begin_at_the_first_midnight_of_the_test_years(hour, first):
    stamps = pd.date_range(f"2009-01-01 {hour}", "2010-03-10", freq="h")
    weather = weather_of(table(stamps, np.sin(np.arange(len(stamps)))), daily=False)
    starts, origins = (stamps[weather.starts[part]] for part in ("segments", "daily_origins"))
    assert starts[0] == origins[0] == pd.Timestamp(first)
    assert (np.diff(starts) == np.timedelta64(7, "D")).all()  # they do not overlap
    assert (np.diff(origins) == np.timedelta64(1, "D")).all()
    assert stamps[-1] - pd.Timedelta(days=14) < starts[-1] <= stamps[-168]
    assert weather.starts["train"][-1] + 168 == 7008 == weather.starts["validation"][0]
    assert weather.starts["validation"][-1] + 168 == 8760


def test_fewer_than_five_segments_are_refused():
    frame = table(pd.date_range("2009-01-01", periods=365 + 35, freq="D"), np.arange(400) % 7.0)
    assert len(weather_of(frame).starts["segments"]) == 5
    with pytest.raises(UserError, match="4 whole windows for segments"):
        weather_of(frame.iloc[:-1])


def wandering():
    """A frame of 800 days whose temperature returns to 10 degC: x_t = 0.8 x_t-1 + noise."""
    noise, x = np.random.default_rng(0).standard_normal(800), np.zeros(800)
    for t in range(1, 800):
        x[t] = 0.8 * x[t - 1] + noise[t]
    return table(pd.date_range("2009-01-01", periods=800, freq="D"), 10 + x)


def test_climatology_and_scale_come_from_the_training_years():
    frame = wandering().assign(p=1013.25, rh=50 + np.random.default_rng(1).standard_normal(800))
    weather, values = weather_of(frame, "--features", "all"), frame[[TARGET, "p", "rh"]].to_numpy()
    phase = 2 * np.pi * (weather.index.day_of_year.to_numpy() - 1) / 365.25
    waves = [f(k * phase) for k in (1, 2) for f in (np.sin, np.cos)]
    design = np.stack([np.ones(800), *waves], axis=1)
    fitted = design @ np.linalg.lstsq(design[:365], values[:365], rcond=None)[0]
    scale = (values - fitted)[:292].std(axis=0)
    scale[1] = 1  # a constant column keeps its unit
    assert weather.columns == [TARGET, "p", "rh"] and weather.scale == pytest.approx(scale)
    assert weather.climatology == pytest.approx(fitted[:, 0])
    assert weather.truth.tolist() == values[:, 0].tolist()
    assert weather.inputs[:, :3] == pytest.approx((values - fitted) / scale, abs=1e-4)
    assert weather.inputs[:, 3:] == pytest.approx(calendar(weather.index), abs=1e-6)


def test_columns_without_values_in_training_are_left_out_and_named(capsys):
    late, half = np.full(800, np.nan), np.full(800, 1.0)
    late[365:], half[: 292 // 2 + 1] = 1.0, np.nan
    frame = wandering().assign(late=late, blank=np.nan, half=half, zero=0.0)
    weather = weather_of(frame, "--features", "all")
    assert weather.columns == [TARGET, "zero"] and weather.scale[1] == 1
    output = capsys.readouterr().out
    assert "'late'" in output and "'half'" in output and "'zero'" not in output
    assert "blank" in output


# --- linear models and baselines ----------------------------------------------------------------


def ridge(X, Y, penalty):
    """Ridge regression as least squares with a row sqrt(penalty) for each coefficient."""
    targets = np.vstack([Y, np.zeros((X.shape[1], Y.shape[1]))])
    return np.linalg.lstsq(np.vstack([X, np.diag(np.sqrt(penalty))]), targets, rcond=None)[0]


def test_ridge_finds_known_coefficients():
    X = np.c_[np.random.default_rng(0).standard_normal((6000, 2)), np.ones(6000)]
    W = np.array([[2.0, -1.0], [0.5, 3.0], [-4.0, 1.0]])
    penalties = [np.array([p, p, 1e-9]) for p in (100.0, 1e-6, 1e4)]
    parts = np.arange(5000), np.arange(5000, 6000)
    for found in script.fit_ridge(X.__getitem__, (X @ W).__getitem__, *parts, penalties):
        assert found == pytest.approx(W, abs=1e-6)


@pytest.mark.parametrize("signal", [0.0, 0.15, 3.0])
def test_ridge_takes_the_penalty_with_the_least_validation_error(signal):
    generator = np.random.default_rng(1)
    X = np.c_[generator.standard_normal((60, 8)), np.ones(60)]
    Y = signal * X[:, :2] + 1 + generator.standard_normal((60, 2))
    penalties = [np.r_[[p] * 8, 1e-9] for p in (0.01, 10.0, 1e4)]
    errors = [np.abs(Y[20:] - X[20:] @ ridge(X[:20], Y[:20], p)).mean() for p in penalties]
    best, parts = penalties[int(np.argmin(errors))], (np.arange(20), np.arange(20, 60))
    first, both = script.fit_ridge(X.__getitem__, Y.__getitem__, *parts, penalties)
    assert first == pytest.approx(ridge(X[:20], Y[:20], best))
    assert both == pytest.approx(ridge(X, Y, best))


def made_weather(values, known, horizon, steps_a_day=1, **others):
    """A Weather with these scaled anomalies; the first 60 % of the steps train, 20 % validate."""
    N, freq = len(values), {1: "D", 2: "12h"}[steps_a_day]
    index, last = pd.date_range("2009-01-01", periods=N, freq=freq), known + horizon - 1
    fields = {
        "index": index, "columns": [TARGET], "steps_a_day": steps_a_day, "known": known,
        "horizon": horizon, "truth": values, "coefficients": np.zeros((5, 1)),
        "climatology": np.zeros(N), "scale": np.ones(1),
        "inputs": np.c_[values, calendar(index)].astype(np.float32), "starts": {
            "train": np.arange(N * 6 // 10 - last),
            "validation": np.arange(N * 6 // 10, N * 8 // 10 - last)},
    }  # fmt: skip
    return Weather(**fields | others)


def build(**options):
    common = {"columns": [TARGET], "hidden": 4, "dropout": 0.5, "loops": "fast"}
    return script.build_model(common | options)


def test_a_series_that_is_linear_is_forecast_without_error():
    t = np.arange(2000.0)
    values = np.cos(0.7 * t) + 0.5 * np.cos(1.9 * t + 1)  # each is linear in the four before it
    weather, starts = made_weather(values, known=6, horizon=3), np.arange(1600, 1990)  # of no fit
    linear = script.fit_linear_models(weather)
    truth = values[starts[:, None] + np.arange(6, 9)]
    assert linear.baseline(starts) == pytest.approx(truth, abs=5e-3)
    model = build(model="gru", known=6, horizon=3).train()
    model.W_xq.copy_(linear.W_xq)
    inputs = torch.from_numpy(weather.inputs)
    guess = script.forecast(model, inputs, weather.past(starts), batch_size=100)
    assert guess == pytest.approx(truth, abs=5e-3)


def seasonal_features(weather, starts):
    """[x, x sin, x cos]: x the five days that are known, and 1; the season of the last of them."""
    x = np.c_[weather.inputs[weather.past(starts), 0], np.ones(len(starts))].astype(float)
    sine, cosine = weather.inputs[starts + 4, -4:-2].T[:, :, None]
    return np.c_[x, x * sine, x * cosine]


def test_linear_models_are_fitted_to_their_windows_and_leave_the_constant_free():
    weather, free = (
        weather_of(wandering().assign(p=np.arange(800) % 7.0), "--features", "all"),
        1e-9,
    )
    train, validation = weather.starts["train"], weather.starts["validation"]
    linear, both = script.fit_linear_models(weather), np.r_[train, validation]

    def fitted(found, X, starts, penalties):
        Y = weather.inputs[weather.future(starts), 0].astype(float)
        return any(np.allclose(found, ridge(X, Y, p), rtol=1e-3, atol=1e-4) for p in penalties)

    grid = [(p, p * s) for p in script.PENALTIES for s in script.SEASON]
    penalties = [np.r_[[p] * 5, free, [q] * 12] for p, q in grid]
    for W_xq, starts in ((linear.W_xq, train), (linear.W_xq_all, both)):
        assert fitted(W_xq, seasonal_features(weather, starts), starts, penalties)
    X = np.c_[weather.inputs[weather.past(both), :2].reshape(len(both), 10), np.ones(len(both))]
    guess = linear.baseline(both)
    W = np.linalg.lstsq(X.astype(float), guess, rcond=None)[0]
    assert np.allclose(X @ W, guess, atol=1e-5)
    assert fitted(W, X.astype(float), both, [np.r_[[p] * 10, free] for p in script.PENALTIES])


def test_the_network_is_added_to_the_linear_forecast():
    torch.manual_seed(0)
    model = build(model="rnn", columns=[TARGET, "p"], known=5, horizon=2)
    for tensor in (*model.parameters(), model.W_xq):
        torch.nn.init.normal_(tensor, std=0.5)
    inputs = np.random.default_rng(0).standard_normal((20, 6)).astype(np.float32)
    past, expected = np.array([3, 11])[:, None] + np.arange(5), []
    W_xh, W_hh, b_h, W_hq, b_q = (param.detach().numpy() for param in model.recurrence.params)
    for steps in past:
        H = np.zeros(4)
        for x in inputs[steps]:
            H = np.tanh(x @ W_xh + H @ W_hh + b_h)
        x, (sine, cosine) = np.r_[inputs[steps, 0], 1], inputs[steps[-1], 2:4]
        linear = np.r_[x, x * sine, x * cosine] @ model.W_xq.numpy()
        expected.append(H @ W_hq + b_q + linear)
    guess = script.forecast(model, torch.from_numpy(inputs), past)
    assert guess == pytest.approx(np.array(expected), abs=1e-5)


def test_baselines_by_hand():
    values, scale = np.arange(40.0), np.array([3.0])
    weather = made_weather(values, 4, 4, 2, climatology=100 + 2 * values, scale=scale)
    # Steps 10..13 are known, 14..17 come; a day has two steps.
    found = script.baseline_forecasts(
        weather, np.array([10, 21]), lambda starts: starts[:, None] * np.array([1, 0, -1, 2])
    )
    assert {name: forecast.tolist() for name, forecast in found.items()} == {
        "persistence": [[13] * 4, [24] * 4],
        "seasonal_naive": [[12, 13, 12, 13], [23, 24, 23, 24]],
        "climatology": [[128, 130, 132, 134], [150, 152, 154, 156]],
        "linear": [[158, 130, 102, 194], [213, 152, 91, 282]],
    }


def test_errors_and_coverage_by_hand():
    truth, model = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.5, 2.0], [2.0, 8.0]])
    band = np.array([[-0.5, -1.0], [0.5, 1.0]])
    # truth - model: -0.5 (on the edge) and 0 inside, 1 and -4 outside
    others = {"persistence": truth + 1, "linear": truth * 2}
    entry = script.test_errors(truth, {"model": model, **others}, band)
    assert entry.pop("rmse") == pytest.approx((17.25 / 4) ** 0.5) and entry == {
        "windows": 2, "mean_error": 1.375, "median_error": 0.75, "coverage_80": 0.5,
        "baselines": {"persistence": {"mean_error": 1, "median_error": 1},
                      "linear": {"mean_error": 2.5, "median_error": 2.5}},
    }  # fmt: skip
    for shift, share in ((-band[1], 1), (-band[1] - 0.125, 0), (-band[0] + 0.125, 0)):
        entry = script.test_errors(truth, {"model": truth + shift}, band)
        assert entry["coverage_80"] == share


# --- the script ---------------------------------------------------------------------------------

DAILY = ["--freq", "D", "--train-years", 1, "--hidden", 4, "--epochs", 2, "--batch-size", 64]
DAILY += ["--device", "cpu", "--model"]
NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "bilstm": "Bi-LSTM"}
SHOWN = ["forecast (degC)", "low 10 % (degC)", "high 90 % (degC)"]


def run_main(*arguments, pictures=()):
    """Call main() with these command line arguments; pictures: the folders that get theirs."""

    def drawn(draw):
        return lambda path, *rest: draw(path, *rest) if path.parent.name in pictures else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["temp_forecast.py", *map(str, arguments)])
        for name in ("draw_curves", "draw_forecasts", "draw_lead_time"):
            patch.setattr(plots, name, drawn(getattr(plots, name)))
        script.main()


@pytest.fixture(scope="module")
def daily_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("series") / "daily.csv"
    columns = {"p (mbar)": 1013.25, "wd (deg)": np.arange(800) * 37 % 360}
    wandering().assign(**columns).to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def finished(daily_path, tmp_path_factory):
    """The folder of --model all --features all on days."""
    folder = tmp_path_factory.mktemp("runs")
    options = ["--features", "all", "--lr", 0.01, "--seed", 3, "--data", daily_path]
    run_main(*DAILY, "all", *options, "--out", folder, pictures=("temp_bilstm", "temp_all"))
    return folder


def test_the_files_of_a_run_and_the_format_of_its_metrics(finished, daily_path):
    run = finished / "temp_bilstm"
    files = {"metrics.json", "history.csv", "best.pt", "last.pt", "predictions.csv"}
    files |= {"curves.png", "forecasts.png", "lead_time.png"}
    assert {path.name for path in run.iterdir()} == files
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in run.glob("*.png"))
    metrics = read_json(run / "metrics.json")
    values = {"task": "temp", "model": "bilstm", "seed": 3, "device": "cpu", "epochs": 2}
    assert metrics == metrics | values | {"torch": torch.__version__}
    assert list(metrics) == [
        "task", "model", "seed", "argv", "device", "torch", "parameters", "epochs", "best_epoch",
        "seconds_per_epoch", "data", "split", "test",
    ]  # fmt: skip
    assert metrics["argv"][:2] == ["--freq", "D"] and metrics["seconds_per_epoch"] > 0
    assert len(metrics["data"].pop("sha256")) == 64
    assert metrics["data"] == {"path": str(daily_path), "source": "file", "rows": 800}
    assert metrics["split"] == {"train": 286, "validation": 67, "test": 429}
    windows = {part: entry["windows"] for part, entry in metrics["test"].items()}
    assert windows == {"segments": 435 // 7, "daily_origins": 435 - 6}
    errors = ["mean_error", "median_error"]
    for entry in metrics["test"].values():
        assert list(entry) == ["windows", *errors, "rmse", "coverage_80", "baselines"]
        assert list(entry["baselines"]) == [
            "persistence",
            "seasonal_naive",
            "climatology",
            "linear",
        ]
        assert all(list(own) == errors for own in entry["baselines"].values())
    scores = history(run)["validation_mean_error"]
    assert len(scores) == 2 and metrics["best_epoch"] == scores.argmin() + 1


@pytest.mark.parametrize("name", ["rnn", "bilstm"])
def test_the_errors_can_be_counted_again_from_the_predictions(name, finished, daily_path):
    rows = pd.read_csv(finished / f"temp_{name}" / "predictions.csv")
    assert rows["segment"].tolist() == [i for i in range(1, 63) for _ in range(2)]
    assert rows["hours ahead"].tolist() == [24, 48] * 62
    assert rows["Date Time"][0] == "06.01.2010 00:00:00"
    assert rows["Date Time"][2] == "13.01.2010 00:00:00"
    days = pd.read_csv(daily_path, index_col="Date Time")[TARGET]
    assert rows[TARGET].to_numpy() == pytest.approx(days[rows["Date Time"]].to_numpy(), abs=1e-3)
    entry = read_json(finished / f"temp_{name}" / "metrics.json")["test"]["segments"]
    errors = (rows[TARGET] - rows[SHOWN[0]]).abs()
    inside = rows[TARGET].between(rows[SHOWN[1]], rows[SHOWN[2]]).mean()
    expected = [errors.mean(), errors.median(), (errors**2).mean() ** 0.5, inside]
    found = [entry[key] for key in ("mean_error", "median_error", "rmse", "coverage_80")]
    assert found == pytest.approx(expected, abs=2e-3) and 0.5 < inside < 1


def test_the_comparison_shows_the_four_runs_and_the_baselines(finished):
    folder = finished / "temp_all"
    files = {"comparison.md", "comparison.json", "comparison.png"}
    assert {path.name for path in folder.iterdir()} == files
    runs = {NAMES[key]: read_json(finished / f"temp_{key}" / "metrics.json") for key in NAMES}
    assert read_json(folder / "comparison.json") == runs
    lines = (folder / "comparison.md").read_text(encoding="utf-8").splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")][2:]
    entries, test = [own["test"] for own in runs.values()], runs["RNN"]["test"]
    for name in test["segments"]["baselines"]:
        entries.append({part: test[part]["baselines"][name] for part in test})
    assert len(cells) == 8 and [row[0] for row in cells[:4]] == list(runs)
    for row, entry in zip(cells, entries, strict=True):
        parts = entry["segments"], entry["daily_origins"]
        numbers = [part[key] for part in parts for key in ("mean_error", "median_error")]
        assert [float(cell) for cell in row[1:5]] == pytest.approx(numbers, abs=6e-4)


def test_an_untrained_network_is_the_linear_forecast_and_its_band_holds_80_percent(
    daily_path, tmp_path, monkeypatch
):
    losses, step = [], training.Run.step
    record = lambda self, loss: (losses.append(loss.item()), step(self, loss))  # noqa: E731
    monkeypatch.setattr(training.Run, "step", record)
    options = ["--lr", 1e-12, "--average", 0, "--data", daily_path, "--out", tmp_path]
    run_main(*DAILY, "gru", *options)
    weather, run = weather_of(pd.read_csv(daily_path)), tmp_path / "temp_gru"
    linear = script.fit_linear_models(weather)

    def degrees(starts, W_xq=linear.W_xq):
        anomalies = seasonal_features(weather, starts) @ W_xq.numpy() * weather.scale[0]
        return weather.climatology[weather.future(starts)] + anomalies

    for part in ("train", "validation"):
        starts = weather.starts[part]
        errors = weather.truth[weather.future(starts)] - degrees(starts)
        found = history(run)[f"{part}_mean_error"].to_numpy()
        assert found == pytest.approx(np.abs(errors).mean(), abs=1e-4)
    # An epoch's batches are all 286 windows: four times 64, and 30.
    trained = np.average(losses[:5], weights=[64, 64, 64, 64, 30])
    assert trained == pytest.approx(history(run)["train_mean_error"][0], abs=1e-4)
    # The band: linear interpolation between the sorted validation errors of each lead time.
    places = np.linspace(0, 1, len(errors))
    band = [[np.interp(q, places, np.sort(column)) for column in errors.T] for q in (0.1, 0.9)]
    saved = torch.load(run / "best.pt", weights_only=True)
    assert np.array(saved["band"]) == pytest.approx(np.array(band), abs=1e-4)
    expected = degrees(weather.starts["segments"], linear.W_xq_all)
    columns = np.stack([expected, expected + band[0], expected + band[1]], axis=2).reshape(-1, 3)
    rows = pd.read_csv(run / "predictions.csv")[SHOWN].to_numpy()
    assert rows == pytest.approx(columns, abs=2e-3)


@pytest.mark.parametrize("model", NAMES)
def test_plain_and_fast_loops_give_the_same_epoch(model, daily_path, tmp_path):
    options = ["--epochs", 1, "--dropout", 0, "--lr", 0.01, "--batch-size", 16, "--data"]
    for loops in ("plain", "fast"):
        out = ["--loops", loops, "--out", tmp_path / loops]
        run_main(*DAILY, model, *options, daily_path, *out)
    plain, fast = (history(tmp_path / loops / f"temp_{model}") for loops in ("plain", "fast"))
    assert len(plain) == 1 and np.allclose(plain, fast, rtol=0, atol=1e-4)


def test_no_test_value_reaches_training(daily_path, tmp_path):
    # The years that test become hotter and wilder: what is learned stays the same to the last bit.
    frame, saved = pd.read_csv(daily_path), []
    frame.loc[365:, TARGET] = 20 - 2 * frame.loc[365:, TARGET]
    frame.loc[365:, "p (mbar)"] = np.arange(435)
    frame.to_csv(tmp_path / "hot.csv", index=False)
    for data in (daily_path, tmp_path / "hot.csv"):
        out = tmp_path / data.stem
        run_main(*DAILY, "rnn", "--features", "all", "--data", data, "--out", out)
        saved.append(torch.load(out / "temp_rnn" / "best.pt", weights_only=True))
    assert all(saved[0][key] == saved[1][key] for key in ("climatology", "scale", "band"))
    weights = saved[0]["weights"].items()
    assert all(torch.equal(tensor, saved[1]["weights"][name]) for name, tensor in weights)


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(daily_path, tmp_path, monkeypatch):
    options = [*DAILY, "lstm", "--epochs", 4, "--lr", 0.01, "--data", daily_path, "--out"]
    run_main(*options, tmp_path / "alone")
    steps, step = iter(range(1000)), training.Run.step

    def interrupted(self, loss):
        if self.epoch == 3 and next(steps) == 1:
            raise KeyboardInterrupt
        step(self, loss)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training.Run, "step", interrupted)
        run_main(*options, tmp_path / "stopped")
    run = tmp_path / "stopped" / "temp_lstm"
    assert len(history(run)) == 2 and not (run / "metrics.json").exists()
    run_main(*options, tmp_path / "stopped", "--resume")
    assert outcome(run) == outcome(tmp_path / "alone" / "temp_lstm")


@pytest.mark.slow
def test_a_run_killed_at_six_instants_ends_as_if_left_alone(daily_path, tmp_path):
    options = [*DAILY, "gru", "--epochs", 60, "--patience", 0, "--data", daily_path, "--resume"]
    command = [sys.executable, *map(str, (ROOT / "temp_forecast.py", *options)), "--out"]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    subprocess.run([*command, tmp_path / "alone"], check=True, **quiet)
    random.seed(0)
    for _ in range(6):
        process = subprocess.Popen([*command, tmp_path / "killed"], **quiet)
        for line in process.stdout:
            if b"parameters" in line:  # training begins
                break
        time.sleep(random.uniform(0, 0.5))
        process.kill()
        process.communicate()
    subprocess.run([*command, tmp_path / "killed"], check=True, **quiet)
    assert outcome(tmp_path / "killed" / "temp_gru") == outcome(tmp_path / "alone" / "temp_gru")


# --- prediction ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hourly(tmp_path_factory):
    """(folder, series) of a run on hours: two days in, one out."""
    folder = tmp_path_factory.mktemp("hourly")
    path = folder / "series.csv"
    samples.temperatures(years=2).iloc[: 24 * 420].to_csv(path, index=False)
    options = ["--freq", "h", "--epochs", 1, "--history-days", 2, "--horizon-days", 1, "--lr", 0.01]
    run_main(*DAILY, "gru", *options, "--data", path, "--out", folder)
    return folder, path


@pytest.mark.parametrize(("freq", "known", "horizon", "days"), [("h", 48, 24, 2), ("D", 5, 2, 5)])
def test_a_saved_model_forecasts_what_it_forecast_in_its_test(
    freq, known, horizon, days, finished, daily_path, hourly, tmp_path, capsys
):
    folder, path = hourly if freq == "h" else (finished, daily_path)
    rows = pd.read_csv(folder / "temp_gru" / "predictions.csv").iloc[-horizon:]  # the last segment
    stamps, frame = rows["Date Time"].tolist(), pd.read_csv(path)
    first = frame["Date Time"].tolist().index(stamps[0])
    recent, arguments = frame.iloc[first - known : first], ["--device", "cpu", "--checkpoint"]
    recent.to_csv(tmp_path / "recent.csv", index=False)
    arguments += [folder / "temp_gru" / "best.pt", "--predict", tmp_path / "recent.csv"]
    capsys.readouterr()
    run_main(*arguments)
    output = capsys.readouterr()
    header, *lines = csv.reader(output.out.splitlines())
    assert header == ["Date Time", TARGET, *SHOWN[1:]] and [line[0] for line in lines] == stamps
    cells = np.array([line[1:] for line in lines], float)
    assert cells == pytest.approx(rows[SHOWN].to_numpy(), abs=0.0056)
    said = output.err.splitlines()[-1]
    assert f"begins at {recent['Date Time'].iloc[-1]}" in said
    assert f"from {stamps[0]} to {stamps[-1]}" in said and f"{known} rows, 20" in output.err
    recent.iloc[1:].to_csv(tmp_path / "recent.csv", index=False)
    with pytest.raises(UserError, match=f"does not end with {days} whole days"):
        run_main(*arguments)
    assert capsys.readouterr().out == ""


def test_a_baseline_without_error_has_no_skill_but_a_dash(capsys):
    one, nought = np.ones((3, 2)), np.zeros((3, 2))
    forecasts = {"model": 2 * one, "persistence": one, "climatology": nought}
    entry = script.test_errors(one, forecasts, np.zeros((2, 2)))
    script.print_errors({"segments": entry}, "LSTM", "")
    lines = {
        line.split()[0]: line.split()[-1] for line in capsys.readouterr().out.splitlines()[3:6]
    }
    assert lines == {"LSTM": "1.000", "persistence": "-", "climatology": "0.0%"}


def test_fewer_windows_than_hours_between_them_still_train(tmp_path):
    stamps = pd.date_range("2009-01-01", periods=24 * 100, freq="10min")
    T = np.sin(np.arange(len(stamps)) / 23)
    weather = Weather(
        stamps, [TARGET], 144, 6, 3, T, np.zeros((1, 1)), 0 * T, np.ones(1),
        script.network_inputs(T[:, None], np.ones(1), stamps),
        {"train": np.arange(5), "validation": np.arange(100, 110)},
    )  # fmt: skip
    args = script.parse_args(["--epochs", "2", "--hidden", "3", "--out", str(tmp_path)])
    linear = script.LinearModels(torch.zeros(21, 3), torch.zeros(21, 3), None)
    run = script.train(args, "rnn", weather, {"sha256": ""}, linear, torch.device("cpu"))
    assert [record["epoch"] for record in run.history] == [1, 2] and run.steps == 2
