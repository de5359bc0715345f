"""Two days of temperature ahead from five days known, with an RNN, a GRU, an LSTM or a Bi-LSTM written by hand.

    python temp_forecast.py                                  LSTM on hourly means, writes runs/temp_lstm/
    python temp_forecast.py --model all --freq D --data jena_daily.csv
    python temp_forecast.py --checkpoint runs/temp_lstm/best.pt --predict recent.csv

The first --train-years years train, their last part validates, all that follows tests: 7-day segments from the first
midnight on, 5 days in, 2 days out, and beside them every forecast that starts at a midnight. Errors are absolute, degC.
The network forecasts the anomaly, the difference from a smooth climatology fitted to the training years.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

import datasets
import training
from datasets import UserError
from metrics import mean_error, median_error, rmse
from rnn_models import ForecastEnsemble, Forecaster
from training import CELLS, NAMES, number
from weather import (
    STAMP,
    STEPS_A_DAY,
    TARGET,
    baseline_forecasts,
    fit_linear,
    harmonics,
    network_inputs,
    prepare,
    read_series,
)

BASELINES = {"persistence": "persistence", "seasonal_naive": "seasonal naive", "climatology": "climatology",
             "linear": "linear"}  # fmt: skip
# Chosen on validation rows, one set for each step length.
HOURLY = {"epochs": 8, "hidden": 64, "batch_size": 128, "lr": 2e-3, "dropout": 0.3, "noise": 0.2, "average": 0.99,
          "residual": True, "members": 1}  # fmt: skip
DAILY = {"epochs": 12, "hidden": 16, "batch_size": 16, "lr": 2e-3, "dropout": 0.1, "noise": 0.0, "average": 0.0,
         "residual": False, "members": 5}  # fmt: skip
DEFAULTS = {"h": HOURLY, "10min": HOURLY, "D": DAILY}


def parse_args(arguments=None):
    """The command line as a namespace."""
    parser = training.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    training.add_training_options(parser, model="lstm", schedule="linear")
    add = parser.add_argument
    add("--freq", choices=list(STEPS_A_DAY), default="h", help="length of a step: means of hours, 10 minutes or days")
    add("--history-days", type=number(int, 1), default=5, help="days that are known (default: %(default)s)")
    add("--horizon-days", type=number(int, 1), default=2, help="days that are forecast (default: %(default)s)")
    add("--train-years", type=number(int, 1), default=6, help="years that train and validate (default: %(default)s)")
    add("--features", choices=["T", "all"], default="T", help="temperature alone, or every numeric column (default: T)")
    add("--noise", type=number(float, 0), help="standard deviation of noise on the scaled inputs in training")
    add("--members", type=number(int, 1), help="networks whose mean is the forecast")
    add(
        "--refit",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="train again with the validation rows, for as many epochs as validation found best (default: yes)",
    )
    add("--residual", action=argparse.BooleanOptionalAction, help="learn what the linear model leaves, and add the two")
    add("--predict", metavar="FILE", type=Path, help="with --checkpoint: the two days after the last five in this CSV")
    args = parser.parse_args(arguments)
    for name, value in DEFAULTS[args.freq].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if (args.predict is None) != (args.checkpoint is None):
        raise UserError("--predict and --checkpoint belong together; give both, or none to train")
    return args


# --- training and testing ---------------------------------------------------------------------------------------------


def build_model(options):
    """The forecaster that a dict of options describes; its linear part, where it has one, is still zero."""
    size, ahead = len(options["columns"]) + 4, options["ahead"]
    linear = torch.zeros(options["known"] + 1, ahead) if options["residual"] else None
    cell = CELLS[options["model"]]
    return ForecastEnsemble(
        [
            Forecaster(cell, size, options["hidden"], ahead, options["dropout"], options["noise"])
            for _ in range(options["members"])
        ],
        linear,
    )


@torch.no_grad()
def forecast(model, inputs, starts, known, batch_size=512):
    """The network's scaled anomalies (n, ahead) on the CPU for windows of inputs (N, D) that begin at starts (n,)."""
    model.eval()
    steps = torch.arange(known, device=inputs.device)[:, None]
    return torch.cat([model(inputs[part + steps]) for part in starts.to(inputs.device).split(batch_size)]).cpu()


