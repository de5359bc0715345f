"""temp_forecast.py: the series, its windows, the linear forecast, the network, and whole runs."""

import io
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch

import temp_forecast
from rnn_models import CELLS
from support import run as runs
from support.files import UserError
from temp_forecast import (
    PENALTIES,
    Base,
    Forecaster,
    Scaling,
    Weather,
    fit_linear,
    fit_scaling,
    linear_features,
)

module_fixture = pytest.fixture(scope="module")  # made once for all tests of this file


# --- the series ---------------------------------------------------------------------------------


def read(rows):
    """The hourly series of a CSV file's rows "date,p,T"."""
    frame = pd.read_csv(io.StringIO("date,p,T\n" + rows))
    return temp_forecast.read_series(frame, "x.csv", freq="h", date_column="date", target="T")


def test_the_first_row_of_an_hour_counts_in_whatever_order_the_rows_stand():
    series = read("""2009-01-01 02:30,0,9
2009-01-01 00:50,0,8
2009-01-01 00:10,0,7
2009-01-01 00:10,0,6""")
    assert list(series["T"].fillna(0)) == [7, 0, 9]


def test_the_target_is_the_first_column():
    series = read("2009-01-01 00:10,1,2")
    assert list(series.columns) == ["T", "p"]


@pytest.mark.parametrize("value", ["-9999", "inf", "-inf", "warm"])
def test_what_is_no_temperature_is_missing(value):
    series = read(f"2009-01-01 00:00,0,{value}\n2009-01-01 01:00,0,5")
    assert list(series["T"].isna()) == [True, False]


def test_a_target_of_texts_is_refused_with_the_first_text_and_its_row():
    rows = "2009-01-01 02:00,0,\n2009-01-01 01:00,0,warm\n2009-01-01 00:00,0,cold"
    with pytest.raises(UserError, match="'warm' in row 2"):
        read(rows)


def test_a_date_is_read_in_each_form():
    series = read("""01.02.2009 00:50,0,0
01.02.2009 01:50:00,0,1
2009-02-01 02:50,0,2
2009-02-01 03:50:00,0,3
2009-02-01T04:50,0,4
2009-02-01T05:50:00,0,5
31.01.2009,0,-24
2009-01-31 23:00,0,-1""")
    assert series.index[0] == pd.Timestamp("2009-01-31 00:00")
    assert list(series["T"].dropna()) == [-24, -1, 0, 1, 2, 3, 4, 5]


def test_dates_with_offsets_are_times_in_utc():
    series = read("2009-10-25 02:00+02:00,0,1\n2009-10-25 02:00+01:00,0,2")
    assert series.index[0] == pd.Timestamp("2009-10-25 00:00")
    assert list(series["T"]) == [1, 2]


@pytest.mark.parametrize("date", ["", "yesterday", "31.02.2009 00:00", "2509-01-01 00:00"])
def test_an_unreadable_or_far_date_is_refused_with_its_row(date):
    rows = f"2009-01-01 00:00,0,1\n{date},0,1\n2009-01-01 01:00,0,1"
    with pytest.raises(UserError, match="row 2 has the date"):
        read(rows)


# --- windows and parts --------------------------------------------------------------------------


def prepare(series, *options):
    args = temp_forecast.parse_args(["--freq=D", "--train-years=1", *options])
    return temp_forecast.prepare(args, series, "x.csv")


def test_the_parts_of_a_daily_series_by_hand(capsys):
    # 2009 trains, its last 73 days validate; 45 days of 2010 test, the tenth is missing.
    days = pd.date_range("2009-01-01", periods=365 + 45)
    series = pd.DataFrame({"T": 5.0}, days)
    series.iloc[365 + 9] = np.nan
    starts = prepare(series).starts
    assert list(starts["train"]) == list(range(286))
    assert list(starts["validation"]) == list(range(292, 359))
    # Days 0-6, 7-13 (left out), 14-20, 21-27, 28-34, 35-41; the last three are no segment.
    assert list(starts["segments"]) == [365, 379, 386, 393, 400]
    # 39 windows; those that begin on days 3 to 9 are left out.
    printed = capsys.readouterr().out
    assert "daily_origins: 32 windows, 7 with missing values left out" in printed


def test_a_column_needs_half_of_its_training_values_but_the_target_stays():
    series = pd.DataFrame({"T": 5.0, "p": 1.0, "rh": 1.0}, pd.date_range("2009-01-01", periods=450))
    series.iloc[:160, [0, 1]] = np.nan  # more than half of the 292 steps that train
    weather = prepare(series, "--features=all")
    assert weather.columns == ["T", "rh"]


