"""Temperature forecasting: series, windows, linear models, baselines by hand; the script itself."""

from unittest.mock import Mock

import conftest
import numpy as np
import pandas as pd
import pytest
import samples
import torch
import training
from conftest import NAMES, history, read_json, run_main
from datasets import UserError

import temp_forecast as script
from temp_forecast import STAMP, TARGET, Weather, read_series


def rows_every(minutes, values, **columns):
    """A frame with a row every so many minutes; where the value is "gone" there is no row."""
    stamps = pd.date_range("2009-01-01", periods=len(values), freq=f"{minutes}min")
    frame = pd.DataFrame({"Date Time": stamps.strftime(STAMP), TARGET: values, **columns})
    return frame[frame[TARGET] != "gone"]


def test_flaws_of_a_series_by_hand(capsys):
    values = [1, 2, -9999, 3, 60.01, -90.01, 9, 9, "--", "1,5", 60, -90, 7, 7, -np.inf, 6]
    pressures = [1000] * 4 + [-998.9, 4000, np.inf, 1000] + [1000] * 3 + [-999, "x", None, 1, 1]
    frame = rows_every(15, values, p=pressures, **{"wd (deg)": [350, 10] * 6 + [80, 100] * 2})
    frame = pd.concat([frame, frame.iloc[[15]].assign(**{TARGET: 8})])  # 03:45 once more
    series = read_series(frame.sample(frac=1, random_state=0, ignore_index=True), "x.csv", "h")
    # An hour needs three of its four rows. 0: 1, 2, 3. 1 and 2: two each, missing, interpolated.
    # 3: 7, 7 and the mean of 6 and 8. Half of the hours may be missing.
    assert series[TARGET].to_numpy() == pytest.approx([2, 2 + 5 / 3, 2 + 10 / 3, 7])
    # Hour 3: two rows, missing, and nothing behind it.
    expected = [1000, (-998.9 + 4000 + 1000) / 3, 1000, np.nan]
    assert series["p"].to_numpy() == pytest.approx(expected, nan_ok=True)
    cos_10 = np.cos(np.pi / 18)  # directions are averaged around north
    assert series["wd (deg) sine"].to_numpy() == pytest.approx([0, 0, 0, cos_10])
    assert series["wd (deg) cosine"].to_numpy() == pytest.approx([cos_10, cos_10, cos_10, 0])
    output = capsys.readouterr().out
    for part in ("17 rows, 2009-01-01 00:00 to 2009-01-01 03:00", "1 repeated", "6 impossible",
                 f"2 in {TARGET}, 1 in p;", "4 steps, 2 of 2 missing"):  # fmt: skip
        assert part in output


@pytest.mark.parametrize(
    ("freq", "minutes", "size", "enough", "longest"),
    [("h", 1, 60, 45, 3), ("10min", 1, 10, 8, 18), ("D", 60, 24, 18, 0)],
)
def test_thin_steps_and_gaps_over_three_hours_are_missing(freq, minutes, size, enough, longest):
    steps, too_long = 4 * longest + 40, slice(longest + 10, 2 * longest + 11)
    rows = np.arange(steps * size).reshape(steps, size) / 60  # on one line
    expected, shown = rows.mean(axis=1), rows.astype(object)
    shown[3, enough:] = "gone"
    expected[3] = rows[3, :enough].mean()
    shown[6 : 6 + longest] = shown[too_long] = shown[[0, -1], enough - 1 :] = "gone"
    expected[too_long] = expected[[0, -1]] = np.nan
    found = read_series(rows_every(minutes, shown.ravel().tolist()), "x.csv", freq)[TARGET]
    assert found.to_numpy() == pytest.approx(expected, nan_ok=True)


def test_the_climatology_finds_the_cycles_that_made_a_series():
    index = pd.date_range("2009-01-01", "2011-12-31", freq="30min")
    hours = np.arange(len(index)) / 2 % 8760  # since New Year: none of the years is a leap year
    year, day = (np.exp(2j * np.pi * hours / cycle) for cycle in (365.25 * 24, 24))
    seasons = [np.ones(len(index)), year.real, year.imag]
    waves = [seasons[0], day.real, day.imag, (day**2).real, (day**2).imag]
    terms = [wave * season for wave in waves for season in seasons]
    terms = np.stack([*terms, (year**2).real, (year**2).imag], axis=1)
    values = terms @ np.random.default_rng(0).standard_normal((17, 2))
    holes, design = values.copy(), script.harmonics(index)
    holes[100:200, 0] = holes[300:400, 1] = np.nan
    assert np.allclose(design @ script.fit_climatology(design, holes), values, atol=1e-8)


