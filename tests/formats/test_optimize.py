"""`fd.optimize` on diffusers' live U-Nets: the same results, whatever is done to the model."""

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff as fd
from fastdiff.nn import own
from tests.formats import condition_nets, test_diffusers as unet2d_nets
from tests.formats.condition_nets import control, inputs, peer

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")


def far(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / b.detach().norm())


@contextmanager
def told(reason: str) -> Iterator[None]:
    """The model's own forward runs, and the reason is said."""
    with pytest.warns(UserWarning, match=f"forward of UNet2D.*Model itself runs, because .*{reason}"):
        yield


def check(fast: nn.Module, call: dict[str, Any], bound: float = 1e-5) -> Tensor:
    """Both faces give the same, and the fast one is the kernels'."""
    with torch.no_grad():
        want: Tensor = fast.original(**call).sample
        assert far(fast(**call).sample, want) < bound
    assert fast.fastdiff._reason is None
    return want


@pytest.mark.parametrize("name", condition_nets.NETS)
def test_condition_nets_agree(name: str) -> None:
    net, call = peer(name), inputs(name)
    fast = fd.optimize(net)
    check(fast, call)
    more = control(net, call)
    controlled = check(fast, call | more)
    with torch.no_grad():
        assert far(controlled, net(**call).sample) > 1e-2
    # other sizes, other batches, other texts, and the first again
    for other in (inputs(name, n=1), inputs(name, size=(8, 8)), inputs(name, tokens=3), call):
        check(fast, other)
    with torch.no_grad():
        assert fast(**call).sample.is_contiguous()
    assert own.has(fast.fastdiff._net.net)
    assert len(fast.fastdiff._net._tapes._recorded) == 4


@pytest.mark.parametrize("name", unet2d_nets.NETS)
def test_unet2d_nets_agree(name: str) -> None:
    net = unet2d_nets.peer(name).requires_grad_(False)
    x, t, cond = unet2d_nets.inputs(net)
    fast = fd.optimize(net)
    check(fast, {"sample": x, "timestep": t, "class_labels": cond})
    with torch.no_grad():
        (y,) = fast(x, t, cond, return_dict=False)
        assert torch.equal(y, fast(x, t, class_labels=cond).sample)
        if cond is None:
            assert far(fast(x, 7).sample, net(x, 7).sample) < 1e-5
            assert far(fast(x, torch.tensor(7.5)).sample, net(x, torch.tensor(7.5)).sample) < 1e-5


def test_the_face_is_the_model() -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    assert isinstance(fast, diffusers.UNet2DConditionModel)
    assert fast.original is net
    assert fast.config is net.config
    assert type(fast).__name__ == "UNet2DConditionModel"
    assert list(fast.state_dict()) == list(net.state_dict())
    assert next(iter(fast.parameters())) is next(iter(net.parameters()))
    assert fd.optimize(fast) is fast
    assert "UNet2DConditionModel on fastdiff's kernels" in str(fast.fastdiff)
    # an attribute, a hook and a mode of one are the other's
    fast.note = 3
    assert net.note == 3
    seen = []
    handle = net.register_forward_hook(lambda *_: seen.append(1))
    check(fast, call)
    handle.remove()
    assert seen == [1, 1]
    fast.train()
    assert net.training
    check(fast, call)


def test_copies_are_their_own() -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    want = check(fast, call)
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        with torch.no_grad():
            other.conv_in.bias += 1
        assert far(check(other, call), want) > 1e-3
    assert torch.equal(check(fast, call), want)


def test_saving_is_the_models(tmp_path: Any) -> None:
    fast, call = fd.optimize(peer("sd15")), inputs("sd15")
    fast.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**call).sample, check(fast, call))


def _ema(net: nn.Module) -> None:
    from diffusers.training_utils import EMAModel

    ema = EMAModel(net.parameters(), decay=0.5)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
    ema.step(net.parameters())
    ema.store(net.parameters())
    ema.copy_to(net.parameters())


def _step(net: nn.Module) -> None:
    net.requires_grad_(True)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net(**inputs("sd15")).sample.square().sum().backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    net.requires_grad_(False)


