"""Where data come from: files of any kind, folders, servers that fail, the made-up samples."""

import dataclasses
import hashlib
import io
import json
import os
import socket
import threading
import zipfile
from unittest.mock import Mock

import pandas as pd
import pytest

from support import datasets, samples
from support.datasets import CLIMATE, REVIEWS, Dataset, load
from support.files import UserError, whole_file, write_csv, write_json


def zip_of(contents):
    """The bytes of a zip; contents: {name: bytes}."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return stream.getvalue()


CSV = "cat,label,review\n书籍,1,很好\n酒店,0,不太好\n".encode()
ZIP = zip_of({"corpus.csv": CSV})
ZIP_SHA256 = hashlib.sha256(ZIP).hexdigest()


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        ("", "utf-8"),
        ("\ufeff", "utf-8"),
        ("\ufeff", "utf-16-le"),
        ("\ufeff", "utf-16-be"),
        ("", "gb18030"),
    ],
)
def test_a_table_is_read_in_any_usual_encoding(tmp_path, mark, encoding):
    path = tmp_path / "a.csv"
    path.write_bytes(f"{mark}类别,评论\n书籍,很好\n".encode(encoding))
    frame, _ = load(REVIEWS, path)
    assert frame.to_dict("list") == {"类别": ["书籍"], "评论": ["很好"]}


@pytest.mark.parametrize(("separator", "number"), [(",", "-0.5"), ("\t", "-0.5"), (";", "-0,5")])
def test_the_header_tells_the_separator_and_the_decimal_sign(tmp_path, separator, number):
    path = tmp_path / "a.csv"
    path.write_text(f"Date Time{separator}T\nmonday{separator}{number}\n")
    frame, _ = load(CLIMATE, path)
    assert frame.to_dict("list") == {"Date Time": ["monday"], "T": [-0.5]}


def test_a_header_may_have_a_comma_in_a_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Date Time;T, degC\nmonday;-0,5\n")
    frame, _ = load(CLIMATE, path)
    assert frame.to_dict("list") == {"Date Time": ["monday"], "T, degC": [-0.5]}


def test_a_decimal_comma_becomes_a_point_beside_a_text_too(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("Date Time;T\n31.12.2009;-0,5\n01.01.2010;-\n02.01.2010;1,25\n")
    frame, _ = load(CLIMATE, path)
    assert frame["T"].tolist() == ["-0.5", "-", "1.25"]
    assert frame["Date Time"].tolist() == ["31.12.2009", "01.01.2010", "02.01.2010"]


def test_any_text_comes_back(tmp_path):
    texts = ["NA", "1.0", "", '很好，,\n"值得"\n好读', "a\rb", " a;\t😀\u2028"]
    path = tmp_path / "a.csv"
    write_csv(path, pd.DataFrame({"review": texts, "label": "1.0"}))
    frame, _ = load(REVIEWS, path)
    assert frame["review"].tolist() == texts
    assert frame["label"].tolist() == ["1.0"] * 6
    assert path.read_bytes().startswith(b"\xef\xbb\xbf")  # the mark by which Excel knows UTF-8


def test_the_table_is_found_in_a_zip_made_on_a_mac(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(zip_of({"a.csv": CSV, "__MACOSX/._a.csv": b"\0\5", "._a.csv": b"\0\5"}))
    frame, _ = load(REVIEWS, path)
    assert frame["review"].tolist() == ["很好", "不太好"]


@pytest.mark.parametrize("names", [[], ["a.txt"], ["a.csv", "b.CSV"]])
def test_a_zip_must_hold_one_csv_file(tmp_path, names):
    path = tmp_path / "a.zip"
    path.write_bytes(zip_of(dict.fromkeys(names, CSV)))
    with pytest.raises(UserError, match="CSV files; name a CSV or a zip of one"):
        load(REVIEWS, path)


UNFIT = {
    "empty.csv": b"",
    "header_alone.csv": b"cat,label,review\n",
    "picture.csv": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    "first_row_longer.csv": b"a,b\n1,2,3\n4,5,6\n",  # no column may shift
    "last_row_longer.csv": b"a,b\n1,2\n4,5,6\n",
    "damaged.zip": ZIP.replace(b"label", b"lapel"),  # only the check sum tells
}


@pytest.mark.parametrize("name", UNFIT)
def test_an_unfit_file_is_refused_by_its_name_in_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(UNFIT[name])
    with pytest.raises(UserError, match=name) as error:
        load(REVIEWS, path)
    assert "\n" not in str(error.value)


def test_a_file_in_no_known_encoding_is_refused_with_advice(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"a,b\n\xff\xff,1\n")
    with pytest.raises(UserError, match="save it as UTF-8"):
        load(REVIEWS, path)


# --- folders ------------------------------------------------------------------------------------


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    """An empty folder in the place of data/."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(datasets, "DATA_DIR", folder)
    return folder


def test_a_path_that_begins_with_a_tilde_may_be_no_users(data_dir):
    with pytest.raises(UserError, match=r"~\$reviews\.csv does not exist"):
        load(REVIEWS, "~$reviews.csv")


@pytest.mark.parametrize("name", ["a.zip", "a.csv.zip"])
def test_the_named_folder_comes_before_data_and_a_zip_before_a_csv(
    tmp_path, data_dir, monkeypatch, name
):
    monkeypatch.setenv("RNN_DATA_DIR", str(tmp_path))
    dataset = Dataset(name=name, urls=(), sample=None)
    assert datasets.find(dataset) is None
    for path in [data_dir / "a.csv", data_dir / name, tmp_path / "a.csv", tmp_path / name]:
        path.touch()  # each is found before those that lie there already
        assert datasets.find(dataset) == path


