"""The tables and figures of README.md and REPORT.md, drawn anew from the files of finished runs.

    python report.py RUNS [--bench bench.json]

RUNS is a folder that holds the --out folders of the runs. Runs that differ in nothing but the seed are averaged. Each
table stands between `<!-- table: NAME -->` and `<!-- end -->`; the figures are copied into figures/.
"""

import argparse
import json
import re
import shutil
import statistics
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pandas as pd

from training import NAMES

ROOT = Path(__file__).parent
FIGURES = {  # in figures/: where in the runs
    "text_comparison.png": "text_all/comparison.png",
    "text_confusion.png": "text_bilstm/confusion.png",
    "temp_forecasts.png": "temp_lstm/forecasts.png",
    "temp_lead_time.png": "temp_lstm/lead_time.png",
    "temp_curves.png": "temp_lstm/curves.png",
}
LENGTHS = [0, 10, 20, 40, 80, 160, 10**9]  # characters
SKIPPED = ("--seed", "--out", "--data", "--model", "--train-years")


def settings_of(argv):
    """What of a command line tells one experiment from another, as a string: `--pool last`, "" for the defaults."""
    kept, words = [], list(argv)
    while words:
        option = words.pop(0)
        value = [words.pop(0)] if words and not words[0].startswith("--") else []
        if option not in SKIPPED:
            kept.append(" ".join([option, *value]))
    return " ".join(sorted(kept))


