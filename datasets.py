"""Where the data come from (a path, a folder, a download, the sample), and how files are written.

`load` returns a DataFrame and says where it came from.
"""

import contextlib
import hashlib
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import torch

import samples

DATA_DIR = Path(__file__).parent / "data"  # downloads and caches; git ignores it
TIMEOUT = 20  # seconds that a server may stay silent


class UserError(Exception):
    """A mistake that the user can mend: printed as one line without a traceback, exit status 2."""


@dataclass(frozen=True)
class Dataset:
    """A file known by name: its addresses, how a download is verified, and its made-up sample."""

    name: str
    urls: tuple[str, ...]
    sample: Callable[[], pd.DataFrame]
    sha256: str | None = None
    size: int | None = None  # bytes of the download
    options: dict = field(default_factory=dict)  # of pandas.read_csv


CORPUS = "datasets/online_shopping_10_cats/online_shopping_10_cats.zip"
REVIEWS = Dataset(
    "online_shopping_10_cats.zip",
    (
        "https://raw.githubusercontent.com/SophonPlus/ChineseNlpCorpus/master/" + CORPUS,
        "https://cdn.jsdelivr.net/gh/SophonPlus/ChineseNlpCorpus@master/" + CORPUS,
    ),
    samples.reviews,
    sha256="6816ded66fde9d0927ecbd370b5e12d0174d1abac35192ec014ac2a0a8d25858",
    options={"dtype": str, "keep_default_na": False},  # "NA" and "1.0" are texts too
)
CLIMATE = Dataset(
    "jena_climate_2009_2016.csv.zip",
    (
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/jena_climate_2009_2016.csv.zip",
        "https://s3.amazonaws.com/keras-datasets/jena_climate_2009_2016.csv.zip",
    ),
    samples.temperatures,
    size=13_568_290,  # its publishers state no hash
)


@contextlib.contextmanager
def whole_file(path, mode="wb", **options):
    """Open a file that appears under its name whole or not at all: written beside it, then renamed.

    mode, options: as for `open`. Raises UserError if the folder cannot be written or the disk is
    full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; free it or name another folder") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def load(dataset, path=None):
    """The DataFrame of a `Dataset`, and {"path", "sha256", "source", "rows"} of its file.

    path: a CSV, or a zip that holds one. Without it the file is looked for in RNN_DATA_DIR and in
    data/, then downloaded into data/; if no address answers, the sample is made, and a banner says
    so. Raises UserError for a file that is missing or unfit.
    """
    source, path = "file", Path(os.path.expanduser(path)) if path else find(dataset)
    if path is None:
        source, path = "download", download(dataset)
    if path is None:
        source, path, frame = "sample", "bundled sample", dataset.sample()
        content = frame.to_csv(index=False).encode()
    else:
        frame, content = read_table(path, dataset.options), path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return frame, {"path": str(path), "sha256": digest, "source": source, "rows": len(frame)}


def find(dataset):
    """The path of a dataset, zip or CSV, in the first folder that has it; None if none has."""
    named = os.path.expanduser(os.environ.get("RNN_DATA_DIR") or DATA_DIR)
    names = (dataset.name, dataset.name.removesuffix(".zip").removesuffix(".csv") + ".csv")
    paths = [Path(folder, name) for folder in (named, DATA_DIR) for name in names]
    return next((path for path in paths if os.path.isfile(path)), None)


def download(dataset):
    """Fetch a dataset into data/, from the first address that gives the right file.

    Returns its path, or None behind a banner that says why the sample takes its place. The file
    gets its name only after it has been verified: by its SHA-256, or by its size and its table.
    """
    reason, before = "no address is known", socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        DATA_DIR.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DATA_DIR, ignore_cleanup_errors=True) as folder:
            path = Path(folder, dataset.name)
            for url in dataset.urls:
                try:
                    progress = sys.stderr.isatty()
                    torch.hub.download_url_to_file(url, str(path), dataset.sha256, progress)
                    if dataset.size not in (None, path.stat().st_size):
                        raise ValueError(f"sent no file of {dataset.size:,} bytes")
                    read_table(path, dataset.options)  # compares a zip's check sum
                    return path.replace(DATA_DIR / dataset.name)
                except Exception as error:  # servers fail in many ways; each means: try the next
                    reason = f"{urlsplit(url).hostname}: {' '.join(str(error).split())[:100]}"
    except OSError as error:
        reason = f"{DATA_DIR} cannot be written: {error.strerror}"
    finally:
        socket.setdefaulttimeout(before)
    print_banner(dataset, reason)


def print_banner(dataset, reason):
    """Say that the sample stands in for a dataset, why, and how to get the real file."""
    named = os.environ.get("RNN_DATA_DIR")
    where = f"; RNN_DATA_DIR={named} does not hold it" if named else ""
    print(f"""{"*" * 100}
  BUNDLED SAMPLE: {dataset.name} could not be downloaded ({reason}){where}.
  These are made-up data: their numbers say nothing about the real ones.
  For the real ones, fetch {dataset.urls[0]}
  with a browser and put the file into {DATA_DIR}
{"*" * 100}""", flush=True)  # fmt: skip


def read_table(path, options):
    """A DataFrame from a CSV, or a zip of one, in UTF-8 or GB18030; UserError if there is none."""
    if not os.path.isfile(path):  # Path.is_file fails for names that are too long
        raise UserError(f"{path} does not exist or is no regular file; name a CSV or a zip")
    for encoding in ("utf-8-sig", "gb18030"):
        try:
            with warnings.catch_warnings():
                # Without index_col=False rows with a field too many would shift all columns.
                warnings.simplefilter("error", pd.errors.ParserWarning)
                return pd.read_csv(path, encoding=encoding, index_col=False, **options)
        except UnicodeDecodeError:
            continue
        except pd.errors.ParserWarning as error:
            raise UserError(f"{path}: row 1 has more fields than the header; correct it") from error
        except Exception as error:  # damaged files raise what pandas, zlib, LZMA, ... find first
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is no CSV table ({reason}); correct or replace it") from error
    raise UserError(f"{path} is neither UTF-8 nor GB18030 text; save it as CSV UTF-8")


def check_columns(frame, columns, path):
    """Raise UserError unless the DataFrame has all of `columns`."""
    for column in columns:
        if column not in frame.columns:
            names = ", ".join(map(str, frame.columns[:20]))
            raise UserError(f"{path} has no column {column!r}; its columns are: {names}")
