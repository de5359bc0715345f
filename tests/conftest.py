"""What the tests share: the project on the path, its scripts as a user calls them, no network."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
for name in ("HTTPS_PROXY", "HTTP_PROXY", "http_proxy", "RNN_DATA_DIR"):
    os.environ.pop(name, None)
# No server answers at port 9: a script without --data finds no real file and uses the sample.
os.environ |= {"https_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def history(folder):
    return pd.read_csv(folder / "history.csv").drop(columns="seconds")


def outcome(folder):
    """What a run found, without what differs between machines and starts."""
    metrics = read_json(folder / "metrics.json") | {"argv": None, "seconds_per_epoch": None}
    return metrics, history(folder).to_csv(), (folder / "predictions.csv").read_bytes()


@pytest.fixture(scope="session", autouse=True)
def own_data_folder(tmp_path_factory):
    """Downloads and caches of the tests go into a folder of their own, not into data/."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "DATA_DIR", tmp_path_factory.mktemp("data"))
        yield


@pytest.fixture(scope="session")
def call():
    """Run a script in this process: call(text_classify, "--epochs", 1) -> its exit status."""
    import training

    def run(module, *arguments):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
            try:
                training.run_script(module.main)
            except SystemExit as stop:
                return stop.code
            return 0

    return run


@pytest.fixture(scope="session")
def script():
    """Run a script in a process of its own: script("temp_forecast.py", "--epochs", 1)."""

    def run(*arguments, **options):
        command = [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])]
        options = {"capture_output": True, "encoding": "utf-8", "timeout": 170} | options
        options["env"] = os.environ | options.get("env", {})
        return subprocess.run(command, **options)

    return run
