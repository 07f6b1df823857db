"""What pipelines and programs touch of fd.DiffusersScheduler: config, grids, signatures, dtypes, copies, errors."""

from __future__ import annotations

import copy
import inspect
import json
import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import fastdiff as fd
from fastdiff import row
from fastdiff.formats.diffusers.calls import Ask
from fastdiff.formats.diffusers.config import DEFAULTS
from fastdiff.formats.diffusers.schedule import schedule_of
from tests.formats.peers import MODULES, net, peer_of, start, wide

diffusers = pytest.importorskip("diffusers")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]


def made(name: str, n: int | None = None, **keys: Any) -> fd.DiffusersScheduler:
    ours = fd.DiffusersScheduler(keys, _class_name=f"{name}Scheduler")
    if n is not None:
        ours.set_timesteps(n)
    return ours


@pytest.mark.parametrize("name", MODULES)
def test_config_of_every_peer(name: str, tmp_path: Path) -> None:
    peer = peer_of(name, {})
    peer.save_pretrained(tmp_path)
    for ours in (fd.DiffusersScheduler.from_config(peer.config), fd.DiffusersScheduler.from_pretrained(tmp_path)):
        assert ours.config._class_name == f"{name}Scheduler"
        assert {k: ours.config[k] for k in peer.config if k[0] != "_"} == {
            k: v for k, v in peer.config.items() if k[0] != "_"
        }
        assert ours.config.num_train_timesteps == ours.config.get("num_train_timesteps") == 1000
        assert dict(ours.config)["beta_end"] == peer.config.beta_end
        assert not hasattr(ours.config, "no_such_key")
        assert len(ours) == len(peer) == 1000
        assert ours.alphas_cumprod == pytest.approx(peer.alphas_cumprod.numpy(), rel=3e-5)
        assert ours.betas == pytest.approx(peer.betas.numpy(), rel=3e-5, abs=1e-8)
    # every key of the class as it is, in DEFAULTS as in diffusers
    signature = inspect.signature(type(peer).__init__).parameters
    assert {k: p.default for k, p in signature.items() if k != "self"} == {
        k: v for k, v in DEFAULTS[f"{name}Scheduler"].items() if k != "predict_epsilon"
    }


@pytest.mark.parametrize("name", MODULES)
def test_step_has_the_arguments_of_the_peers(name: str) -> None:
    peer, ours = peer_of(name, {}), made(name)
    mine, theirs = (inspect.signature(s.step).parameters for s in (ours, peer))
    assert list(mine) == list(theirs)
    assert [p.default for p in mine.values()] == [p.default for p in theirs.values()]
    assert set(inspect.signature(peer.set_timesteps).parameters) - {"mu", "num_train_timesteps"} <= set(
        inspect.signature(ours.set_timesteps).parameters
    )


def test_another_class_of_the_same_config() -> None:
    """As diffusers' own from_config: what the old class only had by default is the new one's default."""
    old = diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True)
    for name in ("EulerDiscrete", "DPMSolverMultistep", "DDIM"):
        theirs = getattr(diffusers, f"{name}Scheduler").from_config(old.config)
        ours = fd.DiffusersScheduler.from_config(old.config, _class_name=f"{name}Scheduler")
        for s in (theirs, ours):
            s.set_timesteps(13)
        assert ours.timesteps.tolist() == theirs.timesteps.tolist()
        assert ours.config.timestep_spacing == theirs.config.timestep_spacing
        assert ours.config.steps_offset == 1


def test_a_corrected_config_is_read_again() -> None:
    """StableDiffusionPipeline writes `_internal_dict` where a config is outdated."""
    ours = made("DDIM")
    ours._internal_dict = dict(ours.config) | {"steps_offset": 1, "clip_sample": False}
    ours.set_timesteps(10)
    assert ours.timesteps.tolist() == list(range(901, 0, -100))
    assert ours.config.clip_sample is False


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "DDIMScheduler", "shiny": 1}, "shiny=1 is not supported"),
        ({"_class_name": "UniPCMultistepScheduler"}, "_class_name='UniPCMultistepScheduler'.*accepted: DDPMScheduler"),
        (
            {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
            "interpolation_type='log_linear'",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"}, "final_sigmas_type='zero'"),
        (
            {
                "_class_name": "DPMSolverMultistepScheduler",
                "algorithm_type": "sde-dpmsolver",
                "solver_order": 3,
                "final_sigmas_type": "sigma_min",
            },
            "solver_order=3.*accepted: 1, 2 with",
        ),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True},
            "use_beta_sigmas=True.*one way to choose sigmas",
        ),
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "prediction_type='flow_prediction'"),
        ({"_class_name": "PNDMScheduler", "beta_schedule": "quadratic"}, "beta_schedule='quadratic'"),
    ],
    ids=str,
)
def test_what_is_not_followed_is_named(config: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"diffusers: .*{words}"):
        fd.DiffusersScheduler.from_config(config)