# --- what a model sees --------------------------------------------------------------------------


def test_the_climatology_finds_the_cycles_that_made_a_series():
    index = pd.date_range("2009-01-01", periods=8760, freq="h")
    day = 2 * np.pi * np.arange(8760) / 24
    year = day / 365.25
    season = 9 + np.sin(year + 1)
    values = season * np.sin(day + 2) + season * np.sin(2 * day + 3)
    values += season + np.sin(2 * year + 4)
    weather = Weather(index, ["T"], values[:, None], steps_a_day=24, train_end=8760)
    expected = fit_scaling("climatology", weather).expected(index)
    assert np.allclose(expected, weather.values)


@module_fixture
def days(daily_path):
    """The 1000 days of daily_path: 292 train, 73 validate, 635 test."""
    return pd.read_csv(daily_path)


@module_fixture
def weather(days):
    """The days as `prepare` makes them."""
    series = temp_forecast.read_series(days, "x.csv", "D", "Date Time", "T (degC)")
    return prepare(series, "--features=all")


def test_a_constant_column_keeps_its_unit(weather):
    constant = replace(weather, values=np.full((1000, 1), 1013.1))
    scaling = fit_scaling("climatology", constant)
    assert scaling.scale == [1]


# --- the linear forecast ------------------------------------------------------------------------


def test_the_linear_features_by_hand():
    target = np.arange(10)  # five days of two steps
    waves = np.zeros((10, 4))
    waves[-1] = [2, 3, 5, 7]
    window = np.column_stack([target, 100 - target, waves])
    daily_means = [0.5, 99.5, 2.5, 97.5, 4.5, 95.5, 6.5, 93.5, 8.5, 91.5]
    last_day = [8, 92, 9, 91]
    v = [*target, *daily_means, *last_day, 1]
    expected = np.outer([1, 2, 3, 5, 7], v)
    features = linear_features(window[None], steps_a_day=2)
    assert np.allclose(features, expected.ravel())


def ridge(X, Y, penalty):
    """Ridge regression is least squares with a row sqrt(penalty) for each weight."""
    X = np.vstack([X, np.sqrt(penalty) * np.eye(90)])
    Y = np.vstack([Y, np.zeros((90, 2))])
    solution = np.linalg.lstsq(X, Y)
    return solution[0]


def test_the_linear_forecast_is_the_ridge_with_the_least_validation_error(weather):
    starts = np.r_[:100, 292:359]
    weather = replace(weather, starts={"train": starts[:100], "validation": starts[100:]})
    linear = fit_linear(weather)
    inputs = linear["train"].scaling.inputs(weather)
    X = linear_features(inputs[weather.past(starts)], steps_a_day=1)
    Y = inputs[weather.future(starts), 0]
    solutions = [ridge(X[:100], Y[:100], penalty) for penalty in PENALTIES]
    errors = [np.abs(Y[100::3] - X[100::3] @ W).mean() for W in solutions]  # every third decides
    best = np.argmin(errors)
    W_test = ridge(X, Y, PENALTIES[best])
    assert np.allclose(linear["train"].W, solutions[best])
    assert np.allclose(linear["test"].W, W_test)


def test_the_baselines_by_hand():
    index = pd.date_range("2009-01-01", periods=30, freq="12h")
    values = np.arange(30)[:, None]
    weather = Weather(index, ["T"], values, steps_a_day=2)
    scaling = Scaling("climatology", coefficients=10 * np.eye(17, 1), scale=[3])  # expects 10 degC
    W = np.zeros((90, 4))
    W[9] = 2  # twice the last known anomaly
    linear = Base(scaling, W)
    # Steps 7 to 16 are known, 17 to 20 come; a day has two steps.
    forecasts = temp_forecast.baseline_forecasts(weather, linear, starts=np.array([7]))
    assert np.all(forecasts["persistence"] == 16)
    assert np.all(forecasts["seasonal_naive"] == [15, 16, 15, 16])
    assert np.all(forecasts["climatology"] == 10)
    assert np.allclose(forecasts["linear"], 10 + 2 * 6)


# --- the model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_an_untrained_network_corrects_nothing(cell):
    model = Forecaster(cell, num_inputs=3, num_hiddens=4, horizon=2, dropout=0.2)
    correction = model(torch.randn(7, 5, 3))
    assert torch.equal(correction, torch.zeros(5, 2))


