"""`fastdiff convert`: a model of any kind that is read, into a folder of ours or of diffusers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from fastdiff.cli.options import checkpoint, new_folder, opt


@dataclasses.dataclass
class Options:
    """Write a model as a checkpoint folder of fastdiff, or as one that diffusers' from_pretrained reads.

    fastdiff convert google/ddpm-cifar10-32 --out cifar10 && fastdiff sample --model cifar10
    """

    source: str = opt(
        "",
        "a folder of ours or diffusers', org/name on the hub, or a model of the package",
        "SOURCE",
        auto="none, must be given",
        positional=True,
    )
    out: str = opt("", "the new folder", "DIR", auto="none, must be given")
    to: Literal["ours", "diffusers"] = opt("ours", "whose folder to write")
    dtype: Literal["float32", "bfloat16", "float16"] | None = opt(
        None, "of the stored weights", auto="as they are in memory, float32 or wider"
    )
    null_label: bool = opt(
        False, "to diffusers, write the null class as one class more, the last; diffusers does not know what it means"
    )
    overwrite: bool = opt(False, "replace the folder of this kind that --out holds")


def run(options: Options) -> int:
    """Check, read, write, and say in one line what was done."""
    o = options
    if not o.source:
        raise ValueError("SOURCE is missing; pass a checkpoint folder, org/name on the hub, or a model of the package")
    import torch

    import fastdiff as fd
    from fastdiff.formats.diffusers.write import check_target, save_diffusers

    out = new_folder(o.out, o.overwrite, checkpoint if o.to == "ours" else check_target)
    den = fd.load(o.source)
    dtype = None if o.dtype is None else getattr(torch, o.dtype)
    if o.to == "ours":
        fd.save(den, out, dtype=dtype)
    else:
        save_diffusers(den, out, dtype=dtype, null_label=o.null_label)
    written = sum(p.stat().st_size for p in Path(out).rglob("*.safetensors"))
    count = sum(p.numel() for p in den.net.parameters())  # type: ignore[attr-defined]
    theirs = "DiffusionPipeline" if (Path(out) / "model_index.json").exists() else "UNet2DConditionModel"
    place = f'"{out}"' if theirs == "DiffusionPipeline" else f'"{out}", subfolder="unet"'
    then = f"fastdiff sample --model {out}" if o.to == "ours" else f"{theirs}.from_pretrained({place})"
    print(f"{out}: {count / 1e6:.2f} M parameters in {written / 1e6:.1f} MB, predicts {den.predicts}; {then}")
    return 0