def test_live_configs_of_classes_that_are_not_followed() -> None:
    """They have no _class_name, and are not taken for another's."""
    for name in ("LMSDiscrete", "DDIMInverse", "KDPM2Discrete", "IPNDM", "DEISMultistep"):
        config = getattr(diffusers, f"{name}Scheduler")().config
        assert "_class_name" not in config
        with pytest.raises(ValueError, match=r"_class_name=None.*so name it beside the config"):
            fd.DiffusersScheduler.from_config(config)
    with pytest.raises(ValueError, match=r"disable_corrector=.*accepted: the keys of"):
        fd.DiffusersScheduler.from_config(diffusers.UniPCMultistepScheduler().config)


def test_a_pipelines_folder_is_no_config() -> None:
    with pytest.raises(TypeError, match=r"pass scheduler\.config, or use from_pretrained"):
        fd.DiffusersScheduler.from_config("scheduler")  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"there is no nowhere/scheduler_config\.json"):
        fd.DiffusersScheduler.from_pretrained("nowhere")


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("DDIM", {"num_inference_steps": 0}, "num_inference_steps=0 is no number of steps"),
        ("DDIM", {"num_inference_steps": 1001}, "steps=1001 exceeds the schedule's T=1000"),
        ("DDIM", {"num_inference_steps": 5, "timesteps": [3]}, "takes one of num_inference_steps=5"),
        ("DDIM", {}, "takes one of num_inference_steps=None"),
        ("DDPM", {"timesteps": [1, 5]}, r"timesteps=\[1, 5\] must fall"),
        ("DDPM", {"sigmas": [5.0, 1.0]}, "DDPMScheduler takes no sigmas"),
        ("PNDM", {"timesteps": [5, 1]}, "PNDMScheduler takes no timesteps"),
        ("HeunDiscrete", {"sigmas": [5.0, 1.0]}, "HeunDiscreteScheduler takes no sigmas"),
        ("EulerDiscrete", {"num_inference_steps": 1001}, None),
    ],
    ids=str,
)
def test_grids_that_do_not_exist(name: str, given: dict[str, Any], words: str | None) -> None:
    ours = made(name)
    if words is None:
        ours.set_timesteps(**given)  # levels between the schedule's own
        assert len(ours.timesteps) == 1001
        return
    with pytest.raises(ValueError, match=words):
        ours.set_timesteps(**given)
    karras = made("EulerDiscrete", use_karras_sigmas=True)
    with pytest.raises(ValueError, match="use_karras_sigmas=True both choose the levels"):
        karras.set_timesteps(timesteps=[5, 1])


def test_a_time_off_the_grid() -> None:
    ours, x = made("DDIM", 10), start(torch.float32)
    with pytest.raises(ValueError, match="step: timestep=5 is not on the grid of 10 calls from 900 to 0"):
        ours.step(x, 5, x)
    with pytest.raises(ValueError, match="both given"):
        ours.step(x, 900, x, generator=torch.Generator(), variance_noise=x)
    with pytest.raises(ValueError, match="scale_model_input: timestep=None"):
        made("EulerDiscrete", 3).scale_model_input(x)


def seeded(name: str, k: int) -> dict[str, Any]:
    """The same noise at call k of any loop."""
    return {"generator": torch.Generator().manual_seed(k)} if name in ("DDPM", "EulerAncestralDiscrete") else {}


