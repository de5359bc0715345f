"""Forecast two days of temperature from five days, with a recurrent network written by hand.

    python temp_forecast.py                              LSTM on jena_climate_2009_2016, hourly
    python temp_forecast.py --model all --features all   all four, from all columns
    python temp_forecast.py --checkpoint runs/temp_lstm/best.pt --predict recent.csv

The last fifth of the first six years (--train-years) validates, the rest of them trains. What
follows tests, in separate 7-day segments, 5 days in and 2 out, and from every midnight. Errors are
absolute, in degC. All models see and forecast anomalies: differences from the climatology, a smooth
yearly and daily cycle fitted to the six years. The network corrects a small ridge regression; the
forecast is a weighted mean of this and of a large one.
"""

import contextlib
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import plots
import torch
import training
from datasets import UserError
from training import CELL_OF, NAMES, Run, number

from metrics import mean_error, median_error, rmse
from rnn_models import Forecaster

TARGET = "T (degC)"
STAMP = "%d.%m.%Y %H:%M:%S"
STEPS_A_DAY = {"h": 24, "10min": 144, "D": 1}
CALENDAR = 4  # features: sine and cosine of the year and of the day
SOME_WINDOWS = 2000  # for the curves' training error, and to choose the ridges' penalties
PENALTIES = 10.0 ** np.arange(-1, 6)  # that ridge regression tries
FACTORS = (1, 10, 100, 1000, 1e9)  # of the penalty, for products with season and hour; 1e9: none
SHARES = (1, 0.75, 0.5, 0.25)  # of the network in the forecast; the rest is the large ridge's
BAND = (0.1, 0.9)  # quantiles of the validation errors: the 80 % band
PARTS = ("segments", "daily_origins")  # of the test years
# Chosen on validation rows of the hourly Jena series.
DEFAULTS = {
    "model": "lstm", "epochs": 6, "patience": 3, "batch_size": 128, "hidden": 64, "dropout": 0.3,
    "lr": 2e-3, "descent": 660, "weight_decay": 1e-4, "average": 0.99,
}  # fmt: skip


def parse_args(arguments=None):
    """The command line as a namespace."""
    parser = training.make_parser(__doc__, **DEFAULTS)
    add = parser.add_argument
    days = number(int, 1, 60)
    add("--freq", choices=STEPS_A_DAY, default="h", help="step: mean of an hour, 10 minutes, a day")
    add("--history-days", type=days, default=5, help="days that are known")
    add("--horizon-days", type=days, default=2, help="days that are forecast")
    add("--train-years", type=number(int, 1, 200), default=6, help="years that train and validate")
    add("--features", choices=["T", "all"], default="T", help="temperature, or all numeric columns")
    add("--predict", metavar="FILE", type=Path, help="forecast the days after the last in this CSV")
    return training.parse(parser, arguments)


# --- the series ---------------------------------------------------------------------------------


