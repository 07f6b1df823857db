"""The buffers of a sampler: which ones a call needs, and how it is written into them."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import row
from fastdiff.ops import philox
from fastdiff.sampling.call import Call
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.forward import told_times
from fastdiff.sampling.guidance import Cond, map_cond
from fastdiff.sampling.state import State, enter, prior

TABLE = 64 << 20
"""Bytes that a table of time projections may take; above it the network projects in each step."""


class Shape(NamedTuple):
    """What decides the buffers: calls that agree in this share them."""

    images: int
    """Of the state; a call may have fewer."""
    rest: tuple[int, ...]  # C, *spatial
    halves: int  # 2 under guidance
    cond: Any  # shape of an image's condition and dtype, of each tensor
    told: torch.dtype  # of the times
    capacity: int  # lines
    watched: bool
    energies: tuple[Any, ...]  # what each is told, like cond
    dtype: torch.dtype  # of the state
    network: tuple[torch.device, torch.dtype | None, bool]  # where it is, what it computes in, whether in channels_last
    deep: tuple[int, ...] | None  # of the features that are reused
    table: tuple[int, int] | None  # lines a row, and their width, where projections are made before the loop


def shape_of(den: Denoiser, call: Call, images: int, rest: tuple[int, ...], dtype: torch.dtype) -> Shape:
    """The buffers that `call` needs for a state of `images`."""
    capacity = next((c for c in row.CAPACITIES if c >= len(call.rows)), len(call.rows))
    table = _table(den.net, capacity, 1 if call.cond is None else images * call.halves, den.dtype or dtype)
    return Shape(
        images,
        rest,
        call.halves,
        _signature(call.cond),
        # whole steps or not is all the same to a table
        torch.float32 if table else told_times(den.schedule, call.rows[:, row.T]).dtype,
        capacity,
        call.watched,
        tuple(map(_signature, call.told)),
        dtype,
        (den.device, den.dtype, den.channels_last),
        _deep(den.net, (images * call.halves, *rest), call),
        table,
    )


def _deep(net: Any, shape: tuple[int, ...], call: Call) -> tuple[int, ...] | None:
    """The shape of what is reused. Raises ValueError where the network has no deep part."""
    if call.reuse is None:
        return None
    if not hasattr(net, "deep_shape"):
        raise ValueError(f"reuse: {type(net).__name__} is no fd.UNet, and where its deep part begins is not known")
    if "x0" in (e.of for e in call.energies):
        raise ValueError("reuse: an energy of x0 needs the gradient of the whole network; pass reuse=None")
    found: tuple[int, ...] = net.deep_shape(shape, call.reuse.stages)
    return found


def _table(net: Any, capacity: int, lines: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """Lines a row and their width, where the network takes a line of a table and the table is not too large."""
    if not hasattr(net, "time_table") or "table_row" not in inspect.signature(net.forward).parameters:
        return None
    width = int(net.columns)
    return (lines, width) if capacity * lines * width * dtype.itemsize <= TABLE else None


def _signature(cond: Cond) -> Any:
    """Shapes without the image axis, and dtypes, in the form of cond."""
    if cond is None or isinstance(cond, Tensor):
        return None if cond is None else (tuple(cond.shape[1:]), cond.dtype)
    if isinstance(cond, dict):
        return tuple((name, _signature(part)) for name, part in cond.items())
    return (type(cond), *map(_signature, cond))


def allocate(shape: Shape, call: Call) -> State:
    """Empty buffers, for calls like this one."""
    n, rest = shape.images, shape.rest
    inputs = n * shape.halves
    device, dtype, last = shape.network

    def zeros(*size: int, dtype: torch.dtype = shape.dtype) -> Tensor:
        return torch.zeros(size, dtype=dtype, device=device)

    def like_input(size: tuple[int, ...]) -> Tensor:
        x = zeros(*size, dtype=dtype or shape.dtype)
        return x.contiguous(memory_format=torch.channels_last) if last and len(rest) == 3 else x

    return State(
        x=zeros(n, *rest),
        x_in=like_input((inputs, *rest)),
        h=zeros(row.SLOTS, n, *rest),
        x0=zeros(n, *rest) if shape.watched else None,
        rows=zeros(shape.capacity, row.COLUMNS),
        times=zeros(shape.capacity, dtype=shape.told),
        table=None if shape.table is None else zeros(shape.capacity, *shape.table, dtype=dtype or shape.dtype),
        deep=None if shape.deep is None else like_input(shape.deep),
        k=zeros(1, dtype=torch.int64),
        seed=zeros(1, dtype=torch.int64),
        number=zeros(n, dtype=torch.int64),
        cond=_room(call.cond, inputs),
        told=tuple(_room(told, n) for told in call.told),
        pulls=zeros(shape.capacity, len(call.told)),
        bad=zeros(n, dtype=torch.int64),
    )


def _room(cond: Cond, images: int) -> Cond:
    return map_cond(lambda c: c.new_zeros((images, *c.shape[1:])), cond)


def fill(s: State, den: Denoiser, call: Call) -> None:
    """Write a call into the buffers: the state as it is before the first row."""
    lines = len(call.rows) - 1
    s.rows[: lines + 1].copy_(torch.as_tensor(call.rows).to(s.rows.dtype))
    s.times[: lines + 1].copy_(told_times(den.schedule, call.rows[:, row.T]))
    map_cond(lambda held, given: _write(held, given, len(s.x_in) // len(s.x)), s.cond, call.cond)
    for held, given in zip(s.told, call.told, strict=True):
        map_cond(_write, held, given)
    s.pulls[:lines].copy_(torch.as_tensor(call.pulls).to(s.pulls.dtype))
    if s.table is not None:
        _project(s.table[:lines], s.times[:lines], den.net, s.cond)
    number = torch.arange(call.images) if call.numbers is None else torch.as_tensor(call.numbers)
    if number.shape != (call.images,) or number.is_floating_point() or bool((number < 0).any()):
        raise ValueError(f"index must be {call.images} whole numbers >= 0, one an image, got {call.numbers}")
    _write(s.number, number)
    s.seed.copy_(philox.seed_tensor(call.seed))
    s.k.zero_()
    s.bad.fill_(-1)
    if call.x is None:
        scale = den.schedule.prior
        prior(s, float(call.rows[0, row.SIGMA]) if scale is None else scale)
    else:
        _write(s.x, call.x)
    enter(s, float(call.rows[0, row.C_IN]))


def _write(held: Tensor, given: Tensor, halves: int = 1) -> Tensor:
    """`given` into a buffer for more images, the last one standing for those that nobody asked for, in each half."""
    for part, half in zip(held.tensor_split(halves), given.tensor_split(halves), strict=True):
        part[: len(half)].copy_(half)
        part[len(half) :].copy_(half[-1:])
    return held


def _project(table: Tensor, times: Tensor, net: Any, cond: Cond) -> None:
    """All time projections of all rows, (rows, lines, width), as one matrix product."""
    rows, lines, _ = table.shape
    told = net.told(cond)
    each = None if told is None else map_cond(lambda c: c.repeat(rows, *(1,) * (c.ndim - 1)), told)
    table.copy_(net.time_table(times.repeat_interleave(lines), each).unflatten(0, (rows, lines)))
