"""fastdiff: sample from and train diffusion models in PyTorch, fast, with numbers one can check.

    import fastdiff as fd
    den = fd.load("digits")
    x = fd.sample(den, (10, 1, 8, 8), fd.dpmpp_2m, steps=20, cond=range(10), guidance=fd.cfg(2.0))

Names are loaded on first use, so that importing the package costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastdiff._version import __version__

if TYPE_CHECKING:
    from fastdiff import nn as nn, ops as ops, row as row
    from fastdiff._doctor import doctor as doctor
    from fastdiff.files.data import load_data as load_data
    from fastdiff.files.images import save_grid as save_grid
    from fastdiff.formats.diffusers.scheduler import DiffusersScheduler as DiffusersScheduler
    from fastdiff.formats.load import load as load, save as save
    from fastdiff.formats.optimize import optimize as optimize
    from fastdiff.nn.patch import Patched as Patched, patch as patch
    from fastdiff.nn.unet import UNet as UNet
    from fastdiff.ops.dispatch import BackendUnavailable as BackendUnavailable, backend as backend, why as why
    from fastdiff.sampling.auto import auto as auto
    from fastdiff.sampling.compiled import compiled as compiled
    from fastdiff.sampling.denoiser import Denoiser as Denoiser
    from fastdiff.sampling.forward import q_sample as q_sample
    from fastdiff.sampling.graph import CaptureError as CaptureError, graph as graph
    from fastdiff.sampling.guidance import cfg as cfg, classifier as classifier, energy as energy
    from fastdiff.sampling.reuse import deep_cache as deep_cache
    from fastdiff.sampling.run import eager as eager
    from fastdiff.sampling.sample import sample as sample
    from fastdiff.sampling.sampler import Sampler as Sampler
    from fastdiff.sampling.verify import verify as verify
    from fastdiff.tables.plan import plan as plan
    from fastdiff.tables.schedule import (
        Schedule as Schedule,
        cosine as cosine,
        edm as edm,
        flow as flow,
        from_betas as from_betas,
        linear as linear,
        scaled_linear as scaled_linear,
        schedule as schedule,
        sigmoid as sigmoid,
        sub_vp as sub_vp,
        ve as ve,
        vp as vp,
    )
    from fastdiff.tables.solvers import (
        SOLVERS as SOLVERS,
        Table as Table,
        ddim as ddim,
        ddpm as ddpm,
        dpmpp_2m as dpmpp_2m,
        dpmpp_3m_sde as dpmpp_3m_sde,
        euler as euler,
        heun as heun,
    )
    from fastdiff.training.fit import fit as fit
    from fastdiff.training.losses import loss as loss

_HOMES = {
    "fastdiff": ("nn", "ops", "row"),
    "fastdiff._doctor": ("doctor",),
    "fastdiff.files.data": ("load_data",),
    "fastdiff.files.images": ("save_grid",),
    "fastdiff.formats.diffusers.scheduler": ("DiffusersScheduler",),
    "fastdiff.formats.load": ("load", "save"),
    "fastdiff.formats.optimize": ("optimize",),
    "fastdiff.nn.patch": ("Patched", "patch"),
    "fastdiff.nn.unet": ("UNet",),
    "fastdiff.ops.dispatch": ("BackendUnavailable", "backend", "why"),
    "fastdiff.sampling.auto": ("auto",),
    "fastdiff.sampling.compiled": ("compiled",),
    "fastdiff.sampling.denoiser": ("Denoiser",),
    "fastdiff.sampling.forward": ("q_sample",),
    "fastdiff.sampling.graph": ("CaptureError", "graph"),
    "fastdiff.sampling.guidance": ("cfg", "classifier", "energy"),
    "fastdiff.sampling.reuse": ("deep_cache",),
    "fastdiff.sampling.run": ("eager",),
    "fastdiff.sampling.sample": ("sample",),
    "fastdiff.sampling.sampler": ("Sampler",),
    "fastdiff.sampling.verify": ("verify",),
    "fastdiff.tables.plan": ("plan",),
    "fastdiff.tables.schedule": (
        *("Schedule", "cosine", "edm", "flow", "from_betas", "linear", "scaled_linear"),
        *("schedule", "sigmoid", "sub_vp", "ve", "vp"),
    ),
    "fastdiff.tables.solvers": ("SOLVERS", "Table", "ddim", "ddpm", "dpmpp_2m", "dpmpp_3m_sde", "euler", "heun"),
    "fastdiff.training.fit": ("fit",),
    "fastdiff.training.losses": ("loss",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: PLE0604  the table above is the list
    "__version__",
    *sorted(_HOME),
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    home = _HOME[name]
    value = import_module(f"{home}.{name}") if home == "fastdiff" else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
