"""Print the tables of README.zh-CN and REPORT from finished runs, for pasting; no file is changed.

    python report.py RUNS    RUNS: a folder of --out folders, one for each seed

Runs that differ only in their seed and folder are one row: mean ± standard deviation.
"""

import argparse
import json
import statistics
from collections import defaultdict
from pathlib import Path

from training import NAMES

MODELS = {**NAMES, "mean": "四者平均"}
SCORES = {"accuracy": "准确率", "precision_macro": "宏精确率", "recall_macro": "宏召回率",
          "f1_macro": "宏 F1"}  # fmt: skip
ERRORS = [("segments", "mean_error"), ("segments", "median_error"),
          ("daily_origins", "mean_error"), ("daily_origins", "median_error")]  # fmt: skip


def setting_of(content):
    """The data's name and the options that make a setting: all but seed, folders, model."""
    words, kept = iter(content["argv"]), []
    for word in words:
        option, _, value = word.partition("=")
        value = value or (next(words, "") if option != "--resume" else "")
        if option not in ("--seed", "--out", "--model", "--data", "--device", "--resume"):
            kept.append(f"{option} {value}")
    return f"{Path(content['data']['path']).name.split('.')[0]}: {' '.join(sorted(kept))}"


def collect(root):
    """{task: [((setting, model), [metrics.json])]} of all runs under a folder, sorted by setting
    and structure; the model "mean": the last row of each comparison, the mean of the four."""
    groups = {"text": defaultdict(list), "temp": defaultdict(list)}
    for path in sorted(root.rglob("metrics.json")) + sorted(root.rglob("text_all/comparison.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "rows" in content:
            content |= {"task": "text", "model": "mean", "test": content["rows"][-1]}
        groups[content["task"]][setting_of(content), content["model"]].append(content)
    order = list(MODELS).index
    return {
        task: sorted(own.items(), key=lambda item: (item[0][0], order(item[0][1])))
        for task, own in groups.items()
    }


def markdown_table(header, rows):
    """A Markdown table of a list of names and lists of cells."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values, digits=4):
    """Mean ± standard deviation of some numbers as text."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def text_table(groups):
    """The table of the classification runs; the mean of the four where all four were compared."""
    rows = []
    for (setting, model), runs in groups:
        scores = [spread([run["test"][key] for run in runs]) for key in SCORES]
        epochs = "/".join(str(run["best_epoch"]) for run in runs if model != "mean")
        rows.append([setting, MODELS[model], len(runs), *scores, epochs])
    return markdown_table(["设置", "模型", "种子数", *SCORES.values(), "最佳轮"], rows)


def class_tables(groups, options="--epochs 20"):
    """Tables of F1 by class, mean over the seeds, one for each data set."""
    tests = defaultdict(dict)
    for (setting, model), runs in groups:
        if setting.endswith(f": {options}") and model in NAMES:
            tests[setting][NAMES[model]] = [run["test"]["per_class"] for run in runs]
    tables = []
    for own in tests.values():
        rows = []
        for label, entry in next(iter(own.values()))[0].items():
            f1 = [spread([test[label]["f1"] for test in runs], 3) for runs in own.values()]
            rows.append([label, entry["support"], *f1])
        tables.append(markdown_table(["类别", "测试条数", *own], rows))
    return tables


def temp_table(groups):
    """The table of the forecasting runs, with their baselines under each setting."""
    rows, baselines = [], {}
    for (setting, model), runs in groups:
        tests = [run["test"] for run in runs]
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
    text, temp = collect(args.runs).values()
    tables = [text_table(text), *class_tables(text)] if text else []
    tables += [temp_table(temp)] if temp else []
    if not tables:
        parser.error(f"{args.runs} holds no metrics.json of a run")
    print("\n\n".join(tables))


if __name__ == "__main__":
    main()
