"""Forecast two days of temperature from five days, with a recurrent network written by hand.

    python temp_forecast.py                              LSTM on jena_climate_2009_2016, hourly
    python temp_forecast.py --model all --features all   all four, from all columns
    python temp_forecast.py --preset lab                 the network alone, as the lab builds it
    python temp_forecast.py --checkpoint runs/temp_lstm/best.pt --predict recent.csv

A ridge regression forecasts from features X of the known five days, and the network corrects it by
its last state: Y = X W + H_T W_hq + b_q. Both see and forecast anomalies, differences from the
climatology; in the lab's setting the network alone sees and forecasts standardised values.
The last fifth of the first six years (--train-years) validates, the rest of them trains. What
follows tests, in separate 7-day segments, 5 days in and 2 out, and from every midnight. Errors are
absolute, in degC.
"""

import contextlib
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

import support.run as runs
from metrics import mean_error, median_error, rmse
from rnn_models import CELLS, Recurrence, grad_clipping, num_directions, pool_states
from support import datasets, options, plots
from support.files import UserError, write_csv
from support.options import count, count_or_0, positive, share

KNOWN_DAYS = 5
HORIZON_DAYS = 2
STEPS_A_DAY = {"h": 24, "D": 1}
STAMP = "%d.%m.%Y %H:%M:%S"
PENALTIES = 10.0 ** np.arange(-1, 6)  # that the ridge regression tries
BASELINES = ("persistence", "seasonal_naive", "climatology", "linear")  # beside the model
BAND = (0.1, 0.9)  # quantiles of the validation errors: the 80 % band
CURVE_WINDOWS = 2000  # training windows on which the curves' training error is measured
PRESETS = {
    "lab": {  # the plain setting of the lab
        "base": "mean",
        "epochs": 20,
        "patience": 0,
        "lr": 1e-3,
        "fall_steps": 0,
        "average": 0.0,
        "dropout": 0.0,
    }
}
EPOCHS_HELP = "epochs at most; on hourly steps each takes every third training window"
STEP_HELP = "an hour or a day; of several values in a step the first one counts"
BASE_HELP = "what the network corrects: a ridge regression, or just the training mean"


# --- options ------------------------------------------------------------------------------------


def parse_args(arguments=None):
    """The command line as a namespace. The defaults were chosen on validation rows."""
    parser = options.make_parser(__doc__, CELLS)
    add = parser.add_argument
    years = options.number(int, 1, 200)
    add("--preset", choices=PRESETS, help="the lab's plain setting; options beside it win")
    add("--date-column", default="Date Time", help="the file's column of dates")
    add("--target", default="T (degC)", help="the file's column to forecast, in degC")
    add("--freq", choices=STEPS_A_DAY, default="h", help=STEP_HELP)
    add("--features", choices=["T", "all"], default="T", help="the target, or all columns")
    add("--train-years", type=years, default=6, help="years that train and validate")
    add("--base", choices=["linear", "mean"], default="linear", help=BASE_HELP)
    add("--hidden", type=count, default=64, help="hidden units h of one direction")
    add("--dropout", type=share, default=0.3, help="share of the last state set to zero")
    add("--epochs", type=count, default=6, help=EPOCHS_HELP)
    add("--patience", type=count_or_0, default=3, help=options.PATIENCE_HELP)
    add("--batch-size", type=count, default=128, help="windows in one step")
    add("--lr", type=positive, default=2e-3, help="learning rate of AdamW")
    add("--fall-steps", type=count_or_0, default=660, help=options.FALL_HELP)
    add("--weight-decay", type=options.decay, default=1e-4, help="weight decay of AdamW")
    add("--clip", type=positive, default=1.0, help="largest norm of the gradient")
    add("--average", type=share, default=0.99, help="decay of the weights' moving average")
    add("--checkpoint", type=Path, help="the best.pt of an earlier run, for --predict")
    add("--predict", metavar="FILE", type=Path, help="forecast the days after the last in a CSV")
    return options.parse(parser, arguments, PRESETS)


# --- the series ---------------------------------------------------------------------------------


