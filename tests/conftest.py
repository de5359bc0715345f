"""What the tests share: small data, no network, the scripts as a user calls them."""

import json
import os
import sys

import numpy as np
import pandas as pd
import pytest
import torch

from support import datasets, options, plots, samples

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
    """A CSV of 1000 days: noise p, and a temperature that feels the p of two days ago.

    T_t = 10 + x_t + p_t-2 with x_t = 0.8 x_t-1 + noise.
    """
    noise, p = np.random.default_rng(0).standard_normal((2, 1000))
    x = pd.Series(noise).ewm(alpha=0.2, adjust=False).mean() / 0.2
    frame = pd.DataFrame()
    frame["Date Time"] = pd.date_range("2009-01-01", periods=1000).strftime("%d.%m.%Y %H:%M:%S")
    frame["p (mbar)"] = p
    frame["T (degC)"] = 10 + x + pd.Series(p).shift(2, fill_value=0)
    path = tmp_path_factory.mktemp("series") / "daily.csv"
    frame.to_csv(path, index=False)
    return path


def run_main(script, *arguments):
    """Call a script's main() with these arguments; pictures are drawn, but not saved."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        patch.setattr(plots, "save", lambda figure, path: None)
        script.main()


def exit_status(script, *arguments):
    """The exit status of a script called with these arguments, as a started script ends."""
    try:
        options.run_script(lambda: run_main(script, *arguments))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="session", name="run_main")
def run_main_fixture():
    """`run_main(script, *arguments)`."""
    return run_main


@pytest.fixture(scope="session", name="exit_status")
def exit_status_fixture():
    """`exit_status(script, *arguments)`."""
    return exit_status


@pytest.fixture(scope="session")
def read_json():
    """`read_json(path)`: the content of a JSON file."""
    return lambda path: json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def outcome():
    """`outcome(run)`: what a run found to the last bit, without what differs between starts."""

    def read(run):
        metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
        del metrics["argv"], metrics["seconds_per_epoch"]
        history = pd.read_csv(run / "history.csv").drop(columns="seconds").to_csv()
        weights = torch.load(run / "best.pt")["weights"]
        weights = {name: tensor.tolist() for name, tensor in weights.items()}
        return metrics, history, weights, (run / "predictions.csv").read_bytes()

    return read
