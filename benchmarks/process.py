"""Another script of this folder in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


def command(
    script: str, *args: object, variables: dict[str, str] | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """The JSON that it prints last; variables are added to its environment.

    Raises RuntimeError with the last line of what went wrong, and after `timeout` seconds.
    """
    try:
        done = subprocess.run(
            [sys.executable, str(HERE / script), *map(str, args)],
            env=os.environ | (variables or {}), capture_output=True, text=True, check=False, timeout=timeout,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"no result after {timeout:.0f} seconds") from error
    if done.returncode != 0:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    record: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return record
