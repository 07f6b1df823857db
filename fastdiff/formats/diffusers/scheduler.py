"""A scheduler for diffusers' pipelines whose steps are rows of our tables, run by the fused step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.formats.diffusers.calls import CALLS, Ask, Output, Result
from fastdiff.formats.diffusers.config import DEFAULTS, Config, read
from fastdiff.formats.diffusers.grid import IN_ALPHA, Laid, all_times, index_in, lay, relaid
from fastdiff.formats.diffusers.noise import randn
from fastdiff.formats.diffusers.program import (
    Program,
    Slots,
    from_variance,
    levels_at,
    per_image,
    take,
    take_thresholded,
    widened,
)
from fastdiff.formats.diffusers.rows import EXPLODING, MULTISTEP, NARROWING, RULES, churned, rows_of
from fastdiff.tables.curve import Array

Device = str | torch.device | None


class DiffusersScheduler:
    """One of diffusers' schedulers, by its config, on our tables.

        pipe.scheduler = fd.DiffusersScheduler.from_config(pipe.scheduler.config)

    Assign it after the pipeline is built (DDIMPipeline makes a scheduler of its own from the one that it is given).
    It has what pipelines use: set_timesteps, timesteps, sigmas, step with the arguments of the config's class,
    add_noise, scale_model_input, init_noise_sigma, order, config. Levels and coefficients are float64 from the config
    on, states float32 (float64 for float64 samples). Which classes and keys are followed, and where the numbers differ
    from diffusers': docs/diffusers.md. Raises ValueError for a class or a key that is not followed.
    """

    config_name = "scheduler_config.json"
    _asked: str
    _programs: dict[Any, Program]

    def __init__(self, config: Mapping[str, Any] | None = None, **keys: Any) -> None:
        self._internal_dict = {**(config or {}), **keys}

    @classmethod
    def from_config(cls, config: Mapping[str, Any], **keys: Any) -> DiffusersScheduler:
        """The scheduler of a config (`pipe.scheduler.config`), with some keys changed.

        _class_name="EulerDiscreteScheduler" changes the class: keys that the config only has by the old class's default
        are then the new one's.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"from_config: config={config!r} is a {type(config).__name__}; pass scheduler.config, or use "
                "from_pretrained for a folder"
            )
        given = dict(config)
        if keys.get("_class_name", given.get("_class_name")) != given.get("_class_name"):
            given = {k: v for k, v in given.items() if k not in given.get("_use_default_values", ())}
        return cls(given, **keys)

    @classmethod
    def from_pretrained(cls, folder: str | Path, subfolder: str | None = None, **keys: Any) -> DiffusersScheduler:
        """The scheduler of a local folder with scheduler_config.json, or of its `subfolder`."""
        path = Path(folder) / (subfolder or "") / cls.config_name
        if not path.is_file():
            raise FileNotFoundError(f"from_pretrained: there is no {path}; pass a folder that save_pretrained wrote")
        return cls.from_config(json.loads(path.read_text()), **keys)

    def save_pretrained(self, folder: str | Path, **_: Any) -> None:
        """Write scheduler_config.json with the class that the config came with: diffusers reads it back as its own."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        keys = {k: v for k, v in self.config.items() if k != "_use_default_values"}
        text = json.dumps(keys, indent=2, default=lambda value: np.asarray(value).tolist())
        (Path(folder) / self.config_name).write_text(text + "\n")

    save_config = save_pretrained

    @property
    def config(self) -> Config:
        """The config, by key and by attribute: what was given, and the class's defaults."""
        return self._config

    @property
    def _internal_dict(self) -> Config:
        return self._config

    @_internal_dict.setter
    def _internal_dict(self, config: Mapping[str, Any]) -> None:
        # pipelines write a corrected config here
        self._reading = read(config)
        self._config = Config({**DEFAULTS[self._reading.name], **config, "_class_name": self._reading.name})
        self.num_inference_steps: int | None = None
        self._lay(all_times(self._reading), None, {})

    @property
    def _T(self) -> int:
        assert self._reading.schedule.T is not None
        return self._reading.schedule.T

    def __len__(self) -> int:
        return self._T

    def __repr__(self) -> str:
        return f"DiffusersScheduler({self._reading.name}, {self.num_inference_steps} steps)"

    @property
    def compatibles(self) -> list[type]:
        """Classes that the config can be given to."""
        return [type(self)]

    @property
    def _variance(self) -> str | None:
        """How the step reads the network's second half of channels; others than DDPM do without it."""
        return "range" if self._reading.name == "DDPMScheduler" and self._reading.predicts.endswith("+range") else None

    @property
    def order(self) -> int:
        """Network calls of a step."""
        return 2 if self._reading.name == "HeunDiscreteScheduler" else 1

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 of all training steps, (T,) float32."""
        return torch.from_numpy(self._reading.schedule.alpha(np.arange(self._T, dtype=np.float64)) ** 2).float()

    @property
    def alphas(self) -> Tensor:
        """1 - beta of all training steps, (T,) float32."""
        return 1 - self.betas

    @property
    def betas(self) -> Tensor:
        """The variances of the Markov steps, (T,) float32."""
        bar = self._reading.schedule.alpha(np.arange(-1, self._T, dtype=np.float64)) ** 2
        return torch.from_numpy(1 - bar[1:] / bar[:-1]).float()

    # the grid

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Device = None,
        timesteps: Sequence[int] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """Lay the grid of a loop, and forget the one before.

        num_inference_steps, or timesteps (falling; not PNDM), or sigmas (Euler; the last one included). device: where
        `timesteps` is to be. Raises ValueError for more steps than the schedule has, and for two of the three.
        """
        asked = repr((num_inference_steps, timesteps, sigmas))
        # a pipeline asks again at every call: the same grid has the same rows
        same = asked == self._asked
        laid = self._laid if same else lay(self._reading, num_inference_steps, timesteps, sigmas)
        self.num_inference_steps = len(laid.levels.t) - 1
        self._lay(laid, device, self._programs if same else {})
        self._asked = asked

    def _lay(self, laid: Laid, device: Device, programs: dict[Any, Program]) -> None:
        self._laid, self._programs, self._asked = laid, programs, ""
        whole = self._reading.name in (*IN_ALPHA, MULTISTEP)
        told = torch.from_numpy(laid.levels.t[laid.step]).to(torch.int64 if whole else torch.float32)
        self.told = told.double().numpy()
        self.u = np.append(laid.levels.u[laid.step], laid.levels.u[-1])
        self.timesteps = told.to(device) if device is not None else told
        self.sigmas = torch.from_numpy(self.u).float()
        self._begin_index: int | None = None
        self._step_index: int | None = None
        self._start, self._slots = 0, Slots()

    @property
    def init_noise_sigma(self) -> float:
        """What the first noise is multiplied by."""
        if self._reading.name not in EXPLODING:
            return 1.0
        largest = float(self.u[0])
        return largest if self._reading.keys["timestep_spacing"] != "leading" else float(np.hypot(largest, 1))

    @property
    def begin_index(self) -> int | None:
        """The call that a loop starts with, where a pipeline has said so."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The call that comes next, None before the first."""
        return self._step_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """A loop starts with call `begin_index`, as in image to image."""
        self._begin_index = begin_index

    def index_of_call(self, timestep: float | Tensor) -> int:
        """The number of the call that is told `timestep`. Raises ValueError where there is none."""
        if isinstance(timestep, Tensor):
            if timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr():
                # an element of `timesteps` says where it is without asking the device
                return int(timestep.storage_offset())
            timestep = timestep.item()
        value = float(torch.tensor(timestep, dtype=self.timesteps.dtype))
        expected = self._begin_index if self._step_index is None else self._step_index
        if expected is not None and expected < len(self.told) and self.told[expected] == value:
            return expected
        return index_in(self.told, value, self._reading.name != "PNDMScheduler")

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """What the network is to see: the state, scaled to unit variance for Euler's and Heun's classes."""
        if self._reading.name not in EXPLODING:
            return sample
        if timestep is None:
            raise ValueError("scale_model_input: timestep=None; pass the one that the network is told")
        return sample / float(np.hypot(1, self.u[self.index_of_call(timestep)]))

    @property
    def step(self) -> Callable[..., Result]:
        """step(model_output, timestep, sample, ...) with the arguments of the class that the config names.

        sample (N, C, *spatial), of any float dtype; model_output (N, C or 2C, *spatial). Returns (prev_sample,
        pred_original_sample), by name too. A timestep other than the expected one starts a loop there.
        """
        return MethodType(CALLS[self._reading.name], self)

    def advance(self, k: int, F: Tensor, sample: Tensor, ask: Ask) -> Result:
        """Call k of the grid: the network said F at the sample."""
        program = self._program(k, ask)
        channels, x = sample.shape[1], widened(sample)
        noise = ask.noise
        if ask.draws and noise is None:
            noise = randn(F[:, :channels], ask.generator, x.dtype if self._reading.name == MULTISTEP else None)
        if ask.gamma > 0:
            assert noise is not None
            x += ask.s_noise * float(self.u[k] * np.sqrt(ask.gamma * (2 + ask.gamma))) * noise.to(x)
            noise = None
        result = F.dtype if self._reading.name in NARROWING else torch.promote_types(sample.dtype, F.dtype)
        variance = self._variance
        if variance and self._reading.keys["variance_type"] == "learned":
            F = from_variance(F, channels, program.rows[k - program.begin])
        if self._reading.keys.get("thresholding"):
            y, x0 = take_thresholded(program, k, self._slots, x, F, noise, variance, self._reading, ask)
        else:
            y, x0 = take(program, k, self._slots, x, F, noise, variance=variance, show=ask.both or ask.return_dict)
        self._step_index = k + 1
        y = y.to(result)
        if ask.return_dict:
            return Output(y, x0)
        return (y, x0) if ask.both and x0 is not None else (y,)

    def _program(self, k: int, ask: Ask) -> Program:
        """The rows of this call."""
        if ask.gamma > 0:
            return Program(churned(self._reading, self._laid, k, ask.gamma), k)
        if RULES[self._reading.name].remembers and k != self._step_index:
            self._start = k
        key = (self._start, *sorted(ask.options.items()))
        if key not in self._programs:
            self._programs[key] = Program(rows_of(self._reading, self._laid, self._start, ask.options), self._start)
        return self._programs[key]

    # training and image to image

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The states at `timesteps` (N,): alpha x0 + sigma noise, or x0 + u noise for Euler's and Heun's classes."""
        alpha, sigma = self._levels_at(timesteps)
        x0 = original_samples
        if self._reading.name in EXPLODING:
            return x0 + per_image(sigma / alpha, x0) * noise
        return per_image(alpha, x0) * x0 + per_image(sigma, x0) * noise

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """v = alpha noise - sigma x0 at `timesteps` (N,)."""
        alpha, sigma = self._levels_at(timesteps)
        return per_image(alpha, sample) * noise - per_image(sigma, sample) * sample

    def _levels_at(self, timesteps: Tensor) -> tuple[Array, Array]:
        """alpha and sigma of each time; a pipeline that says where its loop starts means the call that comes next."""
        call = self._begin_index if self._step_index is None else self._step_index
        return levels_at(self._reading, self._laid, self.told, None if self._begin_index is None else call, timesteps)

    # copies: schedules hold functions, which do not travel

    def __getstate__(self) -> dict[str, Any]:
        kept = ("num_inference_steps", "timesteps", "_begin_index", "_step_index", "_start", "_slots")
        asked = self._laid.levels.t, self._laid.levels.u, self._laid.step, self._laid.starts
        return {"config": dict(self._config), "grid": asked, **{name: getattr(self, name) for name in kept}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._internal_dict = state.pop("config")
        self._lay(relaid(self._reading, *state.pop("grid")), None, {})
        self.__dict__.update(state)
