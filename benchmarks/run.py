"""The throughput report: ours and rivals in one run, in turn, checked before they are timed.

    python benchmarks/run.py ops|unet|sampler|all [--device cpu|cuda] [--quick] [--only TEXT] [--rounds N]
        [--threads N] [--out DIR] [--large] [--update]
    python benchmarks/run.py unet|sampler --device cuda [--smoke] [--budget SECONDS] [--only TEXT] [--out DIR]

Prints a table and writes <section>.json (every repetition) and <section>.md under benchmarks/results/<device>/. On a
GPU `unet` and `sampler` measure their rows by importance until their time is used, write after each, and keep what an
earlier report of the same commit says of other rows.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
# behind what is installed: the report is about that, not about a source tree without compiled kernels
sys.path.append(str(HERE.parent))

from benchmarks import network_table, update  # noqa: E402
from benchmarks.case import Case, together  # noqa: E402
from benchmarks.cpu import threads_of  # noqa: E402
from benchmarks.machine import machine  # noqa: E402
from benchmarks.timing import LAUNCHES, copy_bandwidth, interleaved, launch, ratio  # noqa: E402

SECTIONS = {
    "ops": ("bench_q_sample", "bench_step", "bench_time_embed", "bench_group_norm_silu", "bench_norm_silu_conv"),
    "unet": ("bench_unet", "bench_optimize", "bench_patch"),
    "sampler": ("bench_sampler",),
}
LARGE = 1 << 27
PAUSE = 0.03
"""Seconds in which threads that wait for work go to sleep."""
SCALE = {"us": 1e6, "ms": 1e3}


def backends_of(device: str) -> list[str]:
    """The backends that are measured on a device: all that have a kernel which runs there, by name at least."""
    from fastdiff.ops import dispatch

    kernels = ("cpp",) if device == "cpu" else ("triton", "cuda")
    return [name for name in kernels if dispatch.reason("step_", name) is None] or ["reference"]


def settle_allocator() -> None:
    """Free one large block, as any program has done that ran a network.

    From then on glibc keeps what is freed below that size. Until then it gives the top of the heap back to the system
    after each free, and variants are timed by their page faults: eager group_norm + silu of 4 MB takes 2500 us, and 400
    us once settled.
    """
    torch.empty(31 << 18).fill_(1)


def measure(case: Case, rounds: int, device: str, graphs: bool) -> dict[str, Any]:
    """Check, then time one case."""
    # cases compile the same functions anew, and the compiler counts
    torch.compiler.reset()
    with torch.no_grad(), threads_of(case.threads):
        if case.make is not None:
            case = case.make()
        worst = case.check()
        taken = _network(case, rounds) if case.network else _ops(case, rounds, device, graphs)
    uncounted = case.network.uncounted if case.network else ()
    rivals = [n for n in taken if n not in (case.ours, *case.also, *uncounted)]
    return {
        "title": case.title,
        "unit": case.unit,
        "ours": case.ours,
        "also": case.also,
        "difference": worst,
        "median": {n: statistics.median(v) for n, v in taken.items()},
        "ratio": {n: ratio(taken, n, case.ours) for n in taken if n != case.ours},
        "best_rival": min((ratio(taken, n, case.ours) for n in rivals), default=None),
        "bytes": case.bytes_moved,
        "skipped": case.skipped or {},
        "network": case.network and nested(case.network),
        "seconds": taken,
    }


def _ops(case: Case, rounds: int, device: str, graphs: bool) -> dict[str, list[float]]:
    return interleaved(case.variants, rounds=rounds, device=device, graphs=graphs)


def _network(case: Case, rounds: int) -> dict[str, list[float]]:
    """Engines have thread pools of their own, so that each is left to itself; what takes long has fewer rounds."""
    begin = time.perf_counter()
    for call in case.variants.values():
        call()  # type: ignore[operator]
    once = time.perf_counter() - begin
    fewer = max(5, int(case.seconds / once)) if case.seconds else rounds
    return interleaved(case.variants, rounds=min(rounds, fewer), warm=0, pause=PAUSE)


def nested(record: Any) -> Any:
    """A NamedTuple as JSON has it."""
    return {k: nested(v) for k, v in record._asdict().items()} if hasattr(record, "_asdict") else record


def _rate(result: dict[str, Any], seconds: float, copy: float) -> str:
    """Bytes a second; for large arrays the share of copy speed, which says nothing of what stays in the caches."""
    if not result["bytes"]:
        return ""
    rate = result["bytes"] / seconds
    return f"{rate / 1e9:.1f} GB/s" + (f", {100 * rate / copy:.0f} % of copy" if result["bytes"] >= LARGE else "")


def lines(result: dict[str, Any], copy: float) -> list[str]:
    """One case as rows of a Markdown table."""
    if result["network"]:
        return network_table.lines(result)
    out = [f"### {result['title']}", "", "| variant | median | ours is faster by |", "|---|---|---|"]
    for name, seconds in result["median"].items():
        cell = f"{seconds * SCALE[result['unit']]:.1f} {result['unit']}"
        rate = _rate(result, seconds, copy)
        if name == result["ours"]:
            out.append(f"| **{name}** | **{cell}** | {rate} |")
        else:
            faster = f"{result['ratio'][name]:.2f}x" + (f", {rate}" if name in result["also"] and rate else "")
            out.append(f"| {name} | {cell} | {faster} |")
    out += [f"| {name} | not there: {why} | |" for name, why in result["skipped"].items()]
    best = result["best_rival"]
    against = "" if best is None else f"; against the best rival: {best:.2f}x"
    worst = result["difference"]
    checked = "Not compared with a reference" if worst is None else f"Largest difference from the reference {worst:.1e}"
    return [*out, "", f"{checked}{against}.", ""]


def _method(rounds: int, graphs: bool) -> str:
    text = f"{rounds} rounds, variants in turn; medians, and medians of the ratios of a round."
    if graphs:
        text += (
            f" Events around a captured graph of {LAUNCHES} calls or more (around plain calls where one waits for the"
            " device); rows larger than the second-level cache go round buffers of four times its size."
        )
    return text


class NothingFound(ValueError):
    """No case has the text in its title."""


def report(
    section: str, device: str, rounds: int, quick: bool, only: str = "", more: Sequence[str] = ()
) -> tuple[dict[str, Any], str]:
    """Run one section, or its cases with `only` in their titles; returns the record and the Markdown.

    more: modules with further cases. Raises NothingFound with the titles that there are.
    """
    about = machine(device)
    settle_allocator()
    copy = copy_bandwidth(device, 64 if quick else 256)
    # whole loops and networks are timed as users run them
    graphs = section == "ops" and device.startswith("cuda")
    head = ", ".join(f"{k} {v}" for k, v in about.items() if v is not None)
    text = [f"# fastdiff: {section}", "", head, "", f"Copy bandwidth (read + write): {copy / 1e9:.1f} GB/s."]
    text += [_method(rounds, graphs), *(["", network_table.METHOD] if section == "unet" else [])]
    if graphs:
        text += [f"A kernel on one number takes {1e6 * launch(device):.2f} us."]
    text += [""]
    print("\n".join(text), flush=True)
    results, titles, notes = [], [], {}
    backends = backends_of(device)[: None if section == "ops" else 1]
    for name in (*SECTIONS[section], *more):
        try:
            module = importlib.import_module(f"benchmarks.{name}")
            for case in together({b: module.cases(device, b, quick) for b in backends}):
                titles.append(case.title)
                if only not in case.title:
                    continue
                results.append(measure(case, rounds, device, graphs))
                text += lines(results[-1], copy)
                print("\n".join(lines(results[-1], copy)), flush=True)
            for note in module.notes(quick) if hasattr(module, "notes") else ():
                titles.append(note.title)
                if only in note.title:
                    notes[note.title] = found = note.measure()
                    text += (said := [f"### {note.title}", "", *note.lines(found)])
                    print("\n".join(said), flush=True)
        except (ImportError, RuntimeError) as error:
            # what is missing or does not compile here costs its own rows, not the report; a wrong result stops it
            text.append(f"{name}: the rest is skipped, {type(error).__name__}: {error}")
            print(text[-1])
    if only and not results and not notes:
        raise NothingFound(f"--only {only!r}: no case of {section} has it in its title; there are: {'; '.join(titles)}")
    record = {"machine": about, "copy_bytes_per_second": copy, "rounds": rounds, "cases": results, "notes": notes}
    return record, "\n".join([*text, *network_table.settings(results)])


def on_gpu(section: str, args: argparse.Namespace, out: Path) -> None:
    """The rows of `unet` or `sampler`, into files after each. Raises NothingFound."""
    from benchmarks import markdown, networks
    from benchmarks.budget import QUICK

    given = networks.Task(section, args.device, backends_of(args.device), args.budget, args.smoke, args.only)
    if args.quick:
        given = given._replace(plan=QUICK, seconds=args.budget or 60.0, smoke=True)
    if not given.items:
        titles = "; ".join(item.title for item in given._replace(only="").items)
        raise NothingFound(f"--only {args.only!r}: no row of {section} has it in its title; there are: {titles}")
    found = out / f"{section}.json"
    old = json.loads(found.read_text()) if found.exists() else None

    said = 0

    def save(record: dict[str, Any]) -> None:
        nonlocal said
        write(out, section, whole := markdown.merged(old, record), markdown.text(whole))
        print(markdown.news(record, said), flush=True)
        said = len(record["rows"])

    networks.report(given, machine(args.device), save)


def in_place(out: Path, section: str, new: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """An earlier report of the section with these cases in it."""
    old = json.loads((out / f"{section}.json").read_text())
    found = {case["title"]: lines(case, new["copy_bytes_per_second"]) for case in new["cases"]}
    return update.record(old, new), update.text((out / f"{section}.md").read_text(), found, new["machine"])


def write(out: Path, section: str, record: dict[str, Any], text: str) -> None:
    """Both files of a section."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{section}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{section}.md").write_text(text.rstrip() + "\n")


