"""`fd.optimize(model)`: somebody else's U-Net on our kernels, by one line and with everything else kept.

What it returns is the model itself with another forward: a second object of a subclass of its class that has the same
attributes, parameters, modules and hooks, since both have one `__dict__`. So `config`, `state_dict`, `to`, LoRA,
saving, `isinstance` are the model's, and whatever is done to one is done to the other. The forward computes on a packed
copy of the weights; before each call it asks whether anything has changed since, and packs again what has. A call that
it cannot compute runs the model's own forward, and says so once.
"""

from __future__ import annotations

import functools
import inspect
import threading
import warnings
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.formats import known
from fastdiff.formats.graphs import Graphs
from fastdiff.formats.known import Kind
from fastdiff.formats.live import Live, weights
from fastdiff.formats.lora import NotRead
from fastdiff.nn.follow import Packer, Restructured
from fastdiff.nn.patch import patch
from fastdiff.nn.prepare import PreparedUNet, Tactics, assemble
from fastdiff.nn.unet import UNet

Net = TypeVar("Net", bound=nn.Module)


def optimize(model: Net, *, tactics: Tactics | None = None) -> Net:
    """`model` on our kernels: the same call, config, parameters and state_dict; ready at once for every size.

        pipe.unet = fd.optimize(pipe.unet)

    A diffusers `UNet2DModel` or `UNet2DConditionModel`, or guided-diffusion's `UNetModel`, becomes a second face of
    itself that computes with `fastdiff.UNet.prepare`'s kernels: on CPUs our own convolutions, on GPUs CUDA graphs; the
    model as it was computes as it did. Weights that change (load_state_dict, optimizer, EMA, LoRA, `.to`) are seen
    before the next call. What the kernels cannot do (gradients to weights, hooks inside, masks, sizes that the net does
    not halve evenly) runs the model's own forward, with one warning a reason. `print(fast.fastdiff)` says what runs.

    Any other module gets `fd.patch` in place, see there, and is returned itself.

    tactics: see `fd.nn.Tactics`. Raises TypeError for what is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"optimize: model is a {type(model).__name__}; pass the torch.nn.Module, as in pipe.unet")
    if hasattr(type(model), "fastdiff"):
        return model
    kind = known.kind_of(model)
    reason = None
    if kind is not None:
        engine = Engine(model, kind, tactics)
        reason = engine.read()
        if reason is None:
            return _face(model, engine)
        warnings.warn(f"fd.optimize: {reason}; its norms are fused in place by fd.patch instead", stacklevel=2)
    patch(model)
    return model


class Engine:
    """What computes for one face: the packed net, as long as the model is what was packed."""

    def __init__(self, model: nn.Module, kind: Kind, tactics: Tactics | None) -> None:
        self.model, self.kind, self.tactics = model, kind, tactics or Tactics()
        self._signature = inspect.signature(kind.call)
        self._net: PreparedUNet | None = None
        self._graphs: Graphs | None = None
        self._live: Live | None = None
        self._scale = 1.0
        self._reason: str | None = None
        self._said: set[str] = set()
        self._lock = threading.Lock()

    @property
    def net(self) -> PreparedUNet | None:
        """What computes, from the first call on; None where the model itself does."""
        return self._net

    def __str__(self) -> str:
        if self._reason is not None:
            return f"{type(self.model).__name__}: its own forward runs, because {self._reason}"
        return f"{type(self.model).__name__} on fastdiff's kernels"

    def read(self) -> str | None:
        """Read the model: why that cannot be, or None."""
        try:
            net, _ = self.kind.read(self.model)
            return None if self.kind.sure else self._differs(net)
        except (NotRead, ValueError) as error:
            return str(error)

    def _differs(self, net: UNet) -> str | None:
        """Why the model is not what it looks like, found by a small call; None where both agree."""
        p = next(self.model.parameters())
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
        x = draw(2, net.in_channels, *[2 * net.factor] * 2).to(p.device, p.dtype)
        labels = {} if net.classes is None else {"y": torch.tensor([0, net.classes - 1], device=p.device)}
        modes = {m: m.training for m in self.model.modules()}
        try:
            with torch.no_grad():
                self.model.eval()
                t = torch.tensor([3, 500], device=p.device)
                want, got = self.model(x, t, **labels), self(self.model, (x, t), labels)
        finally:
            for m, mode in modes.items():
                m.training = mode
        if got is NotImplemented:
            return self._reason or "it takes other arguments"
        bound = 1e-3 if p.dtype == torch.float32 else 5e-2
        if not (got - want).double().norm() <= bound * want.double().norm():
            return f"a {type(self.model).__name__} of {type(self.model).__module__} computes something else"
        return None

    def __call__(self, face: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call, NotImplemented where the model's own forward is to run."""
        if torch.compiler.is_compiling():
            return NotImplemented
        try:
            given = self._signature.bind(self.model, *args, **kwargs)
        except TypeError:
            # it will be told by the model itself
            return NotImplemented
        try:
            call = self.kind.call(*given.args, **given.kwargs)
            with self._lock:
                net = self._ready(call.scale)
            self._takes(net, call.x)
        except NotRead as error:
            self._say(str(error))
            return NotImplemented
        F: Tensor
        if call.x.is_cuda and not torch.cuda.is_current_stream_capturing():
            self._graphs = self._graphs or Graphs(net.run)
            F = self._graphs(call)
        else:
            F = net.run(call.x, call.t, call.cond, residuals=call.residuals)
        # ours is channels_last; who gives a dense NCHW image may take a view of the result
        return self.kind.result(self.model, F.contiguous() if call.x.is_contiguous() else F, call)

    def _say(self, reason: str) -> None:
        if reason not in self._said:
            self._said.add(reason)
            name = type(self.model).__name__
            warnings.warn(f"fd.optimize: the forward of {name} itself runs, because {reason}", stacklevel=5)

    def _takes(self, net: PreparedUNet, x: Tensor) -> None:
        """Raises NotRead for a call that the packed net would not compute as the model does."""
        assert self._live is not None
        if self._live.wants_gradients():
            raise NotRead("its parameters require gradients; call it under torch.no_grad()")
        if torch.is_autocast_enabled(x.device.type):
            raise NotRead("autocast is on")
        if x.ndim == 4 and any(s % net.factor for s in x.shape[2:]):
            raise NotRead(f"{tuple(x.shape[2:])} is not halved evenly; sizes that are multiples of {net.factor} are")

    def _ready(self, scale: float) -> PreparedUNet:
        """The net with the weights of now. Raises NotRead."""
        # while the model runs itself, nobody sees its modules come and go
        if self._reason is not None or self._live is None or not self._live.same() or scale != self._scale:
            self._look(scale)
        if self._reason is not None:
            raise NotRead(self._reason)
        assert self._net is not None
        try:
            self._net.refresh()
        except Restructured:
            self._drop()
            self._look(scale)
            return self._ready(scale)
        return self._net

    def _look(self, scale: float) -> None:
        """Look at all of the model again, and pack it where it is not what was packed."""
        live = Live(self.model)
        before = None if self._live is None else self._live.signature()
        same = before == live.signature() and (scale == self._scale or not live.adapters)
        self._live, self._scale, self._reason = live, scale, live.refuses()
        if self._reason is None and (self._net is None or not same):
            # free the old weights before the new ones are made
            self._drop()
            try:
                self._net = self._pack(scale)
            except (NotRead, ValueError) as error:
                # ValueError: a config that was changed since, parameters made under inference_mode
                self._reason = str(error)

    def _drop(self) -> None:
        if self._graphs is not None:
            self._graphs.close()
        self._net = self._graphs = None

    def _pack(self, scale: float) -> PreparedUNet:
        net, names = self.kind.read(self.model)
        there = weights(self.model, self.kind.ours, scale)
        made = known.made(net, names, there, dict(self.model.named_parameters()))
        packer = Packer(self.model, next(self.model.parameters()).dtype, self.tactics.channels_last)
        packer.adopt(net, made)
        return assemble(net, packer, self.tactics)


def _face(model: Net, engine: Engine) -> Net:
    """A second object with the attributes of `model`, whose forward asks `engine` first."""
    own: Any = type(model)
    kind = _derived(own)
    face: Net = kind.__new__(kind)
    object.__setattr__(face, "__dict__", model.__dict__)
    kind.fastdiff.__set__(face, engine)
    return face


@functools.cache
def _derived(kind: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        y = self.fastdiff(self, args, kwargs)
        return kind.forward(self, *args, **kwargs) if y is NotImplemented else y

    functools.update_wrapper(forward, kind.forward)
    content: dict[str, Any] = {
        "__slots__": ("fastdiff",),
        "forward": forward,
        "original": property(lambda self: self.fastdiff.model, doc="The model with its own forward."),
        "__reduce_ex__": lambda self, _: (optimize, (self.fastdiff.model,)),
    }
    for copied in ("__module__", "__qualname__", "__doc__"):
        content[copied] = getattr(kind, copied)
    return type(kind)(kind.__name__, (kind,), content)
