"""The report of networks and loops: its networks, what it plans, computes and says."""

from pathlib import Path

import pytest
import torch

import fastdiff as fd

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _path(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(ROOT))


def test_the_models_are_the_published_ones():
    from benchmarks.models import ADM, DDPM, EDM, SD15, SDXL, count

    for model, apart in ((DDPM, 1e-3), (EDM, 0.05), (ADM, 1e-3), (SD15, 2e-3), (SDXL, 1e-3)):
        parameters, flop = count(model)
        assert parameters / 1e6 == pytest.approx(model.millions, rel=apart)
        assert model.gflop is None or flop / 1e9 == pytest.approx(model.gflop, rel=apart)
    # attention in more blocks of the way up and a wider stem: larger, and the report says what it counts
    assert count(EDM)[0] == 57_117_955


@pytest.mark.parametrize("name", ["DDPM-CIFAR10", "EDM-CIFAR-like", "ADM-64"])
def test_the_plain_rival_is_the_same_network(name):
    from benchmarks.models import MODELS, build, condition
    from benchmarks.plain import PlainUNet

    model = MODELS[name]
    fewer = {"channels": 32, "mults": model.unet["mults"][:2], "blocks": 1, "attention": (2,)}
    model = model._replace(unet=model.unet | fewer)
    net = build(model)
    theirs = PlainUNet(net)
    assert not [m for m in theirs.modules() if isinstance(m, fd.nn.GroupNorm)]
    x, t, cond = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999]), condition(model, 3)
    with torch.no_grad():
        ours, plain = net(x, t, cond), theirs(x, t, cond)
        assert (plain - ours).norm() <= 1e-5 * ours.norm()
        # every norm is in it: a small change of one is seen
        for norm in (theirs.norm, theirs.down[0].res.norm2, theirs.up[-1].res.norm1, theirs.middle[0].attention.norm):
            norm.weight[1] += 0.5
            assert (theirs(x, t, cond) - plain).norm() > 1e-4 * ours.norm()
            norm.weight[1] -= 0.5


def test_ceilings_of_a_device():
    from benchmarks.ceilings import COPY, H100, MATMUL, Speed, ceilings
    from benchmarks.models import DDPM, SMALL

    flop = 1e9 * DDPM.gflop
    assert ceilings(DDPM, flop, Speed("NVIDIA H100 80GB HBM3", 1.0, 1.0)) == H100["DDPM-CIFAR10"]
    assert ceilings(DDPM, 2 * flop, Speed("NVIDIA H100", 1.0, 1.0))[0] == H100["DDPM-CIFAR10"][0] / 2
    # another device of the same speed has the same, one twice as fast has twice as much
    for factor in (1, 2):
        got = ceilings(DDPM, flop, Speed("another", factor * MATMUL, factor * COPY))
        assert got == pytest.approx([factor * rate for rate in H100["DDPM-CIFAR10"]], rel=2e-3)
    assert ceilings(SMALL, 1e9, Speed("H100", 5e12, 1.0)) == (5e3,)


@pytest.mark.parametrize("section", ["unet", "sampler"])
def test_the_plan(section):
    from benchmarks.budget import BATCHES, Row, plan
    from benchmarks.variants import MODES

    full, smoke = (plan(section, smoke=smoke) for smoke in (False, True))
    for made in (full, smoke):
        assert [item.title for item in made[:2]] == ["DDPM-CIFAR10, batch 256", "DDPM-CIFAR10, batch 1"]
        assert len({item.title for item in made}) == len(made)
    models = ("DDPM-CIFAR10", "EDM-CIFAR-like", "ADM-64")
    assert {f"{model}, batch {batch}" for model in models for batch in BATCHES} <= {item.title for item in full}
    assert set(MODES) < set(full[0].compiled)
    assert {item.model.name for item in smoke} == set(models)
    assert not any("max-autotune" in mode for item in smoke if isinstance(item, Row) for mode in item.compiled)


def test_a_budget_learns_what_things_take():
    from benchmarks.budget import GUESS, RESERVE, Budget, Spent, expected

    assert expected("compile", 2.0, []) == 2 * GUESS["compile"]
    spent = [Spent("compile", 1.0, 30.0), Spent("compile", 1.0, 10.0), Spent("row", 2.0, 7.0)]
    assert expected("compile", 1.0, spent) == 10.0
    assert expected("compile", 2.5, spent) == 25.0
    assert expected("row", 1.0, spent) == 3.5
    now = [100.0]
    budget = Budget(60.0, lambda: now[0])
    assert budget.fits("compile", 1.0, also=60 - GUESS["compile"] - RESERVE)
    assert not budget.fits("compile", 1.0, also=61 - GUESS["compile"] - RESERVE)
    with budget.spending("compile", 1.0):
        now[0] += 50.0
    assert budget.left == 10.0
    assert not budget.fits("compile", 1.0)
    assert budget.fits("plain", 1.0)
    with pytest.raises(KeyError), budget.spending("plain", 1.0):
        raise KeyError
    assert [s.kind for s in budget.spent] == ["compile"]


