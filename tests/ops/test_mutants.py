"""Bugs planted in the kernels' sources are caught by the cells.

CI plants some of them (half a minute on two cores); `pytest tests/ops/test_mutants.py -m slow` plants all.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff.ops import dispatch
from tests.ops import mutants, mutants_list
from tests.process import environment

ROOT = Path(__file__).parents[2]
KINDS = {"cpp": mutants_list.CPP, "triton": mutants_list.TRITON}


def judged(kind, folder, slow):
    """{mutant: what noticed it}, from a process of its own: it forks, and for Triton it interprets."""
    code = f"""
import sys
sys.path.append({str(ROOT)!r})
from tests.ops import mutants
mutants.main({kind!r}, {str(folder)!r}, {slow})
"""
    own = {"OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if kind == "triton" else {})
    command = [sys.executable, "-P", "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment(**own), capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr
    return dict(line.split("\t", 1) for line in done.stdout.splitlines())


def check(kind, folder, slow):
    said = judged(kind, folder, slow)
    assert said.pop(mutants.UNCHANGED, "survived") == "survived"
    assert set(said) == {m.name for m in KINDS[kind] if slow or m.name not in mutants_list.SLOW}
    missed = {name: says for name, says in said.items() if says.startswith(("survived", "raised", "not planted"))}
    assert not missed


def can(kind):
    if kind == "cpp":
        pytest.importorskip("pybind11", reason="pybind11 binds the kernels")
        if mutants.compiler() is None or dispatch.reason("q_sample", "cpp") is not None:
            pytest.skip("no C++ compiler, or no compiled kernels here")
    else:
        pytest.importorskip("triton", reason="the interpreter is triton's")
        if not any("triton" in backends for backends in dispatch._table.values()):
            pytest.skip("no Triton kernel is registered")


@pytest.mark.parametrize("kind", KINDS)
def test_planted_bugs_are_caught(kind, tmp_path):
    can(kind)
    check(kind, tmp_path, slow=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_all_planted_bugs_are_caught(kind, tmp_path):
    can(kind)
    check(kind, tmp_path, slow=True)


def test_enough_of_each():
    assert len([m for m in mutants_list.CPP if m.name not in mutants_list.SLOW]) >= 20
    names = [m.name for m in (*mutants_list.CPP, *mutants_list.TRITON)]
    assert set(names) >= mutants_list.SLOW
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("mutant", [*mutants_list.CPP, *mutants_list.TRITON], ids=lambda m: m.name)
def test_mutants_follow_the_code(mutant):
    """Their text is in the source, once."""
    assert mutants.planted(mutant) != (ROOT / mutant.file).read_text()
