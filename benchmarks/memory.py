"""What a network takes: the resident memory of a process that has nothing else, each variant in one of its own.

    python benchmarks/memory.py "ours, prepared" [--model DDPM-CIFAR10] [--batch 4] [--threads 2]

Prints bytes: `held` once the variant has run and all that made it is gone, `peak` during three further calls, both
without what the process had with every import done; and those of the fp32 weights.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.note import Note
from benchmarks.process import command
from fastdiff.nn import prepare

DROPPED = "ours, prepared, the net dropped"
WHAT = (
    *(DROPPED, "ours, prepared", "ours, prepared exactly", "eager", "eager, channels_last"),
    *("ONNX Runtime", "OpenVINO", "MNN", "ncnn"),
)


def resident(key: str) -> int:
    """Bytes of VmRSS or VmHWM."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {key}")


def settle() -> None:
    """Give back what nobody holds, and let the peak begin anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def variant(what: str, given: Any) -> Any:
    """A call of it that holds nothing of the others. Raises KeyError, engines.NotThere."""
    from benchmarks import engines
    from benchmarks.cpu import ours, torch_rivals

    if what in engines.ENGINES:
        export = engines.Export(given.pair.theirs, given.x, given.t, given.cond)
        run = engines.build(what, export, torch.get_num_threads()).run
        export.close()
        return partial(run, *export.inputs)
    if what == DROPPED:
        return given.bound(prepare(given.pair.ours, follow=False), last=True)
    makes = {**ours(given), **{name.removeprefix(f"{given.pair.label} "): make
                               for name, make in torch_rivals(given, ()).items()}}  # fmt: skip
    return makes[what]()


def measure(what: str, model: str, batch: int) -> dict[str, int]:
    """The figures of this process."""
    from benchmarks.cpu import Given, held
    from benchmarks.models import MODELS, SMALL, pair

    # libraries are loaded and thread pools made by a small network
    with torch.no_grad():
        variant(what, Given.of(SMALL, pair(SMALL, "cpu"), batch))()
        settle()
        before = resident("VmRSS")
        given = Given.of(MODELS[model], pair(MODELS[model], "cpu"), batch)
        weights = held(given.pair.ours)
        run = variant(what, given)
        del given
        run()
        settle()
        own = resident("VmRSS") - before
        for _ in range(3):
            run()
    return {"weights": weights, "held": own, "peak": resident("VmHWM") - before}


def table(model: str, batch: int) -> dict[str, Any]:
    """All variants, and why one is not there."""
    found: dict[str, Any] = {}
    for what in WHAT:
        try:
            threads = torch.get_num_threads()
            found[what] = command("memory.py", what, "--model", model, "--batch", batch, "--threads", threads)
        except RuntimeError as error:
            found[what] = str(error)
    return found


def lines(record: dict[str, Any]) -> list[str]:
    """As Markdown."""
    out = ["| variant | peak, MB | beside one copy of the weights | between calls, MB |", "|---|---|---|---|"]
    for what, found in record.items():
        if isinstance(found, str):
            out.append(f"| {what} | not there: {found} | | |")
        else:
            beside = found["peak"] - found["weights"]
            out.append(f"| {what} | {found['peak'] / 1e6:.0f} | {beside / 1e6:.0f} | {found['held'] / 1e6:.0f} |")
    about = (
        "Resident memory of a process of its own, without what it had before the network was there; torch's compiler "
        "is not in this table, since it fills its process with itself."
    )
    return [*out, "", about, ""]


def notes() -> Iterator[Note]:
    """The table for one network."""
    yield Note("Memory: DDPM CIFAR-10, batch 4, fp32", partial(table, "DDPM-CIFAR10", 4), lines)


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=WHAT)
    parser.add_argument("--model", default="DDPM-CIFAR10")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(json.dumps(measure(args.what, args.model, args.batch)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