def _data(net: nn.Module) -> None:
    net.conv_in.weight.data = net.conv_in.weight.data * 1.5


def _parameter(net: nn.Module) -> None:
    net.mid_block.attentions[0].proj_in.weight = nn.Parameter(
        net.mid_block.attentions[0].proj_in.weight * 2, requires_grad=False
    )


def _module(net: nn.Module) -> None:
    attention = net.mid_block.attentions[0].transformer_blocks[0].attn2
    with torch.no_grad():
        linear = nn.Linear(24, 64, bias=False).requires_grad_(False)
        linear.weight.copy_(attention.to_k.weight * 3)
    attention.to_k = linear


CHANGES: dict[str, Callable[[nn.Module], None]] = {
    "load_state_dict": lambda net: net.load_state_dict({k: 0.9 * v for k, v in net.state_dict().items()}),
    "ema": _ema,
    "optimizer": _step,
    "p.data": _data,
    "parameter": _parameter,
    "module": _module,
    "to_k": lambda net: net.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight.mul_(2.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change: str) -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    before = check(fast, call)
    CHANGES[change](net)
    assert far(check(fast, call), before) > 1e-4


def test_to_another_dtype() -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    check(fast, call)
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in call.items()}
    fast.to(torch.bfloat16)
    with torch.no_grad():
        want, got = net(**half).sample, fast(**half).sample
    assert got.dtype == torch.bfloat16
    assert far(got.float(), want.float()) < 3e-2
    net.to(torch.float64)
    double = {k: v.double() if v.is_floating_point() else v for k, v in call.items()}
    check(fast, double, 1e-6)
    net.to(torch.float32)
    check(fast, call)


def _hook(net: nn.Module) -> None:
    net.mid_block.resnets[0].register_forward_hook(lambda _m, _x, y: 2 * y)


def _forward(net: nn.Module) -> None:
    block = net.mid_block.resnets[0]
    own_forward = block.forward
    block.forward = lambda *args, **kwargs: 2 * own_forward(*args, **kwargs)


def _class(net: nn.Module) -> None:
    linear = net.mid_block.attentions[0].transformer_blocks[0].attn1.to_q

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    linear.__class__ = Doubled


def _processor(net: nn.Module) -> None:
    class Mine:
        def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * hidden_states

    net.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Mine())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook, "a ResnetBlock2D has a hook"),
        (_forward, "the forward of a ResnetBlock2D was replaced"),
        (_class, "to_q is a .*Doubled"),
        (_processor, "attention has a Mine"),
        (lambda net: net.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), "FreeU is on"),
        (lambda net: net.set_default_attn_processor() or net.requires_grad_(True), "require gradients"),
        (lambda net: setattr(net.conv_in, "weight", nn.Parameter(net.conv_in.weight.double(), False)), ""),
    ],
)
def test_what_the_kernels_cannot_do_runs_the_model(change: Callable[[nn.Module], None], reason: str) -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    before = check(fast, call)
    change(net)
    if not reason:
        # it fails as the model does
        with told("several devices, or of several dtypes"), torch.no_grad(), pytest.raises(RuntimeError, match="type"):
            fast(**call)
        return
    with told(reason):
        got = fast(**call).sample
    assert torch.equal(got, net(**call).sample)
    assert "gradients" in reason or far(got, before) > 1e-4
    # said once
    fast(**call)


def test_calls_that_the_kernels_do_not_take() -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    check(fast, call)
    odd = inputs("sd15", size=(10, 14))
    with torch.no_grad():
        with told("not halved evenly"):
            assert torch.equal(fast(**odd).sample, net(**odd).sample)
        mask = {"encoder_attention_mask": torch.tensor([[1.0] * 4 + [0.0] * 3] * 2)}
        with told("the call has encoder_attention_mask"):
            assert torch.equal(fast(**call, **mask).sample, net(**call, **mask).sample)
        with told("autocast is on"), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fast(**call).sample, net(**call).sample)
        with pytest.raises(TypeError, match="encoder_hidden_states"):
            fast(call["sample"], 3)
    # the kernels again
    check(fast, call)


