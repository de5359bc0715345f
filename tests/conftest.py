"""What the tests share: the project on the path, its scripts as a user calls them, no network."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import datasets
import plots
import training

NAMES = {"rnn": "RNN", "gru": "GRU", "lstm": "LSTM", "bilstm": "Bi-LSTM"}
for name in ("HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "RNN_DATA_DIR"):
    os.environ.pop(name, None)
# No server answers at port 9: a script without --data finds no real file and uses the sample.
os.environ |= {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}


@pytest.fixture(scope="session", autouse=True)
def own_data_folder(tmp_path_factory):
    """Downloads and caches of the tests go into a folder of their own, not into data/."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "DATA_DIR", tmp_path_factory.mktemp("data"))
        yield


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def history(run):
    return pd.read_csv(run / "history.csv").drop(columns="seconds")


def outcome(run):
    """What a run found to the last bit, without what differs between machines and starts."""
    metrics = read_json(run / "metrics.json") | {"argv": None, "seconds_per_epoch": None}
    weights = torch.load(run / "best.pt")["weights"]
    weights = {name: tensor.tolist() for name, tensor in weights.items()}
    return metrics, weights, history(run).to_csv(), (run / "predictions.csv").read_bytes()


def run_main(script, *arguments, pictures=()):
    """Call a script's main() with these arguments; pictures: the folders that get theirs."""

    def only_there(draw):
        return lambda path, *rest: draw(path, *rest) if path.parent.name in pictures else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        for name in filter(lambda name: name.startswith("draw_"), dir(plots)):
            patch.setattr(plots, name, only_there(getattr(plots, name)))
        script.main()


def exit_status(script, *arguments, pictures=()):
    """Call a script as `run_main` does, with the way out of a started script."""
    try:
        training.run_script(lambda: run_main(script, *arguments, pictures=pictures))
    except SystemExit as stop:
        return stop.code
    return 0


def assert_loops_agree(script, options, folder):
    """The plain loops and the fast ones train the same network."""
    for loops in ("plain", "fast"):
        run_main(script, *options, "--loops", loops, "--out", folder / loops)
    plain, fast = (history(next(folder.glob(f"{loops}/t*_*"))) for loops in ("plain", "fast"))
    assert len(plain) == 1 and np.allclose(plain, fast, rtol=0, atol=1e-4)


def assert_a_resumed_run_repeats(script, options, folder):
    """A run of four epochs, stopped while it saves the third and resumed, is the run left alone."""
    run_main(script, *options, "--out", folder / "alone")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training, "write_csv", Mock(side_effect=[None, None, KeyboardInterrupt]))
        run_main(script, *options, "--out", folder / "stopped")
    alone, run = (next(folder.glob(f"{name}/t*_*")) for name in ("alone", "stopped"))
    assert not (run / "metrics.json").exists()
    run_main(script, *options, "--out", folder / "stopped", "--resume")
    assert outcome(run) == outcome(alone)


def assert_a_killed_run_repeats(script, options, folder, kills):
    """A run that is killed at random instants and resumed each time is the run left alone."""
    code = f"import datasets, pathlib, sys, training, {script.__name__} as script;"
    code += "datasets.DATA_DIR = pathlib.Path(sys.argv.pop(1)); training.run_script(script.main)"

    def begin(name):
        command = [sys.executable, "-c", code, folder, *options, "--resume", "--out", folder / name]
        quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(map(str, command), cwd=Path(script.__file__).parent, **quiet)

    begin("alone").communicate()
    (alone,) = folder.glob("alone/t*_*")
    expected, run = outcome(alone), folder / "killed" / alone.name
    random.seed(0)
    for _ in range(kills):
        process = begin("killed")
        next(line for line in process.stdout if b"parameters" in line)  # training begins
        time.sleep(random.uniform(0, 0.4))
        process.kill()
        process.communicate()
        if (run / "metrics.json").exists():  # it was finished: from the start again
            assert outcome(run) == expected
            (run / "last.pt").unlink()
    begin("killed").communicate()
    assert outcome(run) == expected and not list(run.glob(".*.part"))
