"""diffusers' UNet2DConditionModel, random weights, as our UNet."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.formats.diffusers.condition import text_features
from fastdiff.formats.diffusers.convert import convert
from tests.formats.condition_nets import NETS, control, inputs, peer

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def cond_of(net: nn.Module, call: dict[str, Any]) -> Any:
    """Our condition of their call."""
    context = call["encoder_hidden_states"]
    if "added_cond_kwargs" in call:
        added = call["added_cond_kwargs"]
        return {"context": context, "features": text_features(net.config, added["text_embeds"], added["time_ids"])}
    if "class_labels" in call:
        kind = "label" if net.config.num_class_embeds else "features"
        return {"context": context, kind: call["class_labels"]}
    return context


def ours_of(net: nn.Module) -> fd.UNet:
    return convert({**net.config, "_class_name": type(net).__name__}, net.state_dict()).eval()


@pytest.mark.parametrize("name", NETS)
def test_nets_agree(name: str) -> None:
    theirs, call = peer(name), inputs(name)
    ours, cond = ours_of(theirs), cond_of(theirs, call)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x, t = call["sample"], call["timestep"]
    with torch.no_grad():
        want = theirs(**call).sample
        assert far(ours(x, t, cond), want) < 1e-5
        more = control(theirs, call)
        residuals = [*more["down_block_additional_residuals"], more["mid_block_additional_residual"]]
        controlled = theirs(**call, **more).sample
        assert far(controlled, want) > 1e-2
        assert far(ours(x, t, cond, residuals=residuals), controlled) < 1e-5
        # every part of the condition is heard
        other = cond.roll(1, 0) if isinstance(cond, torch.Tensor) else cond | {"context": cond["context"].roll(1, 0)}
        assert far(ours(x, t, other), want) > 1e-3
        if isinstance(cond, dict):
            (kind,) = cond.keys() - {"context"}
            assert far(ours(x, t, cond | {kind: cond[kind].roll(1, 0)}), want) > 1e-3


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_in_double_only_rounding_differs(name: str) -> None:
    theirs, call = peer(name).double(), inputs(name)
    ours = ours_of(theirs)
    call = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()}
    if "added_cond_kwargs" in call:
        call["added_cond_kwargs"] = {k: v.double() for k, v in call["added_cond_kwargs"].items()}
    with torch.no_grad():
        want = theirs(**call).sample
        got = ours(call["sample"], call["timestep"].float(), cond_of(theirs, call))
    # their sinusoid is float32
    assert far(got, want) < 1e-6


@pytest.mark.parametrize("name", ["sd15", "sdxl", "classes"])
def test_prepared_nets_agree(name: str) -> None:
    theirs, call = peer(name), inputs(name)
    ours = ours_of(theirs)
    fast, cond = fd.nn.prepare(ours), cond_of(theirs, call)
    x, t, more = call["sample"], call["timestep"], control(theirs, call)
    residuals = [*more["down_block_additional_residuals"], more["mid_block_additional_residual"]]
    with torch.no_grad():
        for given in ({}, {"residuals": residuals}):
            want = ours(x, t, cond, **given)
            assert far(fast(x, t, cond, **given), want) < 2e-5
            # from the tape, other numbers
            assert far(fast(-x, t, cond, **given), ours(-x, t, cond, **given)) < 2e-5
            row = fast.time_table(t, fast.told(cond))
            assert far(fast(x, None, cond, table_row=row, **given), want) < 2e-5


def test_a_sampler_with_a_context_and_guidance(tmp_path: Path) -> None:
    theirs, call = peer("sd15"), inputs("sd15")
    theirs.save_pretrained(tmp_path / "unet")
    (tmp_path / "scheduler").mkdir()
    scheduler = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
    config = scheduler | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False, "steps_offset": 1}
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"scaling_factor": 0.13025}))
    den = fd.load(tmp_path)
    assert den.meta["vae_scaling_factor"] == 0.13025
    context, null = call["encoder_hidden_states"], torch.zeros(2, 7, 24)
    x = torch.randn(2, 4, 12, 20, generator=torch.Generator().manual_seed(3))
    given = {"steps": 4, "x": x, "cond": context, "guidance": fd.cfg(3.0, null=null)}
    got = fd.sample(den, tuple(x.shape), **given)
    fast = fd.sample(den.prepare(), tuple(x.shape), **given)
    assert far(fast, got) < 1e-4
    peers = diffusers.DDIMScheduler.from_config(config)
    peers.set_timesteps(4)
    with torch.no_grad():
        for t in peers.timesteps:
            u, c = theirs(torch.cat([x, x]), t, torch.cat([null, context])).sample.chunk(2)
            x = peers.step(u + 3.0 * (c - u), t, x).prev_sample
    assert far(got, x) < 1e-4
    with pytest.raises(ValueError, match="context of no text"):
        fd.sample(den, tuple(x.shape), steps=2, cond=context, guidance=fd.cfg(3.0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("dual_cross_attention", True),
        ("time_cond_proj_dim", 256),
        ("encoder_hid_dim_type", "ip_image_proj"),
        ("mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("cross_attention_dim", [24, 24, 32]),
        ("act_fn", "gelu"),
        ("addition_embed_type", "image"),
        ("up_block_types", ["UpBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"]),
        ("never_heard_of", 1),
    ],
)
def test_unsupported_configs_name_the_key(key: str, value: object) -> None:
    config = {**NETS["sd15"], "_class_name": "UNet2DConditionModel", key: value}
    with pytest.raises(ValueError, match=rf"diffusers: {key}=.*accepted: "):
        convert(config, {})


@pytest.mark.parametrize(
    ("cond", "message"),
    [
        (None, r"context has shape None; this net takes .*\(2, M, 24\)"),
        (torch.zeros(2, 7, 23), r"context has shape \(2, 7, 23\)"),
        ({"context": torch.zeros(2, 7, 24), "text": torch.zeros(2)}, "cond has 'text'; this net takes 'context'"),
    ],
)
def test_conditions_that_do_not_fit(cond: object, message: str) -> None:
    ours = fd.UNet(in_channels=4, channels=32, mults=(1, 2), attention=(1,), context_channels=24, heads=(2, 4))
    with pytest.raises(ValueError, match=message):
        ours(torch.zeros(2, 4, 8, 8), 0, cond)
    with pytest.raises(ValueError, match="3 residuals; accepted: "):
        ours(torch.zeros(2, 4, 8, 8), 0, torch.zeros(2, 7, 24), residuals=[torch.zeros(1)] * 3)


@pytest.mark.parametrize(
    "given",
    [{"heads": (2, 4, 8)}, {"depth": (1,)}, {"dims": 1}, {"condition": "features"}, {"condition_channels": 3}],
)
def test_arguments_that_do_not_fit(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"UNet: .*accepted: "):
        fd.UNet(channels=32, mults=(1, 2), context_channels=24, **given)
