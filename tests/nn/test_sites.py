"""Which calls are joined, and that a rewritten function does what it did, call by call, whatever it calls."""

import ast
import textwrap
from typing import Any

import pytest

from fastdiff.nn.sites import PAIR, join

JOINED = {
    "nested": "return self.act(self.norm(x))",
    "argument": "return self.conv(self.act(self.norm(x)), 1, b=2)",
    "inplace": "return self.act(self.norm(x), inplace=True)",
    "subscript": "return self.layers[1](self.layers[0](x))",
    "negative subscript": "return self.layers[-1](self.layers[-2](x))",
    "statements": "h = self.norm(x); h = self.act(h); return self.conv(h)",
    "same name": "x = self.norm(x)\nx = self.act(x)\nreturn x",
    "returned": "h = self.norm(self.conv(x)); return self.act(h)",
    "first argument": "h = self.norm(x); h = self.conv(self.act(h), x); return h",
    "method of it": "h = self.norm(x); h = self.act(h).mean(1); return h",
    "left of a sum": "h = self.norm(x); return self.act(h) + x",
    "branches": "h = x\nif c: h = self.norm(h)\nelse: h = self.conv(h)\nh = self.act(h)\nreturn h",
    "no else": "h = x\nif c:\n    h = self.conv(h)\n    h = self.norm(h)\nh = self.act(h)\nreturn h",
    "elif": "h = x\nif c: h = h + 1\nelif x: h = self.norm(h)\nh = self.act(h)\nreturn h",
    "nested if": "h = x\nif x:\n    if c: h = self.norm(h)\nh = self.act(h)\nreturn h",
    "loop": "for _ in range(3):\n    x = self.norm(x)\n    x = self.act(x)\nreturn x",
    "while": "while x < 20:\n    x = self.act(self.norm(x)) + 20\nreturn x",
    "with": "with self.context():\n    h = self.norm(x)\n    h = self.act(h)\nreturn h",
}
ALONE = {
    "used again": "h = self.norm(x); g = self.act(h); return g + h",
    "other name": "h = self.norm(x); g = self.act(h); return g",
    "used twice": "h = self.norm(x); h = self.act(h) + h; return h",
    "a step between": "h = self.norm(x); x = self.conv(x); h = self.act(h); return h + x",
    "evaluated behind": "h = self.norm(x); h = self.conv(self.conv(x), self.act(h)); return h",
    "right of a sum": "h = self.norm(x); return self.conv(x) + self.act(h)",
    "two names": "h = g = self.norm(x); h = self.act(h); return h + g",
    "annotated": "h: int = self.norm(x); h = self.act(h); return h",
    "attribute": "self.h = self.norm(x); self.h = self.act(self.h); return self.h",
    "in try": "try:\n    h = self.norm(x)\n    h = self.act(h)\nfinally: self.conv(x)\nreturn h",
    "nested in try": "try: return self.act(self.norm(x))\nfinally: self.conv(x)",
    "seen by a closure": "h = self.norm(x)\nh = self.act(h)\nreturn (lambda: h)()",
    "inner function": "def f(): return self.act(self.norm(x))\nreturn f()",
    "lambda": "return (lambda y: self.act(self.norm(y)))(x)",
    "comprehension": "return [self.act(self.norm(y)) for y in (x, x)]",
    "more arguments": "return self.act(self.norm(x, 2))",
    "keyword": "return self.act(self.norm(x=x))",
    "starred": "return self.act(self.norm(*[x]))",
    "called result": "return self.get()(self.norm(x))",
    "self is another": "self = self.me; return self.act(self.norm(x))",
    "global": "global h; h = self.norm(x); h = self.act(h); return h",
}


class Log:
    """Callable at every attribute and index; notes each call and its arguments in order."""

    def __init__(self, calls: list[Any], name: str = "self") -> None:
        self._calls, self._name = calls, name

    def __getattr__(self, name: str) -> Any:
        return {"me": self, PAIR: self._pair}.get(name) or Log(self._calls, f"{self._name}.{name}")

    def __getitem__(self, key: int) -> Any:
        return Log(self._calls, f"{self._name}[{key % 2}]")

    def _pair(self, act: Any, norm: Any, x: Any, **given: Any) -> Any:
        self._calls.append("pair")
        return act(norm(x), **given)

    def __call__(self, *args: Any, **given: Any) -> Any:
        self._calls.append((self._name, args, given))
        if self._name == "self.get":
            return self.act
        if self._name == "self.context":
            return self
        return Number(3 * [*args, *given.values()][0] + len(self._name))

    def __enter__(self) -> None:
        self._calls.append("enter")

    def __exit__(self, *_: object) -> None:
        self._calls.append("exit")


class Number(int):
    """With a method, as tensors have."""

    def mean(self, n: int) -> int:
        return int(self) // 2 + n


def outcome(tree: ast.Module, x: int, c: bool) -> tuple[list[Any], Any]:
    names: dict[str, Any] = {}
    exec(compile(tree, "f", "exec"), names)
    calls: list[Any] = []
    return calls, names["forward"](Log(calls), Number(x), c)


def rewritten(body: str) -> tuple[ast.Module, ast.Module, int]:
    text = "def forward(self, x, c):\n" + textwrap.indent(body, "    ")
    before, after = ast.parse(text), ast.parse(text)
    namespace: dict[str, Any] = {}
    exec(compile(before, "f", "exec"), namespace)
    [node] = after.body
    sites = join(node, namespace["forward"].__code__.co_cellvars, lambda s: s.norm[-1] in ("norm", (0,), (-2,)))
    return before, after, len(sites)


@pytest.mark.parametrize("body", [*JOINED.values(), *ALONE.values()], ids=[*JOINED, *ALONE])
def test_every_call_happens_as_before(body: str) -> None:
    before, after, _ = rewritten(body)
    for x in (0, 7):
        for c in (False, True):
            wanted, want = outcome(before, x, c)
            calls, got = outcome(after, x, c)
            assert [call for call in calls if call != "pair"] == wanted
            assert got == want


@pytest.mark.parametrize("body", JOINED.values(), ids=JOINED)
def test_joined(body: str) -> None:
    before, after, sites = rewritten(body)
    assert sites
    assert any("pair" in outcome(after, x, c)[0] for x in (0, 7) for c in (False, True))
    assert ast.dump(before) != ast.dump(after)


@pytest.mark.parametrize("body", ALONE.values(), ids=ALONE)
def test_left_alone(body: str) -> None:
    before, after, sites = rewritten(body)
    assert sites == 0
    assert ast.dump(before) == ast.dump(after)


def test_only_what_is_wanted() -> None:
    text = "def forward(self, x):\n    return self.a(self.b(x)) + self.c(self.d(x))"
    [node] = ast.parse(text).body
    [site] = join(node, (), lambda s: s.norm == ("self", "d"))
    assert site.act == ("self", "c")
    assert ast.unparse(node.body[0]) == f"return self.a(self.b(x)) + self.{PAIR}(self.c, self.d, x)"
    assert join(ast.parse("def f(): return self.a(self.b(1))").body[0], (), lambda s: True) == []