def read_series(frame, path, freq, date_column, target):
    """A DataFrame's columns in steps of `freq`, indexed by time, the target first.

    Of several values in a step the first known one counts; -999 and less, and texts, are missing.
    Raises UserError for a missing column, an unreadable date, and a target that is mostly text.
    """
    datasets.check_columns(frame, [date_column, target], path)
    if target == date_column:
        raise UserError(f"--target and --date-column are both {target!r}; name two columns")
    others = frame.columns.drop([date_column, target])
    raw = frame[[target, *others]]
    numbers = raw.apply(pd.to_numeric, errors="coerce").astype(float)
    is_text = (raw[target].notna() & numbers[target].isna()).to_numpy()
    if is_text.mean() > 0.5:
        row = is_text.argmax()
        example = f"{raw[target].iloc[row]!r} in row {row + 1}"
        raise UserError(f"{path}: most of {target} is no number, for example {example}; correct it")
    values = numbers.mask((numbers <= -999) | np.isinf(numbers))
    values.index = read_stamps(frame[date_column], path)
    series = values.sort_index(kind="stable").resample(freq).first()
    period = f"{series.index[0]} to {series.index[-1]}"
    steps = f"{len(series)} steps, {series[target].isna().sum()} without {target}"
    print(f"{path}: {len(frame)} rows, {period}; {steps}")
    return series


def read_stamps(column, path):
    """Dates as a DatetimeIndex: 31.12.2009 or 2009-12-31, alone or with a time 23:50[:00].

    Raises UserError for a date that cannot be right; it names the first one.
    """
    texts = column.astype(str).str.strip()
    stamps = pd.to_datetime(texts, format="ISO8601", errors="coerce", utc=True)
    stamps = stamps.dt.tz_localize(None)  # with offsets from UTC, they are times in UTC
    for german_format in (STAMP, "%d.%m.%Y %H:%M", "%d.%m.%Y"):
        stamps = stamps.fillna(pd.to_datetime(texts, format=german_format, errors="coerce"))
    is_far = (stamps - stamps.median()).abs() > pd.Timedelta(days=200 * 365.25)
    is_wrong = (stamps.isna() | is_far).to_numpy()
    if is_wrong.any():
        row = is_wrong.argmax()
        finding = f"{path}: row {row + 1} has the date '{column.iloc[row]}'"
        reason = "unreadable or centuries from the others; write 31.12.2009 23:50:00"
        raise UserError(f"{finding}, {reason}")
    return pd.DatetimeIndex(stamps)


@dataclass
class Weather:
    """A series of steps, and the windows of each part."""

    index: pd.DatetimeIndex
    columns: list[str]  # C names, the target first
    values: np.ndarray  # (N, C)
    steps_a_day: int
    train_end: int = 0  # where the training steps end
    starts: dict[str, np.ndarray] | None = None  # of each part's windows

    @property
    def known(self):
        """Known steps of a window."""
        return KNOWN_DAYS * self.steps_a_day

    @property
    def horizon(self):
        """Steps to forecast of a window."""
        return HORIZON_DAYS * self.steps_a_day

    def past(self, starts):
        """The known steps (n, known) of windows that begin at starts (n,)."""
        return starts[:, None] + np.arange(self.known)

    def future(self, starts):
        """The steps to forecast (n, horizon) of windows that begin at starts (n,)."""
        return starts[:, None] + self.known + np.arange(self.horizon)

    def truth(self, starts):
        """The true target (n, horizon) of windows that begin at starts (n,), degC."""
        return self.values[self.future(starts), 0]


