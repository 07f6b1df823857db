"""What other people's modules compute: SiLU in all its spellings, and GroupNorm in fp32. Proved from their source."""

from __future__ import annotations

import ast
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from fastdiff.nn.group_norm import GroupNorm
from fastdiff.nn.sites import path
from fastdiff.nn.source import read

_SILUS: set[Any] = {functional.silu, nn.SiLU}
"""Functions, and classes of modules, that are known to be SiLU."""

_SIGMOIDS = (torch.sigmoid, functional.sigmoid)


def look_up(steps: tuple[Any, ...], root: Any) -> Any:
    """The object at `steps` from `root` through modules and containers, running no code; None if there is none."""
    value = root
    for step in steps:
        if isinstance(step, tuple):
            if not isinstance(value, nn.Sequential | nn.ModuleList | nn.ModuleDict):
                return None
            keys = list(value._modules)
            key = keys[step[0]] if isinstance(step[0], int) and -len(keys) <= step[0] < len(keys) else step[0]
            value = value._modules.get(key)
        elif isinstance(value, nn.Module):
            value = value._modules[step] if step in value._modules else value.__dict__.get(step)
        elif isinstance(value, ModuleType):
            value = value.__dict__.get(step)
        else:
            return None
    return value


def learn_silu(act: Any) -> bool:
    """Whether `act`, a function or a module, is SiLU. What was proved once is remembered for `is_silu`."""
    kind = type(act) if isinstance(act, nn.Module) else act
    if not isinstance(kind, type | FunctionType):
        return False
    if kind not in _SILUS:
        if isinstance(kind, type) and kind.__call__ is not nn.Module.__call__:
            return False
        f = vars(kind).get("forward") if isinstance(kind, type) else kind
        if not isinstance(f, FunctionType) or not _says_silu(f, method=isinstance(kind, type)):
            return False
        _SILUS.add(kind)
    return True


def is_silu(act: Any) -> bool:
    """Whether calling `act` is SiLU and nothing else, as far as `learn_silu` has been asked."""
    if isinstance(act, nn.Module):
        return type(act) in _SILUS and is_bare(act)
    return isinstance(act, FunctionType) and act in _SILUS


def is_bare(module: nn.Module) -> bool:
    """Whether calling `module` is its class's forward and nothing else: no hook sees what goes in or out."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
        or nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def norm_act(act: Any, norm: Any, x: Any, **given: Any) -> Any:
    """act(norm(x)), as one op where that is GroupNorm and SiLU."""
    plain = isinstance(norm, GroupNorm) and type(norm).forward is GroupNorm.forward and not norm.act
    if plain and is_silu(act) and is_bare(norm):
        return norm.run(x, True)
    return act(norm(x), **given)


def sequential(self: nn.Sequential, input: Any) -> Any:
    """`torch.nn.Sequential.forward` with every norm and the activation behind it as one call."""
    layers = list(self)
    while layers:
        layer = layers.pop(0)
        input = norm_act(layers.pop(0), layer, input) if layers and isinstance(layer, GroupNorm) else layer(input)
    return input


def is_group_norm(kind: type[nn.Module]) -> bool:
    """Whether a subclass of `torch.nn.GroupNorm` computes that, perhaps in fp32 and back in the input's dtype."""
    if kind.__call__ is not nn.Module.__call__:
        return False
    if kind.forward is nn.GroupNorm.forward:
        return True
    f = vars(kind).get("forward")
    if not isinstance(f, FunctionType) or kind.__mro__[1] is not nn.GroupNorm:
        return False
    said = _returned(f, 2)
    if said is None:
        return False
    value, (_, x) = said
    return ast.unparse(value) in {f"super().forward({x}.float()).{to}({x}.dtype)" for to in ("type", "to")}


def _says_silu(f: FunctionType, *, method: bool) -> bool:
    """Whether f(x) is x sigmoid(x) or silu(x)."""
    said = _returned(f, 2 if method else 1)
    if said is None:
        return False
    value, names = said
    x = names[-1]

    def calls(node: ast.expr, known: Any) -> bool:
        steps = path(node.func) if isinstance(node, ast.Call) and not node.keywords else None
        if steps is None or steps[0] in names or [ast.unparse(a) for a in node.args] != [x]:  # type: ignore[attr-defined]
            return False
        return look_up(steps[1:], f.__globals__.get(str(steps[0]))) in known

    match value:
        case ast.BinOp(left=a, op=ast.Mult(), right=b):
            for one, other in ((a, b), (b, a)):
                if ast.unparse(one) == x and (ast.unparse(other) == f"{x}.sigmoid()" or calls(other, _SIGMOIDS)):
                    return True
    return calls(value, (functional.silu,))


def _returned(f: FunctionType, arguments: int) -> tuple[ast.expr, list[str]] | None:
    """(expression, names of the arguments) of a function that is one `return`."""
    node = read(f)
    if node is None or node.decorator_list:
        return None
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    a = node.args
    if len(a.posonlyargs + a.args) != arguments or a.vararg or a.kwonlyargs or a.kwarg or len(body) != 1:
        return None
    [last] = body
    if not isinstance(last, ast.Return) or last.value is None:
        return None
    return last.value, [arg.arg for arg in a.posonlyargs + a.args]
