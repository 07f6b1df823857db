"""The sentence about a key of diffusers' that is not supported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def refuse(key: str, value: object, accepted: str) -> ValueError:
    """The sentence about a key that would change the result and is not supported."""
    return ValueError(f"diffusers: {key}={value!r} is not supported; accepted: {accepted}")


def one_of(config: Mapping[str, Any], key: str, *accepted: object) -> Any:
    """config[key] where it is one of `accepted`, else ValueError."""
    if config[key] not in accepted:
        raise refuse(key, config[key], ", ".join(map(repr, accepted)))
    return config[key]
