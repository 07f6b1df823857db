"""`prepare(net)`: a U-Net as inference wants it, made of a copy of the net whose modules are swapped one by one.

The copy follows the net: what was packed is checked before a call, and packed again in the same memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdiff.nn import own
from fastdiff.nn.arguments import Cond
from fastdiff.nn.follow import LAST, Follower, Packer
from fastdiff.nn.fp8 import Fp8Linear, Fp8Shortcut, fits
from fastdiff.nn.known import is_bare
from fastdiff.nn.layers import Attention, Deep, Nearest, ResBlock, Up
from fastdiff.nn.packed import BiasedNorm, FoldedUp, PreparedResBlock, Shortcut, folded
from fastdiff.nn.tapes import Tapes
from fastdiff.nn.unet import UNet

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Tactics(NamedTuple):
    """What `prepare` does to a net; each can be switched off by itself. None but fp8 changes more than rounding."""

    channels_last: bool = True
    """Weights and activations are channels_last (channels_last_3d) throughout: convolutions on tensor cores and norms
    read and write them as they lie. Saves the transposes, of up to two maps a convolution. Nothing for dims=1."""

    bias_in_norm: bool = True
    """The norm behind a ResBlock's first convolution adds its bias: to the time embedding, once, where that is added
    too, else by itself. Saves reading and writing one map a ResBlock where the convolution adds it in a pass of its
    own, as cuDNN's does."""

    bias_in_residual: bool = True
    """The bias of a ResBlock's second convolution, that of its shortcut and the sum of both ways are one pass. Saves
    reading and writing one map a bias, so two a ResBlock with a shortcut, where convolutions add theirs in passes of
    their own."""

    split_shortcut: bool = True
    """The 1x1 shortcut of cat([x, skip]) is two matrix products, the second into the result of the first. Saves
    writing the concatenation and reading x and skip for it."""

    fold_upsample: bool = True
    """Repetition and the 3x3 convolution behind it are one transposed convolution of kernel 4, stride 2. Saves 5/9 of
    the multiplications (19/27 in volumes) and writing and reading the repeated map, 4 (8) times the input."""

    time_product: bool = True
    """The projections of the time embedding in all ResBlocks are one matrix product a call, where no table_row is
    given. Saves a launch a ResBlock but one."""

    winograd: bool = True
    """On CPUs, in float32, for images: convolutions and attention are C++ of ours, norms in front and sums behind in
    their own passes, 3x3 ones by Winograd's F(4x4, 3x3) with a quarter of the multiplications. A convolution errs by
    a few 1e-6 of its result's norm where a direct one errs by a few 1e-7. Of the tactics above time_product alone is
    then looked at: nothing is left for the others. `prepare(exact=True)` is the same as winograd=False."""

    fp8: bool = False
    """LOSSY, and so not on by itself: the linear layers of attention and the 1x1 shortcuts multiply in float8 (e4m3),
    each with 2 to 5 % error (`fp8.py` has the bound). Layers whose channels are no multiples of 16, float64, and GPUs
    older than compute capability 8.9 keep the exact product; `PreparedUNet.fp8_layers` names those in float8."""


def prepare(
    net: UNet,
    *,
    dtype: torch.dtype | None = None,
    tactics: Tactics | None = None,
    exact: bool = False,
    follow: bool = True,
) -> PreparedUNet:
    """A copy of `net` for inference, in `dtype` (None: as net is) and with `tactics` (None: `Tactics()`).

    exact: without Winograd's convolutions, so that only rounding differs from net. follow=False: the copy does not
    follow, and holds nothing of net: once nobody else does, only the packed weights take memory.

    net stays as it is and can be trained on; the copy follows its numbers, see `PreparedUNet`. Raises TypeError for
    anything but a UNet with the modules that UNet puts into it, ValueError for a dtype that is no float of 16 bits or
    more and for parameters made under torch.inference_mode.
    """
    _check(net, dtype)
    tactics = tactics or Tactics()
    if exact:
        tactics = tactics._replace(winograd=False)
    with torch.inference_mode(False), torch.no_grad():
        packer = Packer(net, dtype or net.time.linear1.weight.dtype, tactics.channels_last)
        twin: Any = packer.twin()
        return assemble(twin, packer, tactics, follow)


def assemble(twin: UNet, packer: Packer, tactics: Tactics, follow: bool = True) -> PreparedUNet:
    """The net that `twin`, whose parameters are packer's stand-ins, becomes by `tactics`."""
    with torch.inference_mode(False), torch.no_grad():
        twin.eval()
        return PreparedUNet(twin, swap(twin, packer, tactics), packer, tactics, follow)


