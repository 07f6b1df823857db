"""`fd.patch(model)`: every `torch.nn.GroupNorm` of any module, with the SiLU behind it, through one fused op.

What changes is the class of modules: a norm becomes a `fd.nn.GroupNorm`, and a module that calls a norm and then a SiLU
gets a subclass of its own class whose methods make both in one call (`sites.py` says which, and why that is safe). The
objects stay, with parameters, buffers, hooks and modes. A tensor that waits to see what is done with it would need no
source, but is wrong in silence where functions look behind `__torch_function__` (`torch.autograd.Function`, and so
checkpointing, loses its gradient) or where nobody counts the writes into its input (inference mode).
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.known import is_group_norm, learn_silu, look_up, norm_act, sequential
from fastdiff.nn.sites import PAIR, Path, Site, join, path
from fastdiff.nn.source import read, replaced, unwrapped

Sites = tuple[tuple[str, Site], ...]
"""(method, place in it)"""


class Norm(NamedTuple):
    """One line of the report: a norm of the model, and the method that now calls it together with its SiLU."""

    name: str
    groups: int
    channels: int
    fused: str
    """"" where no SiLU was found behind it: then it is one op by itself."""


class Patched:
    """What `patch` did to `model`; `print` it for a table, `undo` it, or use it in `with`.

    norms: the norms that are `fd.nn.GroupNorm` now. left: name and reason of every GroupNorm that stayed as it was.
    """

    def __init__(self, model: nn.Module, norms: list[Norm], left: dict[str, str], were: dict[nn.Module, Any]) -> None:
        self.model, self.norms, self.left = model, norms, left
        self._changed = {module: (type(module), before) for module, before in were.items()}

    def undo(self) -> None:
        """Give every module its class back; a second call does nothing.

        Raises RuntimeError for modules that somebody changed further, after all others are as they were.
        """
        taken = {}
        for module, (now, before) in self._changed.items():
            if type(module) is now:
                module.__class__ = before
            else:
                taken[module] = (now, before)
        self._changed = taken
        if taken:
            names = ", ".join(f"a {before.__name__}, now {type(m).__name__}" for m, (_, before) in taken.items())
            raise RuntimeError(f"patch: cannot undo {names}; undo what changed it later, then call undo again")

    def __enter__(self) -> nn.Module:
        return self.model

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        fused = sum(bool(n.fused) for n in self.norms)
        lines = [f"{type(self.model).__name__}: {len(self.norms)} GroupNorm replaced, {fused} with the SiLU behind it"]
        wide = max((len(name) for name in [*(n.name for n in self.norms), *self.left]), default=0)
        for n in self.norms:
            lines.append(f"  {n.name:{wide}}  {f'{n.groups} x {n.channels}':>9}  " + (n.fused or "no SiLU found"))
        lines += [f"  {name:{wide}}  {'left':>9}  {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"Patched({type(self.model).__name__}, {len(self.norms)} norms, {len(self.left)} left)"


def patch(model: nn.Module) -> Patched:
    """Run every `torch.nn.GroupNorm` in `model`, and the SiLU behind it, as the fused op, in place.

        patched = fd.patch(model); print(patched); ...; patched.undo()

    Needs no example input. Parameters, state_dict, hooks, modes and devices stay, copies and pickles of the model are
    patched too, and torch.compile sees one op a pair. A SiLU is fused where the source proves that it alone gets the
    norm's result: `silu(norm(x))`, two statements in a row, neighbours in a `Sequential`; SiLU is `nn.SiLU`, `F.silu`
    or x * sigmoid(x). A norm with a hook on it runs by itself. Subclasses of GroupNorm with a forward of their own are
    left alone and named in the report, but for the one that computes in fp32 and casts back (guided-diffusion's).
    Results differ from the model's by rounding only; a norm's result keeps its input's dtype under autocast.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"patch: model is a {type(model).__name__}; pass the torch.nn.Module, as in pipe.unet")
    were: dict[nn.Module, Any] = {}
    try:
        norms, left = _replace(model, were)
    except BaseException:
        Patched(model, [], {}, were).undo()
        raise
    return Patched(model, norms, left, were)


def _replace(model: nn.Module, were: dict[nn.Module, Any]) -> tuple[list[Norm], dict[str, str]]:
    """Change the classes in `model`, and write into `were` what they were."""

    def become(module: nn.Module, sites: Sites) -> None:
        kind: Any = type(module)
        module.__class__, were[module] = _derived(kind, sites), kind

    found: dict[nn.GroupNorm, str] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNorm):
            reason = _refuses(module)
            if reason is None:
                found[module] = name
                become(module, ())
            else:
                left[name] = reason
    fused: dict[nn.Module, str] = {}
    for module in model.modules() if found else ():
        sites = tuple(_sites(module, found, fused))
        if sites or _pairs_up(module, found, fused):
            become(module, sites)
    norms = [Norm(name, m.num_groups, m.num_channels, fused.get(m, "")) for m, name in found.items()]
    return norms, left


