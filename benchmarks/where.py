"""Where the time of a network goes on a CPU, by kind of operation: PyTorch's eager network, and ours prepared.

    python benchmarks/where.py [--model DDPM-CIFAR10] [--batch 4] [--threads 2] [--chart docs/cpu.svg] [--json FILE]

Prints a table of milliseconds an image. Eager is seen by torch's profiler. Ours is seen on the tape that it plays, one
kernel at a time; what no tape holds counts as the rest. The chart needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.cpu import Given, Run, own, torch_rivals  # noqa: E402
from benchmarks.models import MODELS, pair  # noqa: E402
from benchmarks.watch import Function, replaced  # noqa: E402

CONV3, CONV1, ATTENTION = "3x3 convolutions", "1x1 convolutions and linear layers", "attention"
NORM, SILU, SUMS, COPIES, REST = "group norm", "SiLU", "sums and concatenation", "copies and resampling", "rest"
KINDS = (CONV3, CONV1, ATTENTION, NORM, SILU, SUMS, COPIES, REST)


def of_aten(name: str, shapes: list[list[int]]) -> str:
    """The kind of an operator of PyTorch's, by its name and the shapes that it is given."""
    name = name.removeprefix("aten::")
    if "conv" in name:
        weight = shapes[1] if len(shapes) > 1 else []
        return CONV1 if weight[2:] == [1, 1] else CONV3
    for kind, words in {
        ATTENTION: ("scaled_dot_product", "softmax", "bmm"),
        NORM: ("group_norm", "batch_norm", "layer_norm"),
        SILU: ("silu",),
        CONV1: ("linear", "addmm", "mm"),
        SUMS: ("add", "cat", "sub", "mul", "div"),
        COPIES: ("copy", "clone", "contiguous", "upsample", "pad", "fill", "empty", "resize", "to"),
    }.items():
        if any(name.strip("_").startswith(word) or f"_{word}" in name for word in words):
            return kind
    return REST


def of_convolution(x: Tensor, packed: Any, *_: Any, **given: Any) -> str:
    """The kind of a convolution of ours, by its window."""
    return CONV3 if packed[2] == 3 else CONV1


def of_attention(*_: Any, **given: Any) -> str:
    """The kind of the attention between two convolutions."""
    return ATTENTION


WATCHED = (
    ("fastdiff.nn.convolved", "convolved", of_convolution),
    ("fastdiff.nn.attended", "attended", of_attention),
)
"""Functions of ours that add one kernel to the tape, and how its kind is known from what they are given."""


def eager(run: Run, calls: int = 5) -> dict[str, float]:
    """Seconds a call by kind, as torch's profiler sees them; the rest is what is left of the time outside of it."""
    run()
    whole = statistics.median(_timed(run) for _ in range(calls))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for _ in range(calls):
            run()
    found: Counter[str] = Counter()
    for event in profile.key_averages(group_by_input_shape=True):
        if event.key.startswith("aten::"):
            found[of_aten(event.key, event.input_shapes)] += 1e-6 * event.self_cpu_time_total / calls
    return _with_rest(found, whole)


def _timed(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _with_rest(found: Counter[str], whole: float) -> dict[str, float]:
    """The seconds with what is missing to `whole`; where they are more, since watching takes time, all are scaled."""
    seen = found.total()
    scale = min(1.0, whole / seen) if seen else 1.0
    parts = {kind: scale * found[kind] for kind in KINDS}
    parts[REST] += max(0.0, whole - seen)
    return parts


def prepared(net: Any, given: Given, calls: int = 5) -> dict[str, float]:
    """Seconds a call by kind of a prepared network, each kernel of its tape timed by itself."""
    labels: list[str] = []

    def labelled(label: Callable[..., str], f: Function) -> Function:
        def run(*args: Any, **more: Any) -> Any:
            labels.append(label(*args, **more))
            return f(*args, **more)

        return run

    run = given.bound(net, last=True)
    with ExitStack() as stack:
        for module, name, label in WATCHED:
            stack.enter_context(replaced(module, name, partial(labelled, label)))
        run()
    whole = statistics.median(_timed(run) for _ in range(calls))
    found: Counter[str] = Counter()
    for _ in range(calls):
        for kind, play in kernels(net, labels):
            found[kind] += _timed(play) / calls
    return _with_rest(found, whole)


def kernels(net: Any, labels: list[str]) -> Iterator[tuple[str, Callable[[], object]]]:
    """The kinds and the kernels of the tape that was recorded last, in the order in which they run."""
    (*_, recorded) = net._tapes._recorded.values()
    tape, threads = recorded.tape, torch.get_num_threads()
    for step in tape._steps:
        if isinstance(step, tuple):
            for i in range(*step):
                yield labels[i], lambda i=i: tape._calls.play(i, i + 1, threads)  # type: ignore[misc]
        else:
            beside = step.args[0]
            yield (ATTENTION if "ttention" in getattr(beside, "__qualname__", "") else REST), step


def measure(model: str, batch: int) -> dict[str, dict[str, float]]:
    """Seconds an image by kind, of both."""
    made = pair(MODELS[model], "cpu")
    given = Given.of(MODELS[model], made, batch)
    with torch.no_grad():
        theirs = torch_rivals(given, ())[f"{made.label} eager, channels_last"]()
        found = {f"{made.label} eager": eager(theirs)}
        found["ours, prepared"] = prepared(own(made.ours)["ours, prepared"](), given)
    return {name: {kind: s / batch for kind, s in parts.items()} for name, parts in found.items()}


def table(found: dict[str, dict[str, float]]) -> str:
    """As Markdown."""
    names = list(found)
    lines = [f"| ms an image | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for kind in KINDS:
        if any(parts[kind] for parts in found.values()):
            cells = (
                f"{1e3 * parts[kind]:.1f} ({100 * parts[kind] / sum(parts.values()):.0f} %)" for parts in found.values()
            )
            lines.append(f"| {kind} | {' | '.join(cells)} |")
    totals = (f"**{1e3 * sum(parts.values()):.1f}**" for parts in found.values())
    return "\n".join([*lines, f"| **all** | {' | '.join(totals)} |"])


def chart(found: dict[str, dict[str, float]], path: Path, title: str) -> None:
    """One stacked bar a network."""
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SystemExit('where.py: the chart needs matplotlib: pip install ".[plot]"') from error
    mpl.use("Agg")
    # the same picture for the same figures
    mpl.rcParams["svg.hashsalt"] = "fastdiff"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 2.8), layout="constrained")
    names = list(found)
    left = dict.fromkeys(names, 0.0)
    colours = pyplot.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for kind, colour in zip(KINDS, colours, strict=False):
        widths = [1e3 * found[name][kind] for name in names]
        if any(widths):
            axes.barh(names, widths, left=[left[name] for name in names], color=colour, label=kind)
            left = {name: left[name] + width for name, width in zip(names, widths, strict=True)}
    for name in names:
        axes.annotate(f" {left[name]:.0f} ms", (left[name], name), va="center")
    axes.invert_yaxis()
    axes.margins(x=0.1)
    axes.set_xlabel("ms an image")
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> int:
    """Parse, run, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="DDPM-CIFAR10", choices=MODELS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--chart", type=Path, default=None, help="an .svg or .png file")
    parser.add_argument("--json", type=Path, default=None, help="where the seconds go")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    found = measure(args.model, args.batch)
    print(table(found))
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if args.chart is not None:
        chart(found, args.chart, f"{args.model}, batch {args.batch}, {torch.get_num_threads()} threads")
    return 0


if __name__ == "__main__":
    sys.exit(main())
