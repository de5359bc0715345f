"""Temperatures as numbers: the series without its flaws, its climatology, windows, and the baselines to beat."""

from types import SimpleNamespace

import numpy as np
import pandas as pd

import datasets
from datasets import UserError
from metrics import mean_error

TARGET = "T (degC)"
STAMP = "%d.%m.%Y %H:%M:%S"
STEPS_A_DAY = {"h": 24, "10min": 144, "D": 1}


def read_series(frame, path, freq):
    """A frame's numeric columns as means of steps of `freq`, indexed by time, gaps of up to three hours interpolated.

    Rows are sorted, repeated stamps averaged; -9999 and other impossible values are missing. One line reports it all.
    Raises UserError for missing columns, a date that cannot be read, and a file without temperatures.
    """
    datasets.check_columns(frame, ("Date Time", TARGET), path)
    stamps = pd.to_datetime(frame["Date Time"], format=STAMP, errors="coerce")
    if stamps.isna().any():
        row = int(np.flatnonzero(stamps.isna())[0])
        raise UserError(
            f"{path}: row {row + 1} has the date {str(frame['Date Time'].iloc[row])!r}; write it as 31.12.2009 23:50:00"
        )
    values = frame.drop(columns="Date Time").apply(pd.to_numeric, errors="coerce")
    values = values.loc[:, values.notna().any()]
    impossible = (values <= -999) | np.isinf(values)
    if TARGET in values:
        impossible[TARGET] |= ~values[TARGET].between(-90, 60) & values[TARGET].notna()
    values = values.mask(impossible)
    if TARGET not in values or not values[TARGET].notna().any():
        raise UserError(f"{path} has no temperatures in its column {TARGET!r}; check the file")
    values.index = pd.DatetimeIndex(stamps)
    repeated = int(values.index.duplicated().sum())
    series = values.sort_index().groupby(level=0).mean().resample(freq).mean()
    missing = int(series[TARGET].isna().sum())
    longest = 3 * STEPS_A_DAY[freq] // 24  # steps in three hours
    filled = series.apply(_fill_short_gaps, longest=longest)
    first, last = series.index[[0, -1]].strftime("%Y-%m-%d %H:%M")
    print(
        f"{path}: {len(frame)} rows, {first} to {last}; "
        f"{repeated} repeated stamps averaged, {int(impossible.to_numpy().sum())} impossible values; "
        f"{len(series)} steps, {missing - int(filled[TARGET].isna().sum())} of {missing} missing ones interpolated"
    )
    return filled


def _fill_short_gaps(column, longest):
    """A column with its gaps of at most `longest` steps interpolated, longer ones left as they are."""
    gap = column.isna()
    length = gap.groupby((gap != gap.shift()).cumsum()).transform("sum")
    return column.interpolate(limit_area="inside").where(~gap | (length <= longest))


def calendar(index):
    """(N, 5) columns that know the season and the hour: sine and cosine of the year and the day, and a one."""
    year = 2 * np.pi * (index.day_of_year.to_numpy() - 1 + index.hour.to_numpy() / 24) / 365.25
    day = 2 * np.pi * (index.hour.to_numpy() + index.minute.to_numpy() / 60) / 24
    return np.stack([np.sin(year), np.cos(year), np.sin(day), np.cos(day), np.ones(len(index))], axis=1)


def harmonics(index, steps_a_day):
    """(N, K) regressors of the climatology: two harmonics of the year; of the day, if steps are shorter; products."""
    sin_y, cos_y, sin_d, cos_d, one = calendar(index).T
    terms = [one, sin_y, cos_y, 2 * sin_y * cos_y, cos_y**2 - sin_y**2]
    if steps_a_day > 1:
        for wave in (sin_d, cos_d, 2 * sin_d * cos_d, cos_d**2 - sin_d**2):
            terms += [wave, wave * sin_y, wave * cos_y]
    return np.stack(terms, axis=1)


def fit_climatology(design, values):
    """Least squares (K, columns) of the columns of values (N, columns) on the design (N, K), without missing values."""
    known = np.isfinite(values)
    columns = [
        np.linalg.lstsq(design[k], column[k], rcond=None)[0] for column, k in zip(values.T, known.T, strict=True)
    ]
    return np.stack(columns, axis=1)


def window_starts(complete, first, last, length, step):
    """First steps of the windows of `length` steps within first..last-1, `step` apart, and how many were left out.

    complete: (N,) whether a step's values are all there; a window that touches a missing one is left out.
    """
    starts = np.arange(first, last - length + 1, step)
    missing_before = np.concatenate([[0], np.cumsum(~complete)])
    whole = missing_before[starts + length] == missing_before[starts]
    return starts[whole], int((~whole).sum())


