"""MNN with Winograd tiles that keep the accuracy of fp32; its own choice errs by 3e-4 on some shapes."""

from __future__ import annotations

from functools import partial

from benchmarks.engines import mnn

PACKAGE, FORM = mnn.PACKAGE, mnn.FORM
SETTINGS = f"{mnn.SETTINGS}, WINOGRAD_MEMORY_LEVEL 2"

load = partial(mnn.load, level=2)
