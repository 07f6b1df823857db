"""Training: a generator of steps, so that the caller's loop stays the caller's."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff.files.data import Data
from fastdiff.ops import philox
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.guidance import Cond, map_cond
from fastdiff.training.losses import loss

Batch = Tensor | Sequence[Any]
"""x, or (x, cond)."""


class Step(NamedTuple):
    """One training step: its number from 0, its loss (a scalar tensor, no gradient), the averaged Denoiser so far."""

    i: int
    loss: Tensor
    ema: Denoiser


def order(size: int, seed: int, epoch: int) -> Tensor:
    """The order of `size` images in an epoch, a permutation drawn from Philox stream 8."""
    key, number = philox.seed_tensor(seed), torch.tensor([epoch])
    return philox.words(key, number, 0, philox.ORDER, size)[0][0].argsort(stable=True)


def batches(data: Data, batch: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Endless batches (uint8 images, labels or None) of `data`, each epoch in an order of its own, none left over."""
    if len(data.images) == 0:
        raise ValueError("fit: the data hold no image")
    images = torch.from_numpy(data.images)
    labels = None if data.labels is None else torch.from_numpy(data.labels)
    left, epoch = torch.empty(0, dtype=torch.int64), 0
    while True:
        while len(left) < batch:
            left, epoch = torch.cat([left, order(len(images), seed, epoch)]), epoch + 1
        now, left = left[:batch], left[batch:]
        yield images[now], None if labels is None else labels[now]


def _again(loader: Iterable[Batch]) -> Iterator[tuple[Tensor, Cond]]:
    """The loader over and over, each item as (x, cond)."""
    while True:
        empty = True
        for item in loader:
            empty = False
            x, *cond = [item] if isinstance(item, Tensor) else item
            if len(cond) > 1:
                raise ValueError(f"fit: the loader gave {len(cond) + 1} parts a batch; accepted: x, or (x, cond)")
            yield x, cond[0] if cond else None
        if empty:
            raise ValueError("fit: the loader gave no batch; pass an iterable that starts anew at each `for`")


def _dropped(den: Denoiser, cond: Cond, drop: float, seed: Tensor, index: Tensor) -> Cond:
    """cond with the null condition in the place of a share `drop` of the images, chosen by Philox stream 7."""
    if cond is None or drop == 0:
        return cond
    gone = philox.uniform(seed, index, 0, philox.DROP, (1,))[:, 0] <= drop

    def mix(c: Tensor, null: Tensor) -> Tensor:
        return torch.where(gone.to(c.device).reshape(-1, *(1,) * (c.ndim - 1)), null.to(c), c)

    try:
        null = den.null(cond)
    except ValueError as error:
        raise ValueError(f"fit: drop={drop} hides conditions, but there is no null condition; pass drop=0") from error
    return map_cond(mix, cond, null)


def fit(
    den: Denoiser,
    loader: Iterable[Batch] | Data,
    *,
    lr: float = 2e-4,
    ema: float = 0.999,
    batch: int = 128,
    steps: int | None = None,
    drop: float = 0.1,
    clip_grad: float = 1.0,
    warmup: int = 100,
    weight_decay: float = 0.0,
    seed: int = 0,
    progress: bool = False,
) -> Iterator[Step]:
    """Train `den.net` in place with AdamW on the simple loss; yields a Step a batch, `steps` of them or without end.

    loader: a Data (then `batch` images at a time, order by Philox), or any iterable of x or (x, cond), started anew
    when it ends; x uint8 or in [-1, 1]. ema: decay of the averaged weights, ramped up as (1 + i) / (10 + i) at first;
    `step.ema` samples with them. drop: share of conditions replaced by the null one (Ho & Salimans 2022), where there
    are conditions. warmup: steps in which the learning rate grows linearly. clip_grad: bound on the gradient's norm.
    Ho 2020, algorithm 1. Raises ValueError.
    """
    if not isinstance(den.net, torch.nn.Module):
        raise TypeError(f"fit: the network must be a torch.nn.Module, got {type(den.net).__name__}")
    for name, given, good in (
        *(("lr", lr, lr > 0), ("ema", ema, 0 <= ema < 1), ("drop", drop, 0 <= drop <= 1)),
        *(("batch", batch, batch >= 1), ("clip_grad", clip_grad, clip_grad > 0)),
    ):
        if not good:
            raise ValueError(f"fit: {name}={given} is out of range; see the defaults in help(fastdiff.fit)")
    # the average moves by less than a half-precision weight can
    averaged = copy.deepcopy(den.net).float().eval().requires_grad_(False)
    average = den.with_net(averaged)
    optimizer = torch.optim.AdamW(den.net.parameters(), lr=lr, weight_decay=weight_decay)
    source = batches(loader, batch, seed) if isinstance(loader, Data) else _again(loader)
    den.net.train()
    seen = 0
    with _bar(progress, steps) as show:
        for i in itertools.count() if steps is None else range(steps):
            images, given_cond = next(source)
            index = torch.arange(seen, seen + len(images))
            seen += len(images)
            x, cond = images.to(den.device), map_cond(lambda c: c.to(den.device), given_cond)
            value = loss(den, x, _dropped(den, cond, drop, philox.seed_tensor(seed), index), seed=seed, index=index)
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (i + 1) / max(1, warmup))
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(value)
            torch.nn.utils.clip_grad_norm_(den.net.parameters(), clip_grad)
            optimizer.step()
            _average(averaged, den.net, min(ema, (1 + i) / (10 + i)))
            show(i, value.detach())
            yield Step(i, value.detach(), average)


@contextlib.contextmanager
def _bar(progress: bool, steps: int | None) -> Iterator[Callable[[int, Tensor], None]]:
    """A tqdm bar with the loss, which is read from the device every tenth step only."""
    if not progress:
        yield lambda i, value: None
        return
    from tqdm import tqdm

    with tqdm(total=steps, desc="training", unit="step") as bar:

        def show(i: int, value: Tensor) -> None:
            bar.update()
            if i % 10 == 0:
                bar.set_postfix(loss=f"{float(value):.4f}")

        yield show


@torch.no_grad()
def _average(ema: torch.nn.Module, net: torch.nn.Module, decay: float) -> None:
    """ema = decay ema + (1 - decay) net for parameters; buffers are copied."""
    ours: list[Tensor] = [p for p in ema.parameters() if p.is_floating_point()]
    theirs: list[Tensor] = [p.float() for p in net.parameters() if p.is_floating_point()]
    torch._foreach_lerp_(ours, theirs, 1 - decay)
    for mine, other in zip(ema.buffers(), net.buffers(), strict=True):
        mine.copy_(other)
