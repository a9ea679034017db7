"""Is the field's machinery right: subjects as data, environments kept, results, pairs of releases, the page?

No network: environments are made of nothing, and audits are of the miniature.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from conformance.field import audits, environments, history, locks, page
from conformance.field.__main__ import line
from conformance.field.expected import marked
from conformance.field.subjects import ROOT, FieldError, Trainer, chosen, load
from dpocheck.known import load as load_known
from dpocheck.piecewise import versions

SUBJECTS = load()
MINIATURE = Trainer(name="mini", family="own", adapter="zoo:miniature", torch="")


def written(folder: Path, text: str) -> Path:
    path = folder / "subjects.toml"
    path.write_text(text, encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ subjects


def test_a_subject_takes_what_its_family_says_and_what_it_says_itself(tmp_path):
    path = written(tmp_path, """
        [pins]
        old = ["numpy<2"]
        [family.f]
        package = "pkg"
        adapter = "a.py:Adapter"
        torch = ""
        [[subject]]
        name = "f-1"
        family = "f"
        release = "1.0"
        with = ["dep==2", "@old"]
        [[subject]]
        name = "f-2"
        family = "f"
        release = "2.0"
        adapter = "b.py:Adapter"
        bare = ["pkg==2.0"]
    """)
    first, second = load(path).values()
    assert first.requirements == ("pkg==1.0", "dep==2", "numpy<2")
    assert (first.adapter, first.torch) == ("a.py:Adapter", "")
    assert (second.adapter, second.requirements, second.bare) == ("b.py:Adapter", (), ("pkg==2.0",))


@pytest.mark.parametrize(("text", "said"), [
    ('[[subject]]\nname = "a"\nfamily = "none"', "family 'none'"),
    ('[family.f]\nadaptor = "x"\n[[subject]]\nname = "a"\nfamily = "f"', "did you mean adapter?"),
    ('[family.f]\n[[subject]]\nname = "a"\nfamily = "f"', "either an adapter or a command"),
    ('[family.f]\nadapter = "x"\n[[subject]]\nname = "a"\nfamily = "f"\nrelease = "1"', "no package"),
    ('[family.f]\nadapter = "x"\n[[subject]]\nname = "a"\nfamily = "f"\nwith = ["@old"]', "no list under [pins]"),
    ('[family.f]\nadapter = "x"\n[[subject]]\nname = "a"\nfamily = "f"\nnewest = "yes"', "must be a bool"),
    ('[family.f]\nadapter = "x"\n' + 2 * '[[subject]]\nname = "a"\nfamily = "f"\n', "taken already"),
    ("[[subject", "subjects.toml"),
])  # fmt: skip
def test_a_wrong_file_is_refused_in_words(tmp_path, text, said):
    with pytest.raises(FieldError, match=None) as refusal:
        load(written(tmp_path, text))
    assert said in str(refusal.value)


def test_subjects_are_named_one_by_one_or_by_family():
    family = SUBJECTS["trl-1.16.0"].family
    assert [t.name for t in chosen(["trl-1.16.0"], SUBJECTS)] == ["trl-1.16.0"]
    assert {t.family for t in chosen([family], SUBJECTS)} == {family}
    assert chosen([], SUBJECTS) == list(SUBJECTS.values())
    with pytest.raises(FieldError, match=r"did you mean trl-1\.16\.0"):
        chosen(["trl-1.16"], SUBJECTS)


@pytest.mark.parametrize("name", SUBJECTS)
def test_what_a_subject_names_is_there(name):
    assert SUBJECTS[name].driver.is_file()


def test_every_known_failure_belongs_to_a_subject_and_to_a_check_of_today():
    for path in (ROOT / "conformance" / "expected").glob("*.toml"):
        assert path.stem in SUBJECTS
        for entry in load_known(path, versions()):
            assert entry.seen, f"{path.name}: {entry.id} has no date"
            assert entry.url, f"{path.name}: {entry.id} has no link"


# -------------------------------------------------------------------------------------------------------- environments


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DPOCHECK_FIELD", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_environment_is_made_once_and_shared_by_what_installs_the_same(cache):
    first = environments.made(MINIATURE)
    assert first.python.is_file()
    assert environments.made(replace(MINIATURE, name="other")) == first
    assert environments.folder_of(replace(MINIATURE, requirements=("x",))) != first.folder


def test_an_interrupted_environment_is_made_anew(cache):
    made = environments.made(MINIATURE)
    (made.folder / environments.STAMP).unlink()
    (made.folder / "half").write_text("")
    assert environments.ready(MINIATURE) is None
    assert not (environments.made(MINIATURE).folder / "half").exists()


def test_a_broken_environment_is_a_result_and_says_why(cache, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    found = audits.audit(replace(MINIATURE, requirements=("no-such-package-at-all",)))
    assert "no-such-package-at-all" in found["broken"]
    assert line(MINIATURE, found).startswith("mini: BROKEN")


@pytest.fixture
def locked(tmp_path, monkeypatch):
    """A subject whose lock lies in a folder of its own."""
    monkeypatch.setattr(locks, "LOCKS", tmp_path / "locks")
    return replace(MINIATURE, requirements=("pkg==1.0",))


def test_a_lock_names_all_that_was_installed_but_the_tools(locked):
    path = locks.keep(locked, {"pkg": "1.0", "dep": "2.0+cpu", "pip": "24.0"})
    assert path.read_text().splitlines()[1:] == ["dep==2.0", "pkg==1.0"]
    assert locks.valid(locked) == path
    assert locks.differs(path, {"pkg": "1.0", "dep": "2.0", "more": "1"}) == []
    assert locks.differs(path, {"pkg": "1.1"}) == ["dep missing, not 2.0", "pkg 1.1, not 1.0"]
    assert locks.keep(replace(locked, requirements=()), {"pip": "24.0"}) is None


def test_a_lock_holds_for_its_requirements_and_its_python_alone(locked):
    path = locks.keep(locked, {"pkg": "1.0"})
    other = replace(locked, requirements=("pkg==1.1",))
    assert locks.valid(other) is None
    locks.keep(other, {"pkg": "1.1"})
    assert locks.read(path) == {"pkg": "1.1"}
    elsewhere = path.read_text().replace("# Python 3", "# Python 9")
    path.write_text(elsewhere)
    assert locks.valid(other) is None
    assert locks.keep(other, {"pkg": "1.2"}).read_text() == elsewhere


def test_an_environment_is_made_as_its_lock_says_and_anew_where_it_differs(cache, locked, monkeypatch):
    asked = []
    monkeypatch.setattr(environments, "_install", lambda folder, wanted, options=(): asked.append((*options, *wanted)))
    environments.made(locked)
    path = locks.keep(locked, {"pkg": "1.0", "dep": "2.0"})
    environments.made(locked)
    environments.made(locked)
    made = [told for told in asked if "pkg==1.0" in told]
    assert made == [("pkg==1.0",), ("--constraint", str(path), "pkg==1.0")]


@pytest.mark.parametrize("path", sorted((ROOT / "conformance" / "locks").glob("*.txt")), ids=lambda path: path.stem)
def test_a_lock_is_of_a_subject_as_it_is_now(path):
    assert path.read_text(encoding="utf-8").partition("\n")[0].partition(": ")[2] == locks.asked(SUBJECTS[path.stem])


def test_a_missing_checkout_is_said(cache, monkeypatch):
    monkeypatch.delenv("SOME_CHECKOUT", raising=False)
    assert "SOME_CHECKOUT" in audits.audit(replace(MINIATURE, checkout="SOME_CHECKOUT"))["broken"]


# -------------------------------------------------------------------------------------------------------------- results


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What an audit of one check of a broken specimen leaves, read as the field reads it."""
    out = tmp_path_factory.mktemp("audit") / "out"
    command = [sys.executable, "-m", "dpocheck.cli", "audit", "zoo:rewards-swapped", "--only", "LOSS-REWARDS"]
    subprocess.run([*command, "--only", "LOSS-VALUE", "--out", str(out)], cwd=ROOT, capture_output=True)
    head = {"subject": "mini", "route": "adapter", "date": "2026-01-01", "exit": 1, "seconds": 1.0}
    return head | audits.read(out / "results.jsonl")


