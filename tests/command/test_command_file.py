"""A wrong description is refused before anything runs, with one message that says what, what is allowed, what to do."""

import re
from pathlib import Path

import pytest
from command_bench import described

import conformance
from dpocheck.adapter import Says
from dpocheck.command.file import CommandError, read
from dpocheck.command.text import expand, number, words

GOOD = {
    "command": '"{python} -m trainer {policy} {rows} {out}"', "rows": '{ file = "train.jsonl" }',
    "weights": '{ last = "w.safetensors" }', "losses": '{ sigmoid = "" }',
}  # fmt: skip


def written(folder: Path, changes: dict) -> Path:
    path = folder / "trainer.toml"
    lines = [f"{name} = {value}" for name, value in (GOOD | changes).items() if value is not None]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


BAD = {
    "no command": ({"command": None}, "the field command is missing"),
    "no losses": ({"losses": "{}"}, "losses is empty.*sigmoid, cdpo"),
    "no rows": ({"rows": None}, "the field rows is missing"),
    "no file of rows": ({"rows": "{ }"}, "the field rows.file is missing"),
    "no last weights": ({"weights": "{ }"}, "the field weights.last is missing"),
    "misspelt field": ({"comand": '"x"'}, r"unknown field comand \(did you mean 'command'\?\); known: command"),
    "misspelt inner field": ({"rows": '{ fiel = "x" }'}, r"unknown field rows.fiel \(did you mean 'file'\?\)"),
    "own field": ({"path": '"x"'}, "unknown field path"),
    "unknown loss": ({"losses": '{ sigmod = "" }'}, r"unknown field losses.sigmod \(did you mean 'sigmoid'\?\)"),
    "unknown option": ({"options": '{ clip = "" }'}, "unknown field options.clip"),
    "unknown promise": ({"says": '{ eoss = "none" }'}, r"unknown field says.eoss \(did you mean 'eos'\?\)"),
    "unknown promise value": ({"says": '{ eos = "added" }'}, "says.eos is 'added'; allowed: appended, none"),
    "promise of a list": ({"says": '{ objectives = "sigmoid" }'}, "says.objectives is 'sigmoid'; it must be a list"),
    "unknown format": ({"rows": '{ file = "x", format = "jsonl" }'}, "rows.format is 'jsonl'; allowed: prompt-chosen"),
    "unknown optimizer": ({"update": '{ kind = "adamw" }'}, r"update.kind is 'adamw'; allowed: sgd, adam, lora"),
    "unknown reference": ({"reference": '{ how = "resumed" }'}, r"reference.how is 'resumed'.*mean 'resume'"),
    "unknown dtype": ({"dtype": '"fp32"'}, "dtype is 'fp32'; allowed: float32, bfloat16, float64"),
    "text for a number": ({"update": '{ epsilon = "1" }'}, "update.epsilon is '1'; it must be a number"),
    "truth for a number": ({"update": "{ epsilon = true }"}, "update.epsilon is True; it must be a number"),
    "number for a text": ({"command": "3"}, "command is 3; it must be a text"),
    "text for a table": ({"losses": '"sigmoid"'}, "losses is 'sigmoid'; it must be a table"),
    "number in a table of texts": ({"environment": "{ A = 1 }"}, "environment is 1; it must be a table of texts"),
    "option of a wrong type": ({"options": "{ seed = 1 }"}, "options.seed is 1; it must be a text or a table"),
    "option without text": ({"options": '{ seed = { off = "" } }'}, "the field options.seed.on is missing"),
    "unknown placeholder": ({"command": '"x {polcy}"'}, r"placeholder \{polcy\} in command \(did you mean 'policy'"),
    "placeholder of a loss": ({"losses": '{ ipo = "--tau {tau}" }'}, r"placeholder \{tau\} in losses.ipo"),
    "placeholder of an option": ({"options": '{ seed = "{sed}" }'}, r"placeholder \{sed\} in options.seed"),
    "placeholder of a variable": ({"environment": '{ A = "{wrk}" }'}, r"placeholder \{wrk\} in environment.A"),
    "placeholder in a file's name": ({"files": '{ "{wrk}/a" = "" }'}, r"placeholder \{wrk\} in files"),
    "placeholder in a file": ({"files": '{ "a" = "lr: {learning_rte}" }'}, r"\{learning_rte\} in the content"),
    "format of a text": ({"command": '"x {policy:d}"'}, "command cannot be read: Unknown format code 'd'"),
    "default of a run's own": ({"defaults": '{ beta = "1" }'}, "defaults.beta is a placeholder that each run fills in"),
    "open quote": ({"command": '"x \'y"'}, "command cannot be read: No closing quotation"),
    "empty command": ({"command": '" "'}, "command is empty"),
    "bad regular expression": ({"log": '{ step = "loss (" }'}, "log.step is not a regular expression"),
    "expression without group": ({"log": '{ step = "loss .*" }'}, "log.step has no named group"),
    "metric without value": ({"log": '{ step = "x", metric = "(?P<name>x)" }'}, "log.metric has no group 'value'"),
    "step weights without step": ({"weights": '{ last = "a", step = "b" }'}, r"weights.step is 'b'.*\{step\}"),
    "option without text for it": ({"reference": '{ how = "option" }'}, "reference.option must hold the text"),
    "resume without folder": ({"reference": '{ how = "resume", option = "--r {policy}" }'}, r"must name \{resume\}"),
    "resume without base": ({"reference": '{ how = "resume", option = "{resume}" }'}, r"command must name \{base\}"),
    "one beta": ({"update": '{ kind = "adam", betas = [0.9] }'}, r"update.betas is \[0.9\]; it must be two numbers"),
    "no epsilon": ({"update": '{ kind = "adam", epsilon = 0 }'}, "update.epsilon is 0; it must be positive"),
    "lora without names": ({"update": '{ kind = "lora" }'}, "weights.lora_a and weights.lora_b must name"),
    "evaluation without file": ({"options": '{ evaluation = "x" }'}, "rows.evaluation must name the file"),
    "no program": ({"command": '"no-such-trainer {policy}"'}, "'no-such-trainer', is not there; install the trainer"),
    "no interpreter": ({"python": '"/no/such/python"'}, "python is '/no/such/python', which is no program"),
    "not TOML": ({"rows": "{"}, "is not TOML"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_description_is_refused_with_one_clear_message(name, tmp_path):
    from dpocheck.command import CommandSubject

    changes, message = BAD[name]
    with pytest.raises(CommandError) as caught:
        CommandSubject(read(written(tmp_path, changes)), limits_seconds=1, memory_gb=1, folder=tmp_path / "runs")
    assert re.search(message, str(caught.value)), str(caught.value)
    assert "trainer.toml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["trainer.toml"]


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(CommandError, match=r"nowhere\.toml cannot be read: No such file"):
        read(tmp_path / "nowhere.toml")


def test_the_shortest_description_is_enough(tmp_path):
    file = read(written(tmp_path, {}))
    assert (file.name, file.update.kind, file.dtype, file.reference.how) == ("trainer", "sgd", "float32", "none")
    assert file.says == Says()


@pytest.mark.parametrize(
    "path", sorted((Path(conformance.__file__).parent / "commands").glob("*.toml")), ids=lambda path: path.stem
)
def test_the_descriptions_that_are_shipped_are_right(path, monkeypatch):
    monkeypatch.setenv("DPO_CHECKOUT", "/a/checkout")
    assert read(path).losses


def test_defaults_are_placeholders_of_the_file_itself(tmp_path):
    file = read(written(tmp_path, {"command": '"x --template {template}"', "defaults": '{ template = "empty" }'}))
    assert words(file.command, file.defaults) == ["x", "--template", "empty"]


def test_braces_of_json_and_yaml_stay():
    text = '{"a": {"b": {batch}}} {c: {d: 1}} {step:05d}'
    assert expand(text, {"batch": 3, "step": 7}) == '{"a": {"b": 3}} {c: {d: 1}} 00007'


def test_numbers_keep_every_digit_in_a_form_that_yaml_reads():
    # 16 / 2^20 = 2^-16; YAML 1.1 takes 1e-05 for a text.
    assert number(16 / 2**20) == "1.52587890625e-05"
    assert number(1e-5) == "1.0e-05"
    assert float(number(1e-5)) == 1e-5


def test_a_path_with_a_space_stays_one_argument():
    assert words("a --data {rows}/x '{rows} y'", {"rows": "/my data"}) == ["a", "--data", "/my data/x", "/my data y"]


def test_fixed_settings_and_stubs_are_told_to_the_report(tmp_path):
    subject = described(
        tmp_path, more="--bf16 --clip 0", files='{ "{work}/sitecustomize.py" = "pass" }', package='"numpy"'
    )
    assert subject.forced["clip"] == "0"
    assert subject.forced["bf16"] == "true"
    assert "lr" not in subject.forced
    assert subject.stubs == ("{work}/sitecustomize.py: pass",)
    assert re.match(r"\d+\.\d+", subject.version)
    assert (subject.form, subject.capabilities, subject.precision) == ("command line", ("train",), "float32")


def test_a_script_names_a_program_that_is_not_installed_here_beside_the_python_that_runs_it():
    from dpocheck.checks import scenes
    from dpocheck.experiment import Recipe
    from dpocheck.oracle.theory import PAPER
    from dpocheck.report.command_script import command_trainers

    path = Path(conformance.__file__).parent / "commands" / "llamafactory.toml"
    (text,) = command_trainers(path, [scenes.run(scenes.rectangular(2), PAPER, Recipe(batch=2))])
    assert "'<bin>/llamafactory-cli'" in text.replace('"', "'")
    assert "'<bin>': str(Path(sys.executable).parent)" in text.replace('"', "'")
