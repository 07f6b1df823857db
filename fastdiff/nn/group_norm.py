"""GroupNorm with the SiLU behind it, the time embedding around it and the skip in front of it, as one op."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastdiff.ops.group_norm_silu import group_norm_silu

ACTS = ("", "silu", "swish")


class GroupNorm(nn.GroupNorm):
    """y = act(GroupNorm(cat([x, x2], 1) + add) (1 + scale) + shift), one op; x2, add, scale and shift may be absent.

    act: "silu" (or "swish", the same), "" or None for none. The other arguments, their order and the state_dict are
    those of `torch.nn.GroupNorm` and, with act behind them, of `apex.contrib.group_norm.GroupNorm`; but any number of
    channels, NCHW and channels_last, any number of spatial axes, every device. The result has x's dtype, under
    autocast too; statistics are float32. Raises ValueError when num_groups does not divide num_channels.

    It is a `torch.nn.GroupNorm`, so that code which asks for one (optimizer groups without weight decay,
    initialisation, `fd.patch`) finds it. Wu & He 2018.
    """

    act = ""  # of the class, so that `fd.patch` can make a torch.nn.GroupNorm one of these and back

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        act: str | None = "",
        *,
        bias: bool = True,
    ) -> None:
        if num_groups < 1 or num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups={num_groups} does not divide num_channels={num_channels}; pass a divisor"
            )
        if not isinstance(act, str | None) or (act or "").lower() not in ACTS:
            raise ValueError(f"GroupNorm: act={act!r} is unknown; accepted: 'silu', 'swish', '' or None")
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        if not bias:
            self.register_parameter("bias", None)
        self.act = (act or "").lower()

    def forward(
        self,
        input: Tensor,
        *,
        x2: Tensor | None = None,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """(N, num_channels, *spatial) in input's dtype; the tensors are described in `ops/group_norm_silu.py`."""
        return self.run(input, bool(self.act), x2=x2, add=add, scale=scale, shift=shift)

    def run(
        self,
        x: Tensor,
        act: bool,
        *,
        x2: Tensor | None = None,
        add: Tensor | None = None,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
    ) -> Tensor:
        """forward, with or without the SiLU."""
        # a trace (torch.fx, torch.jit) records torch's own functions only
        traced = not isinstance(x, Tensor) or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if traced and x2 is None and add is None and scale is None and shift is None:
            y = functional.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
            return functional.silu(y) if act else y
        flat = x.ndim == 2
        y = group_norm_silu(
            x[..., None] if flat else x,
            self.num_groups,
            self.weight,
            self.bias,
            eps=self.eps,
            x2=x2,
            add=add,
            scale=scale,
            shift=shift,
            act=act,
        )
        return y[..., 0] if flat else y

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script puts in place of this module: torch's own, with the same parameters."""
        if self.act:
            return self  # which it cannot compile: with a SiLU, two modules would rename the parameters
        plain = nn.GroupNorm.__new__(nn.GroupNorm)
        plain.__dict__ = {k: v for k, v in self.__dict__.items() if k != "act"}
        return plain

    def extra_repr(self) -> str:
        """What `print(net)` shows."""
        return super().extra_repr() + (f", act={self.act}" if self.act else "")
