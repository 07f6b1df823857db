"""A row on a CPU that is held to AVX2: ours and PyTorch, in a process of its own, since both choose at import.

    python benchmarks/forced.py [--model DDPM-CIFAR10] [--batch 4] [--rounds 15] [--threads 2]

Prints the record of the case. The other engines have no switch for it and are not in this row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import network_table
from benchmarks.note import Note
from benchmarks.process import command

AVX2 = {
    "FASTDIFF_ISA": "v3",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}
"""What ours, PyTorch with its compiler, oneDNN and MKL read."""


def measured(model: str, batch: int, rounds: int, modes: tuple[str, ...]) -> dict[str, Any]:
    """The record of the row in this process."""
    from benchmarks.bench_unet import Row, case
    from benchmarks.models import MODELS
    from benchmarks.run import measure, settle_allocator

    settle_allocator()
    made = case(Row(MODELS[model], model, batch, modes, ()))
    return {**measure(made, rounds, "cpu", False), "capability": torch.backends.cpu.get_cpu_capability()}


def lines(record: dict[str, Any]) -> list[str]:
    """As any row, and what holds it back."""
    said = ", ".join(f"{name}={value}" for name, value in AVX2.items())
    return [*network_table.lines(record)[2:], f"With {said}; PyTorch runs its {record['capability']} code.", ""]


def notes() -> Iterator[Note]:
    """The row."""
    threads = torch.get_num_threads()
    args = ("--model", "DDPM-CIFAR10", "--batch", 4, "--threads", threads)
    yield Note(
        "U-Net DDPM CIFAR-10, batch 4, fp32, AVX2 alone", partial(command, "forced.py", *args, variables=AVX2), lines
    )


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DDPM-CIFAR10")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="compile nothing")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measured(args.model, args.batch, args.rounds, () if args.eager else ("freezing",))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
