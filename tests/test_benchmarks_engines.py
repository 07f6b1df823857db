"""Other people's engines in the report: they compute the same network, and one that fails is a sentence."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# with classes, scale and shift, resampling blocks: all that the networks of the report have
TINY = {"channels": 16, "mults": (1, 2), "blocks": 1, "groups": 8, "attention": (2,), "head_channels": 16,
        "scale_shift": True, "resample_blocks": True, "classes": 7, "null_class": False}  # fmt: skip
NEEDS = {
    "ONNX Runtime": ("onnx", "onnxruntime"),
    "OpenVINO": ("onnx", "openvino"),
    "MNN": ("onnx", "MNN"),
    "MNN, smaller Winograd tiles": ("onnx", "MNN"),
    "ncnn": ("ncnn", "pnnx"),
    "ncnn, an image a thread": ("ncnn", "pnnx"),
}


@pytest.fixture(autouse=True)
def _path(monkeypatch, one_thread):
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def network():
    """A network of torch's modules, inputs for three images, and what it makes of them in float64."""
    import copy

    from benchmarks.models import SMALL, build
    from benchmarks.plain import PlainUNet

    net = PlainUNet(build(SMALL._replace(unet=TINY)))
    x, t, cond = torch.randn(3, 3, 16, 16), torch.tensor([10, 500, 990]), torch.tensor([6, 0, 3])
    with torch.no_grad():
        wanted = copy.deepcopy(net).double()(x.double(), t, cond)
    return net, (x, t, cond), wanted


def test_every_engine_is_tested():
    from benchmarks.engines import ENGINES, INSTEAD

    assert set(NEEDS) == set(ENGINES)
    assert set(INSTEAD) | set(INSTEAD.values()) <= set(ENGINES)


def test_an_image_a_thread_needs_both():
    from benchmarks.engines import PARALLEL, fits

    assert [fits(PARALLEL, images, threads) for images, threads in ((1, 2), (2, 1), (2, 2), (5, 2))] == [
        *(False, False),
        *(True, True),
    ]
    assert fits("ncnn", 1, 1)


@pytest.mark.parametrize("name", NEEDS)
# what the packages say when they are imported
@pytest.mark.filterwarnings("ignore")
def test_an_engine_computes_the_network(name, network):
    from benchmarks.engines import Export, build

    missing = [package for package in NEEDS[name] if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}, see the extra `rivals`")
    net, inputs, wanted = network
    export = Export(net, *inputs)
    engine = build(name, export, 2)
    for _ in range(2):
        got = engine.run(*inputs)
        assert (got - wanted).norm() <= 1e-5 * wanted.norm()
    # each input is looked at
    x, t, cond = inputs
    for others in ((x.flip(0), t, cond), (x, t.flip(0), cond), (x, t, cond.flip(0))):
        assert (engine.run(*others) - wanted).norm() > 1e-2 * wanted.norm()
    assert (engine.run(*inputs) - wanted).norm() <= 1e-5 * wanted.norm()
    assert engine.name.startswith(f"{name} ")
    assert engine.ready > 0
    folder = export.folder
    assert folder.exists()
    export.close()
    assert not folder.exists()


def test_an_engine_that_fails_says_why(network, monkeypatch):
    from benchmarks import engines

    net, inputs, _ = network
    export = engines.Export(net, *inputs)

    def broken(export, threads):
        raise MemoryError("no room\nfor this")

    def half(export, threads):
        return lambda x, t, cond: x[:1]

    def fails_later(export, threads):
        return lambda x, t, cond: 1 / 0

    for load, why in (
        (broken, "MemoryError: no room"),
        (half, r"its output has shape \(1, 3, 16, 16\), not \(3, 3, 16, 16\)"),
        (fails_later, "ZeroDivisionError: division by zero"),
    ):
        fake = SimpleNamespace(PACKAGE="torch", FORM="onnx", SETTINGS="", load=load)
        monkeypatch.setitem(sys.modules, "benchmarks.engines.fake", fake)
        monkeypatch.setitem(engines.ENGINES, "fake", "benchmarks.engines.fake")
        with pytest.raises(engines.NotThere, match=f"^{why}$"):
            engines.build("fake", export, 1)
    fake.PACKAGE = "no-such-package-of-anybody"
    with pytest.raises(engines.NotThere, match="no-such-package-of-anybody"):
        engines.build("fake", export, 1)
    export.close()


def test_an_export_is_made_once_and_counted_for_everybody(network, monkeypatch):
    from benchmarks import engines

    net, inputs, _ = network
    export = engines.Export(net, *inputs)
    monkeypatch.setattr(export, "_onnx", lambda path: path.write_text("once"))

    def load(export, threads):
        assert export.onnx().read_text() == "once"
        return net

    fake = SimpleNamespace(PACKAGE="torch", FORM="onnx", SETTINGS="", load=load)
    monkeypatch.setitem(sys.modules, "benchmarks.engines.fake", fake)
    monkeypatch.setitem(engines.ENGINES, "fake", "benchmarks.engines.fake")
    with torch.no_grad():
        assert engines.build("fake", export, 1).name == f"fake {torch.__version__}"
        export._made["onnx"] = export._made["onnx"][0], 100.0
        assert engines.build("fake", export, 1).ready > 100.0
    export.close()


def test_a_converter_that_makes_nothing_says_its_last_line(tmp_path):
    from benchmarks.engines.export import converted, python

    with pytest.raises(RuntimeError, match=r"made no net.mnn: at last$"):
        converted(python("print('first'); print('at last')"), tmp_path / "net.mnn")
    with pytest.raises(RuntimeError, match=r"made no net.mnn: it does not say why$"):
        converted(python("raise SystemExit(3)"), tmp_path / "net.mnn")
    code = "import sys; open(sys.argv[1], 'w').close()"
    assert converted(python(code, "a"), tmp_path / "a") == tmp_path / "a"
