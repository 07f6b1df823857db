"""`fastdiff train`: a U-Net from images to a checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fastdiff.cli.options import at_least, checkpoint, device, new_folder, opt
from fastdiff.cli.sample import GUIDANCE

if TYPE_CHECKING:
    from fastdiff import Denoiser
    from fastdiff.files.data import Data

LOG_EVERY = 50
"""Steps between two lines of log.jsonl, whose loss is the mean over them."""


@dataclasses.dataclass
class Options:
    """Train a U-Net; write a checkpoint folder (averaged weights) with its log.jsonl and a samples.png.

    fastdiff train --data digits --out digits-model && fastdiff sample --model digits-model
    """

    out: str = opt("", "the new checkpoint folder", "DIR", auto="none, must be given")
    data: str = opt("digits", "digits, a folder of images (a subfolder a class), an .npz or an IDX file", "NAME|PATH")
    size: int | None = opt(None, "resize and crop images to this many pixels", "INT", auto="as they are")
    broken: Literal["stop", "skip"] = opt("stop", "what to do at an image file that cannot be read")
    labels: bool = opt(True, "condition on the classes, where the data has them")
    drop: float = opt(0.1, "share of images whose class is hidden, which guidance needs")
    steps: int = opt(500, "optimizer steps")
    batch: int = opt(64, "images a step")
    lr: float = opt(1e-3, "AdamW's learning rate")
    ema: float = opt(0.999, "decay of the averaged weights")
    seed: int = opt(0, "of the weights, the noise and the order of the data")
    channels: int = opt(32, "channels of the first level")
    mults: str = opt("1,2", "channels of each level as multiples of the first's", "LIST")
    blocks: int = opt(1, "residual blocks a level")
    schedule: Literal["cosine", "linear"] = opt("cosine", "noise schedule, 1000 steps")
    predicts: Literal["v", "eps", "x0"] = opt("v", "what the network learns to predict")
    device: str | None = opt(None, "cpu, cuda, cuda:1", "NAME", auto="cuda where there is one, else cpu")
    overwrite: bool = opt(False, "replace the checkpoint that --out holds")
    progress: bool = opt(True, "draw a progress bar")


def run(options: Options) -> int:
    """Check all that can be checked, train, write checkpoint, log and grid, and say in one line what was done."""
    o = options
    at_least(1, steps=o.steps, batch=o.batch, channels=o.channels, blocks=o.blocks, size=o.size)
    at_least(0, seed=o.seed)
    mults = _mults(o.mults)
    out = new_folder(o.out, o.overwrite, checkpoint)
    where = device(o.device)
    import torch

    import fastdiff as fd
    from fastdiff.files.data import load_data

    data = load_data(o.data, size=o.size, broken=o.broken)
    if not o.labels:
        data = data._replace(labels=None, classes=())
    torch.manual_seed(o.seed)
    den = _denoiser(o, data, mults)
    cast("torch.nn.Module", den.net).to(where)
    start, log, ema = time.perf_counter(), [], den
    recent: list[Any] = []
    steps = fd.fit(
        den, data, lr=o.lr, ema=o.ema, batch=o.batch, steps=o.steps, drop=o.drop, seed=o.seed, progress=o.progress
    )
    for step in steps:
        ema = step.ema
        recent.append(step.loss)
        if (step.i + 1) % LOG_EVERY == 0 or step.i + 1 == o.steps:
            mean = float(torch.stack(recent).mean())
            if not math.isfinite(mean):
                raise FloatingPointError(
                    f"the loss is not a number after step {step.i}; pass a smaller --lr than {o.lr}"
                )
            log.append({"step": step.i + 1, "loss": mean, "seconds": round(time.perf_counter() - start, 2)})
            recent.clear()
    _write(o, out, ema, data, log)
    losses = f"loss {log[0]['loss']:.4f} -> {log[-1]['loss']:.4f}"
    print(f"{out}: {o.steps} steps in {log[-1]['seconds']:.0f} s on {where}, {losses}; fastdiff sample --model {out}")
    return 0


def _mults(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--mults {text!r} is no list of multiples; pass whole numbers from 1, such as 1,2,2")
    return tuple(int(part) for part in parts)


def _denoiser(o: Options, data: Data, mults: tuple[int, ...]) -> Denoiser:
    """An untrained Denoiser that fits the data, with the defaults that `fastdiff sample` will use."""
    import fastdiff as fd

    channels, height, width = data.images.shape[1:]
    classes = len(data.classes) if data.labels is not None else 0
    if height % 2 ** (len(mults) - 1) or width % 2 ** (len(mults) - 1):
        raise ValueError(
            f"--mults {o.mults} halves the image {len(mults) - 1} times, but {height}x{width} does not divide by "
            f"{2 ** (len(mults) - 1)}; pass fewer multiples or another --size"
        )
    # attention on the half-size maps, where there are any
    attention = (2,) if len(mults) > 1 else ()
    net = fd.UNet(
        in_channels=channels,
        channels=o.channels,
        mults=mults,
        blocks=o.blocks,
        attention=attention,
        classes=classes or None,
        null_class=o.drop > 0,
    )
    schedule = fd.cosine() if o.schedule == "cosine" else fd.linear()
    own = ("out", "device", "overwrite", "progress")
    training = {k: v for k, v in dataclasses.asdict(o).items() if k not in own} | {"data": Path(o.data).name}
    meta = {
        "name": Path(o.out).name,
        "shape": [channels, height, width],
        "classes": [str(name) for name in data.classes],
        "training": training,
    }
    return fd.Denoiser(net, schedule, predicts=o.predicts, defaults={"clip": 1.0}, meta=meta)


def _write(o: Options, out: Path, ema: Denoiser, data: Data, log: list[dict[str, Any]]) -> None:
    """The checkpoint, then beside it the log and a grid of samples."""
    import torch

    import fastdiff as fd

    fd.save(ema, out)
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    count = len(data.classes) if data.labels is not None else 0
    columns = count if 0 < count <= 20 else 8
    n = 4 * columns
    cond = torch.arange(n) % count if count else None
    guidance = fd.cfg(GUIDANCE) if count and o.drop > 0 else None
    x = fd.sample(ema, (n, *data.images.shape[1:]), seed=o.seed, cond=cond, guidance=guidance)
    fd.save_grid(x, out / "samples.png", columns=columns)
