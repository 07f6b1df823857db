"""`step` of each class of diffusers', with that class's own arguments in that class's own order.

Pipelines look at the arguments that `scheduler.step` has, and pass eta and generator where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from fastdiff.formats.diffusers.noise import Generators

if TYPE_CHECKING:
    from fastdiff.formats.diffusers.scheduler import DiffusersScheduler


class Output(NamedTuple):
    """What `step` returns."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None


class Ask(NamedTuple):
    """What a call of `step` wants, beside the row."""

    options: Mapping[str, Any] = MappingProxyType({})
    """Of the solver."""
    draws: bool = False
    """Whether diffusers' class draws from the generator in this call, be it used or not."""
    generator: Generators = None
    noise: Tensor | None = None
    gamma: float = 0.0
    """Churn of Euler."""
    s_noise: float = 1.0
    both: bool = True
    """Whether the class returns x0 beside the state where it returns a tuple."""
    return_dict: bool = True


Result = Output | tuple[Tensor, ...]


def _ddpm(
    self: DiffusersScheduler,
    model_output: Tensor,
    timestep: int | float | Tensor,
    sample: Tensor,
    generator: Generators = None,
    return_dict: bool = True,
) -> Result:
    """One reverse step; noise from `generator`, drawn at every step but t = 0."""
    k = self.index_of_call(timestep)
    ask = Ask(draws=self.told[k] > 0, generator=generator, return_dict=return_dict)
    return self.advance(k, model_output, sample, ask)


def _ddim(
    self: DiffusersScheduler,
    model_output: Tensor,
    timestep: int | float | Tensor,
    sample: Tensor,
    eta: float = 0.0,
    use_clipped_model_output: bool = False,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
    return_dict: bool = True,
) -> Result:
    """One DDIM step; eta > 0 draws noise from `generator`, or takes variance_noise."""
    if variance_noise is not None and generator is not None:
        raise ValueError("step: generator and variance_noise are both given; pass one of them")
    options = {"eta": float(eta), "clipped_direction": bool(use_clipped_model_output)}
    ask = Ask(options, eta > 0, generator, variance_noise, return_dict=return_dict)
    return self.advance(self.index_of_call(timestep), model_output, sample, ask)


def _euler(
    self: DiffusersScheduler,
    model_output: Tensor,
    timestep: int | float | Tensor,
    sample: Tensor,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = float("inf"),
    s_noise: float = 1.0,
    generator: Generators = None,
    return_dict: bool = True,
) -> Result:
    """One Euler step; churn noise is added here, after the network was called, as in diffusers."""
    k = self.index_of_call(timestep)
    gamma = min(s_churn / len(self.told), 2**0.5 - 1) if s_tmin <= self.u[k] <= s_tmax else 0.0
    ask = Ask(draws=gamma > 0, generator=generator, gamma=gamma, s_noise=s_noise, return_dict=return_dict)
    return self.advance(k, model_output, sample, ask)


def _ancestral(
    self: DiffusersScheduler,
    model_output: Tensor,
    timestep: int | float | Tensor,
    sample: Tensor,
    generator: Generators = None,
    return_dict: bool = True,
) -> Result:
    """One ancestral Euler step, noise from `generator` at every step."""
    ask = Ask(draws=True, generator=generator, return_dict=return_dict)
    return self.advance(self.index_of_call(timestep), model_output, sample, ask)


def _heun(
    self: DiffusersScheduler,
    model_output: Tensor,
    timestep: int | float | Tensor,
    sample: Tensor,
    return_dict: bool = True,
) -> Result:
    """One of the two calls of a Heun step."""
    return self.advance(self.index_of_call(timestep), model_output, sample, Ask(return_dict=return_dict))


def _multistep(
    self: DiffusersScheduler,
    model_output: Tensor,
    timestep: int | float | Tensor,
    sample: Tensor,
    generator: Generators = None,
    variance_noise: Tensor | None = None,
    return_dict: bool = True,
) -> Result:
    """One step of DPM-Solver; the SDE forms draw noise from `generator`, or take variance_noise."""
    sde = self.config.algorithm_type.startswith("sde")
    ask = Ask({}, sde, generator, variance_noise, both=False, return_dict=return_dict)
    return self.advance(self.index_of_call(timestep), model_output, sample, ask)


def _plms(
    self: DiffusersScheduler,
    model_output: Tensor,
    timestep: int | float | Tensor,
    sample: Tensor,
    return_dict: bool = True,
) -> Result:
    """One linear multistep; the first step takes two calls."""
    ask = Ask(both=False, return_dict=return_dict)
    return self.advance(self.index_of_call(timestep), model_output, sample, ask)


CALLS: dict[str, Callable[..., Result]] = {
    "DDPMScheduler": _ddpm,
    "DDIMScheduler": _ddim,
    "EulerDiscreteScheduler": _euler,
    "EulerAncestralDiscreteScheduler": _ancestral,
    "HeunDiscreteScheduler": _heun,
    "DPMSolverMultistepScheduler": _multistep,
    "PNDMScheduler": _plms,
}
