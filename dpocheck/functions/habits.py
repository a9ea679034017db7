"""How does the text of a function treat its models, its rows and its labels?  What decides how it can be called."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from dpocheck.functions.parameters import concept, option, words

FOREIGN = {"jax", "mlx", "tensorflow", "flax", "paddle", "tinygrad"}  # arrays that functions are not given here
LENGTHS = {
    "max_len", "max_seq_len", "max_length", "max_seq_length", "block_size", "context_length", "context_size", "ctx_len",
    "n_ctx", "max_position_embeddings",
}  # fmt: skip
SEQUENCE = {"seq", "t", "time", "timesteps"}
BATCH = {"b", "batch", "bsz", "bs", "n"}
ENCODER_DECODER = {"decoder_input_ids", "decoder_attention_mask"}


@dataclass(frozen=True)
class Habits:
    """Of a function and what it calls in its own file."""

    libraries: frozenset[str] = frozenset()  # top names of the modules that it uses
    sequence_first: bool = False  # takes rows as (sequence, batch)
    first: str = ""  # which half of the rows comes first, as it names them: chosen, rejected, or it does not say
    lists: frozenset[str] = frozenset()  # parameters that it takes as lists of ids
    sentinel: str = ""  # which labels are left out beside -100: zero, pad
    callers_give_ids: bool = False  # those who call it hand over as labels what they hand to the model
    lengths: frozenset[str] = frozenset()  # attributes of a model that say how long a row may be
    beside: str = ""  # what a model gets in the place of the attention mask, that is none
    hands_attention: bool = False  # some mask reaches a model


NONE = Habits()


def read(tree: ast.Module, node: ast.AST, reached: list[ast.AST], inside: list[ast.AST], labels: str) -> Habits:
    """The habits of `node`.  `reached`: it and what it calls; `inside`: their nodes; `labels`: its parameter of labels.
    """
    calls = [n for n in inside if isinstance(n, ast.Call)]
    of_models = [call for call in calls if _is_model(call.func)]
    return Habits(
        libraries=frozenset(_libraries(tree, inside)),
        sequence_first=any(_sequence_first(n) for n in inside),
        first=_first(inside),
        lists=frozenset(_lists(node, calls)),
        sentinel=next((said for n in inside if (said := _sentinel(n))), ""),
        callers_give_ids=bool(labels) and _callers_give_ids(tree, node, labels),
        lengths=frozenset(n.attr for n in inside if isinstance(n, ast.Attribute) and _is_length(n)),
        beside=next((name for call in of_models if (name := _beside(call))), ""),
        hands_attention=any(_hands(call) for call in calls) or any(len(call.args) > 1 for call in of_models),
    )


def _name(node: ast.AST) -> str:
    """The last name of an expression: `b["x"]` is x, `a.b` is b."""
    if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and isinstance(node.slice.value, str):
        return node.slice.value
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Call):
        return _name(node.func.value) if isinstance(node.func, ast.Attribute) else ""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_model(called: ast.expr) -> bool:
    """`model(...)`, `self.policy_model(...)`, `model.forward(...)`"""
    if isinstance(called, ast.Attribute) and called.attr == "forward":
        called = called.value
    said = concept(_name(called)) if isinstance(called, ast.Name | ast.Attribute) else None
    return said is not None and said.what == "model" and not said.which


def _libraries(tree: ast.Module, inside: list[ast.AST]) -> Iterator[str]:
    imported = {}
    for node in (*ast.walk(tree),):
        if isinstance(node, ast.Import):
            imported |= {(a.asname or a.name).split(".")[0]: a.name.split(".")[0] for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported |= {a.asname or a.name: node.module.split(".")[0] for a in node.names}
    for node in inside:
        if isinstance(node, ast.Name) and node.id in imported:
            yield imported[node.id]


def _sequence_first(node: ast.AST) -> bool:
    """`seq_len, batch_size = tokens.shape`"""
    if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Tuple):
        return False
    value = node.value.func if isinstance(node.value, ast.Call) else node.value
    if not isinstance(value, ast.Attribute) or value.attr not in ("shape", "size"):
        return False
    names = [{*words(_name(n))} for n in node.targets[0].elts[:2]]
    return len(names) == 2 and bool(names[0] & SEQUENCE) and bool(names[1] & BATCH)


def _first(inside: list[ast.AST]) -> str:
    """`rejected, chosen = split(logps)`, `chosen = logps[:n]`: the half that all such lines put first."""
    found = set()
    for target, value in (pair for node in inside if isinstance(node, ast.Assign) for pair in _assigned(node)):
        if isinstance(target, ast.Tuple):
            sides = [concept(_name(n)).which for n in target.elts]
            if sorted(sides) == ["chosen", "rejected"]:
                found.add(sides[0])
            continue
        cut = next((n.slice for n in ast.walk(value) if isinstance(n, ast.Subscript)), None)
        which = concept(_name(target)).which
        if isinstance(cut, ast.Slice) and cut.step is None and which and (cut.lower is None) != (cut.upper is None):
            other = {"chosen": "rejected", "rejected": "chosen"}[which]
            found.add(which if cut.lower is None else other)
    return found.pop() if len(found) == 1 else ""


def _assigned(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """`a, b = x, y` name by name."""
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        yield from zip(target.elts, value.elts, strict=True)
    else:
        yield target, value


def _lists(node: ast.AST, calls: list[ast.Call]) -> Iterator[str]:
    """Parameters annotated as lists of numbers, or made lists of."""
    arguments = getattr(node, "args", None)
    for arg in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if arguments else ():
        said = ast.unparse(arg.annotation) if arg.annotation else ""
        made = any(_name(c.func) == "list" and c.args and _is_name(c.args[0], arg.arg) for c in calls)
        if re.search(r"\b([Ll]ist|Sequence)\[int\]", said) or made:
            yield arg.arg


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _sentinel(node: ast.AST) -> str:
    """`labels != 0`, `labels.ne(pad_token_id)`"""
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.Eq | ast.NotEq):
        sides = [node.left, node.comparators[0]]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("eq", "ne"):
        sides = [node.func.value, *node.args[:1]]
    else:
        return ""
    if len(sides) != 2 or isinstance(sides[0], ast.Constant) or concept(_name(sides[0])).what != "labels":
        return ""
    if isinstance(sides[1], ast.Constant):
        return "zero" if sides[1].value == 0 and type(sides[1].value) is int else ""
    return "pad" if option(_name(sides[1])) == "pad" else ""


def _callers_give_ids(tree: ast.Module, node: ast.AST, labels: str) -> bool:
    """Do all who call it hand over as labels the very name that they hand to a model?"""
    arguments = node.args  # type: ignore[attr-defined]
    names = [arg.arg for arg in (*arguments.posonlyargs, *arguments.args) if arg.arg not in ("self", "cls")]
    told = []
    for function in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)):
        calls = [n for n in ast.walk(function) if isinstance(n, ast.Call)]
        given = {a.id for c in calls if _is_model(c.func) for a in _arguments(c) if isinstance(a, ast.Name)}
        for call in calls:
            if _name_of_call(call) == getattr(node, "name", None):
                passed = dict(zip(names, call.args, strict=False)) | {k.arg: k.value for k in call.keywords}
                value = passed.get(labels)
                told.append(isinstance(value, ast.Name) and value.id in given)
    return bool(told) and all(told)


def _name_of_call(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else _name(call.func)


def _arguments(call: ast.Call) -> Iterable[ast.expr]:
    return (*call.args[:1], *(k.value for k in call.keywords if k.arg == "input_ids"))


def _is_length(node: ast.Attribute) -> bool:
    said = concept(_name(node.value)) if isinstance(node.value, ast.Name | ast.Attribute) else None
    return node.attr in LENGTHS and said is not None and said.what == "model"


def _beside(call: ast.Call) -> str:
    """What stands second in a call of a model, where that is no mask; or what only an encoder-decoder takes."""
    wrong = next((k.arg for k in call.keywords if k.arg in ENCODER_DECODER), "")
    if wrong or len(call.args) < 2 or isinstance(call.args[1], ast.Constant | ast.Starred):
        return wrong or ""
    name = _name(call.args[1])
    return "" if not name or concept(name).what in ("attention", "mask", "completion", "") else name


def _hands(call: ast.Call) -> bool:
    return any(k.arg is None or concept(k.arg).what in ("attention", "mask") for k in call.keywords)
