"""fd.DiffusersScheduler against diffusers' schedulers: the same network, the same noise, the same loop, in float64.

diffusers' own float32 is replaced by float64 for that (`peers.wide`), so that its formulas are compared, not its
rounding. What its formulas have wrong is in test_scheduler_differences.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd
from fastdiff.formats.diffusers import scheduler as module
from fastdiff.formats.diffusers.grid import beta_quantile
from tests.formats.peers import MODULES, loop, net, peer_of, start, wide

pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # its schedulers call NumPy in a way that NumPy 2 warns of
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
]

DRAWS = ("DDPM", "DDIM", "EulerAncestralDiscrete")
SPACINGS = ("leading", "trailing", "linspace")


def draws(name: str, config: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    noisy = name in DRAWS or "s_churn" in options or str(config.get("algorithm_type")).startswith("sde")
    return {"generator": torch.Generator().manual_seed(3)} if noisy else {}


def far(name: str, config: dict[str, Any], n: int | None, lay: dict[str, Any] | None = None, **options: Any) -> float:
    """Largest difference of any state of the loop, in float64, relative to states larger than 1."""
    with wide(name):
        peer = peer_of(name, config)
        ours = fd.DiffusersScheduler.from_config(peer.config)
        given = lay or {"num_inference_steps": n}
        peer.set_timesteps(**given)
        ours.set_timesteps(**given)
        told = [float(t) for t in peer.timesteps]
        assert [float(t) for t in ours.timesteps] == pytest.approx(told, rel=1e-6, abs=1e-4)
        assert ours.order == peer.order
        assert ours.num_inference_steps == (peer.num_inference_steps or len(told))
        assert float(ours.init_noise_sigma) == pytest.approx(float(peer.init_noise_sigma), rel=1e-12)
        if hasattr(peer, "sigmas"):
            assert ours.sigmas.tolist() == pytest.approx(peer.sigmas.tolist(), rel=1e-6)
        runs: list[list[torch.Tensor]] = [[], []]
        for scheduler, states in zip((peer, ours), runs, strict=True):
            loop(scheduler, start(), told, states=states, **options, **draws(name, config, options))
    return max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in zip(*runs, strict=True))


def followed(name: str, config: dict[str, Any], n: int) -> bool:
    """Whether diffusers' own steps stay on the grid, and are defined: test_scheduler_differences has the others."""
    predicts, spacing = config["prediction_type"], config["timestep_spacing"]
    if name == "EulerAncestralDiscrete" and predicts == "sample":
        return False  # not implemented there
    if name == "PNDM" and (predicts != "epsilon" or not config["skip_prk_steps"]):
        return False
    if name in ("DDIM", "PNDM") and (spacing == "linspace" or (spacing == "trailing" and 1000 % n)):
        return False
    if name == "DPMSolverMultistep" and n == 1000:
        return False
    if spacing == "trailing" and len(np.arange(1000, 0, -1000 / n)) != n:
        return False
    # a Heun stage at u = 2e4 keeps no digit of a step to u = 6e-3
    return not (name == "HeunDiscrete" and config["beta_schedule"] == "squaredcos_cap_v2" and n < 20)


def configs(name: str) -> list[dict[str, Any]]:
    predictions, betas = ("epsilon", "v_prediction", "sample"), ("linear", "scaled_linear", "squaredcos_cap_v2")
    made = itertools.product(predictions, SPACINGS, betas)
    more = {"skip_prk_steps": True} if name == "PNDM" else {}
    return [{"prediction_type": p, "timestep_spacing": s, "beta_schedule": b} | more for p, s, b in made]


@pytest.mark.parametrize("name", MODULES)
def test_float64_loops_agree(name: str) -> None:
    """Classes x predictions x spacings; betas and numbers of steps take turns."""
    turn = itertools.cycle((1, 7, 10, 2, 33, 20, 3, 15, 50))
    # every fourth of 27: each time another schedule of betas, another spacing
    for config in configs(name)[:: 4 if name != "PNDM" else 1]:
        for n in itertools.islice(turn, 2):
            if followed(name, config, n):
                assert far(name, config, n) < 1e-9, (config, n)


