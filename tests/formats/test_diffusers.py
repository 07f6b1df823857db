"""diffusers' own nets and schedulers, random weights, written by diffusers and read by us."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fastdiff.formats.diffusers.convert import convert
from fastdiff.formats.diffusers.read import WEIGHTS, read_unet
from fastdiff.formats.diffusers.schedule import schedule_of
from fastdiff.formats.load import load
from fastdiff.sampling.denoiser import Denoiser
from fastdiff.sampling.sampler import Sampler

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # its schedulers call NumPy in a way that NumPy 2 warns of
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
]

DOWN, ATTN_DOWN, RES_DOWN = "DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"
UP, ATTN_UP, RES_UP = "UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"
BASE = {"norm_num_groups": 4, "layers_per_block": 1}
NETS = {
    "ddpm": {
        "block_out_channels": (8, 16, 16),
        "down_block_types": (DOWN, ATTN_DOWN, DOWN),
        "up_block_types": (UP, ATTN_UP, UP),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "layers_per_block": 2,
    },
    "heads": {
        "block_out_channels": (8, 12),
        "down_block_types": (ATTN_DOWN, ATTN_DOWN),
        "up_block_types": (ATTN_UP, ATTN_UP),
        "attention_head_dim": 4,
        "mid_block_scale_factor": math.sqrt(2),
        "time_embedding_dim": 20,
        "in_channels": 2,
        "out_channels": 5,
    },
    "scale_shift": {
        "block_out_channels": (8, 12, 16),
        "down_block_types": (DOWN, DOWN, ATTN_DOWN),
        "up_block_types": (ATTN_UP, UP, UP),
        "attention_head_dim": 4,
        "resnet_time_scale_shift": "scale_shift",
    },
    "adm": {
        "block_out_channels": (8, 16, 24),
        "down_block_types": (RES_DOWN, ATTN_DOWN, ATTN_DOWN),
        "up_block_types": (ATTN_UP, ATTN_UP, RES_UP),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "attention_head_dim": 8,
        "resnet_time_scale_shift": "scale_shift",
        "attn_norm_num_groups": 2,
        "num_class_embeds": 7,
        "out_channels": 6,
    },
    "classes": {
        "block_out_channels": (8, 16),
        "down_block_types": (DOWN, DOWN),
        "up_block_types": (UP, UP),
        "num_class_embeds": 3,
        "add_attention": False,
        "center_input_sample": True,
        "downsample_padding": 0,
    },
    "timestep_class": {
        "block_out_channels": (8, 8),
        "down_block_types": ("UNetResDownBlock2D", DOWN),
        "up_block_types": (UP, UP),
        "class_embed_type": "timestep",
        "mid_block_type": None,
    },
    "identity_class": {
        "block_out_channels": (8, 8),
        "down_block_types": (RES_DOWN, RES_DOWN),
        "up_block_types": (RES_UP, RES_UP),
        "class_embed_type": "identity",
    },
}
CONDS = {
    "num_class_embeds": torch.tensor([2, 0]),
    "timestep": torch.tensor([4.0, 300.0]),
    "identity": torch.randn(2, 32, generator=torch.Generator().manual_seed(3)),
}


def peer(name: str) -> nn.Module:
    """A random net of diffusers' in which no parameter is 0 or 1."""
    net = diffusers.UNet2DModel(**{**BASE, **NETS[name]}).eval()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g) / (p[0].numel() if p.ndim > 1 else 4) ** 0.5 + (p.ndim == 1))
    return net


def inputs(net: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    x = torch.randn(2, net.config.in_channels, 12, 20, generator=torch.Generator().manual_seed(1))
    kind = net.config.class_embed_type or ("num_class_embeds" if net.config.num_class_embeds else None)
    return x, torch.tensor([3, 981]), CONDS.get(kind)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """|a - b| / |b|"""
    return float((a - b).norm() / b.norm())


class Sinusoid64(nn.Module):
    """diffusers' time_proj in float64, where its own is float32 whatever the net is."""

    def __init__(self, dim: int, flip: bool, shift: float) -> None:
        super().__init__()
        self.dim, self.flip, self.shift = dim, flip, shift

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = self.dim // 2
        angle = t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / (half - self.shift))
        pair = (angle.cos(), angle.sin()) if self.flip else (angle.sin(), angle.cos())
        return torch.cat(pair, 1)


