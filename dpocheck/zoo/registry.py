"""What is a specimen, what is a variant, and how is either declared?

    @specimen("counts-prompt", part="logps", caught_by="LOGP-TOKENS", theory=PAPER.but(counted="prompt"), at=ALL[1:])
    def counts_prompt(logits, batch):
        \"\"\"The prompt's tokens are scored too.\"\"\"
        return mini.logps(logits, replace(batch, completion_mask=batch.attention_mask))

The decorated function *is* the part: it has the signature of the honest part of that name (`dpocheck.miniature`), and
`build` puts it in that part's place.  `mini`, `torch` and `functional` are imported at first use, so that the judge
can read the declarations without torch.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from dpocheck.adapter import CAPABILITIES
from dpocheck.oracle.theory import Theory

ALL = CAPABILITIES
SCORES = ("sequence_logps", "step", "train")
STEPS = ("step", "train")
LOSSES = ("loss", "step", "train")
TRAIN = ("train",)


class Late:
    """A module that is imported when one of its names is first asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)


mini = Late("dpocheck.miniature")
torch = Late("torch")
functional = Late("torch.nn.functional")


@dataclass(frozen=True)
class Specimen:
    """The miniature with exactly one part broken.

    `caught_by`: the check that must fail.  `theory`: what the oracle predicts for it, where a theory describes it.
    `imitates`: the issue, pull request or commit of the real bug.  `at`: the capabilities at which it shows.
    """

    id: str
    summary: str
    part: str
    caught_by: str
    at: tuple[str, ...]
    theory: Theory | None
    imitates: str | None
    function: Callable[..., Any]

    def build(self) -> Any:
        return replace(mini.MINIATURE, **{self.part: self.function})

    @property
    def subject(self) -> str:
        """The name under which it shows: without its finer methods where these pass the broken part by."""
        return self.id + ("@train" if self.at == TRAIN else "")


@dataclass(frozen=True)
class Variant:
    """An adapter that is right and written differently: every check must pass it."""

    id: str
    summary: str
    build: Callable[[], Any]


SPECIMENS: dict[str, Specimen] = {}
VARIANTS: dict[str, Variant] = {}


def specimen(
    id: str,
    *,
    part: str,
    caught_by: str,
    theory: Theory | None = None,
    imitates: str | None = None,
    at: tuple[str, ...] = TRAIN,
    summary: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the decorated function as a broken part.  The summary is the docstring's first sentence.

    Raises ValueError on an id that is taken, a missing summary, or an unknown capability.
    """

    def declare(function: Callable[..., Any]) -> Callable[..., Any]:
        said = summary or (function.__doc__ or "").split("\n\n")[0].strip()
        _free(id)
        if not said or not at or set(at) - set(ALL):
            raise ValueError(f"specimen {id!r} needs a docstring, and capabilities out of {', '.join(ALL)}")
        SPECIMENS[id] = Specimen(id, " ".join(said.split()), part, caught_by, tuple(at), theory, imitates, function)
        return function

    return declare


def variant(id: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Declare the decorated function, which builds an adapter, as a variant."""

    def declare(function: Callable[[], Any]) -> Callable[[], Any]:
        said = (function.__doc__ or "").split("\n\n")[0].strip()
        _free(id)
        if not said:
            raise ValueError(f"variant {id!r} needs a docstring")
        VARIANTS[id] = Variant(id, " ".join(said.split()), function)
        return function

    return declare


def _free(id: str) -> None:
    if id in SPECIMENS or id in VARIANTS or id == "miniature":
        raise ValueError(f"the id {id!r} is taken")


def _both(first: str, second: str) -> Any:
    """The miniature with the broken parts of two specimens.  Raises ValueError where they break the same part."""
    one, other = SPECIMENS[first], SPECIMENS[second]
    if one.part == other.part:
        raise ValueError(f"{first} and {second} both break the part {one.part!r}; choose specimens of different parts")
    return replace(one.build(), **{other.part: other.function})


def build(name: str) -> Any:
    """The adapter of a specimen, a variant, or `miniature`; `NAME@train` has its method `train` alone, and `NAME+NAME`
    is the miniature with two parts broken.

    Raises ValueError on any other name.
    """
    name, _, only = name.partition("@")
    if "+" in name:
        return _both(*name.split("+"))
    found = SPECIMENS.get(name) or VARIANTS.get(name)
    if found is None and name != "miniature":
        near = difflib.get_close_matches(name, [*SPECIMENS, *VARIANTS, "miniature"], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`dpocheck list` names all of them"
        raise ValueError(f"no specimen or variant is called {name!r}; {hint}")
    if only not in ("", *CAPABILITIES):
        raise ValueError(f"no method is called {only!r}; an adapter has {', '.join(CAPABILITIES)}")
    adapter = mini.MINIATURE if found is None else found.build()
    if not only:
        return adapter
    return SimpleNamespace(says=adapter.says, ranks=getattr(adapter, "ranks", False), **{only: getattr(adapter, only)})
