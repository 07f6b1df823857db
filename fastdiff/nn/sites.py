"""The places in a method where a norm's result goes into an activation and nowhere else, said as one call.

    act(norm(x))                                      becomes  self.PAIR(act, norm, x)
    h = norm(x); h = f(act(h), ...)                            h = f(self.PAIR(act, norm, x), ...)
    h = norm(x); return act(h)                                 return self.PAIR(act, norm, x)
    if ...: h = norm(x) [else ...]; h = act(h)                 the last statement moves into the branches first

In all of them nobody can see what `norm` returned: it has no name, or its name is bound anew by the statement that uses
it. And nothing runs between the two calls. So PAIR may return act(norm(x)) by whatever means, and where it is that, in
those words, the method does what it did, whatever act and norm are.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from typing import NamedTuple

PAIR = "_fastdiff_norm_act"

Path = tuple[str | tuple[int | str], ...]
"""`self.layers[0].norm` as ("self", "layers", (0,), "norm")."""


class Site(NamedTuple):
    """One such place: the expressions of the activation and of the norm, and where the norm is called."""

    act: Path
    norm: Path
    line: int
    column: int


def path(node: ast.expr) -> Path | None:
    """An expression of names, attributes and constant indices, which can be evaluated early; None for any other."""
    match node:
        case ast.Name(id=name):
            return (name,)
        case ast.Attribute(value=value, attr=attr):
            head = path(value)
            return None if head is None else (*head, attr)
        case ast.Subscript(value=value, slice=ast.Constant(value=int() | str() as key)):
            head = path(value)
            return None if head is None else (*head, (key,))
        case ast.Subscript(value=value, slice=ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as key))):
            head = path(value)
            return None if head is None else (*head, (-key,))
    return None


def join(node: ast.FunctionDef, cells: tuple[str, ...], wanted: Callable[[Site], bool]) -> list[Site]:
    """Rewrite, in `node`, the sites that are `wanted`; returns them. cells: the names that inner functions can see."""
    arguments = [*node.args.posonlyargs, *node.args.args]
    if not arguments:
        return []
    me = arguments[0].arg
    for n in ast.walk(node):
        if isinstance(n, ast.Global | ast.Nonlocal):
            return []
        if isinstance(n, ast.Name) and n.id == me and not isinstance(n.ctx, ast.Load):
            return []
    joiner = _Joiner(me, frozenset(cells), wanted)
    node.body = joiner.block(node.body)
    return joiner.found


def _unary(node: ast.AST | None, *, keywords: tuple[str, ...] = ()) -> ast.Call | None:
    """`node` if it is f(x) with a path for f."""
    if (
        isinstance(node, ast.Call)
        and len(node.args) == 1
        and not isinstance(node.args[0], ast.Starred)
        and all(k.arg in keywords and isinstance(k.value, ast.Constant) for k in node.keywords)
        and path(node.func) is not None
    ):
        return node
    return None


def _target(node: ast.AST) -> str | None:
    """h where `node` is h = ..."""
    match node:
        case ast.Assign(targets=[ast.Name(id=name)]):
            return name
    return None


def _first_use(node: ast.expr | None, name: str) -> ast.Call | None:
    """The call act(name) in `node` in front of which only paths are evaluated."""
    while node is not None:
        call = _unary(node, keywords=("inplace",))
        if call is not None and isinstance(call.args[0], ast.Name) and call.args[0].id == name:
            return call
        match node:
            case ast.Call(func=ast.Attribute(value=value)) if path(value) is None:
                node = value
            case ast.Call(func=func, args=[first, *_]) if path(func) is not None:
                node = first
            case ast.BinOp(left=left):
                node = left
            case _:
                node = None
    return None


class _Joiner:
    def __init__(self, me: str, cells: frozenset[str], wanted: Callable[[Site], bool]) -> None:
        self.me, self.cells, self.wanted = me, cells, wanted
        self.found: list[Site] = []

    def block(self, body: list[ast.stmt]) -> list[ast.stmt]:
        """The statements of one block, rewritten."""
        todo, done = list(body), []
        while todo:
            s = todo.pop(0)
            if todo and isinstance(s, ast.If) and self.ends_in_norm(s, todo[0]):
                last = todo.pop(0)
                s.body.append(copy.deepcopy(last))
                s.orelse.append(last)
            elif todo and (pair := self.match(s, todo[0])):
                self.pair(*pair)
                continue
            self.inside(s)
            done.append(s)
        return done

    def match(self, s: ast.stmt, after: ast.stmt) -> tuple[ast.Call, ast.Call] | None:
        """(act(h), norm(x)) where s is h = norm(x) and `after` the only one to see that h."""
        name = _target(s)
        norm = _unary(s.value) if isinstance(s, ast.Assign) else None
        if name is None or norm is None or name == self.me or name in self.cells:
            return None
        if not isinstance(after, ast.Return) and _target(after) != name:
            return None
        assert isinstance(after, ast.Return | ast.Assign)
        act = _first_use(after.value, name)
        if act is None or sum(isinstance(n, ast.Name) and n.id == name for n in ast.walk(after.value or after)) != 1:
            return None
        return (act, norm) if self.wanted(_site(act, norm)) else None

    def ends_in_norm(self, s: ast.If, after: ast.stmt) -> bool:
        """Whether a branch of s ends with h = norm(x) for the statement behind s."""
        for branch in (s.body, s.orelse):
            last = branch[-1] if branch else None
            if isinstance(last, ast.If) and self.ends_in_norm(last, after):
                return True
            if last is not None and self.match(last, after):
                return True
        return False

    def inside(self, s: ast.stmt) -> None:
        """The expressions and the blocks of one statement."""
        match s:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                return
            # a handler may look at a name that is bound to the norm's result; so `try` stays as it is
            case ast.If() | ast.For() | ast.AsyncFor() | ast.While():
                s.body, s.orelse = self.block(s.body), self.block(s.orelse)
            case ast.With() | ast.AsyncWith():
                s.body = self.block(s.body)
        for child in ast.iter_child_nodes(s):
            self.expression(child)

    def expression(self, node: ast.AST) -> None:
        """act(norm(x)) in an expression, outside of functions of its own."""
        if isinstance(node, ast.stmt | ast.Lambda | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            return
        act = _unary(node, keywords=("inplace",))
        norm = _unary(act.args[0]) if act is not None else None
        if act is not None and norm is not None and self.wanted(_site(act, norm)):
            self.pair(act, norm)
        for child in ast.iter_child_nodes(node):
            self.expression(child)

    def pair(self, act: ast.Call, norm: ast.Call) -> None:
        """Make act(...) the one call."""
        self.found.append(_site(act, norm))
        both = ast.Attribute(ast.Name(self.me, ast.Load()), PAIR, ast.Load())
        act.args, act.func = [act.func, norm.func, norm.args[0]], both
        ast.fix_missing_locations(ast.copy_location(both, norm))
        ast.copy_location(both.value, norm)


def _site(act: ast.Call, norm: ast.Call) -> Site:
    a, n = path(act.func), path(norm.func)
    assert a is not None
    assert n is not None
    return Site(a, n, norm.lineno, norm.col_offset)