@pytest.mark.parametrize("name", NETS)
def test_nets_agree(name: str, tmp_path: Path) -> None:
    theirs = peer(name)
    theirs.save_pretrained(tmp_path)
    ours, scheduler = read_unet(tmp_path)
    assert scheduler == {}
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, t, cond = inputs(theirs)
    with torch.no_grad():
        want = theirs(x, t, cond).sample
        assert far(ours.eval()(x, t, cond), want) < 1e-5
        config = theirs.config
        theirs.double().time_proj = Sinusoid64(config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        wide = None if cond is None else cond.double() if cond.is_floating_point() else cond
        want = theirs(x.double(), t.double(), wide).sample
        assert far(ours.double()(x.double(), t.double(), wide), want) < 1e-10
        # t and cond are heard
        assert far(ours(x.double(), t.double() + 40, wide), want) > 1e-4
        assert cond is None or far(ours(x.double(), t.double(), wide.roll(1, 0)), want) > 1e-4


def test_gradients_agree() -> None:
    theirs = peer("scale_shift").double()
    ours = convert(dict(theirs.config), theirs.state_dict())
    assert ours.stem.weight.dtype == torch.float64
    theirs.time_proj = Sinusoid64(8, True, 0)
    x, t, _ = inputs(theirs)
    grads = []
    for net in (ours, theirs):
        z = x.double().requires_grad_()
        y = net(z, t.double())
        y = y if isinstance(y, torch.Tensor) else y.sample
        y.square().sum().backward()
        grads.append((z.grad, net.get_submodule("stem" if net is ours else "conv_in").weight.grad))
    for a, b in zip(*grads, strict=True):
        assert far(a, b) < 1e-10


def test_a_pipeline_folder_with_old_attention_names(tmp_path: Path) -> None:
    theirs, old = peer("ddpm"), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large")
    theirs.save_pretrained(tmp_path / "unet")
    scheduler.save_pretrained(tmp_path / "scheduler")
    state = {}
    for name, p in theirs.state_dict().items():
        hit = next((new for new in old if ".attentions." in name and f".{new}." in name), None)
        state[name if hit is None else name.replace(hit, old[hit])] = p.clone()
    assert sum("query" in name for name in state) == 2 * (2 + 3 + 1)
    from safetensors.torch import save_file

    save_file(state, tmp_path / "unet" / WEIGHTS)
    x, t, _ = inputs(theirs)
    for folder in (tmp_path, tmp_path / "unet"):
        ours, config = read_unet(folder)
        assert config["variance_type"] == "fixed_large"
        with torch.no_grad():
            assert far(ours(x, t), theirs(x, t).sample) < 1e-5


def test_half_precision_weights_are_widened() -> None:
    theirs = peer("classes").half()
    ours = convert(dict(theirs.config), theirs.state_dict())
    x, t, cond = inputs(theirs)
    with torch.no_grad():
        assert far(ours(x, t, cond), theirs.float()(x, t, cond).sample) < 1e-5


def test_broken_checkpoints_say_so(tmp_path: Path) -> None:
    theirs = peer("ddpm")
    config, state = dict(theirs.config), theirs.state_dict()
    with pytest.raises(ValueError, match=r"do not fit the config: mid_block\.attentions\.0\.to_k\.bias is missing;"):
        convert(config, {k: v for k, v in state.items() if k != "mid_block.attentions.0.to_k.bias"})
    with pytest.raises(ValueError, match=r"config: ema\.decay is left over;"):
        convert(config, state | {"ema.decay": torch.ones(1)})
    with pytest.raises(ValueError, match=r"conv_in\.weight has shape \(8, 3, 1, 1\), not \(8, 3, 3, 3\)"):
        convert(config, state | {"conv_in.weight": torch.ones(8, 3, 1, 1)})
    with pytest.raises(ValueError, match=r"and \d+ more"):
        convert(config | {"layers_per_block": 1}, state)
    with pytest.raises(ValueError, match=r"holds no config\.json beside"):
        read_unet(tmp_path)
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"\(5000 bytes\) is cut off or broken"):
        read_unet(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read as JSON"):
        read_unet(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_class_name", "UNet3DConditionModel"),
        ("time_embedding_type", "fourier"),
        ("act_fn", "gelu"),
        ("down_block_types", [DOWN, "SkipDownBlock2D", DOWN]),
        ("down_block_types", [DOWN, ATTN_DOWN, ATTN_DOWN]),
        ("down_block_types", [DOWN, ATTN_DOWN, RES_DOWN]),
        ("downsample_type", "resnet"),
        ("mid_block_type", "UNetMidBlock2DCrossAttn"),
        ("resnet_time_scale_shift", "spatial"),
        ("downsample_padding", 2),
        ("attention_head_dim", 3),
        ("norm_num_groups", 5),
        ("norm_num_groups", None),
        ("class_embed_type", "simple_projection"),
        ("norm_type", "layer_norm"),
    ],
)
def test_unsupported_nets_name_the_key(key: str, value: object) -> None:
    theirs = peer("ddpm")
    if value == [DOWN, ATTN_DOWN, RES_DOWN]:
        # the last block never resamples, so this is the same net
        assert convert(dict(theirs.config) | {key: value}, theirs.state_dict()).config["attention"] == [2]
        return
    named = "(up|down)_block_types" if "down_block" in key or key == "downsample_type" else key
    with pytest.raises(ValueError, match=rf"diffusers: {named}=.*accepted: "):
        convert(dict(theirs.config) | {key: value}, theirs.state_dict())


