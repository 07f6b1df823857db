"""A torch network on disk, as engines read it: ONNX and TorchScript of fixed shapes, made when they are asked for."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = Callable[..., Tensor]
"""F = net(x, t, cond), where cond may be left out; tensors on the CPU."""

NAMES = ("x", "t", "cond")


class Positional(nn.Module):
    """net(x, t, cond) with no more arguments than there are."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *given: Tensor) -> Tensor:
        """F."""
        F: Tensor = self.net(*given)
        return F


class Export:
    """The files of one network for one set of inputs; `close` removes them.

    x (N, C, H, W) fp32, t (N,) int64, cond (N,) int64 or None.
    """

    def __init__(self, net: nn.Module, x: Tensor, t: Tensor, cond: Tensor | None = None) -> None:
        self.inputs: tuple[Tensor, ...] = (x, t) if cond is None else (x, t, cond)
        self.names = NAMES[: len(self.inputs)]
        self._net = Positional(net).eval()
        with torch.no_grad():
            self.expected = self._net(*self.inputs).shape
        self._folder = tempfile.TemporaryDirectory()
        self.folder = Path(self._folder.name)
        self._made: dict[str, tuple[Path, float]] = {}

    def seconds(self, form: str) -> float:
        """What its export has taken, 0 where there was none."""
        return self._made[form][1] if form in self._made else 0.0

    def one(self) -> Export:
        """The same network for the first image alone, with files of its own in this one's folder."""
        made = Export(self._net.net, *(v[:1] for v in self.inputs))
        made._folder.cleanup()
        made.folder = self.folder / "one"
        made.folder.mkdir(exist_ok=True)
        return made

    def onnx(self) -> Path:
        """Opset 17: all engines read it, and its norms are what their own converters make of torch's."""
        return self._once("onnx", self._onnx)

    def torchscript(self) -> Path:
        """Traced with t in fp32: pnnx has no cast."""
        return self._once("torchscript", self._torchscript)

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()

    def _once(self, form: str, make: Callable[[Path], None]) -> Path:
        if form not in self._made:
            begin, path = time.perf_counter(), self.folder / f"net.{form}"
            with torch.no_grad(), quiet():
                make(path)
            self._made[form] = path, time.perf_counter() - begin
        return self._made[form][0]

    def _onnx(self, path: Path) -> None:
        torch.onnx.export(
            self._net, self.inputs, str(path), input_names=list(self.names), output_names=["F"],
            dynamo=False, opset_version=17,
        )  # fmt: skip

    def _torchscript(self, path: Path) -> None:
        x, t, *cond = self.inputs
        traced: Any = torch.jit.trace(self._net, (x, t.float(), *cond), check_trace=False)
        traced.save(str(path))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters warn of every branch in Python; here shapes are fixed."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def converted(command: Sequence[str], made: Path) -> Path:
    """The file that a converter, a program of its own, makes. RuntimeError: its last line, where it makes none."""
    done = subprocess.run([str(word) for word in command], cwd=made.parent, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not made.exists():
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        why = said[-1] if said else "it does not say why"
        raise RuntimeError(f"{Path(command[0]).name} made no {made.name}: {why}")
    return made


def python(code: str, *args: object) -> list[str]:
    """The command line of a line of Python."""
    return [sys.executable, "-c", code, *map(str, args)]
