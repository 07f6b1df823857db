"""The columns of a step row: the one thing that numbers (`tables`) and kernels (`ops`) share.

One row is one network call and one affine update (x, x0, h are images, everything else a number of the row):

    F   = F_u + W (F_c - F_u)                                     classifier-free guidance; W = 1 is none
    x0  = clip(C_SKIP x + C_OUT F, CLIP)                          the network's output read as an image
    x'  = A x + B0 x0 + BF F + B1 h1 + B2 h2 + B3 h3 + S z        z: Gaussian noise of the row
    h[SLOT] = P x + Q x0                                          what a later row wants to remember

A coefficient of zero means that its operand is not read. Derivation: docs/math.md.
"""

NAMES = (
    "T",  # what the network is told as time
    "C_IN",  # the network input is C_IN x
    "C_SKIP",
    "C_OUT",
    "W",
    "A",
    "B0",
    "BF",
    "B1",
    "B2",
    "B3",
    "S",
    "P",
    "Q",
    "ALPHA",  # the marginal N(ALPHA x0, SIGMA^2) of the state that this row receives
    "SIGMA",
    "SLOT",  # history slot to write: 0, 1 or 2 hold h1, h2, h3
    "CLIP",  # bound on |x0|; inf is none
    "END",  # 1 on rows that finish a grid step; stages inside a step have 0
    "V0",  # variance read from a second network output, see ops/step.py
    "V1",
    "V2",
    "V3",
)

T, C_IN, C_SKIP, C_OUT, W, A, B0, BF, B1, B2, B3, S = range(12)
P, Q, ALPHA, SIGMA, SLOT, CLIP, END, V0, V1, V2, V3 = range(12, 23)

COLUMNS = len(NAMES)
"""Numbers in a row."""

SLOTS = 3
"""History slots of a state."""

CAPACITIES = (64, 256, 1024, 4096)
"""Lines that a buffer of rows may hold, so that neither compile nor capture sees the number of steps."""
