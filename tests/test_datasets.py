"""Where data come from: files of any kind, folders, servers that misbehave, the bundled samples."""

import hashlib
import io
import os
import select
import threading
import zipfile
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import datasets
import samples
from datasets import REVIEWS, Dataset, UserError, load, whole_file

TABLE = 'cat,label,review\n书籍,1,"很好，\n""值得"" 一读"\n酒店,0,NA\n'
ROWS = [("书籍", "1", '很好，\n"值得" 一读'), ("酒店", "0", "NA")]
BYTES = TABLE.encode()


def zipped(*names, content=BYTES, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name in names:
            archive.writestr(name, content)
    return stream.getvalue()


GOOD = zipped("corpus.csv")
SHA256 = hashlib.sha256(GOOD).hexdigest()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", BYTES),
        ("excel.csv", TABLE.encode("utf-8-sig")),
        ("chinese_windows.csv", TABLE.encode("gb18030")),
        ("packed.zip", zipped("inside.csv", method=zipfile.ZIP_LZMA)),
    ],
)
def test_every_form_of_the_file_gives_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    frame, data = load(REVIEWS, tmp_path / name)
    assert list(frame.itertuples(index=False, name=None)) == ROWS
    assert data["sha256"] == hashlib.sha256(content).hexdigest()
    assert data["path"] == str(tmp_path / name) and data["source"] == "file" and data["rows"] == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "no CSV"),
        ("picture.csv", bytes(range(1, 256)), "UTF-8"),
        ("ragged.csv", b'a,b\n1,2\n1,2,3,4\n"', "no CSV"),
        ("blank.csv", b"\n\n", "no CSV"),
        ("long.csv", b"a,b\n1,2\n1,2,3\n", "in line 3, saw 3"),
        ("longer.csv", b"a,b\n1,2,3\n4,5,6\n", "row 1 has more fields"),  # no column may shift
        ("half.zip", GOOD[:60], "no CSV"),
        ("damaged.zip", GOOD[:40] + b"\xff" + GOOD[41:], "no CSV"),  # first data byte
        ("text.zip", BYTES, "not a zip"),
        ("none.zip", zipped(), "ZIP"),
        ("several.zip", zipped("a.csv", "b.csv"), "Multiple files"),
    ],
)
def test_unfit_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(REVIEWS, tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    "name", ["absent.csv", ".", "nul\0.csv", "~nobody_here/x", "fifo", "/dev/zero"]
)
def test_what_is_no_file_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if hasattr(os, "mkfifo"):  # Windows has neither FIFOs nor devices: both names are absent there
        os.mkfifo("fifo")
    with pytest.raises(UserError, match="does not exist or is no regular file"):
        load(REVIEWS, name)


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=40)


@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=8),
    st.sampled_from(["utf-8", "utf-8-sig", "gb18030"]),
)
@settings(max_examples=40, deadline=None)
def test_any_text_survives_the_csv_reader(tmp_path_factory, rows, encoding):
    path = tmp_path_factory.mktemp("csv") / "any.csv"
    frame = pd.DataFrame([("类", *row) for row in rows], columns=["cat", "label", "review"])
    path.write_bytes(frame.to_csv(index=False).encode(encoding))
    pd.testing.assert_frame_equal(load(REVIEWS, path)[0], frame, check_dtype=False)


