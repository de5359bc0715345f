"""Print the tables of README and REPORT from finished runs, for pasting; no file is changed.

    python report.py RUNS    RUNS: a folder of --out folders, one for each seed

Runs that differ only in their seed and folder are one row: mean ± standard deviation.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from training import NAMES

SCORES = {"accuracy": "准确率", "precision_macro": "宏精确率", "recall_macro": "宏召回率",
          "f1_macro": "宏 F1"}  # fmt: skip
ERRORS = [("segments", "mean_error"), ("segments", "median_error"),
          ("daily_origins", "mean_error"), ("daily_origins", "median_error")]  # fmt: skip


def setting_of(content):
    """The data's name and the options that make a setting: all but seed, folders, model."""
    words, kept = iter(content["argv"]), [Path(content["data"]["path"]).name.split(".")[0]]
    for word in words:
        option, _, value = word.partition("=")
        value = value or (next(words, "") if option != "--resume" else "")
        if option not in ("--seed", "--out", "--model", "--data", "--device", "--resume"):
            kept.append(f"{option} {value}")
    return " ".join(kept)


def collect(root):
    """{task: {(setting, model): [(folder, metrics)]}} of all runs under a folder."""
    groups = {"text": defaultdict(list), "temp": defaultdict(list)}
    for path in sorted(root.rglob("metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        key = setting_of(metrics), metrics["model"]
        groups[metrics["task"]][key].append((path.parent, metrics))
    return groups


def markdown_table(header, rows):
    """A Markdown table of a list of names and lists of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values, digits=4):
    """Mean ± standard deviation of some numbers as text."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def ordered(groups):
    """The groups sorted by setting, and in it in the order of the structures."""
    return sorted(groups.items(), key=lambda item: (item[0][0], list(NAMES).index(item[0][1])))


def text_table(groups):
    """The table of the classification runs; the mean of the four where all four were compared."""
    rows, means = [], defaultdict(dict)
    for (setting, model), runs in ordered(groups):
        tests = [metrics["test"] for _, metrics in runs]
        scores = [spread([test[key] for test in tests]) for key in SCORES]
        epochs = "/".join(str(metrics["best_epoch"]) for _, metrics in runs)
        rows.append([setting, NAMES[model], len(runs), *scores, epochs])
        for folder, _ in runs:
            path = folder.parent / "text_all" / "comparison.json"
            if path.exists():
                content = json.loads(path.read_text(encoding="utf-8"))
                means[setting_of(content)][path] = content["rows"][-1]
    for setting, found in means.items():
        scores = [spread([row[key] for row in found.values()]) for key in SCORES]
        rows.append([setting, "四者平均", len(found), *scores, ""])
    header = ["设置", "模型", "种子数", *SCORES.values(), "最佳轮"]
    return markdown_table(header, sorted(rows, key=lambda row: row[0]))


def class_table(groups, setting="--epochs 20"):
    """The table of F1 by class: rows of metrics.json's per_class, mean over the seeds."""
    tests = {
        model: [metrics["test"]["per_class"] for _, metrics in runs]
        for (own, model), runs in ordered(groups)
        if own.split(" ", 1)[-1] == setting  # behind the data's name
    }  # fmt: skip
    rows = []
    for label, entry in next(iter(tests.values()), [{}])[0].items():
        f1 = [spread([test[label]["f1"] for test in own], 3) for own in tests.values()]
        rows.append([label, entry["support"], *f1])
    return markdown_table(["类别", "测试条数", *(NAMES[model] for model in tests)], rows)


def temp_table(groups):
    """The table of the forecasting runs, with their baselines under each setting."""
    rows, baselines = [], {}
    for (setting, model), runs in ordered(groups):
        tests = [metrics["test"] for _, metrics in runs]
        errors = [spread([test[part][key] for test in tests], 3) for part, key in ERRORS]
        coverage = spread([test["daily_origins"]["coverage_80"] for test in tests], 3)
        rows.append([setting, NAMES[model], len(runs), *errors, coverage])
        baselines[setting] = tests[0]
    for setting, test in baselines.items():
        for name in test["segments"]["baselines"]:
            errors = [f"{test[part]['baselines'][name][key]:.3f}" for part, key in ERRORS]
            rows.append([setting, name.replace("_", " "), "", *errors, ""])
    header = ["设置", "模型", "种子数", "7 天段：均值", "中位数", "每日起报：均值", "中位数"]
    header.append("80 % 区间覆盖率")
    return markdown_table(header, sorted(rows, key=lambda row: row[0]))


def main():
    """Print all tables."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("runs", type=Path, help="folder of the runs' --out folders")
    args = parser.parse_args()
    groups = collect(args.runs)
    text = groups["text"]
    tables = [text_table(text), class_table(text)] if text else []
    tables += [temp_table(groups["temp"])] if groups["temp"] else []
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
