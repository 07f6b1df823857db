"""What a diffusers scheduler's config says: the betas, what the network predicts, and how diffusers samples from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fastdiff.tables.schedule import Schedule, cosine, from_betas, linear, scaled_linear


def refuse(key: str, value: object, accepted: str) -> ValueError:
    """The sentence about a key that would change the result and is not supported."""
    return ValueError(f"diffusers: {key}={value!r} is not supported; accepted: {accepted}")


def one_of(config: Mapping[str, Any], key: str, *accepted: object) -> Any:
    """config[key] where it is one of `accepted`, else ValueError."""
    if config[key] not in accepted:
        raise refuse(key, config[key], ", ".join(map(repr, accepted)))
    return config[key]


_BETAS: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_CLIP: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0, "timestep_spacing": "leading"}
_NO_THRESHOLD: dict[str, Any] = {"thresholding": False, "rescale_betas_zero_snr": False}
_OWN_SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
_MULTISTEP: dict[str, Any] = {
    "solver_order": 2,
    "algorithm_type": "dpmsolver++",
    "solver_type": "midpoint",
    "use_lu_lambdas": False,
    "use_flow_sigmas": False,
    "use_dynamic_shifting": False,
    "lambda_min_clipped": -float("inf"),
}
_EULER: dict[str, Any] = {
    "interpolation_type": "linear",
    "timestep_type": "discrete",
    "sigma_min": None,
    "sigma_max": None,
}
_HEUN: dict[str, Any] = {"clip_sample": False, "beta_start": 0.00085, "beta_end": 0.012}
_LINSPACE: dict[str, Any] = {"timestep_spacing": "linspace", "final_sigmas_type": "zero"}

_FIXED = {**_NO_THRESHOLD, **_OWN_SIGMAS, **_MULTISTEP, **_EULER}
"""Keys that only have the value given here: any other changes the result in a way that we do not follow."""

_SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "DDPMScheduler": ("ddpm", {**_CLIP, **_NO_THRESHOLD, "variance_type": "fixed_small", "predict_epsilon": True}),
    "DDIMScheduler": ("ddim", {**_CLIP, **_NO_THRESHOLD, "set_alpha_to_one": True}),
    "DPMSolverMultistepScheduler": (
        "dpmpp_2m",
        {**_LINSPACE, **_NO_THRESHOLD, **_OWN_SIGMAS, **_MULTISTEP, "variance_type": None},
    ),
    "EulerDiscreteScheduler": ("euler", {**_LINSPACE, **_OWN_SIGMAS, **_EULER, "rescale_betas_zero_snr": False}),
    "HeunDiscreteScheduler": ("heun", {**_CLIP, **_LINSPACE, **_OWN_SIGMAS, **_HEUN}),
}
"""diffusers' class: our solver, and the keys that the class reads with its defaults, `_BETAS` besides."""

# keys that no scheduler here reads, or that say nothing once the fixed ones have their values
_SILENT = {
    "dynamic_thresholding_ratio",
    "sample_max_value",
    "lower_order_final",
    "euler_at_final",
    "flow_shift",
    "time_shift_type",
    "skip_prk_steps",
    "tensor_format",
    "timestep_values",
}
_VARIANCE = {"fixed_small": "beta_tilde", "fixed_small_log": "beta_tilde", "fixed_large": "beta"}


def _betas(c: Mapping[str, Any]) -> Schedule:
    """The schedule of a scheduler's betas."""
    if c["trained_betas"] is not None:
        return from_betas(c["trained_betas"])
    kind = one_of(c, "beta_schedule", "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    T, first, last = c["num_train_timesteps"], c["beta_start"], c["beta_end"]
    if kind == "squaredcos_cap_v2":
        return cosine(T)
    if kind == "sigmoid":
        # a sigmoid of the betas themselves over -6..6, not the sigmoid of alpha^2 that `tables` has
        return from_betas(first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, T))))
    return (linear if kind == "linear" else scaled_linear)(T, first, last)


def _read(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Our solver, and the keys that the scheduler reads with its defaults filled in."""
    name = config.get("_class_name", "DDPMScheduler")
    if name not in _SCHEDULERS:
        raise refuse("_class_name", name, ", ".join(_SCHEDULERS))
    solver, own = _SCHEDULERS[name]
    known = _SILENT.union(_BETAS, *(keys for _, keys in _SCHEDULERS.values()))
    for key, value in config.items():
        if key not in known and not key.startswith("_"):
            raise refuse(key, value, f"the keys of {', '.join(_SCHEDULERS)}")
    c = {**_BETAS, **own, **{k: v for k, v in config.items() if k in _BETAS or k in own}}
    for key in (k for k in own if k in _FIXED):
        # an absent choice is written False or null
        if c[key] != _FIXED[key] and (c[key] or _FIXED[key]):
            raise refuse(key, c[key], repr(_FIXED[key]))
    return solver, c


def schedule_of(scheduler_config: Mapping[str, Any]) -> tuple[Schedule, str, dict[str, Any]]:
    """(schedule, predicts, defaults for `fd.sample`) of a diffusers scheduler's config.

    predicts: "eps", "x0" or "v", with "+range" where the network also gives a learned variance.
    defaults: "solver" (a name of `fd.SOLVERS`), "steps" None, "spacing" ("leading", "trailing" or "linspace"), "final"
    ("zero", or "first" where diffusers ends at the first step's own level), "clip" (bound on x0 or None), "options" (of
    the solver), and "steps_offset" where "leading" has one. {} and a config without _class_name are DDPMScheduler's.

    Where diffusers does not step over one grid, ours is the nearest: DDPM and DDIM jump T // steps back from each time,
    whatever the spacing (the same for "leading" and where steps divides T); Euler and Heun have fractional times for
    "linspace"; DPMSolverMultistep counts one more step for "leading" and "linspace" and leaves out the last.
    Keys of the other classes are ignored as diffusers does. Raises ValueError naming the key that is not supported.
    """
    solver, c = _read(scheduler_config)
    kind = one_of(c, "prediction_type", "epsilon", "sample", "v_prediction")
    predicts = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}[kind]
    if not c.get("predict_epsilon", True):
        predicts = "x0"
    options: dict[str, Any] = {}
    if solver == "ddpm":
        variance = one_of(c, "variance_type", *_VARIANCE, "learned_range")
        options["variance"] = _VARIANCE.get(variance, variance)
    if solver == "dpmpp_2m":
        one_of(c, "variance_type", None, "learned_range")
    if c.get("variance_type") == "learned_range":
        predicts += "+range"
    if solver == "ddim":
        options["clipped_direction"] = False
    # only Euler has an end of its own to choose; our second order steps would not be diffusers' there
    ends = ("zero", "sigma_min") if solver == "euler" else ("zero",)
    first = (
        not c.get("set_alpha_to_one", True)
        or one_of({"final_sigmas_type": "zero", **c}, "final_sigmas_type", *ends) != "zero"
    )
    spacing = one_of(c, "timestep_spacing", "leading", "trailing", "linspace")
    defaults = {
        "solver": solver,
        "steps": None,
        "spacing": spacing,
        "final": "first" if first else "zero",
        "clip": float(c["clip_sample_range"]) if c.get("clip_sample") else None,
        "options": options,
    }
    if spacing == "leading" and c["steps_offset"]:
        defaults["steps_offset"] = c["steps_offset"]
    return _betas(c), predicts, defaults
