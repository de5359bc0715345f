"""Where data come from: files in every form, folders, downloads from a server that misbehaves, the bundled samples."""

import hashlib
import io
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

import datasets
import samples
from datasets import REVIEWS, Dataset, Unreachable, UserError, download, load, whole_file

TABLE = 'cat,label,review\n书籍,1,"很好，\n""值得"" 一读"\n酒店,0,NA\n'
ROWS = [("书籍", "1", '很好，\n"值得" 一读'), ("酒店", "0", "NA")]


BYTES = TABLE.encode()


def zipped(*names, content=BYTES):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.csv", TABLE.encode()),
        ("excel.csv", TABLE.encode("utf-8-sig")),
        ("chinese_windows.csv", TABLE.encode("gb18030")),
        ("packed.zip", zipped("inside.csv", "__MACOSX/inside.csv", "readme.txt")),
        ("misnamed.csv", zipped("inside.csv")),
    ],
)
def test_every_form_of_the_file_gives_the_same_rows(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    frame, data = load(REVIEWS, tmp_path / name)
    assert list(frame.itertuples(index=False, name=None)) == ROWS
    assert data == {
        "path": str(tmp_path / name), "sha256": hashlib.sha256(content).hexdigest(), "source": "file", "rows": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.csv", b"", "is empty"),
        ("utf16.csv", TABLE.encode("utf-16"), "UTF-8"),
        ("picture.csv", bytes(range(256)), "UTF-8"),
        ("ragged.csv", b'a,b\n1,2\n1,2,3,4\n"', "not a CSV"),
        ("blank.csv", b"\n\n", "not a CSV"),
        ("half.zip", zipped("inside.csv")[:60], "cannot be unpacked"),
        ("text.zip", TABLE.encode(), "no zip"),
        ("none.zip", zipped("readme.txt"), "holds 0 CSV files"),
        ("several.zip", zipped("a.csv", "b.csv"), "holds 2 CSV files"),
    ],
)
def test_unfit_files_are_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(REVIEWS, tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_zip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_BYTES", 10_000)
    (tmp_path / "bomb.zip").write_bytes(zipped("bomb.csv", content=b"0" * 1_000_000))
    assert (tmp_path / "bomb.zip").stat().st_size < 10_000
    with pytest.raises(UserError, match="unpacks to more than 10,000 bytes"):
        load(REVIEWS, tmp_path / "bomb.zip")


def test_missing_files_and_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        load(REVIEWS, tmp_path / "absent.csv")
    with pytest.raises(UserError, match="is a folder"):
        load(REVIEWS, tmp_path)


def test_folders_are_searched_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    monkeypatch.setenv("RNN_DATA_DIR", str(tmp_path / "shared"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "online_shopping_10_cats.csv").write_text(TABLE, encoding="utf-8")
    assert load(REVIEWS)[1]["path"] == str(tmp_path / "data" / "online_shopping_10_cats.csv")
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / REVIEWS.name).write_bytes(zipped("x.csv"))
    assert load(REVIEWS)[1]["path"] == str(tmp_path / "shared" / REVIEWS.name)


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "new" / "file.txt"
    with pytest.raises(RuntimeError), whole_file(path, "w") as stream:
        stream.write("half")
        raise RuntimeError
    assert list(path.parent.iterdir()) == []
    with whole_file(path, "w") as stream:
        stream.write("first")
    with pytest.raises(RuntimeError), whole_file(path, "w") as stream:
        stream.write("second")
        raise RuntimeError
    assert path.read_text() == "first" and [p.name for p in path.parent.iterdir()] == ["file.txt"]


# --- downloads --------------------------------------------------------------------------------------------------------

BODY = zipped("corpus.csv")


class Misbehaving(BaseHTTPRequestHandler):
    """A server whose answer depends on the path."""

    def do_GET(self):
        kind = self.path.strip("/")
        if kind == "hangup":
            self.close_connection = True
            return
        if kind == "redirect":
            self.send_response(302)
            self.send_header("Location", "http://example.invalid/corpus.zip")
            self.end_headers()
            return
        self.send_response(int(kind) if kind.isdigit() else 200)
        self.send_header("Content-Length", "many" if kind == "nonsense" else str(len(BODY)))
        self.end_headers()
        if kind == "stall":
            self.wfile.write(BODY[:20])
            self.wfile.flush()
            self.server.stalled.wait(5)
        else:
            self.wfile.write(BODY[:20] if kind == "cut" else BODY)

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Misbehaving)
    server.stalled = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.stalled.set()
    server.shutdown()


