"""Does the audit find a fault that is planted in a copy of one of this trainer's functions?

Run alone: pytest tests/reference/test_trainer_planted.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from planted_faults import FAULTS, QUICK, Fault, plant

from dpocheck import conventions, runner, smoke
from dpocheck.check import CHECKS
from dpocheck.oracle.theory import Theory
from dpocheck.session import Session
from dpocheck.subject import Subject
from dpocheck.transports import InProcess
from reference_impl.adapter import Adapter

USED = {name: sorted({check for fault in FAULTS.values() if fault.through_train is train for check in fault.checks})
        for name, train in (("every way in", False), ("runs alone", True))}  # fmt: skip
Opened = Callable[[bool], Subject]
TABLE = [name if name in QUICK else pytest.param(name, marks=pytest.mark.long) for name in FAULTS]


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[Theory, dict[type, float]]]:
    """The right trainer's conventions and precision: what is planted is no convention."""
    found = {}
    for train in (False, True):
        subject = _subject(tmp_path_factory.mktemp("honest"), train)
        assert smoke.test(subject) is None
        conventions.resolve(subject, runner.cached_predict)
        found[train] = subject.theory, subject.precisions
    return found


@pytest.fixture
def opened(honest: dict, tmp_path: Path) -> Opened:
    def open_it(train: bool) -> Subject:
        subject = _subject(tmp_path, train)
        subject.theory, subject.precisions = honest[train]
        return subject

    return open_it


def _subject(folder: Path, train: bool) -> Subject:
    subject = Subject("reference", InProcess(Adapter()), folder)
    if train:
        subject.capabilities = tuple(name for name in subject.capabilities if name == "train")
    return subject


def _session(subject: Subject) -> Session:
    return Session(subject, runner.cached_predict, runner.cached_bound, blocking=False)


@pytest.mark.parametrize("name", TABLE)
def test_planted_fault_is_found(name: str, opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    fault: Fault = FAULTS[name]
    plant(fault, monkeypatch)
    run = _session(opened(fault.through_train))
    results = [run.result(CHECKS[check]) for check in fault.checks]
    assert {r.id: r.verdict for r in results} == dict.fromkeys(fault.checks, "fail"), [r.reason for r in results]
    # A wrong number was measured; nothing merely crashed.
    assert not any(r.reason.startswith("raised") for r in results), [r.reason for r in results]


@pytest.mark.long
@pytest.mark.parametrize("way", USED)
def test_the_same_checks_pass_without_a_fault(way: str, opened: Opened) -> None:
    run = _session(opened(way == "runs alone"))
    assert {check: run.result(CHECKS[check]).verdict for check in USED[way]} == dict.fromkeys(USED[way], "pass")


def test_table_is_as_large_as_promised_and_reaches_every_part() -> None:
    assert len(FAULTS) >= 30
    parts = {fault.place.split(".")[0] for fault in FAULTS.values()}
    assert parts >= {"dpo", "objectives", "logps", "tokens", "truncate", "render", "data", "reference", "refcache"}
    assert parts >= {"training", "optimize", "metrics", "evaluate", "checkpoint", "models", "order"}
    assert 6 <= len(QUICK) <= 8
