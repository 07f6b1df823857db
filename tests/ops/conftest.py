"""Where TRITON_INTERPRET=1: the interpreter rounds to bfloat16 as a GPU does, and numpy keeps quiet about NaN."""

import numpy as np
import torch

from fastdiff.ops import jit

if jit.INTERPRETED:
    import triton.language as tl
    from triton.runtime import interpreter

    _convert = interpreter._convert_float

    def _to_nearest(values, given, wanted, rounding):
        """The interpreter's own cuts the last bits off."""
        if given == tl.float32 and wanted == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(values)).to(torch.bfloat16)
            return rounded.view(torch.uint16).numpy()
        return _convert(values, given, wanted, rounding)

    interpreter._convert_float = _to_nearest
    np.seterr(all="ignore")
