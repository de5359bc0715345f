"""What a user can cause: a mistake ends with one line and status 2, and leaves nothing behind."""

import os
import re

import matplotlib.figure
import pandas as pd
import pytest
import torch
from conftest import read_json

import datasets
import temp_forecast
import text_classify
from datasets import UserError
from samples import reviews, temperatures
from training import hold_folder

SCRIPTS = {"text": text_classify, "temp": temp_forecast}
BEST = {"text": "text_rnn/best.pt", "temp": "temp_rnn/best.pt"}
QUICK = ["--model", "rnn", "--epochs", 1, "--hidden", 4, "--device", "cpu"]
DATA = {
    "text": ["--data", "good.csv", "--embedding", 4],
    "temp": ["--data", "series.csv", "--train-years", 1],
}


class Evil:
    """Unpickling it would make a folder."""

    def __reduce__(self):
        return os.mkdir, ("pwned",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, call):
    """A folder of good and bad files, among them a finished run of each script."""
    folder = tmp_path_factory.mktemp("material")
    good, series = reviews(300), temperatures(years=2)
    first = "01.01.2009 00:00:00"
    far = series[:1].replace(first, "31.12.9999 00:00:00")
    frames = {
        "good.csv": good,
        "renamed.csv": good.rename(columns={"review": "text"}),
        "one_class.csv": good.assign(cat="书籍"),
        "no_texts.csv": good.assign(review="  "),
        "few.csv": good.head(20),
        "header.csv": good.head(0),
        "lost_class.csv": good.assign(cat=["b" if i % 5 == 0 else "a" for i in range(1, 301)]),
        "series.csv": series,
        "dates.csv": pd.DataFrame({"Date Time": [first, "yesterday"], "T (degC)": [1, 2]}),
        "far.csv": pd.concat([series[:1], far, series[1:]]),
        "words.csv": series.head(9).assign(**{"T (degC)": "warm"}),
        "missing.csv": series.head(9).assign(**{"T (degC)": -9999}),
        "halves.csv": series.assign(**{"T (degC)": ["1.5", "1,5", "1,5"] * (len(series) // 3)}),
        "short.csv": series.head(1000),
        "days.csv": series.head(110),
        "gap.csv": series.head(300).drop(index=range(250, 260)),
    }
    for name, frame in frames.items():
        frame.to_csv(folder / name, index=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, script in SCRIPTS.items():
            assert call(script, *QUICK, *DATA[kind], "--out", ".") == 0
    whole = (folder / BEST["temp"]).read_bytes()
    (folder / "truncated.pt").write_bytes(whole[: len(whole) // 2])
    torch.save([1, 2, 3], folder / "list.pt")
    torch.save({"task": "text", "format": 3, "evil": Evil()}, folder / "evil.pt")
    return folder


@pytest.fixture
def refused(folder, call, monkeypatch, capsys, tmp_path):
    """Check that a script refuses its arguments: status 2, one line with the words, no new file."""
    monkeypatch.chdir(folder)

    def check(kind, words, *arguments):
        files = sorted(folder.rglob("*"))
        assert call(SCRIPTS[kind], *arguments) == 2
        output = capsys.readouterr()
        *before, last = output.err.splitlines()
        predicts = "--predict" in arguments
        assert last.startswith("error: ") and words in last, output.err
        assert len(before) <= predicts  # a forecast reports what its file holds
        assert output.out == "" or not predicts
        assert sorted(folder.rglob("*")) == files, "a file is new, or code in a checkpoint was run"
        assert not list(tmp_path.rglob("*.p*")), "neither pictures, checkpoints nor parts of them"

    return check


RANGES = {
    "both": ["--epochs 0", "--lr 0", "--lr nan", "--batch-size 0", "--hidden 0",
             "--hidden 1000000000", "--dropout 1", "--clip 0", "--weight-decay -1", "--average 1",
             "--seed -1", "--patience -1", "--descent -1", "--model cnn", "--epoch 3", "good.csv"],
    "text": ["--embedding 0", "--min-freq 0", "--max-tokens 0", "--label-smoothing 1",
             "--word-dropout 1"],
    "temp": ["--history-days 0", "--horizon-days 0", "--train-years 0"],
}  # fmt: skip


@pytest.mark.parametrize("kind", SCRIPTS)
def test_options_out_of_range_are_refused(kind, refused):
    for line in RANGES["both"] + RANGES[kind]:
        refused(kind, "see --help", *line.split())


BOTH = [
    ("--epochs 1.5", "is not a whole number from 1 to"),
    ("--device tpu", "none of auto, cpu"),
    ("--device mps", "none of auto, cpu"),
    ("--checkpoint best.pt", "belong together"),
    ("--predict days.csv", "belong together"),
    ("--data absent.csv", "does not exist"),
    ("--data good.csv --out good.csv", "cannot write"),
    ("--checkpoint absent.pt --predict days.csv", "is no file"),
    ("--checkpoint truncated.pt --predict days.csv", "train again"),
    ("--checkpoint list.pt --predict days.csv", "train again"),
    ("--checkpoint evil.pt --predict days.csv", "train again"),
]
TEXT = [
    ("--predict -好", "expected one argument; see --help"),
    ("--checkpoint text_rnn/best.pt --predict x --lr 0.5", "--lr has no effect"),
    ("--checkpoint text_rnn/best.pt --predict x --resume", "--resume has no effect"),
    ("--checkpoint temp_rnn/best.pt --predict x", "of another script"),
    ("--data renamed.csv", "no column 'review'; its columns are: cat, label, text"),
    ("--data one_class.csv", "one class only"),
    ("--data no_texts.csv", "0 usable train rows"),
    ("--data few.csv", "at least 5"),
    ("--data header.csv", "at least 5"),
    ("--data lost_class.csv", "has no training row"),
]
TEMP = [
    ("--checkpoint text_rnn/best.pt --predict days.csv", "of another script"),
    ("--checkpoint temp_rnn/best.pt --predict days.csv --freq D", "--freq has no effect"),
    ("--checkpoint temp_rnn/best.pt --predict days.csv", "does not end with 5 whole"),
    ("--checkpoint temp_rnn/best.pt --predict gap.csv", "does not end with 5 whole"),
    ("--checkpoint temp_rnn/best.pt --predict good.csv", "no column"),
    ("--data good.csv", "no column 'Date Time'"),
    ("--data dates.csv", "row 2 has the date 'yesterday'"),
    ("--data far.csv", "row 2 is centuries away"),
    ("--data words.csv", "no temperatures"),
    ("--data missing.csv", "no temperatures"),
    ("--data halves.csv", "half of the steps"),
    ("--data short.csv", "too short"),
]
CASES = [("text", *case) for case in BOTH + TEXT] + [("temp", *case) for case in BOTH + TEMP]


@pytest.mark.parametrize(("kind", "line", "words"), CASES)
def test_a_mistake_ends_with_one_line_and_status_2(kind, line, words, refused, tmp_path):
    out = [] if "--predict" in line or "--out" in line else ["--out", tmp_path]
    refused(kind, words, *line.split(), *out)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_that_diverges_says_what_to_lower(kind, refused, tmp_path):
    wild = ["--weight-decay", 1000, "--lr", 1000000, "--out", tmp_path]
    refused(kind, "not finite", *QUICK, *DATA[kind], *wild)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_checkpoint_with_a_wrong_part_is_refused(kind, refused):
    best = torch.load(BEST[kind])
    changes = [{"format": 99}, {"task": "chess"}, {"options": 5}, {"weights": {"a": 1}}]
    damaged = [best | change for change in changes]
    for needed in best.keys() - {"epoch", "sha256"}:
        damaged.append({key: value for key, value in best.items() if key != needed})
    for content in damaged:
        torch.save(content, "bad.pt")
        refused(kind, "train again", "--checkpoint", "bad.pt", "--predict", "series.csv")


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_holds_its_folder_to_the_end_and_pictures_cost_no_result(
    kind, folder, call, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(folder)
    results = {"metrics.json", "history.csv", "predictions.csv", "best.pt", "last.pt"}
    drawn = []

    def savefig(*arguments, **options):
        with pytest.raises(UserError, match="another run"):
            hold_folder(tmp_path)
        files = {path.name for path in (tmp_path / f"{kind}_rnn").glob("[!.]*")}
        drawn.append(files == results)
        raise ValueError("no\nfont")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    assert call(SCRIPTS[kind], *QUICK, *DATA[kind], "--out", tmp_path) == 0
    assert len(drawn) >= 2 and all(drawn)
    assert len(re.findall("was not drawn: no font", capsys.readouterr().err)) == len(drawn)
    hold_folder(tmp_path).close()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_folder_in_use_is_refused_and_untouched(kind, folder, refused):
    lock = hold_folder(folder)
    refused(kind, "another run writes", *QUICK, *DATA[kind], "--out", folder)
    lock.close()


def test_a_cache_that_is_damaged_or_cannot_be_written_is_made_again(
    folder, call, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    monkeypatch.chdir(folder)

    def cuts():
        assert call(text_classify, *QUICK, *DATA["text"], "--out", tmp_path / "out") == 0
        return "cutting words" in capsys.readouterr().out

    (tmp_path / "data").write_text("a file where a folder should be")
    assert cuts() and cuts()
    (tmp_path / "data").unlink()
    assert cuts() and not cuts()
    (cache,) = (tmp_path / "data").iterdir()
    whole = cache.read_bytes()
    for damage in (b"\xff\xfe", b"short"):
        cache.write_bytes(damage)
        assert cuts() and cache.read_bytes() == whole


@pytest.mark.skipif(os.name == "nt", reason="paths are UTF-16 there")
def test_a_path_that_is_no_utf8_ends_no_run(folder, call, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/\xd6\xd0.csv")
    with open(path, "wb") as stream:
        stream.write((folder / "good.csv").read_bytes())
    assert call(text_classify, *QUICK, "--data", path, "--out", tmp_path / "out") == 0
    assert read_json(tmp_path / "out" / "text_rnn" / "metrics.json")["data"]["path"] == path
