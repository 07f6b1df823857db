"""Some cases of a report measured again, or for the first time, in the place of what an earlier run says of them."""

from __future__ import annotations

import re
from typing import Any


def said(machine: dict[str, Any]) -> str:
    """What a case says that is of another run than the head of its report."""
    return f"Measured by itself: commit {machine['commit']}, date {machine['date']}, {machine['threads']} threads."


def record(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`old` with the cases of `new`, in the place of those with their titles or behind all; each tells its run."""
    cases = {case["title"]: case for case in old["cases"]}
    cases |= {case["title"]: {**case, "machine": new["machine"]} for case in new["cases"]}
    return {**old, "cases": list(cases.values())}


def text(old: str, sections: dict[str, list[str]], machine: dict[str, Any]) -> str:
    """The report `old` with these sections by title, each a table as `run.lines` gives it."""
    head, *parts = re.split(r"(?m)^(?=### |Settings of the engines:)", old)
    kept = {part.split("\n", 1)[0]: part for part in parts}
    last = {title: kept.pop(title) for title in list(kept) if not title.startswith("### ")}
    for title, lines in sections.items():
        kept[f"### {title}"] = "\n".join([*lines, said(machine), "", ""])
    return head + "".join([*kept.values(), *last.values()])
