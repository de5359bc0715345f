"""What the tests share: the project on the path, and its scripts called as a user calls them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def script():
    """Run a script of the project in a process of its own: script("temp_forecast.py", "--epochs", 1)."""

    def run(*arguments, **options):
        # No server answers at port 9, so that the tests never download: without --data they use the bundled sample.
        environment = {**os.environ, "https_proxy": "http://127.0.0.1:9", **options.pop("env", {})}
        environment.pop("RNN_DATA_DIR", None)
        return subprocess.run(
            [sys.executable, ROOT / arguments[0], *map(str, arguments[1:])],
            capture_output=True, encoding="utf-8", env=environment, timeout=170, **options,
        )  # fmt: skip

    return run
