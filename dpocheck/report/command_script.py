"""How does a stand-alone script run a trainer's command line?  By the same arguments, over folders of its own."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpocheck.experiment import TrainExperiment
from dpocheck.literal import literal

if TYPE_CHECKING:
    from dpocheck.command import CommandSubject

TRAIN = '''\
def train(policy_folder, reference_folder, tokenizer_folder, rows, eval_rows, out):
    """The trainer's own command line, as it is installed."""
    import os
    import shutil
    import subprocess
    import sys

    places = {{"<python>": sys.executable, "<bin>": str(Path(sys.executable).parent), "<policy>": str(policy_folder),
              "<reference>": str(reference_folder), "<here>": str(out)}}

    def filled(text):
        for name, value in places.items():
            text = text.replace(name, value)
        return text

    files = {files}
    command = {command}
    for name in ("work", "rows", "out"):
        (out / name).mkdir(parents=True, exist_ok=True)
{resume}    for name, content in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(filled(content))
    environment = os.environ | {environment}
    subprocess.run([filled(word) for word in command], cwd=out / "work", env=environment, check=True)
    return out / {weights}, []
'''


def command_trainers(path: Path, runs: Sequence[TrainExperiment]) -> list[str] | None:
    """The text of `train` for each run; None where what is read from the files is not plain SGD on the head."""
    from dpocheck.command import CommandSubject
    from dpocheck.command.file import read
    from dpocheck.probes import tables

    file = read(path)
    if file.update.kind != "sgd" or file.rows.template is not None or file.weights.head != tables.HEAD:
        return None
    with tempfile.TemporaryDirectory(prefix="dpocheck-") as folder:
        place = Path(folder).resolve()
        # A script finds the program beside the Python that runs it; here it need not be installed.
        own = {"python": sys.executable, "bin": str(Path(sys.executable).parent), "environment": sys.prefix,
               "here": str(path.parent.absolute())}  # fmt: skip
        subject = CommandSubject(file, limits_seconds=1.0, memory_gb=1.0, folder=place, places=own)
        return [_train(subject, run, place / str(number)) for number, run in enumerate(runs)]


def _train(subject: CommandSubject, run: TrainExperiment, place: Path) -> str:
    from dpocheck.command.subject import Run
    from dpocheck.probes.handed import checkpoints

    paths = checkpoints(run, place)
    here = place / "run"
    made = Run(subject, run, paths, here)
    own = sorted(path for name in ("work", "rows") for path in (here / name).rglob("*") if path.is_file())
    if made.resume is not None:
        copied = {path.name for path in paths["policy"].iterdir()}
        own += [path for path in sorted(made.resume.iterdir()) if path.name not in copied]
    names = {subject.places["python"]: "<python>", subject.places["bin"]: "<bin>",
             str(paths["policy"]): "<policy>", str(here): "<here>"}  # fmt: skip
    if "reference" in paths:
        names[str(paths["reference"])] = "<reference>"

    def general(text: str) -> str:
        for found, name in names.items():
            text = text.replace(found, name)
        return text

    files = {str(path.relative_to(here)): general(path.read_text(encoding="utf-8")) for path in own}
    copy = '    shutil.copytree(policy_folder, out / "resume", dirs_exist_ok=True)\n'
    extra = {name: general(text) for name, text in subject.file.environment.items()}
    last = Path("out") / subject.file.weights.last
    text = TRAIN.format(
        files=_indented(files), command=_indented([general(word) for word in made.arguments()]),
        resume=copy if made.resume is not None else "",
        environment=literal(extra), weights=literal(str(last.parent if last.suffix == ".safetensors" else last)),
    )  # fmt: skip
    shutil.rmtree(place)
    return text


def _indented(value: Any) -> str:
    return literal(value, 100).replace("\n", "\n    ")
