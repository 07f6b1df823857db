"""The report of networks on a CPU: what is compared, counted, left out and said."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdiff.ops import dispatch

ROOT = Path(__file__).resolve().parents[1]

needs_cpp = pytest.mark.skipif(dispatch.reason("step_", "cpp") is not None, reason="needs the C++ kernels")
needs_convolutions = pytest.mark.skipif(
    importlib.util.find_spec("fastdiff.nn.convolved") is None or dispatch.reason("step_", "cpp") is not None,
    reason="needs convolutions of our own",
)


@pytest.fixture(autouse=True)
def _path(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def tiny():
    from benchmarks.models import SMALL

    unet = {"channels": 8, "mults": (1, 2), "blocks": 1, "groups": 4, "attention": (2,), "classes": 3}
    more = {"null_class": False, "scale_shift": True, "resample_blocks": True}
    return SMALL._replace(name="tiny", size=8, unet=unet | more, diffusers=None)


@pytest.fixture
def engine(monkeypatch):
    """Adds an engine of one line: what it makes of the network's own result."""
    from benchmarks import engines

    def add(name, change):
        def load(export, threads):
            return lambda *given: change(export._net(*given))

        fake = SimpleNamespace(PACKAGE="torch", FORM="", SETTINGS=f"how {name} is set", load=load)
        monkeypatch.setitem(sys.modules, f"benchmarks.engines.{name}", fake)
        monkeypatch.setitem(engines.ENGINES, name, f"benchmarks.engines.{name}")
        return f"{name} {torch.__version__}"

    return add


def result_of(row, rounds=3):
    from benchmarks import run
    from benchmarks.bench_unet import case

    return json.loads(json.dumps(run.measure(case(row), rounds, "cpu", graphs=False)))


def broken(F):
    raise MemoryError("no room\nfor this")


def test_a_row(tiny, engine, monkeypatch):
    from benchmarks import engines, run
    from benchmarks.bench_unet import Row

    good, rough = engine("good", lambda F: F * (1 + 5e-5)), engine("rough", lambda F: F * (1 + 1e-3))
    instead = engine("instead", lambda F: F.clone())
    engine("unneeded", lambda F: F.clone())
    monkeypatch.setitem(engines.INSTEAD, "instead", "rough")
    monkeypatch.setitem(engines.INSTEAD, "unneeded", "good")
    engine("wrong", lambda F: 1.1 * F)
    engine("nan", lambda F: F * float("nan"))
    engine("broken", broken)
    names = ("good", "rough", "instead", "unneeded", "wrong", "nan", "broken")
    result = result_of(Row(tiny, "tiny", 3, (), names))
    net = result["network"]
    rivals = {"plain torch eager", "plain torch eager, channels_last", good, instead}
    ours = {"ours", "ours, prepared", "ours, prepared exactly"} & set(result["median"])
    assert {"ours", "ours, prepared"} <= ours
    assert set(result["median"]) == {*ours, *rivals, rough}
    # ours is compared with what computes the same
    assert net["uncounted"] == [rough]
    assert result["best_rival"] == min(result["ratio"][name] for name in rivals)
    assert net["error"][good] == pytest.approx(5e-5, rel=0.1)
    assert net["error"][rough] == pytest.approx(1e-3, rel=0.1)
    assert max(net["error"][name] for name in ours) == result["difference"] <= 2e-5
    assert set(net["ready"]) == set(result["median"])
    assert net["weights"]["packed"] > 0
    assert (net["images"], net["threads"]) == (3, 1)
    assert result["skipped"] == {
        "wrong " + torch.__version__: "wrong: error 1.0e-01 against float64",
        "nan " + torch.__version__: "wrong: error nan against float64",
        "broken": "MemoryError: no room",
        "diffusers": "diffusers has no network like tiny; plain torch of the same weights stands for it",
    }
    text = run.lines(result, copy=1.0)
    assert "- broken: not there: MemoryError: no room" in text
    assert any(line.startswith(f"| {rough} (not counted) |") for line in text)
    assert any(line.startswith("| **ours, prepared** |") for line in text)
    from benchmarks.network_table import settings

    assert f"- {good}: how good is set" in settings([result, {"network": None}])


