"""Which functions of a file can be audited, and as what?  Read from its text: the file is never imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dpocheck.functions import forms, source_facts
from dpocheck.functions.forms import EXAMPLES, Match, Refusal
from dpocheck.functions.parameters import NotRecognised, Parameter, option, spelled, words
from dpocheck.functions.source_facts import Facts


@dataclass(frozen=True)
class Candidate:
    """A function that is recognised.  `name`: `function`, `Class.method`, or `Class` where its call is the loss.

    `form`: loss, sequence_logps or step.  `fixed`: options that it has hard-coded, (name, value) each.
    """

    name: str
    form: str
    parameters: tuple[str, ...]
    line: int
    fixed: tuple[tuple[str, float], ...] = ()
    by: str = "names"
    rank: int = 0  # among those of one form, the lowest is audited where no name is given

    def __str__(self) -> str:
        fixed = "".join(f", {key} fixed at {value:g}" for key, value in self.fixed)
        return f"{self.name}({', '.join(self.parameters)}), line {self.line}: {self.form}, by {self.by}{fixed}"


@dataclass(frozen=True)
class _Definition:
    name: str
    node: source_facts.Function
    owner: ast.ClassDef | None
    static: bool


def candidates(path: str | Path) -> list[Candidate]:
    """All that is recognised in a file, in its order.  Raises NotRecognised for a file that cannot be read."""
    tree = _parse(Path(path))
    found = (_judge(tree, definition, asked=False) for definition in _definitions(tree))
    return [one for one in found if isinstance(one, Candidate)]


def passed_over(path: str | Path) -> list[str]:
    """Functions that by their names are losses of pairs and that are not recognised, each with its line and reason."""
    tree = _parse(Path(path))
    found = []
    for one in _definitions(tree):
        judged = _judge(tree, one, asked=False)
        if isinstance(judged, Refusal) and {*words(one.name.rpartition(".")[2])} & forms.PAIR_WORDS:
            signature = spelled(source_facts.parameters(one.node))
            found.append(f"{one.name}({signature}), line {one.node.lineno}: {judged.reason}")
    return found


def recognise(path: str | Path, name: str | None = None) -> list[Candidate]:
    """The candidate called `name`, or without a name the plainest of each form.

    `name` may be several joined by commas.  Raises NotRecognised: what was given, which forms there are, what to do.
    A name that this file only imports or builds by a call has no parameters here; it comes back with form "unknown".
    """
    path = Path(path)
    if name is None:
        found = candidates(path)
        if not found:
            raise NotRecognised(_nothing(path))
        first = {one.form: one for one in sorted(found, key=lambda one: (-one.rank, -one.line))}
        return [one for one in found if first[one.form] is one]
    tree = _parse(path)
    return [_named(path, tree, part.strip()) for part in name.split(",")]


def _named(path: Path, tree: ast.Module, name: str) -> Candidate:
    definitions = list(_definitions(tree))
    matching = [d for d in definitions if d.name == name]
    reasons = []
    for definition in matching:
        judged = _judge(tree, definition, asked=True)
        if isinstance(judged, Candidate):
            return judged
        reasons.append(judged.reason)
    classes = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef)}
    if name in classes:
        inside = [d for d in definitions if d.name.startswith(name + ".")]
        judged = [_judge(tree, d, asked=False) for d in inside]
        known = [one for one in judged if isinstance(one, Candidate)]
        if known:
            return known[0]
        if not matching and (classes[name].bases or not inside):
            return Candidate(name, "unknown", (), classes[name].lineno)
        reasons += [f"{d.name}: {j.reason}" for d, j in zip(inside, judged, strict=True) if isinstance(j, Refusal)]
    elif not matching:
        top = _assigned(tree)
        if name.split(".")[0] in top and (name.split(".")[0] not in classes):
            return Candidate(name, "unknown", (), top[name.split(".")[0]])
        raise NotRecognised(_absent(path, name, [d.name for d in definitions] + list(classes)))
    raise NotRecognised(_refused(path, name, reasons))


def _parse(path: Path) -> ast.Module:
    if path.is_dir() or not path.exists():
        raise NotRecognised(f"{path} is not a file; give the path of a Python file, as train.py or train.py:dpo_loss")
    try:
        return ast.parse(path.read_bytes(), filename=str(path))
    except SyntaxError as error:
        raise NotRecognised(
            f"{path}, line {error.lineno}: {error.msg}.  The file does not parse under this Python; mend it first"
        ) from None
    except (OSError, ValueError) as error:
        raise NotRecognised(f"{path} cannot be read as Python: {error}") from None


def _definitions(tree: ast.Module) -> Iterator[_Definition]:
    """Functions, lambdas with a name, and methods, at the top of a file and inside its `if` and `try` blocks."""
    for node in _top(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield _Definition(node.name, node, None, True)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            if isinstance(node.targets[0], ast.Name):
                yield _Definition(node.targets[0].id, node.value, None, True)
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef):
                    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in inner.decorator_list)
                    own = inner.name in ("forward", "__call__")
                    yield _Definition(node.name if own else f"{node.name}.{inner.name}", inner, node, static)


def _top(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With):
            yield from _top(node.body)
            yield from _top(getattr(node, "orelse", []))


def _judge(tree: ast.Module, definition: _Definition, *, asked: bool) -> Candidate | Refusal:
    node, owner = definition.node, definition.owner
    short = definition.name.rpartition(".")[2]
    if isinstance(node, ast.AsyncFunctionDef):
        return Refusal("an async function; a function that returns its result is audited")
    if source_facts.is_generator(node):
        return Refusal("a generator; a function that returns its result is audited")
    if not asked and short.startswith("__"):
        return Refusal("a special method")
    parameters = source_facts.parameters(node)
    method = owner is not None and not definition.static
    if method and parameters and parameters[0].name in ("self", "cls"):
        parameters = parameters[1:]
    elif parameters and parameters[0].name == "self":
        if source_facts.reads(node, "self"):
            return Refusal("it wants `self`, and is not defined in a class; name it through its class, as Class.method")
        parameters = parameters[1:]
    name = getattr(node, "name", short)
    title = owner.name if method else ""
    match = forms.recognise(name, parameters, title)
    if isinstance(match, Refusal):
        return match
    facts = source_facts.facts(tree, node, owner)
    doubt = forms.uncallable(match, facts) or (None if asked else forms.doubt(match, name, title, facts))
    if doubt:
        return Refusal(doubt)
    return Candidate(
        definition.name,
        match.form,
        tuple(p.name for p in parameters),
        node.lineno,
        _fixed(facts, parameters, match),
        match.by,
        forms.rank(match, definition.name),
    )


def _fixed(facts: Facts, parameters: tuple[Parameter, ...], match: Match) -> tuple[tuple[str, float], ...]:
    """Beta, where it is a literal of the function and nowhere to be set."""
    names = {p.name for p in parameters} | facts.attributes | facts.globals
    known = {option(name) for name in names} | {key for key, _ in match.options}
    if match.form != "loss" or known & {"beta", "config"} or len(facts.numbers) != 1:
        return ()
    return (("beta", facts.numbers[0]),)


def _assigned(tree: ast.Module) -> dict[str, int]:
    """Names a file binds otherwise than by a definition: imports and assignments."""
    found = {}
    for node in _top(tree.body):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0]: node.lineno for alias in node.names}
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        found |= {target.id: node.lineno for target in targets if isinstance(target, ast.Name)}
    return found


def _forms() -> str:
    return "\n".join(["Known forms, by parameter names:", *(f"  {form}: {text}" for form, text in EXAMPLES.items())])


def _nothing(path: Path) -> str:
    tree = _parse(path)
    lines = [f"{path}: no function here is recognised."]
    for definition in list(_definitions(tree))[:8]:
        judged = _judge(tree, definition, asked=False)
        signature = spelled(source_facts.parameters(definition.node))
        if isinstance(judged, Refusal):
            lines.append(f"  {definition.name}({signature}), line {definition.node.lineno}: {judged.reason}")
    return "\n".join([*lines, _forms(), f"Name one ({path}:NAME), rename its parameters, or write an adapter."])


def _absent(path: Path, name: str, names: list[str]) -> str:
    near = get_close_matches(name, names, 3, 0.5)
    hint = f"Did you mean {' or '.join(near)}?" if near else f"Defined are: {', '.join(names)[:300] or 'no functions'}."
    return f"{path} has no {name!r}.  {hint}"


def _refused(path: Path, name: str, reasons: list[str]) -> str:
    lines = [f"{path}:{name} is none of the forms that are audited without an adapter."]
    lines += [f"  {reason}" for reason in dict.fromkeys(reasons)]
    return "\n".join([*lines, _forms(), "Rename its parameters so, or write an adapter (dpocheck new-adapter)."])
