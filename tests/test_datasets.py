"""Where data come from: files of any kind, folders, servers that misbehave, the bundled samples."""

import hashlib
import io
import os
import socket
import threading
import zipfile
from functools import partial
from unittest.mock import Mock

import datasets
import pandas as pd
import pytest
import samples
from datasets import REVIEWS, Dataset, UserError, load, whole_file

BYTES = "cat,label,review\n书籍,1,好\n酒店,0,NA\n".encode()
STREAM = io.BytesIO()
with zipfile.ZipFile(STREAM, "w", zipfile.ZIP_DEFLATED) as archive:
    archive.writestr("corpus.csv", BYTES)
GOOD = STREAM.getvalue()
SHA256 = hashlib.sha256(GOOD).hexdigest()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gb18030"])
@pytest.mark.parametrize("name", ["any.csv", "any.zip"])
def test_any_texts_come_back_from_any_form_of_the_file(tmp_path, name, encoding):
    # In UTF-8 these bytes are GB18030 of other texts, too.
    texts = ["NA", "1.0", "", '很好，，\n"值得" 好读', " a\t\x1f😀\u2028\ufeff"]
    frame, path = pd.DataFrame({"类别": texts, "label": texts[::-1]}), tmp_path / name
    frame.to_csv(path, index=False, encoding=encoding)  # zipped where the name says so
    found, data = load(REVIEWS, path)
    pd.testing.assert_frame_equal(found, frame, check_dtype=False)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert data == {"path": str(path), "sha256": digest, "source": "file", "rows": 5}


UNFIT = [
    ("", b"", "no regular file"),
    ("picture.csv", bytes(range(1, 256)), "UTF-8"),
    ("long.csv", b"a,b\n1,2\n1,2,3\n", "in line 3, saw 3"),
    ("longer.csv", b"a,b\n1,2,3\n4,5,6\n", "row 1 has more fields"),  # no column may shift
    ("damaged.zip", GOOD[:40] + b"\xff" + GOOD[41:], "no CSV"),  # first data byte
]


