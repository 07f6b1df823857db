"""A live module of somebody else's: its weights by name, and whether it still is what it was when it was read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastdiff.formats import lora
from fastdiff.formats.lora import Made, NotRead

_PLAIN = {nn.Linear, nn.Conv1d, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.Embedding}
_CONTAINERS = {nn.ModuleList, nn.Sequential, nn.SiLU, nn.Dropout, nn.Identity, nn.AvgPool2d, nn.GELU}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# attention computed in another way, not another attention
_PROCESSORS = {"AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor"}
_FREE_U = ("s1", "s2", "b1", "b2")


def weights(model: nn.Module, ours: Callable[[type[nn.Module]], bool], scale: float = 1.0) -> dict[str, Made]:
    """Every parameter as it would be named without adapters, and how it is made of those that there are.

    ours: whether a class, none of torch's, is one whose forward we know. scale: of all LoRA, beside their own. Raises
    NotRead for modules that are not.
    """
    found: dict[str, Made] = {}
    adapted = ""
    for name, module in model.named_modules():
        if adapted and name.startswith(adapted):
            continue
        adapted = ""
        if lora.is_adapted(module):
            adapted = f"{name}."
            found |= lora.read(name, module, scale)
            continue
        if type(module) not in _PLAIN | _CONTAINERS and not ours(type(module)):
            raise NotRead(f"{name} is a {type(module).__module__}.{type(module).__qualname__}")
        found |= {f"{name}.{key}": Made((f"{name}.{key}",), lora.itself) for key in _parameters(module)}
    # adapters of 16-bit models are often in float32
    dtypes = {p.dtype for name, p in model.named_parameters() if ".lora_" not in name}
    if len(dtypes) != 1 or len({p.device for p in model.parameters()}) != 1:
        raise NotRead(f"its parameters are on several devices, or of several dtypes: {', '.join(map(str, dtypes))}")
    return found


def _parameters(module: nn.Module) -> list[str]:
    return [key for key, p in module._parameters.items() if p is not None]


class Live:
    """What of `model` decides how it computes and is no parameter; `same` asks whether anything may have changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        # a hook on the whole runs in any case
        self._modules = list(model.modules())[1:]
        self._kinds = list(map(type, self._modules))
        self._dicts = [m.__dict__ for m in self._modules]
        self._sizes = list(map(len, self._dicts))
        self._parameters = [m._parameters for m in model.modules() if m._parameters]
        self._hooks = [d[name] for d in self._dicts for name in _HOOKS[:2]]
        self._attention = [d for d in self._dicts if "processor" in d]
        self._processors = [d["processor"] for d in self._attention]
        self._dropouts = [m.__dict__ for m in self._modules if isinstance(m, nn.Dropout) and m.p]
        self._training = [d["training"] for d in self._dropouts]
        self._adapted = [m for m in self._modules if lora.is_adapted(m)]
        self.adapters = list(map(lora.state, self._adapted))
        first = next(model.parameters())
        self._place = first.dtype, first.device

    def same(self) -> bool:
        """False where classes, hooks, attributes' number, processors, modes, adapters, dtype or device are others."""
        first = next(self.model.parameters())
        return (
            (first.dtype, first.device) == self._place
            and list(map(type, self._modules)) == self._kinds
            and list(map(len, self._dicts)) == self._sizes
            and not any(self._hooks)
            and [d.get("processor") for d in self._attention] == self._processors
            and [d["training"] for d in self._dropouts] == self._training
            and list(map(lora.state, self._adapted)) == self.adapters
        )

    def signature(self) -> tuple[Any, ...]:
        """What the packed weights depend on beside the parameters."""
        return self._place, self._modules, self._kinds, self.adapters

    def refuses(self) -> str | None:
        """Why nobody but the model itself can compute what it computes now."""
        for module, d in zip(self._modules, self._dicts, strict=True):
            if any(d[name] for name in _HOOKS) or nn.modules.module._has_any_global_hook():  # type: ignore[no-untyped-call]
                return f"a {type(module).__name__} has a hook"
            if "forward" in d:
                return f"the forward of a {type(module).__name__} was replaced"
            if all(d.get(name) for name in _FREE_U):
                return "FreeU is on"
            if isinstance(module, nn.Dropout) and module.p and module.training:
                return "it is in training mode and has dropout"
            processor = getattr(module, "processor", None)
            if processor is not None and type(processor).__name__ not in _PROCESSORS:
                return f"attention has a {type(processor).__name__}"
        return None

    def wants_gradients(self) -> bool:
        """Whether a call would be expected to give gradients to parameters."""
        if not torch.is_grad_enabled():
            return False
        return any(p is not None and p.requires_grad for held in self._parameters for p in held.values())
