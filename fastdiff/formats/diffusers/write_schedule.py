"""What a Denoiser's schedule, prediction and sampling defaults are in the config of a diffusers scheduler."""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdiff.formats.diffusers.refusal import refuse
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.tables.schedule import Schedule

_CLASSES = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
_PREDICTS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_VARIANCE = {"beta_tilde": "fixed_small", "beta": "fixed_large", "learned_range": "learned_range"}
_NAMED = {"linear": "linear", "scaled_linear": "scaled_linear"}


def _take(given: dict[str, Any], key: str, default: Any, *accepted: Any) -> Any:
    """given.pop(key), one of `accepted` or ValueError."""
    value = given.pop(key, default)
    if value not in accepted:
        raise refuse(key, value, ", ".join(map(repr, accepted)))
    return value


def _betas(schedule: Schedule) -> dict[str, Any]:
    """The keys of a scheduler's betas: by name where diffusers has the name, else the betas themselves."""
    spec = schedule.spec or {}
    if schedule.T is None:
        raise refuse("schedule", schedule.name, "discrete schedules, which T steps have trained")
    if spec.get("name") in _NAMED:
        named = {"beta_schedule": _NAMED[spec["name"]], "beta_start": spec["beta_start"], "beta_end": spec["beta_end"]}
        return {"num_train_timesteps": schedule.T, **named}
    if spec.get("name") == "cosine" and spec["s"] == 0.008:
        return {"num_train_timesteps": schedule.T, "beta_schedule": "squaredcos_cap_v2"}
    betas = spec.get("betas")
    if betas is None:
        t = np.arange(-1.0, schedule.T)
        alpha2, sigma2 = schedule.alpha(t) ** 2, schedule.sigma(t) ** 2
        if not alpha2[-1] > 0:
            raise refuse(
                "schedule", schedule.name, "schedules with alpha > 0 at the last step, whose betas are below 1"
            )
        # 1 - alpha_t^2/alpha_s^2, without the cancellation of small ones
        kept = alpha2[1:] / alpha2[:-1]
        betas = np.where(kept < 0.5, 1 - kept, np.diff(sigma2) / alpha2[:-1]).tolist()
    return {"num_train_timesteps": schedule.T, "trained_betas": betas}


def _clip(solver: str, clip: float | None) -> dict[str, Any]:
    if solver in ("ddim", "ddpm", "heun"):
        return {"clip_sample": False} if clip is None else {"clip_sample": True, "clip_sample_range": clip}
    if clip is not None:
        raise refuse("clip", clip, f"None with {solver}, whose class in diffusers does not clip")
    return {}


def _options(solver: str, den: Denoiser, options: dict[str, Any]) -> dict[str, Any]:
    """The keys of one solver's own class; takes from `options` what they say."""
    if solver == "ddpm":
        kinds = ("learned_range",) if den.variance else ("beta_tilde", "beta")
        return {"variance_type": _VARIANCE[_take(options, "variance", kinds[0], *kinds)]}
    if den.variance and solver != "dpmpp_2m":
        raise refuse("predicts", den.predicts, f"{', '.join(_PREDICTS)} with {solver}; a learned variance with ddpm")
    if solver == "ddim":
        _take(options, "eta", 0.0, 0)
        if den.defaults.get("clip") is not None:
            _take(options, "clipped_direction", False, False)
        options.pop("clipped_direction", None)
    return {"variance_type": "learned_range"} if den.variance else {}


def scheduler_config(den: Denoiser) -> dict[str, Any]:
    """The scheduler_config.json that says what `den` says: the betas, what the network predicts, how it is sampled.

    The class is that of the defaults' solver; where they name none DDIMScheduler, or DDPMScheduler for a learned
    variance. What they leave open is as `fd.sample` has it: spacing "trailing", ending at 0, no clip; only options of
    ddim are diffusers'. steps, an argument of a pipeline's call, is left out. Raises ValueError for what no key says:
    continuous schedules, alpha = 0, other predictions, solvers, spacings and options.
    """
    given = {key: value for key, value in den.defaults.items() if value is not None}
    options = dict(given.pop("options", {}))
    solver = _take(given, "solver", "ddpm" if den.variance else "ddim", *_CLASSES)
    predicts = den.predicts.removesuffix("+range")
    if predicts not in _PREDICTS:
        raise refuse("predicts", den.predicts, f"{', '.join(_PREDICTS)}, or with +range")
    config = {"_class_name": _CLASSES[solver], **_betas(den.schedule), "prediction_type": _PREDICTS[predicts]}
    config["timestep_spacing"] = _take(given, "spacing", "trailing", "leading", "trailing", "linspace")
    if config["timestep_spacing"] == "leading":
        config["steps_offset"] = given.pop("steps_offset", 0)
    config |= _clip(solver, given.pop("clip", None)) | _options(solver, den, options)
    final = _take(given, "final", "zero", "zero", *(["first"] if solver in ("ddim", "euler") else []))
    if solver == "ddim":
        config["set_alpha_to_one"] = final == "zero"
    elif solver == "euler":
        config["final_sigmas_type"] = "zero" if final == "zero" else "sigma_min"
    given.pop("steps", None)
    for key, value in (given | options).items():
        raise refuse(
            key, value, f"defaults that a config of {_CLASSES[solver]} has a key for; take it out of den.defaults"
        )
    return config
