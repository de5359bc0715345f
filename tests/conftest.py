"""What the tests share: small data, no network, the scripts as a user calls them."""

import json
import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from support import datasets, plots, samples

for name in ("HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "RNN_DATA_DIR"):
    os.environ.pop(name, None)
# No server answers at port 9: a script without --data finds no real file and uses the sample.
os.environ["https_proxy"] = "http://127.0.0.1:9"
os.environ["no_proxy"] = "127.0.0.1"


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory):
    """Downloads and caches of the tests go into a folder of their own, not into data/."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "DATA_DIR", folder)
        yield folder


@pytest.fixture(scope="session")
def reviews_path(tmp_path_factory):
    """A CSV of 150 made-up reviews."""
    path = tmp_path_factory.mktemp("reviews") / "reviews.csv"
    samples.reviews(rows=150).to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def daily_path(tmp_path_factory):
    """A CSV of 1000 days: noise p, and a temperature that feels the p of two days ago."""
    noise, p = np.random.default_rng(0).standard_normal((2, 1000))
    frame = pd.DataFrame()
    frame["Date Time"] = pd.date_range("2009-01-01", periods=1000).strftime("%d.%m.%Y %H:%M:%S")
    frame["p (mbar)"] = p
    frame["T (degC)"] = 10 + noise + 2 * np.roll(p, 2)
    path = tmp_path_factory.mktemp("series") / "daily.csv"
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="session")
def run_main():
    """`run_main(script, *arguments)`: call its main(); pictures are drawn, but not saved."""

    def run_main(script, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
            patch.setattr(plots, "save", lambda figure, path: None)
            script.main()

    return run_main


@pytest.fixture(scope="session")
def read_json():
    """`read_json(path)`: the content of a JSON file."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def outcome():
    """`outcome(folder)`: a run's history without times, and its best weights, to the last bit."""

    def read(folder):
        history = pd.read_csv(folder / "history.csv").drop(columns="seconds").to_csv()
        weights = torch.load(folder / "best.pt")["weights"]
        return history, {name: tensor.tolist() for name, tensor in weights.items()}

    return read