def prepare(args, series, path):
    """The `Weather` of a series. Raises UserError if it is too short or mostly missing.

    --features all takes the target, and columns that have at least half of their training values.
    """
    target = series.columns[0]
    if series[target].isna().mean() > 0.5:
        raise UserError(f"{path}: over half of the steps have no {target}; does --freq fit?")
    index = series.index
    steps_a_day = STEPS_A_DAY[args.freq]
    length = (KNOWN_DAYS + HORIZON_DAYS) * steps_a_day
    test_begin = index[0] + pd.DateOffset(years=args.train_years)
    validation_end = int(index.searchsorted(test_begin))
    train_end = validation_end * 4 // 5
    first_test = int(index.searchsorted(test_begin.ceil("D")))  # the first midnight
    columns = [target]
    if args.features == "all":
        others = series.iloc[:train_end, 1:].dropna(axis=1, thresh=train_end // 2)
        columns += others.columns.tolist()
        print(f"inputs: {', '.join(columns)}")
    values = series[columns].to_numpy()  # (N, C)

    parts = {  # first step, end, stride from window to window
        "train": (0, train_end, 1),
        "validation": (train_end, validation_end, 1),
        "segments": (first_test, len(index), length),
        "daily_origins": (first_test, len(index), steps_a_day),
        "every_step": (first_test, len(index), 1),
    }
    is_complete = np.isfinite(values).all(axis=1)
    starts = {}
    for part, (first, end, stride) in parts.items():
        starts[part], left_out = window_starts(is_complete, first, end, length, stride)
        print(f"{part}: {len(starts[part])} windows, {left_out} with missing values left out")
        if len(starts[part]) < 5:
            counts = f"{len(starts[part])} whole, {left_out} with missing values"
            problem = f"{path} has too few windows for {part}: {counts}; 5 whole ones are needed"
            remedy = "name a longer or more complete file, or lower --train-years"
            if args.features == "all":
                remedy += ", or leave out --features all"
            raise UserError(f"{problem}: {remedy}")
    return Weather(index, columns, values, steps_a_day, train_end, starts)


def window_starts(is_complete, first, end, length, stride):
    """First steps of windows of `length` steps within first..end-1, every `stride` steps.

    is_complete: (N,) whether a step has all its values. Returns the starts of windows without a
    missing value, and how many were left out.
    """
    starts = np.arange(first, end - length + 1, stride)
    windows = starts[:, None] + np.arange(length)
    is_usable = is_complete[windows].all(axis=1)
    return starts[is_usable], int((~is_usable).sum())


# --- what a model sees --------------------------------------------------------------------------


def calendar(index):
    """Season and hour as (N, 4) features: sine and cosine of the year and of the day."""
    hour = index.hour.to_numpy()
    day_of_year = index.day_of_year.to_numpy() - 1 + hour / 24
    year = 2 * np.pi * day_of_year / 365.25
    day = 2 * np.pi * hour / 24
    return np.stack([np.sin(year), np.cos(year), np.sin(day), np.cos(day)], axis=1)


def harmonics(index):
    """(N, 17) regressors of the climatology: 1, two harmonics of the year, and two of the day that
    change with the season. On daily steps these repeat the others; the least squares allow it."""
    sin_y, cos_y, sin_d, cos_d = calendar(index).T
    # 2 sin cos and cos^2 - sin^2 are the sine and cosine of the doubled angle.
    sin_2y = 2 * sin_y * cos_y
    cos_2y = cos_y**2 - sin_y**2
    sin_2d = 2 * sin_d * cos_d
    cos_2d = cos_d**2 - sin_d**2
    terms = [np.ones(len(index)), sin_y, cos_y, sin_2y, cos_2y]
    for wave in (sin_d, cos_d, sin_2d, cos_2d):
        terms += [wave, wave * sin_y, wave * cos_y]
    return np.stack(terms, axis=1)


@dataclass
class Scaling:
    """How a model sees values: as scaled differences from what is expected at their time.

    kind "climatology": from the climatology; the calendar stands beside the differences. kind
    "mean": from the mean of the training steps, so that the inputs are the standardised values
    alone.
    """

    kind: str
    coefficients: np.ndarray  # (K, C), of the expected values
    scale: np.ndarray  # (C,), standard deviations of the differences

    def expected(self, index):
        """What is expected of all columns at the times of an index, (N, C)."""
        return regressors(self.kind, index) @ self.coefficients

    def inputs(self, weather):
        """Inputs (N, D) of a model; D is C + 4 with the calendar."""
        scaled = (weather.values - self.expected(weather.index)) / self.scale
        if self.kind == "mean":
            return scaled
        return np.concatenate([scaled, calendar(weather.index)], axis=1)


def regressors(kind, index):
    """Regressors (N, K) of what is expected: the climatology's, or for "mean" a 1."""
    return harmonics(index) if kind == "climatology" else np.ones((len(index), 1))


def fit_scaling(kind, weather):
    """The scaling of a kind, fitted to the training steps by least squares."""
    values = weather.values[: weather.train_end]  # (N, C), NaN where missing
    X = regressors(kind, weather.index[: weather.train_end])
    columns = []
    for column in values.T:
        is_known = np.isfinite(column)
        solution = np.linalg.lstsq(X[is_known], column[is_known], rcond=None)
        columns.append(solution[0])
    coefficients = np.stack(columns, axis=1)
    scale = np.nanstd(values - X @ coefficients, axis=0)
    rounding = 1e-6 * np.nanmax(np.abs(values), axis=0)
    scale[scale <= rounding] = 1.0  # a constant column keeps its unit
    return Scaling(kind, coefficients, scale)


# --- the linear forecast ------------------------------------------------------------------------


def linear_features(windows, steps_a_day):
    """(n, F) features of the ridge regression from the known steps (n, known, C + 4) of the inputs.

    v: the target at every step; the daily means and the last day's steps of all columns; a 1.
    Beside v, v times the sine and cosine of the year and of the day at the last known step, so that
    the weights change with season and hour.
    """
    n = len(windows)
    anomalies = windows[:, :, :-4]  # without the calendar
    target = anomalies[:, :, 0]
    days = anomalies.reshape(n, KNOWN_DAYS, steps_a_day, anomalies.shape[2])
    daily_means = days.mean(axis=2).reshape(n, -1)
    last_day = days[:, -1].reshape(n, -1)
    ones = np.ones((n, 1))
    v = np.concatenate([target, daily_means, last_day, ones], axis=1)
    blocks = [v]
    for wave in windows[:, -1, -4:].T:  # (n,) each: sin_y, cos_y, sin_d, cos_d
        blocks.append(v * wave[:, None])
    return np.concatenate(blocks, axis=1)


def feature_chunks(weather, scaling, starts):
    """Yield starts (n,) in chunks with their `linear_features`, to save memory."""
    inputs = scaling.inputs(weather)
    for chunk in np.array_split(starts, len(starts) // 4096 + 1):
        yield chunk, linear_features(inputs[weather.past(chunk)], weather.steps_a_day)


@dataclass
class Base:
    """A forecast that the network corrects: what the scaling expects, and with weights W the linear
    forecast of the scaled differences from it."""

    scaling: Scaling
    W: np.ndarray | None = None  # (F, horizon)


def base_forecast(weather, base, starts):
    """The base's forecast (n, horizon), degC, for windows that begin at starts (n,)."""
    scaling = base.scaling
    expected = scaling.expected(weather.index)[weather.future(starts), 0]
    if base.W is None:
        return expected
    differences = [X @ base.W for _, X in feature_chunks(weather, scaling, starts)]
    return expected + scaling.scale[0] * np.concatenate(differences)


def fit_linear(weather):
    """Ridge regression on the `linear_features`, with the penalty of least validation error.

    Returns two bases: "train", fitted to the training windows, whose errors the network learns; and
    "test", fitted to the training and validation windows, for the forecasts of the test.
    """
    scaling = fit_scaling("climatology", weather)
    XX, XY = sums_of_products(weather, scaling, weather.starts["train"])
    every_third = weather.starts["validation"][::3]  # enough to choose among seven penalties

    def validation_error(penalty):
        W = solve_ridge(XX, XY, penalty)
        predicted = base_forecast(weather, Base(scaling, W), every_third)
        return mean_error(weather.truth(every_third), predicted)

    penalty = min(PENALTIES, key=validation_error)
    W_train = solve_ridge(XX, XY, penalty)
    validation_XX, validation_XY = sums_of_products(weather, scaling, weather.starts["validation"])
    W_test = solve_ridge(XX + validation_XX, XY + validation_XY, penalty)
    print(f"linear forecast: {len(W_train)} features, penalty {penalty:g}")
    return {"train": Base(scaling, W_train), "test": Base(scaling, W_test)}


def sums_of_products(weather, scaling, starts):
    """X^T X and X^T Y of the windows that begin at starts: enough to solve for every penalty."""
    anomalies = scaling.inputs(weather)[:, 0]
    XX = 0.0
    XY = 0.0
    for chunk, X in feature_chunks(weather, scaling, starts):
        XX += X.T @ X
        XY += X.T @ anomalies[weather.future(chunk)]
    return XX, XY


def solve_ridge(XX, XY, penalty):
    """The weights of ridge regression, (X^T X + penalty I)^-1 X^T Y."""
    return np.linalg.solve(XX + penalty * np.eye(len(XX)), XY)


# --- the model ----------------------------------------------------------------------------------


class Forecaster(nn.Module):
    """A recurrence that corrects another forecast by its last state, all steps ahead at once:
    H_T W_hq + b_q."""

    def __init__(self, cell, num_inputs, num_hiddens, horizon, dropout):
        """num_inputs: D; num_hiddens: h; horizon: Q steps; dropout: share of the last state set to
        zero in training. Raises ValueError for an unknown cell.
        """
        super().__init__()
        self.recurrence = Recurrence(cell, num_inputs, num_hiddens, horizon)
        nn.init.zeros_(self.recurrence.W_hq)  # training starts from the other forecast
        for name, param in self.recurrence.named_parameters():
            if name.startswith("b_f"):  # with 1 the network alone forecasts worse (REPORT 6)
                nn.init.zeros_(param)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs):
        """Corrections (B, Q) from the known steps (T, B, D); both directions read nothing else."""
        T, B, _ = inputs.shape
        states = self.recurrence(inputs)  # (T, B, h)
        lengths = torch.full((B,), T, device=inputs.device)
        is_bidirectional = num_directions(self.recurrence.cell) == 2
        last = pool_states(states, lengths, "last", is_bidirectional)  # (B, h)
        return self.recurrence.output(self.dropout(last))


def build_model(config):
    """The untrained forecaster of a checkpoint's config."""
    return Forecaster(config["model"], **config["sizes"])


def forecast(model, weather, base, starts):
    """The forecast (n, horizon), degC, of base and network for windows that begin at starts."""
    inputs = torch.from_numpy(base.scaling.inputs(weather)).float()
    inputs = inputs.to(model.recurrence.W_hq.device)
    correction = corrections(model, inputs, weather.past(starts))
    return base_forecast(weather, base, starts) + base.scaling.scale[0] * correction


@torch.no_grad()
def corrections(model, inputs, past):
    """What the network adds (n, horizon), in units of the scaling.

    inputs: (N, D); past: the known steps (n, known) of each window, rows of inputs.
    """
    model.eval()
    chunks = []
    for steps in torch.from_numpy(past).to(inputs.device).split(512):
        X = inputs[steps.T]  # (known, B, D)
        chunks.append(model(X).cpu())
    return torch.cat(chunks).numpy()


# --- training -----------------------------------------------------------------------------------


def make_config(args, cell, weather, scaling, data):
    """What best.pt holds beside what is fitted."""
    sizes = {
        "num_inputs": scaling.inputs(weather).shape[1],
        "num_hiddens": args.hidden,
        "horizon": weather.horizon,
        "dropout": args.dropout,
    }
    return {
        "task": "temp",
        "model": cell,
        "sizes": sizes,
        "freq": args.freq,
        "date_column": args.date_column,
        "columns": weather.columns,
        "scaling": scaling.kind,
        "sha256": data["sha256"],
    }


def train(args, config, weather, base, device):
    """Train one structure; returns its run, and the model with the best epoch's weights."""
    starts = weather.starts["train"]
    target_scale = float(base.scaling.scale[0])  # degC in one unit of the scaled values
    # What the network learns to forecast: what its base leaves over.
    residuals = {part: base_residuals(weather, base, part) for part in ("train", "validation")}
    targets = torch.from_numpy(residuals["train"]).float().to(device)  # (n, horizon)
    inputs = torch.from_numpy(base.scaling.inputs(weather)).float().to(device)  # (N, D)
    past = torch.from_numpy(weather.past(starts)).to(device)  # (n, known)
    stride = min(3, weather.steps_a_day)  # three hours, or a day
    batches_an_epoch = math.ceil(len(starts) / stride / args.batch_size)
    num_steps = args.epochs * (batches_an_epoch // runs.world_size())

    torch.manual_seed(args.seed)
    model = build_model(config).to(device)
    optimizer = AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay, fused=True)
    schedule = LambdaLR(optimizer, runs.rise_and_fall(min(args.fall_steps, num_steps)))
    # Validation, test and best.pt use the moving average of the weights.
    average = runs.MovingAverage(model, args.average)
    parallel_model = DistributedDataParallel(model) if runs.world_size() > 1 else model
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
    run = runs.start(args, config, stateful)

    for epoch in run.epochs(args.epochs, args.patience):
        model.train()
        # Every third window, from a random first one; on daily steps every window.
        first = int(torch.randint(stride, ()))
        windows = torch.arange(first, len(starts), stride)
        shuffled = windows[torch.randperm(len(windows))]
        for rows in run.progress(shuffled.split(args.batch_size)):
            rows = rows.to(device, non_blocking=True)  # a GPU's earlier steps are not waited for
            X = inputs[past[rows].T]  # (known, B, D)
            residual = targets[rows]  # (B, horizon)
            error = (parallel_model(X) - residual).abs().mean()  # mean absolute error
            loss = error * target_scale  # degC
            optimizer.zero_grad()
            loss.backward()  # back-propagation through time
            grad_clipping(model.parameters(), args.clip)
            optimizer.step()
            schedule.step()  # the next step's rate
            average.update(model)
        runs.check_finite(model, epoch)
        # The epoch with the least validation error is the one that is tested.
        scores = validate(average.module, weather, inputs, residuals, target_scale)
        run.end_epoch(scores, score=-scores["validation_mean_error"])

    model.load_state_dict(run.best["weights"])  # the moving average after the best epoch
    return run, model


def base_residuals(weather, base, part):
    """Truth minus base forecast (n, horizon) of a part's windows, in units of the scaling."""
    starts = weather.starts[part]
    error = weather.truth(starts) - base_forecast(weather, base, starts)
    return error / base.scaling.scale[0]


def validate(model, weather, inputs, residuals, target_scale):
    """Mean errors, degC, on some training windows and on the validation windows.

    inputs: (N, D); residuals: {part: (n, horizon)} of `base_residuals`; target_scale: degC in one
    unit of both.
    """
    train_stride = len(weather.starts["train"]) // CURVE_WINDOWS + 1
    scores = {}
    for part, stride in (("train", train_stride), ("validation", 1)):
        past = weather.past(weather.starts[part][::stride])
        correction = corrections(model, inputs, past)
        error = mean_error(residuals[part][::stride], correction)
        scores[f"{part}_mean_error"] = target_scale * error
    return scores


# --- the test -----------------------------------------------------------------------------------


def test(run, model, weather, bases, linear, data):
    """Test a trained structure, write its results; returns the content of metrics.json.

    bases: "train" and "test", as `fit_linear` gives them. The band is that of the validation errors
    with the first, which has not seen the validation windows; the test forecasts have the second.
    linear: the ridge regression of the table; without --base mean it is the second, too.
    """
    base = bases["test"]
    validation = weather.starts["validation"]
    predicted = forecast(model, weather, bases["train"], validation)
    band = np.quantile(weather.truth(validation) - predicted, BAND, axis=0)  # (2, horizon), degC
    W = None if base.W is None else torch.from_numpy(base.W)
    coefficients = base.scaling.coefficients.tolist()
    scale = base.scaling.scale.tolist()
    run.save_best(band=band.tolist(), W=W, coefficients=coefficients, scale=scale)

    forecasts = {}  # {part: {"model" or a baseline: (n, horizon)}}
    for part in ("segments", "daily_origins", "every_step"):
        starts = weather.starts[part]
        predicted = forecast(model, weather, base, starts)
        forecasts[part] = {"model": predicted, **baseline_forecasts(weather, linear, starts)}
    entries = {}
    for part in ("segments", "daily_origins"):
        truth = weather.truth(weather.starts[part])
        entries[part] = part_errors(truth, forecasts[part], band)
    # One day ahead from every start: what textbooks report for this series.
    truth = weather.truth(weather.starts["every_step"])
    step = weather.steps_a_day - 1
    lead_24h = {"windows": len(truth)}
    for name, predicted in forecasts["every_step"].items():
        lead_24h[name] = mean_error(truth[:, step], predicted[:, step])
    split = {part: len(weather.starts[part]) for part in ("train", "validation")}
    split["test"] = len(weather.starts["daily_origins"])  # the segments are among them
    metrics = run.write_metrics(data, split, entries, lead_24h=lead_24h)
    write_predictions(run.folder / "predictions.csv", weather, forecasts["segments"]["model"], band)

    title = model_title(metrics["model"], run.args.base)
    epoch = metrics["best_epoch"]
    print(f"\nabsolute errors, degC, on the test years{runs.sample_note(data)}, epoch {epoch}")
    table = pd.DataFrame.from_dict(error_rows(title, entries), orient="index")
    print(table.to_string(float_format="{:.3f}".format))
    for part, entry in entries.items():
        print(f"{part}: {entry['windows']} windows, {entry['coverage_80']:.1%} in the 80 % band")
    means = f"mean error {lead_24h['model']:.3f}, linear {lead_24h['linear']:.3f}"
    print(f"24 hours ahead, from every step: {means}\n")
    draw(run, weather, forecasts, band, f"{title}{runs.sample_note(data)}")
    print(f"results in {run.folder}: open forecasts.png and lead_time.png; forecast with")
    print(f'  python temp_forecast.py --checkpoint "{run.folder}/best.pt" --predict recent.csv')
    return metrics


def baseline_forecasts(weather, linear, starts):
    """The baselines' forecasts {name: (n, horizon)}, degC, for windows that begin at starts."""
    target = weather.values[weather.past(starts), 0]  # (n, known)
    last_step = target[:, -1:]
    last_day = target[:, -weather.steps_a_day :]
    return {
        "persistence": np.repeat(last_step, weather.horizon, axis=1),
        "seasonal_naive": np.tile(last_day, HORIZON_DAYS),
        "climatology": base_forecast(weather, Base(linear.scaling), starts),
        "linear": base_forecast(weather, linear, starts),
    }


def part_errors(truth, forecasts, band):
    """The entry of one part in metrics.json: errors, coverage of the band, baselines.

    forecasts: {"model" or a baseline: (n, horizon)}.
    """
    baseline_errors = {}
    for name in BASELINES:
        baseline_errors[name] = {
            "mean_error": mean_error(truth, forecasts[name]),
            "median_error": median_error(truth, forecasts[name]),
        }
    low, high = band
    error = truth - forecasts["model"]
    is_inside = (low <= error) & (error <= high)
    return {
        "windows": len(truth),
        "mean_error": mean_error(truth, forecasts["model"]),
        "median_error": median_error(truth, forecasts["model"]),
        "rmse": rmse(truth, forecasts["model"]),
        "coverage_80": float(is_inside.mean()),
        "baselines": baseline_errors,
    }


def model_title(cell, base):
    """What stands for a model in tables and pictures; base: the value of --base."""
    name = runs.title_of(cell)
    return f"linear + {name}" if base == "linear" else f"{name} alone"


def error_rows(title, entries):
    """The lines of the table: the model, the baselines, and what the network adds to `linear`.

    entries: "test" of metrics.json. Returns {line: {"segments, mean": degC, ...}}.
    """
    rows = {title: error_row(entries)}
    for name in BASELINES:
        baseline = {part: entry["baselines"][name] for part, entry in entries.items()}
        rows[name.replace("_", " ")] = error_row(baseline)
    difference = {}
    for column, error in rows[title].items():
        difference[column] = error - rows["linear"][column]
    rows[f"{title}, minus linear"] = difference
    return rows


def error_row(errors_by_part):
    """One line of the table, from {part: {"mean_error", "median_error"}}."""
    row = {}
    for part, errors in errors_by_part.items():
        windows = part.replace("_", " ")
        row[f"{windows}, mean"] = errors["mean_error"]
        row[f"{windows}, median"] = errors["median_error"]
    return row


def write_predictions(path, weather, predicted, band):
    """Write each forecast step of the test segments: stamp, hours ahead, truth, forecast, band."""
    starts = weather.starts["segments"]
    times = weather.index[weather.future(starts).ravel()]
    numbers = np.arange(len(starts)) + 1
    table = {
        "segment": np.repeat(numbers, weather.horizon),
        "Date Time": times.strftime(STAMP),
        "hours ahead": np.tile(lead_hours(weather), len(starts)),
        weather.columns[0]: weather.truth(starts).ravel(),
        "forecast (degC)": predicted.ravel(),
        "low 10 % (degC)": (predicted + band[0]).ravel(),
        "high 90 % (degC)": (predicted + band[1]).ravel(),
    }
    write_csv(path, pd.DataFrame(table).round(3))


def lead_hours(weather):
    """Hours from the last known step to each forecast step (horizon,)."""
    return (np.arange(weather.horizon) + 1) * (24 // weather.steps_a_day)


def draw(run, weather, forecasts, band, title):
    """Draw the curves, six test segments from the best to the worst, and the error by lead time."""
    history = pd.DataFrame(run.history)
    curves = {part: history[f"{part}_mean_error"] for part in ("train", "validation")}
    plots.draw_curves(run.folder / "curves.png", {f"{title}: mean error, degC": curves})

    starts = weather.starts["segments"]
    predicted = forecasts["segments"]["model"]
    errors = np.abs(weather.truth(starts) - predicted).mean(axis=1)
    places = np.linspace(0, len(errors) - 1, num=min(6, len(errors))).astype(int)
    windows = []
    for i in errors.argsort()[places]:
        steps = slice(starts[i], starts[i] + weather.known + weather.horizon)
        truth = weather.values[steps, 0]
        windows.append((weather.index[steps], truth, predicted[i]))
    heading = f"{title}: test segments from the best to the worst"
    plots.draw_forecasts(run.folder / "forecasts.png", windows, band, weather.steps_a_day, heading)

    truth = weather.truth(weather.starts["daily_origins"])
    errors_by_name = {}
    for name, predicted in forecasts["daily_origins"].items():
        errors_by_name[name.replace("_", " ")] = np.abs(truth - predicted)
    heading = f"error by lead time, {title}"
    plots.draw_lead_time(run.folder / "lead_time.png", lead_hours(weather), errors_by_name, heading)


def compare(args, results):
    """The structures side by side with the baselines: temp_all/."""
    rows = {}
    for metrics in results:
        title = model_title(metrics["model"], args.base)
        rows.update(error_rows(title, metrics["test"]))  # the baselines of all runs are the same
    data = results[0]["data"]
    table = [{"model": name, **errors} for name, errors in rows.items()]
    content = {"argv": sys.argv[1:], "seed": args.seed, "data": data, "rows": table}
    print(f"\nabsolute errors, degC, on the test years{runs.sample_note(data)}")
    panels = {
        f"Training mean error, degC{runs.sample_note(data)}": "train_mean_error",
        "Validation mean error, degC": "validation_mean_error",
    }
    cells = [metrics["model"] for metrics in results]
    runs.write_comparison(args.out, "temp", cells, content, panels)


# --- prediction ---------------------------------------------------------------------------------


def predict(args, device):
    """Print the days after the last ones of a file as CSV, with the 80 % band."""
    saved = runs.load_checkpoint(args.checkpoint, "temp")
    model = build_model(saved).to(device)
    runs.load_weights(model, saved["weights"], args.checkpoint)
    scaling = Scaling(saved["scaling"], np.array(saved["coefficients"]), np.array(saved["scale"]))
    base = Base(scaling, None if saved["W"] is None else saved["W"].numpy())
    freq = saved["freq"]
    columns = saved["columns"]
    target = columns[0]

    frame, data = datasets.load(datasets.CLIMATE, args.predict)
    with contextlib.redirect_stdout(sys.stderr):  # only the forecast goes to stdout
        series = read_series(frame, data["path"], freq, saved["date_column"], target)
    datasets.check_columns(series, columns, args.predict)
    known = KNOWN_DAYS * STEPS_A_DAY[freq]
    recent = series.loc[: series[target].last_valid_index(), columns].iloc[-known:]
    if len(recent.dropna()) < known:
        wanted = f"{KNOWN_DAYS} whole days of {', '.join(columns)}"
        raise UserError(f"{args.predict} does not end with {wanted}; add them")
    index = pd.date_range(recent.index[0], periods=known + saved["sizes"]["horizon"], freq=freq)
    coming = index[known:]
    values = recent.reindex(index).to_numpy()  # NaN where the future is
    weather = Weather(index, columns, values, STEPS_A_DAY[freq])
    only_window = np.array([0])
    predicted = forecast(model, weather, base, only_window)[0]
    low, high = predicted + np.array(saved["band"])

    last = f"the last known step begins at {recent.index[-1]:{STAMP}}"
    covered = f"{coming[0]:{STAMP}} to {coming[-1]:{STAMP}}"
    print(f"{last}; the forecast covers {covered}", file=sys.stderr)
    table = {
        "Date Time": coming.strftime(STAMP),
        target: predicted,
        "low 10 % (degC)": low,
        "high 90 % (degC)": high,
    }
    # lineterminator: on Windows print adds the \r, and to_csv alone would add another.
    text = pd.DataFrame(table).to_csv(index=False, float_format="%.2f", lineterminator="\n")
    print(text, end="")


# --- from arguments to results ------------------------------------------------------------------


def main():
    """Train what --model names, test it, and compare all; or predict with a saved model."""
    args = parse_args()
    device = options.pick_device(args.device)
    if args.predict is not None:
        predict(args, device)
        return
    runs.join_processes(device)

    frame, data = datasets.load(datasets.CLIMATE, args.data)
    series = read_series(frame, data["path"], args.freq, args.date_column, args.target)
    weather = prepare(args, series, data["path"])
    options.check_folder(args.out)
    runs.check_same_data(data)
    linear = fit_linear(weather)  # with --base mean, only a baseline in the table
    bases = linear
    if args.base == "mean":
        mean = Base(fit_scaling("mean", weather))
        bases = {"train": mean, "test": mean}
    cells = list(CELLS) if args.model == "all" else [args.model]
    if not args.resume:
        # All before the first training, so that a later --resume finds nothing of an earlier run.
        names = ["all", *cells]  # a comparison with what is replaced would be wrong
        runs.remove_results(args.out / f"temp_{name}" for name in names)
    results = []
    for cell in cells:
        config = make_config(args, cell, weather, bases["train"].scaling, data)
        run, model = train(args, config, weather, bases["train"], device)
        if runs.is_first():
            results.append(test(run, model, weather, bases, linear["test"], data))
    if args.model == "all" and runs.is_first():
        compare(args, results)


if __name__ == "__main__":
    options.run_script(main)
