"""Where the data come from: a path, a folder, a verified download, or the bundled sample; and how files are written.

`load` returns a frame and says where it came from. Nothing here knows what the data are used for.
"""

import contextlib
import hashlib
import io
import os
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from urllib.error import HTTPError
from urllib.parse import urlsplit

import pandas as pd
from tqdm import tqdm

import samples

DATA_DIR = Path(__file__).parent / "data"  # what the scripts make themselves: downloads, token caches
MAX_BYTES = 2**30  # of a CSV: thirty times the largest file of the project, far below what fills a memory
TIMEOUT = 20  # seconds that a server may stay silent


class UserError(Exception):
    """Something that a user can cause and mend: one line, printed without a traceback, exit status 2."""


class Unreachable(Exception):
    """A download that failed for want of a network or a server."""


@dataclass(frozen=True)
class Dataset:
    """A file known by name: where it is downloaded, how it is verified and read, and what makes its bundled sample."""

    name: str
    url: str
    sha256: str | None
    sample: Callable[[], pd.DataFrame]
    options: dict = field(default_factory=dict)  # of pandas.read_csv


REVIEWS = Dataset(
    "online_shopping_10_cats.zip",
    "https://raw.githubusercontent.com/SophonPlus/ChineseNlpCorpus/master/datasets/online_shopping_10_cats/online_shopping_10_cats.zip",
    "6816ded66fde9d0927ecbd370b5e12d0174d1abac35192ec014ac2a0a8d25858",
    samples.reviews,
    {"dtype": str, "keep_default_na": False},  # a review "NA" or "1.0" is a text too
)
CLIMATE = Dataset(
    "jena_climate_2009_2016.csv.zip",
    "https://storage.googleapis.com/tensorflow/tf-keras-datasets/jena_climate_2009_2016.csv.zip",
    None,  # its publisher states none: verified by its length and the check sum inside the zip
    samples.temperatures,
)


