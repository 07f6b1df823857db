"""Python in a process of its own that sees the package under test, and not the checkout it may be run from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastdiff

HOME = Path(fastdiff.__file__).parents[1]


def environment(home: Path = HOME, **variables: str) -> dict[str, str]:
    """This process's, without its FASTDIFF_ variables, with the package at `home`."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FASTDIFF_")}
    return plain | {"PYTHONPATH": str(home)} | variables


def python(*args: str, home: Path = HOME, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGS...`; variables are added to its environment."""
    return subprocess.run(
        [sys.executable, "-P", *args],
        env=environment(home, **variables),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