def test_a_result_is_kept_a_check_a_line_and_read_back(result, tmp_path, monkeypatch):
    monkeypatch.setattr(audits, "RESULTS", tmp_path)
    monkeypatch.setattr(locks, "LOCKS", tmp_path / "locks")
    told = result | {"environment": {"megabytes": 1, "packages": {"pkg": "1.0"}}}
    path = audits.keep(replace(MINIATURE, requirements=("pkg==1.0",)), told)
    digest = locks.digest(tmp_path / "locks" / "mini.txt")
    assert audits.stored(MINIATURE) == json.loads(json.dumps(told | {"environment": {"megabytes": 1, "lock": digest}}))
    assert sum('"id": "LOSS-' in row for row in path.read_text().splitlines()) == 2


def test_a_line_names_what_failed(result):
    assert [check["id"] for check in audits.found(result, "fail")] == ["LOSS-REWARDS"]
    assert "fail LOSS-REWARDS [must]" in line(MINIATURE, result)


def test_an_entry_that_no_result_answers_is_stale_unless_its_check_is_of_the_full_tier(tmp_path):
    def entry(id):
        return f'[[expect]]\nid = "{id}"\nversion = 1\nreason = "r"\nurl = "https://x"\nseen = 2026-01-01\n'

    path = tmp_path / "a.toml"
    path.write_text(entry("LOSS-VALUE") + entry("RANKS-SPLIT") + entry("GRAD-IDENTITY"))
    known = load_known(path, versions())
    told = marked([{"id": "LOSS-VALUE", "verdict": "fail"}], known)
    found = [(check["id"], check["verdict"]) for check in told]
    assert found == [("LOSS-VALUE", "expected-fail"), ("GRAD-IDENTITY", "stale")]
    asked = marked([{"id": "RANKS-SPLIT", "verdict": "pass"}], known)
    assert {"id": "RANKS-SPLIT", "verdict": "unexpected-pass"}.items() <= asked[0].items()