@pytest.mark.parametrize(("name", "content", "message"), UNFIT)
def test_unfit_files_are_refused_in_one_line(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(REVIEWS, tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_folders_are_searched_in_order_and_a_tilde_is_the_home(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("RNN_DATA_DIR", "~/shared")
    for name in ("data/a.csv", "data/a.zip", "shared/a.csv", "shared/a.zip"):
        path = tmp_path / name  # the last one written is found first
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(GOOD if path.suffix == ".zip" else BYTES)
        assert load(Dataset("a.zip", (), None))[1]["path"] == str(path)
    assert load(REVIEWS, "~/data/a.csv")[1]["path"] == str(tmp_path / "data" / "a.csv")


def test_numbers_in_reviews_stay_texts(tmp_path):
    (tmp_path / "a.csv").write_text("cat,review\n01,1.0\n")
    assert load(REVIEWS, tmp_path / "a.csv")[0].to_numpy().tolist() == [["01", "1.0"]]


def test_a_file_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    with whole_file(path, "w") as stream:
        stream.write("first")
        assert not path.exists()
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left"), whole_file(path, "w") as stream:
        stream.write("second")
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o644


@pytest.fixture
def url(tmp_path, monkeypatch):
    """The address of one good file and two bad ones; data/ is empty."""
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    (tmp_path / "good").write_bytes(GOOD)
    (tmp_path / "cut").write_bytes(GOOD[:20])
    (tmp_path / "login").write_text("<html>Please accept the terms of our hotel</html>")
    return f"{tmp_path.as_uri()}/"


def corpus(*urls, **known):
    """A dataset at these addresses; its sample has no rows."""
    sample = partial(pd.DataFrame, columns=["cat", "label", "review"])
    return Dataset("corpus.zip", urls, sample, options=REVIEWS.options, **known)


@pytest.mark.parametrize("known", [{"sha256": SHA256}, {"size": len(GOOD)}, {}])
@pytest.mark.parametrize("bad", ["absent", "cut", "login"])
def test_after_a_bad_answer_the_next_address_is_tried(url, bad, known):
    _, data = load(corpus(url + bad, url + "good", url + "absent", **known))
    path = datasets.DATA_DIR / "corpus.zip"
    assert data == {"path": str(path), "sha256": SHA256, "source": "download", "rows": 2}
    assert list(datasets.DATA_DIR.iterdir()) == [path] and socket.getdefaulttimeout() is None
    assert load(corpus(url + "absent"))[1] == data | {"source": "file"}  # downloaded once


def test_a_silent_server_is_given_up(url, monkeypatch):
    monkeypatch.setattr(datasets, "TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closing = threading.Timer(5, server.close)
        closing.start()
        silent = f"http://127.0.0.1:{server.getsockname()[1]}/"
        assert load(corpus(silent, url + "good"))[1]["source"] == "download"
        assert closing.is_alive()  # the server did not end it
        closing.cancel()


def test_a_file_that_is_another_is_not_kept(url):
    for known in [{"sha256": "0" * 64}, {"size": len(GOOD) - 1}, {"size": len(GOOD) + 1}]:
        assert load(corpus(url + "good", **known))[1]["source"] == "sample"
        assert not list(datasets.DATA_DIR.iterdir())


def test_without_a_network_the_sample_is_used_and_a_banner_says_why(url, monkeypatch, capsys):
    for named in ("/nowhere", ""):
        monkeypatch.setenv("RNN_DATA_DIR", named)
        frame, data = load(REVIEWS)
        assert data["sha256"] == hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()
        assert (data["path"], data["source"], data["rows"]) == ("bundled sample", "sample", 2000)
        banner = capsys.readouterr().out
        assert "BUNDLED SAMPLE" in banner and "refused" in banner and REVIEWS.urls[0] in banner
        assert (f"RNN_DATA_DIR={named} does" in banner) == bool(named)
    datasets.DATA_DIR.rmdir()
    datasets.DATA_DIR.write_text("a file where a folder should be")
    assert load(REVIEWS)[1]["source"] == "sample"
    assert "cannot be written" in capsys.readouterr().out


def test_made_up_reviews_have_uneven_categories_and_mention_others():
    frame = samples.reviews()
    assert frame.equals(samples.reviews()) and not frame.equals(samples.reviews(seed=1))
    shares = frame["cat"].value_counts(normalize=True)[list(samples.CATEGORIES)]
    assert len(frame) == 2000 and shares.tolist() == pytest.approx(samples.SHARES, abs=0.02)
    assert frame["review"].str.count("[，。！]").between(2, 40).all()  # clauses
    assert frame["review"].str.contains("上次买.*就在这家").sum() > 100
    for category, text in zip(frame["cat"], frame["review"], strict=True):
        assert not any(phrase.format(category) in text for phrase in samples.MENTIONS)


def test_made_up_temperatures_have_seasons_and_days_and_the_pressure_is_ahead():
    frame = samples.temperatures()
    assert frame.equals(samples.temperatures()) and not frame.equals(samples.temperatures(seed=1))
    stamps = pd.to_datetime(frame["Date Time"], format="%d.%m.%Y %H:%M:%S")
    assert stamps.tolist() == pd.date_range("2009", "2016-12-31 23:00", freq="h").tolist()
    T, month_and_hour = frame["T (degC)"], [stamps.dt.month, stamps.dt.hour]
    means, changes = T.groupby(month_and_hour).mean(), T.diff().groupby(month_and_hour).std()
    january, july = means[1], means[7]
    assert july.mean() - january.mean() > 15 and T.between(-40, 50).all()
    assert january.idxmax() in (14, 15, 16) and july.idxmax() in (14, 15, 16)
    assert 1.5 * (january.max() - january.min()) < july.max() - july.min()
    assert changes[7].mean() > 1.15 * changes[1].mean()  # noise persists longer in winter
    weather = T - T.groupby(month_and_hour).transform("mean")
    ahead, now = (weather.shift(-hours).corr(frame["p (mbar)"]) for hours in (12, 0))
    assert ahead < -0.8 < now  # the pressure is half a day ahead
