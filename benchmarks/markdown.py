"""The report of networks as Markdown, from its record alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from benchmarks.ceilings import WAYS

COLUMNS = ("variant", "ms/step", "image-steps/s", "faster", "TFLOP/s", "of ceiling", "kernels/step")
MEMORY = ("graph MB", "call MB", "all MB", "ready after")

METHOD = (
    "Random weights. Rivals have the same weights and dtype, static shapes, no gradients, the convolutions' fastest "
    "algorithms; the compiler gets them in channels_last. Variants in turn in one process; medians, and medians of the "
    "ratios of a round. Checked first: the error against a wider dtype is at most twice the rival's."
)
MEANING = (
    "The ceiling is the one with norms in one pass, computed; a network that differs from the published one is scaled. "
    "Memory: what graphs hold, what a call takes beside what was there, and both with the weights and buffers."
)


def table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """A Markdown table."""
    head = list(head)
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def _ceiling(row: dict[str, Any]) -> float:
    """Image-steps/s with norms in one pass, where that is known."""
    ceilings: list[float] = row["ceilings"]
    return ceilings[min(1, len(ceilings) - 1)]


def _cells(name: str, found: dict[str, Any], row: dict[str, Any]) -> list[str]:
    """One variant as the cells of a line."""
    kernels = row.get("kernels", {}).get(name)
    faster = found["faster"]
    return [
        f"**{name}**" if found["ours"] else name,
        f"{1e3 * found['median']:.3f}",
        f"{found['image_steps']:.0f}",
        "" if faster is None else f"{faster:.2f}x",
        f"{found['flops'] / 1e12:.2f}",
        f"{100 * found['image_steps'] / _ceiling(row):.1f} %",
        f"{kernels:.0f}" if isinstance(kernels, float | int) else "",
        *(f"{found[key] / 2**20:.0f}" for key in ("graph_bytes", "call_bytes", "bytes")),
        f"{found['prepare_seconds']:.1f} s",
    ]


def lines(row: dict[str, Any]) -> list[str]:
    """One row of the report."""
    ways = ", ".join(f"{way} {rate:.0f}" for way, rate in zip(WAYS, row["ceilings"], strict=False))
    out = [f"### {row['title']}, {row['dtype']}", ""]
    out += [f"{row['parameters'] / 1e6:.2f} M parameters, {row['flop'] / 1e9:.2f} GFLOP an image."]
    out += [f"Ceilings in image-steps/s: {ways}.", ""]
    fastest = sorted(row["variants"].items(), key=lambda item: item[1]["median"])
    out += table((*COLUMNS, *MEMORY), (_cells(name, found, row) for name, found in fastest))
    out += [""]
    for net, outside in row.get("outside", {}).items():
        said = outside if isinstance(outside, str) else f"{100 * outside['share']:.1f} %"
        out.append(f"Outside the network, {net}, both captured: {said}.")
    out += [f"- {name}: not there: {why}" for name, why in row["absent"].items()]
    errors = [found["error"] for found in row["variants"].values()]
    if errors:
        rounds = len(next(iter(row["variants"].values()))["seconds"])
        against = f"; faster: than {row['against']}" if row["against"] else ""
        out += ["", f"{rounds} rounds{against}; largest error against a wider dtype {max(errors):.1e}."]
    return [*out, ""]


def best(row: dict[str, Any], ours: bool) -> tuple[str, dict[str, Any]] | None:
    """The fastest of ours, or of the rivals."""
    found = [item for item in row["variants"].items() if item[1]["ours"] == ours]
    return min(found, key=lambda item: item[1]["median"], default=None)


def summary(record: dict[str, Any]) -> list[str]:
    """The fastest of ours against the fastest rival, a line a row: what README quotes."""
    made = []
    for row in record["rows"]:
        ours, rival = best(row, True), best(row, False)
        if ours is None or "tactics" in row["title"]:
            continue
        name, found = ours
        against = "" if rival is None else f"{rival[0]}, {1e3 * rival[1]['median']:.3f} ms"
        faster = "" if found["faster"] is None else f"{found['faster']:.2f}x"
        share = f"{100 * found['image_steps'] / _ceiling(row):.1f} %"
        rate = f"{found['image_steps']:.0f}"
        made.append([row["title"], name, f"{1e3 * found['median']:.3f}", rate, share, against, faster])
    head = ("row", "ours", "ms/step", "image-steps/s", "of ceiling", "the best rival", "ours is faster by")
    return ["## Fastest against fastest", "", *table(head, made), ""] if made else []


def _cold(record: dict[str, Any]) -> list[str]:
    def said(parts: dict[str, float] | str) -> str:
        if isinstance(parts, str):
            return f"not there: {parts}"
        before = ", ".join(f"{name} after {parts[name]:.1f} s" for name in ("imported", "network"))
        another = parts["second image"] - parts["first image"]
        return f"**{parts['first image']:.1f} s** ({before}); the next image takes {another:.2f} s"

    found = [f"- {title}: {said(parts)}" for title, parts in record["cold"].items()]
    head = ["## Cold start", "", "From the start of a new process with empty caches to its first image, of 50 steps."]
    return [*head, "", *found, ""] if found else []


def head(record: dict[str, Any]) -> list[str]:
    """What a reader must know."""
    machine = ", ".join(f"{k} {v}" for k, v in record["machine"].items() if v is not None)
    version = "smoke version" if record["smoke"] else "full version"
    took = f", {record['seconds']:.0f} s used" if "seconds" in record else ""
    speeds = (
        f"Copy bandwidth (read + write) {record['copy_bytes_per_second'] / 1e9:.0f} GB/s, matrix product "
        f"{record['matmul_flops'] / 1e12:.1f} TFLOP/s. Not compared with TensorRT."
    )
    title, method = f"# fastdiff: {record['section']}", f"{record['what']} {METHOD}"
    paragraphs = (title, machine, speeds, method, MEANING, f"{version}, {record['budget_seconds']:.0f} s{took}.")
    return [line for paragraph in paragraphs for line in (paragraph, "")]


def text(record: dict[str, Any]) -> str:
    """The whole report."""
    out = [*head(record), *summary(record), *_cold(record)]
    for row in record["rows"]:
        out += lines(row)
    out += [f"- {title}: {why}" for title, why in record["left_out"].items()]
    return "\n".join(out).rstrip() + "\n"


def news(record: dict[str, Any], said: int) -> str:
    """What there is to say while the report runs, after so many rows: its head, new rows, at the end the summary."""
    out = [] if said or record["rows"] else head(record)
    for row in record["rows"][said:]:
        out += lines(row)
    if "seconds" in record:
        out += [*summary(record), *_cold(record), *(f"- {title}: {why}" for title, why in record["left_out"].items())]
    return "\n".join(out)


def merged(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """`new` with what `old` has beside it, where both are of one machine, commit and version of everything."""

    def about(record: dict[str, Any]) -> dict[str, Any]:
        return {**record["machine"], "date": None, "section": record["section"]}

    if old is None or about(old) != about(new):
        return new
    rows = {row["title"]: row for row in (*old["rows"], *new["rows"])}
    left_out = {k: v for k, v in {**old["left_out"], **new["left_out"]}.items() if k not in rows}
    cold = {**old["cold"], **{k: v for k, v in new["cold"].items() if k not in old["cold"] or not isinstance(v, str)}}
    return {**new, "rows": list(rows.values()), "left_out": left_out, "cold": cold}
