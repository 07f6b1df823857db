"""Python in a process of its own that sees the package under test, and not the checkout it may be run from."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastdiff
from fastdiff.ops import native

HOME = Path(fastdiff.__file__).parents[1]
ROOT = Path(__file__).parents[1]


def environment(home: Path = HOME, **variables: str) -> dict[str, str]:
    """This process's, without its FASTDIFF_ variables, with the package at `home`."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FASTDIFF_")}
    return plain | {"PYTHONPATH": str(home)} | variables


def together(*commands: Sequence[str], seconds: float, **variables: str) -> list[subprocess.CompletedProcess[str]]:
    """Commands that run beside one another, one core each, and what they printed; variables as in `python`."""

    def one(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        own = environment(**{"OMP_NUM_THREADS": "1"} | variables)
        return subprocess.run(command, env=own, capture_output=True, text=True, timeout=seconds, check=False)

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(one, commands))


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


def nothing_wrong_on(isa: str, complaints: Callable[[], Iterable[str]]) -> None:
    """`complaints`, a function of a test module, has none in a process held to an instruction set, where it runs."""
    if isa not in native.cpu.isas:
        pytest.skip(f"{isa} does not run here")
    module, name = complaints.__module__, complaints.__name__
    code = (
        f"import sys; sys.path.append({str(ROOT)!r}); from fastdiff.ops import native; "
        f"from {module} import {name}; print(native.isa(), *{name}(), sep='; ')"
    )
    done = python("-c", code, FASTDIFF_ISA=isa, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == isa
