"""Lossy, and never without being asked for: the deep part of the network runs in some rows only."""

from __future__ import annotations

from typing import NamedTuple


class DeepCache(NamedTuple):
    """Every how many rows the deep part runs, and how many stages of the way up run in all of them."""

    every: int
    stages: int


def deep_cache(every: int, stages: int = 1) -> DeepCache:
    """Run the deep part of the U-Net in every `every`-th row, and reuse its features in between. It changes images.

    stages: of the way up, counted from its end, that run in every row together with their part of the way down; 1 is
    the fastest. Features of neighbouring rows are alike, most of all in many small steps (DeepCache, Ma, Fang & Wang
    2024). The network must be a fd.UNet. Raises ValueError for numbers below 1.
    """
    if every < 1 or stages < 1:
        raise ValueError(f"deep_cache: every={every}, stages={stages}; both are 1 or more, every=1 reuses nothing")
    return DeepCache(every, stages)


def fresh_rows(images: list[int], every: int) -> list[bool]:
    """Which rows run the deep part: every `every`-th, and one that needs more images than the last such row had."""
    out: list[bool] = []
    since = had = 0
    for wanted in images:
        out.append(had < wanted or since >= every)
        since, had = (1, wanted) if out[-1] else (since + 1, had)
    return out