def test_ours_must_be_right(tiny, monkeypatch):
    from benchmarks import cpu
    from benchmarks.bench_unet import Row

    whole = cpu.own

    def off(net):
        prepared = whole(net)["ours, prepared"]

        def make():
            made = prepared()
            made.register_forward_hook(lambda module, given, F: F * (1 + 1e-4))
            return made

        return {**whole(net), "ours, prepared": make}

    monkeypatch.setattr(cpu, "own", off)
    with pytest.raises(AssertionError, match=r"'ours, prepared': 0.0001"):
        result_of(Row(tiny, "tiny", 2, (), ()))
    monkeypatch.setattr(cpu, "own", lambda net: {**whole(net), "ours, prepared": lambda: broken(net)})
    with pytest.raises(AssertionError, match="MemoryError: no room"):
        result_of(Row(tiny, "tiny", 2, (), ()))


def test_compiled_rivals_and_narrow_ones(tiny, monkeypatch):
    from benchmarks import cpu
    from benchmarks.bench_unet import Row

    asked = []

    def compiler(net, dynamic, options):
        asked.append((next(net.parameters()).dtype, options))
        assert dynamic is False
        if options is None:
            raise RuntimeError("InductorError: no compiler\nat all")
        return net

    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(cpu, "awake", lambda: None)
    monkeypatch.setattr(cpu, "has_amx", lambda: True)
    result = result_of(Row(tiny, "tiny", 2, ("default", "freezing"), ()))
    freezing = {"freezing": True}
    assert asked == [(torch.float32, None), (torch.float32, freezing), (torch.bfloat16, freezing)]
    assert result["skipped"]["plain torch torch.compile"] == "RuntimeError: InductorError: no compiler"
    narrow = {"plain torch eager, bf16", "plain torch torch.compile, freezing, bf16"}
    assert narrow == set(result["network"]["uncounted"])
    assert all(1e-4 < result["network"]["error"][name] <= cpu.NARROW for name in narrow)
    assert "plain torch torch.compile, freezing" in result["median"]


def test_the_compiler_starts_from_nothing(monkeypatch):
    import os

    from benchmarks.cpu import CACHE, cold

    for before in (None, "/somewhere"):
        monkeypatch.delenv(CACHE, raising=False)
        if before is not None:
            monkeypatch.setenv(CACHE, before)
        with cold():
            inside = Path(os.environ[CACHE])
            assert list(inside.iterdir()) == []
        assert os.environ.get(CACHE) == before
        assert not inside.exists()


def test_peaks_of_this_machine():
    from benchmarks.ceilings import peaks
    from benchmarks.cpu import limits

    product, convolution = peaks()
    # any CPU that runs torch is between
    assert 1e8 < product < 1e15
    assert 1e8 < convolution < 1e15
    assert limits().direct >= limits().matmul / 10


def test_a_case_is_made_when_its_turn_comes(monkeypatch):
    from benchmarks import bench_unet, run
    from benchmarks.case import together

    def no(*_):
        raise AssertionError("made")

    monkeypatch.setattr(bench_unet, "made", no)
    cases = list(together({"cpp": bench_unet.cases("cpu", "cpp", quick=False)}))
    titles = [case.title for case in cases]
    assert titles[:2] == ["U-Net DDPM CIFAR-10, batch 4, fp32", "U-Net DDPM CIFAR-10, batch 16, fp32"]
    assert {"U-Net ADM-like 64x64, batch 4, fp32", "U-Net 28x28 grey, batch 64, fp32"} < set(titles)
    (alone,) = [case for case in cases if case.threads == 1]
    assert alone.title == "U-Net DDPM CIFAR-10, batch 4, fp32, 1 thread"
    with pytest.raises(AssertionError, match="made"):
        run.measure(cases[0], 1, "cpu", graphs=False)
    with pytest.raises(AssertionError, match="was checked before it was made"):
        cases[0].check()


def test_a_row_with_its_own_threads(tiny):
    from benchmarks.bench_unet import Row

    torch.set_num_threads(2)
    result = result_of(Row(tiny, "tiny", 1, (), (), threads=1), rounds=1)
    assert result["network"]["threads"] == 1
    assert torch.get_num_threads() == 2
    assert result["title"].endswith(", 1 thread")