def train(args, model_name, weather, data, linear, device):
    """Train one structure, test it, write its folder; returns (metrics.json's dict, history)."""
    folder = args.out / f"temp_{model_name}"
    lock = training.lock_folder(folder)
    options = {name: getattr(args, name) for name in ("freq", "hidden", "dropout", "noise", "residual", "members")}
    options |= {name: getattr(weather, name) for name in ("ahead", "known", "columns")} | {"model": model_name}
    fixed = {"task": "temp", "options": options, "climatology": weather.coefficients.tolist(),
             "scale": weather.scale.tolist(), "source": data["source"]}  # fmt: skip
    scale = float(weather.scale[0])

    def new_model(linear):
        training.seed_all(args.seed)
        model = build_model(options)
        if args.residual:  # in scaled anomalies the weights are the same, only the constant is scaled
            model.linear.copy_(torch.from_numpy(np.vstack([linear[:-1], linear[-1] / scale])))
        return model.to(device)

    inputs = torch.from_numpy(network_inputs(weather.anomalies, weather.scale, weather.index)).to(device)
    targets = inputs[:, 0]
    starts = {part: torch.from_numpy(values) for part, values in weather.starts.items()}
    past = torch.arange(weather.known, device=device)[:, None]
    future = torch.arange(weather.known, weather.known + weather.ahead, device=device)

    def batches(part, model):
        model.train()
        every = max(1, weather.steps_a_day // 8)  # windows a few hours apart, of another hour in every epoch
        mine = starts[part][int(torch.randint(every, ())) :: every]
        return mine[torch.randperm(len(mine))].to(device).split(args.batch_size)

    def loss_of(model, batch):
        return (model(inputs[batch + past]) - targets[batch[:, None] + future]).abs().mean() * scale, len(batch)

    def validate(model):
        guess = forecast(model, inputs, starts["validation"], weather.known)
        truth = targets.cpu()[starts["validation"][:, None] + future.cpu()]
        return {"validation_mean_error": mean_error(truth.numpy(), guess.numpy()) * scale}

    model = new_model(linear[0])
    parameters = sum(param.numel() for param in model.parameters())
    print(f"\n{NAMES[model_name]}: {parameters:,} parameters, {device}", flush=True)
    history, best_epoch = training.fit(
        model, args, folder, fixed, lambda: batches("train", model), loss_of, validate,
        "validation_mean_error", min, "windows",
    )  # fmt: skip
    if args.refit:
        print(f"again for {best_epoch} epochs, with the validation rows", flush=True)
        model = new_model(linear[1])
        training.fit(
            model, args, folder / "refit", fixed, lambda: batches("all", model), loss_of, lambda model: {},
            "epoch", max, "windows", until=best_epoch,
        )  # fmt: skip
        training.save_checkpoint(folder / "best.pt", **fixed, epoch=best_epoch, weights=model.state_dict())
    forecasts = {}
    for part in ("segments", "daily_origins"):
        anomalies = forecast(model, inputs, starts[part], weather.known).numpy() * scale
        rows = weather.starts[part]
        climate = weather.climatology[rows[:, None] + np.arange(weather.known, weather.known + weather.ahead)]
        forecasts[part] = {"model": climate + anomalies, **baseline_forecasts(weather, rows, linear[1])}
    metrics = {
        "task": "temp", "model": model_name, "seed": args.seed, "argv": sys.argv[1:], "device": str(device),
        "torch": torch.__version__, "parameters": parameters, "epochs": args.epochs, "best_epoch": best_epoch,
        "seconds_per_epoch": float(np.mean([record["seconds"] for record in history])), "data": data,
        "split": {"train": len(starts["train"]), "validation": len(starts["validation"]),
                  "test": len(starts["daily_origins"])},
        "test": {part: errors(weather, part, forecasts[part]) for part in forecasts},
    }  # fmt: skip
    training.write_json(folder / "metrics.json", metrics)
    write_predictions(folder / "predictions.csv", weather, forecasts["segments"]["model"])
    stamp = " (bundled sample)" if data["source"] == "sample" else ""
    title = f"{NAMES[model_name]}: mean error, degC{stamp}"
    training.draw_curves(
        folder / "curves.png",
        {NAMES[model_name]: history},
        {title: {"train_loss": "o-", "validation_mean_error": "s-"}},
    )
    draw_forecasts(folder / "forecasts.png", weather, forecasts["segments"]["model"], NAMES[model_name] + stamp)
    draw_lead_time(folder / "lead_time.png", weather, forecasts["daily_origins"], NAMES[model_name], stamp)
    name = f"{NAMES[model_name]}{' on top of the linear model' if args.residual else ''}"
    print_report(metrics["test"], name, f"{name}, test, epoch {best_epoch}{stamp}")
    names = "metrics.json history.csv predictions.csv curves.png forecasts.png lead_time.png best.pt last.pt"
    print(f"written to {folder}: {names}", flush=True)
    lock.close()
    return metrics, history


def truth_of(weather, part):
    """The true temperatures (n, ahead) of a part's windows, degC."""
    return weather.truth[weather.starts[part][:, None] + np.arange(weather.known, weather.known + weather.ahead)]


def errors(weather, part, forecasts):
    """The entry of one part in metrics.json."""
    truth = truth_of(weather, part)
    model = forecasts["model"]
    return {
        "windows": len(truth),
        "mean_error": mean_error(truth, model),
        "median_error": median_error(truth, model),
        "rmse": rmse(truth, model),
        "baselines": {
            name: {
                "mean_error": mean_error(truth, forecasts[name]),
                "median_error": median_error(truth, forecasts[name]),
            }
            for name in BASELINES
        },
    }


def print_report(test, name, title):
    """Errors and skill on the terminal. Skill: the share of a baseline's mean error that the model takes away."""
    print(f"\n{title}: absolute errors, degC")
    for part, entry in test.items():
        print(
            f"{part.replace('_', ' ')}, {entry['windows']} windows{'mean':>18}{'median':>10}{'skill of the model':>22}"
        )
        print(f"  {name:32}{entry['mean_error']:10.3f}{entry['median_error']:10.3f}")
        for baseline, scores in entry["baselines"].items():
            skill = 1 - entry["mean_error"] / scores["mean_error"]
            print(f"  {BASELINES[baseline]:32}{scores['mean_error']:10.3f}{scores['median_error']:10.3f}{skill:22.1%}")


def write_predictions(path, weather, forecasts):
    """Each forecast step of the test segments with its time stamp, hours ahead, truth and forecast."""
    truth = truth_of(weather, "segments")
    hours = 24 // weather.steps_a_day if weather.steps_a_day <= 24 else 24 / weather.steps_a_day
    rows = []
    for segment, start in enumerate(weather.starts["segments"].tolist(), 1):
        stamps = weather.index[start + weather.known : start + weather.known + weather.ahead].strftime(STAMP)
        for step, stamp in enumerate(stamps):
            values = f"{truth[segment - 1, step]:.3f}", f"{forecasts[segment - 1, step]:.3f}"
            rows.append((segment, stamp, round((step + 1) * hours, 2), *map(float, values)))
    training.write_csv(path, ["segment", "Date Time", "hours ahead", "T (degC)", "forecast (degC)"], rows)


def draw_forecasts(path, weather, forecasts, title):
    """Six test segments, from the best to the worst forecast: what was known, what came, what was forecast."""
    truth = truth_of(weather, "segments")
    order = np.argsort(np.abs(truth - forecasts).mean(axis=1))
    line = ".-" if weather.steps_a_day == 1 else "-"
    figure = Figure(figsize=(10.2, 5.4), layout="constrained")
    figure.suptitle(f"{title}: test segments from the best to the worst")
    chosen = order[np.linspace(0, len(order) - 1, 6).round().astype(int)]
    for axes, segment in zip(figure.subplots(2, 3).flat, chosen, strict=True):
        start = int(weather.starts["segments"][segment])
        index = weather.index[start : start + weather.known + weather.ahead]
        axes.plot(index, weather.truth[start : start + len(index)], f"C0{line}", linewidth=1, label="truth")
        axes.plot(index[weather.known :], forecasts[segment], f"C1{line}", linewidth=1, label="forecast")
        axes.axvline(index[weather.known], color="grey", linewidth=0.8, linestyle="--")
        error = mean_error(truth[segment], forecasts[segment])
        axes.set_title(f"{index[weather.known]:%Y-%m-%d}: mean error {error:.2f} degC", fontsize=9)
        axes.set_ylabel("T, degC", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_xticks(index[:: weather.steps_a_day], [f"{day:%d.%m.}" for day in index[:: weather.steps_a_day]])
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    training.save_figure(path, figure)


def draw_lead_time(path, weather, forecasts, name, stamp):
    """Mean and median error by hours ahead, of the model and the baselines, over all daily origins."""
    truth = truth_of(weather, "daily_origins")
    hours = (np.arange(weather.ahead) + 1) * 24 / weather.steps_a_day
    figure = Figure(figsize=(10.4, 3.8), layout="constrained")
    for axes, (label, measure) in zip(figure.subplots(1, 2), (("mean", np.mean), ("median", np.median)), strict=True):
        for key, values in forecasts.items():
            style = "k.-" if key == "model" else ".-"
            axes.plot(
                hours, measure(np.abs(truth - values), axis=0), style, markersize=4, label=BASELINES.get(key, name)
            )
        axes.set(title=f"{label} error by lead time{stamp}", xlabel="hours ahead", ylabel="degC", ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    training.save_figure(path, figure)


def compare(args, results):
    """The four structures side by side: temp_all/comparison.*"""
    folder = args.out / "temp_all"
    lines = ["| model | segments: mean | median | daily origins: mean | median | parameters | s/epoch | best epoch |"]
    lines.append("|" + " --- |" * 8)
    for name, (metrics, _) in results.items():
        cells = [
            f"{metrics['test'][part][key]:.3f}" for part in metrics["test"] for key in ("mean_error", "median_error")
        ]
        cells += [f"{metrics['parameters']:,}", f"{metrics['seconds_per_epoch']:.1f}", str(metrics["best_epoch"])]
        label = f"{NAMES[name]}{', on top of the linear model' if args.residual else ''}"
        lines.append("| " + " | ".join([label, *cells]) + " |")
    for name, label in BASELINES.items():
        test = metrics["test"].values()
        cells = [f"{entry['baselines'][name][key]:.3f}" for entry in test for key in ("mean_error", "median_error")]
        lines.append("| " + " | ".join([label, *cells, "", "", ""]) + " |")
    training.write_comparison(
        folder,
        "Absolute errors on the test years, degC.",
        "\n".join(lines),
        {NAMES[name]: metrics for name, (metrics, _) in results.items()},
        {NAMES[name]: history for name, (_, history) in results.items()},
        {"training loss, degC": {"train_loss": "-"}, "validation mean error, degC": {"validation_mean_error": "-"}},
        metrics["data"]["source"] == "sample",
    )


def predict(args, device):
    """The next days, as CSV, after the last days of a file."""
    schema = {"options": dict, "climatology": list, "scale": list, "weights": dict}
    saved = training.load_checkpoint(args.checkpoint, "temp", schema)
    options = saved["options"]
    model = training.load_model(lambda saved: build_model(saved["options"]), saved, args.checkpoint).to(device)
    frame, data = datasets.load(datasets.CLIMATE, args.predict)
    with training.quiet():
        series = read_series(frame, data["path"], options["freq"])
    datasets.check_columns(series, options["columns"], args.predict)
    known, ahead, steps_a_day = options["known"], options["ahead"], STEPS_A_DAY[options["freq"]]
    recent = series[options["columns"]].iloc[-known:]
    if len(recent) < known or recent.isna().to_numpy().any():
        raise UserError(f"{args.predict} does not end with {known // steps_a_day} whole days; give it more rows")
    coming = pd.date_range(recent.index[-1], periods=ahead + 1, freq=options["freq"])[1:]
    coefficients = np.array(saved["climatology"])
    anomalies = recent.to_numpy(float) - harmonics(recent.index, steps_a_day) @ coefficients
    inputs = torch.from_numpy(network_inputs(anomalies, np.array(saved["scale"]), recent.index)).to(device)
    guess = forecast(model, inputs, torch.zeros(1, dtype=torch.long), known)[0].numpy() * saved["scale"][0]
    values = guess + (harmonics(coming, steps_a_day) @ coefficients)[:, 0]
    print(f"Date Time,{TARGET}")
    for stamp, value in zip(coming.strftime(STAMP), values, strict=True):
        print(f"{stamp},{value:.2f}")


def main():
    """From arguments to results."""
    args = parse_args()
    device = training.pick_device(args.device)
    if args.predict is not None:
        predict(args, device)
        return
    frame, data = datasets.load(datasets.CLIMATE, args.data)
    weather = prepare(args, frame, data["path"])
    linear = fit_linear(weather)
    names = list(CELLS) if args.model == "all" else [args.model]
    results = {name: train(args, name, weather, data, linear, device) for name in names}
    if args.model == "all":
        compare(args, results)


if __name__ == "__main__":
    training.run(main)
