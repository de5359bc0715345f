"""What a user can cause: every mistake ends with one line and status 2; nothing is lost when a run is killed."""

import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile

import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
import temp_forecast
import text_classify
import training
from datasets import REVIEWS, UserError, load
from samples import reviews, temperatures
from training import load_checkpoint, lock_folder, number, save_checkpoint, write_csv

SCRIPTS = {"text": text_classify, "temp": temp_forecast}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A folder of good and bad files, among them a finished run of each script."""
    folder = tmp_path_factory.mktemp("material")
    good = reviews(300)
    good.to_csv(folder / "good.csv", index=False)
    temperatures(years=2).to_csv(folder / "series.csv", index=False)
    bad = {
        "one_class.csv": good.assign(cat="书籍"),
        "no_texts.csv": good.assign(review="  "),
        "few.csv": good.head(20),
        "lost_class.csv": good.assign(cat=["b" if i % 5 == 0 else "a" for i in range(1, 301)]),
        "header.csv": good.head(0),
        "renamed.csv": good.rename(columns={"review": "text"}),
        "dates.csv": pd.DataFrame(
            {"Date Time": ["01.01.2009 00:00:00", "yesterday"], "T (degC)": [1, 2]}
        ),
        "iso.csv": pd.DataFrame({"Date Time": ["2009-01-01 00:00"], "T (degC)": [1]}),
        "words.csv": pd.DataFrame({"Date Time": ["01.01.2009 00:00:00"], "T (degC)": ["warm"]}),
        "infinite.csv": pd.DataFrame({"Date Time": ["01.01.2009 00:00:00"], "T (degC)": ["inf"]}),
        "missing.csv": pd.DataFrame({"Date Time": ["01.01.2009 00:00:00"], "T (degC)": [-9999]}),
        "short.csv": temperatures(years=1).head(1000),
        "days.csv": temperatures(years=1).head(110),
        "gap.csv": temperatures(years=1).head(300).drop(index=range(250, 260)),
    }
    for name, frame in bad.items():
        frame.to_csv(folder / name, index=False)
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
    quick = ["--model", "rnn", "--epochs", "1", "--hidden", "4", "--device", "cpu", "--out", folder]
    run(text_classify, *quick, "--data", folder / "good.csv", "--embedding", 4)
    run(temp_forecast, *quick, "--data", folder / "series.csv", "--train-years", 1)
    text, temp = folder / "text_rnn" / "best.pt", folder / "temp_rnn" / "best.pt"
    content = torch.load(text, weights_only=True)
    changes = {
        "version": {"format": 99}, "lacking": {"labels": None}, "shapes": {"labels": ["a", "b"]},
        "options": {"options": {"model": "cnn"}}, "foreign": {"task": "chess"}, "weights": {"weights": {"a": 1}},
    }  # fmt: skip
    for name, change in changes.items():
        torch.save({**content, **change}, folder / f"{name}.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    (folder / "truncated.pt").write_bytes(temp.read_bytes()[:2000])

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(folder / "pwned"),)

    torch.save({"task": "text", "format": 1, "evil": Evil()}, folder / "evil.pt")
    (folder / "evil_pickle.pt").write_bytes(pickle.dumps(Evil()))
    return folder


def run(module, *arguments):
    """A script's main as its command line runs it, in this process; returns the exit status."""
    before = sys.argv
    sys.argv = [module.__file__, *map(str, arguments)]
    try:
        training.run(module.main)
        return 0
    except SystemExit as stop:
        return stop.code
    finally:
        sys.argv = before


