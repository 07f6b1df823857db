"""What the commands share: options as dataclass fields, parsed by tyro, and checks of their values."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def opt(default: Any, text: str, metavar: str | None = None, *, name: str | None = None, auto: str = "") -> Any:
    """A dataclass field with its help text. auto: what the help says instead of a default None."""
    given = {"help": text, "metavar": metavar, "name": name, "help_behavior_hint": auto and f"(default: {auto})"}
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
        argument = tyro.conf.arg(**typing.cast(Any, field.metadata))
        options.__annotations__[field.name] = typing.Annotated[hints[field.name], argument]
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