@contextlib.contextmanager
def whole_file(path, mode="wb", **options):
    """Open a file that appears under its name whole or not at all: written beside it, flushed to disk, renamed.

    mode, options: as for `open`. Raises UserError if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; name another folder, or free this one") from error
    try:
        with open(descriptor, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that only their owner reads
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free some space or name another folder"
        ) from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load(dataset, path=None):
    """The frame of a `Dataset` and a dict {"path", "sha256", "source", "rows"} that says which file it is.

    path: a CSV, or a zip that holds one; without it the file is looked for in RNN_DATA_DIR and in data/, then
    downloaded into data/; where that fails for want of a network, the bundled sample is made, and a banner says so.
    Raises UserError for a file that is missing or unfit.
    """
    source = "file"
    if path is None:
        try:
            path, source = _find(dataset)
        except Unreachable as error:
            frame = dataset.sample()
            print(f"{'*' * 100}\n  BUNDLED SAMPLE: {dataset.name} is not here and could not be downloaded ({error}).")
            print(
                f"  What follows is made-up data: its numbers say nothing about the real ones.\n{'*' * 100}", flush=True
            )
            digest = hashlib.sha256(frame.to_csv(index=False).encode()).hexdigest()
            return frame, {"path": "bundled sample", "sha256": digest, "source": "sample", "rows": len(frame)}
    content = _read(Path(path))
    frame = _parse(_csv_of(content, path), path, dataset.options)
    digest = hashlib.sha256(content).hexdigest()
    return frame, {"path": str(path), "sha256": digest, "source": source, "rows": len(frame)}


def _find(dataset):
    """(path, "file" or "download") of a dataset for which no path was given; Unreachable if there is no network."""
    for folder in filter(None, (os.environ.get("RNN_DATA_DIR"), DATA_DIR)):
        for name in (dataset.name, dataset.name.removesuffix(".zip").removesuffix(".csv") + ".csv"):
            if (Path(folder) / name).is_file():
                return Path(folder) / name, "file"
    return download(dataset.url, DATA_DIR / dataset.name, dataset.sha256), "download"


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, stream, code, message, headers, url):
        _check_url(url)
        return super().redirect_request(request, stream, code, message, headers, url)


def _check_url(url):
    parts = urlsplit(url)
    if parts.scheme != "https" and not (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost")):
        raise UserError(f"{url} is not an https address; download the file by hand and name it with --data")


def download(url, path, sha256=None):
    """Fetch url into the file `path`, which appears only when it is whole and its SHA-256 is right; returns `path`.

    sha256: hex digest, or None where none is published. Proxies are those of the usual environment variables.
    Raises Unreachable if no server answers, it refuses, or the connection breaks; UserError for a wrong digest, an
    address that is neither https nor on this machine, and a folder that cannot be written.
    """
    _check_url(url)
    digest = hashlib.sha256()
    with whole_file(path) as stream:
        for block in _blocks(url, Path(path).name):
            digest.update(block)
            stream.write(block)
        if sha256 and digest.hexdigest() != sha256:
            raise UserError(
                f"{url} has SHA-256 {digest.hexdigest()}, not {sha256}; try again, or name a file with --data"
            )
    return path


def _blocks(url, name):
    """What a server sends, block by block, behind a progress bar; Unreachable if it does not send all of it."""
    received = 0
    try:
        with urllib.request.build_opener(_SafeRedirects).open(url, timeout=TIMEOUT) as response:
            length = int(response.headers.get("Content-Length") or 0)
            with tqdm(total=length or None, unit="B", unit_scale=True, desc=name, disable=None) as bar:
                while block := response.read(2**16):
                    received += len(block)
                    if received > MAX_BYTES:
                        raise UserError(f"{url} sends more than {MAX_BYTES:,} bytes; it is not the expected file")
                    yield block
                    bar.update(len(block))
    except (OSError, HTTPException, ValueError) as error:  # URLError, time-outs, broken connections are OSErrors
        reason = error if isinstance(error, HTTPError) else getattr(error, "reason", error)
        raise Unreachable(f"{urlsplit(url).hostname}: {reason}") from error
    if received < length:
        raise Unreachable(f"{urlsplit(url).hostname}: connection cut after {received:,} of {length:,} bytes")


def _read(path):
    """The bytes of a file; UserError if it is missing, a folder, empty, too large or unreadable."""
    try:
        if path.is_dir():
            raise UserError(f"{path} is a folder; name the CSV or zip file in it")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES:,} bytes; name a smaller file")
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    if not content:
        raise UserError(f"{path} is empty; name a file with data")
    return content


def _csv_of(content, path):
    """The bytes of the CSV: the content itself, or the one CSV in the zip; UserError for any other zip."""
    if not content.startswith(b"PK\x03\x04"):
        if str(path).lower().endswith(".zip"):
            raise UserError(f"{path} is no zip file; it may be half downloaded: delete it and fetch it again")
        return content
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [name for name in archive.namelist() if name.lower().endswith(".csv") and "__MACOSX" not in name]
            if len(names) != 1:
                raise UserError(f"{path} holds {len(names)} CSV files instead of one; unpack it and name the right one")
            if archive.getinfo(names[0]).file_size > MAX_BYTES:
                raise UserError(f"{path} unpacks to more than {MAX_BYTES:,} bytes; name a smaller file")
            return archive.read(names[0])
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f"{path} cannot be unpacked ({error}); fetch it again, or unpack it by hand") from error


def _parse(content, path, options):
    """A frame from CSV bytes in UTF-8, with or without BOM, or GB18030; UserError if they are neither."""
    for encoding in ("utf-8-sig", "gb18030"):
        with contextlib.suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            break
    else:
        raise UserError(f"{path} is neither UTF-8 nor GB18030 text; save it as CSV UTF-8")
    try:
        return pd.read_csv(io.StringIO(text), **options)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise UserError(f"{path} is not a CSV table ({str(error).strip()}); check its columns and quotes") from error


def check_columns(frame, columns, path):
    """UserError unless the frame has all of `columns`."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        names = ", ".join(map(str, frame.columns[:20]))
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are: {names}")
