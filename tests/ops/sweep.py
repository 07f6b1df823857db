"""Cells on one backend: what `test_cells.py` runs, and other processes (Triton's interpreter, planted bugs) as well."""

from __future__ import annotations

import torch

from fastdiff.ops import dispatch, jit
from tests.ops import describe
from tests.ops.describe import Args, Description, Known
from tests.ops.describe_all import DESCRIPTIONS, cells_of
from tests.ops.pairwise import Cell

FAST_NORMALS = 5e-4
"""How far the GPU's fast functions may take a normal from the accurate one (5e-6 but where r < 0.05)."""


def runs(what: Description, backend: str) -> bool:
    """Whether the backend has a kernel for this op and can run here."""
    return backend in dispatch._table[what.op] and dispatch.reason(what.op, backend) is None


def complaints(what: Description, cell: Cell, backend: str, at: Known | None = None) -> list[str]:
    """`describe.complaints`, with what is granted to each backend."""
    interpreted = backend == "triton" and jit.INTERPRETED
    device = "cpu" if backend == "cpp" or interpreted else "cuda"
    normals = FAST_NORMALS if device == "cuda" else 1e-6
    try:
        return describe.complaints(
            what, cell, backend, at, device=device, ulps=2.0 if interpreted else 1.0, normals=normals
        )
    except dispatch.BackendUnavailable as error:
        return [str(error)]


def empty(args: Args) -> bool:
    """Nothing to compute on; PyTorch's own norm then has NaN as the gradient of a weight."""
    return any(args[k].numel() == 0 for k in ("x", "x0", "t") if k in args)


def main(backend: str, every: int, first: int = 0) -> None:
    """Every so many-th cell of each op that has such a kernel; prints what is wrong, and how many cells have run."""
    torch.set_num_threads(1)
    wrong = 0
    for name, what in DESCRIPTIONS.items():
        if not runs(what, backend):
            continue
        chosen = cells_of(name)[first::every]
        for cell in chosen:
            for line in complaints(what, cell, backend):
                print(f"{name}: {describe.named(cell)}: {line}", flush=True)
                wrong += 1
        print(f"{name}: {len(chosen)}", flush=True)
    if wrong:
        raise SystemExit(1)
