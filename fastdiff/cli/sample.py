"""`fastdiff sample`: images from a model into a grid, a folder or an array."""

from __future__ import annotations

import dataclasses
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from fastdiff.cli.options import at_least, device, opt

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from fastdiff import Denoiser

GUIDANCE = 2.0
"""The weight w of fd.cfg for a model with classes, unless --guidance says otherwise."""


@dataclasses.dataclass
class Options:
    """Sample images from a diffusion model.

    Without options: 64 digits, the ten classes in turn, from the model in the package, written to samples.png.
    """

    model: str = opt("digits", "a checkpoint folder, a model in the package, or org/name on the hub", "NAME|DIR")
    out: str = opt("samples.png", "NAME.png: one grid; NAME.npz: arr_0, uint8 NHWC, and labels; else a folder of PNGs")
    n: int = opt(64, "number of images")
    class_: str | None = opt(
        None, "classes by name or number, cycled over the images: 3,7", "LIST", name="class", auto="all in turn"
    )
    solver: str | None = opt(
        None, "ddim, ddpm, euler, heun, dpmpp_2m, dpmpp_3m_sde", "NAME", auto="the model's, else ddim"
    )
    steps: int | None = opt(None, "grid intervals", "INT", auto="the model's, else 50")
    spacing: str | None = opt(
        None, "of the grid: trailing, leading, linspace, quad, karras, ...", "NAME", auto="the model's"
    )
    eta: float | None = opt(
        None, "noise of ddim and dpmpp_3m_sde: 0 none, 1 as much as ddpm", "FLOAT", auto="the solver's"
    )
    guidance: float | None = opt(
        None, "w of F_u + w (F_c - F_u); 1 is none", "FLOAT", auto=f"{GUIDANCE} for a model with classes"
    )
    clip: float | None = opt(None, "bound on |x0|; inf is none", "FLOAT", auto="the model's")
    seed: int = opt(0, "noise depends on the seed and the image's number, not on --batch")
    batch: int = opt(64, "images at a time")
    device: str | None = opt(None, "cpu, cuda, cuda:1", "NAME", auto="cuda where there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] = opt("float32", "of the network; the state is always float32")
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = opt("auto", "a backend named here runs or fails")
    run: Literal["auto", "eager", "compiled", "graph"] = opt("auto", "the loop: auto is graph on a GPU, else eager")
    exact: bool = opt(False, "on a CPU: no Winograd convolutions, which differ by a few 1e-6 (den.prepare(exact=True))")
    progress: bool = opt(True, "draw a progress bar")


def run(options: Options) -> int:
    """Check all that can be checked, sample, write, and say in one line what was done."""
    o = options
    at_least(0, seed=o.seed, eta=o.eta, clip=o.clip)
    at_least(1, n=o.n, batch=o.batch, steps=o.steps)
    import torch

    import fastdiff as fd
    from fastdiff.files import images
    from fastdiff.sampling.defaults import choose

    if o.solver is not None and o.solver not in fd.SOLVERS:
        raise ValueError(f"--solver {o.solver!r} is unknown; accepted: {', '.join(fd.SOLVERS)}")
    where = device(o.device)
    kind = images.check_output(o.out)
    den = fd.load(o.model)
    classes = _classes(o.class_, den)
    w = _weight(o.guidance, den, classes)
    cast("torch.nn.Module", den.net).to(device=where, dtype=getattr(torch, o.dtype))
    if (where, o.dtype) == ("cpu", "float32") and o.backend != "reference" and type(den.net) is fd.UNet:
        den = den.prepare(exact=o.exact, follow=False)
    labels = [classes[i % len(classes)] for i in range(o.n)] if classes else None
    with fd.backend(o.backend):
        start = time.perf_counter()
        x = _sample(o, den, labels, w)
        seconds = time.perf_counter() - start
        backend = _backend(x[:1].to(where))
    choice = choose(den, o.solver, o.steps, o.spacing)
    meta = {
        "model": den.meta.get("name") or Path(o.model).name,
        "seed": o.seed,
        "solver": choice.name,
        "steps": choice.steps,
        "guidance": w,
    }
    meta |= {"options": _given(o), "fastdiff": fd.__version__, "torch": torch.__version__}
    if kind == "png":
        images.save_grid(x, o.out, columns=_columns(classes, o.n), meta=meta | {"index": [0, o.n - 1], "label": labels})
    elif kind == "npz":
        images.save_npz(x, o.out, None if labels is None else torch.tensor(labels))
    else:
        names: list[int | None] = [None] * o.n if labels is None else [*labels]
        images.save_images(x, o.out, meta=[meta | {"index": i, "label": label} for i, label in enumerate(names)])
    rate = f"{o.n} images in {seconds:.1f} s ({o.n / seconds:.1f} images/s)"
    print(f"{o.out}: {rate}, {choice.name}, {choice.steps or choice.spacing} steps, step_ on {backend}")
    return 0


def _config(den: Denoiser) -> dict[str, Any]:
    config: dict[str, Any] = getattr(den.net, "config", {})
    return config


def _classes(asked: str | None, den: Denoiser) -> list[int]:
    """The class numbers that --class names, or all of the model's; empty for a model without classes."""
    names = [str(name) for name in den.meta.get("classes") or ()]
    count = int(_config(den).get("classes") or 0)
    if asked is None or not count:
        if asked is not None:
            raise ValueError(f"--class {asked}: this model was trained without classes; leave --class out")
        return list(range(count))
    found = []
    for item in (part.strip() for part in asked.split(",")):
        if item in names:
            found.append(names.index(item))
        elif item.isdecimal() and int(item) < count:
            found.append(int(item))
        else:
            accepted = f"0 to {count - 1}" + (f" or {', '.join(names)}" if names else "")
            raise ValueError(f"--class {item!r} is unknown; accepted: {accepted}")
    return found


def _weight(asked: float | None, den: Denoiser, classes: list[int]) -> float | None:
    """The guidance weight, None where there is nothing to guide by."""
    if asked is not None and not math.isfinite(asked):
        raise ValueError(f"--guidance {asked} is no weight; pass a finite number, 1 for none")
    guidable = bool(classes) and _config(den).get("null_class", True)
    if asked is not None and asked != 1 and not guidable:
        raise ValueError(f"--guidance {asked}: this model has no {'null class' if classes else 'classes'} to guide by")
    return (GUIDANCE if asked is None else asked) if guidable else None


def _sample(o: Options, den: Denoiser, labels: list[int] | None, w: float | None) -> Tensor:
    """The images (n, C, H, W) on the host, --batch at a time; index goes on from batch to batch."""
    import torch

    import fastdiff as fd

    if "shape" not in den.meta:
        raise ValueError(f"--model {o.model}: its config does not say the shape of an image; sample it with fd.sample")
    options: dict[str, Any] = {} if o.eta is None else {"eta": o.eta}
    parts = []
    starts: Iterable[int] = range(0, o.n, o.batch)
    many = o.n > o.batch
    if o.progress and many:
        from tqdm import tqdm

        starts = tqdm(starts, desc="sampling", unit="batch")
    shape = (min(o.batch, o.n), *den.meta["shape"])
    with fd.Sampler(den, shape, getattr(fd, o.run)) as fast:
        for first in starts:
            number = torch.arange(first, min(first + o.batch, o.n))
            x = fast(
                o.solver,
                shape=(len(number), *den.meta["shape"]),
                steps=o.steps,
                spacing=o.spacing,
                seed=o.seed,
                index=number,
                cond=None if labels is None else torch.tensor(labels)[number],
                guidance=None if w is None else fd.cfg(w),
                clip=o.clip,
                progress=o.progress and not many,
                **options,
            )
            parts.append(x.cpu())
    return torch.cat(parts)


def _given(o: Options) -> dict[str, Any]:
    """The rest of what was asked for, for the metadata of the images."""
    rest = {"spacing": o.spacing, "eta": o.eta, "clip": o.clip, "dtype": o.dtype, "backend": o.backend}
    return {name: str(value) if value == math.inf else value for name, value in rest.items() if value is not None}


def _backend(x: Tensor) -> str:
    """Which backend `step_` runs on for a state like x."""
    import torch

    from fastdiff import row
    from fastdiff.ops import dispatch

    history = torch.zeros_like(x).expand(row.SLOTS, *x.shape)
    return dispatch.chosen("step_", x, x, history, x, x.new_zeros(2, row.COLUMNS))


def _columns(classes: list[int], n: int) -> int | None:
    """Columns of the grid such that each column holds one class; None where there is no such grid of 8 to 20."""
    if not classes or len(classes) > 20:
        return None
    return min(n, len(classes) * math.ceil(8 / len(classes)))
