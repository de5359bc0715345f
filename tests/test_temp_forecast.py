"""Temperature forecasting: series, windows, linear models, baselines by hand; the script itself."""

import contextlib
import io

import conftest
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import NAMES, history, read_json, run_main

import samples
import temp_forecast as script
import training
from datasets import UserError
from temp_forecast import STAMP, TARGET, Weather, calendar, read_series


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


@pytest.mark.parametrize(("freq", "longest"), [("h", 3), ("10min", 18), ("D", 0)])
def test_gaps_of_up_to_three_hours_are_filled_but_at_the_ends(freq, longest):
    values = np.arange(4.0 * longest + 40) / 8
    shown, second = values.astype(object), slice(longest + 10, 2 * longest + 11)
    shown[5 : 5 + longest] = shown[second] = "gone"
    shown[[0, -1]] = "no number"
    values[second] = values[[0, -1]] = np.nan
    minutes = {"h": 60, "10min": 10, "D": 1440}[freq]
    series = read_series(rows_every(minutes, shown.tolist()), "x.csv", freq)
    assert series[TARGET].to_numpy() == pytest.approx(values, nan_ok=True)


def test_directions_are_averaged_around_north():
    frame = rows_every(30, [1, 1, 2, 2], **{"wd (deg)": [350, 10, 80, 100]})
    series, cos_10 = read_series(frame, "x.csv", "h"), np.cos(np.pi / 18)
    assert list(series) == [TARGET, "wd (deg) sine", "wd (deg) cosine"]
    assert series.to_numpy() == pytest.approx(np.array([[1, 0, cos_10], [2, cos_10, 0]]))


@pytest.mark.parametrize(
    ("minutes", "freq", "size", "enough"), [(60, "D", 24, 18), (1, "10min", 10, 8)]
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


@pytest.mark.parametrize("signal", [0.1, 3.0])
def test_the_linear_models_are_the_ridge_regressions_with_the_least_validation_error(signal):
    frame = wandering().assign(p=np.random.default_rng(1).standard_normal(800))
    frame[TARGET] += signal * frame["p"].shift(2, fill_value=0)
    weather, free = weather_of(frame, "--features", "all"), 1e-9
    train, validation = weather.starts["train"], weather.starts["validation"]
    found = script.fit_linear_models(weather)

    def features(starts):
        X = weather.inputs[weather.past(starts)].astype(float)  # (n, 5, 6)
        columns, one, waves = X[:, :, :2], np.ones(len(starts)), X[:, -1, 2:].T[:, :, None]
        x = np.c_[columns[:, :, 0], one]
        z = np.c_[columns.reshape(len(starts), 10), columns[:, -1], one]  # a day's mean is its step
        products = [x * waves[0], x * waves[1], z, *(z * wave for wave in waves)]
        return np.concatenate([x, *products], axis=1)  # 18 features of x, 65 of z

    def fit(starts, size, penalty, times):
        factors = np.r_[[1] * 6, [times] * 12, [1] * 13, [times] * 52][:size]
        factors[5] = free / penalty
        return ridge(features(starts)[:, :size], weather.targets(starts), penalty * factors)

    X, Y = features(validation), weather.targets(validation)
    for size, matrices in zip((18, 83), found, strict=True):
        choices = [(p, q) for p in script.PENALTIES for q in script.FACTORS]
        best = min(choices, key=lambda c: np.abs(Y - X[:, :size] @ fit(train, size, *c)).mean())
        for W, starts in zip(matrices, (train, np.r_[train, validation]), strict=True):
            assert np.allclose(W[:size], fit(starts, size, *best), rtol=1e-3, atol=1e-4)
            assert not W[size:].any()


def made_weather(index, values, climatology, starts, **others):
    """A Weather with this temperature, climatology and unit scale."""
    inputs = script.network_inputs((values - climatology)[:, None], np.ones(1), index)
    fields = {"truth": values, "climatology": climatology, "scale": np.ones(1), "inputs": inputs}
    return Weather(index, [TARGET], coefficients=np.zeros((1, 1)), starts=starts, **fields | others)


def test_baselines_by_hand():
    index, values = pd.date_range("2009-01-01", periods=40, freq="12h"), np.arange(40.0)
    sizes = {"steps_a_day": 2, "known": 4, "horizon": 4, "scale": np.array([3.0])}
    weather = made_weather(index, values, 100 + 2 * values, {}, **sizes)
    # Steps 10..13 are known, 14..17 come; a day has two steps.
    # Anomalies: -100 - step. The linear model takes the first one, 1, minus the last one, nothing.
    W = np.zeros((3 * 5 + 5 * 5, 4))
    W[0, 0], W[4, 1], W[3, 2] = 1, 1, -1
    found = script.baseline_forecasts(weather, np.array([10, 21]), W)
    assert {name: forecast.tolist() for name, forecast in found.items()} == {
        "persistence": [[13] * 4, [24] * 4],
        "seasonal_naive": [[12, 13, 12, 13], [23, 24, 23, 24]],
        "climatology": [[128, 130, 132, 134], [150, 152, 154, 156]],
        "linear": [[-202, 133, 471, 134], [-213, 155, 526, 156]],
    }


def test_fewer_windows_than_hours_between_them_still_train(tmp_path):
    index = pd.date_range("2009-01-01", periods=2400, freq="10min")
    values, starts = np.sin(np.arange(2400) / 23), {"train": np.arange(5)}
    starts["validation"] = np.arange(300, 310)
    sizes = {"steps_a_day": 144, "known": 144, "horizon": 3}
    weather = made_weather(index, values, 0 * values, starts, **sizes)
    args = script.parse_args(["--epochs", "2", "--hidden", "3", "--out", str(tmp_path)])
    run = script.train(args, "rnn", weather, {"sha256": ""}, np.zeros((1, 1)), torch.device("cpu"))
    assert run.steps == 2


def test_errors_coverage_and_skill_by_hand(capsys):
    truth, model = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.5, 2.0], [2.0, 8.0]])
    band = np.array([[-0.5, -1.0], [0.5, 1.0]])
    # truth - model: -0.5 (on the edge) and 0 inside, 1 and -4 outside
    forecasts = {"model": model, "persistence": truth + 1, "linear": truth * 2, "perfect": truth}
    entry = script.test_errors(truth, forecasts, band)
    script.print_errors({"segments": entry}, "")
    assert entry.pop("rmse") == pytest.approx((17.25 / 4) ** 0.5) and entry == {
        "windows": 2, "mean_error": 1.375, "median_error": 0.75, "coverage_80": 0.5,
        "baselines": {"persistence": {"mean_error": 1, "median_error": 1},
                      "linear": {"mean_error": 2.5, "median_error": 2.5},
                      "perfect": {"mean_error": 0, "median_error": 0}},
    }  # fmt: skip
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model", "1.375", "0.750", "-"] in lines
    assert ["linear", "2.500", "2.500", "0.450"] in lines  # 1 - 1.375 / 2.5
    assert ["perfect", "0.000", "0.000", "-"] in lines
    above = script.test_errors(truth, {"model": truth - band[1]}, band)  # on the other edge
    assert above["coverage_80"] == 1


