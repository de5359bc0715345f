"""What a user can cause: a mistake ends with one line and status 2, and leaves nothing behind."""

import json
import os
import pickle
import re
import zipfile

import matplotlib.figure
import pandas as pd
import pytest
import torch

import datasets
import temp_forecast
import text_classify
from datasets import UserError
from samples import reviews, temperatures
from training import hold_folder

SCRIPTS = {"text": text_classify, "temp": temp_forecast}
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
def material(tmp_path_factory, call):
    """A folder of good and bad files, among them a finished run of each script."""
    folder = tmp_path_factory.mktemp("material")
    good, series = reviews(300), temperatures(years=2)
    dates, far = ["01.01.2009 00:00:00", "01.01.2009 01:00:00"], "31.12.9999 00:00:00"

    def two(first, second):
        return pd.DataFrame({"Date Time": dates, "T (degC)": [first, second]})

    frames = {
        "good.csv": good,
        "series.csv": series,
        "one_class.csv": good.assign(cat="书籍"),
        "no_texts.csv": good.assign(review="  "),
        "few.csv": good.head(20),
        "lost_class.csv": good.assign(cat=["b" if i % 5 == 0 else "a" for i in range(1, 301)]),
        "header.csv": good.head(0),
        "renamed.csv": good.rename(columns={"review": "text"}),
        "dates.csv": two(1, 2).assign(**{"Date Time": [dates[0], "yesterday"]}),
        "iso.csv": two(1, 2).assign(**{"Date Time": "2009-01-01 00:00"}),
        "far.csv": pd.concat([series[:1], series[:1].replace(dates[0], far), series[1:]]),
        "words.csv": two("warm", "--"),
        "infinite.csv": two("inf", "-inf"),
        "missing.csv": two(-9999, -9999),
        "halves.csv": series.assign(**{"T (degC)": ["1.5", "1,5", "1,5"] * (len(series) // 3)}),
        "short.csv": series.head(1000),
        "days.csv": series.head(110),
        "gap.csv": series.head(300).drop(index=range(250, 260)),
    }
    for name, frame in frames.items():
        frame.to_csv(folder / name, index=False)
    (folder / "extra.csv").write_text("cat,label,review\n蒙牛,0,a\n蒙牛,0,a,b\n", encoding="utf-8")
    (folder / "empty.csv").write_bytes(b"")
    (folder / "noise.csv").write_bytes(bytes(range(256)) * 9)
    (folder / "not.zip").write_bytes(b"cat,label,review\n")
    for name, members in {"none.zip": ["a.txt"], "several.zip": ["a.csv", "b.csv"]}.items():
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member in members:
                archive.writestr(member, "x")
    with zipfile.ZipFile(folder / "whole.zip", "w") as archive:
        archive.write(folder / "good.csv", "good.csv")
    (folder / "half.zip").write_bytes((folder / "whole.zip").read_bytes()[:5000])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for kind, script in SCRIPTS.items():
            assert call(script, *QUICK, *DATA[kind], "--out", ".") == 0
            content = torch.load(f"{kind}_rnn/best.pt")
            spoil(content, kind)
    (folder / "truncated.pt").write_bytes((folder / "temp_rnn" / "best.pt").read_bytes()[:2000])
    torch.save([1, 2, 3], folder / "list.pt")
    torch.save({"task": "text", "format": 3, "evil": Evil()}, folder / "evil.pt")
    (folder / "evil_pickle.pt").write_bytes(pickle.dumps(Evil()))
    return folder


def spoil(content, kind):
    """Save copies of a best.pt with a part changed or left out, text_<change>.pt for example."""
    options, weights = content["options"], dict(content["weights"])
    first = next(name for name, value in weights.items() if value.ndim == 2)
    changes = {
        "version": {"format": 99}, "foreign": {"task": "chess"}, "weights": {"weights": {"a": 1}},
        "nan": {"weights": weights | {first: weights[first] * torch.nan}},
        "model": {"options": options | {"model": "cnn"}},
        "huge": {"options": options | {"hidden": 10**12}},
        "wordy": {"options": options | {"hidden": "many"}},
        "options": {"options": 5},
    }  # fmt: skip
    if kind == "text":
        changes |= {
            "labels": {"labels": None}, "shapes": {"labels": ["a", "b"]},
            "vocabularies": {"vocabularies": {"char": 3}},
            "no_tokens": {"options": options | {"max_tokens": 0}},
            "max_tokens": {"options": options | {"max_tokens": None}},
        }  # fmt: skip
    else:
        changes |= {
            "climatology": {"climatology": [[1.0]]}, "scale": {"scale": "wide"},
            "infinite": {"scale": [float("inf")]}, "band": {"band": [1.0]},
            "freq": {"options": options | {"freq": "W"}},
            "known": {"options": options | {"known": -1}},
        }  # fmt: skip
    for name, change in changes.items():
        torch.save(content | change, f"{kind}_{name}.pt")
    for name in content:
        if name != "epoch":
            torch.save({k: v for k, v in content.items() if k != name}, f"{kind}_without_{name}.pt")


BOTH = [
    *[(option, "see --help") for option in (
        "--epochs 0", "--epochs -1", "--epochs 1.5", "--epochs many", "--lr nan", "--lr 0",
        "--lr -1", "--lr inf", "--batch-size 0", "--hidden 0", "--dropout 1", "--dropout -0.1",
        "--clip 0", "--weight-decay -1", "--average 1", "--seed -1", "--model cnn", "--loops slow",
        "--patience -1", "--descent -1", "--colour red", "--epoch 3", "good.csv",
    )],
    *[(f"--{name} 1000000000000000000", "see --help") for name in (
        "epochs", "batch-size", "hidden", "lr", "weight-decay", "clip", "seed", "patience",
        "descent",
    )],
    ("--device tpu", "none of auto, cpu"), ("--device mps", "none of auto, cpu"),
    ("--device cuda:99", "this machine has"), ("--checkpoint best.pt", "belong together"),
    ("--data absent.csv", "does not exist"), ("--data .", "no regular file"),
    ("--data empty.csv", "is empty"), ("--data noise.csv", "UTF-8"), ("--data not.zip", "no zip"),
    ("--data none.zip", "holds 0 CSV"), ("--data several.zip", "holds 2 CSV"),
    ("--data half.zip", "cannot be unpacked"), ("--data extra.csv", "row 2"),
    *[(f"--checkpoint {name} --predict days.csv", "train again") for name in (
        "empty.csv", "good.csv", "truncated.pt", "list.pt", "evil.pt", "evil_pickle.pt",
    )],
    *[(f"--checkpoint {name} --predict days.csv", "is no file") for name in ("absent.pt", ".")],
]  # fmt: skip
TEXT = [
    *[(option, "see --help") for option in (
        "--pool sum", "--tokens syllable", "--min-freq 0", "--max-tokens 0", "--max-tokens 10001",
        "--label-smoothing 1", "--word-dropout -1", "--embedding 8193", "--min-freq 9999999999",
        "--preset plain",
    )],
    ("--predict text", "belong together"), ("--predict -好", "write --predict=TEXT"),
    ("--checkpoint text_rnn/best.pt --predict x --lr 0.5", "--lr has no effect"),
    ("--checkpoint text_rnn/best.pt --predict x --resume", "--resume has no effect"),
    ("--checkpoint temp_rnn/best.pt --predict x", "no best.pt of this script"),
    ("--checkpoint text_foreign.pt --predict x", "no best.pt of this script"),
    ("--checkpoint text_version.pt --predict x", "another version"),
    *[(f"--checkpoint text_{name}.pt --predict x", "train again") for name in (
        "weights", "nan", "model", "huge", "wordy", "options", "labels", "shapes", "vocabularies",
        "no_tokens", "max_tokens", "without_weights", "without_task", "without_labels",
        "without_options", "without_vocabularies", "without_format",
    )],
    ("--data renamed.csv", "no column 'review'; its columns are: cat, label, text"),
    ("--data good.csv --label-column colour", "no column 'colour'"),
    ("--data series.csv", "no column"), ("--data one_class.csv", "one class only"),
    ("--data no_texts.csv", "0 usable train rows"), ("--data few.csv", "at least 5"),
    ("--data header.csv", "at least 5"), ("--data lost_class.csv", "has no training row"),
    ("--data good.csv --out good.csv", "cannot write"),
    *[(f"--data good.csv --weight-decay 1000 --lr 1000000 --batch-size {size}", "not finite")
      for size in (20, 60)],
]  # fmt: skip
TEMP = [
    *[(option, "see --help") for option in (
        "--freq W", "--history-days 0", "--horizon-days 0", "--train-years 0", "--features p",
        "--history-days 61", "--horizon-days 61", "--train-years 201",
    )],
    ("--predict days.csv", "belong together"),
    ("--checkpoint text_rnn/best.pt --predict days.csv", "no best.pt of this script"),
    ("--checkpoint temp_rnn/best.pt --predict days.csv --freq D", "--freq has no effect"),
    *[(f"--checkpoint temp_{name}.pt --predict series.csv", "train again") for name in (
        "weights", "nan", "model", "huge", "wordy", "options", "climatology", "scale", "infinite",
        "band", "freq", "known", "without_weights", "without_options", "without_climatology",
        "without_scale", "without_band",
    )],
    *[(f"--checkpoint temp_rnn/best.pt --predict {name}", message) for name, message in (
        ("days.csv", "does not end with 5 whole"), ("gap.csv", "does not end with 5 whole"),
        ("good.csv", "no column"), ("absent.csv", "does not exist"), ("far.csv", "row 2"),
    )],
    ("--data good.csv", "no column 'Date Time'"), ("--data dates.csv", "row 2 has the date 'yest"),
    ("--data iso.csv", "row 1 has the date"), ("--data far.csv", "row 2 is centuries away"),
    ("--data words.csv", "no temperatures"), ("--data infinite.csv", "no temperatures"),
    ("--data missing.csv", "no temperatures"), ("--data halves.csv", "more than half of the steps"),
    ("--data short.csv", "too short"), ("--data series.csv --train-years 50", "too short"),
    ("--data series.csv --train-years 1 --out series.csv", "cannot write"),
    *[(f"--data series.csv --train-years 1 --weight-decay 1000 --lr 1000000 --batch-size {size}",
       "not finite") for size in (400, 500)],
]  # fmt: skip
BAD = [("text", *case) for case in BOTH + TEXT] + [("temp", *case) for case in BOTH + TEMP]


@pytest.mark.parametrize(("kind", "line", "message"), BAD)
def test_a_mistake_ends_with_one_line_and_status_2(
    kind, line, message, material, call, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(material)
    quick = ["--device", "cpu"] if "--device" not in line else []
    if "--predict" not in line and "--out" not in line:
        quick += ["--out", tmp_path / "out"]
    if message in ("not finite", "cannot write"):
        quick += QUICK[:-2]
    files = sorted(material.rglob("*"))
    assert call(SCRIPTS[kind], *quick, *line.split()) == 2
    output = capsys.readouterr()
    *before, last = output.err.splitlines()
    assert message in last and last.startswith("error: "), output.err
    assert len(before) <= ("--predict" in line)  # a forecast reports what its file holds
    assert output.out == "" or "--predict" not in line
    assert sorted(material.rglob("*")) == files, "a file was left, or code in a checkpoint was run"
    assert not list(tmp_path.rglob("*.p*")), "neither pictures, checkpoints nor parts of them"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs or devices here")
@pytest.mark.parametrize("kind", SCRIPTS)
def test_fifos_and_devices_are_refused(kind, tmp_path, call, capsys):
    os.mkfifo(tmp_path / "x")
    for path in (tmp_path / "x", "/dev/zero"):
        assert call(SCRIPTS[kind], "--data", path, "--out", tmp_path) == 2
        assert "no regular file" in capsys.readouterr().err
        assert call(SCRIPTS[kind], "--checkpoint", path, "--predict", path) == 2
        assert "is no file" in capsys.readouterr().err


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_holds_its_folder_to_the_end_and_pictures_cost_no_result(
    kind, material, call, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(material)
    held = []

    def savefig(*arguments, **options):
        with pytest.raises(UserError, match="another run"):
            hold_folder(tmp_path)
        held.append({path.name for path in (tmp_path / f"{kind}_rnn").glob("[!.]*")})
        raise ValueError("no\nfont")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", savefig)
    assert call(SCRIPTS[kind], *QUICK, *DATA[kind], "--out", tmp_path) == 0
    results = {"metrics.json", "history.csv", "predictions.csv", "best.pt", "last.pt"}
    assert len(held) >= 2 and all(files == results for files in held)
    assert len(re.findall("was not drawn: no font", capsys.readouterr().err)) == len(held)
    hold_folder(tmp_path).close()


@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_folder_in_use_is_refused_and_untouched(kind, material, call, monkeypatch, capsys):
    monkeypatch.chdir(material)
    files = sorted(material.rglob("*"))
    lock = hold_folder(material)
    assert call(SCRIPTS[kind], *QUICK, *DATA[kind], "--out", material) == 2
    lock.close()
    assert "another run writes" in capsys.readouterr().err and sorted(material.rglob("*")) == files


def test_a_cache_that_cannot_be_written_ends_no_run(material, call, monkeypatch, tmp_path):
    (tmp_path / "data").write_text("a file where a folder should be")
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    monkeypatch.chdir(material)
    assert call(text_classify, *QUICK, *DATA["text"], "--out", tmp_path / "out") == 0


def test_a_damaged_cache_is_made_again(material, call, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    monkeypatch.chdir(material)
    arguments, wholes = [*QUICK, *DATA["text"], "--out", tmp_path / "out"], []
    for damage in (None, b"\xff\xfe", b"short", None):
        for path in (tmp_path / "data").glob("*"):
            path.write_bytes(damage or path.read_bytes())
        assert call(text_classify, *arguments) == 0
        assert ("cutting words" in capsys.readouterr().out) == (damage is not None or not wholes)
        wholes += [path.read_bytes() for path in (tmp_path / "data").iterdir()]
    assert wholes == [wholes[0]] * 4


@pytest.mark.skipif(os.name == "nt", reason="paths are UTF-16 there")
def test_a_path_that_is_no_utf8_ends_no_run(material, call, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xd6\xd0.csv"
    with open(path, "wb") as stream:
        stream.write((material / "good.csv").read_bytes())
    arguments = ["--embedding", 4, "--data", os.fsdecode(path), "--out", tmp_path / "out"]
    assert call(text_classify, *QUICK, *arguments) == 0
    text = (tmp_path / "out" / "text_rnn" / "metrics.json").read_text(encoding="utf-8")
    assert json.loads(text)["data"]["path"] == os.fsdecode(path)