def go_on(s: Any, name: str, x: torch.Tensor, told: list[float], first: int, last: int | None = None) -> torch.Tensor:
    """Calls `first` to `last` of a loop."""
    for k in range(first, len(told) if last is None else last):
        F = net(s.scale_model_input(x, s.timesteps[k]), told[k])
        x = s.step(F, s.timesteps[k], x, **seeded(name, k), return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", [n for n in MODULES if n != "PNDM"])
@pytest.mark.parametrize("by", ["value", "element", "begin"])
def test_a_loop_that_starts_inside(name: str, by: str) -> None:
    """A plain number, an element of `timesteps`, or a pipeline's word: as diffusers does."""
    with wide(name):
        peer, ends = peer_of(name, {}), []
        ours = fd.DiffusersScheduler.from_config(peer.config)
        for scheduler in (peer, ours):
            scheduler.set_timesteps(12)
            first = 4 * scheduler.order
            if by == "begin" and hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(first)
            if by == "value":
                scheduler.timesteps = scheduler.timesteps.clone()
            ends.append(go_on(scheduler, name, start(), [float(t) for t in peer.timesteps], first))
    assert float((ends[0] - ends[1]).abs().max()) < 1e-9


@pytest.mark.parametrize("name", MODULES)
def test_a_second_loop_needs_nothing(name: str) -> None:
    """The same grid again, with or without asking for it: the same states, and no memory of the first loop."""
    ours, x = made(name, 9, skip_prk_steps=True), start(torch.float32)
    told = [float(t) for t in ours.timesteps]
    first = go_on(ours, name, x, told, 0)
    assert torch.equal(go_on(ours, name, x, told, 0), first)
    ours.set_timesteps(9)
    assert torch.equal(go_on(ours, name, x, told, 0), first)
    ours.set_timesteps(8)
    assert not torch.equal(go_on(ours, name, x, [float(t) for t in ours.timesteps], 0), first)


@pytest.mark.parametrize("name", MODULES)
def test_copies_go_on_where_they_were_taken(name: str) -> None:
    ours = made(name, 8, skip_prk_steps=True, beta_end=0.015)
    told = [float(t) for t in ours.timesteps]
    x = go_on(ours, name, start(torch.float32), told, 0, 4)
    copies = copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))
    want = go_on(ours, name, x, told, 4)
    for other in copies:
        assert torch.equal(go_on(other, name, x, told, 4), want)
        assert (other.config, other.step_index) == (ours.config, ours.step_index)
        assert other.sigmas.tolist() == ours.sigmas.tolist()


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_comes_back_as_it_went(name: str, dtype: torch.dtype) -> None:
    """The state is float32 inside: a step is the float32 step, rounded once."""
    ours = made(name, 5, skip_prk_steps=True)
    x, F = start().to(dtype), start().flip(0).to(dtype)
    options = {"generator": torch.Generator().manual_seed(1)} if seeded(name, 0) else {}
    low = ours.step(F, ours.timesteps[0], x, **options)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=dtype).float()
    if options:
        rows = ours._program(0, Ask())
        zero = copy.deepcopy(ours).step(F.float(), ours.timesteps[0], x.float(), torch.Generator().manual_seed(1))
        z32 = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        high = zero.prev_sample + float(rows.rows[0, row.S]) * (z - z32)
    else:
        high = copy.deepcopy(ours).step(F.float(), ours.timesteps[0], x.float()).prev_sample
    assert low.prev_sample.dtype == dtype
    assert float((low.prev_sample.float() - high).abs().max() / high.abs().max()) < torch.finfo(dtype).eps


def test_what_a_step_returns() -> None:
    """As each class of diffusers: two tensors or one in a tuple, and both by name."""
    for name in MODULES:
        peer, ours = peer_of(name, {"skip_prk_steps": True} if name == "PNDM" else {}), made(name, skip_prk_steps=True)
        x = start(torch.float32)
        for s in (peer, ours):
            s.set_timesteps(4)
            s.scale_model_input(x, s.timesteps[0])
        theirs, mine = (
            s.step(x.flip(0), s.timesteps[0], x, **seeded(name, 0), return_dict=False) for s in (peer, ours)
        )
        assert len(theirs) == len(mine)
        for a, b in zip(theirs, mine, strict=True):
            assert float((a - b).abs().max() / a.abs().max()) < 1e-4
        named = ours.step(x.flip(0), ours.timesteps[0], x, **seeded(name, 0))
        assert torch.equal(named.prev_sample, mine[0])
        assert named[0] is named.prev_sample
        assert named.pred_original_sample is not None
        if len(mine) == 2:
            assert torch.equal(named.pred_original_sample, mine[1])


def test_one_generator_for_each_image() -> None:
    peer, ours = peer_of("DDPM", {}), made("DDPM", 5)
    peer.set_timesteps(5)
    x = start(torch.float32)
    ends = [
        s.step(x, 800, x, generator=[torch.Generator().manual_seed(i) for i in (3, 4)]).prev_sample
        for s in (peer, ours)
    ]
    assert float((ends[0] - ends[1]).abs().max()) < 1e-5
    with pytest.raises(ValueError, match="generator: 3 generators for 2 images"):
        ours.step(x, 800, x, generator=[torch.Generator()] * 3)


