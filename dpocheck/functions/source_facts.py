"""What does the source text of a function say about how it wants to be called?  `ast` only; nothing is imported.

Followed are the functions of the same file that it calls, and the methods of its own class.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field

from dpocheck.functions import habits
from dpocheck.functions.habits import Habits
from dpocheck.functions.parameters import Parameter, admits_none, concept, option

Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda


@dataclass(frozen=True)
class Facts:
    """Of a function and what it calls in its own file."""

    strings: frozenset[str] = frozenset()  # string constants, the docstrings left out
    attributes: frozenset[str] = frozenset()  # read from `self`
    globals: frozenset[str] = frozenset()  # names of the file's own constants that it reads
    fields: frozenset[str] = frozenset()  # attributes read from anything
    numbers: tuple[float, ...] = ()  # literals that may be a fixed beta, of the function alone
    calls: frozenset[str] = frozenset()  # last names of what is called
    attention_keys: frozenset[str] = frozenset()  # keys and names handed on as `attention_mask=`
    shifts: bool = False  # moves logits or labels by one itself
    callers_shift: bool = False  # those who call it hand over moved tensors
    ignores: bool = False  # knows the label -100
    unpacks: bool = False  # takes a model's output apart as a tuple
    foreign: frozenset[str] = frozenset()  # read from `self`, and set nowhere in a class that can be built
    nested: bool = False  # batch["chosen"]["input_ids"]
    alternates: bool = False  # takes every second row
    paired: bool = False  # takes a parameter apart: `logps[0]`, `logps[1]`, or `a, b = logps`
    unsqueezed: frozenset[str] = frozenset()  # names that are given a batch axis: `ids.unsqueeze(0)`, `ids[None]`
    asked_of_models: frozenset[str] = frozenset()  # methods of models that a model of transformers does not have
    habits: Habits = habits.NONE
    known: bool = field(default=True)  # False: there is no source to read


NOTHING = Facts(known=False)
MODEL_METHODS = {
    "forward", "generate", "parameters", "named_parameters", "buffers", "named_buffers", "modules", "named_modules",
    "children", "named_children", "train", "eval", "to", "cuda", "cpu", "float", "half", "double", "bfloat16",
    "zero_grad", "state_dict", "load_state_dict", "requires_grad_", "apply", "get_parameter", "get_submodule",
    "register_forward_hook", "gradient_checkpointing_enable", "gradient_checkpointing_disable",
    "enable_input_require_grads", "get_input_embeddings", "get_output_embeddings", "resize_token_embeddings",
    "save_pretrained", "num_parameters", "compile", "tie_weights", "__call__", "model", "lm_head",
}  # fmt: skip


def parameters(node: Function) -> tuple[Parameter, ...]:
    """The parameters of a definition, in order, defaults where they are literals."""
    given = node.args
    positional = [*given.posonlyargs, *given.args]
    optional = len(positional) - len(given.defaults)
    found = [
        Parameter(arg.arg, "positional", i < optional, None if i < optional else _literal(given.defaults[i - optional]),
                  _nullable(arg))
        for i, arg in enumerate(positional)
    ]  # fmt: skip
    if given.vararg:
        found.append(Parameter(given.vararg.arg, "star", False))
    for arg, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        literal = None if default is None else _literal(default)
        found.append(Parameter(arg.arg, "keyword", default is None, literal, _nullable(arg)))
    if given.kwarg:
        found.append(Parameter(given.kwarg.arg, "stars", False))
    return tuple(found)


def _nullable(arg: ast.arg) -> bool:
    return arg.annotation is not None and admits_none(ast.unparse(arg.annotation))


def _literal(node: ast.expr) -> object:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None


def is_generator(node: Function) -> bool:
    """Does it yield, itself?"""
    return any(isinstance(inner, ast.Yield | ast.YieldFrom) for inner in _own(node))


def _own(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes inside, but not inside functions defined within."""
    for child in ast.iter_child_nodes(node):
        yield child
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from _own(child)


def reads(node: Function, name: str) -> bool:
    """Is a name read anywhere in a function?"""
    return any(_is_name(inner, name) for inner in ast.walk(node))