def test_gradients_reach_x_and_the_text() -> None:
    net, call = peer("sd15"), inputs("sd15")
    fast = fd.optimize(net)
    grads = []
    for model in (fast, net):
        x, text = call["sample"].clone().requires_grad_(), call["encoder_hidden_states"].clone().requires_grad_()
        model(x, 7, text).sample.square().sum().backward()
        grads.append((x.grad, text.grad))
    for a, b in zip(*grads, strict=True):
        assert far(a, b) < 1e-4


def test_training_through_the_face_trains_the_weights() -> None:
    net, call = peer("sd15").requires_grad_(True), inputs("sd15")
    fast = fd.optimize(net)
    with told("require gradients"):
        fast(**call).sample.square().sum().backward()
    assert net.conv_in.weight.grad.norm() > 0


def test_inference_mode_and_threads() -> None:
    net, call = peer("sd15"), inputs("sd15")
    with torch.no_grad():
        want = net(**call).sample
    fast = fd.optimize(net)
    with torch.inference_mode():
        assert far(fast(**call).sample, want) < 1e-5
    check(fast, call)
    with ThreadPoolExecutor(4) as pool:

        def work(_: int) -> float:
            with torch.no_grad():
                return far(fast(**call).sample, want)

        assert max(pool.map(work, range(8))) < 1e-5


def test_parameters_that_nobody_can_follow_run_the_model() -> None:
    with torch.inference_mode():
        net = peer("sd15")
    fast, call = fd.optimize(net), inputs("sd15")
    with told("was made under torch.inference_mode"), torch.no_grad():
        assert torch.equal(fast(**call).sample, net(**call).sample)


def test_a_compiler_sees_the_model() -> None:
    net, call = peer("sd21"), inputs("sd21")
    compiled = torch.compile(fd.optimize(net), backend="eager")
    with torch.no_grad():
        assert torch.equal(compiled(**call).sample, net(**call).sample)


def test_dropout_runs_in_training_mode_only() -> None:
    net = diffusers.UNet2DConditionModel(**condition_nets.SD15, dropout=0.5).requires_grad_(False)
    call, fast = inputs("sd15"), fd.optimize(net.eval())
    check(fast, call)
    net.train()
    with told("in training mode and has dropout"):
        torch.manual_seed(0)
        got = fast(**call).sample
    torch.manual_seed(0)
    assert torch.equal(got, net(**call).sample)
    net.eval()
    check(fast, call)


def test_configs_that_we_do_not_follow_are_patched() -> None:
    # NCSN++, as in google/ncsnpp-celebahq-256
    net = diffusers.UNet2DModel(
        down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D"),
        up_block_types=("AttnSkipUpBlock2D", "SkipUpBlock2D"),
        block_out_channels=(32, 32),
        time_embedding_type="fourier",
        mid_block_scale_factor=2**0.5,
    ).eval()
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 4.0])
    with torch.no_grad():
        want = net(x, t).sample
        with pytest.warns(UserWarning, match=r"diffusers: .*=.* is not supported; .*fd.patch"):
            fast = fd.optimize(net)
        assert fast is net
        assert far(fast(x, t).sample, want) < 1e-5
    assert type(net.conv_norm_out) is fd.nn.GroupNorm


def test_any_module_is_patched_and_no_module_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.SiLU())
    x = torch.randn(1, 3, 8, 8)
    want = model(x)
    fast = fd.optimize(model)
    assert fast is model
    assert far(fast(x), want) < 1e-5
    assert type(model[1]) is fd.nn.GroupNorm
    assert fd.optimize(fast) is fast
    with pytest.raises(TypeError, match=r"optimize: model is a function"):
        fd.optimize(lambda x: x)


def test_a_subclass_is_not_taken_for_its_base() -> None:
    class Mine(diffusers.UNet2DConditionModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs).sample * 2

    net = Mine(**condition_nets.SD15).eval().requires_grad_(False)
    call = inputs("sd15")
    want = net(**call)
    assert far(fd.optimize(net)(**call), want) < 1e-5