def test_noise_that_is_given() -> None:
    x = start(torch.float32)
    for name, config, options in (
        ("DDIM", {}, {"eta": 0.8}),
        ("DPMSolverMultistep", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ):
        peer, ours, ends = peer_of(name, config), made(name, **config), []
        for s in (peer, ours):
            s.set_timesteps(5)
            ends.append(s.step(x, s.timesteps[0], x, variance_noise=x.flip(0), **options).prev_sample)
        assert float((ends[0] - ends[1]).abs().max()) < 1e-4


@pytest.mark.parametrize("name", MODULES)
def test_states_of_training(name: str) -> None:
    """add_noise at any time of the schedule, and v there."""
    peer, ours = peer_of(name, {}), made(name)
    x0, noise, t = start(torch.float32), start(torch.float32).flip(0), torch.tensor([37, 811])
    if name == "DPMSolverMultistep":
        # before it is told a number of steps its sigmas rise and its timesteps fall
        for s in (peer, ours):
            s.set_timesteps(27)
        t = ours.timesteps[[3, 20]]
    told = t if name in ("DDPM", "DDIM", "PNDM", "DPMSolverMultistep") else t.float()
    if name == "HeunDiscrete":
        peer.timesteps = peer.timesteps[::2]  # it lists a time twice, and would take the second one's sigma
        peer.sigmas = torch.cat([peer.sigmas[:1], peer.sigmas[1:-1:2], peer.sigmas[-1:]])
    got, want = (s.add_noise(x0, noise, told) for s in (ours, peer))
    assert float((got - want).abs().max() / want.abs().max()) < 2e-5
    assert ours.add_noise(x0.half(), noise.half(), told).dtype == torch.float16
    alpha, sigma = fd.linear().alpha(t.numpy()), fd.linear().sigma(t.numpy())
    if name == "HeunDiscrete":
        return
    v = ours.get_velocity(x0, noise, told)
    assert float((v[0] - float(alpha[0]) * noise[0] + float(sigma[0]) * x0[0]).abs().max()) < 1e-6


def test_gradients_pass_through_a_step() -> None:
    """As in diffusers: rewards are propagated through samplers."""
    ours = made("DDIM", 4)
    x, F = start().requires_grad_(), start().flip(0).requires_grad_()
    (ours.step(F, 750, x).prev_sample ** 2).sum().backward()
    peer = peer_of("DDIM", {})
    peer.set_timesteps(4)
    a, b = start().requires_grad_(), start().flip(0).requires_grad_()
    (peer.step(b, 750, a).prev_sample ** 2).sum().backward()
    assert x.grad is not None
    assert float((x.grad - a.grad).abs().max() / a.grad.abs().max()) < 1e-5
    assert float((F.grad - b.grad).abs().max() / b.grad.abs().max()) < 1e-5


@pytest.mark.parametrize(
    "config",
    [
        {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True, "steps_offset": 1},
        {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "set_alpha_to_one": False},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading", "steps_offset": 1},
        {"_class_name": "EulerAncestralDiscreteScheduler", "timestep_spacing": "trailing"},
        {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3, "timestep_spacing": "trailing"},
        {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True, "algorithm_type": "sde-dpmsolver++"},
        {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    ],
    ids=json.dumps,
)
def test_fd_load_reads_the_same_config(config: dict[str, Any]) -> None:
    """Schedule, prediction and solver of `schedule_of` make the scheduler's own rows, where both have one grid."""
    schedule, predicts, defaults = schedule_of(config)
    ours = fd.DiffusersScheduler.from_config(config)
    assert ours.alphas_cumprod == pytest.approx(schedule.alpha(torch.arange(1000.0).double().numpy()) ** 2, rel=1e-6)
    options = defaults["options"] | {"steps_offset": defaults.get("steps_offset", 0), "clip": defaults["clip"]}
    rows = fd.plan(
        schedule,
        predicts,
        fd.SOLVERS[defaults["solver"]],
        steps=20,
        spacing=defaults["spacing"],
        final=defaults["final"],
        **options,
    )
    ours.set_timesteps(20)
    assert len(rows) - 1 == len(ours.timesteps)
    near = 1.0 if config.get("use_karras_sigmas") else 0.0
    assert rows[:-1, row.T] == pytest.approx(ours.timesteps.double().numpy(), abs=near)
    x, h = start(torch.float64), torch.zeros(3, *start().shape, dtype=torch.float64)
    # diffusers begins with u z for these spacings, and the state is alpha x0 + sigma z over alpha
    y = x * (math.hypot(1, ours.u[0]) if "Euler" in config["_class_name"] else 1.0)
    for k, t in enumerate(ours.timesteps):
        z = start().roll(k, -1)
        F = net(ours.scale_model_input(y, t), float(t))
        noisy = {"generator": torch.Generator().manual_seed(k)} if "Ancestral" in config["_class_name"] else {}
        noisy |= {"variance_noise": z} if str(config.get("algorithm_type")).startswith("sde") else {}
        if "Ancestral" in config["_class_name"]:
            z = torch.randn(F.shape, generator=torch.Generator().manual_seed(k), dtype=F.dtype)
        y = ours.step(F, t, y, **noisy).prev_sample
        one = (torch.tensor([k]), torch.zeros(2, dtype=torch.int64), torch.tensor([0]))
        fd.ops.step_(x, None, h, net(x, float(t)), torch.from_numpy(rows), *one, noise=z)
    assert float((x - y).abs().max()) < 1e-9