@pytest.fixture
def model():
    """A Bi-LSTM that shows its 2 x 300 last states."""
    model = Forecaster("bi_lstm", num_inputs=3, num_hiddens=300, horizon=600, dropout=0.2)
    model.recurrence.W_hq.data = torch.eye(600)
    return model


def test_the_forget_gates_start_without_a_bias(model):
    assert not model.recurrence.b_f.any()
    assert not model.recurrence.b_f_b.any()


def test_the_backward_direction_is_read_after_the_first_step(model):
    model.eval()
    inputs = torch.randn(7, 5, 3)
    states = model.recurrence(inputs)
    last = model(inputs)
    assert torch.equal(last[:, :300], states[-1, :, :300])
    assert torch.equal(last[:, 300:], states[0, :, 300:])


def test_dropout_hides_a_share_of_the_last_state_in_training(model):
    is_hidden = model(torch.randn(7, 5, 3)) == 0
    assert is_hidden.double().mean().item() == pytest.approx(0.2, abs=0.05)


# --- whole runs ---------------------------------------------------------------------------------

SMALL = """--freq D --train-years 1 --features all --model rnn --hidden 4 --epochs 4 --batch-size 32
--lr 0.05 --average 0 --device cpu"""


@module_fixture
def train(run_main, daily_path):
    """`train(out, *options)`: train on daily_path; returns the RNN's folder."""

    def run(out, *options):
        arguments = ["--data", daily_path, "--out", out, *options]
        run_main(temp_forecast, *SMALL.split(), *arguments)
        return out / "temp_rnn"

    return run


@module_fixture
def rnn_run(train, tmp_path_factory):
    """The folder of a run."""
    return train(tmp_path_factory.mktemp("runs"))


@module_fixture
def saved(rnn_run):
    """Its best.pt."""
    return torch.load(rnn_run / "best.pt")


@module_fixture
def predictions(rnn_run):
    """Its predictions.csv, with short names."""
    table = pd.read_csv(rnn_run / "predictions.csv")
    table.columns = ["segment", "date", "hours", "truth", "forecast", "low", "high"]
    return table


def test_the_predictions_are_of_the_last_two_days_of_each_segment(predictions, days):
    assert list(predictions["hours"]) == [24, 48] * 90
    expected = days["T (degC)"][[370, 371, 377]]
    assert np.allclose(predictions["truth"][:3], expected, atol=1e-3)


@module_fixture
def network(saved):
    """Its network."""
    network = temp_forecast.build_model(saved)
    network.load_state_dict(saved["weights"])
    return network.eval()


@torch.no_grad()
def test_the_forecast_is_what_is_expected_plus_ridge_plus_network(
    saved, network, predictions, weather
):
    # The first segment: days 365 to 369 are known, 370 and 371 come.
    expected = temp_forecast.harmonics(weather.index) @ saved["coefficients"]
    anomalies = (weather.values - expected) / saved["scale"]
    waves = temp_forecast.calendar(weather.index)
    known = np.column_stack([anomalies, waves])[365:370]
    linear_part = linear_features(known[None], steps_a_day=1) @ saved["W"].numpy()
    network_part = network(torch.tensor(known[:, None]).float()).numpy()
    forecast = expected[370:372, 0] + saved["scale"][0] * (linear_part + network_part)
    assert np.allclose(predictions["forecast"][:2], forecast, atol=1e-3)


@module_fixture
def lab_run(train, tmp_path_factory):
    """The folder of a run in the lab's setting."""
    return train(tmp_path_factory.mktemp("lab"), "--preset=lab")


def test_the_lab_is_the_network_alone_on_standardised_values(lab_run, weather):
    saved = torch.load(lab_run / "best.pt")
    values = weather.values[:292]
    assert saved["W"] is None
    assert np.allclose(saved["coefficients"], values.mean(axis=0))
    assert np.allclose(saved["scale"], values.std(axis=0))
    assert saved["sizes"]["num_inputs"] == 2  # no calendar


def test_the_network_alone_learns_more_than_the_climatology(lab_run, read_json):
    entry = read_json(lab_run / "metrics.json")["test"]["daily_origins"]
    climatology = entry["baselines"]["climatology"]
    assert entry["mean_error"] < climatology["mean_error"] - 0.2


@module_fixture
def part_errors(network, weather):
    """`part_errors(part)`: truth minus forecast of its windows, by the training windows' ridge."""

    def errors_of(part):
        linear = fit_linear(weather)
        starts = weather.starts[part]
        forecast = temp_forecast.forecast(network, weather, linear["train"], starts)
        return weather.truth(starts) - forecast

    return errors_of


