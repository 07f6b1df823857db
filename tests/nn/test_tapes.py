"""The tapes of a prepared net: played they are the call itself, bit for bit, and played nowhere else."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.nn import follow, tapes
from fastdiff.nn.attended import ConvolvedAttention, OneHead
from fastdiff.nn.layers import Deep
from fastdiff.nn.prepare import prepare
from fastdiff.nn.unet import UNet
from fastdiff.ops import dispatch, native
from fastdiff.ops.tape import NotRecorded, Tape, recording
from tests.nn.test_unet import draw, far, randomise

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here"),
]

SMALL = {"channels": 8, "mults": (1, 2), "blocks": 1, "attention": (2,), "groups": 4}
CONFIGS = {
    "plain": {},
    "adm": {"scale_shift": True, "resample_blocks": True, "head_channels": 4, "learned_variance": True},
    "resampling blocks": {"resample_blocks": True},
    "scale and shift": {"scale_shift": True, "attention": (1, 2)},
    "pooled": {"conv_resample": False},
    "pooled deeper": {"conv_resample": False, "mults": (1, 2, 2), "scale_shift": True},
    "asymmetric": {"asymmetric": True, "mults": (1, 2, 3)},
    "divided": {"middle_divisor": 2**0.5},
    "centered": {"center_input": True, "in_channels": 1},
    "classes": {"classes": 3},
    "classes only": {"classes": 4, "null_class": False, "learned_variance": True},
    "vector": {"condition": "vector"},
    "heads": {"heads": 4, "attention": (1, 2)},
    "middle without norm": {"middle_groups": 0, "middle_divisor": 2.0},
    "no attention": {"attention": (), "middle_attention": False},
    "no middle": {"middle": False},
    "odd": {"channels": 9, "mults": (1, 5 / 3, 3), "groups": 3, "in_channels": 1, "out_channels": 5},
    "narrowing": {"mults": (2, 1), "groups": 8, "scale_shift": True},
}


def make(**config):
    return randomise(UNet(**SMALL | config))


def inputs(net, n=2, size=(8, 12), seed=1):
    x, t = draw(n, net.in_channels, *size, seed=seed), torch.arange(3, 3 + 300 * n, 300)
    cond = torch.arange(n) % 3 if net.classes is not None else None
    return x, t, draw(n, 4 * net.config["channels"], seed=3) if net.condition == "vector" else cond


def pair(net):
    """Prepared twice: with tapes and without."""
    fast, plain = prepare(net), prepare(net)
    assert fast._tapes is not None
    plain._tapes = None
    return fast, plain


def spoil(fast):
    """All memory of all tapes NaN."""
    for made in fast._tapes._recorded.values():
        for chunk in made.tape.arena._chunks:
            chunk[: len(chunk) // 8 * 8].view(torch.float64).fill_(torch.nan)


def recorded(fast):
    """How many tapes there are; none may have been given up."""
    assert None not in fast._tapes._recorded.values()
    return len(fast._tapes._recorded)


@pytest.fixture
def plays(monkeypatch):
    """One entry a play."""
    seen, play = [], Tape.play

    def spy(tape):
        seen.append(tape)
        play(tape)

    monkeypatch.setattr(Tape, "play", spy)
    return seen


# what is played ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_played_is_the_call_itself(name, plays):
    net = make(**CONFIGS[name])
    fast, plain = pair(net)
    with torch.no_grad():
        for seed in range(4):
            x, t, cond = inputs(net, seed=seed)
            t = t + 7 * seed
            wanted = plain(x, t, cond)
            assert far(wanted, net(x, t, cond)) <= 1e-5
            got = fast(x, t, cond)
            assert torch.equal(got, wanted)
            assert got.stride() == wanted.stride()
            # memory that is dead is full of NaN when the next play begins
            spoil(fast)
            line = fast.time_table(t[:1], None if cond is None else cond[:1])
            assert torch.equal(fast(x, None, table_row=line), plain(x, None, table_row=line))
            spoil(fast)
    assert recorded(fast) == 2
    assert len(plays) == 6


@pytest.mark.parametrize(("heads", "kind"), [(1, OneHead), (2, ConvolvedAttention)])
def test_attention_is_in_the_tape(heads, kind):
    fast = prepare(make(heads=heads))
    found = [m for m in fast.modules() if isinstance(m, (OneHead, ConvolvedAttention))]
    assert found
    assert {type(m) for m in found} == {kind}


def test_threads_may_change_between_plays():
    net = make(heads=2)
    fast, plain = pair(net)
    x, t, cond = inputs(net, size=(32, 32))
    with torch.no_grad():
        wanted = plain(x, t, cond)
        for count in (1, 2, 1, 3, 5):
            torch.set_num_threads(count)
            assert torch.equal(fast(x, t, cond), wanted)
    assert recorded(fast) == 1


def test_an_earlier_result_stays():
    net = make()
    fast, plain = pair(net)
    with torch.no_grad():
        calls = [inputs(net, seed=seed) for seed in range(4)]
        results = [fast(*call) for call in calls]
        assert all(torch.equal(y, plain(*call)) for y, call in zip(results, calls, strict=True))
        # to be written to as well
        results[-1].zero_()
        results[0].zero_()
        assert torch.equal(fast(*calls[1]), results[1])


def test_layouts_and_dtypes_of_x():
    net = make()
    fast, plain = pair(net)
    x, t, _ = inputs(net)
    with torch.no_grad():
        last = x.to(memory_format=torch.channels_last)
        for v in (x, last, x.mT.contiguous().mT, x.double(), x[:1].expand(2, 3, 8, 12)):
            kept = v.clone()
            assert torch.equal(fast(v, t), plain(v, t))
            assert torch.equal(v, kept)
    assert recorded(fast) == 1


def test_lines_for_one_and_for_all():
    net = make(scale_shift=True)
    fast, plain = pair(net)
    with torch.no_grad():
        table = fast.time_table(torch.tensor([5, 600, 30]))
        for seed in range(3):
            x = draw(2, 3, 8, 8, seed=seed)
            # rows as a sampler cuts them: of a table, expanded, every second
            one = table.index_select(0, torch.tensor(2))
            for row in (table[1:2], table[:2], table[::2], table[:1].expand(2, -1), one):
                assert torch.equal(fast(x, None, table_row=row), plain(x, None, table_row=row))
    assert recorded(fast) == 2


# weights -------------------------------------------------------------------------------------------------------------


def step(net):
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(net.parameters(), lr=0.05).step()


def swapped(net):
    for p in net.parameters():
        p.data = p.data * 0.75


def replaced(net):
    net.out.weight = torch.nn.Parameter(2 * net.out.weight.detach())


CHANGES = {
    "step": step,
    "load": lambda net: net.load_state_dict(randomise(UNet(**net.config), 3).state_dict()),
    "data": swapped,
    "a new parameter": replaced,
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_seen(change, plays):
    net = make(resample_blocks=True, scale_shift=True)
    fast, plain = pair(net)
    call = inputs(net)
    with torch.no_grad():
        before = fast(*call)
        CHANGES[change](net)
        after = fast(*call)
        assert torch.equal(after, plain(*call))
        assert far(after, net(*call)) <= 1e-5
        assert far(after, before) > 1e-4
    assert recorded(fast) == len(plays) == 1


@pytest.mark.parametrize("compiled", [True, False])
def test_a_watch_sees_what_changed(compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(native, "cpu", None)
    p, q = torch.nn.Parameter(draw(3, 4)), torch.nn.Parameter(draw(1))
    same = follow._watch([p, q])
    assert same()
    held = p.data
    p.data = held.clone()
    assert not same()
    p.data = held
    assert same()
    with torch.no_grad():
        q.add_(0)
    assert not same()
    same = follow._watch([p, q])
    assert same()
    p.data[0].copy_(p.data[1])
    # a write through .data is counted by nobody
    assert same()
    with torch.no_grad():
        p[0].view(-1)[1:].zero_()
    assert not same()


def test_a_watch_of_inference_tensors_raises_as_torch_does():
    with torch.inference_mode():
        p = torch.ones(3)
    with pytest.raises(RuntimeError, match="version counter"):
        follow._watch([p])


# shapes --------------------------------------------------------------------------------------------------------------


def test_each_shape_has_its_tape_and_the_oldest_goes():
    net = make()
    fast, plain = pair(net)
    arenas = []
    with torch.no_grad():
        for n in range(1, tapes.KEPT + 3):
            call = inputs(net, n)
            for _ in range(2):
                assert torch.equal(fast(*call), plain(*call))
            # the first is used again and again
            fast(*inputs(net, 1))
            arenas.append(weakref.ref(list(fast._tapes._recorded.values())[-1 if n == 1 else -2].tape.arena))
    sizes = [shape[0] for shape, *_ in fast._tapes._recorded]
    assert recorded(fast) == tapes.KEPT
    assert sizes == [*range(4, tapes.KEPT + 3), 1]
    gc.collect()
    assert [n for n, arena in enumerate(arenas, 1) if arena() is not None] == sorted(sizes)
    assert fast._tapes.nbytes == sum(arena().nbytes for arena in arenas if arena() is not None)


def test_fifty_shapes_leave_nothing_behind():
    net = make(attention=(), middle=False)
    fast, arenas = prepare(net), []
    with torch.no_grad():
        for n in range(1, 51):
            fast(draw(1, 3, 2 * n, 4), 5)
            arenas.append(weakref.ref(next(reversed(fast._tapes._recorded.values())).tape.arena))
    # by their counts of references alone: no cycle waits for a collection
    assert sum(arena() is not None for arena in arenas) == tapes.KEPT
    assert fast._tapes.nbytes <= tapes.KEPT * (33 << 20)


def test_memory_goes_with_the_net():
    net = make(heads=2, middle_divisor=2.0)
    fast = prepare(net)
    with torch.no_grad():
        y = fast(*inputs(net))
        fast(*inputs(net))
    there = [weakref.ref(made.tape.arena) for made in fast._tapes._recorded.values()]
    assert there
    del fast
    gc.collect()
    assert not any(arena() is not None for arena in there)
    assert y.isfinite().all()


# where no tape is played ---------------------------------------------------------------------------------------------


def unplayed(fast, call, wanted, bound=0.0):
    """The call is right, and no tape has had part in it."""
    before = list(fast._tapes._recorded)
    got = call()
    assert torch.equal(got, wanted) if bound == 0 else far(got, wanted) <= bound
    assert list(fast._tapes._recorded) == before
    assert not fast._tapes._lock.locked()


@pytest.fixture(params=[False, True], ids=["at first", "behind a play"])
def known(request, plays):
    """net, fast, plain, a call; whether fast has a tape for it. Nothing is played from here on."""
    net = make(heads=2)
    fast, plain = pair(net)
    call = inputs(net)
    if request.param:
        with torch.no_grad():
            fast(*call)
    yield net, fast, plain, call
    assert not plays


def test_gradients(known):
    _, fast, plain, (x, t, cond) = known
    found = []
    for one in (fast, plain):
        leaf = x.clone().requires_grad_()
        y = one(leaf, t, cond)
        assert y.requires_grad
        found.append(torch.autograd.grad(y.square().sum(), leaf)[0])
    assert torch.equal(*found)
    with torch.no_grad():
        row = fast.time_table(t)
    leaf = row.clone().requires_grad_()
    (grad,) = torch.autograd.grad(fast(x, None, table_row=leaf).square().sum(), leaf)
    assert grad.norm() > 0


def test_autocast(known):
    _, fast, plain, (x, t, cond) = known
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        row = fast.time_table(t, cond)
        unplayed(fast, lambda: fast(x, t, cond), plain(x, t, cond))
        unplayed(fast, lambda: fast(x, None, table_row=row.float()), plain(x, None, table_row=row.float()))


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_compiled(known):
    _, fast, plain, call = known
    torch._dynamo.reset()
    with torch.no_grad():
        unplayed(fast, lambda: torch.compile(fast, backend="eager", fullgraph=True)(*call), plain(*call), 1e-6)


def test_other_backends(known):
    net, fast, plain, call = known
    with torch.no_grad(), dispatch.backend("reference"):
        unplayed(fast, lambda: fast(*call), plain(*call))
        unplayed(fast, lambda: fast(*call), net(*call), 1e-5)


def test_modes_that_look_on(known):
    net, fast, plain, call = known
    with torch.no_grad():
        wanted = plain(*call)
        with FlopCounterMode(display=False):
            unplayed(fast, lambda: fast(*call), wanted)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            x = mode.from_tensor(call[0])
            assert not fast._tapes._lock.locked()
            assert fast._tapes(x, mode.from_tensor(draw(2, net.columns))) is None


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_transforms(known):
    """Their tensors look like any other; a tape would lose a tangent without a word."""
    _, fast, _, (x, t, _) = known
    found = []
    with torch.no_grad():
        row = fast.time_table(t)
        x = x.contiguous(memory_format=torch.channels_last)
        torch.func.vmap(lambda r: found.append(fast._tapes(x, r)) or r)(torch.stack([row, row]))
        torch.func.jvp(lambda v: found.append(fast._tapes(v, row)) or v, (x,), (x,))
        with torch.autograd.forward_ad.dual_level():
            found.append(fast._tapes(torch.autograd.forward_ad.make_dual(x, x), row))
    assert found == [None] * 3


def test_the_deep_part_reused(known):
    _, fast, plain, (x, t, cond) = known
    with torch.no_grad():
        kept = [torch.empty(fast.deep_shape(x.shape, 2)) for _ in range(2)]
        for fresh in (True, False):
            wanted = plain(x, t, cond, deep=Deep(2, kept[0], fresh))
            unplayed(fast, lambda fresh=fresh: fast(x, t, cond, deep=Deep(2, kept[1], fresh)), wanted)


def test_shapes_that_do_not_fit(known):
    net, fast, _, (x, t, _) = known
    row = torch.zeros(3, net.columns)
    with torch.no_grad():
        for call, message in (
            (lambda: fast(x[:, :2], t), r"takes \(N, 3, H, W\)"),
            (lambda: fast(x[0], None, table_row=row[:1]), r"takes \(N, 3, H, W\)"),
            (lambda: fast(x[:, :, :7], t), "multiple of 2"),
            (lambda: fast(x, None, table_row=row), "table_row has shape"),
            (lambda: fast(x, None, table_row=row[0]), "table_row has shape"),
        ):
            with pytest.raises(ValueError, match=message):
                call()
            assert recording() is None
            assert not fast._tapes._lock.locked()


# beside others -------------------------------------------------------------------------------------------------------


def test_inference_mode_shares_the_tape(plays):
    """Made in either mode it is played in the other; what comes out belongs to the mode."""
    for first in (True, False):
        net = make(heads=2, center_input=True)
        fast, plain = pair(net)
        for inference in (first, not first, first):
            with torch.inference_mode(inference), torch.no_grad():
                call = inputs(net)
                got = fast(*call)
                assert torch.equal(got, plain(*call))
                assert got.is_inference() == inference
        assert recorded(fast) == 1
    assert len(plays) == 4


def test_another_thread_meanwhile(monkeypatch):
    """It finds the tape taken, and calls the net itself."""
    net = make(heads=2)
    fast, plain = pair(net)
    call, other = inputs(net), inputs(net, seed=9)
    with torch.no_grad():
        wanted, wanted_other = plain(*call), plain(*other)
        fast(*call)
    found, play = [], Tape.play

    def spy(tape):
        def run():
            with torch.no_grad():
                found.append(fast(*other))

        play(tape)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    monkeypatch.setattr(Tape, "play", spy)
    with torch.no_grad():
        assert torch.equal(fast(*call), wanted)
    assert len(found) == 1
    assert torch.equal(found[0], wanted_other)


def test_many_threads_at_once():
    net = make()
    fast, plain = pair(net)
    calls = [inputs(net, n=1 + i % 3, seed=i) for i in range(4)]
    with torch.no_grad():
        wanted = [plain(*call) for call in calls]
    wrong = []

    def run(i):
        with torch.no_grad():
            wrong.extend(i for _ in range(30) if not torch.equal(fast(*calls[i]), wanted[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not fast._tapes._lock.locked()


def test_a_kernel_that_reads_from_elsewhere_is_no_tape(plays):
    """As in a net that somebody has put a module of his own into."""
    net = make()
    fast, plain = pair(net)
    for one in (fast, plain):
        one.net.stem.register_forward_hook(lambda _, __, y: y._replace(x=2 * y.x, moments=None))
    call = inputs(net)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(fast(*call), plain(*call))
    assert list(fast._tapes._recorded.values()) == [None]
    assert fast._tapes.nbytes == 0
    assert not plays


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_in_the_middle(error):
    net = make()
    fast, plain = pair(net)
    call = inputs(net)

    def fail(*_):
        raise error

    handle = fast.net.middle[0].register_forward_hook(fail)
    with torch.no_grad():
        with pytest.raises(error):
            fast(*call)
        handle.remove()
        assert recording() is None
        assert not fast._tapes._recorded
        for _ in range(2):
            unrecorded = plain(*call)
            assert torch.equal(fast(*call), unrecorded)
    assert recorded(fast) == 1
    assert not fast._tapes._lock.locked()


def test_an_error_while_a_tape_plays(monkeypatch):
    net = make()
    fast, plain = pair(net)
    call = inputs(net)
    with torch.no_grad():
        fast(*call)
        with monkeypatch.context() as patch:
            patch.setattr(Tape, "play", lambda tape: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                fast(*call)
        assert torch.equal(fast(*call), plain(*call))


def test_not_recorded_is_no_error_of_the_callers(monkeypatch):
    net = make()
    fast, plain = pair(net)

    def refuse(*_):
        raise NotRecorded("for a test")

    monkeypatch.setattr(Tape, "_known", refuse)
    with torch.no_grad():
        assert torch.equal(fast(*inputs(net)), plain(*inputs(net)))
    assert list(fast._tapes._recorded.values()) == [None]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_have_tapes_of_their_own(duplicate):
    net = make(heads=2)
    fast = prepare(net)
    call = inputs(net)
    with torch.no_grad():
        wanted = fast(*call)
        twin = duplicate(fast)
        assert not twin._tapes._recorded
        for one in (twin, fast, twin):
            assert torch.equal(one(*call), wanted)
        mine, its = (next(iter(one._tapes._recorded.values())) for one in (fast, twin))
        assert mine.F.data_ptr() != its.F.data_ptr()


def test_only_images_in_float32_have_tapes():
    for net, given in ((make(dims=1), {}), (make(), {"dtype": torch.float64}), (make(), {"exact": True})):
        assert prepare(net, **given)._tapes is None
