"""Settings: the same names and rules on the command line, in TOML and in Python."""

from __future__ import annotations

import dataclasses

import pytest

from gpudbn.errors import UserError
from gpudbn.settings import FIELDS, Settings, command_line, flag, from_toml, parse, settings_of


def from_line(line):
    return settings_of(parse(command_line("train", "about"), line.split()))


def test_defaults_from_everywhere_are_the_same(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(Settings().to_toml())
    assert from_line("") == Settings() == Settings(**from_toml(file)) == from_line(f"--config {file}")


def test_toml_brings_back_every_setting(tmp_path):
    other = Settings(data="x \"y\" \\z.npy", labels="l.npy", validation=0.25, layers=(3, 5), epochs=(1, 2), k=3,
                     learning_rate=(0.1, 0.2), momentum=(0.3,), threads=2, seed=2**64 - 1, order="fixed", n_push=3,
                     n_fetch=6, decay=1e-05)
    file = tmp_path / "run.toml"
    file.write_text(other.to_toml())
    assert Settings(**from_toml(file)) == other


def test_the_command_line_goes_before_the_file(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("k = 5\nlayers = [7]\nlearning-rate = 1\n")
    s = from_line(f"--config {file} --k 2")
    assert (s.k, s.layers, s.learning_rate) == (2, (7,), (1.0,))


def test_one_number_stands_for_every_layer():
    s = Settings(layers=(4, 5), epochs=3, learning_rate=(0.1, 0.2))
    assert [s.of_layer("epochs", i) for i in (0, 1)] == [3, 3]
    assert [s.of_layer("learning_rate", i) for i in (0, 1)] == [0.1, 0.2]


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().k = 2


@pytest.mark.parametrize(("line", "message"), [
    ("--layers 0", "--layers: must be at least 1; got 0"),
    ("--layers 5 -3", "--layers: must be at least 1; got -3"),
    ("--layers many", "--layers: must be a whole number; got 'many'"),
    ("--k 1.5", "--k: must be a whole number; got '1.5'"),
    ("--k", "expected one argument"),
    ("--batch 0", "--batch: must be at least 1; got 0"),
    ("--learning-rate nan", "--learning-rate: must be a number; got nan"),
    ("--learning-rate inf", "--learning-rate: must be above 0; got inf"),
    ("--learning-rate 0", "--learning-rate: must be above 0; got 0.0"),
    ("--dropout 1", r"--dropout: must lie in \[0, 1\); got 1.0"),
    ("--momentum 0.1 0.2 0.3", "--momentum: must be one number or two; got 3"),
    ("--epochs 1 2", "--epochs: must be one number, or one for each of the 3 layers; got 2"),
    ("--seed -1", r"--seed: must lie in \[0, 2\*\*64\); got -1"),
    ("--mode asnyc", "--mode: must be one of async, sync, local; got asnyc. Did you mean async?"),
    ("--overlap on --staleness compensate", "--overlap: must be off with --staleness compensate"),
    ("--n-push 4 --n-fetch 6", "--n-fetch: must be a multiple of --n-push 4; got 6"),
    ("--layer 5", "must be given options it knows; got --layer. Did you mean --layers?"),
    ("--learning_rate 5", "got --learning_rate. Did you mean --learning-rate?"),
    ("--config nowhere.toml", "nowhere.toml: must be a file of settings that can be read; got 'No such file"),
    ("--resume nowhere", "--resume: must be a run folder; got nowhere"),
    ("--resume nowhere --k 2", "--resume: must stand without --k"),
    ("--resume nowhere --out x", "--resume: must stand without --out"),
])
def test_what_is_wrong_is_one_line_with_name_rule_and_value(line, message):
    with pytest.raises(UserError, match=message) as error:
        from_line(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "message"), [
    ("momentun = 0.5", "must hold settings only; got momentun. Did you mean momentum?"),
    ("learning_rate = 0.5", "got learning_rate. Did you mean learning-rate?"),
    ("k = ", "must be TOML"),
    ("k = true", "--k: must be a whole number; got True"),
    ("data = 3", "--data: must be text; got 3"),
    ("k = [1, 2]", "--k: must be one value; got 2"),
    ("layers = []", "--layers: must have at least one number; got none"),
])
def test_a_file_is_held_to_the_same_rules(tmp_path, text, message):
    file = tmp_path / "run.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        from_line(f"--config {file}")


def test_resume_takes_the_runs_own_settings_and_lets_only_the_machine_differ(tmp_path):
    (tmp_path / "settings.toml").write_text(Settings(k=7).to_toml())
    s = from_line(f"--resume {tmp_path} --threads 1 --device cpu")
    assert (s.k, s.threads, s.device) == (7, 1, "cpu")


def test_help_names_every_setting_with_its_default():
    text = " ".join(command_line("train", "about").format_help().split())
    for name, field in FIELDS.items():
        assert flag(name) in text
        if field.default is not None and not isinstance(field.default, tuple):
            assert f"(default: {field.default})" in text.replace("- ", "-"), name
