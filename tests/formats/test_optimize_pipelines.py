"""Stock pipelines of diffusers with one line changed: the same image."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from tests.formats.condition_nets import SD15, peer
from tests.formats.test_diffusers import peer as unet2d
from tests.formats.test_optimize_lora import adapt

diffusers = pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    # its schedulers call NumPy in a way that NumPy 2 warns of
    pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _quiet() -> None:
    diffusers.utils.logging.disable_progress_bar()


def image(pipe: Any, **given: Any) -> Tensor:
    """An image in [0, 1], by seed."""
    generator = torch.Generator().manual_seed(3)
    found = pipe(generator=generator, num_inference_steps=3, output_type="np", **given).images
    return torch.from_numpy(found)


@pytest.mark.parametrize("kind", ["DDPMPipeline", "DDIMPipeline"])
def test_unconditional_pipelines(kind: str) -> None:
    net = unet2d("ddpm")
    scheduler = getattr(diffusers, kind.replace("Pipeline", "Scheduler"))()
    net.register_to_config(sample_size=16)
    pipe = getattr(diffusers, kind)(unet=net, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    want = image(pipe, batch_size=2)
    pipe.unet = fd.optimize(pipe.unet)
    got = image(pipe, batch_size=2)
    assert pipe.unet.fastdiff._net is not None
    assert (got - want).abs().max() < 1e-4
    assert want.std() > 0.05


def stable_diffusion(net: nn.Module) -> Any:
    """A pipeline whose texts come embedded."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    ).eval()  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae, None, None, net, scheduler, None, None, requires_safety_checker=False
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def texts() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(4)
    embeds = {name: torch.randn(1, 7, 24, generator=g) for name in ("prompt_embeds", "negative_prompt_embeds")}
    return embeds | {"height": 128, "width": 64}  # type: ignore[dict-item]


def same(fast: Any, slow: Any, **given: Any) -> Tensor:
    want, got = image(slow, **texts() | given), image(fast, **texts() | given)
    assert (got - want).abs().max() < 1e-4
    assert want.std() > 0.02
    return want


def test_stable_diffusion_with_lora_and_other_sizes(tmp_path: Path) -> None:
    net = peer("sd15").requires_grad_(False)
    slow, fast = stable_diffusion(net), stable_diffusion(net)
    fast.unet = fd.optimize(fast.unet)
    plain = same(fast, slow)
    same(fast, slow, height=64, width=64)
    same(fast, slow, num_images_per_prompt=2, guidance_scale=1.0)
    # a LoRA by a file, as from a hub
    other = peer("sd15")
    adapt(other)
    layers = peft.get_peft_model_state_dict(other, adapter_name="a")
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)
    fast.load_lora_weights(tmp_path, adapter_name="style")
    acting = same(fast, slow)
    assert (acting - plain).abs().max() > 1e-2
    fast.set_adapters(["style"], [0.5])
    weaker = same(fast, slow)
    assert (weaker - acting).abs().max() > 1e-3
    fast.fuse_lora(components=["unet"])
    assert (same(fast, slow) - weaker).abs().max() < 1e-4
    fast.unfuse_lora(components=["unet"])
    fast.unload_lora_weights()
    assert (same(fast, slow) - plain).abs().max() < 1e-4
    assert fast.unet.fastdiff._reason is None


def test_a_pipeline_saves_and_moves_the_model(tmp_path: Path) -> None:
    pipe = stable_diffusion(peer("sd15"))
    pipe.unet = fd.optimize(pipe.unet)
    want = image(pipe, **texts())
    pipe.save_pretrained(tmp_path)
    again = diffusers.StableDiffusionPipeline.from_pretrained(
        tmp_path, text_encoder=None, tokenizer=None, feature_extractor=None, image_encoder=None, safety_checker=None
    )
    again.set_progress_bar_config(disable=True)
    assert type(again.unet) is diffusers.UNet2DConditionModel
    assert (image(again, **texts()) - want).abs().max() < 1e-4
    pipe.to(torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    assert pipe.unet.config.cross_attention_dim == SD15["cross_attention_dim"]
