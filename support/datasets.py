"""Where the data come from: a path, a folder, a download, the sample.

`load` returns a DataFrame and says where it came from.
"""

import hashlib
import io
import os
import socket
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pandas as pd
import torch

from support import samples
from support.files import UserError

DATA_DIR = Path(__file__).parent.parent / "data"  # downloads and caches; git ignores it
TIMEOUT = 20  # seconds that a server may stay silent
JENA_ROWS = 420_551  # of the official file, at steps of ten minutes
JENA_COLUMNS = [
    "Date Time", "p (mbar)", "T (degC)", "Tpot (K)", "Tdew (degC)", "rh (%)", "VPmax (mbar)",
    "VPact (mbar)", "VPdef (mbar)", "sh (g/kg)", "H2OC (mmol/mol)", "rho (g/m**3)", "wv (m/s)",
    "max. wv (m/s)", "wd (deg)",
]  # fmt: skip


def check_jena(frame):
    """Raise ValueError unless a DataFrame is the official Jena series.

    Its two addresses send the same table in different zips, so a hash could not tell.
    """
    if list(frame.columns) != JENA_COLUMNS or len(frame) != JENA_ROWS:
        raise ValueError(f"sent {len(frame)} rows and {len(frame.columns)} columns, another table")
    if frame["Date Time"].iloc[0] != "01.01.2009 00:10:00":
        raise ValueError("sent a table that does not begin at 01.01.2009 00:10:00")


@dataclass(frozen=True)
class Dataset:
    """A file known by name: its addresses, how a download is verified, and its made-up sample."""

    name: str
    urls: tuple[str, ...]
    sample: Callable[[], pd.DataFrame]
    sha256: str | None = None  # of the download, or None where `check` verifies its table
    check: Callable[[pd.DataFrame], None] = lambda frame: None
    options: dict = field(default_factory=dict)  # of pandas.read_csv


CORPUS = "datasets/online_shopping_10_cats/online_shopping_10_cats.zip"
REVIEWS = Dataset(
    name="online_shopping_10_cats.zip",
    urls=(
        "https://raw.githubusercontent.com/SophonPlus/ChineseNlpCorpus/master/" + CORPUS,
        "https://cdn.jsdelivr.net/gh/SophonPlus/ChineseNlpCorpus@master/" + CORPUS,
    ),
    sample=samples.reviews,
    sha256="6816ded66fde9d0927ecbd370b5e12d0174d1abac35192ec014ac2a0a8d25858",
    options={"dtype": str, "keep_default_na": False},  # "NA" and "1.0" are texts too
)
CLIMATE = Dataset(
    name="jena_climate_2009_2016.csv.zip",
    urls=(
        "https://storage.googleapis.com/tensorflow/tf-keras-datasets/jena_climate_2009_2016.csv.zip",
        "https://s3.amazonaws.com/keras-datasets/jena_climate_2009_2016.csv.zip",
    ),
    sample=samples.temperatures,
    check=check_jena,
)


def load(dataset, path=None):
    """The DataFrame of a `Dataset`, and {"path", "sha256", "source", "rows"} of its file.

    path: a CSV, or a zip that holds one. Without it the file is looked for in RNN_DATA_DIR and in
    data/, then downloaded into data/; if no address answers, the sample is made, and a banner says
    so. Raises UserError for a file that is missing or unfit.
    """
    source = "file"
    path = Path(os.path.expanduser(path)) if path else find(dataset)
    if path is None:
        source = "download"
        path = download(dataset)
    if path is None:
        source = "sample"
        path = "bundled sample"
        frame = dataset.sample()
        content = frame.to_csv(index=False).encode()
    else:
        frame = read_table(path, dataset.options)
        content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    return frame, {"path": str(path), "sha256": digest, "source": source, "rows": len(frame)}


def find(dataset):
    """The path of a dataset, zip or CSV, in the first folder that has it; None if none has."""
    named_folder = Path(os.path.expanduser(os.environ.get("RNN_DATA_DIR") or DATA_DIR))
    csv_name = dataset.name.removesuffix(".zip").removesuffix(".csv") + ".csv"
    for folder in (named_folder, DATA_DIR):
        for name in (dataset.name, csv_name):
            if (folder / name).is_file():
                return folder / name
    return None


