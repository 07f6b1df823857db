"""What a report says of the machine that it was measured on."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent


def machine(device: str) -> dict[str, Any]:
    """What a reader must know to repeat a figure."""
    import fastdiff

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    changed = _git("status", "--porcelain", "--", "fastdiff", "csrc", "benchmarks/*.py")
    return {
        **(_gpu() if device.startswith("cuda") else {"device": _processor()}),
        "threads": torch.get_num_threads(),
        "commit": (_git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else ""),
        "date": time.strftime("%Y-%m-%d"),
        "fastdiff": fastdiff.__version__,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "triton", "numpy", "diffusers")},
    }


def _git(*args: str) -> str:
    """What git says of this checkout, nothing where there is none."""
    return _said("git", *args)


def _said(*command: str) -> str:
    """What a program prints, nothing where there is none."""
    try:
        done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


def _gpu() -> dict[str, Any]:
    """Its name, and what lies between it and torch."""
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver[0] if driver else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _processor() -> str:
    """The processor's name and the vector instructions that decide its speed."""
    name, flags = platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            if key.strip() == "flags":
                flags = value
    except OSError:
        pass
    best = next((isa for isa in ("amx_tile", "avx512f", "avx2") if isa in flags.split()), "")
    return f"{name} {best}".strip()
