"""All descriptions by name, and their covering arrays."""

import functools

from tests.ops import describe_attention, describe_conv, describe_elementwise, describe_linear, describe_norm
from tests.ops.pairwise import Cell, cells

DESCRIPTIONS = {
    **describe_elementwise.DESCRIPTIONS,
    **describe_norm.DESCRIPTIONS,
    **describe_conv.DESCRIPTIONS,
    **describe_attention.DESCRIPTIONS,
    **describe_linear.DESCRIPTIONS,
}


@functools.cache
def cells_of(name: str) -> tuple[Cell, ...]:
    """The covering array of a description."""
    what = DESCRIPTIONS[name]
    return tuple(cells(what.factors, what.seed, what.least))