BETAS = [
    {},
    {"beta_start": 0.001, "beta_end": 0.03, "num_train_timesteps": 40},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 300},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.1, 0.2, 0.15]},
]


@pytest.mark.parametrize("betas", BETAS, ids=str)
def test_schedules_agree(betas: dict) -> None:
    theirs = diffusers.DDPMScheduler(**betas)
    schedule, predicts, _ = schedule_of(json.loads(theirs.to_json_string()))
    t = np.arange(len(theirs.betas), dtype=np.float64)
    bar = np.cumprod(1 - theirs.betas.numpy().astype(np.float64))
    # their betas are float32
    np.testing.assert_allclose(schedule.alpha(t) ** 2, bar, rtol=3e-5)
    np.testing.assert_allclose(schedule.sigma(t) ** 2, 1 - bar, rtol=3e-5)
    assert predicts == "eps"
    assert len(t) == schedule.T


def test_defaults_of_every_scheduler() -> None:
    """Read back from what diffusers itself writes."""

    def of(name: str, **config: object) -> tuple[str, dict]:
        theirs = getattr(diffusers, f"{name}Scheduler")(**config)
        return schedule_of(json.loads(theirs.to_json_string()))[1:]

    base = {"steps": None, "spacing": "leading", "final": "zero", "clip": 1.0}
    assert of("DDPM") == ("eps", base | {"solver": "ddpm", "options": {"variance": "beta_tilde"}})
    assert of("DDPM", variance_type="fixed_large", clip_sample=False, timestep_spacing="trailing") == (
        "eps",
        base | {"solver": "ddpm", "options": {"variance": "beta"}, "clip": None, "spacing": "trailing"},
    )
    assert of("DDPM", variance_type="learned_range", clip_sample_range=2.0) == (
        "eps+range",
        base | {"solver": "ddpm", "options": {"variance": "learned_range"}, "clip": 2.0},
    )
    ddim = base | {"solver": "ddim", "options": {"clipped_direction": False}}
    assert of("DDIM", prediction_type="v_prediction") == ("v", ddim)
    assert of("DDIM", set_alpha_to_one=False, steps_offset=1, prediction_type="sample") == (
        "x0",
        ddim | {"final": "first", "steps_offset": 1},
    )
    sigmas = base | {"spacing": "linspace", "clip": None, "options": {}}
    assert of("DPMSolverMultistep") == ("eps", sigmas | {"solver": "dpmpp_2m"})
    assert of("EulerDiscrete", final_sigmas_type="sigma_min") == ("eps", sigmas | {"solver": "euler", "final": "first"})
    assert of("HeunDiscrete", timestep_spacing="trailing") == (
        "eps",
        sigmas | {"solver": "heun", "spacing": "trailing"},
    )


