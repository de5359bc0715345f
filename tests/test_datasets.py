"""Where data come from: files of any kind, folders, servers that misbehave, the bundled samples."""

import hashlib
import io
import os
import socket
import threading
import time
import zipfile
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import product

import pandas as pd
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import datasets
import samples
from datasets import REVIEWS, Dataset, UserError, load, whole_file

BYTES = "cat,label,review\n书籍,1,好\n酒店,0,NA\n".encode()


def zipped(*names, content=BYTES, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name in names:
            archive.writestr(name, content)
    return stream.getvalue()


GOOD = zipped("corpus.csv")
SHA256 = hashlib.sha256(GOOD).hexdigest()
cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\0"), max_size=40)


@given(
    st.lists(st.tuples(cells, cells), min_size=1, max_size=8),
    st.sampled_from(["utf-8", "utf-8-sig", "gb18030"]),
    st.sampled_from([None, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA]),
)
@example([("NA", "1.0"), ('很好，\n"值得" 一读', "")], "utf-8", None)
@settings(max_examples=40, deadline=None)
def test_any_texts_come_back_from_any_form_of_the_file(tmp_path_factory, rows, encoding, method):
    frame = pd.DataFrame([("类", *row) for row in rows], columns=["cat", "label", "review"])
    content = frame.to_csv(index=False).encode(encoding)
    path = tmp_path_factory.mktemp("csv") / ("any.zip" if method else "any.csv")
    path.write_bytes(zipped("x.csv", content=content, method=method) if method else content)
    found, data = load(REVIEWS, path)
    pd.testing.assert_frame_equal(found, frame, check_dtype=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert data == {"path": str(path), "sha256": digest, "source": "file", "rows": len(rows)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "no CSV"),
        ("picture.csv", bytes(range(1, 256)), "UTF-8"),
        ("ragged.csv", b'a,b\n1,2\n1,2,3,4\n"', "no CSV"),
        ("long.csv", b"a,b\n1,2\n1,2,3\n", "in line 3, saw 3"),
        ("longer.csv", b"a,b\n1,2,3\n4,5,6\n", "row 1 has more fields"),  # no column may shift
        ("damaged.zip", GOOD[:40] + b"\xff" + GOOD[41:], "no CSV"),  # first data byte
        ("text.zip", BYTES, "not a zip"),
        ("none.zip", zipped(), "ZIP"),
        ("several.zip", zipped("a.csv", "b.csv"), "Multiple files"),
        ("/dev", None, "no regular file"),
        ("nul\0.csv", None, "does not exist"),
        ("/dev/zero", None, "no regular file"),
    ],
)
def test_unfit_files_are_refused_in_one_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(REVIEWS, tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_folders_are_searched_in_order_and_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("RNN_DATA_DIR", "~/shared")
    names = ["online_shopping_10_cats.zip", "online_shopping_10_cats.csv"]
    paths = [tmp_path / folder / name for folder in ("shared", "data") for name in names]
    for path in reversed(paths):  # the last one written is found first
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(GOOD if path.suffix == ".zip" else BYTES)
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
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left"), whole_file(path, "w") as stream:
        stream.write("second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o644


class Handler(SimpleHTTPRequestHandler):
    """Sends the files of a folder; an address of its own stays silent."""

    def do_GET(self):
        if self.path == "/silent":
            time.sleep(10)
        else:
            super().do_GET()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    page = b"<html>Please accept the terms of our hotel</html>"
    for name, content in {"good": GOOD, "cut": GOOD[:20], "login": page}.items():
        (folder / name).write_bytes(content)
    handler = partial(Handler, directory=folder)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data/; a server that is silent for half a second is given up."""
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    monkeypatch.setattr(datasets, "TIMEOUT", 0.5)
    return tmp_path / "data"


def corpus(*urls, columns=("cat", "label", "review"), **known):
    """A dataset at these addresses; its sample has no rows."""
    sample = partial(pd.DataFrame, columns=columns)
    return Dataset("corpus.zip", urls, sample, options=REVIEWS.options, **known)


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(GOOD), "rows": 2}, {"rows": 2}])
@pytest.mark.parametrize("bad", ["absent", "cut", "login", "silent"])
def test_after_a_bad_answer_the_next_address_is_tried(server, folder, bad, known):
    start = time.monotonic()
    frame, data = load(corpus(server + bad, server + "good", server + "absent", **known))
    assert time.monotonic() - start < 8 and socket.getdefaulttimeout() is None
    assert frame["cat"].tolist() == ["书籍", "酒店"]
    path = folder / "corpus.zip"
    assert data == {"path": str(path), "sha256": SHA256, "source": "download", "rows": 2}
    assert list(folder.iterdir()) == [path]
    assert load(corpus(server + "absent"))[1] == data | {"source": "file"}  # downloaded once


@pytest.mark.parametrize(
    "known",
    [{"sha256": "0" * 64}, {"size": 9}, {"size": 999}, {"rows": 3}, {"rows": 2, "columns": ["T"]}],
)
def test_a_file_that_is_another_is_not_kept(server, folder, known):
    wanted = corpus(server + "good", **known)
    digest = hashlib.sha256(wanted.sample().to_csv(index=False).encode()).hexdigest()
    expected = {"path": "bundled sample", "sha256": digest, "source": "sample", "rows": 0}
    assert load(wanted)[1] == expected and list(folder.iterdir()) == []


def test_without_a_network_made_up_reviews_are_used_and_a_banner_says_why(
    folder, monkeypatch, capsys
):
    for named, said in (("/nowhere", True), ("", False)):
        monkeypatch.setenv("RNN_DATA_DIR", named)
        frame, data = load(REVIEWS)
        banner = capsys.readouterr().out
        assert data["source"] == "sample" and "BUNDLED SAMPLE" in banner and "refused" in banner
        assert REVIEWS.urls[0] in banner and ("RNN_DATA_DIR=/nowhere does" in banner) == said
    folder.rmdir()
    folder.write_text("a file where a folder should be")
    assert load(REVIEWS)[0].equals(frame) and "cannot be written" in capsys.readouterr().out
    assert len(frame) == 2000 and not frame.equals(samples.reviews(seed=1))
    counts = frame["cat"].value_counts(normalize=True)[list(samples.CATEGORIES)]
    assert counts.tolist() == pytest.approx(samples.SHARES, abs=0.02)
    assert frame["review"].str.count("[，。！]").between(2, 40).all()  # clauses
    own_category = [  # whether a text mentions its own category, for each mention of one
        name == own
        for name, phrase in product(counts.index, samples.MENTIONS)
        for own in frame["cat"][frame["review"].str.contains(phrase.format(name))]
    ]
    assert len(own_category) > 500 and not any(own_category)


def test_made_up_temperatures_have_seasons_days_and_fronts():
    frame = samples.temperatures()
    assert frame.equals(samples.temperatures()) and not frame.equals(samples.temperatures(seed=1))
    stamps = pd.to_datetime(frame["Date Time"], format="%d.%m.%Y %H:%M:%S")
    assert len(frame) == 8 * 8760 + 2 * 24  # leap days of 2012 and 2016
    assert (stamps.diff().dropna() == pd.Timedelta("1h")).all()
    T, month_and_hour = frame["T (degC)"], [stamps.dt.month, stamps.dt.hour]
    means, changes = T.groupby(month_and_hour).mean(), T.diff().groupby(month_and_hour).std()
    january, july = means[1], means[7]
    assert july.mean() - january.mean() > 15 and T.between(-40, 50).all()
    assert january.idxmax() in (14, 15, 16) and july.idxmax() in (14, 15, 16)
    assert 1.5 * (january.max() - january.min()) < july.max() - july.min()
    assert changes[7].mean() > 1.15 * changes[1].mean()  # noise persists longer in winter
    front = frame["p (mbar)"] < 1005
    before, after = T.shift(24)[front], T.shift(-24)[front]
    assert 0.002 < front.mean() < 0.05 and (before - after).mean() > 2
    assert (before - T.shift(96)[front]).mean() > 0  # warm air comes in before the cold
