"""What a user can cause: a mistake ends with one line and status 2, and leaves nothing behind."""

from pathlib import Path

import matplotlib.figure
import pandas as pd
import pytest
import torch
from conftest import exit_status
from datasets import UserError
from samples import reviews, temperatures
from training import hold_folder

import temp_forecast
import text_classify

SCRIPTS = {"text": text_classify, "temp": temp_forecast}
QUICK = ["--model", "rnn", "--epochs", 1, "--hidden", 4, "--device", "cpu", "--data"]
RUN = {
    "text": [*QUICK, "good.csv", "--embedding", 4],
    "temp": [*QUICK, "series.csv", "--train-years", 1],
}
both_scripts = pytest.mark.parametrize("kind", SCRIPTS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working folder, of good and bad files, among them a finished run of each script."""
    folder = tmp_path_factory.mktemp("material")
    good, series = reviews(300), temperatures(years=2)
    first, far = "01.01.2009 00:00:00", "31.12.9999 00:00:00"
    frames = {
        "good.csv": good,
        "one_class.csv": good.assign(cat="书籍"),
        "few.csv": good.head(24),  # four test rows
        "lost_class.csv": good.assign(cat=["b" if i % 5 == 0 else "a" for i in range(1, 301)]),
        "series.csv": series,
        "dates.csv": pd.DataFrame({"Date Time": [first, "yesterday"], "T (degC)": 0}),
        "far.csv": pd.DataFrame({"Date Time": [first, first, far], "T (degC)": 0}),
        "missing.csv": series.head(9).assign(**{"T (degC)": -9999}),
        "halves.csv": series.assign(**{"T (degC)": ["1.5", "1,5", "1,5"] * (len(series) // 3)}),
        "gap.csv": series.head(300).drop(index=range(250, 260)),
    }
    for name, frame in frames.items():
        frame.to_csv(folder / name, index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, script in SCRIPTS.items():
            assert exit_status(script, *RUN[kind], "--out", ".") == 0
        yield folder


@pytest.fixture
def refused(folder, capsys):
    """Check that a script refuses its arguments: status 2, one line with the words, no new file."""

    def check(kind, words, *arguments):
        files = sorted(folder.rglob("*"))
        assert exit_status(SCRIPTS[kind], *arguments) == 2
        output = capsys.readouterr()
        *before, last = output.err.splitlines()
        assert last.startswith("error: ") and words in last, output.err
        if "--predict" in arguments:
            assert output.out == "" and len(before) <= 1  # a forecast reports what its file holds
        else:
            assert not before
        assert sorted(folder.rglob("*")) == files, "a file is new, or code in a checkpoint was run"

    return check


RANGES = {
    "both": ["--epochs 0", "--lr 0", "--lr nan", "--batch-size 0", "--hidden 0",
             "--hidden 1000000000", "--dropout 1", "--clip 0", "--weight-decay -1", "--average 1",
             "--seed -1", "--patience -1", "--descent -1", "--model cnn", "--epoch 3", "good.csv"],
    "text": ["--embedding 0", "--min-freq 0", "--max-tokens 0", "--label-smoothing 1",
             "--word-dropout 1", "--predict -好"],
    "temp": ["--history-days 0", "--horizon-days 0", "--train-years 0"],
}  # fmt: skip


@both_scripts
def test_options_out_of_range_are_refused(kind, refused):
    for line in RANGES["both"] + RANGES[kind]:
        refused(kind, "see --help", *line.split())


MISTAKES = [
    ("both", "--epochs 1.5", "invalid int value: '1.5'"),
    ("both", "--device tpu", "this machine has cpu"),
    ("both", "--checkpoint best.pt", "belong together"),
    ("both", "--predict x", "belong together"),
    ("both", "--data absent.csv", "does not exist"),
    ("both", "--data good.csv --out good.csv", "cannot write"),
    ("both", "--checkpoint absent.pt --predict x", "is no file"),
    ("text", "--checkpoint text_rnn/best.pt --predict x --lr 0.5", "--lr has no effect"),
    ("text", "--checkpoint temp_rnn/best.pt --predict x", "of another script"),
    ("text", "--data series.csv", "no column 'review'; its columns are: Date Time, p"),
    ("text", "--data one_class.csv", "one class only"),
    ("text", "--data few.csv", "4 usable test rows, at least 5"),
    ("text", "--data lost_class.csv", "has no training row"),
    ("temp", "--checkpoint temp_rnn/best.pt --predict gap.csv", "does not end with 5 whole"),
    ("temp", "--checkpoint temp_rnn/best.pt --predict good.csv", "no column"),
    ("temp", "--data dates.csv", "row 2 has the date 'yesterday'"),
    ("temp", "--data far.csv", "row 3 has the date"),
    ("temp", "--data halves.csv", "half of the steps"),
    ("temp", "--data missing.csv", "half of the steps"),
    ("temp", "--data series.csv --train-years 2", "too short"),
]


@pytest.mark.parametrize(("kind", "line", "words"), MISTAKES)
def test_a_mistake_ends_with_one_line_and_status_2(kind, line, words, refused):
    out = [] if "--predict" in line or "--out" in line else ["--out", "."]
    for script in SCRIPTS if kind == "both" else [kind]:
        refused(script, words, *line.split(), *out)


@both_scripts
def test_a_checkpoint_with_a_wrong_part_is_refused(kind, refused):
    best = torch.load(f"{kind}_rnn/best.pt")
    changes = [{"format": 99}, {"task": "chess"}, {"options": 5}, {"weights": {"a": 1}}]
    changes.append({"epoch": Path("x")})  # no tensor, no plain value: it could run code
    damaged = [[1, 2, 3], *(best | change for change in changes)]
    for needed in best.keys() - {"epoch", "sha256"}:
        damaged.append({key: best[key] for key in best if key != needed})
    for content in damaged:
        torch.save(content, "bad.pt")
        refused(kind, "train again", "--checkpoint", "bad.pt", "--predict", "series.csv")


@both_scripts
def test_a_run_holds_its_folder_while_pictures_fail(kind, folder, monkeypatch, capsys, tmp_path):
    drawn, run = [], tmp_path / f"{kind}_rnn"

    def savefig(*arguments, **options):
        with pytest.raises(UserError, match="another run"):
            hold_folder(tmp_path)
        drawn.append({path.name for path in run.glob("[!.]*")})
        raise ValueError("no\nfont")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    options = [*RUN[kind], "--out", tmp_path]
    assert exit_status(SCRIPTS[kind], *options, pictures=[run.name]) == 0
    results = {"metrics.json", "history.csv", "predictions.csv", "best.pt", "last.pt"}
    assert len(drawn) >= 2 and all(files == results for files in drawn)
    assert capsys.readouterr().err.count("was not drawn: no font") == len(drawn)
    hold_folder(tmp_path).close()