def prepare(args, frame, path):
    """Everything that training and testing need, from the file's frame: see the names at the end.

    Raises UserError for a series that is too short.
    """
    series = read_series(frame, path, args.freq)
    steps_a_day = STEPS_A_DAY[args.freq]
    known, ahead = args.history_days * steps_a_day, args.horizon_days * steps_a_day
    length = known + ahead
    index = series.index
    split = int((index < index[0] + pd.DateOffset(years=args.train_years)).sum())
    midnights = np.flatnonzero(index[split:] == index[split:].normalize()) + split
    first_test = int(midnights[0]) if len(midnights) else len(index)
    columns = [TARGET] + [name for name in series if name != TARGET and args.features == "all"]
    values = series[columns].to_numpy(float)
    design = harmonics(index, steps_a_day)
    fold = int(split * (1 - 1 / 5))  # the last fifth of the training years validates
    complete = np.isfinite(values).all(axis=1)
    parts = {
        "train": window_starts(complete, 0, fold, length, 1),
        "validation": window_starts(complete, fold, split, length, 1),
        "segments": window_starts(complete, first_test, len(index), length, length),
        "daily_origins": window_starts(complete, first_test, len(index), length, steps_a_day),
    }
    for part, (starts, _) in parts.items():
        if len(starts) < 5:
            raise UserError(
                f"{path} is too short: {len(starts)} whole windows of {args.history_days + args.horizon_days} days for "
                f"{part.replace('_', ' ')}, at least 5 are needed; lower --train-years or name a longer series"
            )
    counts = ", ".join(f"{len(starts)} {part.replace('_', ' ')} (-{out})" for part, (starts, out) in parts.items())
    print(
        f"windows (left out for missing values): {counts}; tested from {index[first_test]:%Y-%m-%d %H:%M}", flush=True
    )
    coefficients = fit_climatology(design[:split], values[:split])
    anomalies = values - design @ coefficients
    scale = np.nanstd(anomalies[:fold], axis=0)
    scale[scale == 0] = 1.0  # a constant column
    return SimpleNamespace(
        index=index, columns=columns, truth=values[:, 0], climatology=(design @ coefficients)[:, 0],
        anomalies=anomalies, scale=scale, coefficients=coefficients, known=known, ahead=ahead, steps_a_day=steps_a_day,
        split=split, starts={part: starts for part, (starts, _) in parts.items()}
        | {"all": window_starts(complete, 0, split, length, 1)[0]},
    )  # fmt: skip


def network_inputs(anomalies, scale, index):
    """(N, D) float32 features of every step: all columns' scaled anomalies, sine and cosine of the year and the day."""
    return np.concatenate([anomalies / scale, calendar(index)[:, :4]], axis=1).astype(np.float32)


def fit_linear(weather):
    """Ridge regression of the anomalies ahead on the known ones, in closed form; the penalty with the least
    validation error. Returns two matrices (known + 1, ahead), the last row the constant: one fitted to the training
    windows, for a network that corrects it and is validated; one to all windows of the training years, the baseline.
    """

    def windows(part):
        starts = weather.starts[part]
        rows = weather.anomalies[starts[:, None] + np.arange(weather.known + weather.ahead), 0]
        return np.c_[rows[:, : weather.known], np.ones(len(rows))], rows[:, weather.known :]

    def solve(X, Y, penalty):
        free = np.full(X.shape[1], float(penalty))
        free[-1] = 0.0  # the constant is not penalised
        return np.linalg.solve(X.T @ X + np.diag(free), X.T @ Y)

    train, (X, Y) = windows("train"), windows("validation")
    candidates = {penalty: solve(*train, penalty) for penalty in 10.0 ** np.arange(-1, 6)}
    best = min(candidates, key=lambda penalty: mean_error(Y, X @ candidates[penalty]))
    return candidates[best], solve(*windows("all"), best)


def baseline_forecasts(weather, starts, linear):
    """The baselines' forecasts {name: (n, ahead)} in degC for windows that begin at `starts` (n,)."""
    past = starts[:, None] + np.arange(weather.known)
    future = starts[:, None] + np.arange(weather.known, weather.known + weather.ahead)
    last_day = weather.truth[past[:, -weather.steps_a_day :]]
    anomalies = np.c_[weather.anomalies[past, 0], np.ones(len(starts))]
    return {
        "persistence": np.repeat(weather.truth[past[:, -1:]], weather.ahead, axis=1),
        "seasonal_naive": np.tile(last_day, weather.ahead // weather.steps_a_day),
        "climatology": weather.climatology[future],
        "linear": weather.climatology[future] + anomalies @ linear,
    }