BAD = [
    *[(script, option, "see --help") for script in SCRIPTS for option in (
        "--epochs 0", "--epochs -1", "--epochs 1.5", "--epochs many", "--lr nan", "--lr 0", "--lr -1", "--lr inf",
        "--batch-size 0", "--hidden 0", "--dropout 1", "--dropout -0.1", "--weight-decay -1", "--clip 0", "--average 1",
        "--seed -1", "--model cnn", "--schedule cosine", "--colour red",
    )],
    *[("text", option, "see --help") for option in (
        "--pool sum", "--tokens syllable", "--min-freq 0", "--max-tokens 0", "--label-smoothing 1", "--word-dropout -1",
    )],
    *[("temp", option, "see --help") for option in (
        "--freq W", "--history-days 0", "--horizon-days 0", "--train-years 0", "--features p", "--noise -1",
        "--members 0",
    )],
    *[(script, option, message) for script in SCRIPTS for option, message in (
        ("--device tpu", "--device tpu"), ("--device mps", "none of auto, cpu"), ("--device cuda:99", "not there"),
        ("--checkpoint best.pt", "belong together"), ("--predict text", "belong together"),
        ("--data absent.csv", "No such file"), ("--data .", "is a folder"), ("--data empty.csv", "is empty"),
        ("--data noise.csv", "UTF-8"), ("--data not.zip", "no zip"), ("--data none.zip", "holds 0 CSV"),
        ("--data several.zip", "holds 2 CSV"), ("--data half.zip", "cannot be unpacked"),
        ("--checkpoint absent.pt --predict days.csv", "cannot read absent.pt"),
        ("--checkpoint . --predict days.csv", "cannot read"),
        ("--checkpoint empty.csv --predict days.csv", "not a checkpoint"),
        ("--checkpoint good.csv --predict days.csv", "not a checkpoint"),
        ("--checkpoint truncated.pt --predict days.csv", "not a checkpoint"),
        ("--checkpoint list.pt --predict days.csv", "not a checkpoint"),
        ("--checkpoint foreign.pt --predict days.csv", "not a checkpoint"),
        ("--checkpoint evil.pt --predict days.csv", "not a checkpoint"),
        ("--checkpoint evil_pickle.pt --predict days.csv", "not a checkpoint"),
    )],
    ("text", "--checkpoint temp_rnn/best.pt --predict x", "other script"),
    ("text", "--checkpoint version.pt --predict x", "format 99"),
    ("text", "--checkpoint lacking.pt --predict x", "lacks its part 'labels'"),
    ("text", "--checkpoint shapes.pt --predict x", "do not fit"),
    ("text", "--checkpoint weights.pt --predict x", "do not fit"),
    ("text", "--checkpoint options.pt --predict x", "describe no model"),
    ("text", "--data renamed.csv", "no column 'review'; its columns are: cat, label, text"),
    ("text", "--data good.csv --label-column colour", "no column 'colour'"),
    ("text", "--data series.csv", "no column"), ("text", "--data one_class.csv", "one class only"),
    ("text", "--data no_texts.csv", "0 usable train rows"), ("text", "--data few.csv", "at least 5"),
    ("text", "--data header.csv", "at least 5"), ("text", "--data lost_class.csv", "is in no training row"),
    ("text", "--data good.csv --out good.csv", "cannot write"),
    ("text", "--data good.csv --lr 1e30 --clip 1e30", "not finite"),
    ("temp", "--data good.csv", "no column 'Date Time'"), ("temp", "--data dates.csv", "row 2 has the date 'yester"),
    ("temp", "--data iso.csv", "row 1 has the date"), ("temp", "--data words.csv", "no temperatures"),
    ("temp", "--data infinite.csv", "no temperatures"), ("temp", "--data missing.csv", "no temperatures"),
    ("temp", "--data short.csv", "too short"), ("temp", "--data short.csv --freq 10min", "too short"),
    ("temp", "--data series.csv --train-years 50", "too short"),
    ("temp", "--data series.csv --train-years 1 --out series.csv", "cannot write"),
    ("temp", "--checkpoint text_rnn/best.pt --predict days.csv", "other script"),
    ("temp", "--checkpoint temp_rnn/best.pt --predict days.csv", "does not end with 5 whole days"),
    ("temp", "--checkpoint temp_rnn/best.pt --predict gap.csv", "does not end with 5 whole days"),
    ("temp", "--checkpoint temp_rnn/best.pt --predict good.csv", "no column"),
    ("temp", "--checkpoint temp_rnn/best.pt --predict absent.pt", "No such file"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("script", "line", "message"), BAD, ids=lambda value: value if isinstance(value, str) else None
)
def test_a_mistake_ends_with_one_line_and_status_2(
    script, line, message, material, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(material)
    arguments = line.split()
    quick = ["--device", "cpu"] if "--device" not in line else []
    quick += ["--out", tmp_path / "out"] if "--out" not in line else []
    quick += (
        ["--epochs", 1, "--hidden", 4, "--model", "rnn"]
        if "not finite" in message or "cannot write" in message
        else []
    )
    files = sorted(material.rglob("*"))
    assert run(SCRIPTS[script], *quick, *arguments) == 2
    output = capsys.readouterr()
    lines = [
        text for text in output.err.splitlines() if not text.startswith("epoch ")
    ]  # progress bars
    assert (
        message in lines[-1] and lines[-1].startswith("error: ") and "Traceback" not in output.err
    )
    if "--predict" in line:
        assert output.out == ""
    assert sorted(material.rglob("*")) == files, (
        "a file was left behind, or code in a checkpoint was run"
    )
    assert not list(tmp_path.rglob("*.part"))


def test_the_table_is_long_enough():
    assert len(BAD) >= 60


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root"
)
def test_a_full_disk_leaves_no_half_file(material, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", disk], capture_output=True
    ).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        quick = ["--model", "rnn", "--epochs", 1, "--hidden", 16, "--embedding", 16]
        assert run(text_classify, "--data", material / "good.csv", "--out", disk, *quick) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert {path.name for path in disk.rglob("*")} == {"text_rnn", ".lock"}
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_is_held_by_one_run(tmp_path):
    lock = lock_folder(tmp_path / "run")
    script = f"from pathlib import Path; import training; training.lock_folder(Path({str(tmp_path / 'run')!r}))"
    other = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert f"in use by process {os.getpid()}" in other.stderr
    lock.close()
    assert (
        subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True).returncode
        == 0
    )