def test_the_best_epoch_has_the_least_validation_error(rnn_run, saved, part_errors):
    history = pd.read_csv(rnn_run / "history.csv")
    best = history["validation_mean_error"].argmin()
    assert saved["epoch"] == best + 1
    for part in ["train", "validation"]:
        error = np.abs(part_errors(part)).mean()
        assert history[f"{part}_mean_error"][best] == pytest.approx(error, abs=1e-5)


def test_the_rate_has_fallen_to_a_twentieth_by_the_last_step(rnn_run):
    last = torch.load(rnn_run / "last.pt")
    (group,) = last["states"]["optimizer"]["param_groups"]
    assert len(last["history"]) == 4  # all epochs, without an early stop
    assert group["lr"] == pytest.approx(0.05 * 0.05)


def test_the_band_holds_80_percent_of_the_validation_errors(saved, part_errors):
    low, high = saved["band"]
    errors = part_errors("validation")  # (n, horizon)
    assert (errors < low).mean(axis=0) == pytest.approx([0.1, 0.1], abs=0.02)
    assert (errors > high).mean(axis=0) == pytest.approx([0.1, 0.1], abs=0.02)


def test_the_errors_of_a_part_by_hand():
    forecasts = dict.fromkeys(temp_forecast.BASELINES, np.array([[1.0, 1.0], [1.0, 5.0]]))
    forecasts["model"] = np.array([[0.0, 2.0], [0.0, -4.0]])
    band = np.array([[-2.0, -2.0], [0.0, 0.0]])
    entry = temp_forecast.part_errors(np.zeros((2, 2)), forecasts, band)
    assert entry["windows"] == 2
    assert entry["mean_error"] == 1.5
    assert entry["median_error"] == 1
    assert entry["rmse"] == pytest.approx(5**0.5)
    assert entry["coverage_80"] == 0.75  # the errors are 0, -2, 0 and 4
    assert entry["baselines"]["linear"] == {"mean_error": 2, "median_error": 1}


def test_the_metrics_are_those_of_the_predictions(rnn_run, predictions, read_json):
    entry = read_json(rnn_run / "metrics.json")["test"]["segments"]
    errors = np.abs(predictions.truth - predictions.forecast)
    is_inside = predictions.truth.between(predictions.low, predictions.high)
    assert entry["mean_error"] == pytest.approx(errors.mean(), abs=1e-3)
    assert entry["median_error"] == pytest.approx(errors.median(), abs=1e-3)
    assert entry["rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), abs=1e-3)
    assert entry["coverage_80"] == pytest.approx(is_inside.mean(), abs=1e-2)


def test_the_comparison_says_what_each_network_adds_to_the_ridge(train, tmp_path, read_json):
    train(tmp_path, "--model=all", "--epochs=1")
    rows = read_json(tmp_path / "temp_all" / "comparison.json")["rows"]
    means = {row["model"]: row["segments, mean"] for row in rows}
    medians = {row["model"]: row["daily origins, median"] for row in rows}
    for cell in ["RNN", "GRU", "LSTM"]:
        test = read_json(tmp_path / f"temp_{cell.lower()}" / "metrics.json")["test"]
        error = test["segments"]["mean_error"]
        baselines = test["daily_origins"]["baselines"]
        assert means[f"linear + {cell}"] == error
        assert means[f"linear + {cell}, minus linear"] == error - means["linear"]
        assert medians[f"linear + {cell}"] == test["daily_origins"]["median_error"]
        assert medians["seasonal naive"] == baselines["seasonal_naive"]["median_error"]


def test_no_test_value_reaches_training(train, saved, days, tmp_path):
    path = tmp_path / "other_tests.csv"
    days[:600].to_csv(path, index=False)
    other = torch.load(train(tmp_path, "--data", path) / "best.pt")
    torch.testing.assert_close(other["weights"], saved["weights"])
    torch.testing.assert_close(other["W"], saved["W"], rtol=1e-9, atol=1e-9)


REMAINING = {"all": [], "rnn": ["last.pt of temp_bi_lstm"]}


@pytest.mark.parametrize("model", REMAINING)
def test_a_run_removes_what_it_replaces_and_the_comparison_before_it_trains(
    model, train, tmp_path, monkeypatch
):
    for name in ("temp_rnn/last.pt", "temp_bi_lstm/last.pt", "temp_all/comparison.json"):
        path = tmp_path / name
        path.parent.mkdir()
        path.touch()
    monkeypatch.setattr(temp_forecast, "train", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, f"--model={model}")
    remaining = [f"{path.name} of {path.parent.name}" for path in tmp_path.glob("*/*")]
    assert remaining == REMAINING[model]


def test_a_resumed_run_is_the_run_left_alone(
    train, rnn_run, outcome, tmp_path, monkeypatch, capsys
):
    save = runs.save_checkpoint

    def save_one_epoch(path, content):
        if len(content["history"]) == 2:
            raise KeyboardInterrupt
        save(path, content)

    monkeypatch.setattr(runs, "save_checkpoint", save_one_epoch)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path)
    monkeypatch.undo()
    capsys.readouterr()
    run = train(tmp_path, "--resume")
    assert outcome(run) == outcome(rnn_run)
    assert "epoch  1 " not in capsys.readouterr().out


