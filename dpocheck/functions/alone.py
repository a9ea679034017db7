"""How is a function run whose file cannot be imported here?  With what it needs of the file, and nothing else.

A training script imports loggers, servers and its own package, of which a loss needs nothing.  Where such an import
fails, the statements that the function reaches are run one by one, under their own names and lines.  What cannot be had
becomes `Absent`: whoever uses it is told what was missing.
"""

from __future__ import annotations
import __future__

import ast
import hashlib
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpocheck.adapter import Unsupported

NOTE = "__dpocheck_not_imported__"  # in the module's names: why the file was not imported as a whole


class Missing(Unsupported, ImportError):
    """What a function needs of its file is not here: nothing can be said of the function, for or against it."""


class Absent:
    """Stands for what could not be imported or made.  Any use of it raises Missing with the reason."""

    def __init__(self, name: str, reason: str) -> None:
        self.__dict__.update(_name=name, _reason=reason)

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise Missing(f"{self._name} is not there: {self._reason}")

    __call__ = __getitem__ = __iter__ = __enter__ = _refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._refuse()


def module(path: Path, names: list[str], reason: BaseException) -> types.ModuleType | None:
    """A module with `names` (`function`, `Class.method`) of a file and what they reach; None where they are not there.

    `reason`: why the file itself could not be imported.
    """
    tree = ast.parse(path.read_bytes(), filename=str(path))
    wanted = {name.split(".")[0] for name in names}
    kept = _reached(tree, wanted)
    name = f"dpocheck_part_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    made = types.ModuleType(name)
    made.__file__ = str(path)
    setattr(made, NOTE, ": ".join([type(reason).__name__, *str(reason).splitlines()[:1]]))
    sys.modules[name] = made
    for statement in kept:
        for single in _singles(statement):
            _run(single, made, path)
    if all(isinstance(getattr(made, name, None), Absent | None) for name in wanted):
        del sys.modules[name]
        return None
    return made


def _run(statement: ast.stmt, made: types.ModuleType, path: Path) -> None:
    """Run one statement; what it would have bound is Absent where it fails."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):  # a register that is not here, for one
        statement.decorator_list = [d for d in statement.decorator_list if not _absent(d, made)]
    if isinstance(statement, ast.ClassDef):
        statement.bases = [base for base in statement.bases if not _absent(base, made)]
        decorated = [n for n in statement.body if any(_absent(d, made) for d in getattr(n, "decorator_list", ()))]
        statement.body = [n for n in statement.body if n not in decorated] or [ast.Pass()]
    code = compile(
        ast.Module([statement], []), str(path), "exec", __future__.annotations.compiler_flag, dont_inherit=True
    )
    try:
        exec(code, vars(made))
    except Exception as error:
        for name in _bound(statement):
            setattr(made, name, Absent(name, str(error)))


def _absent(expression: ast.expr, made: types.ModuleType) -> bool:
    root = next((n.id for n in ast.walk(expression) if isinstance(n, ast.Name)), "")
    return isinstance(getattr(made, root, None), Absent)


def _reached(tree: ast.Module, wanted: set[str]) -> list[ast.stmt]:
    """The statements at the top of a file that bind what `wanted` uses, directly or not, in their order."""
    found: set[int] = set()
    todo, seen = set(wanted), set()
    while todo:
        name = todo.pop()
        seen.add(name)
        for number, statement in enumerate(tree.body):
            if name in _bound(statement) and number not in found:
                found.add(number)
                todo |= set(_used(statement)) - seen
    stars = {n for n, s in enumerate(tree.body) if isinstance(s, ast.ImportFrom) and s.names[0].name == "*"}
    return [tree.body[number] for number in sorted(found | stars)]


def _bound(statement: ast.stmt) -> set[str]:
    """The names that a statement gives the module."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.If | ast.Try | ast.With):
        inner = [s for s in ast.walk(statement) if isinstance(s, ast.stmt) and s is not statement]
        return {name for s in inner for name in _bound(s)}
    return {n.id for n in ast.walk(statement) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def _used(statement: ast.stmt) -> Iterator[str]:
    """The names that running a statement, or calling what it defines, may ask for; annotations ask for nothing."""
    skipped: set[int] = set()
    for node in ast.walk(statement):
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if annotation is not None:
                skipped |= {id(inner) for inner in ast.walk(annotation)}
    own: dict[int, set[str]] = {}  # node -> names that are local where it stands
    for function in ast.walk(statement):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            local = _local(function)
            for inner in ast.walk(function):
                own.setdefault(id(inner), set()).update(local)
    for node in ast.walk(statement):
        read = isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and id(node) not in skipped
        if read and node.id not in own.get(id(node), ()):
            yield node.id


def _local(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> set[str]:
    """Parameters of a function and what it assigns."""
    given = function.args
    named = {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg) if a}
    declared = {name for n in ast.walk(function) if isinstance(n, ast.Global) for name in n.names}
    stored = {n.id for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return named | (stored - declared)


def _singles(statement: ast.stmt) -> Iterator[ast.stmt]:
    """`from a import b, c` name by name: one that is missing does not take the others with it."""
    if not isinstance(statement, ast.Import | ast.ImportFrom):
        yield statement
        return
    for alias in statement.names:
        fields = {f: getattr(statement, f) for f in statement._fields} | {"names": [alias]}
        yield ast.copy_location(type(statement)(**fields), statement)
