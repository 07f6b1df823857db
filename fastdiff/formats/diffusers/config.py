"""What a diffusers scheduler's config says, key by key: one reading for `fd.load` and for `fd.DiffusersScheduler`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastdiff.formats.diffusers.betas import schedule_of_betas
from fastdiff.formats.diffusers.refusal import one_of, refuse
from fastdiff.tables.schedule import Schedule, zero_snr


class Config(dict[str, Any]):
    """A mapping that also answers by attribute, as diffusers' configs do."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the scheduler's config has no key {name!r}; it has {', '.join(self)}") from None


_COMMON: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "steps_offset": 0,
}
_THRESHOLD: dict[str, Any] = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
_CLIP: dict[str, Any] = {"clip_sample": True, "clip_sample_range": 1.0}
_LEADING = {"timestep_spacing": "leading"}
_LINSPACE = {"timestep_spacing": "linspace"}
_RESCALE = {"rescale_betas_zero_snr": False}
_OWN_SIGMAS = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"), False)
_LAST = {"final_sigmas_type": "zero"}

DEFAULTS: dict[str, dict[str, Any]] = {
    "DDPMScheduler": {
        **_COMMON,
        **_CLIP,
        **_THRESHOLD,
        **_LEADING,
        **_RESCALE,
        "variance_type": "fixed_small",
        "predict_epsilon": True,
    },
    "DDIMScheduler": {**_COMMON, **_CLIP, **_THRESHOLD, **_LEADING, **_RESCALE, "set_alpha_to_one": True},
    "PNDMScheduler": {**_COMMON, **_LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "DPMSolverMultistepScheduler": {
        **_COMMON,
        **_THRESHOLD,
        **_LINSPACE,
        **_RESCALE,
        **_OWN_SIGMAS,
        **_LAST,
        "solver_order": 2,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "time_shift_type": "exponential",
        "use_dynamic_shifting": False,
        "lambda_min_clipped": -float("inf"),
        "variance_type": None,
    },
    "EulerDiscreteScheduler": {
        **_COMMON,
        **_LINSPACE,
        **_RESCALE,
        **_OWN_SIGMAS,
        **_LAST,
        "interpolation_type": "linear",
        "timestep_type": "discrete",
        "sigma_min": None,
        "sigma_max": None,
    },
    "EulerAncestralDiscreteScheduler": {**_COMMON, **_LINSPACE, **_RESCALE},
    "HeunDiscreteScheduler": {
        **_COMMON,
        **_CLIP,
        **_LINSPACE,
        **_OWN_SIGMAS,
        "clip_sample": False,
        "beta_start": 0.00085,
        "beta_end": 0.012,
    },
}
"""diffusers' classes that are followed, and the keys that each reads with its defaults."""

_ONLY: dict[str, Any] = {"use_flow_sigmas": False, "use_dynamic_shifting": False, "interpolation_type": "linear"}
"""Keys that only have the value given here: any other changes the result in a way that we do not follow."""

# keys that older versions wrote
_SILENT = {"tensor_format", "timestep_values"}
# a live scheduler's config has no such key
_LEGACY = {"predict_epsilon"}
_PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# other multistep classes' names, which diffusers' reads so
_SAME = {"algorithm_type": {"deis": "dpmsolver++"}, "solver_type": dict.fromkeys(("logrho", "bh1", "bh2"), "midpoint")}


class Reading(NamedTuple):
    """A config, read."""

    name: str
    """diffusers' class."""
    keys: dict[str, Any]
    """The keys that the class reads, defaults filled in."""
    schedule: Schedule
    predicts: str
    """"eps", "x0" or "v", with "+range" where the network also gives a learned variance."""
    clip: float | None
    """Bound on |x0|."""


def class_of(config: Mapping[str, Any]) -> str:
    """The class whose config it is. That of a scheduler built in Python has no name: the class with exactly its keys.

    What an old DDPMScheduler could have saved is that class's, {} too. Raises ValueError where no class is followed.
    """
    name = config.get("_class_name")
    if name is not None and name not in DEFAULTS:
        raise refuse("_class_name", name, ", ".join(DEFAULTS))
    if name is not None:
        return str(name)
    keys = {key for key in config if not key.startswith("_")}
    for name, own in DEFAULTS.items():
        if keys == own.keys() - _LEGACY:
            return name
    if "_use_default_values" not in config and keys <= DEFAULTS["DDPMScheduler"].keys() | _SILENT:
        return "DDPMScheduler"
    unknown = keys - _SILENT.union(*DEFAULTS.values())
    if unknown:
        key = min(unknown)
        raise refuse(key, config[key], f"the keys of {', '.join(DEFAULTS)}")
    raise refuse("_class_name", None, f"{', '.join(DEFAULTS)}; the config does not say, so name it beside the config")


def read(config: Mapping[str, Any]) -> Reading:
    """The config of one of diffusers' schedulers; see `class_of` for one without _class_name.

    Keys that another of the classes reads say nothing to this one, as in diffusers. Raises ValueError naming the key
    that no class here has, or whose value is not followed.
    """
    name = class_of(config)
    known = _SILENT.union(*DEFAULTS.values())
    for key, value in config.items():
        if key not in known and not key.startswith("_"):
            raise refuse(key, value, f"the keys of {', '.join(DEFAULTS)}")
    c = {**DEFAULTS[name], **{k: v for k, v in config.items() if k in DEFAULTS[name]}}
    for key, only in _ONLY.items():
        # an absent choice is written False or null
        if key in c and c[key] != only and (c[key] or only):
            raise refuse(key, c[key], repr(only))
    for key, names in _SAME.items():
        if key in c:
            c[key] = names.get(c[key], c[key])
    _check(c)
    kind = _PREDICTS[one_of(c, "prediction_type", *_PREDICTS)]
    if not c.get("predict_epsilon", True):
        kind = "x0"
    clip = float(c["clip_sample_range"]) if c.get("clip_sample") and not c.get("thresholding") else None
    learned = c.get("variance_type") in ("learned", "learned_range")
    schedule = schedule_of_betas(c)
    if c.get("rescale_betas_zero_snr"):
        schedule = zero_snr(schedule)
    return Reading(name, c, schedule, kind + "+range" if learned else kind, clip)


_CHOICES: dict[str, tuple[object, ...]] = {
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "timestep_type": ("discrete", "continuous"),
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++"),
    "solver_type": ("midpoint", "heun"),
}
_VARIANCES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


def _check(c: Mapping[str, Any]) -> None:
    """Raise ValueError for values that the classes themselves do not have, and for those that exclude each other."""
    for key, accepted in _CHOICES.items():
        if key in c:
            one_of(c, key, *accepted)
    if "algorithm_type" not in c and "variance_type" in c:
        one_of(c, "variance_type", *_VARIANCES)
    if "algorithm_type" in c:
        one_of(c, "variance_type", None, "learned", "learned_range")
        if not c["algorithm_type"].endswith("++") and c["final_sigmas_type"] == "zero":
            raise refuse("final_sigmas_type", "zero", f"'sigma_min' with algorithm_type={c['algorithm_type']!r}")
        if c["algorithm_type"] == "sde-dpmsolver" and c["solver_order"] == 3:
            raise refuse("solver_order", 3, "1, 2 with algorithm_type='sde-dpmsolver'")
    chosen = [key for key in (*_OWN_SIGMAS, "use_lu_lambdas") if c.get(key)]
    if len(chosen) > 1:
        raise refuse(chosen[1], c[chosen[1]], f"one way to choose sigmas, and {chosen[0]} is another")
