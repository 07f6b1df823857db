"""One call of a module as it runs here, against the same call as it was and against float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.nn import own
from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.patch import patch
from fastdiff.nn.prepare import PreparedUNet, prepare
from fastdiff.nn.unet import UNet
from fastdiff.ops import dispatch
from fastdiff.sampling.report import Error, Line, Report, error

LOOP, NETWORK = 1e-5, 2e-5
"""Relative bounds in float32: of a loop, and of a network on Winograd's convolutions."""


class Pair(NamedTuple):
    """A network as it runs here, and as it was."""

    fast: Any
    plain: Any
    how: str
    bound: float


def pair_of(net: Any, exact: bool) -> Pair:
    """Raises ValueError for a packed network that holds nothing of the one it was made from."""
    if type(net) is UNet:
        net = prepare(net, exact=exact)
    if isinstance(net, PreparedUNet):
        plain: Any = net._made[0]
        if plain is None:
            raise ValueError("verify: this network was prepared with follow=False and holds nothing of it; verify that")
        winograd = own.has(net.net)
        how = "network prepared" + ", Winograd's convolutions" * winograd
        return Pair(net, plain, how, NETWORK if winograd else LOOP)
    original = getattr(net, "original", None)
    if isinstance(original, nn.Module):
        return Pair(net, original, f"{type(net).__name__} of {type(original).__name__}", NETWORK)
    return Pair(net, net, "network as it is", LOOP)


def verify_module(model: nn.Module, inputs: Sequence[Any], given: Mapping[str, Any]) -> Report:
    """See `fastdiff.verify`; model(*inputs, **given) is the call."""
    if not inputs and not given:
        raise ValueError(f"verify: {type(model).__name__} needs example inputs; pass what it is called with")
    pair = pair_of(model, exact=False)
    same = pair.fast is pair.plain

    def call(net: Any, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        parts = _mapped((tuple(inputs), dict(given)), change)
        return dict(_tensors(net(*parts[0], **parts[1])))

    with torch.no_grad(), _evaluating(pair.fast), _evaluating(pair.plain):
        with dispatch.backend("reference"):
            plain, wide = call(pair.plain, Tensor.clone), _wide(pair.plain, call)
        patched = patch(model) if same else None
        try:
            fused = sum(isinstance(m, GroupNorm) for m in model.modules())
            fast = call(pair.fast, Tensor.clone)
        finally:
            if patched is not None:
                patched.undo()
    if plain.keys() != fast.keys() or not plain:
        raise ValueError(
            f"verify: {type(model).__name__} gives no tensors, or other ones each time: {', '.join(plain)}"
        )
    lines = [Line(name, tuple(_compared(fast[name], plain[name], wide.get(name), pair))) for name in plain]
    how = f"{fused} norms fused" if same else pair.how
    return Report(f"{type(pair.plain).__name__}, {how}, against itself" + " and float64" * bool(wide), tuple(lines))


def _compared(fast: Tensor, plain: Tensor, wide: Tensor | None, pair: Pair) -> Iterator[Error]:
    """The errors of one output. Whole numbers must be equal."""
    if not plain.is_floating_point():
        yield error("fused", fast, plain, 0.0)
        return
    eps = torch.finfo(plain.dtype).eps
    least = pair.bound if pair.bound == NETWORK and eps > 1e-9 else 0.0
    if wide is None:
        yield error("fused", fast, plain, max(least, LOOP if plain.dtype == torch.float32 else 8 * eps))
        return
    base = error("PyTorch against float64", plain, wide)
    yield error("fused", fast, plain)
    yield base
    yield error("fused against float64", fast, wide, max(2 * base.relative + eps, least))


def _wide(net: nn.Module, call: Callable[..., dict[str, Tensor]]) -> dict[str, Tensor]:
    """The outputs of a copy in float64; empty where the network, or its code, cannot be cast."""
    try:
        return call(copy.deepcopy(net).double(), lambda x: x.double() if x.is_floating_point() else x.clone())
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return {}


@contextlib.contextmanager
def _evaluating(net: Any) -> Iterator[None]:
    """Dropout off; every module that was in training goes back to it."""
    training = [m for m in net.modules() if m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Tensors in tuples, lists and dicts through `change`; the rest as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(item, change) for item in value)
    return value


def _tensors(value: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that a module gave."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}.{key}")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")