def weather_of(frame, *options):
    """A frame as `prepare` makes it, with one year of training; on days unless options say else."""
    args = script.parse_args(["--train-years", "1", "--freq", "D", *options])
    return script.prepare(args, read_series(frame, "x.csv", args.freq), "x.csv")


def test_the_parts_of_a_daily_series_by_hand(capsys):
    # 2009 trains, 73 days at its end validate; of the 45 days of 2010 day 9 (the 10th) is missing.
    weather = weather_of(rows_every(1440, [5] * (365 + 9) + ["gone"] + [5] * 35))
    assert {name: starts.tolist() for name, starts in weather.starts.items()} == {
        "train": [*range(292 - 6)],
        "validation": [*range(292, 365 - 6)],
        # Days 0-6, 7-13 (touches day 9), 14-20, ..., 35-41; the last three are no segment.
        "segments": [365 + day for day in (0, 14, 21, 28, 35)],
        # 45 - 7 + 1 = 39 windows; those that begin on days 3..9 touch day 9.
        "daily_origins": [365 + day for day in (*range(3), *range(10, 39))],
    }
    output = capsys.readouterr().out
    assert "5 segments (-1)" in output and "32 daily origins (-7)" in output


def wandering(signal=0.5):
    """800 days of noise p and of a temperature that feels the p of two days ago:
    T_t = 10 + x_t + signal p_t-2, x_t = 0.8 x_t-1 + noise; in autumn x changes its sign daily."""
    noise, p = np.random.default_rng(0).standard_normal((2, 800))
    x = pd.Series(noise).ewm(alpha=0.2, adjust=False).mean() / 0.2
    x = x.where(np.arange(800) % 365 < 200, x * (-1.0) ** np.arange(800))
    return rows_every(1440, 10 + x + signal * pd.Series(p).shift(2, fill_value=0), p=p)


