"""What a U-Net may be asked: the keywords that fit together, times and conditions of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

CONDITIONS = ("label", "number", "vector", "features")

Cond = Tensor | Mapping[str, Tensor] | None


def level(v: Any, i: int) -> Any:
    """What level i has of a number for all levels, or of one a level."""
    return v[i] if isinstance(v, Sequence) else v


def split(cond: Cond, condition: str) -> tuple[Tensor | None, Tensor | None]:
    """(what the embedding is told, context) of the condition of a net with a context. Raises ValueError."""
    if not isinstance(cond, Mapping):
        return None, cond
    unknown = cond.keys() - {"context", condition}
    if unknown:
        raise ValueError(f"UNet: cond has {sorted(unknown)[0]!r}; this net takes 'context' and {condition!r}")
    return cond.get(condition), cond.get("context")


def batched(name: str, v: Tensor, n: int) -> Tensor:
    """(n,) from (n,), or from one element."""
    if v.numel() not in (1, n):
        raise ValueError(f"UNet: {name} has shape {tuple(v.shape)}; accepted: one element or ({n},), one an image")
    return v.reshape(-1).expand(n)


def check(**given: Any) -> None:
    """Raises ValueError for a keyword that no net can have."""

    def need(good: bool, key: str, accepted: str) -> None:
        if not good:
            raise ValueError(f"UNet: {key}={given[key]!r} is not possible; accepted: {accepted}")

    widths = [round(given["channels"] * m) for m in given["mults"]]
    factors = [2**i for i in range(len(widths))]
    need(given["channels"] >= 1, "channels", "a positive integer")
    need(bool(widths) and min(widths) >= 1, "mults", "one positive number a level")
    need(given["blocks"] >= 1, "blocks", "a positive integer")
    need(all(a in factors for a in given["attention"]), "attention", f"factors out of {factors} (len(mults) levels)")
    need(given["dims"] in (1, 2, 3), "dims", "1, 2, 3")
    need(given["condition"] in CONDITIONS, "condition", ", ".join(CONDITIONS))
    need(given["condition"] == "label" or given["classes"] is None, "classes", "None, for condition is not 'label'")
    need(given["classes"] is None or given["classes"] >= 1, "classes", "None or a positive integer")
    need(not (given["heads"] and given["head_channels"]), "heads", "None where head_channels is given")
    features = given["condition"] == "features"
    need((given["condition_channels"] is not None) == features, "condition_channels", "a number with 'features' only")
    for key in ("heads", "depth"):
        fits = not isinstance(given[key], Sequence) or len(given[key]) == len(widths)
        need(fits, key, f"one number, or one for each of the {len(widths)} levels")
    need(given["context_channels"] is None or given["dims"] == 2, "dims", "2 with a context")
    groups = given["groups"]
    bad = [w for w in widths if groups is not None and (groups < 1 or w % groups)]
    need(not bad, "groups", f"a common divisor of the widths {widths}, or None for the greatest one up to 32")