@pytest.mark.slow
@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", MODULES)
def test_float64_loops_agree_in_full(name: str, predicts: str) -> None:
    """`pytest -m slow tests/formats/test_scheduler.py`; last: all 21 green, 14 minutes on a busy core."""
    for config in configs(name):
        if config["prediction_type"] != predicts:
            continue
        for n in (*range(1, 51), 61, 77, 99, 100, 123, 199, 250, 333, 499, 500, 501, 667, 750, 999, 1000):
            if followed(name, config, n):
                assert far(name, config, n) < 1e-9, (config, n)


MULTISTEP = {
    "solver_order": (1, 2, 3),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
    "solver_type": ("midpoint", "heun"),
    "lower_order_final": (True, False),
    "euler_at_final": (True, False),
    "final_sigmas_type": ("zero", "sigma_min"),
}


def multistep_configs() -> list[dict[str, Any]]:
    made = [dict(zip(MULTISTEP, values, strict=True)) for values in itertools.product(*MULTISTEP.values())]
    third = ("sde-dpmsolver", "sde-dpmsolver++")
    return [
        c
        for c in made
        if (c["algorithm_type"].endswith("++") or c["final_sigmas_type"] == "sigma_min")
        and not (c["solver_order"] == 3 and c["algorithm_type"] in third)
    ]


def test_every_option_of_dpmsolver_multistep() -> None:
    turn = itertools.cycle((5, 20, 14, 15, 2, 40))
    rest = itertools.cycle(itertools.product(SPACINGS, ("epsilon", "v_prediction", "sample")))
    for config in multistep_configs():
        spacing, predicts = next(rest)
        full = config | {"timestep_spacing": spacing, "prediction_type": predicts}
        assert far("DPMSolverMultistep", full, next(turn)) < 1e-9, full


@pytest.mark.slow
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("algorithm", MULTISTEP["algorithm_type"])
def test_every_option_of_dpmsolver_multistep_in_full(algorithm: str, spacing: str) -> None:
    """Each with each prediction and nine numbers of steps; last: all 12 green, 2.5 minutes."""
    chosen = [c for c in multistep_configs() if c["algorithm_type"] == algorithm]
    for config, predicts in itertools.product(chosen, ("epsilon", "v_prediction", "sample")):
        full = config | {"timestep_spacing": spacing, "prediction_type": predicts}
        for n in (1, 2, 3, 5, 10, 14, 15, 20, 40):
            assert far("DPMSolverMultistep", full, n) < 1e-9, (full, n)


SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@pytest.mark.parametrize("name", ["EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep"])
def test_ways_to_choose_sigmas(name: str) -> None:
    if "beta" in SIGMAS[2]:
        pytest.importorskip("scipy", reason="the peer's beta sigmas need scipy")
    ends = itertools.cycle(("zero", "sigma_min"))
    for key, spacing, betas in itertools.product(SIGMAS, SPACINGS, ("linear", "squaredcos_cap_v2")):
        if key == "use_lu_lambdas" and name != "DPMSolverMultistep":
            continue
        config = {key: True, "timestep_spacing": spacing, "beta_schedule": betas}
        if name != "HeunDiscrete":
            config["final_sigmas_type"] = next(ends)
        for n in (2, 11) if spacing == "leading" else (1,):
            assert far(name, config, n) < 1e-9, (config, n)


def test_beta_quantile_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = np.linspace(0, 1, 997)
    for a in (0.6, 0.3, 0.9):
        np.testing.assert_allclose(beta_quantile(p, a), stats.beta.ppf(p, a, a), rtol=1e-12, atol=1e-15)


