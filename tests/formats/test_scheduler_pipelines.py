"""Stock diffusers programs with one line changed: the same image to 1e-4."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff as fd

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
    # pipelines warn of a float16 network on CPUs, of missing safety checkers and the like
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def unet() -> Any:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    ).eval()


def image(pipe: Any, **options: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    return pipe(generator=torch.Generator().manual_seed(7), output_type="np", **options).images


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_pipeline(variance: str) -> None:
    pipe = diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler(variance_type=variance))
    want = image(pipe, batch_size=2, num_inference_steps=25)
    pipe.scheduler = fd.DiffusersScheduler.from_config(pipe.scheduler.config)
    got = image(pipe, batch_size=2, num_inference_steps=25)
    assert np.abs(got - want).max() < 1e-4
    assert np.abs(want - image(pipe, batch_size=2, num_inference_steps=24)).max() > 1e-2


@pytest.mark.parametrize("options", [{}, {"eta": 0.7}, {"eta": 0.3, "use_clipped_model_output": True}], ids=str)
def test_ddim_pipeline(options: dict[str, Any]) -> None:
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDPMScheduler())
    want = image(pipe, batch_size=2, num_inference_steps=20, **options)
    pipe.scheduler = fd.DiffusersScheduler.from_config(pipe.scheduler.config)
    got = image(pipe, batch_size=2, num_inference_steps=20, **options)
    assert np.abs(got - want).max() < 1e-4


def stable_diffusion(kind: str, scheduler: Any) -> Any:
    """StableDiffusionPipeline or its image to image form, of tiny random parts."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=64,
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )
    made = getattr(diffusers, kind)(
        vae=vae,
        text_encoder=text,
        tokenizer=None,
        unet=net,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return made


SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULERS = {
    "PNDM": SD | {"skip_prk_steps": True},
    "DDIM": SD | {"clip_sample": False, "set_alpha_to_one": False},
    "DDPM": SD | {"clip_sample": False},
    "EulerDiscrete": SD | {"timestep_spacing": "leading"},
    "EulerAncestralDiscrete": SD,
    "HeunDiscrete": SD,
    "DPMSolverMultistep": SD | {"use_karras_sigmas": True},
}


def both(name: str, kind: str, **call: Any) -> tuple[np.ndarray, np.ndarray]:
    pipe = stable_diffusion(kind, getattr(diffusers, f"{name}Scheduler")(**SCHEDULERS[name]))
    g = torch.Generator().manual_seed(2)
    call |= {"prompt_embeds": torch.randn(1, 8, 16, generator=g)}
    call |= {"negative_prompt_embeds": torch.randn(1, 8, 16, generator=g)}
    call |= {"guidance_scale": 3.0, "output_type": "np"}
    want = pipe(generator=torch.Generator().manual_seed(7), **call).images
    pipe.scheduler = fd.DiffusersScheduler.from_config(pipe.scheduler.config)
    return want, pipe(generator=torch.Generator().manual_seed(7), **call).images


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion(name: str) -> None:
    for steps in (8, 20):
        want, got = both(name, "StableDiffusionPipeline", num_inference_steps=steps, height=16, width=16)
        assert np.abs(got - want).max() < 1e-4


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "PNDM"])
def test_image_to_image(name: str) -> None:
    start = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    for strength in (0.3, 0.8):
        call = {"num_inference_steps": 20, "strength": strength, "image": start}
        want, got = both(name, "StableDiffusionImg2ImgPipeline", **call)
        assert np.abs(got - want).max() < 1e-4


@pytest.mark.parametrize("name", ["EulerDiscrete", "DPMSolverMultistep"])
def test_stable_diffusion_xl(name: str) -> None:
    """Begin index, denoising_end and a second pipeline that takes over from there."""
    torch.manual_seed(0)
    net = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=16 + 6 * 4,
    )
    sd = stable_diffusion("StableDiffusionPipeline", diffusers.DDIMScheduler(steps_offset=1, clip_sample=False))
    parts = {"vae": sd.vae, "text_encoder": None, "text_encoder_2": None, "tokenizer": None, "tokenizer_2": None}
    scheduler = getattr(diffusers, f"{name}Scheduler")(**SCHEDULERS[name])
    pipe = diffusers.StableDiffusionXLPipeline(**parts, unet=net, scheduler=scheduler, add_watermarker=False)
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(2)
    call = {
        "prompt_embeds": torch.randn(1, 8, 16, generator=g),
        "pooled_prompt_embeds": torch.randn(1, 16, generator=g),
    }
    call |= {"negative_prompt_embeds": torch.zeros(1, 8, 16), "negative_pooled_prompt_embeds": torch.zeros(1, 16)}
    call |= {"num_inference_steps": 10, "height": 16, "width": 16}
    images = []
    for other in (False, True):
        if other:
            pipe.scheduler = fd.DiffusersScheduler.from_config(pipe.scheduler.config)
        half = pipe(generator=torch.Generator().manual_seed(7), output_type="latent", denoising_end=0.6, **call).images
        images += [half, pipe(generator=torch.Generator().manual_seed(7), output_type="pt", **call).images]
    for theirs, ours in zip(images[:2], images[2:], strict=True):
        assert float((theirs - ours).abs().max()) < 1e-4


def test_a_folder_that_diffusers_reads_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipe = diffusers.DDIMPipeline(unet(), diffusers.DDIMScheduler(clip_sample_range=2.0))
    pipe.scheduler = fd.DiffusersScheduler.from_config(pipe.scheduler.config, beta_end=0.03)
    pipe.scheduler.save_pretrained(tmp_path / "scheduler")
    theirs = diffusers.DDIMScheduler.from_pretrained(tmp_path / "scheduler")
    assert (theirs.config.clip_sample_range, theirs.config.beta_end) == (2.0, 0.03)
    assert json.loads((tmp_path / "scheduler" / "scheduler_config.json").read_text())["_class_name"] == "DDIMScheduler"
    again = fd.DiffusersScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    assert again.config.beta_end == 0.03
    # diffusers saves what inherits from its own classes, and says what it leaves out
    with caplog.at_level(logging.WARNING):
        pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe" / "unet" / "config.json").is_file()