def _always(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes inside that no condition stands before."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.If | ast.IfExp | ast.Try | ast.FunctionDef | ast.Lambda):
            yield child
            yield from _always(child)


def facts(tree: ast.Module, node: Function, owner: ast.ClassDef | None = None) -> Facts:
    """The facts of the function `node` of the file `tree`; `owner` is the class it is a method of."""
    reached = _reached(tree, node, owner)
    inside = [inner for function in reached for inner in ast.walk(function) if not _is_docstring(function, inner)]
    name = getattr(node, "name", "")
    return Facts(
        strings=frozenset(n.value for n in inside if isinstance(n, ast.Constant) and isinstance(n.value, str)),
        attributes=frozenset(n.attr for n in inside if isinstance(n, ast.Attribute) and _is_name(n.value, "self")),
        globals=_constants(tree) & frozenset(n.id for n in inside if isinstance(n, ast.Name)),
        fields=frozenset(n.attr for n in inside if isinstance(n, ast.Attribute)),
        numbers=_numbers(node),
        calls=frozenset(_last(n.func) for n in inside if isinstance(n, ast.Call)),
        attention_keys=frozenset(k for n in inside if isinstance(n, ast.Call) for k in _attention(n, reached)),
        shifts=any(_moves(n) for n in inside),
        callers_shift=bool(name) and _callers_move(tree, name),
        ignores=any(isinstance(n, ast.Constant) and n.value == 100 and not isinstance(n.value, bool) for n in inside)
        or any("ignore" in word.lower() for word in _names(inside)),
        unpacks=any(_unpacks(n) for n in inside) or _first_of_output(inside),
        foreign=_foreign(inside, owner),
        nested=any(_nests(n) for n in inside),
        alternates=any(isinstance(n, ast.Slice) and _one(n.step, 2) for n in inside),
        paired=any(_takes_apart(n, {p.name for p in parameters(node)}) for n in inside),
        unsqueezed=frozenset(name for n in ast.walk(node) if (name := _unsqueezed(n))),
        asked_of_models=frozenset(m for f in reached for n in _always(f) if (m := _asked_of_model(n))) - MODEL_METHODS,
        habits=habits.read(tree, node, reached, inside, _labels(node)),
    )


def _labels(node: Function) -> str:
    """The name of the parameter of labels; empty where there is none."""
    return next((p.name for p in parameters(node) if concept(p.name).what == "labels" and p.name != "self"), "")


def _reached(tree: ast.Module, node: Function, owner: ast.ClassDef | None) -> list[Function]:
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    methods = {n.name: n for n in owner.body if isinstance(n, ast.FunctionDef)} if owner else {}
    found, todo = [node], [node]
    while todo:
        for inner in ast.walk(todo.pop()):
            called = None
            if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Name):
                called = functions.get(inner.func.id)
            elif isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute):
                called = methods.get(inner.func.attr) if _is_name(inner.func.value, "self") else None
            if called is not None and called not in found:
                found.append(called)
                todo.append(called)
    return found


def _foreign(inside: list[ast.AST], owner: ast.ClassDef | None) -> frozenset[str]:
    if owner is None:
        return frozenset()
    read = {n.attr for n in inside if isinstance(n, ast.Attribute) and _is_name(n.value, "self")}
    for node in owner.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            read.discard(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            read -= {t.id for t in getattr(node, "targets", [getattr(node, "target", None)]) if isinstance(t, ast.Name)}
    if _buildable(owner):
        read -= {
            n.attr for n in ast.walk(owner) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)
        }  # set by its constructor
    return frozenset(name for name in read if not is_known(name))


def is_known(name: str) -> bool:
    """Can an attribute or a constructor's parameter of this name be given?"""
    said = concept(name)
    models = said.what in ("model", "optimizer") and not said.which
    return option(name) is not None or models


