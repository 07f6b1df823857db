"""What a table promises, checked on the finished rows: an exact one keeps the marginals, a declared one its own step.

The rows run on the state x = m x0 + n.(noise) with a network that knows x0, so nothing is sampled: m is a number, and n
a vector over independent unit noises. Five noises are enough: state and three slots span four, each row draws one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fastdiff import row
from fastdiff.tables.curve import Array

RELATIVE = 1e-12
# float64 rounds each term of a sum: what remains where terms much larger than their sum cancel
_ROUNDING = 16 * float(np.finfo(np.float64).eps)


class _Run(NamedTuple):
    """What each row makes of the state that it claims to receive, (K,) each."""

    signal: Array
    noise: Array
    signal_terms: Array
    noise_terms: Array


def check(rows: Array, declared: Array | None, solver: str) -> None:
    """Raise ValueError, naming solver, row, number expected and found, when `rows` break their promise.

    declared None (an exact table): run on (signal, noise), row k lands on the ALPHA and SIGMA of row k + 1, each
    relative to itself within 1e-12; SIGMA = 0 relative to the row's own SIGMA. Otherwise (K, 3): the row's weight of x0
    and of eps and its noise variance, from the exact state, are the declared ones (at the top of a learned range).
    """
    here, after = rows[:-1], rows[1:]
    run = _run(rows, declared is not None)
    signal, noise = run.signal, run.noise
    drawn = here[:, row.S] ** 2 * np.exp(here[:, row.V1])
    if declared is None:
        signal_want, noise_want = after[:, row.ALPHA], after[:, row.SIGMA]
        noise = np.hypot(noise, here[:, row.S])
        names = ("signal weight ALPHA", "noise SIGMA")
    else:
        signal_want, noise_want, drawn_want = declared.T
        names = ("weight of x0", "weight of eps")
        # differences of nearby levels cost digits relative to the state, not to the difference
        slack = RELATIVE * drawn_want + _ROUNDING * here[:, row.SIGMA] ** 2
        _compare(solver, "noise variance", drawn, drawn_want, slack)
    size = np.where(noise_want > 0, noise_want, here[:, row.SIGMA])
    _compare(solver, names[0], signal, signal_want, RELATIVE * np.abs(signal_want) + _ROUNDING * run.signal_terms)
    _compare(solver, names[1], noise, noise_want, RELATIVE * size + _ROUNDING * run.noise_terms)


def _compare(solver: str, what: str, found: Array, want: Array, slack: Array) -> None:
    # written so that NaN is a broken promise too
    broken = ~(np.abs(found - want) <= slack)
    if broken.any():
        k = int(np.argmax(broken))
        raise ValueError(
            f"{solver} breaks its promise at row {k}: {what} should be {want[k]:.17g}, found {found[k]:.17g}; "
            "correct the solver's coefficients, or set Table.declared to what its step is meant to be"
        )


def _run(rows: Array, declared: bool) -> _Run:
    """Each row from the state it claims: exact tables keep track of whose noise it is, declared ones forget it."""
    K = len(rows) - 1
    state, offset, sizes, offset_sizes = _linear(rows[:K])
    out = _Run(*np.zeros((4, K)))
    # signal, its size before cancellation inside a slot, and noise of x, h1, h2, h3
    m, size, n = np.zeros(1 + row.SLOTS), np.zeros(1 + row.SLOTS), np.zeros((1 + row.SLOTS, 2 + row.SLOTS))
    for k, (P, Q, alpha, sigma, slot, S) in enumerate(
        rows[:K, [row.P, row.Q, row.ALPHA, row.SIGMA, row.SLOT, row.S]].tolist()
    ):
        length = float(np.linalg.norm(n[0]))
        if declared or length == 0:
            n[0] = 0
            n[0, 0] = sigma
        else:
            # from the state that the row claims, without the rounding of the rows before it
            n[0] *= sigma / length
        m[0] = size[0] = alpha
        out.signal[k] = state[k] @ m + offset[k]
        noise = state[k] @ n
        out.noise[k] = noise[0] if declared else np.linalg.norm(noise)
        out.signal_terms[k] = sizes[k] @ size + offset_sizes[k]
        out.noise_terms[k] = sizes[k] @ np.linalg.norm(n, axis=1)
        if P != 0 or Q != 0:
            to = 1 + int(slot)
            m[to], size[to], n[to] = P * alpha + Q, abs(P) * alpha + abs(Q), P * n[0]
        n[0] = noise
        if S != 0 and not declared:
            n[0, -1] = S
            n = _compress(n)
    return out


def _linear(rows: Array) -> tuple[Array, Array, Array, Array]:
    """x' = state.(x, h1, h2, h3) + offset x0 when the network knows x0, and both with every term's absolute value."""
    F = np.divide(1, rows[:, row.C_OUT], out=np.zeros(len(rows)), where=rows[:, row.C_OUT] != 0)
    # F = (x0 - C_SKIP x)/C_OUT
    skip, out = -rows[:, row.BF] * F * rows[:, row.C_SKIP], rows[:, row.BF] * F
    state = rows[:, [row.A, row.B1, row.B2, row.B3]].copy()
    sizes = np.abs(state)
    state[:, 0] += skip
    sizes[:, 0] += np.abs(skip)
    return state, rows[:, row.B0] + out, sizes, np.abs(rows[:, row.B0]) + np.abs(out)


def _compress(n: Array) -> Array:
    """The same vectors over a basis that leaves the last noise free."""
    out = np.zeros_like(n)
    if n[1:].any():
        out[:, :-1] = np.asarray(np.linalg.qr(n.T, mode="r")).T
    else:
        out[0, 0] = np.linalg.norm(n[0])
    return out