def test_a_spreadsheet_runs_no_cell(tmp_path):
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "好", "a=b"]
    write_csv(tmp_path / "x.csv", ["text", "number"], [(text, -1.5) for text in texts])
    frame = pd.read_csv(tmp_path / "x.csv")
    assert frame["text"].tolist() == [
        "'=1+1",
        "'+1",
        "'-1",
        "'@SUM(A1)",
        "' =1",
        "'\t=1",
        "好",
        "a=b",
    ]
    assert frame["number"].tolist() == [-1.5] * 8


def test_checkpoints_replace_each_other_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, task="text", value=1)

    def crash(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(UserError, match="No space left"):
        save_checkpoint(path, task="text", value=2)
    assert (
        load_checkpoint(path, "text", {"value": int})["value"] == 1
        and len(list(tmp_path.iterdir())) == 1
    )


@pytest.mark.parametrize(
    "text", ["", " ", "0", "3.5", "11", "1e3", "nan", "inf", "-inf", "one", "²"]
)
def test_numbers_out_of_range_are_refused(text):
    with pytest.raises(Exception, match="is not a whole number from 1 to 10"):
        number(int, 1, 10)(text)
    assert number(int, 1, 10)("10") == 10 and number(float, 0, 1, below=True)("0") == 0.0


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=40)


@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=8),
    st.sampled_from(["utf-8", "utf-8-sig", "gb18030"]),
)
@settings(max_examples=60, deadline=None)
def test_any_text_survives_the_csv_reader(tmp_path_factory, rows, encoding):
    path = tmp_path_factory.mktemp("csv") / "any.csv"
    frame = pd.DataFrame([("类", *row) for row in rows], columns=["cat", "label", "review"])
    path.write_bytes(frame.to_csv(index=False).encode(encoding))
    pd.testing.assert_frame_equal(load(REVIEWS, path)[0], frame, check_dtype=False)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "any.csv"
    path.write_bytes(content)
    try:
        assert load(REVIEWS, path)[1]["source"] == "file"
    except UserError as error:
        assert "\n" not in str(error)


# --- texts of any kind ------------------------------------------------------------------------------------------------


