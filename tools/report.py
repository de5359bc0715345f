"""Print the tables of README and REPORT from finished runs, for pasting; no file is changed.

    python -m tools.report RUNS    RUNS: a folder of --out folders, one for each seed

Runs with the same options but for seed, folder and device are one line: mean ± standard deviation.
"""

import json
import statistics
from collections import defaultdict
from pathlib import Path

from support import options
from support.files import UserError
from support.run import title_of

IGNORED = ("--seed", "--out", "--model", "--data", "--device")  # no part of the setting
SCORES = {"accuracy": "准确率", "precision_macro": "宏精确率", "recall_macro": "宏召回率",
          "f1_macro": "宏 F1"}  # fmt: skip
PARTS = {"segments": "7 天段", "daily_origins": "每日起报"}
ERRORS = {"mean_error": "均值", "median_error": "中位数"}


def setting_of(content):
    """The data's name and hash and the options that make a setting, as text."""
    settings = []
    words = iter(content["argv"])
    for word in words:
        option, _, value = word.partition("=")
        if option == "--resume":
            continue
        value = value or next(words)
        if option not in IGNORED:
            settings.append(f"{option} {value}")
    data_name = Path(content["data"]["path"]).name.split(".")[0]
    return f"{data_name} {content['data']['sha256'][:4]}: {' '.join(sorted(settings))}"


def read_result(path):
    """The content of a run's JSON file, and its setting. Raises UserError for another file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content, setting_of(content)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of these scripts; move it away") from error


def collect(root):
    """{"text": {(setting, model): [test scores]}, "temp": ...} of all runs under a folder.

    The last row of each comparison, the mean of the structures' probabilities, is a model "mean".
    """
    groups = {"text": defaultdict(list), "temp": defaultdict(list)}
    for path in sorted(root.rglob("metrics.json")):
        content, setting = read_result(path)
        groups[content["task"]][setting, content["model"]].append(content["test"])
    for path in sorted(root.rglob("text_all/comparison.json")):
        content, setting = read_result(path)
        groups["text"][setting, "mean"].append(content["rows"][-1])
    return groups


def spread(values, digits=4):
    """Mean ± standard deviation of some numbers as text."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values):.{digits}f}"


def markdown(rows):
    """A Markdown table of a list of dicts with the same keys."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [list(row.values()) for row in rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def text_table(groups):
    """The lines of the classification runs."""
    rows = []
    for (setting, model), tests in groups.items():
        row = {"设置": setting, "模型": title_of(model), "次数": len(tests)}
        for key, name in SCORES.items():
            row[name] = spread([test[key] for test in tests])
        rows.append(row)
    return rows


def class_tables(groups):
    """The lines of F1 by class, a table for each set of classes."""
    tables = defaultdict(list)
    for (setting, model), tests in groups.items():
        if model == "mean":
            continue
        row = {"设置": setting, "模型": title_of(model)}
        for label in tests[0]["per_class"]:
            row[label] = spread([test["per_class"][label]["f1"] for test in tests], 3)
        tables[tuple(row)].append(row)
    return list(tables.values())


def temp_table(groups):
    """The lines of the forecasting runs, with their baselines at the end."""
    rows = []
    baselines = {}
    for (setting, model), tests in groups.items():
        rows.append(temp_row(setting, title_of(model), tests))
        for name in tests[0]["segments"]["baselines"]:
            entries = {part: tests[0][part]["baselines"][name] for part in PARTS}
            baselines[setting, name] = temp_row(setting, name.replace("_", " "), [entries])
    return rows + list(baselines.values())


def temp_row(setting, model, tests):
    """One line: the errors of both parts; tests: "test" of metrics.json, or a baseline's errors."""
    row = {"设置": setting, "模型": model, "次数": len(tests)}
    for part, part_name in PARTS.items():
        for key, error_name in ERRORS.items():
            row[f"{part_name}：{error_name}"] = spread([test[part][key] for test in tests], 3)
    coverages = [test["daily_origins"].get("coverage_80") for test in tests]
    row["80 % 区间覆盖率"] = "" if None in coverages else spread(coverages, 3)
    return row


def main():
    """Print all tables."""
    parser = options.Parser(__doc__)
    parser.add_argument("runs", type=Path, help="folder of the runs' --out folders")
    args = parser.parse_args()
    groups = collect(args.runs)
    text = groups["text"]
    tables = [text_table(text), *class_tables(text), temp_table(groups["temp"])]
    tables = [rows for rows in tables if rows]
    if not tables:
        raise UserError(f"{args.runs} holds no metrics.json of a run; name the folder of runs")
    for rows in tables:
        rows.sort(key=lambda row: row["设置"])
        print(f"{markdown(rows)}\n")


if __name__ == "__main__":
    options.run_script(main)
