"""The ops: one file each, reference first. Import the package to have all of them registered."""

from fastdiff.ops.attention import attention
from fastdiff.ops.dispatch import BackendUnavailable, backend, why
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.inject import inject
from fastdiff.ops.norm_linear import norm_linear, pack_linear
from fastdiff.ops.norm_silu_conv import norm_silu_conv, pack
from fastdiff.ops.normal import normal
from fastdiff.ops.q_sample import q_sample
from fastdiff.ops.step import step_
from fastdiff.ops.time_embed import time_embed

__all__ = [
    "BackendUnavailable",
    "attention",
    "backend",
    "group_norm_silu",
    "inject",
    "norm_linear",
    "norm_silu_conv",
    "normal",
    "pack",
    "pack_linear",
    "q_sample",
    "step_",
    "time_embed",
    "why",
]