def test_texts_of_any_kind_are_classified(material, script):
    texts = ["😀👨‍👩‍👧", "\x1b[31m红\x07", "好" * 100_000, '"=1+1"', "", "\u202e倒", "a,b"]
    checkpoint = material / "text_rnn" / "best.pt"
    result = script(
        "text_classify.py",
        "--checkpoint",
        checkpoint,
        "--predict",
        "-",
        input="\n".join(texts) + "\n",
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and [line.count("\t") for line in lines] == [2] * len(texts)
    assert "\x1b" not in result.stdout and lines[3].endswith('\t"=1+1"')


def test_a_closed_pipe_ends_quietly_and_a_long_stream_takes_bounded_memory(material):
    arguments = [
        "x",
        "--predict",
        "-",
        "--device",
        "cpu",
        "--checkpoint",
        str(material / "text_rnn" / "best.pt"),
    ]
    code = (
        "import sys, resource, training, text_classify\n"
        f"sys.argv = {arguments}\n"
        "training.run(text_classify.main)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, file=sys.stderr)\n"
    )
    command = f"yes '屏幕清晰，运行流畅' | head -n %d | {sys.executable} -c \"$CODE\""
    environment = {**os.environ, "CODE": code}
    options = {
        "shell": True,
        "cwd": ROOT,
        "env": environment,
        "capture_output": True,
        "text": True,
        "timeout": 150,
    }
    short = subprocess.run(command % 1000 + " | wc -l", **options)
    long = subprocess.run(command % 20_000 + " | wc -l", **options)
    assert (int(short.stdout), int(long.stdout)) == (1000, 20_000)
    assert int(long.stderr.split()[-1]) < int(short.stderr.split()[-1]) + 60  # MiB
    closed = subprocess.run(command % 20_000 + " | head -n 1", **options)
    assert (
        closed.stdout.count("\n") == 1
        and "Error" not in closed.stderr
        and "Traceback" not in closed.stderr
    )


# --- stopping and going on --------------------------------------------------------------------------------------------


def outcome(folder):
    """What a run found, without what differs between machines and starts."""
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    history = pd.read_csv(folder / "history.csv").drop(columns="seconds")
    kept = {
        key: value for key, value in metrics.items() if key not in ("argv", "seconds_per_epoch")
    }
    return kept, history.to_csv(), (folder / "predictions.csv").read_bytes()


def test_a_resumed_run_is_the_run_left_alone(material, tmp_path, capsys, monkeypatch):
    for module, data in ((text_classify, "good.csv"), (temp_forecast, "series.csv")):
        quick = [
            "--model",
            "gru",
            "--epochs",
            4,
            "--hidden",
            4,
            "--average",
            0.9,
            "--data",
            material / data,
        ]
        quick += ["--train-years", 1] if module is temp_forecast else ["--embedding", 4]
        name = "temp_gru" if module is temp_forecast else "text_gru"
        assert run(module, *quick, "--out", tmp_path / "alone") == 0
        steps = iter(range(10_000))

        def interrupt(params, theta, steps=steps, clip=training.grad_clipping, module=module):
            if next(steps) == (9 if module is text_classify else 50):
                raise KeyboardInterrupt
            return clip(params, theta)

        with monkeypatch.context() as patch:
            patch.setattr(training, "grad_clipping", interrupt)
            assert run(module, *quick, "--out", tmp_path / "stopped") == 130
        assert "--resume" in capsys.readouterr().err
        finished = len(pd.read_csv(tmp_path / "stopped" / name / "history.csv"))
        assert 1 <= finished < 4
        assert run(module, *quick, "--out", tmp_path / "stopped", "--resume") == 0
        assert outcome(tmp_path / "stopped" / name) == outcome(tmp_path / "alone" / name)
        assert run(module, *quick, "--out", tmp_path / "stopped", "--resume", "--lr", 0.5) == 2
        assert "--lr is not what the run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_killed_at_twenty_instants_ends_as_if_left_alone(material, tmp_path):
    random.seed(0)
    command = [
        sys.executable,
        ROOT / "text_classify.py",
        "--data",
        material / "good.csv",
        "--model",
        "gru",
        "--hidden",
        8,
    ]
    command += ["--embedding", 8, "--epochs", 150, "--device", "cpu", "--out"]
    subprocess.run([*map(str, command), tmp_path / "alone"], check=True, capture_output=True)
    survived = 0
    while survived < 20:
        process = subprocess.Popen(
            [*map(str, command), tmp_path / "killed", "--resume"], stdout=subprocess.PIPE
        )
        process.stdout.readline()  # the data are read
        time.sleep(random.uniform(0.1, 1.2))
        if process.poll() is not None:
            shutil.rmtree(tmp_path / "killed")  # it was finished: from the start again
            continue
        process.send_signal(signal.SIGKILL)
        process.wait()
        survived += 1
        for name in ("last.pt", "best.pt"):
            path = tmp_path / "killed" / "text_gru" / name
            assert not path.exists() or load_checkpoint(path, "text", {"weights": dict})
    subprocess.run(
        [*map(str, command), tmp_path / "killed", "--resume"], check=True, capture_output=True
    )
    assert outcome(tmp_path / "killed" / "text_gru") == outcome(tmp_path / "alone" / "text_gru")


def test_the_data_folder_is_the_projects_own():
    assert datasets.DATA_DIR == ROOT / "data"