def others() -> Iterator[tuple[str, dict[str, Any], int, dict[str, Any]]]:
    """(class, config, steps, options of step) that the products above leave out."""
    zero_snr = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    trailing = {"timestep_spacing": "trailing"}
    thresholds = {"thresholding": True, "dynamic_thresholding_ratio": 0.7, "sample_max_value": 1.5}
    plms, end = {"skip_prk_steps": True}, {"final_sigmas_type": "sigma_min"}
    for clipped, eta in itertools.product((True, False), (0.0, 0.5)):
        options = {"eta": eta, "use_clipped_model_output": clipped}
        yield "DDIM", {"clip_sample_range": 0.7}, 10, options
        yield "DDIM", thresholds, 10, options
        yield "DDIM", zero_snr | trailing, 20, options
    yield "DDIM", {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}, 50, {"eta": 1.0}
    yield "DDIM", zero_snr | trailing | {"prediction_type": "sample"}, 20, {}
    for variance in ("fixed_small", "fixed_small_log", "fixed_large"):
        yield "DDPM", {"variance_type": variance}, 25, {}
    yield "DDPM", thresholds, 25, {}
    yield "DDPM", zero_snr | trailing, 20, {}
    yield "DDPM", {"beta_schedule": "sigmoid"}, 10, {}
    yield "DDPM", {"beta_schedule": "laplace"}, 10, {}
    yield "DDPM", {"num_train_timesteps": 5, "trained_betas": [0.1, 0.2, 0.15, 0.3, 0.25]}, 5, {}
    yield "DDPM", {"beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 300, "clip_sample": False}, 30, {}
    for name in ("EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep"):
        yield name, zero_snr, 9, {}
    yield "EulerDiscrete", end | {"steps_offset": 1, "timestep_spacing": "leading"}, 10, {}
    video = {"timestep_type": "continuous", "prediction_type": "v_prediction", "use_karras_sigmas": True}
    yield "EulerDiscrete", video | {"sigma_min": 0.002, "sigma_max": 700.0}, 25, {}
    for predicts, churn in itertools.product(("epsilon", "sample"), (2.0, 40.0)):
        options = {"s_churn": churn, "s_tmin": 0.1, "s_tmax": 30.0, "s_noise": 1.01}
        yield "EulerDiscrete", {"prediction_type": predicts}, 10, options
    yield "HeunDiscrete", {"clip_sample": True, "clip_sample_range": 0.8, "beta_schedule": "exp"}, 12, {}
    for spacing in SPACINGS:
        low = {"lambda_min_clipped": -5.1, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": spacing}
        yield "DPMSolverMultistep", low, 10, {}
    for algorithm in ("dpmsolver++", "dpmsolver"):
        yield "DPMSolverMultistep", thresholds | end | {"algorithm_type": algorithm}, 10, {}
    yield "DPMSolverMultistep", {"solver_type": "logrho"}, 10, {}
    yield "PNDM", plms | {"set_alpha_to_one": True}, 20, {}
    yield "PNDM", plms | {"steps_offset": 1, "beta_schedule": "scaled_linear"}, 50, {}


@pytest.mark.parametrize(("name", "config", "n", "options"), list(others()), ids=lambda value: str(value)[:60])
def test_other_keys(name: str, config: dict[str, Any], n: int, options: dict[str, Any]) -> None:
    assert far(name, config, n, **options) < 1e-9


@pytest.mark.parametrize("variance", ["learned", "learned_range"])
def test_learned_variance(variance: str) -> None:
    """The network's second half of channels: a variance, or a place between the two logarithms."""
    with wide("DDPM"):
        peer = peer_of("DDPM", {"variance_type": variance})
        ours = fd.DiffusersScheduler.from_config(peer.config)

        def network(x: torch.Tensor, t: float) -> torch.Tensor:
            second = torch.sin(3 * x + t) if variance == "learned_range" else 0.3 + 0.2 * torch.sin(3 * x + t)
            return torch.cat([net(x, t), second], 1)

        ends = []
        for scheduler in (peer, ours):
            scheduler.set_timesteps(20)
            told = [float(t) for t in peer.timesteps]
            ends.append(loop(scheduler, start(), told, network=network, generator=torch.Generator().manual_seed(3)))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-9


@pytest.mark.parametrize(
    ("name", "lay"),
    [
        ("DDPM", {"timesteps": [900, 650, 120, 30, 0]}),
        ("EulerDiscrete", {"timesteps": [900, 650, 120, 30, 0]}),
        ("EulerDiscrete", {"sigmas": [14.6, 6.0, 2.5, 0.6, 0.05, 0.0]}),
        ("HeunDiscrete", {"timesteps": [900, 650, 120, 30]}),
        ("DPMSolverMultistep", {"timesteps": [900, 650, 120, 30, 7]}),
    ],
)
def test_grids_of_ones_own(name: str, lay: dict[str, Any]) -> None:
    assert far(name, {}, None, lay) < 1e-9


# ---- float32


def conditioning(scheduler: fd.DiffusersScheduler) -> float:
    """Largest alpha_{k+1}/alpha_k of the grid: what multiplies a rounding of the state where eps is read as x0."""
    alpha = scheduler._laid.levels.alpha
    return max(1.0, float((alpha[1:] / alpha[:-1]).max()))


def in_both(
    name: str, config: dict[str, Any], n: int, monkeypatch: pytest.MonkeyPatch, network: Any = net
) -> tuple[float, float, float]:
    """Largest and norm-wise error of float32 against float64 on the same noise, and the conditioning."""
    randn = module.randn
    monkeypatch.setattr(module, "randn", lambda like, g, dtype=None: randn(like.float(), g, torch.float32))
    runs: list[list[torch.Tensor]] = [[], []]
    for dtype, states in zip((torch.float64, torch.float32), runs, strict=True):
        ours = fd.DiffusersScheduler(config, _class_name=f"{name}Scheduler")
        ours.set_timesteps(n)
        told = [float(t) for t in ours.timesteps]
        x = start(torch.float32).to(dtype)
        loop(ours, x, told, network=network, states=states, **draws(name, config, {}))
        assert states[-1].dtype == dtype
    monkeypatch.undo()
    largest = max(float((a - b).abs().max() / a.abs().max().clamp(min=1)) for a, b in zip(*runs, strict=True))
    a, b = runs[0][-1], runs[1][-1]
    return largest, float((a - b).norm() / a.norm()), conditioning(ours)


@pytest.mark.parametrize("name", MODULES)
def test_float32_loops(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    turn = itertools.cycle((2, 7, 10, 25, 50))
    for config in configs(name):
        n = next(turn)
        if not followed(name, config, n):
            continue
        largest, norm, worst = in_both(name, config, n, monkeypatch)
        assert largest < 1e-5 * worst, (config, n)
        if worst < 1.5 and n > 2:
            assert norm < 1e-6, (config, n)


def test_cosine_and_eps_are_ill_conditioned(monkeypatch: pytest.MonkeyPatch) -> None:
    """alpha grows six hundredfold in one step: a network that knows x0 says eps, and float32 loses those digits of it.

    Not more than the bound says, and nothing where the network says v.
    """
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing", "clip_sample": False}
    schedule = fd.cosine()

    def knowing(kind: str) -> Any:
        """The best guess where x0 is Gaussian with deviation 1/2."""

        def network(x: torch.Tensor, t: float) -> torch.Tensor:
            alpha, sigma = float(schedule.alpha(np.array(t))), float(schedule.sigma(np.array(t)))
            x0 = alpha * x.double() / 4 / (alpha**2 / 4 + sigma**2)
            eps = (x.double() - alpha * x0) / sigma
            return (eps if kind == "epsilon" else alpha * eps - sigma * x0).to(x)

        return network

    errors = {}
    for kind in ("epsilon", "v_prediction"):
        keys = config | {"prediction_type": kind}
        errors[kind], _, worst = in_both("DDIM", keys, 2, monkeypatch, network=knowing(kind))
    assert worst > 1e3
    assert 1e-5 < errors["epsilon"] < 1e-5 * worst
    assert errors["v_prediction"] < 1e-6


@pytest.mark.parametrize("name", ["DDPM", "EulerDiscrete", "DPMSolverMultistep"])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_times_of_every_number_of_steps(name: str, spacing: str) -> None:
    """1 to 1000, roundings of halves included; without the one that is too many in test_scheduler_differences."""
    peer = peer_of(name, {"timestep_spacing": spacing})
    ours = fd.DiffusersScheduler.from_config(peer.config)
    for n in range(1, 1001 if name == "DDPM" else 1000):
        if name != "DDPM" and n % 7 and n % 48:
            continue
        for scheduler in (peer, ours):
            scheduler.set_timesteps(n)
        assert ours.timesteps.tolist() == peer.timesteps.tolist()[:n], n
