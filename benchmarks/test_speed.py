"""Our ops alone under pytest-benchmark: what a change does to their speed. The report (run.py) is what compares rivals.

python -m pytest benchmarks/test_speed.py --benchmark-autosave      # before the change
python -m pytest benchmarks/test_speed.py --benchmark-compare       # after it
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import pytest

from benchmarks.case import Case, together
from benchmarks.run import SECTIONS, backends_of

BACKEND = backends_of("cpu")[0]
MODULES = [name for name in (f"benchmarks.{name}" for name in SECTIONS["ops"]) if importlib.util.find_spec(name)]
CASES = [
    case
    for name in MODULES
    for case in together({BACKEND: importlib.import_module(name).cases("cpu", BACKEND, quick=True)})
]


@pytest.mark.parametrize("case", CASES, ids=[case.title for case in CASES])
def test_ours(case: Case, benchmark: Any) -> None:
    """Checked first, as in the report."""
    case.check()
    (call,) = [given] if callable(given := case.variants[case.ours]) else given
    benchmark(call)
