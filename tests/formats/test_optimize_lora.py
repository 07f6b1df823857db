"""`fd.optimize` while LoRA comes, acts, is fused and goes."""

from typing import Any

import pytest
import torch
from torch import nn

import fastdiff as fd
from tests.formats.condition_nets import inputs, peer
from tests.formats.test_optimize import check, far, told

pytest.importorskip("diffusers")
peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning"),
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed"),
]

TARGETS = {
    "attention": ["to_q", "to_k", "to_v", "to_out.0"],
    "everywhere": [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv_shortcut",
    ],
}


def adapt(net: nn.Module, name: str = "a", targets: str = "attention", seed: int = 5, **config: Any) -> None:
    """Hang a LoRA that acts into the net."""
    given = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[targets], "init_lora_weights": False} | config
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net.add_adapter(peft.LoraConfig(**given), adapter_name=name)
    net.requires_grad_(False)


@pytest.mark.parametrize(("when", "targets"), [("before", "everywhere"), ("after", "attention")])
def test_lora_comes_and_goes(when: str, targets: str) -> None:
    net, call = peer("sd15"), inputs("sd15")
    plain = net(**call).sample
    if when == "before":
        adapt(net, targets=targets)
    fast = fd.optimize(net)
    if when == "after":
        check(fast, call)
        adapt(fast, targets=targets)
    assert far(check(fast, call), plain) > 1e-2
    net.disable_adapters()
    assert far(check(fast, call), plain) < 1e-5
    net.enable_adapters()
    acting = check(fast, call)
    fast.fuse_lora(lora_scale=1.0)
    assert far(check(fast, call), acting) < 1e-5
    net.unfuse_lora()
    assert far(check(fast, call), acting) < 1e-5
    net.unload_lora()
    assert far(check(fast, call), plain) < 1e-5


def test_several_adapters_and_their_weights() -> None:
    net, call = peer("sdxl"), inputs("sdxl")
    fast = fd.optimize(net)
    adapt(net, "a")
    adapt(net, "b", "everywhere", seed=6, use_rslora=True)
    seen = []
    for names, scales in ((["a"], [1.0]), (["b"], [0.5]), (["a", "b"], [0.3, 0.7]), (["a", "b"], [0.3, 0.9])):
        net.set_adapters(names, scales)
        seen.append(check(fast, call))
    for i, y in enumerate(seen):
        assert all(far(y, other) > 1e-3 for other in seen[:i])
    net.delete_adapters("a")
    check(fast, call)


def test_the_scale_of_a_call() -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    # without LoRA it says nothing
    check(fast, call | {"cross_attention_kwargs": {"scale": 0.5}})
    adapt(net)
    whole = check(fast, call)
    packed = fast.fastdiff._net
    half = check(fast, call | {"cross_attention_kwargs": {"scale": 0.5}})
    assert far(half, whole) > 1e-3
    assert fast.fastdiff._net is not packed
    packed = fast.fastdiff._net
    # packed once, not once a call
    assert torch.equal(check(fast, call | {"cross_attention_kwargs": {"scale": 0.5}}), half)
    assert fast.fastdiff._net is packed
    assert torch.equal(check(fast, call), whole)


def test_a_lora_that_is_trained_is_seen() -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    adapt(net)
    before = check(fast, call)
    packed = fast.fastdiff._net
    for name, p in net.named_parameters():
        p.requires_grad_("lora_" in name)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    with told("require gradients"):
        fast(**call).sample.square().mean().backward()
    optimizer.step()
    assert far(check(fast, call), before) > 1e-4
    # the same memory, so the same tapes
    assert fast.fastdiff._net is packed


def test_a_lora_in_float32_on_a_model_in_16_bits() -> None:
    net = peer("sd15").bfloat16()
    call = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs("sd15").items()}
    fast = fd.optimize(net)
    with torch.no_grad():
        plain = fast(**call).sample
        adapt(net)
        # as diffusers.training_utils.cast_training_params does
        for name, p in net.named_parameters():
            p.data = p.data.float() if "lora_" in name else p.data
        want, got = net(**call).sample.float(), fast(**call).sample.float()
    assert fast.fastdiff._reason is None
    assert far(got, want) < 3e-2 < far(plain.float(), want)


@pytest.mark.parametrize(
    ("config", "reason"),
    [({"use_dora": True}, "more than LoRA"), ({"lora_bias": True}, "more than LoRA")],
)
def test_what_is_more_than_lora_runs_the_model(config: dict[str, Any], reason: str) -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    before = check(fast, call)
    adapt(net, **config)
    with told(reason), torch.no_grad():
        got = fast(**call).sample
        assert torch.equal(got, net(**call).sample)
    assert far(got, before) > 1e-2
    net.unload_lora()
    assert far(check(fast, call), before) < 1e-5


def test_another_kind_of_adapter_runs_the_model() -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    peft.inject_adapter_in_model(peft.LoHaConfig(r=4, target_modules=["to_q"], init_weights=False), net)
    net.requires_grad_(False)
    with told("is no LoRA"), torch.no_grad():
        assert torch.equal(fast(**call).sample, net(**call).sample)
