"""Tensors made from a net's parameters, and made again in the same memory when those have changed.

packer = Packer(net, dtype, channels_last)
twin = packer.twin()                                    net's modules with stand-ins: parameters without memory
up.weight = packer.derive(fold, up.weight)              a stand-in made from others, as often as wanted
follower = packer.fill(twin)                            what is left in twin gets memory and numbers
net.load_state_dict(...); follower.refresh()            twin has them too
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.ops import native

Net = TypeVar("Net", bound=nn.Module)

HUGE = 4 << 20
"""Bytes from which a tensor is asked for in pages of 2 MB."""

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
"""The layout of tensors by their number of axes, where channels are to be last."""


class Restructured(ValueError):
    """The net has other modules, parameters or shapes than it had."""


class Recipe(NamedTuple):
    """How a tensor is made from the net's parameters by name."""

    make: Callable[[Mapping[str, Tensor]], Tensor]
    sources: frozenset[str]
    dtype: torch.dtype


class Pack(NamedTuple):
    """A tensor with memory, and how it is made."""

    target: nn.Parameter
    recipe: Recipe


def _wide(p: Tensor) -> Tensor:
    """p without gradient in float32 at least, in which sums are taken before they are rounded once."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32))


def _named(net: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by name; one that two modules share has two."""
    return {
        f"{name}.{key}": p
        for name, module in net.named_modules()
        for key, p in module._parameters.items()
        if p is not None
    }


class Packer:
    """What a twin of `net` in `dtype` is built with; channels_last: images and their convolutions' weights are that."""

    def __init__(self, net: nn.Module, dtype: torch.dtype, channels_last: bool) -> None:
        self.net, self.dtype, self.channels_last = net, dtype, channels_last
        self.device = next(net.parameters()).device
        self._recipes: dict[int, tuple[Tensor, Recipe]] = {}  # with the stand-in: its id stays its own

    def _stand_in(self, recipe: Recipe) -> nn.Parameter:
        """A parameter without memory, which is to be made by `recipe`."""
        meta = nn.Parameter(torch.empty(0, device="meta"), requires_grad=False)
        self._recipes[id(meta)] = meta, recipe
        return meta

    def twin(self) -> nn.Module:
        """A copy of the net with a stand-in for every parameter."""
        known: dict[int, nn.Parameter] = {}
        for name, p in _named(self.net).items():
            recipe = Recipe(lambda source, name=name: _wide(source[name]), frozenset([name]), self.dtype)  # type: ignore[misc]
            known.setdefault(id(p), self._stand_in(recipe))
        return copy.deepcopy(self.net, known)

    def adopt(self, net: nn.Module, made: Mapping[str, tuple[tuple[str, ...], Callable[..., Tensor]]]) -> None:
        """Give `net`, which has other modules, stand-ins: its name to (names in the net, what is made of them)."""
        for name, (sources, make) in made.items():

            def value(source: Mapping[str, Tensor], sources: Any = sources, make: Any = make) -> Tensor:
                y: Tensor = make(*(_wide(source[s]) for s in sources))
                return y

            path, _, key = name.rpartition(".")
            stand_in = self._stand_in(Recipe(value, frozenset(sources), self.dtype))
            net.get_submodule(path)._parameters[key] = stand_in

    def derive(self, make: Callable[..., Tensor], *args: Tensor, dtype: torch.dtype | None = None) -> nn.Parameter:
        """A stand-in for make(*args), rounded once to dtype (None: the twin's), of stand-ins in float32 at least."""
        recipes = [self._recipes[id(a)][1] for a in args]
        recipe = Recipe(
            lambda source: make(*(r.make(source) for r in recipes)),
            frozenset().union(*(r.sources for r in recipes)),
            dtype or self.dtype,
        )
        return self._stand_in(recipe)

    def fill(self, twin: nn.Module) -> Follower:
        """Give the stand-ins that are in `twin` memory and numbers."""
        source = _named(self.net)
        packs: dict[int, Pack] = {}
        for module in twin.modules():
            for tensors in (module._parameters, module._buffers):
                for key, meta in tensors.items():
                    if meta is None:
                        continue
                    if id(meta) not in packs:
                        packs[id(meta)] = self._pack(meta, source)
                    tensors[key] = packs[id(meta)].target
        return Follower(self.net, list(packs.values()))

    def _pack(self, meta: Tensor, source: Mapping[str, Tensor]) -> Pack:
        recipe = self._recipes[id(meta)][1]
        value = recipe.make(source)
        form = LAST.get(value.ndim, torch.contiguous_format) if self.channels_last else torch.contiguous_format
        target = torch.empty(value.shape, dtype=recipe.dtype, device=value.device, memory_format=form)
        if target.is_cpu and native.cpu is not None and target.nbytes > HUGE:
            # a fresh page of 4 KB costs more than writing to it
            native.cpu.advise_huge(target.data_ptr(), target.nbytes)
        target.copy_(value)
        return Pack(nn.Parameter(target, requires_grad=False), recipe)


