"""Some cases of a report in the place of what it said of them."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


OLD = """# fastdiff: unet

head

### a

| old |

### b

old b

### Effect: c

note

Settings of the engines:

- one
"""
MACHINE = {"commit": "abc", "date": "today", "threads": 2}


def test_a_section_takes_the_place_of_its_like_and_a_new_one_comes_last() -> None:
    from benchmarks import update

    got = update.text(OLD, {"b": ["### b", "", "new b", ""], "d": ["### d", "", "new d", ""]}, MACHINE)
    said = "Measured by itself: commit abc, date today, 2 threads."
    assert got.split("### ") == [
        "# fastdiff: unet\n\nhead\n\n",
        "a\n\n| old |\n\n",
        f"b\n\nnew b\n\n{said}\n\n",
        "Effect: c\n\nnote\n\n",
        f"d\n\nnew d\n\n{said}\n\nSettings of the engines:\n\n- one\n",
    ]
    assert update.text(got, {}, MACHINE) == got


def test_records_say_which_run_they_are_of() -> None:
    from benchmarks import update

    old = {"machine": {"commit": "old"}, "cases": [{"title": "a", "x": 1}, {"title": "b", "x": 2}], "notes": {"n": 1}}
    new = {"machine": MACHINE, "cases": [{"title": "b", "x": 3}, {"title": "d", "x": 4}]}
    assert update.record(old, new) == {
        "machine": {"commit": "old"},
        "cases": [
            {"title": "a", "x": 1},
            {"title": "b", "x": 3, "machine": MACHINE},
            {"title": "d", "x": 4, "machine": MACHINE},
        ],
        "notes": {"n": 1},
    }