# --- the script ---------------------------------------------------------------------------------

DAILY = ["--freq", "D", "--train-years", 1, "--hidden", 4, "--batch-size", 64]
DAILY += ["--device", "cpu", "--epochs"]
SHOWN = ["forecast (degC)", "low 10 % (degC)", "high 90 % (degC)"]


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
    options = ["--model", "all", "--features", "all", "--lr", 0.01, "--data", daily_path]
    with contextlib.redirect_stdout(io.StringIO()) as output:
        run_main(script, *DAILY, 2, *options, "--out", folder, pictures=("temp_bilstm", "temp_all"))
    (folder / "stdout.txt").write_text(output.getvalue(), encoding="utf-8")
    return folder


def test_the_files_of_a_run_and_of_the_comparison(finished, daily_path):
    run, comparison = finished / "temp_bilstm", finished / "temp_all"
    files = {"metrics.json", "history.csv", "best.pt", "last.pt", "predictions.csv"}
    files |= {"curves.png", "forecasts.png", "lead_time.png"}
    assert {path.name for path in run.iterdir()} == files
    files = {"comparison.json", "comparison.png"}
    assert {path.name for path in comparison.iterdir()} == files
    pictures = [*run.glob("*.png"), *comparison.glob("*.png")]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
    metrics = read_json(run / "metrics.json")
    assert len(metrics["data"].pop("sha256")) == 64
    assert metrics["data"] == {"path": str(daily_path), "source": "file", "rows": 800}
    assert metrics["split"] == {"train": 286, "validation": 67, "test": 429}
    windows = {part: entry["windows"] for part, entry in metrics["test"].items()}
    assert windows == {"segments": 435 // 7, "daily_origins": 435 - 6}
    scores = history(run)["validation_mean_error"]
    assert len(scores) == 2 and metrics["best_epoch"] == scores.argmin() + 1


def test_the_errors_can_be_counted_again_from_the_predictions(finished, daily_path):
    rows = pd.read_csv(finished / "temp_bilstm" / "predictions.csv")
    assert rows["segment"].tolist() == [i for i in range(1, 63) for _ in range(2)]
    assert rows["hours ahead"].tolist() == [24, 48] * 62
    assert rows["Date Time"][0] == "06.01.2010 00:00:00"
    assert rows["Date Time"][2] == "13.01.2010 00:00:00"
    days = pd.read_csv(daily_path, index_col="Date Time")[TARGET]
    assert rows[TARGET].to_numpy() == pytest.approx(days[rows["Date Time"]].to_numpy(), abs=1e-3)
    entry = read_json(finished / "temp_bilstm" / "metrics.json")["test"]["segments"]
    errors = (rows[TARGET] - rows[SHOWN[0]]).abs()
    inside = rows[TARGET].between(rows[SHOWN[1]], rows[SHOWN[2]]).mean()
    expected = [errors.mean(), errors.median(), (errors**2).mean() ** 0.5, inside]
    found = [entry[key] for key in ("mean_error", "median_error", "rmse", "coverage_80")]
    assert found == pytest.approx(expected, abs=2e-3) and 0.5 < inside < 1


def test_the_comparison_shows_the_four_runs_and_the_baselines(finished):
    runs = {NAMES[key]: read_json(finished / f"temp_{key}" / "metrics.json") for key in NAMES}
    assert read_json(finished / "temp_all" / "comparison.json") == runs
    output = (finished / "stdout.txt").read_text(encoding="utf-8")
    table = output[output.index("segments, mean") :].splitlines()[1:9]
    entries, names = [own["test"] for own in runs.values()], [*NAMES.values()]
    for name in ("persistence", "seasonal_naive", "climatology", "linear"):
        names.append(name.replace("_", " "))
        entries.append({part: own["baselines"][name] for part, own in entries[0].items()})
    for name, line, entry in zip(names, table, entries, strict=True):
        numbers = [own[f"{kind}_error"] for own in entry.values() for kind in ("mean", "median")]
        assert line.strip().startswith(name)
        assert [float(cell) for cell in line.split()[-4:]] == pytest.approx(numbers, abs=6e-4)


@pytest.mark.parametrize("lr", [1e-12, 0.02])
def test_the_forecast_is_the_mean_of_network_and_linear_model_with_a_band_of_80_percent(
    lr, tmp_path, monkeypatch, capsys
):
    losses, step = [], training.Run.step

    def recorded(self, loss):
        losses.append(loss.item())
        step(self, loss)

    monkeypatch.setattr(training.Run, "step", recorded)
    frame = wandering().assign(p=np.random.default_rng(1).standard_normal(800))
    frame[TARGET] += 0.2 * frame["p"].shift(1, fill_value=0)
    frame.to_csv(tmp_path / "daily.csv", index=False)
    options = ["--lr", lr, "--average", 0, "--features", "all", "--data", tmp_path / "daily.csv"]
    run_main(script, *DAILY, 1, "--model", "gru", *options, "--out", tmp_path)
    output, run = capsys.readouterr().out, tmp_path / "temp_gru"
    weather = weather_of(frame, "--features", "all")
    small, large = script.fit_linear_models(weather)
    model, last = (torch.load(run / name) for name in ("best.pt", "last.pt"))
    model = script.build_model(model["options"]).eval()
    weights = {key[7:]: value for key, value in last["averaged"].items() if key[:7] == "module."}
    model.load_state_dict(weights | {"W_xq": torch.zeros_like(model.W_xq)})

    def own(starts, W_xq):  # the network alone, on its linear part
        inputs = torch.from_numpy(weather.inputs[weather.past(starts)]).transpose(0, 1)
        return model(inputs).detach().numpy() + weather.linear_features(starts) @ W_xq

    def degrees(starts, anomalies):
        return weather.climatology[weather.future(starts)] + anomalies * weather.scale[0]

    for part in ("train", "validation"):
        starts = weather.starts[part]
        truth = weather.truth[weather.future(starts)]
        errors = truth - degrees(starts, own(starts, small.train))
        found = history(run)[f"{part}_mean_error"].to_numpy()
        assert found == pytest.approx(np.abs(errors).mean(), abs=1e-4)
    if lr < 1e-9:  # an epoch's batches are all 286 windows: four times 64, and 30
        trained = np.average(losses, weights=[64, 64, 64, 64, 30])
        assert trained == pytest.approx(history(run)["train_mean_error"][0], abs=1e-4)
    ridge = weather.linear_features(starts) @ large.train

    def mixed(share):
        return truth - degrees(starts, share * own(starts, small.train) + (1 - share) * ridge)

    share = min((0.25, 0.5, 0.75, 1), key=lambda share: np.abs(mixed(share)).mean())
    assert f"{share:.0%} network and {1 - share:.0%} ridge" in output and share < 1
    # The band: linear interpolation between the sorted validation errors of each lead time.
    columns, places = np.sort(mixed(share), axis=0).T, np.linspace(0, 1, len(starts))
    band = np.array([[np.interp(q, places, column) for column in columns] for q in (0.1, 0.9)])
    assert np.array(torch.load(run / "best.pt")["band"]) == pytest.approx(band, abs=1e-4)
    starts = weather.starts["segments"]
    linear = (1 - share) * weather.linear_features(starts) @ large.both
    expected = degrees(starts, share * own(starts, small.both) + linear)
    columns = np.stack([expected, expected + band[0], expected + band[1]], axis=2).reshape(-1, 3)
    rows = pd.read_csv(run / "predictions.csv")[SHOWN].to_numpy()
    assert rows == pytest.approx(columns, abs=2e-3)
    run_main(script, *DAILY, 1, "--model", "gru", *options, "--out", tmp_path, "--resume")
    again = pd.read_csv(run / "predictions.csv")[SHOWN].to_numpy()  # of a run that was finished
    assert (again == rows).all()


@pytest.mark.parametrize("model", NAMES)
def test_plain_and_fast_loops_give_the_same_epoch(model, daily_path, tmp_path):
    options = ["--model", model, "--dropout", 0, "--lr", 0.01, "--batch-size", 16]
    conftest.assert_loops_agree(script, [*DAILY, 1, *options, "--data", daily_path], tmp_path)


def test_no_test_value_reaches_training(daily_path, tmp_path):
    # The years that test become hotter and wilder: what is learned stays the same to the last bit.
    frame, saved = pd.read_csv(daily_path), []
    frame.loc[365:, TARGET] = 20 - 2 * frame.loc[365:, TARGET]
    frame.loc[365:, "p (mbar)"] = np.arange(435)
    frame.to_csv(tmp_path / "hot.csv", index=False)
    for data in (daily_path, tmp_path / "hot.csv"):
        out = tmp_path / data.stem
        options = ["--model", "rnn", "--features", "all", "--data", data, "--out", out]
        run_main(script, *DAILY, 2, *options)
        saved.append(torch.load(out / "temp_rnn" / "best.pt", weights_only=True))
    assert all(saved[0][key] == saved[1][key] for key in ("climatology", "scale", "band"))
    weights = saved[0]["weights"].items()
    assert all(torch.equal(tensor, saved[1]["weights"][name]) for name, tensor in weights)


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(daily_path, tmp_path):
    options = [*DAILY, 4, "--model", "lstm", "--lr", 0.01, "--data", daily_path]
    conftest.assert_a_resumed_run_repeats(script, options, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_six_instants_ends_as_if_left_alone(daily_path, tmp_path):
    options = [*DAILY, 60, "--model", "gru", "--patience", 0, "--data", daily_path]
    conftest.assert_a_killed_run_repeats(script, options, tmp_path, kills=6)


# --- prediction ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hourly(tmp_path_factory):
    """(folder, series) of a run on hours: two days in, one out."""
    folder = tmp_path_factory.mktemp("hourly")
    path = folder / "series.csv"
    samples.temperatures(years=2).iloc[: 24 * 420].to_csv(path, index=False)
    options = ["--model", "gru", "--freq", "h", "--history-days", 2, "--horizon-days", 1]
    run_main(script, *DAILY, 1, *options, "--lr", 0.01, "--data", path, "--out", folder)
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
    run_main(script, *arguments)
    output = capsys.readouterr()
    lines = [line.split(",") for line in output.out.splitlines()]
    assert lines[0] == ["Date Time", TARGET, *SHOWN[1:]]
    assert [line[0] for line in lines[1:]] == stamps
    cells = np.array([line[1:] for line in lines[1:]], float)
    assert cells == pytest.approx(rows[SHOWN].to_numpy(), abs=0.0056)
    said = output.err.splitlines()[-1]
    assert all(stamp in said for stamp in (recent["Date Time"].iloc[-1], stamps[0], stamps[-1]))
    recent.iloc[1:].to_csv(tmp_path / "recent.csv", index=False)
    with pytest.raises(UserError, match=f"does not end with {days} whole days"):
        run_main(script, *arguments)
    assert capsys.readouterr().out == ""