def read_series(frame, path, freq):
    """A DataFrame's numeric columns as means of steps of `freq`, cleaned and indexed by time.

    Repeated stamps are averaged; -9999, impossible values and texts count as missing, and so does
    a step with less than three quarters of its rows; gaps of up to three hours are interpolated, in
    the test part too; directions in degrees become sine and cosine. One line reports it all.
    Raises UserError for a missing column, an unreadable date, and too few temperatures.
    """
    datasets.check_columns(frame, ("Date Time", TARGET), path)
    stamps = read_stamps(frame["Date Time"], path)
    raw = frame.drop(columns="Date Time")
    values = raw.apply(pd.to_numeric, errors="coerce").astype(float)
    not_numbers = (values.isna() & raw.notna()).sum()
    impossible = (values <= -999) | np.isinf(values)
    impossible[TARGET] |= values[TARGET].lt(-90) | values[TARGET].gt(60)
    values = values.mask(impossible)
    for name in [name for name in values if name.endswith("(deg)")]:
        angle = np.deg2rad(values.pop(name))
        values[f"{name} sine"], values[f"{name} cosine"] = np.sin(angle), np.cos(angle)
    values = values.groupby(stamps).mean()  # sorts
    bins, width = values.resample(freq), pd.Timedelta(days=1) / STEPS_A_DAY[freq]
    expected = width / values.index.to_series().diff().median()  # rows in a step
    series = bins.mean().where(bins.count() >= 0.75 * np.fmax(expected, 1))
    missing = series[TARGET].isna()
    series = series.apply(fill_short_gaps, longest=3 * STEPS_A_DAY[freq] // 24)
    filled, (first, last) = missing & series[TARGET].notna(), series.index[[0, -1]]
    texts = [f"{count} in {name}" for name, count in not_numbers.items() if count]
    print(
        f"{path}: {len(frame)} rows, {first:%Y-%m-%d %H:%M} to {last:%Y-%m-%d %H:%M}; "
        f"{len(frame) - len(values)} repeated stamps averaged; {impossible.to_numpy().sum()} "
        f"impossible values; texts: {', '.join(texts) or 0}; {len(series)} steps, {filled.sum()} "
        f"of {missing.sum()} missing ones interpolated"
    )
    if missing.mean() > 0.5:
        raise UserError(f"{path}: over half of the steps have no temperature; does --freq fit?")
    return series


def read_stamps(column, path):
    """The column "Date Time" as a DatetimeIndex; UserError names a row that cannot be right."""
    stamps = pd.to_datetime(column, format=STAMP, errors="coerce")
    far = (stamps - stamps.median()).abs() > pd.Timedelta(days=200 * 365.25)
    for row in np.flatnonzero(stamps.isna() | far):
        raise UserError(f"{path}: row {row + 1} has the date '{column.iloc[row]}', unreadable or "
                        "centuries from the others; write 31.12.2009 23:50:00")  # fmt: skip
    return pd.DatetimeIndex(stamps)


def fill_short_gaps(column, longest):
    """A column with gaps of at most `longest` steps interpolated, longer ones left as they are."""
    gap = column.isna()
    length = gap.groupby((gap != gap.shift()).cumsum()).transform("sum")
    return column.interpolate(limit_area="inside").where(~gap | (length <= longest))


def calendar(index):
    """Season and hour as (N, 4) features: sine and cosine of the year and of the day."""
    hour = index.hour.to_numpy() + index.minute.to_numpy() / 60
    year = 2 * np.pi * (index.day_of_year.to_numpy() - 1 + hour / 24) / 365.25
    day = 2 * np.pi * hour / 24
    return np.stack([np.sin(year), np.cos(year), np.sin(day), np.cos(day)], axis=1)


def harmonics(index):
    """(N, 17) regressors of the climatology: 1, two harmonics of the year, and two of the day that
    change with the season. On daily steps these repeat the others; the least squares allow it."""
    sin_y, cos_y, sin_d, cos_d = calendar(index).T
    # 2 sin cos and cos^2 - sin^2 are the sine and cosine of the doubled angle.
    terms = [np.ones(len(index)), sin_y, cos_y, 2 * sin_y * cos_y, cos_y**2 - sin_y**2]
    for wave in (sin_d, cos_d, 2 * sin_d * cos_d, cos_d**2 - sin_d**2):
        terms += [wave, wave * sin_y, wave * cos_y]
    return np.stack(terms, axis=1)


def fit_climatology(design, values):
    """Least-squares coefficients (K, C) of values (N, C) on the design (N, K); NaN is left out."""
    pairs = zip(values.T, np.isfinite(values).T, strict=True)
    fits = [np.linalg.lstsq(design[own], column[own], rcond=None)[0] for column, own in pairs]
    return np.stack(fits, axis=1)


def window_starts(complete, first, last, length, step):
    """First steps of windows of `length` steps within first..last-1, `step` apart, whole ones only.

    complete: (N,) whether a step has all its values. Returns (starts, how many were left out).
    """
    starts = np.arange(first, last - length + 1, step)
    missing_before = np.concatenate([[0], np.cumsum(~complete)])
    whole = missing_before[starts + length] == missing_before[starts]
    return starts[whole], int((~whole).sum())


@dataclass
class Weather:
    """A series as the network sees it, and the windows of each part."""

    index: pd.DatetimeIndex
    columns: list[str]
    steps_a_day: int
    known: int  # steps
    horizon: int
    truth: np.ndarray  # (N,), degC
    coefficients: np.ndarray  # (K, C), of the climatology
    climatology: np.ndarray  # (N,), degC
    scale: np.ndarray  # (C,), standard deviations of the anomalies
    inputs: np.ndarray  # (N, C + 4) float32: scaled anomalies, the temperature's first; calendar
    starts: dict[str, np.ndarray]  # "train", "validation", "segments", "daily_origins"

    def past(self, starts):
        """The known steps (n, known) of windows that begin at starts (n,)."""
        return np.asarray(starts)[:, None] + np.arange(self.known)

    def future(self, starts):
        """The steps to forecast (n, horizon) of windows that begin at starts (n,)."""
        return np.asarray(starts)[:, None] + np.arange(self.known, self.known + self.horizon)

    def targets(self, starts):
        """Scaled anomalies of the temperature (n, horizon) to forecast from starts (n,)."""
        return self.inputs[self.future(starts), 0].astype(float)

    def linear_features(self, starts):
        """`Forecaster.linear_features` (n, F) of windows that begin at starts (n,)."""
        inputs = torch.from_numpy(self.inputs[self.past(starts)]).transpose(0, 1).double()
        return torch.cat(Forecaster.linear_features(inputs, self.steps_a_day), dim=1).numpy()

    def linear_forecast(self, starts, W):
        """Scaled anomalies (n, horizon) by the weights W (F, horizon), from starts (n,)."""
        return np.concatenate([self.linear_features(own) @ W for own in in_parts(starts)])


def in_parts(starts):
    """Starts (n,) in parts, to save memory: a window has many features."""
    return np.array_split(starts, len(starts) // 4096 + 1)


def prepare(args, series, path):
    """Climatology, anomalies and windows of a series. Raises UserError if it is too short.

    The climatology is fitted to all training years, those of validation too.
    """
    index, steps_a_day = series.index, STEPS_A_DAY[args.freq]
    known, horizon = args.history_days * steps_a_day, args.horizon_days * steps_a_day
    split = int((index < index[0] + pd.DateOffset(years=args.train_years)).sum())
    train_end = split * 4 // 5
    midnights = np.flatnonzero(index[split:] == index[split:].normalize()) + split
    first_test = int(midnights[0]) if len(midnights) else len(index)
    design = harmonics(index)
    columns = [TARGET]
    if args.features == "all":
        usable = series[:train_end].notna().mean() > 0.5
        columns += [name for name in series if name != TARGET and usable[name]]
        for name in series.columns.difference(columns):
            print(f"column {name!r} is left out: half of its training values or more are missing")
    values = series[columns].to_numpy(float)  # (N, C)
    complete, length = np.isfinite(values).all(axis=1), known + horizon
    parts = {
        "train": window_starts(complete, 0, train_end, length, 1),
        "validation": window_starts(complete, train_end, split, length, 1),
        "segments": window_starts(complete, first_test, len(index), length, length),
        "daily_origins": window_starts(complete, first_test, len(index), length, steps_a_day),
    }
    for part, (starts, _) in parts.items():
        if len(starts) < 5:
            raise UserError(f"{path} is too short: {len(starts)} whole windows for {part}, 5 are "
                            "needed; lower --train-years or name a longer series")  # fmt: skip
    counts = [f"{len(own)} {part.replace('_', ' ')} (-{out})" for part, (own, out) in parts.items()]
    print(f"windows (minus those with missing values): {', '.join(counts)}")
    coefficients = fit_climatology(design[:split], values[:split])
    anomalies = values - design @ coefficients
    scale = np.nanstd(anomalies[:train_end], axis=0)
    scale[scale <= 1e-6 * np.nanmax(np.abs(values[:train_end]), axis=0)] = 1.0  # a constant column
    return Weather(
        index, columns, steps_a_day, known, horizon, truth=values[:, 0], coefficients=coefficients,
        climatology=(design @ coefficients)[:, 0], scale=scale,
        inputs=network_inputs(anomalies, scale, index),
        starts={part: starts for part, (starts, _) in parts.items()},
    )  # fmt: skip


def network_inputs(anomalies, scale, index):
    """(N, C + 4) float32: all columns' scaled anomalies (N, C), and the calendar."""
    return np.concatenate([anomalies / scale, calendar(index)], axis=1).astype(np.float32)


# --- linear models ------------------------------------------------------------------------------


def fit_linear_models(weather):
    """The small ridge regression, on the features of x, which the network corrects (weights 0 for
    z), and the large one, on all features, which is the linear baseline.

    Each has the penalty, and the factor for products with season and hour, of least validation
    error, and is {"train", "both"}: weights (F, horizon), fitted to the training windows, and to
    those and the validation windows.
    """

    def moments(starts):  # X^T X and X^T Y are enough to solve for every penalty
        gram, moment = 0.0, 0.0
        for own in in_parts(starts):
            X, Y = weather.linear_features(own), weather.targets(own)
            gram, moment = gram + X.T @ X, moment + X.T @ Y
        return gram, moment

    validation = weather.starts["validation"]
    train_sums, more = moments(weather.starts["train"]), moments(validation)
    both_sums = [own + new for own, new in zip(train_sums, more, strict=True)]
    some = validation[:: len(validation) // SOME_WINDOWS + 1]
    X, Y = weather.linear_features(some), weather.targets(some)
    inputs = torch.zeros(weather.known, 1, len(weather.columns) + CALENDAR)
    sizes = [f.shape[1] for f in Forecaster.linear_features(inputs, weather.steps_a_day)]

    def solve(gram, moment, size, penalty, factor):
        blocks = [1, factor, factor, 1, factor, factor, factor, factor]  # x, x sin_y, ..., z, ...
        penalties = penalty * np.repeat(blocks, sizes)
        penalties[sizes[0] - 1] = 1e-9  # the constant is free
        W = np.zeros_like(moment)
        W[:size] = np.linalg.solve(gram[:size, :size] + np.diag(penalties[:size]), moment[:size])
        return W

    def fit(size):
        choices = product([size], PENALTIES, FACTORS)
        best = min(choices, key=lambda choice: mean_error(Y, X @ solve(*train_sums, *choice)))
        return {"train": solve(*train_sums, *best), "both": solve(*both_sums, *best)}

    return fit(sum(sizes[:3])), fit(sum(sizes))


def baseline_forecasts(weather, starts, W):
    """The baselines' forecasts {name: (n, horizon)}, degC, for windows that begin at starts.

    W: the linear baseline's weights, of `fit_linear_models`.
    """
    past, future = weather.past(starts), weather.future(starts)
    climate, days = weather.climatology[future], weather.horizon // weather.steps_a_day
    return {
        "persistence": np.repeat(weather.truth[past[:, -1:]], weather.horizon, axis=1),
        "seasonal_naive": np.tile(weather.truth[past[:, -weather.steps_a_day :]], days),
        "climatology": climate,
        "linear": climate + weather.scale[0] * weather.linear_forecast(starts, W),
    }


# --- training and testing -----------------------------------------------------------------------


def build_model(options):
    """The untrained forecaster of a checkpoint's options."""
    return Forecaster(
        CELL_OF[options["model"]], len(options["columns"]) + CALENDAR, options["hidden"],
        options["known"], options["horizon"], STEPS_A_DAY[options["freq"]],
        options["dropout"], options["loops"],
    )  # fmt: skip


@torch.no_grad()
def forecast(model, inputs, past):
    """Scaled anomalies (n, horizon) from inputs (N, D) and the known steps (n, known), arrays."""
    model.eval()
    inputs = torch.from_numpy(inputs).to(model.share.device)
    parts = [model(inputs[rows.t()]) for rows in torch.from_numpy(past).split(512)]
    return torch.cat(parts).cpu().numpy()


def train(args, name, weather, data, W_xq, device):
    """Train one structure; returns its run, whose model has the best epoch's weights."""
    options = {key: getattr(args, key) for key in ("freq", "hidden", "dropout", "loops")}
    options |= {key: getattr(weather, key) for key in ("known", "horizon", "columns")}
    config = {
        "task": "temp", "options": {"model": name, **options}, "sha256": data["sha256"],
        "climatology": weather.coefficients.tolist(), "scale": weather.scale.tolist(),
    }  # fmt: skip
    torch.manual_seed(args.seed)
    model = build_model(config["options"])
    model.W_xq.copy_(torch.from_numpy(W_xq))
    run = Run(args, args.out / f"temp_{name}", config, model.to(device))
    inputs, scale = torch.from_numpy(weather.inputs).to(device), float(weather.scale[0])
    starts = torch.from_numpy(weather.starts["train"])
    stride = min(max(1, weather.steps_a_day // 8), len(starts))  # three hours, or a day

    def error(starts):
        guess = forecast(run.averaged.module, weather.inputs, weather.past(starts))
        return mean_error(weather.targets(starts), guess) * scale

    for _ in run.epochs():
        model.train()
        own = starts[int(torch.randint(stride, ())) :: stride]  # other hours in every epoch
        for batch in run.progress(own[torch.randperm(len(own))].split(args.batch_size)):
            X = inputs[torch.from_numpy(weather.past(batch)).t()]  # (known, B, D)
            Y = inputs[torch.from_numpy(weather.future(batch)), 0]  # (B, horizon)
            run.step((model(X) - Y).abs().mean() * scale)
        scores = None
        if training.is_first():
            scores = {"train_mean_error": error(starts[:: len(starts) // SOME_WINDOWS + 1]),
                      "validation_mean_error": error(weather.starts["validation"])}  # fmt: skip
        run.finish_epoch(scores, monitor="validation_mean_error", mode="min")
    run.load_best()
    return run


def finish(run, weather, small, large):
    """Choose the network's share on validation rows, with the ridges that were fitted without them;
    then take the ridges that were fitted with them, and save the model with its band.

    Returns share and band (2, horizon): quantiles of the mixture's validation errors, degC.
    """
    model, starts = run.model, weather.starts["validation"]
    model.share.fill_(1.0)
    model.W_xq.copy_(torch.from_numpy(small["train"]))
    network = forecast(model, weather.inputs, weather.past(starts))
    ridge, truth = weather.linear_forecast(starts, large["train"]), weather.targets(starts)

    def mixture(share):
        return share * network + (1 - share) * ridge

    share = min(SHARES, key=lambda share: mean_error(truth, mixture(share)))
    band = np.quantile((truth - mixture(share)) * weather.scale[0], BAND, axis=0)
    model.share.fill_(share)
    model.W_xq.copy_(torch.from_numpy(share * small["both"] + (1 - share) * large["both"]))
    run.save_best(model, band=band.tolist())
    return share, band


def test(run, weather, data, small, large):
    """Test a trained structure, write its results; returns the content of metrics.json."""
    share, band = finish(run, weather, small, large)
    forecasts, entries = {}, {}
    for part in PARTS:
        starts = weather.starts[part]
        future = weather.future(starts)
        anomalies = forecast(run.model, weather.inputs, weather.past(starts)) * weather.scale[0]
        forecasts[part] = {"model": weather.climatology[future] + anomalies}
        forecasts[part] |= baseline_forecasts(weather, starts, large["both"])
        entries[part] = test_errors(weather.truth[future], forecasts[part], band)
    split = {part: len(weather.starts[part]) for part in ("train", "validation")}
    split["test"] = len(weather.starts["daily_origins"])  # the segments are among them
    metrics = run.write_metrics(data, split, entries)
    write_predictions(run.folder / "predictions.csv", weather, forecasts["segments"]["model"], band)
    title = f"{NAMES[run.name]}{training.stamp(data)}"
    print(f"\n{title}, test, epoch {run.best['epoch']}, {share:.0%} network and {1 - share:.0%} "
          "ridge: absolute errors, degC")  # fmt: skip
    for part, entry in entries.items():
        frame = pd.DataFrame.from_dict({"model": entry} | entry["baselines"], orient="index")
        table = frame[["mean_error", "median_error"]].to_string(float_format="{:.3f}".format)
        print(f"\n{part.replace('_', ' ')}, {entry['windows']} windows\n{table}")
        print(f"the 80 % band holds {entry['coverage_80']:.1%} of the true values")
    print()
    draw(run, weather, forecasts, band, title)
    print(f"results in {run.folder}: open forecasts.png and lead_time.png; forecast with")
    print(f'  python temp_forecast.py --checkpoint "{run.folder}/best.pt" --predict recent.csv')
    return metrics


def test_errors(truth, forecasts, band):
    """The entry of one part in metrics.json: errors, coverage of the band, baselines."""
    model = forecasts["model"]
    inside = (truth >= model + band[0]) & (truth <= model + band[1])
    errors = {
        name: {"mean_error": mean_error(truth, own), "median_error": median_error(truth, own)}
        for name, own in forecasts.items()
    }
    return {
        "windows": len(truth), **errors.pop("model"), "rmse": rmse(truth, model),
        "coverage_80": float(inside.mean()), "baselines": errors,
    }  # fmt: skip


def write_predictions(path, weather, forecasts, band):
    """Write each forecast step of the test segments: stamp, hours ahead, truth, forecast, band."""
    steps = weather.future(weather.starts["segments"])  # (n, horizon)
    table = pd.DataFrame({
        "segment": np.repeat(np.arange(len(steps)) + 1, weather.horizon),
        "Date Time": weather.index[steps.ravel()].strftime(STAMP),
        "hours ahead": np.tile(lead_hours(weather), len(steps)),
        TARGET: weather.truth[steps].ravel(), "forecast (degC)": forecasts.ravel(),
        "low 10 % (degC)": (forecasts + band[0]).ravel(),
        "high 90 % (degC)": (forecasts + band[1]).ravel(),
    })  # fmt: skip
    training.write_csv(path, table.round(3))


def lead_hours(weather):
    """Hours from the last known step to each forecast step (horizon,)."""
    return ((np.arange(weather.horizon) + 1) * 24 / weather.steps_a_day).round(2).tolist()


def draw(run, weather, forecasts, band, name):
    """Draw the curves, six test segments from the best to the worst, and the error by lead time."""
    history = pd.DataFrame(run.history)
    curves = {part: history[f"{part}_mean_error"] for part in ("train", "validation")}
    panels = {f"{name}: mean error without dropout, degC": curves}
    plots.draw_curves(run.folder / "curves.png", panels)
    starts, model = weather.starts["segments"], forecasts["segments"]["model"]
    order = np.abs(weather.truth[weather.future(starts)] - model).mean(axis=1).argsort()
    windows = []
    for i in order[np.linspace(0, len(order) - 1, min(6, len(order))).round().astype(int)]:
        steps = slice(starts[i], starts[i] + weather.known + weather.horizon)
        windows.append((weather.index[steps], weather.truth[steps], model[i]))
    title = f"{name}: test segments from the best to the worst"
    plots.draw_forecasts(run.folder / "forecasts.png", windows, band, weather.steps_a_day, title)
    truth = weather.truth[weather.future(weather.starts["daily_origins"])]
    errors = {key.replace("_", " "): np.abs(truth - own)
              for key, own in forecasts["daily_origins"].items()}  # fmt: skip
    title = f"error by lead time, {name}"
    plots.draw_lead_time(run.folder / "lead_time.png", lead_hours(weather), errors, title)


def compare(args, results):
    """The four structures side by side with the baselines: temp_all/."""
    entries = {name: metrics["test"] for name, metrics in results.items()}
    last = results["Bi-LSTM"]["test"]  # the baselines of all runs are the same
    for name in last["segments"]["baselines"]:
        entries[name.replace("_", " ")] = {part: last[part]["baselines"][name] for part in PARTS}
    columns = [(part, kind) for part in PARTS for kind in ("mean", "median")]
    rows = [
        {"model": name} | {f"{part}, {kind}": own[part][f"{kind}_error"] for part, kind in columns}
        for name, own in entries.items()
    ]
    stamp = training.stamp(results["Bi-LSTM"]["data"])
    note = f"Absolute errors on the test years{stamp}, degC."
    panels = {f"Training mean error, degC{stamp}": "train_mean_error",
              "Validation mean error, degC": "validation_mean_error"}  # fmt: skip
    training.write_comparison(args.out, "temp", rows, results, note, panels)


# --- prediction ---------------------------------------------------------------------------------


def predict(args, device):
    """Print the days after the last ones of a file as CSV, with the 80 % band."""
    saved = training.load_checkpoint(args.checkpoint, "temp")
    if "band" not in saved:
        raise UserError(f"{args.checkpoint} is of a run that was stopped; resume it or train again")
    with training.refuse_damaged(args.checkpoint):
        options = saved["options"]
        freq, known, columns = options["freq"], options["known"], options["columns"]
        keys = ("climatology", "scale", "band")
        coefficients, scale, band = (np.array(saved[key]) for key in keys)  # band (2, horizon)
        model = build_model(options).to(device)
        model.load_state_dict(saved["weights"])
    frame, data = datasets.load(datasets.CLIMATE, args.predict)
    with contextlib.redirect_stdout(sys.stderr):  # only the forecast goes to stdout
        series = read_series(frame, data["path"], freq)
    datasets.check_columns(series, columns, args.predict)
    recent = series.loc[: series[TARGET].last_valid_index(), columns].iloc[-known:]
    if len(recent) < known or recent.isna().to_numpy().any():
        raise UserError(f"{args.predict} does not end with {known // STEPS_A_DAY[freq]} whole days "
                        f"of {', '.join(columns)}; add them")  # fmt: skip
    coming = pd.date_range(recent.index[-1], periods=options["horizon"] + 1, freq=freq)[1:]
    anomalies = recent.to_numpy(float) - harmonics(recent.index) @ coefficients
    inputs = network_inputs(anomalies, scale, recent.index)
    guess = forecast(model, inputs, np.arange(known)[None])[0] * scale[0]
    values = guess + (harmonics(coming) @ coefficients)[:, 0]
    print(f"the last known step begins at {recent.index[-1]:{STAMP}}; the forecast covers "
          f"{coming[0]:{STAMP}} to {coming[-1]:{STAMP}}", file=sys.stderr)  # fmt: skip
    print(f"Date Time,{TARGET},low 10 % (degC),high 90 % (degC)")
    for stamp, value, low, high in zip(coming, values, *(values + band), strict=True):
        print(f"{stamp:{STAMP}},{value:.2f},{low:.2f},{high:.2f}")


def train_and_test(args, device):
    """Train what --model names, test it, and compare all four."""
    frame, data = datasets.load(datasets.CLIMATE, args.data)
    weather = prepare(args, read_series(frame, data["path"], args.freq), data["path"])
    small, large = fit_linear_models(weather)
    results = {}
    for name in training.structures(args, "temp"):
        run = train(args, name, weather, data, small["train"], device)
        if training.is_first():
            results[NAMES[name]] = test(run, weather, data, small, large)
    if args.model == "all" and training.is_first():
        compare(args, results)


def main():
    """From arguments to results."""
    training.start(parse_args(), predict, train_and_test)


if __name__ == "__main__":
    training.run_script(main)
