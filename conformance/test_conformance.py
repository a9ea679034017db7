"""Does a trainer pass every check?  Subject times check, one item each.

    pytest --pyargs conformance --dpo-adapter trl --dpo-adapter path/to/file.py:Adapter -n auto
"""

from __future__ import annotations

import datetime

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    specs = metafunc.config.getoption("--dpo-adapter")
    items = []
    if specs:
        from dpocheck.piecewise import ids

        names = ids(metafunc.config.getoption("--dpo-tier"))
        items = [pytest.param(spec, id, id=f"{spec}-{id}") for spec in specs for id in names]
    else:
        missing = pytest.mark.skip(reason="no trainer was named: give --dpo-adapter SPEC, such as --dpo-adapter trl")
        items = [pytest.param("", "", id="no-adapter", marks=missing)]
    metafunc.parametrize(("spec", "id"), items)


def test_conforms(dpo_audited, spec: str, id: str) -> None:
    from dpocheck.piecewise import settle

    settle(dpo_audited(spec).report(id, datetime.date.today()))