def download(dataset):
    """Fetch a dataset into data/, from the first address that gives the right file.

    Returns its path, or None behind a banner that says why the sample takes its place. The file
    gets its name only after it has been verified, by its SHA-256 or by its table.
    """
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        DATA_DIR.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=DATA_DIR, ignore_cleanup_errors=True) as folder:
            path = Path(folder, dataset.name)
            for url in dataset.urls:
                try:
                    fetch(dataset, url, path)
                    return path.replace(DATA_DIR / dataset.name)
                except Exception as error:  # servers fail in many ways; each means: try the next
                    reason = f"{urlsplit(url).hostname}: {' '.join(str(error).split())[:100]}"
    except OSError as error:
        reason = f"{DATA_DIR} cannot be written: {error.strerror}"
    finally:
        socket.setdefaulttimeout(timeout_before)
    print_banner(dataset, reason)
    return None


def fetch(dataset, url, path):
    """Download a dataset from one address and verify it; raises whatever goes wrong."""
    is_terminal = sys.stderr.isatty()
    torch.hub.download_url_to_file(url, str(path), dataset.sha256, progress=is_terminal)
    frame = read_table(path, dataset.options)  # a zip's check sums are compared here
    dataset.check(frame)


def print_banner(dataset, reason):
    """Say that the sample stands in for a dataset, why, and how to get the real file."""
    named_folder = os.environ.get("RNN_DATA_DIR")
    where = f"; RNN_DATA_DIR={named_folder} does not hold it" if named_folder else ""
    stars = "*" * 100
    text = f"""{stars}
  BUNDLED SAMPLE: {dataset.name} could not be downloaded ({reason}){where}.
  These are made-up data: their numbers say nothing about the real ones.
  For the real ones, fetch {dataset.urls[0]}
  with a browser and put the file into {DATA_DIR}
{stars}"""
    print(text, flush=True)


def read_table(path, options):
    """A DataFrame from a CSV, or a zip of one; options: of pandas.read_csv.

    The header's separator is a comma, a semicolon or a tab; where it is a semicolon, numbers may
    have a decimal comma. Raises UserError for a file without such a table.
    """
    try:
        text = decode(csv_content(path))
        header = text.split("\n", 1)[0]
        separator = max(";\t,", key=header.count)  # a tie: "T, degC" may be a name
        decimal = "," if separator == ";" else "."
        with warnings.catch_warnings():
            # With a field too many in row 1 pandas would take the first column for an index and
            # shift the others. With index_col=False it warns; the warning is made an error.
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.StringIO(text), sep=separator, decimal=decimal, index_col=False, **options
            )
        if decimal == "," and "dtype" not in options:
            # Where a column holds a text, pandas leaves all its numbers as texts with a comma.
            frame = frame.replace(r"^\s*([+-]?\d+),(\d+)\s*$", r"\1.\2", regex=True)
        if frame.empty:
            raise UserError(f"{path} has no rows under its header; name another file")
        return frame
    except UserError:
        raise
    except pd.errors.ParserWarning as error:
        raise UserError(f"{path}: row 1 has more fields than the header; correct it") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8, UTF-16 or GB18030; save it as UTF-8") from error
    except Exception as error:  # damaged files raise what pandas, zlib, LZMA, ... find first
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is no CSV table ({reason}); correct or replace it") from error


def csv_content(path):
    """The bytes of a CSV file, or of the one CSV file in a zip.

    Beside it, a zip made on a Mac holds "__MACOSX/._NAME.csv", which is no table.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no regular file; name a CSV or a zip")
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        tables = []
        for name in archive.namelist():
            if name.lower().endswith(".csv") and not Path(name).name.startswith("._"):
                tables.append(name)
        if len(tables) != 1:
            raise UserError(f"{path} holds {len(tables)} CSV files; name a CSV or a zip of one")
        return archive.read(tables[0])  # compares the check sum


def decode(content):
    """Bytes as text: UTF-16 where its mark stands in front, else UTF-8, else GB18030."""
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        return content.decode("utf-16")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("gb18030")


def check_columns(frame, columns, path):
    """Raise UserError unless the DataFrame has all of `columns`."""
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        names = ", ".join(map(str, frame.columns[:20]))
        raise UserError(f"{path} has no column {missing[0]!r}; its columns are: {names}")