def test_what_takes_long_has_fewer_rounds(tiny):
    from benchmarks import run
    from benchmarks.case import Case

    facts = SimpleNamespace(uncounted=(), _asdict=dict)
    slow = Case("slow", "a", {"a": lambda: time.sleep(0.01)}, lambda: None, network=facts)
    for seconds, rounds in ((None, 9), (1e-3, 5), (0.08, 7), (10.0, 9)):
        found = run.measure(slow._replace(seconds=seconds), 9, "cpu", graphs=False)
        assert abs(len(found["seconds"]["a"]) - rounds) <= (1 if rounds == 7 else 0)
    assert len(run.measure(slow._replace(seconds=1e-3), 2, "cpu", graphs=False)["seconds"]["a"]) == 2


def test_models_of_the_rows():
    from benchmarks.models import ADM_SMALL, FASHION, count, pair, shape

    assert shape(FASHION, 5) == (5, 1, 28, 28)
    assert shape(ADM_SMALL, 2) == (2, 3, 64, 64)
    for model, millions, gflop in ((FASHION, 6.470, 2.397), (ADM_SMALL, 72.61, 56.14)):
        parameters, flop = count(model)
        assert parameters / 1e6 == pytest.approx(millions, rel=1e-3)
        assert flop / 1e9 == pytest.approx(gflop, rel=1e-3)
    made = pair(FASHION, "cpu")
    assert made.missing is None
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([3, 700])
    with torch.no_grad():
        wanted = made.theirs(x, t)
        assert (made.ours(x, t) - wanted).norm() <= 1e-5 * wanted.norm()


def test_the_table_of_a_row():
    from benchmarks.network_table import lines

    result = {
        "title": "a net", "ours": "ours, prepared", "also": ["ours"], "best_rival": 2.0, "skipped": {},
        "median": {"ours": 0.3, "ours, prepared": 0.1, "x": 0.2, "y": 0.15},
        "ratio": {"ours": 3.0, "x": 2.0, "y": 1.5}, "seconds": {"ours": [1, 2, 3]},
        "network": {
            "images": 4, "flop": 40e9, "threads": 2, "limits": {"matmul": 320e9, "direct": 250e9},
            "error": dict.fromkeys(("ours", "ours, prepared", "x", "y"), 3e-6), "uncounted": ["y"],
            "ready": {"ours": 0.0, "ours, prepared": 0.4, "x": 12.34, "y": 1.0}, "settings": {},
            "weights": {"network": 100e6, "packed": 110e6},
        },
    }  # fmt: skip
    text = lines(result)
    for line in (
        "| **ours, prepared** | 100.0 | 25.0 | 400 | 125 % | 160 % | 3.0e-06 | 0.4 s |  |",
        "| x | 200.0 | 50.0 | 200 | 62 % | 80 % | 3.0e-06 | 12.3 s | 2.00x |",
        "| y (not counted) | 150.0 | 37.5 | 267 | 83 % | 107 % | 3.0e-06 | 1.0 s | 1.50x |",
        "ours, prepared against the fastest rival, x: **2.00x**.",
        "10.00 GFLOP an image; 2 threads: matrix product 320 GFLOP/s, direct convolution 250 GFLOP/s, so its floor is "
        "40.0 ms an image.",
        "Packed weights 110 MB, 1.10 times the network's.",
        "3 rounds.",
    ):
        assert line in text
    # the fastest first
    assert [line.split("|")[1].strip(" *") for line in text[4:8]] == ["ours, prepared", "y (not counted)", "x", "ours"]


