"""The classes of other libraries that `fd.optimize` knows, found without importing them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from fastdiff.formats import guided_diffusion
from fastdiff.formats.diffusers import convert, forward
from fastdiff.formats.diffusers.forward import Call
from fastdiff.formats.lora import Made, NotRead
from fastdiff.formats.names import Parts, fits, join
from fastdiff.nn.unet import UNet

Names = Mapping[str, Parts]
"""Our parameter: the tensors that make it."""


class Kind(NamedTuple):
    """A class of U-Nets and how one of it is read."""

    read: Callable[[Any], tuple[UNet, Names]]
    """model -> (our net without memory, names). Raises NotRead, ValueError for what we do not follow."""
    call: Callable[..., Call]
    """(model, *args, **kwargs), as its forward takes them. Raises NotRead."""
    result: Callable[[Any, Tensor, Call], Any]
    ours: Callable[[type[nn.Module]], bool]
    """Whether a class is one of the library."""
    sure: bool = True
    """Whether its classes are the ones that we have read; else a call is compared with the model's own."""


def made(net: UNet, names: Names, there: Mapping[str, Made], shapes: Mapping[str, Tensor]) -> dict[str, Made]:
    """How each of our parameters is made. Raises NotRead where tensors are missing, left over or of other shapes."""
    wanted = {part for parts in names.values() for part in parts.names}
    for wrong in sorted(wanted ^ there.keys()):
        raise NotRead(f"its parameters do not fit its config: {wrong}")
    found = {}
    for name, p in net.named_parameters():
        parts, shape = [there[part] for part in names[name].names], tuple(p.shape)
        for part in parts:
            if not fits(shapes[part.sources[0]], shape, len(parts)):
                raise NotRead(f"its parameters do not fit its config: {part.sources[0]}")
        found[name] = _joined(parts, shape, names[name].heads)
    return found


def _joined(parts: list[Made], shape: tuple[int, ...], heads: int) -> Made:
    counts = [len(part.sources) for part in parts]

    def make(*sources: Tensor) -> Tensor:
        left = list(sources)
        ready = [part.make(*(left.pop(0) for _ in range(n))) for part, n in zip(parts, counts, strict=True)]
        return join(ready, shape, heads)

    return Made(tuple(name for part in parts for name in part.sources), make)


def _diffusers(call: Callable[..., Call]) -> Kind:
    def read(model: Any) -> tuple[UNet, Names]:
        return convert.empty({**model.config, "_class_name": type(model).__name__})

    return Kind(read, call, forward.result, lambda kind: kind.__module__.startswith("diffusers."))


KINDS = {"UNet2DModel": _diffusers(forward.unet2d), "UNet2DConditionModel": _diffusers(forward.condition)}
"""Of diffusers."""


def kind_of(model: nn.Module) -> Kind | None:
    """How `model` is read; None for a class that we do not know, or a subclass of one, which may compute otherwise."""
    library = type(model).__module__.partition(".")[0]
    if library == "diffusers":
        return KINDS.get(type(model).__qualname__)
    if guided_diffusion.is_one(model):
        own = guided_diffusion

        def ours(kind: type[nn.Module]) -> bool:
            return kind.__module__.partition(".")[0] == library

        return Kind(own.read, own.call, own.result, ours, sure=False)
    return None