@given(st.binary(max_size=400), st.sampled_from(["any.csv", "any.zip"]))
@settings(max_examples=100, deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    try:
        assert load(REVIEWS, path)[1]["source"] == "file"
    except UserError as error:
        assert "\n" not in str(error)


# --- folders ------------------------------------------------------------------------------------


def test_folders_are_searched_in_order_and_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("RNN_DATA_DIR", "~/shared")
    names = ["online_shopping_10_cats.zip", "online_shopping_10_cats.csv"]
    paths = [tmp_path / folder / name for folder in ("shared", "data") for name in names]
    for path in reversed(paths):  # the last one written is found first
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(zipped("x.csv") if path.suffix == ".zip" else BYTES)
        assert load(REVIEWS)[1]["path"] == str(path)
    assert load(REVIEWS, "~/data/" + names[1])[1]["path"] == str(paths[3])


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with pytest.raises(KeyboardInterrupt), whole_file(path, "w") as stream:
        stream.write("half")
        raise KeyboardInterrupt
    assert list(path.parent.iterdir()) == []
    with whole_file(path, "w") as stream:
        stream.write("first")
        assert not path.exists()
    with pytest.raises(UserError, match=r"cannot write .*inside"), whole_file(path / "inside"):
        pass
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"), whole_file(path, "w") as stream:
        stream.write("second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o644


# --- downloads ----------------------------------------------------------------------------------


class Misbehaving(BaseHTTPRequestHandler):
    """A server whose answer depends on the path."""

    def do_GET(self):
        kind = self.path.strip("/")
        if kind == "hangup":
            self.close_connection = True
            return
        body = b"<html>Please accept the terms of our hotel</html>" if kind == "login" else GOOD
        self.send_response(503 if kind == "503" else 200)
        self.send_header("Content-Length", "many" if kind == "nonsense" else str(len(body)))
        self.end_headers()
        self.wfile.write(body[:20] if kind in ("cut", "stall") else body)
        if kind == "stall":  # wait until the other side hangs up
            left, _, _ = select.select([self.connection], [], [], 5)
            self.server.left_alone.append(bool(left))

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.left_alone = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    assert all(server.left_alone), "a silent server was waited for"
    server.server_close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data/; a server that is silent for half a second is given up."""
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(datasets, "TIMEOUT", 0.5)
    return tmp_path / "data"


def corpus(server, *kinds, columns=("cat", "label", "review"), **known):
    """A dataset with an address for each kind of answer; its sample has no rows."""
    urls = tuple(server + kind for kind in kinds)
    sample = partial(pd.DataFrame, columns=columns)
    return Dataset("corpus.zip", urls, sample, options=REVIEWS.options, **known)


BAD_ANSWERS = ["503", "cut", "hangup", "stall", "nonsense", "login"]


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(GOOD), "rows": 2}, {"rows": 2}])
@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_after_a_bad_answer_the_next_address_is_tried(server, folder, kind, known):
    frame, data = load(corpus(server, kind, "good", "503", **known))
    assert frame["cat"].tolist() == ["书籍", "酒店"]
    path = folder / "corpus.zip"
    assert data == {"path": str(path), "sha256": SHA256, "source": "download", "rows": 2}
    assert list(folder.iterdir()) == [path]
    assert load(corpus(server, "503"))[1] == data | {"source": "file"}  # downloaded once


@pytest.mark.parametrize(
    "known",
    [{"sha256": "0" * 64}, {"size": len(GOOD) + 1}, {"rows": 3}, {"rows": 2, "columns": ["T"]}],
    ids=str,
)
def test_a_file_that_is_another_is_not_kept(server, folder, known):
    assert load(corpus(server, "good", **known))[1]["source"] == "sample"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("kind", BAD_ANSWERS)
def test_when_all_addresses_fail_the_sample_says_why(server, folder, monkeypatch, capsys, kind):
    monkeypatch.setenv("RNN_DATA_DIR", "/nowhere")
    data = load(corpus(server, kind, kind, sha256=SHA256))[1]
    digest = hashlib.sha256(b"cat,label,review\n").hexdigest()
    assert data == {"path": "bundled sample", "sha256": digest, "source": "sample", "rows": 0}
    banner = capsys.readouterr().out
    assert "BUNDLED SAMPLE" in banner and "(127.0.0.1: " in banner and server + kind in banner
    assert "RNN_DATA_DIR=/nowhere" in banner and list(folder.iterdir()) == []


def test_without_a_network_the_sample_is_used(folder, capsys):
    frame, data = load(REVIEWS)
    assert data["source"] == "sample" and len(frame) == data["rows"] == 2000
    banner = capsys.readouterr().out
    assert "refused" in banner and REVIEWS.urls[0] in banner and "RNN_DATA_DIR" not in banner


def test_a_data_folder_that_cannot_be_written_is_a_reason(server, folder, capsys):
    folder.write_text("a file")
    assert load(corpus(server, "good", sha256=SHA256))[1]["source"] == "sample"
    assert "cannot be written" in capsys.readouterr().out


# --- the samples --------------------------------------------------------------------------------


def test_the_sample_of_reviews_has_all_classes():
    frame = samples.reviews()
    assert frame.equals(samples.reviews()) and not frame.equals(samples.reviews(seed=1))
    assert list(frame) == ["cat", "label", "review"] and len(frame) == 2000
    assert frame["cat"].nunique() == 10 and frame["cat"].value_counts().min() >= 30


def test_the_sample_of_temperatures_is_hourly_with_warm_summers():
    frame = samples.temperatures()
    assert frame.equals(samples.temperatures()) and not frame.equals(samples.temperatures(seed=1))
    stamps = pd.to_datetime(frame["Date Time"], format="%d.%m.%Y %H:%M:%S")
    assert len(frame) == 8 * 8760 + 2 * 24  # leap days of 2012 and 2016
    assert (stamps.diff().dropna() == pd.Timedelta("1h")).all()
    by_month = frame["T (degC)"].groupby(stamps.dt.month).mean()
    assert by_month[7] - by_month[1] > 15 and frame["T (degC)"].between(-40, 50).all()