def _buildable(owner: ast.ClassDef) -> bool:
    """Does its constructor want nothing but what is known, and its bases nothing at all?"""
    if any(_last(base) not in ("object", "Module", "ABC", "Protocol") for base in owner.bases):
        return False
    made = next((n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    return made is None or all(is_known(p.name) for p in parameters(made)[1:] if p.required)


def _constants(tree: ast.Module) -> frozenset[str]:
    return frozenset(t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name))


def _is_docstring(function: Function, node: ast.AST) -> bool:
    body = getattr(function, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    return isinstance(first, ast.Expr) and first.value is node


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _names(nodes: list[ast.AST]) -> Iterator[str]:
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.keyword) and node.arg:
            yield node.arg


def _last(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _numbers(node: Function) -> tuple[float, ...]:
    """Float literals that can be a temperature: clamps, halves, ones and defaults are none."""
    body = node.body if isinstance(node.body, list) else [node.body]
    found = []
    for statement in body:
        for inner in ast.walk(statement):
            if isinstance(inner, ast.Constant) and type(inner.value) is float and 1e-3 < inner.value <= 10:
                found.append(inner.value)
    return tuple(number for number in dict.fromkeys(found) if number not in (1.0, 2.0))


def _one(node: ast.AST | None, value: int) -> bool:
    return node is not None and _literal(node) == value  # type: ignore[arg-type]


def _moves(node: ast.AST) -> bool:
    """A slice that drops the first or the last position, or a roll."""
    if isinstance(node, ast.Slice):
        return (_one(node.upper, -1) and node.lower is None) or (_one(node.lower, 1) and node.upper is None)
    return isinstance(node, ast.Call) and _last(node.func) == "roll"


def _callers_move(tree: ast.Module, name: str) -> bool:
    moved = {
        target.id
        for n in ast.walk(tree)
        if isinstance(n, ast.Assign) and any(_moves(inner) for inner in ast.walk(n.value))
        for target in n.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _last(node.func) == name:
            for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
                inner = list(ast.walk(argument))
                if any(_moves(n) for n in inner) or any(isinstance(n, ast.Name) and n.id in moved for n in inner):
                    return True
    return False


def _attention(call: ast.Call, reached: list[Function]) -> Iterator[str]:
    """Keys and names that reach a model as its attention mask, directly or through a function of the file."""
    for keyword in call.keywords:
        if keyword.arg == "attention_mask":
            yield from _handed(keyword.value)
    helper = next((f for f in reached if getattr(f, "name", None) == _last(call.func)), None)
    if helper is None:
        return
    names = [arg.arg for arg in (*helper.args.posonlyargs, *helper.args.args) if arg.arg != "self"]
    passed = {
        key
        for inner in ast.walk(helper)
        if isinstance(inner, ast.Call)
        for keyword in inner.keywords
        if keyword.arg == "attention_mask"
        for key in _handed(keyword.value)
    }
    for name, value in (*zip(names, call.args, strict=False), *((k.arg, k.value) for k in call.keywords)):
        if name in passed:
            yield from _handed(value)


def _handed(node: ast.expr) -> Iterator[str]:
    for inner in ast.walk(node):
        if isinstance(inner, ast.Subscript) and isinstance(inner.slice, ast.Constant):
            yield str(inner.slice.value)
        elif isinstance(inner, ast.Name):
            yield inner.id


def _unpacks(node: ast.AST) -> bool:
    """`logits, _ = model(x)`"""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
        return False
    called = _last(node.value.func).lower() if isinstance(node.targets[0], ast.Tuple) else ""
    return called in ("model", "policy", "policy_model", "lm", "net")


def _first_of_output(inside: list[ast.AST]) -> bool:
    """`out = model(x)` and then `out[0]`, or `model(x)[0]`, where no batch of one row is made, whose row that may be"""
    if any(_unsqueezed(node) for node in inside):
        return False
    calls = ("model", "policy", "policy_model", "lm", "net")
    asked = [n for n in inside if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)]
    names = {_last(n.targets[0]) for n in asked if _last(n.value.func).lower() in calls} - {""}
    for node in inside:
        if isinstance(node, ast.Subscript) and _one(node.slice, 0) and not isinstance(node.slice, ast.Slice):
            held = node.value
            if isinstance(held, ast.Name) and held.id in names:
                return True
            if isinstance(held, ast.Call) and _last(held.func).lower() in calls:
                return True
    return False


def _unsqueezed(node: ast.AST) -> str | None:
    """The name in `name.unsqueeze(0)` or `name[None]`; None for any other node."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "unsqueeze":
        first = bool(node.args) and _one(node.args[0], 0)
        return node.func.value.id if first and isinstance(node.func.value, ast.Name) else None
    if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Name):
        return None
    where = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) and node.slice.elts else node.slice
    return node.value.id if isinstance(where, ast.Constant) and where.value is None else None


def _takes_apart(node: ast.AST, names: set[str]) -> bool:
    """Is a parameter indexed by 1, or assigned to two names?"""
    if isinstance(node, ast.Subscript):
        return isinstance(node.value, ast.Name) and node.value.id in names and _one(node.slice, 1)
    two = isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and len(node.targets[0].elts) == 2
    return two and isinstance(node.value, ast.Name) and node.value.id in names


def _asked_of_model(node: ast.AST) -> str | None:
    """The method in `model.method(...)`, `self.policy_model.method(...)`; None for any other node."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return None
    holder = node.func.value
    said = concept(_last(holder)) if isinstance(holder, ast.Name | ast.Attribute) else None
    return node.func.attr if said and said.what == "model" and not said.which else None


def _nests(node: ast.AST) -> bool:
    """`batch["chosen"]["input_ids"]` or `**batch["chosen"]`"""
    inner = node.value if isinstance(node, ast.Subscript) else None
    if isinstance(node, ast.keyword) and node.arg is None:
        inner = node
        node = node.value
        return isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant)
    return (
        isinstance(inner, ast.Subscript)
        and isinstance(inner.slice, ast.Constant)
        and isinstance(inner.slice.value, str)
        and isinstance(node.slice, ast.Constant)
        and isinstance(node.slice.value, str)
    )
