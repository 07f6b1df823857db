"""A network's variants on a CPU as Markdown, from the record of the case alone."""

from __future__ import annotations

from typing import Any

COLUMNS = ("variant", "ms", "ms an image", "GFLOP/s", "of matmul", "of floor", "error", "ready after", "faster by")


def _cells(name: str, result: dict[str, Any]) -> list[str]:
    """One variant as the cells of a line."""
    seconds, net = result["median"][name], result["network"]
    rate = net["flop"] / seconds
    ours = name == result["ours"]
    faster = "" if ours else f"{result['ratio'][name]:.2f}x"
    return [
        f"**{name}**" if ours else f"{name} (not counted)" if name in net["uncounted"] else name,
        f"{1e3 * seconds:.1f}",
        f"{1e3 * seconds / net['images']:.1f}",
        f"{rate / 1e9:.0f}",
        f"{100 * rate / net['limits']['matmul']:.0f} %",
        f"{100 * rate / net['limits']['direct']:.0f} %",
        f"{net['error'][name]:.1e}",
        f"{net['ready'][name]:.1f} s",
        faster,
    ]


def best(result: dict[str, Any]) -> str | None:
    """The rival that ours is least faster than."""
    own = (result["ours"], *result["also"], *result["network"]["uncounted"])
    rivals = {name: ratio for name, ratio in result["ratio"].items() if name not in own}
    return min(rivals, key=lambda name: rivals[name], default=None)


def lines(result: dict[str, Any]) -> list[str]:
    """The table, the fastest first, and what belongs to it."""
    net = result["network"]
    fastest = sorted(result["median"], key=lambda name: result["median"][name])
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(_cells(name, result) for name in fastest)]
    out = [f"### {result['title']}", "", *(f"| {' | '.join(cells)} |" for cells in rows), ""]
    rival = best(result)
    if rival is not None:
        out.append(f"{result['ours']} against the fastest rival, {rival}: **{result['best_rival']:.2f}x**.")
    limits, threads = net["limits"], net["threads"]
    floor = 1e3 * net["flop"] / net["images"] / limits["direct"]
    out.append(
        f"{net['flop'] / net['images'] / 1e9:.2f} GFLOP an image; {threads} thread{'s' * (threads > 1)}: matrix "
        f"product {limits['matmul'] / 1e9:.0f} GFLOP/s, direct convolution {limits['direct'] / 1e9:.0f} GFLOP/s, so "
        f"its floor is {floor:.1f} ms an image."
    )
    if "packed" in net["weights"]:
        whole, packed = net["weights"]["network"], net["weights"]["packed"]
        out.append(f"Packed weights {packed / 1e6:.0f} MB, {packed / whole:.2f} times the network's.")
    out += [f"{len(next(iter(result['seconds'].values())))} rounds."]
    out += [f"- {name}: not there: {why}" for name, why in result["skipped"].items()]
    return [*out, ""]


def settings(results: list[dict[str, Any]]) -> list[str]:
    """How each engine was set, once for the report."""
    found: dict[str, str] = {}
    for result in results:
        found |= result["network"]["settings"] if result["network"] else {}
    return ["Settings of the engines:", "", *(f"- {name}: {how}" for name, how in found.items()), ""] if found else []


METHOD = (
    "Networks: random weights, the same on all sides; fp32 unless it says bf16, shapes and threads fixed. GFLOP/s "
    "count the operations of direct convolution, whatever a variant does; the floor is the time that they "
    "take at this machine's best rate, so more than 100 % of it is under the floor. Error: |F - F64| / |F64| against "
    "float64; what errs by more than 1e-4 is shown and is no rival. Ready: seconds from the network in memory to the "
    "first output (packing, compiling, export, conversion, loading, one call)."
)
