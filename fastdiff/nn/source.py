"""A function's source as a syntax tree that is proved to be what runs, and the function that a changed tree makes.

The proof: compiled again, the unchanged source gives the very bytecode of the function. A file that was edited since, a
function that was rewritten by somebody else, or one without a source gives None.
"""

from __future__ import annotations

import ast
import copy
import functools
import linecache
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any

_COMPARED = (
    *("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_flags"),
    *("co_argcount", "co_posonlyargcount", "co_kwonlyargcount", "co_qualname"),
)


def read(f: FunctionType) -> ast.FunctionDef | None:
    """The definition of `f`, the caller's to change; None where it cannot be proved."""
    found = _proved(f.__code__, "".join(linecache.getlines(f.__code__.co_filename, f.__globals__)))
    return None if found is None else copy.deepcopy(found[1])


def replaced(f: FunctionType, node: ast.FunctionDef) -> FunctionType:
    """`f` with the body of `node`, a changed `read(f)`: same globals, closure, defaults and line numbers."""
    found = _proved(f.__code__, "".join(linecache.getlines(f.__code__.co_filename, f.__globals__)))
    assert found is not None, f.__qualname__
    tree, old = found
    kept, old.body = old.body, node.body
    try:
        code = _code(tree, f.__code__)
    finally:
        old.body = kept
    assert code is not None
    assert code.co_freevars == f.__code__.co_freevars
    new = FunctionType(code, f.__globals__, f.__name__, f.__defaults__, f.__closure__)
    return _dressed(new, f)


def unwrapped(f: FunctionType) -> tuple[FunctionType, Callable[[FunctionType], FunctionType]] | None:
    """The function inside decorators that keep it in a cell, as functools.wraps' do, and what puts another there.

    None where a decorator keeps it elsewhere.
    """
    inner = f.__dict__.get("__wrapped__")
    if inner is None:
        return f, lambda new: new
    held = [i for i, cell in enumerate(f.__closure__ or ()) if _content(cell) is inner]
    deeper = unwrapped(inner) if isinstance(inner, FunctionType) and len(held) == 1 else None
    if deeper is None:
        return None
    core, inside = deeper

    def around(new: FunctionType) -> FunctionType:
        cells = list(f.__closure__ or ())
        cells[held[0]] = CellType(inside(new))
        return _dressed(FunctionType(f.__code__, f.__globals__, f.__name__, f.__defaults__, tuple(cells)), f)

    return core, around


def _dressed(new: FunctionType, f: FunctionType) -> FunctionType:
    """`new` with everything of `f` that is no code."""
    wrapped = f.__dict__.get("__wrapped__")
    functools.update_wrapper(new, f)
    new.__kwdefaults__ = f.__kwdefaults__
    new.__dict__.pop("__wrapped__")
    if wrapped is not None:
        new.__dict__["__wrapped__"] = wrapped
    return new


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return None


@functools.cache
def _proved(code: CodeType, text: str) -> tuple[ast.Module, ast.FunctionDef] | None:
    """The part of the file `text` that defines `code`, and the definition in it."""
    whole = _parsed(text)
    # the compiler looks at what else the file imports; other definitions do not matter to it
    rest = [s for s in whole.body if not isinstance(s, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]
    for top in whole.body:
        for node in ast.walk(top):
            if isinstance(node, ast.FunctionDef) and (node.name, _line(node)) == (code.co_name, code.co_firstlineno):
                tree = ast.Module([*(s for s in rest if s is not top), top], [])
                again = _code(tree, code)
                return (tree, node) if again is not None and _same(again, code) else None
    return None


@functools.cache
def _parsed(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except SyntaxError:  # a notebook's magic, or another file by now
        return ast.Module([], [])


def _line(node: ast.FunctionDef) -> int:
    return min([node.lineno, *(d.lineno for d in node.decorator_list)])


def _code(tree: ast.Module, like: CodeType) -> CodeType | None:
    """The code of the function `like` in `tree`."""
    compiled = compile(tree, like.co_filename, "exec", dont_inherit=True)
    fits = (c for c in _codes(compiled) if (c.co_qualname, c.co_firstlineno) == (like.co_qualname, like.co_firstlineno))
    return next(fits, None)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _same(a: CodeType, b: CodeType) -> bool:
    return (
        all(getattr(a, name) == getattr(b, name) for name in _COMPARED)
        and len(a.co_consts) == len(b.co_consts)
        and all(
            _same(x, y) if isinstance(x, CodeType) and isinstance(y, CodeType) else repr(x) == repr(y)
            for x, y in zip(a.co_consts, b.co_consts, strict=True)
        )
    )