class PreparedUNet(nn.Module):
    """F = net(x, t, cond), as `net`, a UNet, computes it; made by `prepare`.

    Parameters of `net` that are written to (optimizer.step, load_state_dict, copy_), moved or cast are packed again, in
    the memory where their copies lie, before the next call; dtype and device stay those of `prepare`. Compiled calls
    and captured graphs see new numbers after `refresh()`. Writes through `p.data` are counted by nobody:
    `refresh(every=True)`. ValueError where the net has other modules or shapes than it had.

    Gradients go to x and the conditions, not to weights; dropout is off.
    """

    def __init__(
        self, twin: UNet, times: nn.Linear | None, packer: Packer, tactics: Tactics, follow: bool = True
    ) -> None:
        super().__init__()
        self.net, self.times, self.tactics = twin, times, tactics
        follower = packer.fill(self)
        self._follower: Follower | None = follower if follow else None
        # in a tuple, or the net would become a part of this one
        self._made = packer.net if follow else None, packer.dtype
        self._tapes = Tapes(twin) if own.has(twin) and times is not None else None
        self.config, self.classes, self.factor, self.columns = twin.config, twin.classes, twin.factor, twin.columns
        self.in_channels, self.out_channels, self.dims = twin.in_channels, twin.out_channels, twin.dims
        self.null, self.embed, self.told, self.deep_shape = twin.null, twin.embed, twin.told, twin.deep_shape

    def forward(
        self,
        x: Tensor,
        t: Tensor | float | None,
        cond: Cond = None,
        *,
        table_row: Tensor | None = None,
        deep: Deep | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """F (N, out_channels, *spatial) in the packed dtype, channels_last where x need not be; see UNet."""
        self._follow(x)
        return self.run(x, t, cond, table_row=table_row, deep=deep, residuals=residuals)

    def run(
        self,
        x: Tensor,
        t: Tensor | float | None,
        cond: Cond = None,
        *,
        table_row: Tensor | None = None,
        deep: Deep | None = None,
        residuals: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """forward with the weights as they were packed last: for callers that `refresh` by themselves."""
        if self.times is not None and table_row is None:
            table_row = self.times(self.net.embed(t, cond, x))
        if self.tactics.channels_last and x.ndim == self.dims + 2 and x.ndim in LAST:
            x = x.to(self._made[1], memory_format=LAST[x.ndim])
        if self._tapes is not None and deep is None and table_row is not None:
            played = self._tapes(x, table_row, self.net.context(cond, x), residuals)
            if played is not None:
                return played
        F: Tensor = self.net(x, t, cond, table_row=table_row, deep=deep, residuals=residuals)
        return F

    def time_table(self, t: Tensor, cond: Cond = None) -> Tensor:
        """(K, columns), as UNet.time_table gives it; its lines are for this net only: biases may be folded into it."""
        self._follow(t)
        table: Tensor = self.net.time_table(t, cond) if self.times is None else self.times(self.embed(t, cond, t))
        return table

    @property
    def fp8_layers(self) -> tuple[str, ...]:
        """Names, in the net, of the layers that multiply in float8."""
        made = [name for name, module in self.net.named_modules() if isinstance(module, Fp8Linear)]
        return tuple(name.removesuffix(".product") for name in made)

    def refresh(self, *, every: bool = False) -> bool:
        """Pack again, at the same addresses, what changed in the net (every: all); True where anything had."""
        if self._follower is None and every:
            raise ValueError("PreparedUNet: it was made with follow=False; prepare the net again")
        return self._follower is not None and self._follower.refresh(every=every)

    def _follow(self, x: Tensor) -> None:
        if torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            return
        if self._follower is not None:
            self._follower.refresh()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        raise TypeError("PreparedUNet: its tensors stay where they are; move or cast the net and prepare that")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles are prepared from a copy of the net. Raises TypeError where it holds none."""
        if self._made[0] is None:
            raise TypeError("PreparedUNet: made with follow=False it has no net to be copied from; copy the net")
        return partial(prepare, dtype=self._made[1], tactics=self.tactics), (self._made[0],)


def swap(twin: UNet, packer: Packer, tactics: Tactics) -> nn.Linear | None:
    """Put other modules into `twin`; returns what makes all ResBlocks' columns at once, where the tactic is on."""
    blocks = twin.res_blocks()
    ours = tactics.winograd and not tactics.fp8 and own.takes(packer, twin)
    for block in blocks:
        block.dropout = nn.Identity()  # type: ignore[assignment]
        if tactics.bias_in_norm and not ours:
            _bias_in_norm(block, packer)
    times = _times(blocks, packer) if tactics.time_product else None
    if ours:
        own.convolutions(twin, packer)
        return times
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, ResBlock):
                setattr(parent, name, _res_block(child, packer, tactics))
            elif isinstance(child, Attention) and tactics.fp8:
                _fp8_attention(child, packer)
            elif isinstance(child, Up) and tactics.fold_upsample:
                setattr(parent, name, _folded_up(child.conv, packer))
    return times


def _bias_in_norm(block: ResBlock, packer: Packer) -> None:
    bias = _take(block.conv1, "bias")
    if block.scale_shift:
        block.norm2 = BiasedNorm(block.norm2, bias)  # type: ignore[assignment]
    else:
        block.time.bias = packer.derive(torch.add, block.time.bias, bias)


def _take(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter, which the module then lacks."""
    p = module._parameters[name]
    assert p is not None
    module._parameters[name] = None
    return p


def _times(blocks: list[ResBlock], packer: Packer) -> nn.Linear:
    """The Linear of all columns; the blocks lose theirs."""

    def cat(*parts: Tensor) -> Tensor:
        return torch.cat(parts)

    times = nn.Linear(1, 1, device="meta")
    times.weight = packer.derive(cat, *(b.time.weight for b in blocks))
    times.bias = packer.derive(cat, *(b.time.bias for b in blocks))
    for block in blocks:
        block.time = nn.Identity()  # type: ignore[assignment]
    return times


def _folded_up(conv: nn.Module, packer: Packer) -> FoldedUp:
    return FoldedUp(packer.derive(folded, _take(conv, "weight")), conv._parameters["bias"])


def _res_block(block: ResBlock, packer: Packer, tactics: Tactics) -> nn.Module:
    """What stands for `block`: itself, where nothing but its children changes."""
    resample: nn.Module | None = None
    shortcut: nn.Module | None = None
    bias: nn.Parameter | None = None
    if tactics.bias_in_residual:
        bias = _take(block.conv2, "bias")
        if block.shortcut is not None:
            bias = packer.derive(torch.add, bias, _take(block.shortcut, "bias"))
    if tactics.fold_upsample and isinstance(block.resample, Nearest):
        resample, block.resample = block.resample, None
        block.conv1 = _folded_up(block.conv1, packer)
    if block.shortcut is not None:
        shortcut = _shortcut(block.shortcut, packer, tactics)
        block.shortcut = block.shortcut if shortcut is None else None
    same = resample is None and shortcut is None and bias is None
    return block if same else PreparedResBlock(block, resample, shortcut, bias)


def _shortcut(conv: nn.Module, packer: Packer, tactics: Tactics) -> nn.Module | None:
    """What stands for the 1x1 convolution `conv`, if anything."""
    bias = conv._parameters["bias"]
    narrow = tactics.fp8 and fits(conv.in_channels, conv.out_channels, packer)  # type: ignore[arg-type]
    if not narrow and not tactics.split_shortcut:
        return None
    weight = packer.derive(lambda w: w.flatten(1), _take(conv, "weight"))
    return Fp8Shortcut(Fp8Linear(packer, weight, bias)) if narrow else Shortcut(weight, bias)


def _fp8_attention(attention: Attention, packer: Packer) -> None:
    for name in ("qkv", "out"):
        linear = getattr(attention, name)
        if fits(linear.in_features, linear.out_features, packer):
            setattr(attention, name, Fp8Linear(packer, linear.weight, linear.bias))


def _check(net: Any, dtype: torch.dtype | None) -> None:
    """TypeError for a net that is not just what its config says, ValueError for a dtype that is none of DTYPES."""
    if type(net) is not UNet:
        raise TypeError(
            f"prepare: net is a {type(net).__name__}; it packs a fastdiff.UNet that is not packed yet. "
            "fd.patch(model) fuses the norms of any other module"
        )
    if dtype is not None and dtype not in DTYPES:
        accepted = ", ".join(str(d) for d in DTYPES)
        raise ValueError(f"prepare: dtype={dtype} is not possible; accepted: {accepted}, or None for the net's own")
    with torch.device("meta"):
        model = UNet(**net.config)
    modules, wanted = dict(net.named_modules()), dict(model.named_modules())
    for name in modules | wanted:
        module, want = modules.get(name), wanted.get(name)
        if type(module) is not type(want):
            raise TypeError(
                f"prepare: {_called(name)} is a {type(module).__name__}, where a UNet of its config has a "
                f"{type(want).__name__}; merge adapters into the weights, or use fd.patch(net)"
            )
        if not is_bare(module):  # type: ignore[arg-type]
            raise TypeError(
                f"prepare: {_called(name)} has a hook or a forward of its own, which a copy would lose; remove it"
            )
    shapes = {name: p.shape for name, p in net.state_dict().items()}
    if shapes != {name: p.shape for name, p in model.state_dict().items()}:
        raise TypeError(
            "prepare: net has other parameters than a UNet of its config; build UNet(**config) and load them"
        )


def _called(name: str) -> str:
    return f"net.{name}" if name else "net"