def test_climatology_scale_and_choice_of_columns_come_from_the_training_years(capsys):
    late, half = np.full(800, np.nan), np.full(800, 1.0)
    late[365:], half[: 292 // 2] = 1.0, np.nan  # half of the training years
    frame = wandering().assign(late=late, half=half, zero=0.0, constant=1013.25)
    weather, columns = weather_of(frame, "--features", "all"), [TARGET, "p", "zero", "constant"]
    phase, values = 2 * np.pi * np.r_[:365, :365, :70] / 365.25, frame[columns].to_numpy()
    waves = [f(k * phase) for k in (1, 2) for f in (np.sin, np.cos)]
    design = np.stack([np.ones(800), *waves], axis=1)
    fitted = design @ np.linalg.lstsq(design[:365], values[:365], rcond=None)[0]
    scale = (values - fitted)[:292].std(axis=0)
    scale[2:] = 1  # a constant column keeps its unit
    assert weather.columns == columns and weather.scale == pytest.approx(scale)
    assert weather.climatology == pytest.approx(fitted[:, 0])
    calendar = [waves[0], waves[1], np.zeros(800), np.ones(800)]  # every day: 0 o'clock
    inputs = np.c_[(values - fitted) / scale, np.stack(calendar, axis=1)]
    assert weather.inputs == pytest.approx(inputs, abs=1e-4)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert ["half" in lines[0], "late" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize("signal", [0.5, 3.0])
def test_the_linear_models_are_the_ridge_regressions_with_the_least_validation_error(signal):
    weather = weather_of(wandering(signal), "--features", "all")
    train, validation = weather.starts["train"], weather.starts["validation"]

    def fit(starts, size, penalty, factor):
        # 18 features of x and its products with the season, 65 of z, season and hour
        penalties = penalty * np.r_[[1] * 6, [factor] * 12, [1] * 13, [factor] * 52][:size]
        penalties[5] = 1e-9  # the constant of x is free
        # Ridge regression is least squares with a row sqrt(penalty) for each coefficient.
        X = np.vstack([weather.linear_features(starts)[:, :size], np.diag(np.sqrt(penalties))])
        Y = np.vstack([weather.targets(starts), np.zeros((size, 2))])
        return np.linalg.lstsq(X, Y, rcond=None)[0]

    X, Y = weather.linear_features(validation), weather.targets(validation)
    choices = [(p, q) for p in script.PENALTIES for q in script.FACTORS]
    for size, found in zip((18, 83), script.fit_linear_models(weather), strict=True):
        best = min(choices, key=lambda c: np.abs(Y - X[:, :size] @ fit(train, size, *c)).mean())
        for W, starts in ((found["train"], train), (found["both"], np.r_[train, validation])):
            assert np.allclose(W[:size], fit(starts, size, *best), rtol=1e-3, atol=1e-4)
            assert not W[size:].any()


def test_baselines_by_hand():
    index, values = pd.date_range("2009-01-01", periods=40, freq="12h"), np.arange(40.0)
    inputs = script.network_inputs(-100 - values[:, None], 1, index)
    weather = Weather(
        index, [TARGET], steps_a_day=2, known=4, horizon=4, truth=values, coefficients=None,
        climatology=100 + 2 * values, scale=np.array([3.0]), inputs=inputs, starts={},
    )  # fmt: skip
    # Steps 10..13 are known, 14..17 come; a day has two steps.
    found = script.baseline_forecasts(weather, np.array([10, 21]), np.zeros((3 * 5 + 5 * 5, 4)))
    climatology = [[128, 130, 132, 134], [150, 152, 154, 156]]
    assert {name: forecast.tolist() for name, forecast in found.items()} == {
        "persistence": [[13] * 4, [24] * 4],
        "seasonal_naive": [[12, 13, 12, 13], [23, 24, 23, 24]],
        "climatology": climatology,
        "linear": climatology,  # of weights 0
    }


# --- the script ---------------------------------------------------------------------------------

DAILY = ["--freq=D", "--train-years=1", "--hidden=4", "--batch-size=64", "--device=cpu", "--epochs"]
SHOWN = ["forecast (degC)", "low 10 % (degC)", "high 90 % (degC)"]


@pytest.fixture(scope="module")
def daily_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("series") / "daily.csv"
    wandering().assign(**{"wd (deg)": np.arange(800) * 37 % 360}).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(("windows", "steps"), [(1, 4), (6, 8), (60, 80)])  # of four epochs
def test_an_epoch_takes_a_window_every_three_hours(windows, steps, tmp_path, monkeypatch):
    losses = []
    monkeypatch.setattr(training.Run, "step", lambda self, loss: losses.append(loss.item()))
    weather = weather_of(samples.temperatures(years=2), "--freq", "h")
    starts = weather.starts["train"] = weather.starts["train"][:windows]
    W = np.zeros((weather.linear_features(starts).shape[1], 48))
    W[119] = 1  # the untrained network forecasts the last known anomaly
    args = script.parse_args(["--epochs=4", "--hidden=3", "--batch-size=1", f"--out={tmp_path}"])
    script.train(args, "rnn", weather, {"sha256": ""}, W, torch.device("cpu"))
    anomalies = weather.truth - weather.climatology
    possible = [np.abs(anomalies[i + 120 : i + 168] - anomalies[i + 119]).mean() for i in starts]
    assert len(losses) == steps
    assert all(np.isclose(loss, possible, atol=1e-4).any() for loss in losses)
    if windows == 60:
        seen = [np.abs(np.array(possible) - loss).argmin() for loss in losses]
        assert seen[:20] != sorted(seen[:20])  # in random order
        assert len(set(seen)) > 20  # not the same hours in every epoch


def test_the_validation_error_decides(tmp_path, monkeypatch):
    weather = weather_of(wandering())
    W = np.zeros((weather.linear_features(weather.starts["train"][:1]).shape[1], 2))
    errors = Mock(side_effect=[3.0, 1.0, 2.0, 2.0])  # of training and validation, two epochs
    monkeypatch.setattr(script, "mean_error", errors)
    args = script.parse_args(["--freq=D", "--epochs=2", "--hidden=3", f"--out={tmp_path}"])
    run = script.train(args, "rnn", weather, {"sha256": ""}, W, torch.device("cpu"))
    assert run.best["epoch"] == 1


def test_the_forecast_mixes_network_and_ridge_with_a_band(daily_path, tmp_path, capsys):
    options = [*DAILY, 1, "--model=gru", "--lr=0.02", "--batch-size=16", "--features=all"]
    options += ["--data", daily_path, "--out", tmp_path]
    run_main(script, *options)
    output, run = capsys.readouterr().out, tmp_path / "temp_gru"
    saved, predictions = torch.load(run / "best.pt"), pd.read_csv(run / "predictions.csv")
    weather = weather_of(pd.read_csv(daily_path), "--features", "all")
    small, large = script.fit_linear_models(weather)
    network = script.build_model(saved["options"]).eval()
    network.load_state_dict(saved["weights"])
    network.share.fill_(1)
    network.W_xq.zero_()  # the network alone

    def errors(part, share, small=small["train"], large=large["train"]):
        """Truth minus the mixture of large ridge and small ridge that the network corrects."""
        starts = weather.starts[part]
        features, future = weather.linear_features(starts), weather.future(starts)
        inputs = torch.from_numpy(weather.inputs[weather.past(starts)]).transpose(0, 1)
        corrected = network(inputs).detach().numpy() + features @ small
        anomalies = share * corrected + (1 - share) * features @ large
        return weather.truth[future] - weather.climatology[future] - anomalies * weather.scale[0]

    for part in ("train", "validation"):
        expected = np.abs(errors(part, 1)).mean()
        assert history(run)[f"{part}_mean_error"][0] == pytest.approx(expected, abs=1e-5)
    share = min((0.25, 0.5, 0.75, 1), key=lambda share: np.abs(errors("validation", share)).mean())
    assert f"{share:.0%} network and {1 - share:.0%} ridge" in output and share < 1
    band = np.quantile(errors("validation", share), [0.1, 0.9], axis=0)
    assert np.array(saved["band"]) == pytest.approx(band, abs=1e-4)
    assert predictions["hours ahead"][:3].tolist() == [24, 48, 24]
    found = predictions[SHOWN].to_numpy() - predictions[[TARGET]].to_numpy()
    expected = -errors("segments", share, small["both"], large["both"])
    expected = np.stack([expected, expected + band[0], expected + band[1]], axis=2)
    assert found == pytest.approx(expected.reshape(-1, 3), abs=2e-3)
    linear = read_json(run / "metrics.json")["test"]["segments"]["baselines"]["linear"]
    expected = np.abs(errors("segments", 0, large=large["both"]))
    expected = {"mean_error": expected.mean(), "median_error": np.median(expected)}
    assert linear == pytest.approx(expected, abs=1e-4)
    run_main(script, *options, "--resume")  # of a run that was finished
    assert pd.read_csv(run / "predictions.csv").equals(predictions)


@pytest.mark.parametrize("model", NAMES)
def test_plain_and_fast_loops_give_the_same_epoch(model, daily_path, tmp_path):
    options = ["--model", model, "--dropout", 0, "--lr", 0.01, "--batch-size", 16]
    conftest.assert_loops_agree(script, [*DAILY, 1, *options, "--data", daily_path], tmp_path)


def test_no_test_value_reaches_training(daily_path, tmp_path):
    # The years that test become hotter and wilder: what is learned stays the same to the last bit.
    frame, saved = pd.read_csv(daily_path), []
    frame.loc[365:, [TARGET, "p"]] = 20 - 2 * frame.loc[365:, [TARGET, "p"]]
    frame.to_csv(tmp_path / "hot.csv", index=False)
    options = [*DAILY, 2, "--model=rnn", "--features=all", "--out", tmp_path, "--data"]
    for data in (daily_path, tmp_path / "hot.csv"):
        run_main(script, *options, data)
        best = torch.load(tmp_path / "temp_rnn" / "best.pt")
        weights = [tensor.tolist() for tensor in best["weights"].values()]
        saved.append([weights, best["climatology"], best["scale"], best["band"]])
    assert saved[0] == saved[1]


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(daily_path, tmp_path):
    options = [*DAILY, 4, "--model", "lstm", "--lr", 0.01, "--data", daily_path]
    conftest.assert_a_resumed_run_repeats(script, options, tmp_path)


def test_all_four_structures_and_their_comparison(daily_path, tmp_path, capsys):
    options = [*DAILY, 2, "--model", "all", "--lr", 0.01, "--data", daily_path, "--out", tmp_path]
    run_main(script, *options, pictures=("temp_bilstm", "temp_all"))
    pictures = {path.name for path in tmp_path.glob("*/*.png")}
    assert pictures == {"curves.png", "forecasts.png", "lead_time.png", "comparison.png"}
    runs = {NAMES[key]: read_json(tmp_path / f"temp_{key}" / "metrics.json") for key in NAMES}
    assert read_json(tmp_path / "temp_all" / "comparison.json") == runs
    scores = [history(tmp_path / f"temp_{key}")["validation_mean_error"] for key in NAMES]
    assert [own["best_epoch"] for own in runs.values()] == [own.argmin() + 1 for own in scores]
    entries = {name: own["test"] for name, own in runs.items()}
    for name in ("persistence", "seasonal_naive", "climatology", "linear"):
        own = {part: entry["baselines"][name] for part, entry in entries["RNN"].items()}
        entries[name.replace("_", " ")] = own
    table = capsys.readouterr().out.split("segments, mean")[1].splitlines()[1:9]
    for (name, entry), line in zip(entries.items(), table, strict=True):
        numbers = [own[f"{kind}_error"] for own in entry.values() for kind in ("mean", "median")]
        assert line.strip().startswith(name)
        assert [float(cell) for cell in line.split()[-4:]] == pytest.approx(numbers, abs=6e-4)


def test_predictions_give_the_errors_again_and_a_saved_model_repeats_them(tmp_path, capsys):
    # From 5 o'clock on: the test years begin at 5 o'clock, the 18 segments of 72 hours at midnight.
    frame = samples.temperatures(years=2)[5 : 24 * 420]
    frame.to_csv(tmp_path / "series.csv", index=False)
    options = [*DAILY, 1, "--freq=h", "--history-days=2", "--horizon-days=1", "--features=all"]
    options += ["--model=gru", "--data", tmp_path / "series.csv", "--out", tmp_path]
    run_main(script, *options)
    rows = pd.read_csv(tmp_path / "temp_gru" / "predictions.csv")
    assert rows["segment"].tolist() == [i + 1 for i in range(18) for _ in range(24)]
    assert rows["hours ahead"].tolist() == [hour + 1 for hour in range(24)] * 18
    first = frame["Date Time"].tolist().index("02.01.2010 00:00:00")
    truth = frame[first:].iloc[[72 * i + hour for i in range(18) for hour in range(48, 72)]]
    assert rows["Date Time"].tolist() == truth["Date Time"].tolist()
    assert rows[TARGET].to_numpy() == pytest.approx(truth[TARGET].to_numpy(), abs=1e-3)
    metrics = read_json(tmp_path / "temp_gru" / "metrics.json")
    assert metrics["split"] == {"train": 6937, "validation": 1681, "test": 52}
    errors = (rows[TARGET] - rows[SHOWN[0]]).abs()
    inside = rows[TARGET].between(rows[SHOWN[1]], rows[SHOWN[2]]).mean()
    entry = metrics["test"]["segments"]
    own = entry.pop("baselines")["persistence"]
    assert 0.5 < inside < 1 and entry == pytest.approx({
        "windows": 18, "mean_error": errors.mean(), "median_error": errors.median(),
        "rmse": (errors**2).mean() ** 0.5, "coverage_80": inside,
    }, abs=2e-3)  # fmt: skip
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["persistence", f"{own['mean_error']:.3f}", f"{own['median_error']:.3f}"] in table
    # The last segment once more, from its known days, a row before, and one without a temperature.
    recent = frame[first:].iloc[72 * 17 - 1 : 72 * 17 + 49].copy()
    recent.iloc[-1, 2] = -9999
    recent.to_csv(tmp_path / "recent.csv", index=False)
    arguments = ["--device", "cpu", "--checkpoint", tmp_path / "temp_gru" / "best.pt"]
    arguments += ["--predict", tmp_path / "recent.csv"]
    run_main(script, *arguments)
    header, *lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    assert header == ["Date Time", TARGET, *SHOWN[1:]]
    assert [line[0] for line in lines] == rows["Date Time"][-24:].tolist()
    cells = np.array([line[1:] for line in lines], float)
    assert cells == pytest.approx(rows[SHOWN][-24:].to_numpy(), abs=0.0056)
    recent.iloc[2:].to_csv(tmp_path / "recent.csv", index=False)
    with pytest.raises(UserError, match=r"does not end with \d whole days"):
        run_main(script, *arguments)
    assert capsys.readouterr().out == ""