def _refuses(norm: nn.GroupNorm) -> str | None:
    """Why a norm cannot be replaced."""
    if not is_group_norm(type(norm)):
        return f"{type(norm).__name__} has a forward of its own"
    return "its forward was replaced on the module" if "forward" in norm.__dict__ else None


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """The methods that instances of `kind` have, down to those of torch."""
    seen: set[str] = set()
    for base in kind.__mro__:
        ours = not base.__module__.startswith("torch.")
        for name, f in vars(base).items():
            if ours and isinstance(f, FunctionType) and name not in seen and not name.startswith("__"):
                yield name, f
            seen.add(name)


def _sites(
    module: nn.Module, norms: dict[nn.GroupNorm, str], fused: dict[nn.Module, str]
) -> Iterator[tuple[str, Site]]:
    """The places in the methods of `module` where one of `norms` and a SiLU meet; writes them into `fused`."""
    paths = {
        name
        for name, child in module._modules.items()
        if child is not None and any(m in norms for m in child.modules())
    }
    if not paths or type(module).__reduce_ex__ is not object.__reduce_ex__:
        return
    for name, f in _methods(type(module)):
        core = unwrapped(f)
        node = read(core[0]) if core is not None and paths.intersection(core[0].__code__.co_names) else None
        if core is None or node is None:
            continue

        def meets(site: Site, f: FunctionType = core[0]) -> bool:
            norm, act = _at(site.norm, module, f), _at(site.act, module, f)
            return isinstance(norm, nn.Module) and norm in norms and learn_silu(act)

        for site in join(node, core[0].__code__.co_cellvars, meets):
            # a call that is left, of the same norm, is one without a SiLU behind it
            alone = any(isinstance(n, ast.Call) and path(n.func) == site.norm for n in ast.walk(node))
            where = f"SiLU in {type(module).__name__}.{name}" + (", in some branches" if alone else "")
            fused.setdefault(_at(site.norm, module, core[0]), where)
            yield name, site


def _at(steps: Path, module: nn.Module, f: FunctionType) -> Any:
    """The object that `steps` name in `f`, a method of `module`."""
    code = f.__code__
    if steps[0] == code.co_varnames[0]:
        return look_up(steps[1:], module)
    local = steps[0] in code.co_varnames + code.co_cellvars + code.co_freevars
    return None if local else look_up(steps[1:], f.__globals__.get(str(steps[0])))


def _pairs_up(module: nn.Module, norms: dict[nn.GroupNorm, str], fused: dict[nn.Module, str]) -> bool:
    """Whether `module` is a Sequential with a norm and a SiLU side by side."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        return False
    pairs = [a for a, b in itertools.pairwise(module) if a in norms and learn_silu(b)]
    for norm in pairs:
        fused.setdefault(norm, f"SiLU in {type(module).__name__}")
    return bool(pairs)


@functools.cache
def _derived(kind: Any, sites: Sites) -> Any:
    """A subclass of `kind`, by the same name, whose methods call norms and activations together at `sites`."""
    if kind is nn.GroupNorm:
        return GroupNorm
    content: dict[str, Any] = {"_fastdiff_made": (kind, sites), PAIR: staticmethod(norm_act)}
    content |= {"__reduce_ex__": _reduce, "__prepare_scriptable__": _plain}
    for copied in ("__module__", "__qualname__", "__doc__"):
        content[copied] = getattr(kind, copied)
    for name, f in _methods(kind):
        places = {(s.line, s.column) for method, s in sites if method == name}
        core = unwrapped(f) if places else None
        node = read(core[0]) if core is not None else None
        if core is None or node is None:
            continue
        if join(node, core[0].__code__.co_cellvars, lambda s, places=places: (s.line, s.column) in places):  # type: ignore[misc]
            content[name] = core[1](replaced(core[0], node))
    if issubclass(kind, nn.Sequential) and kind.forward is nn.Sequential.forward:
        content["forward"] = sequential
    bases = (GroupNorm, kind) if issubclass(kind, nn.GroupNorm) else (kind,)
    return type(kind)(kind.__name__, bases, content)


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    """Copies and pickles are patched as this module is."""
    return _revive, self._fastdiff_made, self.__getstate__()  # type: ignore[no-untyped-call]


def _revive(kind: type, sites: Sites) -> Any:
    made = _derived(kind, sites)
    return made.__new__(made)


def _plain(self: nn.Module) -> nn.Module:
    """What torch.jit.script puts in place of this module: one of its own class, with the same content."""
    kind: Any = self._fastdiff_made
    plain: nn.Module = kind[0].__new__(kind[0])
    plain.__dict__ = self.__dict__ | {"_modules": dict(self._modules)}
    return plain
