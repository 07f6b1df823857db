"""The classes of other libraries that `fd.optimize` knows, found without importing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdiff.formats.diffusers import calls, convert
from fastdiff.formats.diffusers.calls import Call
from fastdiff.formats.lora import Made, NotRead
from fastdiff.nn.unet import UNet

Names = Mapping[str, list[str]]
"""Our parameter: the tensors that make it."""


class Kind(NamedTuple):
    """A class of U-Nets and how one of it is read."""

    read: Callable[[Any], tuple[UNet, Names]]
    """model -> (our net without memory, names). Raises ValueError for a config that we do not follow."""
    call: Callable[..., Call]
    """(model, *args, **kwargs), as its forward takes them. Raises NotRead."""
    result: Callable[[Any, Tensor, Call], Any]
    ours: Callable[[type[nn.Module]], bool]
    """Whether a class is one of the library."""

    def join(self, net: UNet, names: Names, there: Mapping[str, Made]) -> dict[str, Made]:
        """How each of our parameters is made. Raises NotRead where tensors are missing or left over."""
        wanted = {part for parts in names.values() for part in parts}
        for wrong in sorted(wanted ^ there.keys()):
            raise NotRead(f"its config and its parameters do not fit: {wrong}")
        return {
            name: _joined([there[part] for part in names[name]], tuple(p.shape)) for name, p in net.named_parameters()
        }


def _joined(parts: list[Made], shape: tuple[int, ...]) -> Made:
    counts = [len(part.sources) for part in parts]

    def make(*sources: Tensor) -> Tensor:
        left = list(sources)
        made = [part.make(*(left.pop(0) for _ in range(n))) for part, n in zip(parts, counts, strict=True)]
        return convert.join(made, shape)

    return Made(tuple(name for part in parts for name in part.sources), make)


def _diffusers(call: Callable[..., Call]) -> Kind:
    def read(model: Any) -> tuple[UNet, Names]:
        return convert.empty({**model.config, "_class_name": type(model).__name__})

    return Kind(read, call, calls.result, lambda kind: kind.__module__.startswith("diffusers."))


KINDS = {
    ("diffusers", "UNet2DModel"): _diffusers(calls.unet2d),
    ("diffusers", "UNet2DConditionModel"): _diffusers(calls.condition),
}


def kind_of(model: nn.Module) -> Kind | None:
    """How `model` is read; None for a class that we do not know, or a subclass of one, which may compute otherwise."""
    kind = type(model)
    return KINDS.get((kind.__module__.partition(".")[0], kind.__qualname__))