def test_old_and_empty_configs() -> None:
    cifar10 = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    schedule, predicts, defaults = schedule_of(cifar10)
    assert (predicts, defaults["solver"], defaults["options"]) == ("eps", "ddpm", {"variance": "beta"})
    assert schedule.sigma(np.zeros(1))[0] == pytest.approx(0.01, rel=1e-12)
    assert schedule_of({})[2] == schedule_of({"_class_name": "DDPMScheduler"})[2]
    assert schedule_of({"predict_epsilon": False})[1] == "x0"
    # keys that another class wrote say nothing to this one
    extra = {
        "_class_name": "EulerDiscreteScheduler",
        "clip_sample": True,
        "set_alpha_to_one": False,
        "thresholding": True,
    }
    assert schedule_of(extra)[2]["clip"] is None
    assert schedule_of(extra)[2]["final"] == "zero"


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("LMS", "_class_name", "LMSDiscreteScheduler"),
        ("DDPM", "thresholding", True),
        ("DDPM", "variance_type", "learned"),
        ("DDPM", "variance_type", "fixed_tiny"),
        ("DDPM", "beta_schedule", "sqrt"),
        ("DDIM", "prediction_type", "flow_prediction"),
        ("DDIM", "timestep_spacing", "quadratic"),
        ("DDIM", "shiny", 1),
        ("DPMSolverMultistep", "solver_order", 4),
        ("DPMSolverMultistep", "algorithm_type", "dpmsolver+++"),
        ("DPMSolverMultistep", "use_beta_sigmas", True),
        ("DPMSolverMultistep", "use_flow_sigmas", True),
        ("DPMSolverMultistep", "lambda_min_clipped", -5.1),
        ("DPMSolverMultistep", "final_sigmas_type", "late"),
        ("DPMSolverMultistep", "variance_type", "learned"),
        ("EulerDiscrete", "timestep_type", "continuous"),
        ("EulerDiscrete", "sigma_max", 80.0),
        ("HeunDiscrete", "use_beta_sigmas", True),
    ],
)
def test_unsupported_schedulers_name_the_key(name: str, key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"diffusers: {key}=.*accepted: "):
        schedule_of({"_class_name": f"{name}Scheduler"} | {key: value})


LOOPS = [
    ("DDIM", {}),
    ("DDIM", {"steps_offset": 1, "set_alpha_to_one": False, "prediction_type": "v_prediction"}),
    ("DDIM", {"set_alpha_to_one": False, "clip_sample_range": 0.7}),
    ("DDIM", {"timestep_spacing": "trailing", "prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2"}),
    ("DPMSolverMultistep", {"timestep_spacing": "trailing"}),
    ("EulerDiscrete", {"timestep_spacing": "trailing", "beta_schedule": "scaled_linear"}),
    ("EulerDiscrete", {"timestep_spacing": "leading", "steps_offset": 1, "final_sigmas_type": "sigma_min"}),
    ("HeunDiscrete", {"timestep_spacing": "leading", "prediction_type": "v_prediction"}),
]


@pytest.mark.parametrize(("name", "config"), LOOPS, ids=str)
def test_defaults_sample_as_diffusers_does(name: str, config: dict) -> None:
    """The defaults through the whole of our sampler, against diffusers' loop over the same function for a network."""
    theirs = getattr(diffusers, f"{name}Scheduler")(**config)
    schedule, predicts, defaults = schedule_of(json.loads(theirs.to_json_string()))

    def net(x: torch.Tensor, t: torch.Tensor, cond: object = None) -> torch.Tensor:
        t = t.to(x.dtype).reshape(-1, *(1,) * (x.ndim - 1)) / 1000
        return torch.sin(3 * x + t) * (1 - t) + x * t

    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours = Sampler(Denoiser(net, schedule, predicts, defaults=defaults), x.shape, dtype=torch.float64)
    # diffusers' float32 tables are not what this test is about
    theirs.alphas_cumprod = torch.from_numpy(schedule.alpha(np.arange(1000.0)) ** 2)
    if not config.get("set_alpha_to_one", True):
        theirs.final_alpha_cumprod = theirs.alphas_cumprod[0]
    theirs.set_timesteps(10)
    sigmas = getattr(theirs, "sigmas", None) if name in ("EulerDiscrete", "HeunDiscrete") else None
    y = x if sigmas is None else x * float((1 + sigmas[0].double() ** 2).sqrt())
    for t in theirs.timesteps:
        F = net(theirs.scale_model_input(y, t), t[None].expand(2))
        y = theirs.step(F, t, y).prev_sample.double()
    if config.get("final_sigmas_type") == "sigma_min":
        # ours ends in the variance preserving form
        y = y * float(schedule.alpha(np.zeros(1))[0])
    assert far(ours(x=x, steps=10), y) < 2e-6


def test_load_knows_the_shape_of_an_image(tmp_path: Path) -> None:
    config = {"sample_size": (8, 12), "block_out_channels": (32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    config |= {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "attention_head_dim": 8}
    diffusers.UNet2DModel(**config).save_pretrained(tmp_path / "net")
    den = load(tmp_path / "net")
    assert den.meta == {"name": "net", "shape": [3, 8, 12]}