def collect(folder):
    """{(task, file, settings, model): [(run's folder, metrics), ...]} of all runs under a folder."""
    groups = defaultdict(list)
    for path in sorted(folder.glob("*/*/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        key = metrics["task"], Path(metrics["data"]["path"]).name, settings_of(metrics["argv"]), metrics["model"]
        groups[key].append((path.parent, metrics))
    return groups


def spread(values, digits=4):
    """Mean and, for several values, standard deviation, as text."""
    text = f"{statistics.fmean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def markdown(header, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(map(str, row)) + " |" for row in rows])


def text_tables(groups):
    """The tables of the classification runs."""
    groups = {key[2:]: runs for key, runs in groups.items() if key[0] == "text"}
    keys = ("accuracy", "precision_macro", "recall_macro", "f1_macro")
    header = [
        "model",
        "setting",
        "seeds",
        "accuracy",
        "macro precision",
        "macro recall",
        "macro F1",
        "parameters",
        "s/epoch",
    ]
    rows = []
    for setting in sorted({setting for setting, _ in groups}):
        ensembles = {run.parent / "text_all" / "comparison.json" for runs in
                     (groups.get((setting, model), []) for model in NAMES) for run, _ in runs}  # fmt: skip
        for model in NAMES:
            runs = groups.get((setting, model), [])
            if runs:
                test = [metrics["test"] for _, metrics in runs]
                cells = [spread([entry[key] for entry in test]) for key in keys]
                seconds = statistics.fmean(metrics["seconds_per_epoch"] for _, metrics in runs)
                rows.append(
                    [
                        NAMES[model],
                        setting or "default",
                        len(runs),
                        *cells,
                        f"{runs[0][1]['parameters']:,}",
                        f"{seconds:.0f}",
                    ]
                )
        means = [
            json.loads(path.read_text(encoding="utf-8"))["rows"][-1] for path in sorted(ensembles) if path.exists()
        ]
        if means:
            cells = [spread([row[key] for row in means]) for key in keys]
            rows.append(
                ["mean of the four", setting or "default", len(means), *cells, f"{means[0]['parameters']:,}", ""]
            )
    yield "text", markdown(header, rows)

    default = {model: runs for (setting, model), runs in groups.items() if not setting}
    order = [model for model in NAMES if model in default]
    labels = next(iter(default.values()))[0][1]["test"]["per_class"]
    table = []
    for label, scores in labels.items():
        cells = [spread([m["test"]["per_class"][label]["f1"] for _, m in default[model]], 3) for model in order]
        table.append([label, scores["support"], *cells])
    yield "text_classes", markdown(["class", "test rows", *(NAMES[model] for model in order)], table)

    histories = {(s, m): [pd.read_csv(run / "history.csv") for run, _ in runs] for (s, m), runs in groups.items()}
    epochs = max(len(history) for runs in histories.values() for history in runs)
    table = []
    for (setting, model), runs in sorted(
        histories.items(), key=lambda item: (item[0][0], list(NAMES).index(item[0][1]))
    ):
        f1 = [history["validation_f1_macro"] for history in runs]
        curve = [f"{statistics.fmean(values[e] for values in f1):.4f}" for e in range(epochs)]
        reached = statistics.fmean(int((values >= 0.95 * values.max()).idxmax()) + 1 for values in f1)
        table.append([NAMES[model], setting or "default", *curve, f"{reached:.1f}"])
    yield "text_epochs", markdown(["model", "setting", *map(str, range(1, epochs + 1)), "epochs to 95 %"], table)

    pairs, by_length = defaultdict(Counter), []
    bins = [f"{low + 1}-{high}" if high < 10**9 else f"over {low}" for low, high in pairwise(LENGTHS)]
    for model in order:
        frames = pd.concat(pd.read_csv(run / "predictions.csv") for run, _ in default[model])
        wrong = frames[frames["label"] != frames["predicted"]]
        pairs[model].update(zip(wrong["label"], wrong["predicted"], strict=True))
        right = (frames["label"] == frames["predicted"]).groupby(
            pd.cut(frames["text"].str.len(), LENGTHS, labels=bins), observed=False
        )
        by_length.append([NAMES[model], *(f"{value:.3f}" for value in right.mean())])
        counts = [f"{value // len(default[model])} rows" for value in right.size()]
    yield "text_lengths", markdown(["characters", *bins], [["", *counts], *by_length])
    best = order[-1]
    top = [(f"{a} → {b}", f"{n / len(default[best]):.0f}") for (a, b), n in pairs[best].most_common(8)]
    yield "text_pairs", markdown([f"truth → {NAMES[best]}", "test rows"], top)


def temp_tables(groups):
    """The tables of the forecasting runs, one for each file and setting."""
    keys = [(part, key) for part in ("segments", "daily_origins") for key in ("mean_error", "median_error")]
    series = defaultdict(dict)
    for (task, file, setting, model), runs in groups.items():
        if task == "temp":
            series[file, setting][model] = runs
    rows = []
    for (file, setting), models in sorted(series.items()):
        name = f"{file.split('_')[0]}, {setting or '--freq h'}"
        for model in [model for model in NAMES if model in models]:
            tests = [metrics["test"] for _, metrics in models[model]]
            rows.append(
                [name, NAMES[model], len(tests), *(spread([t[part][key] for t in tests], 3) for part, key in keys)]
            )
        test = next(iter(models.values()))[0][1]["test"]
        for baseline in test["segments"]["baselines"]:
            cells = [f"{test[part]['baselines'][baseline][key]:.3f}" for part, key in keys]
            rows.append([name, baseline.replace("_", " "), "", *cells])
    header = ["series", "model", "seeds", "segments: mean", "median", "daily origins: mean", "median"]
    yield "temp", markdown(header, rows)


def bench_table(path):
    """The table of bench.py's --json file."""
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in content["rows"]:
        times = [f"{row[kind]['train']:.1f}" for kind in ("ours", "torch", "plain")]
        ratios = [f"{row[f'{name}_ratio']:.2f}" for name in ("train", "inference", "memory")]
        rows.append([", ".join(map(str, row["shape"])), row["cell"], *times, *ratios])
    means = content["geometric_means"]
    rows.append(
        ["geometric mean", "", "", "", "", *(f"{means[f'{k}_ratio']:.2f}" for k in ("train", "inference", "memory"))]
    )
    header = ["T, B, D, h", "cell", "ours, ms", "torch, ms", "plain loop, ms", "ours/torch", "inference", "peak memory"]
    yield "bench", markdown(header, rows) + f"\n\n{content['machine']}"


def main():
    """Fill the tables and copy the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the runs' --out folders")
    parser.add_argument("--bench", type=Path, help="what bench.py --json wrote")
    args = parser.parse_args()
    groups = collect(args.runs)
    tables = dict(text_tables(groups)) | dict(temp_tables(groups))
    if args.bench:
        tables |= dict(bench_table(args.bench))
    for name in ("README.md", "REPORT.md"):
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        for table, content in tables.items():
            text = re.sub(
                rf"(<!-- table: {table} -->\n).*?(<!-- end -->)",
                lambda match, content=content: f"{match[1]}{content}\n{match[2]}", text, flags=re.DOTALL,
            )  # fmt: skip
        path.write_text(text, encoding="utf-8")
    (ROOT / "figures").mkdir(exist_ok=True)
    for name, source in FIGURES.items():
        found = sorted(args.runs.glob(f"*/{source}"))
        if found:
            shutil.copyfile(found[0], ROOT / "figures" / name)
            print(f"figures/{name} from {found[0]}")


if __name__ == "__main__":
    main()