def parsed(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=[*SECTIONS, "all"], nargs="?", default="all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, nothing compiled: a minute")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their titles; writes no files "
                        "but into --out, and for the rows of networks on a GPU")  # fmt: skip
    parser.add_argument("--update", action="store_true", help="with --only, on a CPU: put these cases into the "
                        "report that is there")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=None, help="default: 15 on a CPU, 50 on a GPU")
    parser.add_argument("--threads", type=int, default=None, help="torch's threads")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<device>")
    parser.add_argument("--large", action="store_true", help="unet on a CPU: the networks of EDM and ADM-64 too")
    parser.add_argument("--smoke", action="store_true", help="unet and sampler on a GPU: a little of all, 5 minutes")
    parser.add_argument("--budget", type=float, default=None, metavar="SECONDS",
                        help="unet and sampler on a GPU: the time for all rows; default 540, smoke 300")  # fmt: skip
    args = parser.parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; pass --device cpu")
    return args


def main() -> int:
    """Parse, run, write."""
    args = parsed()
    if args.threads:
        torch.set_num_threads(args.threads)
    about = machine(args.device)
    name = "".join(c if c.isalnum() else "-" for c in about["device"].lower()).strip("-")
    # a report of some of the cases, or with less, does not take the place of the whole
    out = args.out or HERE / "results" / name / ("quick" if args.quick else "smoke" if args.smoke else "")
    missed = []
    sections = list(SECTIONS) if args.section == "all" else [args.section]
    for section in sections:
        try:
            if section != "ops" and args.device.startswith("cuda"):
                on_gpu(section, args, out)
            else:
                rounds = args.rounds or (15 if args.device == "cpu" else 50)
                more = ("bench_large",) if args.large and section == "unet" else ()
                record, text = report(section, args.device, rounds, args.quick, args.only, more)
                if args.update:
                    record, text = in_place(out, section, record)
                elif args.only and args.out is None:
                    continue
                write(out, section, record, text)
        except NothingFound as error:
            missed.append(str(error))
            continue
        print(f"wrote {out / section}.json and .md")
    if len(missed) == len(sections):
        print("\n".join(missed), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
