"""What the lossy tactics cost: how far images move when the deep part of the network is reused, and what is saved.

    python benchmarks/lossy.py [--model digits] [--images 64] [--out DIR]

Writes lossy.md and lossy.json: the same seeds with and without, root mean square and largest difference of pixels in
[-1, 1], and the share of the network's operations that is left. Beside them what half the steps cost, the other way to
save as much.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import fastdiff as fd  # noqa: E402

STEPS = (10, 20, 50)
CACHES = ((2, 1), (3, 1), (5, 1), (3, 2))


def work(den: fd.Denoiser, shape: tuple[int, ...], **given: Any) -> tuple[Tensor, int]:
    """Images, and the operations that the loop took."""
    with FlopCounterMode(display=False) as counter:
        x = fd.sample(den, shape, "dpmpp_2m", seed=0, run=fd.eager, **given)
    return x, counter.get_total_flops()


def moved(a: Tensor, b: Tensor) -> dict[str, float]:
    """The difference of two batches of images, once as a root mean square and once at its largest."""
    d = a - b
    return {"rms": float(d.square().mean().sqrt()), "max": float(d.abs().max())}


def measure(den: fd.Denoiser, images: int) -> list[dict[str, Any]]:
    """One line a number of steps and cache."""
    shape = (images, *den.meta["shape"])
    cond = torch.arange(images) % len(den.meta["classes"]) if den.meta.get("classes") else None
    lines = []
    for steps in STEPS:
        exact, whole = work(den, shape, steps=steps, cond=cond)
        fewer, flops = work(den, shape, steps=steps // 2, cond=cond)
        lines.append({"steps": steps, "tactic": "half the steps", "work": flops / whole, **moved(fewer, exact)})
        for every, stages in CACHES:
            x, flops = work(den, shape, steps=steps, cond=cond, reuse=fd.deep_cache(every, stages))
            name = f"deep_cache(every={every}, stages={stages})"
            lines.append({"steps": steps, "tactic": name, "work": flops / whole, **moved(x, exact)})
    return lines


def markdown(model: str, images: int, lines: list[dict[str, Any]]) -> str:
    """The lines as a table."""
    head = [
        "# fastdiff: lossy tactics",
        "",
        f"Model {model}, {images} images, dpmpp_2m, one seed; pixels in [-1, 1].",
        "",
    ]
    head += ["| steps | tactic | operations left | rms difference | largest |", "|---|---|---|---|---|"]
    rows = [f"| {r['steps']} | {r['tactic']} | {r['work']:.2f} | {r['rms']:.4f} | {r['max']:.3f} |" for r in lines]
    return "\n".join([*head, *rows, ""])


def main() -> int:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", help="what fd.load takes")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    lines = measure(fd.load(args.model), args.images)
    text = markdown(args.model, args.images, lines)
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "lossy.md").write_text(text)
    (args.out / "lossy.json").write_text(
        json.dumps({"model": args.model, "images": args.images, "lines": lines}) + "\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