def test_a_download_arrives_whole_and_verified(server, tmp_path):
    path = download(
        f"{server}/good", tmp_path / "data" / "corpus.zip", hashlib.sha256(BODY).hexdigest()
    )
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["corpus.zip"]


@pytest.mark.parametrize("kind", ["404", "500", "503", "cut", "hangup", "stall", "nonsense"])
def test_failed_downloads_leave_nothing_and_say_why(server, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(datasets, "TIMEOUT", 0.5)
    with pytest.raises(Unreachable, match=r"^127\.0\.0\.1: "):
        download(f"{server}/{kind}", tmp_path / "data" / "corpus.zip")
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [("/good", "SHA-256"), ("/redirect", "not an https address")],
    ids=["hash", "redirect"],
)
def test_suspicious_downloads_are_refused(server, tmp_path, path, message):
    with pytest.raises(UserError, match=message):
        download(server + path, tmp_path / "data" / "corpus.zip", "0" * 64)
    assert list((tmp_path / "data").iterdir()) == []


@pytest.mark.parametrize(
    "url", ["http://example.invalid/x", "ftp://127.0.0.1/x", "file:///etc/passwd"]
)
def test_only_https_leaves_this_machine(tmp_path, url):
    with pytest.raises(UserError, match="https"):
        download(url, tmp_path / "x")


def test_no_name_resolution_and_a_dead_proxy(tmp_path, monkeypatch):
    with pytest.raises(Unreachable):
        download("https://name.invalid/x", tmp_path / "x")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    with pytest.raises(Unreachable, match="refused"):
        download("https://name.invalid/x", tmp_path / "x")


def test_a_download_that_is_too_large_is_stopped(server, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="more than 100 bytes"):
        download(f"{server}/good", tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_two_downloads_at_once_both_end_well(server, tmp_path):
    threads = [
        threading.Thread(target=download, args=(f"{server}/good", tmp_path / "corpus.zip"))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "corpus.zip").read_bytes() == BODY and len(list(tmp_path.iterdir())) == 1


def test_load_downloads_once_and_falls_back_to_the_sample(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets, "DATA_DIR", tmp_path / "data")
    monkeypatch.delenv("RNN_DATA_DIR", raising=False)
    digest = hashlib.sha256(BODY).hexdigest()
    good = Dataset("corpus.zip", f"{server}/good", digest, samples.reviews, REVIEWS.options)
    assert load(good)[1]["source"] == "download" and load(good)[1]["source"] == "file"
    frame, data = load(
        Dataset("other.zip", f"{server}/404", digest, samples.reviews, REVIEWS.options)
    )
    assert data["source"] == "sample" and len(frame) == data["rows"] == 2000
    output = capsys.readouterr().out
    assert "BUNDLED SAMPLE" in output and "404" in output


# --- the samples ------------------------------------------------------------------------------------------------------


def test_the_sample_of_reviews():
    frame = samples.reviews()
    pd.testing.assert_frame_equal(frame, samples.reviews())
    assert not frame.equals(samples.reviews(seed=1))
    assert list(frame) == ["cat", "label", "review"] and len(frame) == 2000
    assert frame["cat"].nunique() == 10 and frame["cat"].value_counts().min() >= 30
    lengths = frame["review"].str.len()
    assert lengths.min() >= 5 and lengths.quantile(0.9) > 3 * lengths.quantile(0.1)


def test_the_sample_of_temperatures():
    frame = samples.temperatures()
    pd.testing.assert_frame_equal(frame, samples.temperatures())
    stamps = pd.to_datetime(frame["Date Time"], format="%d.%m.%Y %H:%M:%S")
    assert len(frame) == 8 * 8760 + 2 * 24  # leap days of 2012 and 2016
    assert (stamps.diff().dropna() == pd.Timedelta("1h")).all()
    by_month = frame["T (degC)"].groupby(stamps.dt.month).mean()
    assert by_month[7] - by_month[1] > 15 and frame["T (degC)"].between(-40, 50).all()
