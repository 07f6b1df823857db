"""Tapes: memory is used again when it is dead and not before, and what was recorded is played to the bits."""

import gc
import itertools
import random
import threading
import weakref

import pytest
import torch
from torch.nn import functional

from fastdiff.ops import attention, native, pack, pack_linear
from fastdiff.ops.attention import attended
from fastdiff.ops.norm_linear import projected
from fastdiff.ops.norm_silu_conv import convolved
from fastdiff.ops.tape import CHUNK, LINE, Arena, NotRecorded, Tape, beside, recording, recording_on

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(native.missing() is not None, reason="no compiled kernels here"),
]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def free(arena):
    return sum(end - first for first, end in arena._free)


def spoil(arena):
    """All of it NaN."""
    for chunk in arena._chunks:
        chunk[: len(chunk) // 8 * 8].view(torch.float64).fill_(torch.nan)


# memory --------------------------------------------------------------------------------------------------------------


def test_tensors_lie_apart_on_lines_and_are_given_back():
    arena, rng, kept = Arena(), random.Random(0), []
    for i in range(400):
        if kept and rng.random() < 0.45:
            x, number = kept.pop(rng.randrange(len(kept)))
            # nobody else has written to it
            assert (x == number).all()
            del x
            continue
        dtype = rng.choice([torch.float32, torch.float64, torch.uint8])
        x = arena.empty(tuple(rng.randrange(1, 60) for _ in range(rng.randrange(4))), dtype)
        assert x.dtype is dtype
        assert x.is_contiguous()
        assert x.data_ptr() % LINE == 0
        assert arena.holds(x)
        kept.append((x.fill_(i % 250), i % 250))
    assert all((x == number).all() for x, number in kept)
    kept.clear()
    del x
    # one span again
    assert len(arena._free) == len(arena._chunks) == 1
    assert free(arena) == CHUNK


def test_memory_is_kept_while_a_view_is_left():
    arena = Arena()
    x = arena.empty((4, 8), torch.float32)
    address, views = x.data_ptr(), [x.permute(1, 0)[2:], x.view(2, 16), x.detach()]
    del x
    while views:
        assert arena.empty((4, 8), torch.float32).data_ptr() != address
        views.pop(0)
    assert arena.empty((4, 8), torch.float32).data_ptr() == address


def test_a_view_of_the_arenas_own_keeps_nothing():
    arena = Arena()
    x = arena.empty((3, 4), torch.float64).copy_(drawn(3, 4))
    view = arena.view(x.t()[1:])
    assert torch.equal(view, x.t()[1:])
    assert (view.data_ptr(), view.stride()) == (x.t()[1:].data_ptr(), x.t()[1:].stride())
    address = x.data_ptr()
    del x
    assert arena.empty((3, 4), torch.float64).data_ptr() == address


def test_more_than_a_chunk():
    arena = Arena()
    small, large = arena.empty((3,), torch.float32), arena.empty((CHUNK // 4 + 5,), torch.float32)
    assert len(arena._chunks) == 2
    assert arena.nbytes >= CHUNK + large.nbytes
    assert arena.holds(small)
    assert arena.holds(large[-1:])
    assert not arena.holds(drawn(3))
    assert not Arena().holds(small)
    large[-1] = 3
    assert arena.view(large)[-1] == 3
    # the smallest hole that is large enough
    del large
    assert arena.empty((CHUNK // 4 + 5,), torch.float32).nbytes > CHUNK
    assert len(arena._chunks) == 2


def test_memory_goes_with_the_last_tensor():
    arena = Arena()
    x, there = arena.empty((8,), torch.float32), weakref.ref(arena)
    chunk = weakref.ref(arena._chunks[0])
    del arena
    x.fill_(1.0)
    del x
    assert there() is None
    assert chunk() is None


def test_memory_is_the_cpus_wherever_new_tensors_would_lie():
    with torch.device("meta"):
        x = Arena().empty((2, 3), torch.float32)
    assert x.device.type == "cpu"


# what is played ------------------------------------------------------------------------------------------------------

WEIGHTS = {
    "3x3": pack(drawn(16, 16, 3, 3, seed=1) / 12),
    "1x1": pack(drawn(16, 16, 1, 1, seed=2) / 4),
    "qkv": pack(drawn(48, 16, 1, 1, seed=3) / 4),
    "two": pack(drawn(16, 32, 3, 3, seed=4) / 17),
}
BIAS = drawn(16, seed=5)
BLOCK = {"qkv": (48, 16), "out": (16, 16), "kv": (32, 24), "q": (16, 16), "down": (16, 32)}


def network(x, line):
    """A few of everything, whose results die at several times."""
    scale, shift = line.chunk(2, -1)
    x, moments = convolved(x, WEIGHTS["3x3"], BIAS, measure=True)
    h, its = convolved(x, WEIGHTS["3x3"], BIAS, groups=4, moments=moments, add=scale, measure=True)
    h, _ = convolved(h, WEIGHTS["3x3"], None, groups=4, moments=its, scale=scale, shift=shift, residual=x)
    half, _ = convolved(h, WEIGHTS["3x3"], BIAS, stride=2)
    qkv, _ = convolved(half, WEIGHTS["qkv"], None, groups=2)
    n, _, height, width = half.shape
    a = attention(qkv.permute(0, 2, 3, 1).flatten(1, 2), 2).view(n, height, width, 16).permute(0, 3, 1, 2)
    half, _ = convolved(a, WEIGHTS["1x1"], BIAS, residual=half)
    half = beside(lambda z: z / 3, half)
    pooled = beside(lambda z: functional.avg_pool2d(z, 2), h)
    up, its = convolved(half, WEIGHTS["3x3"], None, upsample=True, measure=True)
    pooled = beside(lambda z: functional.interpolate(z, scale_factor=2.0), pooled)
    h, _ = convolved(up, WEIGHTS["two"], BIAS, x2=h, groups=8, moments=its)
    return convolved(h, WEIGHTS["1x1"], None, residual=pooled)[0]


def inputs(shape=(2, 8, 12), lines=2, seed=0):
    n, height, width = shape
    return drawn(n, 16, height, width, seed=seed).contiguous(memory_format=torch.channels_last), drawn(
        lines, 32, seed=seed + 50
    )


def record(x, line):
    tape = Tape()
    n, channels, height, width = x.shape
    held = tape.empty((n, height, width, channels), x.dtype).permute(0, 3, 1, 2).copy_(x)
    kept = tape.empty(tuple(line.shape), line.dtype).copy_(line)
    with recording_on(tape):
        return tape, held, kept, network(held, kept)


def test_a_tape_replays_to_the_bits_of_the_call():
    for shape, lines in (((2, 8, 12), 2), ((1, 4, 4), 1), ((3, 6, 10), 3)):
        tape, x, line, y = record(*inputs(shape, lines))
        assert torch.equal(y, network(*inputs(shape, lines)))
        for seed in range(1, 6):
            new = inputs(shape, lines, seed)
            spoil(tape.arena)
            x.copy_(new[0])
            line.copy_(new[1])
            torch.set_num_threads(1 + seed % 3)
            tape.play()
            torch.set_num_threads(1)
            assert torch.equal(y, network(*new)), seed


def test_memory_is_used_again():
    tape, x, _, y = record(*inputs((2, 32, 32)))
    spoil(tape.arena)
    x.copy_(inputs((2, 32, 32))[0])
    # x, the line and y are left, and what was never written lies behind all that was: seven maps of a dozen and more
    assert CHUNK - free(tape.arena) <= x.nbytes + y.nbytes + 8 * LINE
    chunk = tape.arena._chunks[0][: CHUNK // 8 * 8].view(torch.float64)
    tape._calls.play(0, 1, 1)
    tape.play()
    assert int((~chunk.isnan()).nonzero().max()) * 8 <= 7 * x.nbytes


def test_kernels_of_one_region_wait_for_each_other():
    """What a thread reads, another one may have written a kernel before."""
    torch.set_num_threads(4)
    layers = [pack(drawn(96, 32, 1, 1, seed=seed)) for seed in range(12)]

    def through(y):
        for layer in layers:
            qkv = convolved(y, layer, None)[0].permute(0, 2, 3, 1).flatten(1, 2)
            y = attention(qkv, 2).view(1, 5, 6, 32).permute(0, 3, 1, 2)
        return y

    tape = Tape()
    x = tape.empty((1, 5, 6, 32), torch.float32).permute(0, 3, 1, 2)
    x.copy_(drawn(1, 32, 5, 6))
    with recording_on(tape):
        y = through(x)
    for seed in range(100):
        given = drawn(1, 32, 5, 6, seed=seed).contiguous(memory_format=torch.channels_last)
        x.copy_(given)
        tape.play()
        assert torch.equal(y, through(given)), seed


def test_a_tape_has_no_kernels_behind_its_end():
    with pytest.raises(IndexError, match="no such kernels"):
        native.cpu.Tape().play(0, 1, 1)


def test_kernels_side_by_side_are_one_step():
    tape, *_ = record(*inputs())
    kinds = [isinstance(step, tuple) for step in tape._steps]
    assert all(not (a and b) for a, b in itertools.pairwise(kinds))
    ends = [step for step in tape._steps if isinstance(step, tuple)]
    assert ends[0][0] == 0
    assert all(a[1] == b[0] for a, b in itertools.pairwise(ends))


def test_a_block_of_a_transformer():
    """Both attentions and the gate, each behind its norm, as one step."""
    packed = {
        **{name: pack_linear(drawn(*shape, seed=i) / 4) for i, (name, shape) in enumerate(BLOCK.items())},
        "gate": pack_linear(drawn(64, 16, seed=8) / 4, gate=True),
    }
    weight, bias = drawn(16, seed=9), drawn(16, seed=10)
    normed = {"norm": True, "norm_weight": weight, "norm_bias": bias}

    def through(x, text):
        q, k, v = projected(x, packed["qkv"], None, **normed).chunk(3, 2)
        x = projected(attended(q, k, v, 2)[0], packed["out"], bias, residual=x)
        k, v = projected(text, packed["kv"], None).chunk(2, 2)
        x = projected(attended(projected(x, packed["q"], None, **normed), k, v, 2)[0], packed["out"], bias, residual=x)
        return projected(projected(x, packed["gate"], None, **normed), packed["down"], bias, residual=x)

    tape = Tape()
    x, text = tape.empty((2, 70, 16), torch.float32), tape.empty((2, 5, 24), torch.float32)
    x.copy_(drawn(2, 70, 16))
    text.copy_(drawn(2, 5, 24))
    with recording_on(tape):
        y = through(x, text)
    assert tape._steps == [(0, 9)]
    for seed in (1, 2, 3):
        given = drawn(2, 70, 16, seed=seed), drawn(2, 5, 24, seed=seed)
        spoil(tape.arena)
        x.copy_(given[0])
        text.copy_(given[1])
        torch.set_num_threads(seed)
        tape.play()
        torch.set_num_threads(1)
        assert torch.equal(y, through(*given))


def test_attention_to_other_tokens():
    """Those of a text, which is copied in front as x is."""
    tape, packed = Tape(), pack(drawn(32, 16, 1, 1, seed=7) / 4)
    x, text = tape.empty((2, 9, 16), torch.float32), tape.empty((2, 16, 1, 5), torch.float32)

    def through(x, text):
        k, v = convolved(text, packed, None)[0].permute(0, 2, 3, 1).flatten(1, 2).chunk(2, 2)
        return attended(x, k, v, 2, x)[0]

    x.copy_(drawn(2, 9, 16))
    text = text.view(2, 1, 5, 16).permute(0, 3, 1, 2).copy_(drawn(2, 16, 1, 5))
    with recording_on(tape):
        y = through(x, text)
    for seed in (1, 2):
        given = drawn(2, 9, 16, seed=seed), drawn(2, 16, 1, 5, seed=seed)
        spoil(tape.arena)
        x.copy_(given[0])
        text.copy_(given[1])
        tape.play()
        assert torch.equal(y, through(*given))


@pytest.mark.parametrize("read", ["conv", "x2", "residual", "add", "scale", "moments", "attention", "linear", "beside"])
def test_what_was_not_recorded_cannot_be_read(read):
    tape = Tape()
    x = tape.empty((1, 4, 4, 16), torch.float32).fill_(1.0).permute(0, 3, 1, 2)
    outside = drawn(1, 16, 4, 4)
    calls = {
        "conv": lambda: convolved(outside, WEIGHTS["1x1"], None),
        "x2": lambda: convolved(x, WEIGHTS["two"], None, x2=outside),
        "residual": lambda: convolved(x, WEIGHTS["1x1"], None, residual=outside),
        "add": lambda: convolved(x, WEIGHTS["1x1"], None, add=drawn(16)),
        "scale": lambda: convolved(x, WEIGHTS["1x1"], None, groups=2, scale=drawn(1, 16)),
        "moments": lambda: convolved(x, WEIGHTS["1x1"], None, groups=2, moments=torch.ones(1, 16, 2).double()),
        "attention": lambda: attention(drawn(1, 16, 12), 2),
        "linear": lambda: projected(drawn(1, 16, 12), pack_linear(drawn(4, 12)), None),
        "beside": lambda: beside(torch.sin, outside),
    }
    with pytest.raises(NotRecorded, match="outside of the tape"), recording_on(tape):
        calls[read]()
    assert recording() is None


def test_what_torch_made_between_cannot_be_read():
    """As an op of torch's that nobody has told the tape of: its result lies elsewhere."""
    tape = Tape()
    x = tape.empty((1, 4, 4, 16), torch.float32).fill_(1.0).permute(0, 3, 1, 2)
    with pytest.raises(NotRecorded), recording_on(tape):
        convolved(2 * x, WEIGHTS["1x1"], None)


def test_nothing_is_recorded_behind_an_error():
    tape = Tape()
    with recording_on(tape):
        assert recording() is tape
    with pytest.raises(ZeroDivisionError), recording_on(tape):
        beside(lambda x: 1 / 0, tape.empty((3,), torch.float32))
    assert recording() is None
    assert torch.equal(beside(torch.neg, drawn(3)), -drawn(3))


def test_each_thread_records_for_itself():
    tape, seen = Tape(), []

    def other():
        seen.append(recording())
        seen.append(convolved(drawn(1, 16, 4, 4), WEIGHTS["1x1"], None)[0])

    with recording_on(tape):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert recording() is tape
    assert seen[0] is None
    assert torch.equal(seen[1], convolved(drawn(1, 16, 4, 4), WEIGHTS["1x1"], None)[0])


@pytest.mark.parametrize(
    ("f", "shape"),
    [
        (lambda z: z / 3, (2, 5, 4, 6)),
        (lambda z: functional.avg_pool2d(z, 2), (2, 5, 4, 6)),
        (lambda z: functional.avg_pool2d(z, 2), (2, 1, 2, 2)),
        (lambda z: functional.interpolate(z, scale_factor=2.0), (1, 3, 1, 2)),
        (lambda z: z.double().mean((2, 3)), (2, 5, 4, 6)),
        (lambda z: z, (2, 5, 4, 6)),
        (lambda z: z[:, 1:3], (2, 5, 4, 6)),
        (lambda z: z.mT, (2, 5, 4, 6)),
        (lambda z: (z > 0).sum(), (2, 5, 4, 6)),
    ],
)
def test_what_runs_beside_the_kernels(f, shape):
    tape = Tape()
    n, channels, height, width = shape
    x = tape.empty((n, height, width, channels), torch.float32).permute(0, 3, 1, 2).copy_(drawn(*shape))
    with recording_on(tape):
        y = beside(f, x)
    for seed in (1, 2):
        wanted = f(drawn(*shape, seed=seed).contiguous(memory_format=torch.channels_last))
        spoil(tape.arena)
        x.copy_(drawn(*shape, seed=seed))
        tape.play()
        assert torch.equal(y, wanted)
        assert y.dtype is wanted.dtype
        for form in (torch.contiguous_format, torch.channels_last) if y.ndim == 4 else ():
            assert y.is_contiguous(memory_format=form) or not wanted.is_contiguous(memory_format=form)


def test_a_tape_leaves_nothing_behind():
    made = record(*inputs())
    there = weakref.ref(made[0].arena)
    made[0].play()
    del made
    gc.collect()
    assert there() is None
