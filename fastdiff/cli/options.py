"""What the commands share: options as dataclass fields, parsed by tyro, and checks of their values."""

from __future__ import annotations

import dataclasses
import tempfile
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def opt(
    default: Any,
    text: str,
    metavar: str | None = None,
    *,
    name: str | None = None,
    auto: str = "",
    positional: bool = False,
) -> Any:
    """A dataclass field with its help text. auto: what the help says instead of a default None.

    positional: a word by itself, not behind --name.
    """
    given: dict[str, Any] = {"help": text, "metavar": metavar, "name": name, "positional": positional}
    given["help_behavior_hint"] = auto and f"(default: {auto})"
    return dataclasses.field(default=default, metadata={key: value for key, value in given.items() if value})


def parse(options: type[T], prog: str, args: Sequence[str]) -> T:
    """Parse args into the dataclass `options`. tyro itself prints help (exit 0) and parse errors (exit 2)."""
    try:
        import tyro
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the command line needs tyro: pip install tyro") from None
    hints = typing.get_type_hints(options)
    # the fields carry plain metadata, which becomes tyro's only here: no command imports tyro to be defined
    for field in dataclasses.fields(typing.cast(Any, options)):
        given = dict(field.metadata)
        hint: Any = hints[field.name]
        if given.pop("positional", False):
            hint = typing.cast(Any, tyro.conf.Positional)[hint]
        options.__annotations__[field.name] = typing.Annotated[hint, tyro.conf.arg(**given)]
    return tyro.cli(options, prog=prog, args=list(args))


def at_least(least: int, **values: float | None) -> None:
    """Raise ValueError for the first value under `least` (or NaN); None passes."""
    for name, value in values.items():
        if value is not None and not value >= least:
            raise ValueError(f"--{name} {value} is too small; pass {least} or more")


def device(name: str | None) -> str:
    """The torch device of --device; None takes CUDA where there is one. Raises ValueError."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return "cuda" if count else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not number.isdecimal()):
        raise ValueError(f"--device {name!r} is unknown; accepted: cpu, cuda, cuda:N")
    if kind == "cuda" and int(number or 0) >= count:
        seen = f"{count} CUDA device{'s' * (count != 1)}" if count else "no CUDA device"
        raise ValueError(f"--device {name}: torch sees {seen} here; pass --device cpu, or see `fastdiff doctor`")
    return name


def checkpoint(folder: Path) -> None:
    """Raises ValueError for what is none of our checkpoints."""
    from fastdiff.files.checkpoint import read_folder

    read_folder(folder)


def new_folder(name: str, overwrite: bool, check: Callable[[Path], object]) -> Path:
    """The folder of --out, checked before the work: new or empty, or one that may be replaced.

    check: raises ValueError where a folder that holds something is none of those that this command writes.
    """
    if not name:
        raise ValueError("--out is missing; pass the folder that the checkpoint is written to")
    out = Path(name)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; pass a new folder")
    if out.is_dir() and any(out.iterdir()):
        try:
            check(out)
        except ValueError as error:
            raise ValueError(
                f"--out {out} holds something that is no checkpoint; pass a new folder ({error})"
            ) from None
        if not overwrite:
            raise ValueError(f"--out {out} holds a checkpoint; pass another folder, or --overwrite to replace it")
    place = next(p for p in out.absolute().parents if p.exists())
    try:
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise OSError(error.errno, f"--out {out}: cannot write in {place} ({error.strerror}); pass another") from error
    return out