def test_the_page_names_a_failure_that_nobody_looked_into(result, tmp_path, monkeypatch):
    monkeypatch.setattr(audits, "RESULTS", tmp_path)
    monkeypatch.setattr(history, "RESULT", tmp_path / "none.json")
    audits.keep(MINIATURE, result)
    text = page.page({"mini": MINIATURE}, [])
    assert "| **not looked into yet** | mini | `LOSS-REWARDS` |" in text
    assert "| `LOSS-VALUE` | ✔ |" in text


def test_the_page_says_where_an_adapter_and_a_command_line_differ(tmp_path, monkeypatch):
    monkeypatch.setattr(audits, "RESULTS", tmp_path)
    monkeypatch.setattr(history, "RESULT", tmp_path / "none.json")
    own = replace(MINIATURE, package="pkg", release="1.0")
    command = replace(own, name="mini-cli", adapter="", command="zoo:x", note="Another recipe.")
    head = {"route": "adapter", "date": "2026-01-01", "exit": 1, "seconds": 1.0}
    verdicts = {"mini": ("pass", "pass", "fail"), "mini-cli": ("pass", "fail", "not-applicable")}
    for trainer in (own, command):
        told = [{"id": id, "version": 1, "level": "must", "verdict": verdict}
                for id, verdict in zip(("A", "B", "C"), verdicts[trainer.name], strict=True)]  # fmt: skip
        audits.keep(trainer, head | {"results": told})
    text = page.page({"mini": own, "mini-cli": command}, [])
    assert "| mini | 2 | 1 | `B` (passed, failed): another recipe. | 1 | 0 |" in text


def test_a_changed_toolkit_or_environment_makes_a_result_out_of_date():
    trainer = SUBJECTS["trl-1.16.0"]
    assert audits.print_of(trainer) == audits.print_of(replace(trainer, note="another"))
    assert audits.print_of(trainer) != audits.print_of(replace(trainer, requirements=("trl==1.15.0",)))


# -------------------------------------------------------------------------------------------------------------- history


PAIRS = history.load(SUBJECTS)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_a_pair_names_a_check_of_today_and_its_source(pair):
    assert pair.check in versions()
    assert pair.url.startswith("https://")
    assert pair.broken != pair.right


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.name)
def test_the_stored_result_of_a_pair_tells_its_releases_apart(pair):
    assert history.holds(history.stored().get(pair.name)), "run `ci/field --history " + pair.name + "`"


def test_a_pair_holds_where_the_check_failed_before_and_passed_after():
    assert history.holds({"broken": {"verdict": "fail"}, "right": {"verdict": "pass"}})
    assert not history.holds({"broken": {"verdict": "pass"}, "right": {"verdict": "pass"}})
    assert not history.holds({"broken": {"verdict": "fail"}, "right": {"verdict": "not-applicable"}})
    assert not history.holds(None)


def test_a_pair_of_unknown_releases_is_refused(tmp_path):
    text = 'title = "t"\nbroken = "a"\nright = "trl-1.16.0"\ncheck = "LOSS-VALUE"\nurl = "https://x"\n'
    (tmp_path / "pair.toml").write_text(text)
    with pytest.raises(FieldError, match="no subject is called 'a'"):
        history.load(SUBJECTS, tmp_path)