def test_time_is_kept_for_rows_that_must_be_there():
    from benchmarks.budget import GUESS, Cold, Row, Spent, kept, plan

    items = plan("sampler", smoke=False)
    must = [item.title for item in items if isinstance(item, Row) and item.must]
    assert must == [f"DDPM-CIFAR10, batch {batch}" for batch in (4, 16, 64, 512)]
    row = GUESS["row"] + 8 * GUESS["plain"] + 7
    assert kept(items[2:], 7, []) == pytest.approx(4 * row)
    assert kept(items[5:], 7, [Spent("row", 1.0, 100.0)]) == pytest.approx(row + 100 - GUESS["row"])
    assert kept([Cold(items[0].model, "ours"), *items[6:]], 7, []) == 0


def test_what_is_made_ready_first():
    from benchmarks.rows import SECTIONS, rank
    from benchmarks.variants import MODES, OURS

    names = [v.name for v in sorted(SECTIONS["sampler"].variants("x", ["cpp"], (*MODES, OURS)), key=rank)]
    nets = ("fd.UNet", "prepared")
    assert names == [
        *(f"{net} (cpp), {way}" for net in nets for way in ("fd.graph", "fd.graph(unroll=4)", "fd.eager")),
        *(f"x, {way}" for way in ("eager, NCHW", "eager, channels_last", "channels_last, CUDA graph")),
        "x, torch.compile reduce-overhead",
        "x, torch.compile max-autotune",
        *(f"{net} (cpp), {way}" for net in nets for way in ("fd.compiled", "fd.graph(step=fd.compiled)")),
        "x, torch.compile",
        "x, torch.compile reduce-overhead, loop reindexing",
    ]


def a_record(title="DDPM-CIFAR10, batch 256", median=0.01):
    variant = {"ours": True, "median": median, "image_steps": 23000.0, "flops": 286e12, "faster": 1.5, "error": 1e-3,
               "prepare_seconds": 4.0, "graph_bytes": 1 << 30, "call_bytes": 1 << 20, "bytes": 3 << 30,
               "seconds": [median] * 9}  # fmt: skip
    rival = {**variant, "ours": False, "median": 0.015, "faster": 1.0, "image_steps": 11500.0}
    row = {"title": title, "dtype": "bfloat16", "parameters": 35_746_307, "flop": 12.44e9, "against": "theirs",
           "ceilings": [64.1e3, 46e3, 41.7e3, 29.8e3], "variants": {"theirs": rival, "ours": variant},
           "kernels": {"ours": 171.0}, "outside": {"prepared": {"share": 0.021}},
           "absent": {"b": "left out: time"}}  # fmt: skip
    return {"section": "sampler", "what": "A step.", "machine": {"device": "NVIDIA H100", "commit": "abc", "date": "1"},
            "smoke": False, "budget_seconds": 540.0, "seconds": 500.0, "copy_bytes_per_second": 3e12,
            "matmul_flops": 798e12, "rows": [row], "left_out": {"ADM-64, batch 1": "left out: time"},
            "cold": {"cold start, ours": {"imported": 2.0, "network": 3.0, "first image": 9.0, "second image": 9.25},
                     "cold start, theirs": "no image after 60 seconds"}}  # fmt: skip


def test_the_markdown_of_a_record():
    from benchmarks import markdown

    text = markdown.text(a_record())
    for line in (
        "device NVIDIA H100, commit abc, date 1",
        "Copy bandwidth (read + write) 3000 GB/s, matrix product 798.0 TFLOP/s. Not compared with TensorRT.",
        "| **ours** | 10.000 | 23000 | 1.50x | 286.00 | 50.0 % | 171 | 1024 | 1 | 3072 | 4.0 s |",
        "| theirs | 15.000 | 11500 | 1.00x | 286.00 | 25.0 % |  | 1024 | 1 | 3072 | 4.0 s |",
        "| DDPM-CIFAR10, batch 256 | ours | 10.000 | 23000 | 50.0 % | theirs, 15.000 ms | 1.50x |",
        "Ceilings in image-steps/s: matmul only 64100, norms in one pass 46000, norms in two passes 41700, "
        "unfused 29800.",
        "Outside the network, prepared, both captured: 2.1 %.",
        "- b: not there: left out: time",
        "9 rounds; faster: than theirs; largest error against a wider dtype 1.0e-03.",
        "- cold start, ours: **9.0 s** (imported after 2.0 s, network after 3.0 s); the next image takes 0.25 s",
        "- cold start, theirs: not there: no image after 60 seconds",
        "- ADM-64, batch 1: left out: time",
    ):
        assert line in text.splitlines()


def test_reports_of_one_commit_are_put_together():
    from benchmarks.markdown import merged

    old, new = a_record(), a_record("ADM-64, batch 1", 0.5)
    new["machine"] = {**new["machine"], "date": "2"}
    new["cold"] = {"cold start, ours": "left out: time"}
    both = merged(old, new)
    assert [row["title"] for row in both["rows"]] == ["DDPM-CIFAR10, batch 256", "ADM-64, batch 1"]
    assert both["left_out"] == {}
    assert both["cold"] == old["cold"]
    again = merged(both, a_record(median=0.02))
    assert [row["title"] for row in again["rows"]] == ["DDPM-CIFAR10, batch 256", "ADM-64, batch 1"]
    assert again["rows"][0]["variants"]["ours"]["median"] == 0.02
    for key in ("commit", "device"):
        other = {**new, "machine": {**new["machine"], key: "another"}}
        assert merged(old, other) == other
    assert merged(None, new) == new
