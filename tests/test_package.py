"""The public names, the repr of every module, the docs' code."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import fastdiff as fd
from fastdiff.nn.unet import UNet

ROOT = Path(__file__).resolve().parent.parent


def test_public_names_exist_and_are_documented():
    for name in fd.__all__:
        value = getattr(fd, name)
        if inspect.isfunction(value) or inspect.isclass(value):
            assert inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no attribute 'smaple'"):
        fd.smaple  # noqa: B018
    assert set(fd.__all__) <= set(dir(fd))


def test_every_name_of_the_type_checker_is_served():
    """The imports under TYPE_CHECKING and the table of homes say the same."""
    source = (Path(fd.__file__)).read_text()
    block = source[source.index("if TYPE_CHECKING") : source.index("_HOMES = {")]
    typed = {name for name, other in re.findall(r"\b(\w+) as (\w+)\b", block) if name == other}
    assert typed == set(fd.__all__) - {"__version__"}


def test_repr_of_every_module():
    net = UNet(in_channels=1, channels=16, mults=(1, 2), classes=3, scale_shift=True, resample_blocks=True)
    for module in net.modules():
        assert type(module).__name__ in repr(module)
    classes = {
        value
        for info in pkgutil.walk_packages(fd.__path__, "fastdiff.")
        if not info.name.endswith("__main__") and "._c" not in info.name
        for value in vars(importlib.import_module(info.name)).values()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__.startswith("fastdiff")
    }
    assert {type(m) for m in net.modules()} & classes
    assert re.search(r"GroupNorm\(16, 32, eps=1e-05, affine=True,.* act=silu\)", repr(net))
    den = fd.Denoiser(net, fd.cosine(), "v")
    assert repr(den) == "Denoiser(UNet, cosine, predicts='v')"


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.S)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_code_in_the_docs_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    torch.manual_seed(0)
    for code in blocks(path):
        exec(compile(code, str(path), "exec"), names)


def test_the_readme_has_code():
    assert len(blocks(ROOT / "README.md")) >= 2
