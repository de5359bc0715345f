"""Temperature forecasting: series, windows, linear models, baselines by hand; the script itself."""

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
from temp_forecast import STAMP, TARGET, Weather, read_series


def table(stamps, temperatures, **columns):
    """A frame in the file's form."""
    stamps = pd.DatetimeIndex(stamps).strftime(STAMP)
    return pd.DataFrame({"Date Time": stamps, TARGET: temperatures, **columns})


def rows_every(minutes, values, **columns):
    """A frame with a row every so many minutes; where the value is "gone" there is no row."""
    stamps = pd.date_range("2009-01-01", periods=len(values), freq=f"{minutes}min")
    frame = table(stamps, values, **columns)
    return frame[frame[TARGET] != "gone"]


def test_flaws_of_a_series_by_hand(capsys):
    values = [1, 2, -9999, 3, 60.01, -90.01, 9, 9, 7, 7, 7, 6, "--", "1,5", 60, -90]
    pressures = [*[1000] * 8, -998.9, 4000, -999, np.inf, 1000, 1000, 1000, 1000, "x", None, 1, 1]
    directions = [350, 10] * 8 + [80, 100] * 2
    frame = rows_every(15, [*values, 5, -np.inf, 5, 5], p=pressures, **{"wd (deg)": directions})
    frame = pd.concat([frame, frame.iloc[[11]].assign(**{TARGET: 8, "p": 1000})])  # 02:45 once more
    series = read_series(frame.sample(frac=1, random_state=0, ignore_index=True), "x.csv", "h")
    # An hour needs three of its four rows. 0: 1, 2, 3. 1: two, missing. 2: 7, 7, 7, and the mean
    # of 6 and 8. 3: two, missing. 4: three times 5. The missing hours are interpolated.
    assert series[TARGET].tolist() == [2, 4.5, 7, 6, 5]
    # Hour 2: -998.9, 4000, none and 1000. Hour 4: two rows, missing, and nothing behind it.
    expected = [1000, 1000, (-998.9 + 4000 + 1000) / 3, 1000, np.nan]
    assert series["p"].to_numpy() == pytest.approx(expected, nan_ok=True)
    cos_10 = np.cos(np.pi / 18)  # directions are averaged around north
    assert series["wd (deg) sine"].to_numpy() == pytest.approx([0, 0, 0, 0, cos_10])
    assert series["wd (deg) cosine"].to_numpy() == pytest.approx([*[cos_10] * 4, 0])
    output = capsys.readouterr().out
    for part in ("21 rows, 2009-01-01 00:00 to 2009-01-01 04:00", "1 repeated", "6 impossible",
                 f"2 in {TARGET}, 1 in p;", "5 steps, 2 of 2 missing"):  # fmt: skip
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


def test_more_than_half_of_the_steps_missing_is_refused():
    half = rows_every(60, [1, "gone", "gone", 4])
    assert read_series(half, "x.csv", "h")[TARGET].tolist() == [1, 2, 3, 4]
    with pytest.raises(UserError, match="half of the steps"):
        read_series(rows_every(60, [1, "gone", "gone", "gone", 5]), "x.csv", "h")


def test_the_climatology_finds_the_cycles_that_made_a_series():
    index = pd.date_range("2009-01-01", "2011-12-31", freq="30min")
    hours = np.arange(len(index)) / 2 % 8760  # since New Year: none of the years is a leap year
    year, day = (np.exp(2j * np.pi * hours / cycle) for cycle in (365.25 * 24, 24))
    seasons = [np.ones(len(index)), year.real, year.imag]
    waves = [seasons[0], day.real, day.imag, (day**2).real, (day**2).imag]
    terms = [wave * season for wave in waves for season in seasons]
    terms = np.stack([*terms, (year**2).real, (year**2).imag], axis=1)
    values = terms @ np.random.default_rng(0).standard_normal((17, 2))
    holes, design = values.copy(), script.harmonics(index, 48)
    holes[100:200, 0] = holes[300:400, 1] = np.nan
    assert np.allclose(design @ script.fit_climatology(design, holes), values, atol=1e-8)


def weather_of(frame, *options):
    """A frame as `prepare` makes it, with one year of training; on days unless options say else."""
    args = script.parse_args(["--train-years", "1", "--freq", "D", *options])
    return script.prepare(args, read_series(frame, "x.csv", args.freq), "x.csv")


