"""`fastdiff verify`: the fused path against the reference on a model, a few steps of it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, cast

from fastdiff.cli.options import at_least, device, opt

if TYPE_CHECKING:
    from fastdiff import Denoiser


@dataclasses.dataclass
class Options:
    """Sample a few steps as `fastdiff sample` would, and on the reference; print errors, exit with 1 if one is large.

    Same weights, seed and noise; each line is a step, with the errors of x and x0 and the bound that they are held to.
    """

    model: str = opt(
        "digits", "a checkpoint folder, org/name on the hub, or a model of the package", "MODEL", positional=True
    )
    n: int = opt(2, "number of images")
    shape: str | None = opt(None, "of an image: channels,height,width", "LIST", auto="the model's")
    solver: str | None = opt(None, "a name of fd.SOLVERS", "NAME", auto="the model's, else ddim")
    steps: int = opt(4, "grid intervals")
    spacing: str | None = opt(None, "of the grid: trailing, leading, ...", "NAME", auto="the model's")
    guidance: float | None = opt(None, "w of F_u + w (F_c - F_u)", "FLOAT", auto="none")
    seed: int = opt(0, "of the noise")
    device: str | None = opt(None, "cpu, cuda, cuda:1", "NAME", auto="cuda where there is one, else cpu")
    dtype: Literal["float32", "bfloat16", "float16"] = opt("float32", "of the network")
    backend: Literal["auto", "reference", "cpp", "triton", "cuda"] = opt("auto", "of the fused path")
    run: Literal["auto", "eager", "compiled", "graph"] = opt("auto", "the fused path's loop")
    exact: bool = opt(False, "on a CPU: no Winograd convolutions")


def run(options: Options) -> int:
    """Load, compare, print; 0 where every bound is kept, else 1."""
    o = options
    at_least(1, n=o.n, steps=o.steps)
    at_least(0, seed=o.seed)
    import torch

    import fastdiff as fd

    if o.solver is not None and o.solver not in fd.SOLVERS:
        raise ValueError(f"--solver {o.solver!r} is unknown; accepted: {', '.join(fd.SOLVERS)}")
    where = device(o.device)
    den = fd.load(o.model)
    shape = _shape(o, den)
    cast("torch.nn.Module", den.net).to(device=where, dtype=getattr(torch, o.dtype))
    given: dict[str, Any] = {"solver": o.solver, "steps": o.steps, "spacing": o.spacing, "seed": o.seed}
    given |= {"guidance": None if o.guidance is None else fd.cfg(o.guidance)}
    with fd.backend(o.backend):
        report = fd.verify(den, (o.n, *shape), run=getattr(fd, o.run), exact=o.exact, **given)
    print(f"{o.model}: {report}")
    return 0 if report.ok else 1


def _shape(o: Options, den: Denoiser) -> list[int]:
    if o.shape is None and "shape" in den.meta:
        return list(den.meta["shape"])
    parts = (o.shape or "").split(",")
    if not all(part.strip().isdecimal() for part in parts):
        what = (
            "the config does not say the shape of an image" if o.shape is None else f"--shape {o.shape!r} is no shape"
        )
        raise ValueError(f"{what}; pass --shape C,H,W, such as --shape 3,32,32")
    return [int(part) for part in parts]