class Follower:
    """Keeps `packs` as they would be made from the parameters of `net` now."""

    def __init__(self, net: nn.Module, packs: list[Pack]) -> None:
        self.net, self.packs = net, packs
        self._modules = dict(net.named_modules())
        self._contents = [d for m in self._modules.values() for d in (m._parameters, m._modules) if d]
        self._shapes = {name: p.shape for name, p in _named(net).items()}
        self._remember(_named(net))

    def _remember(self, now: Mapping[str, nn.Parameter]) -> None:
        """Prepare what `_same` reads: lists that are compared without a line of Python an element."""
        _refuse_inference(now)
        flat = list(now.values())
        self._marks = {name: _mark(p) for name, p in now.items()}
        self._content = [dict(d) for d in self._contents]
        self._watch: Callable[[], bool] = _watch(flat)
        # while its memory is held here, no other tensor can come to lie at a parameter's address
        self._held = [p.detach() for p in flat]

    def _same(self) -> bool:
        """Whether every parameter is the object, at the address, of the version that was packed.

        A dict equals another without asking for values that are the same objects. Of others, tensors of one element
        are compared, and may be equal in number; larger ones raise.
        """
        try:
            return self._contents == self._content and self._watch()
        except RuntimeError:
            return False

    def refresh(self, *, every: bool = False) -> bool:
        """Make again, in place, what was made from parameters that changed (every: from all); whether any had."""
        if not every and self._same():
            return False
        now = self._checked()
        changed = {name for name, p in now.items() if every or self._marks[name] != _mark(p)}
        with torch.no_grad():
            for target, recipe in self.packs:
                if not changed.isdisjoint(recipe.sources):
                    target.copy_(recipe.make(now))
        self._remember(now)
        return bool(changed)

    def _checked(self) -> dict[str, nn.Parameter]:
        """The parameters now; ValueError where they are not those of the net that was prepared in number and shape."""
        again = "; prepare the net again"
        was, modules = self._modules, dict(self.net.named_modules())
        for name in was | modules:
            if was.get(name) is not modules.get(name):
                raise Restructured(f"prepare: module {name!r} of the net is not the one that was prepared{again}")
        now = _named(self.net)
        for name in self._shapes.keys() ^ now.keys():
            raise Restructured(f"prepare: parameter {name!r} of the net was added or taken away since{again}")
        for name, p in now.items():
            if p.shape != self._shapes[name]:
                shapes = f"{tuple(p.shape)}, it was {tuple(self._shapes[name])}"
                raise Restructured(f"prepare: parameter {name!r} of the net is {shapes}{again}")
        return now


def _watch(tensors: list[nn.Parameter]) -> Callable[[], bool]:
    """Whether the tensors still are at the addresses and of the versions that they have now."""
    if native.cpu is not None:
        same: Callable[[], bool] = native.cpu.Watch(list(tensors), torch._C.TensorBase).same
        return same
    seen = [(p._version, p.data_ptr()) for p in tensors]
    return lambda: [(p._version, p.data_ptr()) for p in tensors] == seen


def _mark(p: Tensor) -> tuple[int, int, int]:
    return id(p), p.data_ptr(), p._version


def _refuse_inference(now: Mapping[str, Tensor]) -> None:
    """ValueError for parameters that nobody can follow."""
    for name, p in now.items():
        if p.is_inference():
            raise ValueError(
                f"prepare: parameter {name!r} was made under torch.inference_mode, where writes are not counted; make "
                "the net outside, or load it there"
            )
