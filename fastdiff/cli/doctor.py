"""`fastdiff doctor`: see fastdiff/_doctor.py."""

from __future__ import annotations

import dataclasses

# not by its public name: another package may have overwritten fastdiff/__init__.py, which is what doctor would say
from fastdiff._doctor import doctor


@dataclasses.dataclass
class Options:
    """Print versions, devices, compilers, threads and every op on every backend; exit code 1 on a name clash."""


def run(options: Options) -> int:
    """Print the report."""
    return doctor()