# --- hours --------------------------------------------------------------------------------------


@module_fixture
def hours_path(tmp_path_factory):
    """A CSV of 10,000 hours from 5 o'clock on, each a degree warmer than the one before."""
    path = tmp_path_factory.mktemp("hours") / "hours.csv"
    index = pd.date_range("2009-01-01 05:00", periods=10_000, freq="h", name="Date Time")
    pd.DataFrame({"T (degC)": range(10_000)}, index).to_csv(path)
    return path


@module_fixture
def hours_run(train, hours_path, tmp_path_factory):
    """The folder of a run of one epoch on the hours."""
    folder = tmp_path_factory.mktemp("hours_run")
    return train(folder, "--freq=h", "--epochs=1", "--data", hours_path)


def test_hours_are_tested_from_the_first_midnight(hours_run):
    predictions = pd.read_csv(hours_run / "predictions.csv")
    assert predictions["Date Time"][0] == "07.01.2010 00:00:00"


def test_persistence_is_24_degrees_wrong_24_hours_ahead(hours_run, read_json):
    assert read_json(hours_run / "metrics.json")["lead_24h"]["persistence"] == 24


def test_an_epoch_shuffles_every_third_window_and_the_next_takes_others(
    train, hours_path, tmp_path, monkeypatch
):
    epochs = []

    def progress(run, batches):
        epochs.append(torch.cat(batches).numpy())
        return batches[:1]

    monkeypatch.setattr(runs.Run, "progress", progress)
    train(tmp_path, "--freq=h", "--data", hours_path)
    steps = np.diff(np.sort(epochs[0]))
    assert list(steps) == [3] * 2279  # 6841 windows train
    assert np.diff(epochs[0]).min() < 0
    assert len(set(map(min, epochs))) > 1


# --- prediction and mistakes --------------------------------------------------------------------


@pytest.fixture
def predict(run_main, tmp_path, capsys):
    """`predict(run, frame)`: the table that --predict prints for a file of this content."""

    def run_predict(run, frame):
        path = tmp_path / "recent.csv"
        frame.to_csv(path, index=False)
        capsys.readouterr()
        run_main(temp_forecast, "--checkpoint", run / "best.pt", "--predict", path)
        output = capsys.readouterr().out
        return pd.read_csv(io.StringIO(output), index_col="Date Time")

    return run_predict


def test_a_saved_model_repeats_its_forecast(predict, rnn_run, predictions, days):
    # The last segment, days 988 to 994, once more from its five known days.
    table = predict(rnn_run, days[988:993])
    expected = predictions[-2:]
    assert list(table.index) == list(expected.date)
    assert np.allclose(table, expected[["forecast", "low", "high"]], atol=0.006)


@pytest.mark.parametrize("missing", [range(996), [996]])
def test_a_file_without_five_whole_days_is_refused(missing, predict, rnn_run, days):
    with pytest.raises(UserError, match="does not end with 5 whole days"):
        predict(rnn_run, days.drop(index=missing))


MISTAKES = {
    "--data=absent.csv": "does not exist",
    "--date-column=day": "no column 'day'",
    "--target=warmth": "no column 'warmth'",
    "--train-years=3": "too few windows",
    "--freq=h": "does --freq fit",
    "--lr=1e12": "the weights of epoch 1 are not finite",
}


@pytest.mark.parametrize("option", MISTAKES)
def test_a_mistake_is_named(option, train, tmp_path):
    with pytest.raises(UserError, match=MISTAKES[option]):
        train(tmp_path, option)
