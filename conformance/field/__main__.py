"""What can be asked of the field?  `ci/field --help` says.

    ci/field                    audit all subjects whose result is missing or was made by another state of the checkout
    ci/field trl-0.12.2 liger   audit these subjects, or all of a family
    ci/field --only LOSS-VALUE trl-0.12.2      one check; nothing is kept
    ci/field --history          each pair of releases of conformance/history, on the check that must tell them apart
    ci/field --page             write conformance/RESULTS.md from the stored results
"""

from __future__ import annotations

import argparse
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from conformance.field import audits, environments, history, page
from conformance.field.expected import judged
from conformance.field.subjects import FieldError, Trainer, chosen, load


def main(arguments: list[str] | None = None) -> int:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(prog="ci/field", description=__doc__, formatter_class=form)
    parser.add_argument("names", nargs="*", metavar="NAME", help="subjects or families; none: what is not up to date")
    parser.add_argument("--jobs", type=int, default=1, help="audits side by side (each takes up to 2 GB)")
    parser.add_argument("--tier", choices=["quick", "full"], default="quick")
    parser.add_argument("--only", action="append", default=[], metavar="ID", help="this check alone; nothing is kept")
    parser.add_argument("--again", action="store_true", help="also what is up to date")
    parser.add_argument("--objective", default="", help="as of `dpocheck audit`; nothing is kept")
    parser.add_argument("--list", action="store_true", help="the subjects, and the disk that each takes")
    parser.add_argument("--history", action="store_true", help="the pairs of releases (NAME: pairs); none: all")
    parser.add_argument("--page", action="store_true", help="write the page; audit nothing")
    options = parser.parse_args(arguments)
    try:
        known = load()
        pairs = history.load(known)
        if options.history:
            return travelled(pairs, options.names, known, options.again)
        picked = chosen(options.names, known)
    except FieldError as error:
        print(f"ci/field: {error}", file=sys.stderr)
        return 2
    if options.list:
        return listed(picked)
    if options.page:
        page.PAGE.write_text(page.page(known, pairs), encoding="utf-8")
        return 0
    if not options.names and not options.again:
        picked = [t for t in picked if not audits.up_to_date(t)]
    return run(picked, options)


def run(picked: list[Trainer], options: argparse.Namespace) -> int:
    """Audit, each result kept as soon as it is there.  Exit code 1: a finding that is not expected; 3: no result."""
    worst = 0
    more = ["--tier", options.tier, "--jobs", "1", *(("--objective", options.objective) if options.objective else ())]
    with ThreadPoolExecutor(max(1, options.jobs)) as pool:
        waiting = {pool.submit(audits.audit, t, more, options.only): t for t in picked}
        for future in as_completed(waiting):
            trainer, result = waiting[future], future.result()
            if not (options.only or options.objective):
                audits.keep(trainer, result)
            told = judged(trainer, result)
            print(line(trainer, told), flush=True)
            worst = max(worst, exit_code(told))
    return worst


def travelled(pairs: list[history.Pair], names: list[str], trainers: dict[str, Trainer], again: bool) -> int:
    """Run the pairs and keep what they showed.  Exit code 1: a pair that the check does not tell apart."""
    if unknown := [name for name in names if name not in {pair.name for pair in pairs}]:
        raise FieldError(f"no pair is called {unknown[0]!r}; there are: {', '.join(pair.name for pair in pairs)}")
    asked = [pair for pair in pairs if not names or pair.name in names]
    found = history.run(asked, trainers, again=again)
    history.keep(found)
    print(history.table(asked, found))
    return 0 if all(history.holds(found[pair.name]) for pair in asked) else 1


def exit_code(result: dict[str, Any]) -> int:
    """0: as expected; 1: a finding that is not, or an expected one that is not there; 3: nothing can be said."""
    if "broken" in result or result["smoke"]:
        return 3
    return 1 if audits.found(result, "fail", "error", "unexpected-pass", "stale") else 0


def line(trainer: Trainer, result: dict[str, Any]) -> str:
    """One subject in a line, and its unexpected findings below."""
    if "broken" in result:
        return f"{trainer.name}: BROKEN: {result['broken']}"
    counts: dict[str, int] = {}
    for check in result["results"]:
        counts[check["verdict"]] = counts.get(check["verdict"], 0) + 1
    text = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items())) or result["smoke"]
    said = [f"{trainer.name} ({result['seconds']:.0f} s): {text}"]
    for check in audits.found(result, "fail", "error", "unknown", "unexpected-pass", "stale"):
        named = [d["name"] for d in check.get("diagnosis", [])][:1]
        where = check.get("reason") or check.get("where") or ""
        said.append(f"    {check['verdict']} {check['id']} [{check['level']}] {str(where)[:100]} {' '.join(named)}")
    return "\n".join(said)


def listed(picked: list[Trainer]) -> int:
    total = 0
    for trainer in picked:
        environment, result = environments.ready(trainer), audits.stored(trainer) or {}
        disk = f"{environment.megabytes} MB" if environment else "not made"
        total += environment.megabytes if environment else 0
        print(f"{trainer.name:28} {trainer.route:13} {disk:>9}   audited {result.get('date', 'never')}")
    print(f"{total} MB in {environments.cache()}, beside the shared torch")
    return 0


if __name__ == "__main__":
    sys.exit(main())