def test_notes_are_picked_by_their_titles(tmp_path, monkeypatch):
    from benchmarks import run

    args = [
        "unet",
        "--quick",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--only",
        "DDIM steps, digits",
        "--out",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", ["run.py", *args])
    assert run.main() == 0
    record = json.loads((tmp_path / "unet.json").read_text())
    assert record["cases"] == []
    ((title, moved),) = record["notes"].items()
    assert title == "Effect: 50 DDIM steps, digits"
    assert 0 < moved["ours"] <= 0.1
    assert 0 < moved["ours, prepared"] <= 0.1
    assert "from the same loop around the network in float64: ours " in (tmp_path / "unet.md").read_text()


@needs_convolutions
def test_the_worst_layer(tiny, monkeypatch):
    from benchmarks import effect
    from benchmarks.cpu import Given
    from benchmarks.models import pair
    from benchmarks.watch import replaced

    given = Given.of(tiny, pair(tiny, "cpu"), 2)
    found = effect.layers(given)
    # stem, out; two convolutions and maybe a shortcut a block, two a layer of attention
    assert len(found) >= 20
    assert 0 < max(found.values()) <= 2e-5

    def off(f):
        def run(x, packed, bias, **options):
            y, moments = f(x, packed, bias, **options)
            # in its own memory, as a tape wants it
            return (y.mul_(1 + 1e-3) if packed[1] == 3 else y), moments

        return run

    with replaced(*effect.OP, off):
        wrong = effect.layers(given)
    (name,) = [name for name, error in wrong.items() if error > 5e-4]
    assert name.endswith("3x3 to (3, 8, 8)")
    (line, *_) = effect.worst_lines({"layers": wrong})
    assert f"the worst is {name}" in line


def test_watching_ends(monkeypatch):
    from benchmarks import watch

    before = json.dumps
    with watch.replaced("json", "dumps", lambda f: lambda v: f(v) + "!"):
        assert json.dumps(1) == "1!"
    assert json.dumps is before
    with pytest.raises(AttributeError), watch.replaced("json", "no_such_function", str):
        pass
    assert json.dumps is before


def test_memory_of_a_process_of_its_own(monkeypatch):
    from benchmarks import memory
    from benchmarks.process import command

    found = command("memory.py", "eager", "--model", "28x28 grey", "--batch", 4, "--threads", 1)
    assert found["weights"] == 4 * 6_469_889
    assert found["peak"] >= found["held"] > 0.5 * found["weights"]
    assert found["peak"] <= 20 * found["weights"]

    def one(script, what, *args):
        if what == "MNN":
            raise RuntimeError("no MNN here")
        return {"weights": 100e6, "held": 150e6, "peak": 180e6}

    monkeypatch.setattr(memory, "command", one)
    text = memory.lines(memory.table("DDPM-CIFAR10", 4))
    assert "| MNN | not there: no MNN here | | |" in text
    assert "| ncnn | 180 | 80 | 150 |" in text


@needs_cpp
@pytest.mark.slow
def test_a_row_that_is_held_to_avx2():
    from benchmarks import forced
    from benchmarks.process import command

    if "avx2" not in torch.backends.cpu.get_cpu_capability().lower() and "AVX512" not in (
        torch.backends.cpu.get_cpu_capability()
    ):
        pytest.skip("this CPU has no AVX2")
    args = ("--model", "small 32x32", "--batch", 1, "--rounds", 1, "--threads", 1, "--eager")
    record = command("forced.py", *args, variables=forced.AVX2)
    assert record["capability"] == "AVX2"
    assert record["difference"] <= 2e-5
    text = forced.lines(record)
    assert "FASTDIFF_ISA=v3" in text[-2]
    assert any(line.startswith("| **ours, prepared** |") for line in text)
    with pytest.raises(RuntimeError, match="KeyError: 'no such model'"):
        command("forced.py", "--model", "no such model", "--eager")


def test_whole_loops(engine, monkeypatch):
    from benchmarks import end_to_end
    from benchmarks.models import SMALL

    good = engine("good", lambda F: F.clone())
    engine("wrong", lambda F: F + 1.0)
    engine("broken", broken)
    record = end_to_end.measure(SMALL, images=2, steps=3, rounds=2, others=("good", "wrong", "broken"), modes=())
    assert set(record["median"]) == {"ours, prepared", "diffusers eager, channels_last", good}
    assert record["skipped"]["broken"] == "MemoryError: no room"
    assert record["skipped"]["wrong " + torch.__version__].startswith("wrong: images differ by ")
    assert 0 < record["outside"] < 1
    assert all(len(seconds) == 2 for seconds in record["seconds"].values())
    text = end_to_end.lines(record)
    assert "| broken | not there: MemoryError: no room | | |" in text
    assert f"Against the fastest: {min(record['ratio'].values()):.2f}x." in text[-2]


def test_kinds_of_operations():
    from benchmarks import where

    for name, shapes, kind in (
        ("aten::mkldnn_convolution", [[4, 8, 32, 32], [8, 8, 3, 3]], where.CONV3),
        ("aten::mkldnn_convolution", [[4, 8, 32, 32], [16, 8, 1, 1]], where.CONV1),
        ("aten::addmm", [], where.CONV1),
        ("aten::mm", [], where.CONV1),
        ("aten::add", [], where.SUMS),
        ("aten::add_", [], where.SUMS),
        ("aten::cat", [], where.SUMS),
        ("aten::native_group_norm", [], where.NORM),
        ("aten::silu", [], where.SILU),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", [], where.ATTENTION),
        ("aten::copy_", [], where.COPIES),
        ("aten::upsample_nearest2d", [], where.COPIES),
        ("aten::sin", [], where.REST),
    ):
        assert where.of_aten(name, shapes) == kind


# the profiler's own
@pytest.mark.filterwarnings("ignore")
def test_where_the_time_of_an_eager_network_goes():
    from benchmarks import where
    from benchmarks.cpu import Given, torch_rivals
    from benchmarks.models import SMALL, pair

    with torch.no_grad():
        run = torch_rivals(Given.of(SMALL, pair(SMALL, "cpu"), 2), ())["diffusers eager"]()
        parts = where.eager(run, calls=2)
    assert list(parts) == list(where.KINDS)
    assert all(
        parts[kind] > 0 for kind in (where.CONV3, where.CONV1, where.NORM, where.SILU, where.SUMS, where.ATTENTION)
    )
    assert parts[where.CONV3] == max(parts.values())


def test_where_the_time_of_a_tape_goes():
    from benchmarks import where

    played = []

    def beside(name):
        def f():
            played.append(name)

        f.args = (SimpleNamespace(__qualname__=name),)
        return f

    calls = SimpleNamespace(play=lambda first, end, threads: played.append((first, end, threads)))
    steps = [(0, 2), beside("scaled_dot_product_attention"), (2, 3), beside("other")]
    tape = SimpleNamespace(_steps=steps, _calls=calls)
    net = SimpleNamespace(_tapes=SimpleNamespace(_recorded={"shape": SimpleNamespace(tape=tape)}))
    kinds = []
    for kind, play in where.kernels(net, ["a", "b", "c"]):
        kinds.append(kind)
        play()
    assert kinds == ["a", "b", where.ATTENTION, "c", where.REST]
    assert played == [(0, 1, 1), (1, 2, 1), "scaled_dot_product_attention", (2, 3, 1), "other"]


@needs_convolutions
@pytest.mark.filterwarnings("ignore")
def test_both_and_their_table_and_chart(tmp_path):
    from benchmarks import where

    found = where.measure("28x28 grey", 1)
    ours = found["ours, prepared"]
    assert ours[where.CONV3] > 0
    assert ours[where.CONV1] > 0
    assert ours[where.ATTENTION] > 0
    assert ours[where.NORM] == ours[where.SILU] == ours[where.SUMS] == 0
    text = where.table(found)
    assert "| 3x3 convolutions |" in text


def test_a_chart(tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import where

    found = {"eager": dict.fromkeys(where.KINDS, 2e-3), "ours": {**dict.fromkeys(where.KINDS, 0.0), where.CONV3: 4e-3}}
    for name in ("a.svg", "b.svg"):
        where.chart(found, tmp_path / name, "a title")
    svg = (tmp_path / "a.svg").read_text()
    # the same figures, the same picture
    assert svg == (tmp_path / "b.svg").read_text()
    assert "<svg" in svg
    assert where.table(found).splitlines()[2] == "| 3x3 convolutions | 2.0 (12 %) | 4.0 (100 %) |"
    assert where.table(found).splitlines()[-1] == "| **all** | **16.0** | **4.0** |"


def test_seconds_that_are_seen_and_the_rest():
    from collections import Counter

    from benchmarks import where

    parts = where._with_rest(Counter({where.CONV3: 3.0, where.REST: 1.0}), 6.0)
    assert (parts[where.CONV3], parts[where.REST], sum(parts.values())) == (3.0, 3.0, 6.0)
    parts = where._with_rest(Counter({where.CONV3: 3.0, where.SILU: 1.0}), 2.0)
    assert (parts[where.CONV3], parts[where.SILU], sum(parts.values())) == (1.5, 0.5, 2.0)
