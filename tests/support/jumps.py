"""Loops in a `try` or `with` which jump back where its handler does not guard them, on the interpreter that runs this.

CPython runs signal handlers at a jump backward: at the end of each turn of a loop, also of a comprehension's. What they
raise goes to the handler that the compiler has noted for a certain place. Often it has noted none where the source has
one, and then the exception passes an `except`, a `finally` or a `with` by.

    3.10           frames keep a stack of the blocks that they are in: every such jump is guarded
    3.11, 3.12     the exception table has a handler, or none, for the instruction before the jump's target
    3.13 and later the exception table has a handler, or none, for the jump. In 3.13.0 and 3.14 it has none if the jump
                   ends a turn early: an `if` ends the loop, or a comprehension has a condition, or it is `any(...)`

Not listed are jumps that leave their `try` in the source, too, as by `continue` of a loop around it; nor loops in a
`contextlib.suppress`, which what a signal handler raises is to pass by.
"""

from __future__ import annotations

import ast
import dis
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_LOOPS = (ast.For, ast.AsyncFor, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True, order=True)
class Gap:
    """A loop that jumps back unguarded: its function, its line, and the line of the `try` or `with`."""

    file: str
    function: str
    line: int
    guard: int


@dataclass(frozen=True)
class _Guard:
    """A `try` or `with`: its line, the lines of the loops in it, and the lines of its handler."""

    line: int
    loops: list[range]
    handler: range


def unguarded_jumps(source: str, file: str) -> list[Gap]:
    """Those of a file with that source."""
    if sys.version_info < (3, 11):
        return []
    tree = ast.parse(source)
    guards = {first: list(_guards(function)) for first, function in _functions(tree)}
    return sorted(
        {
            Gap(file, code.co_name, line, guard.line)
            for code in _codes(compile(tree, file, "exec"))
            for guard in guards.get(code.co_firstlineno, ())
            for line in _unguarded_loops(code, guard)
        }
    )


def _functions(tree: ast.AST) -> Iterator[tuple[int, ast.AST]]:
    """All functions, by their first lines as code objects have them."""
    for node in ast.walk(tree):
        if isinstance(node, _FUNCTIONS):
            yield min(part.lineno for part in (node, *getattr(node, "decorator_list", ()))), node


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, CodeType):
            yield from _codes(const)


def _guards(function: ast.AST) -> Iterator[_Guard]:
    """Those of a function that have loops."""
    for node in _own_nodes(function):
        if isinstance(node, ast.Try):
            if node.handlers:
                yield _Guard(node.lineno, _loops(node.body), _lines(node.handlers))
            if node.finalbody:
                yield _Guard(node.lineno, _loops([*node.body, *node.handlers, *node.orelse]), _lines(node.finalbody))
        elif isinstance(node, (ast.With, ast.AsyncWith)) and "suppress(" not in ast.unparse(node.items[0]):
            yield _Guard(node.lineno, _loops(node.body), range(node.lineno, node.body[0].lineno))


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """What is in a function, without what is in the functions in it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, _FUNCTIONS):
            yield child
            yield from _own_nodes(child)


def _loops(guarded: Sequence[ast.AST]) -> list[range]:
    nodes = [node for part in guarded for node in (part, *_own_nodes(part)) if isinstance(node, _LOOPS)]
    return [_lines([node]) for node in nodes]


def _lines(nodes: Sequence[Any]) -> range:
    return range(nodes[0].lineno, nodes[-1].end_lineno + 1)


def _unguarded_loops(code: CodeType, guard: _Guard) -> Iterator[int]:
    """The lines of that code's loops which stand in the guard, and jump back where it does not guard them."""
    instructions = {instruction.offset: instruction for instruction in dis.get_instructions(code)}
    lines, line = {}, 0
    for offset, instruction in instructions.items():
        line = lines[offset] = instruction.positions.lineno or line
    for offset, jump in instructions.items():
        if "JUMP_BACKWARD" not in jump.opname or "NO_INTERRUPT" in jump.opname:
            continue
        if any(lines[offset] in loop and lines[jump.argval] in loop for loop in guard.loops):
            place = offset if sys.version_info >= (3, 13) else jump.argval - 2
            handlers = [instructions[target + 2].positions.lineno for target in _handlers(code, place)]
            if not any(line in guard.handler for line in handlers):
                yield lines[jump.argval]


def _handlers(code: CodeType, place: int) -> Iterator[int]:
    """Where the handlers begin to which an exception at that place goes, the innermost first."""
    seen: set[int] = set()
    while place not in seen:
        seen.add(place)
        for entry in dis._parse_exception_table(code):  # type: ignore[attr-defined]
            if entry.start <= place < entry.end:
                place = entry.target
                if dis.opname[code.co_code[place]] == "PUSH_EXC_INFO":  # others only clean up, and raise it again
                    yield place
                break