def test_a_tilde_is_the_home_folder(tmp_path, data_dir, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # its name on Windows
    path = tmp_path / "a.csv"
    path.write_bytes(CSV)
    _, data = load(REVIEWS, "~/a.csv")
    assert data["path"] == str(path)
    monkeypatch.setenv("RNN_DATA_DIR", "~")
    assert datasets.find(Dataset(name="a.zip", urls=(), sample=None)) == path


# --- downloads ----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path, data_dir):
    """The address of a folder that holds a good file and bad ones."""
    (tmp_path / "good").write_bytes(ZIP)
    (tmp_path / "half").write_bytes(ZIP[: len(ZIP) // 2])
    (tmp_path / "login").write_text("<html>\nPlease log in\n</html>")
    return f"{tmp_path.as_uri()}/"


def check(frame):
    """Refuse a table without a column cat, as `check_jena` refuses one of another kind."""
    if "cat" not in frame.columns:
        raise ValueError("sent another table")


def corpus(*urls, sha256=None):
    """A dataset at these addresses."""
    return Dataset("corpus.zip", urls, sample=pd.DataFrame, sha256=sha256, check=check)


@pytest.mark.parametrize("sha256", [None, ZIP_SHA256])
@pytest.mark.parametrize("answer", ["absent", "half", "login"])
def test_after_a_bad_answer_the_second_address_is_taken(server, answer, sha256):
    _, data = load(corpus(server + answer, server + "good", sha256=sha256))
    assert data["source"] == "download"
    assert data["sha256"] == ZIP_SHA256


def test_a_download_is_kept_and_is_a_file_the_next_time(server, data_dir):
    load(corpus(server + "good", server + "absent"))
    assert list(data_dir.iterdir()) == [data_dir / "corpus.zip"]
    _, data = load(corpus(server + "absent"))
    assert data["source"] == "file"


def test_nothing_unverified_is_kept(server, data_dir):
    for dataset in [
        corpus(server + "half", server + "login"),
        corpus(server + "good", sha256="f" * 64),
    ]:
        _, data = load(dataset)
        assert data["source"] == "sample"
        assert list(data_dir.iterdir()) == []


def test_a_silent_server_is_given_up(data_dir, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging_up = threading.Timer(20, silent.close)  # ends the test if nothing else does
        hanging_up.start()
        load(corpus(f"http://127.0.0.1:{silent.getsockname()[1]}/"))
        hanging_up.cancel()
    assert "timed out" in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None


def test_a_banner_says_why_the_sample_is_used(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RNN_DATA_DIR", str(tmp_path))
    load(corpus(server + "absent", server + "login"))
    banner = capsys.readouterr().out
    assert "BUNDLED SAMPLE: corpus.zip" in banner
    assert "sent another table" in banner
    assert f"RNN_DATA_DIR={tmp_path} does not hold it" in banner
    assert f"fetch {server}absent" in banner


def test_without_a_network_the_sample_is_used_and_stamped(data_dir):
    frame, data = load(REVIEWS)
    digest = hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()
    assert data == {"path": "bundled sample", "sha256": digest, "source": "sample", "rows": 2000}


def test_where_data_cannot_be_written_the_sample_is_used(server, data_dir, capsys):
    data_dir.rmdir()
    data_dir.touch()  # a file where the folder should be
    _, data = load(corpus(server + "good"))
    assert data["source"] == "sample"
    assert "cannot be written" in capsys.readouterr().out


# --- the official series ------------------------------------------------------------------------

JENA_HEADER = (
    "Date Time,p (mbar),T (degC),Tpot (K),Tdew (degC),rh (%),VPmax (mbar),VPact (mbar),"
    "VPdef (mbar),sh (g/kg),H2OC (mmol/mol),rho (g/m**3),wv (m/s),max. wv (m/s),wd (deg)"
)


@pytest.fixture(scope="module")
def jena_csv():
    """A table with the header, the first stamp and the number of rows of the official one."""
    row = "01.01.2009 00:10:00,0,0,0,0,0,0,0,0,0,0,0,0,0,0\n"
    return f"{JENA_HEADER}\n{420_551 * row}".encode()


def test_the_official_series_is_accepted(jena_csv, tmp_path, data_dir):
    archive_path = tmp_path / "archive"
    archive_path.write_bytes(zip_of({"jena.csv": jena_csv}))
    _, data = load(dataclasses.replace(CLIMATE, urls=(archive_path.as_uri(),)))
    assert data["source"] == "download"


def test_another_table_is_not_the_official_series(jena_csv):
    jena_frame = pd.read_csv(io.BytesIO(jena_csv))
    with pytest.raises(ValueError, match="420550 rows and 15 columns"):
        datasets.check_jena(jena_frame[1:])
    with pytest.raises(ValueError, match="another table"):
        datasets.check_jena(jena_frame.rename(columns={"wd (deg)": "wd"}))
    with pytest.raises(ValueError, match="does not begin"):
        datasets.check_jena(jena_frame.replace("01.01.2009 00:10:00", "01.01.2010 00:10:00"))


# --- whole files --------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new folder" / "a.txt"
    with whole_file(path, "w") as stream:
        stream.write("text")
        assert not path.exists()
    assert path.read_text() == "text"


def test_an_existing_file_survives_a_failing_write(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(UserError, match="No space left"), whole_file(path, "w") as stream:
        stream.write("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_name_that_is_no_text_comes_back_from_json(tmp_path):
    name = "书\udcb5\udce7.csv"  # how Python names a file whose name has bytes of GB18030
    write_json(tmp_path / "a.json", {"path": name})
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    assert content == {"path": name}


# --- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("make_sample", [samples.reviews, samples.temperatures])
def test_a_seed_gives_one_sample(make_sample):
    frame = make_sample()
    assert frame.equals(make_sample())
    assert not frame.equals(make_sample(seed=1))
