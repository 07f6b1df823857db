"""Imports point down, and nothing heavy or optional is imported where it need not be."""

import ast
import sys
from pathlib import Path

import pytest

import fastdiff
from tests.process import python

ROOT = Path(fastdiff.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
NAMES = [str(f.relative_to(ROOT)) for f in FILES]

# what each part may import of the package; a part may always import itself
BELOW = {
    "row": set(),
    "_version": set(),
    "tables": {"row"},
    "ops": {"row", "_cpu", "_cuda"},
    "files": set(),
    "nn": {"ops", "row"},
    "sampling": {"tables", "ops", "files", "nn", "row"},
    "scoring": {"tables", "ops", "files", "nn", "row", "sampling"},
    "training": {"tables", "ops", "files", "nn", "row", "sampling"},
    "formats": {"tables", "ops", "files", "nn", "row", "sampling", "_version"},
    "_doctor": {"ops", "_version", "row"},
    "cli": {"*"},
    "__main__": {"*"},
    "__init__": {"*"},
}
OUTSIDE = {"tables": {"numpy"}, "ops": {"torch"}, "row": set(), "files": {"torch", "numpy"}}
# the kernels of a backend, imported when it is asked for
KERNELS = ("_triton.py", "_cuda.py")
LAZY = {"triton", "PIL", "tqdm", "safetensors", "tyro", "sklearn", "diffusers", "matplotlib", "huggingface_hub"}


def part(path):
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(tree, *, top):
    """(module, name) of every import; with top only those that run when the module is imported."""
    skipped = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            skipped |= {id(n) for n in ast.walk(node)}
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped |= {id(n) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if top and id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_imports_point_down(path):
    here = part(path)
    allowed = BELOW[here] | {here}
    for module, name in imports(ast.parse(path.read_text()), top=False):
        head, *rest = module.split(".")
        if head != "fastdiff":
            continue
        target = rest[0] if rest else name
        assert "*" in allowed or target in allowed, f"{here} must not import {module} {name}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_outside_imports(path):
    here = part(path)
    if path.name.endswith("_triton.py"):
        pytest.skip("a Triton kernel")
    for module, _ in imports(ast.parse(path.read_text()), top=True):
        assert not f"{module}.py".endswith(KERNELS), f"{module} is imported with the package"
        head = module.split(".")[0]
        assert head not in LAZY, f"{module} is imported with the package"
        if here in OUTSIDE and head not in sys.stdlib_module_names and head != "fastdiff":
            assert head in OUTSIDE[here], f"{here} must not import {module}"


def test_a_wrong_import_would_be_seen():
    tree = ast.parse("from fastdiff.sampling.sample import sample\ndef f():\n    import tqdm\n")
    assert list(imports(tree, top=True)) == [("fastdiff.sampling.sample", "sample")]
    assert ("tqdm", "") in list(imports(tree, top=False))


BLOCKED = """
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("blocked " + name, name=name)
sys.meta_path.insert(0, Block())
import fastdiff as fd
for module in pkgutil.walk_packages(fd.__path__, "fastdiff."):
    if not module.name.endswith(("__main__", "_triton")) and "._c" not in module.name:
        importlib.import_module(module.name)
for name in fd.__all__:
    getattr(fd, name)
x = fd.sample(fd.Denoiser(lambda x, t, c: x, fd.cosine(), "v"), (2, 1, 4, 4), steps=3)
print(tuple(x.shape))
"""


def test_the_package_imports_and_samples_without_its_optional_parts():
    done = python("-c", BLOCKED.format(blocked=LAZY))
    assert done.stdout.strip() == "(2, 1, 4, 4)", done.stderr


def test_import_time():
    """Beyond torch itself, importing everything public takes at most 0.2 s (best of three)."""
    code = (
        "import torch, numpy, time; s = time.perf_counter(); import fastdiff as fd; "
        "[getattr(fd, n) for n in fd.__all__]; print(time.perf_counter() - s)"
    )
    seconds: list[float] = []
    while len(seconds) < 3 and min(seconds, default=1.0) > 0.2:
        seconds.append(float(python("-c", code).stdout))
    assert min(seconds) <= 0.2, seconds