def test_the_parts_of_a_daily_series_by_hand(capsys):
    # 2009 trains, 73 days at its end validate; of the 45 days of 2010 day 9 (the 10th) is missing.
    stamps = pd.date_range("2009-01-01", "2010-02-14", freq="D")
    stamps = stamps[stamps != pd.Timestamp("2010-01-10")]
    weather = weather_of(table(stamps, np.arange(len(stamps)) % 17.0))
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
    temperatures = 10 + x + signal * pd.Series(p).shift(2, fill_value=0)
    return table(pd.date_range("2009-01-01", periods=800), temperatures, p=p)


def test_climatology_scale_and_choice_of_columns_come_from_the_training_years(capsys):
    late, half = np.full(800, np.nan), np.full(800, 1.0)
    late[365:], half[: 292 // 2 + 1] = 1.0, np.nan
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
    assert weather.inputs[:, :4] == pytest.approx((values - fitted) / scale, abs=1e-4)
    calendar = [np.sin(phase), np.cos(phase), np.zeros(800), np.ones(800)]  # every day: 0 o'clock
    assert weather.inputs[:, 4:] == pytest.approx(np.stack(calendar, axis=1), abs=1e-6)
    lines = [line for line in capsys.readouterr().out.splitlines() if "left out" in line]
    assert ["half" in lines[0], "late" in lines[1], len(lines)] == [True, True, 2]


@pytest.mark.parametrize("signal", [0.5, 3.0])
def test_the_linear_models_are_the_ridge_regressions_with_the_least_validation_error(signal):
    weather = weather_of(wandering(signal), "--features", "all")
    train, validation = weather.starts["train"], weather.starts["validation"]

    def features(starts):
        X = weather.inputs[weather.past(starts)].astype(float)  # (n, 5, 6)
        columns, one, waves = X[:, :, :2], np.ones(len(starts)), X[:, -1, 2:].T[:, :, None]
        x = np.c_[columns[:, :, 0], one]
        z = np.c_[columns.reshape(len(starts), 10), columns[:, -1], one]  # a day's mean is its step
        blocks = [x, x * waves[0], x * waves[1], z, *(z * wave for wave in waves)]
        return np.concatenate(blocks, axis=1)  # 18 features of x, 65 of z

    def fit(starts, size, penalty, factor):
        penalties = penalty * np.r_[[1] * 6, [factor] * 12, [1] * 13, [factor] * 52][:size]
        penalties[5] = 1e-9  # the constant of x is free
        # Ridge regression is least squares with a row sqrt(penalty) for each coefficient.
        X = np.vstack([features(starts)[:, :size], np.diag(np.sqrt(penalties))])
        Y = np.vstack([weather.targets(starts), np.zeros((size, 2))])
        return np.linalg.lstsq(X, Y, rcond=None)[0]

    X, Y = features(validation), weather.targets(validation)
    choices = [(p, q) for p in script.PENALTIES for q in script.FACTORS]
    for size, found in zip((18, 83), script.fit_linear_models(weather), strict=True):
        best = min(choices, key=lambda c: np.abs(Y - X[:, :size] @ fit(train, size, *c)).mean())
        for W, starts in ((found.train, train), (found.both, np.r_[train, validation])):
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
    # The linear model takes the first scaled anomaly, -100 - step, 1, minus the last one, nothing.
    W = np.zeros((3 * 5 + 5 * 5, 4))
    W[0, 0], W[4, 1], W[3, 2] = 1, 1, -1
    found = script.baseline_forecasts(weather, np.array([10, 21]), W)
    assert {name: forecast.tolist() for name, forecast in found.items()} == {
        "persistence": [[13] * 4, [24] * 4],
        "seasonal_naive": [[12, 13, 12, 13], [23, 24, 23, 24]],
        "climatology": [[128, 130, 132, 134], [150, 152, 154, 156]],
        "linear": [[-202, 133, 471, 134], [-213, 155, 526, 156]],
    }


def test_errors_coverage_and_skill_by_hand(capsys):
    truth, model = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([[1.5, 1.0], [2.0, 8.0]])
    band = np.array([[-0.5, -1.0], [0.5, 1.0]])
    # truth - model: -0.5 and 1 on the edges, which are inside; 1 and -4 outside
    forecasts = {"model": model, "double": truth * 2, "perfect": truth}
    entry = script.test_errors(truth, forecasts, band)
    script.print_errors({"segments": entry}, "")
    assert entry.pop("rmse") == pytest.approx((18.25 / 4) ** 0.5) and entry == {
        "windows": 2, "mean_error": 1.625, "median_error": 1, "coverage_80": 0.5,
        "baselines": {"double": {"mean_error": 2.5, "median_error": 2.5},
                      "perfect": {"mean_error": 0, "median_error": 0}},
    }  # fmt: skip
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["model", "1.625", "1.000", "-"] in lines
    assert ["double", "2.500", "2.500", "0.350"] in lines  # 1 - 1.625 / 2.5
    assert ["perfect", "0.000", "0.000", "-"] in lines


# --- the script ---------------------------------------------------------------------------------

DAILY = ["--freq=D", "--train-years=1", "--hidden=4", "--batch-size=64", "--device=cpu", "--epochs"]
HOURLY = ["--freq=h", "--history-days=2", "--horizon-days=1"]
SHOWN = ["forecast (degC)", "low 10 % (degC)", "high 90 % (degC)"]


@pytest.fixture(scope="module")
def daily_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("series") / "daily.csv"
    wandering().assign(**{"wd (deg)": np.arange(800) * 37 % 360}).to_csv(path, index=False)
    return path


@pytest.mark.parametrize(("windows", "steps"), [(1, 4), (6, 8)])  # of four epochs
def test_an_epoch_takes_a_window_every_three_hours(windows, steps, tmp_path, monkeypatch):
    losses, cpu = [], torch.device("cpu")
    monkeypatch.setattr(training.Run, "step", lambda self, loss: losses.append(loss.item()))
    weather = weather_of(samples.temperatures(years=2), "--freq", "h")
    starts = weather.starts["train"] = weather.starts["train"][:windows]
    W = np.zeros((weather.linear_features(starts).shape[1], 48))
    W[119] = 1  # the untrained network forecasts the last known anomaly
    options = ["--epochs", "4", "--hidden", "3", "--batch-size", "1", "--out", str(tmp_path)]
    script.train(script.parse_args(options), "rnn", weather, {"sha256": ""}, W, cpu)
    anomalies = weather.truth - weather.climatology
    possible = [np.abs(anomalies[i + 120 : i + 168] - anomalies[i + 119]).mean() for i in starts]
    assert len(losses) == steps
    assert all(np.isclose(loss, possible, atol=1e-4).any() for loss in losses)


def test_the_forecast_mixes_network_and_ridge_with_a_band(daily_path, tmp_path, capsys):
    options = [*DAILY, 1, "--model", "gru", "--lr", 0.02, "--average", 0, "--features", "all"]
    options += ["--data", daily_path, "--out", tmp_path]
    run_main(script, *options)
    output, run = capsys.readouterr().out, tmp_path / "temp_gru"
    scores, saved = history(run).iloc[0], torch.load(run / "best.pt")
    weather = weather_of(pd.read_csv(daily_path), "--features", "all")
    small, large = script.fit_linear_models(weather)
    network = script.build_model(saved["options"]).eval()
    network.load_state_dict(saved["weights"])
    network.share.fill_(1)
    network.W_xq.zero_()  # the network alone

    def errors(part, share, small=small.train, large=large.train):
        """Truth minus the mixture of large ridge and small ridge that the network corrects."""
        starts = weather.starts[part]
        features, future = weather.linear_features(starts), weather.future(starts)
        inputs = torch.from_numpy(weather.inputs[weather.past(starts)]).transpose(0, 1)
        corrected = network(inputs).detach().numpy() + features @ small
        anomalies = share * corrected + (1 - share) * features @ large
        return weather.truth[future] - weather.climatology[future] - anomalies * weather.scale[0]

    for part in ("train", "validation"):
        expected = np.abs(errors(part, 1)).mean()
        assert scores[f"{part}_mean_error"] == pytest.approx(expected, abs=1e-4)
    share = min((0.25, 0.5, 0.75, 1), key=lambda share: np.abs(errors("validation", share)).mean())
    assert f"{share:.0%} network and {1 - share:.0%} ridge" in output and share < 1
    band = np.quantile(errors("validation", share), [0.1, 0.9], axis=0)
    assert np.array(saved["band"]) == pytest.approx(band, abs=1e-4)
    predictions = pd.read_csv(run / "predictions.csv")
    found = predictions[SHOWN].to_numpy() - predictions[[TARGET]].to_numpy()
    expected = -errors("segments", share, small.both, large.both)
    expected = np.stack([expected, expected + band[0], expected + band[1]], axis=2)
    assert found == pytest.approx(expected.reshape(-1, 3), abs=2e-3)
    linear = read_json(run / "metrics.json")["test"]["segments"]["baselines"]["linear"]
    expected = np.abs(errors("segments", 0, large=large.both)).mean()
    assert linear["mean_error"] == pytest.approx(expected, abs=1e-4)
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
    options = [*DAILY, 2, "--model", "rnn", "--features", "all", "--out", tmp_path, "--data"]
    for data in (daily_path, tmp_path / "hot.csv"):
        run_main(script, *options, data)
        best = torch.load(tmp_path / "temp_rnn" / "best.pt")
        weights = {name: tensor.tolist() for name, tensor in best["weights"].items()}
        saved.append([weights, *(best[key] for key in ("climatology", "scale", "band"))])
    assert saved[0] == saved[1]


def test_a_resumed_run_gives_the_result_of_the_run_left_alone(daily_path, tmp_path):
    options = [*DAILY, 4, "--model", "lstm", "--lr", 0.01, "--data", daily_path]
    conftest.assert_a_resumed_run_repeats(script, options, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_six_instants_ends_as_if_left_alone(daily_path, tmp_path):
    options = [*DAILY, 60, "--model", "gru", "--patience", 0, "--data", daily_path]
    conftest.assert_a_killed_run_repeats(script, options, tmp_path, kills=6)


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


@pytest.mark.parametrize(
    ("options", "known", "horizon", "step", "segments", "split"),
    [(HOURLY, 48, 24, 1, 18, (6937, 1681, 52)), ([], 5, 2, 24, 62, (286, 67, 429))],
)
def test_predictions_give_the_errors_again_and_a_saved_model_repeats_them(
    options, known, horizon, step, segments, split, daily_path, tmp_path, capsys
):
    frame, day = pd.read_csv(daily_path), "01.01.2010 00:00:00"
    if options:  # from 5 o'clock on: the test years begin at 5 o'clock, the segments at midnight
        frame, day = samples.temperatures(years=2)[5 : 24 * 420], "02.01.2010 00:00:00"
    frame.to_csv(tmp_path / "series.csv", index=False)
    options = [*DAILY, 1, *options, "--model", "gru", "--features", "all", "--lr", 0.01]
    run_main(script, *options, "--data", tmp_path / "series.csv", "--out", tmp_path)
    rows = pd.read_csv(tmp_path / "temp_gru" / "predictions.csv")
    assert rows["segment"].tolist() == [i + 1 for i in range(segments) for _ in range(horizon)]
    assert rows["hours ahead"].tolist() == [step * (i + 1) for i in range(horizon)] * segments
    places = np.arange(segments * (known + horizon)).reshape(segments, known + horizon)
    places += frame["Date Time"].tolist().index(day)
    truth = frame.iloc[places[:, known:].ravel()]
    assert rows["Date Time"].tolist() == truth["Date Time"].tolist()
    assert rows[TARGET].to_numpy() == pytest.approx(truth[TARGET].to_numpy(), abs=1e-3)
    metrics = read_json(tmp_path / "temp_gru" / "metrics.json")
    assert metrics["split"] == dict(zip(("train", "validation", "test"), split, strict=True))
    errors = (rows[TARGET] - rows[SHOWN[0]]).abs()
    inside = rows[TARGET].between(rows[SHOWN[1]], rows[SHOWN[2]]).mean()
    expected = [segments, errors.mean(), errors.median(), (errors**2).mean() ** 0.5, inside]
    keys = ("windows", "mean_error", "median_error", "rmse", "coverage_80")
    found = [metrics["test"]["segments"][key] for key in keys]
    assert found == pytest.approx(expected, abs=2e-3) and 0.5 < inside < 1
    # The last segment once more, from its known days, a row before, and one without a temperature.
    place, last = places[-1, 0], rows[-horizon:]
    recent = frame.iloc[place - 1 : place + known + 1].copy()
    recent.loc[recent.index[-1], TARGET] = -9999
    recent.to_csv(tmp_path / "recent.csv", index=False)
    arguments = ["--device", "cpu", "--checkpoint", tmp_path / "temp_gru" / "best.pt"]
    arguments += ["--predict", tmp_path / "recent.csv"]
    capsys.readouterr()
    run_main(script, *arguments)
    header, *lines = [line.split(",") for line in capsys.readouterr().out.splitlines()]
    stamps = [line[0] for line in lines]
    assert header == ["Date Time", TARGET, *SHOWN[1:]] and stamps == last["Date Time"].tolist()
    cells = np.array([line[1:] for line in lines], float)
    assert cells == pytest.approx(last[SHOWN].to_numpy(), abs=0.0056)
    recent.iloc[2:].to_csv(tmp_path / "recent.csv", index=False)
    with pytest.raises(UserError, match=r"does not end with \d whole days"):
        run_main(script, *arguments)
    assert capsys.readouterr().out == ""
