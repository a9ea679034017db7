"""Is an honest trainer left in peace by its worker?"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from dpocheck.experiment import Recipe, Row, Table, TrainExperiment, to_plain
from dpocheck.probes import tables
from dpocheck.probes.tokenizers import plain_words
from dpocheck.transports.isolated import Worker


@pytest.mark.long
@pytest.mark.skipif(find_spec("trl") is None, reason="TRL is not installed")
def test_trl_runs_the_same_in_every_call_and_process_and_changes_nothing_but_random_numbers(tmp_path):
    words = plain_words(16)
    rows = (Row(prompt="a", chosen=" b c", rejected=" d"), Row(prompt="e", chosen=" f", rejected=" g h"))
    policy, reference = Table(16, 0.0, ((0, 1, 0.5), (1, 2, 0.25))), Table(16)
    experiment = TrainExperiment(policy, reference, words, rows, Recipe(batch=2))
    paths = {"policy": tmp_path / "policy", "reference": tmp_path / "reference"}
    tables.write_checkpoint(paths["policy"], policy, words, experiment.body, "float32")
    tables.write_checkpoint(paths["reference"], reference, words, experiment.body, "float32")
    payload = {"subject": "trl", "experiment": to_plain(experiment)} | {name: str(path) for name, path in paths.items()}
    digests, changes = [], []
    with Worker("trl", folder=tmp_path / "worker") as worker:
        for n in range(4):
            if n == 2:
                worker.close()
            answer, _ = worker.call("observe", payload | {"folder": str(tmp_path / f"run{n}")})
            digests.append(answer["fields"]["digest"])
            changes += [line for line in worker.last_changes if not line.startswith("rng ")]
    assert len(set(digests)) == 1
    # torch's compiler notes where its cache is when it is first imported, once a process.
    assert set(changes) <= {"environment: TORCHINDUCTOR_CACHE_DIR was added"}
