"""Tests of flags and YAML files: which of the two wins, how values are read, and what is refused in one line."""

import io
import logging
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import error_of

from hf_embed import ContrastiveTrainingArguments, InputError, SimCSE
from hf_embed.kit import cli
from hf_embed.kit.eval_flags import EvalArguments
from hf_embed.kit.plan import DataArguments, ModelArguments, RunArguments


@pytest.fixture
def parse(tmp_path):
    """Return a function that parses a YAML text and flags, and returns all settings in one dict."""

    def function(yaml, *flags):
        path = tmp_path / "run.yaml"
        path.write_bytes(yaml if isinstance(yaml, bytes) else yaml.encode())
        kinds = [DataArguments, EvalArguments, SimCSE, ModelArguments, RunArguments, ContrastiveTrainingArguments]
        return {k: v for part in cli.parse(kinds, argv=["--config", str(path), *flags]) for k, v in vars(part).items()}

    return function


@pytest.mark.parametrize(
    ("yaml", "key", "value"),
    [
        ("learning_rate: 3e-5", "learning_rate", 3e-5),  # YAML 1.1 reads this as a text
        ("learning_rate: 0.00003", "learning_rate", 3e-5),
        ("max_length: 32", "max_length", 32),
        ("gradient_caching: true", "gradient_caching", True),
        ("gradient_caching: false", "gradient_caching", False),
        ("normalize: false", "normalize", False),
        ("train_file: a file.txt", "train_file", "a file.txt"),
        ("train_file:", "train_file", None),  # a key without a value means the default
        ("temperature:", "temperature", 0.05),
        ("hard_negative_weight: -1", "hard_negative_weight", -1.0),
        ("eval_sts_file: [a=1.tsv, b=2.tsv]", "eval_sts_file", ["a=1.tsv", "b=2.tsv"]),
        ("eval_sts_file: a=1.tsv", "eval_sts_file", ["a=1.tsv"]),
        ("""prompts: '{"query": "find: "}'""", "prompts", {"query": "find: "}),
        ("report_to: none", "report_to", []),
        ("", "temperature", 0.05),
        # BUG: a mapping became Python's repr, which is not JSON.
        ("prompts:\n  query: 'find: '", "prompts", {"query": "find: "}),
        ("lr_scheduler_type: cosine\nlr_scheduler_kwargs: {num_cycles: 2}", "lr_scheduler_kwargs", {"num_cycles": 2}),
        # BUG: YAML 1.1 reads `no` as False, and "False" was refused, because it is not one of the choices.
        ("eval_strategy: no", "eval_strategy", "no"),
        # BUG: Norwegian was left out of the card, and in a list it was "False".
        ("language: no", "language", ["no"]),
        ("language: [da, no, sv]", "language", ["da", "no", "sv"]),
        ("dataset_name: a/b\ndataset_config: no", "dataset_config", "no"),  # the Norwegian part of a dataset
        ("temp_scale: off", "temp_scale", None),
        ("eval_sts_file: no", "eval_sts_file", []),
        # BUG: False became the text "False", which was taken for a folder.
        ("resume_from_checkpoint: false", "resume_from_checkpoint", None),
        # BUG: an empty list became a flag without a value, which was refused.
        ("eval_sts_file: []", "eval_sts_file", []),
        # BUG: values that begin with "-" were taken for flags, even -1e-5, which argparse does not recognize as a number.
        ("train_file: -a.txt", "train_file", "-a.txt"),
        ("hard_negative_weight: -1e-5", "hard_negative_weight", -1e-5),
        # BUG: a flag that is true by default could not be turned off.
        ("mask_other_positives: false", "mask_other_positives", False),
        ("quoting: no", "quoting", False),
        ("ignore_columns: [-1, label]", "ignore_columns", ["-1", "label"]),
        ("max_length: [32]", "max_length", 32),
        # BUG: "~" was a folder of this name, in which a recipe wrote its output.
        ("train_file: ~/a.txt", "train_file", str(Path.home() / "a.txt")),
        ("eval_sts_file: [a-b=~/1.tsv, b=2~/3.tsv]", "eval_sts_file", [f"a-b={Path.home()}/1.tsv", "b=2~/3.tsv"]),
        ("output_dir: ~\\mine", "output_dir", f"{Path.home()}\\mine"),  # as on Windows
    ],
)
def test_yaml_value(yaml, key, value, parse):
    assert parse(yaml)[key] == value


@pytest.mark.parametrize(
    "flags", [("--temperature", "0.1"), ("--temperature=0.1",), ("--hard-negative-weight", "2", "--temperature", "0.1")]
)
def test_flag_overrides_yaml_and_nothing_else(flags, parse):
    settings = parse("temperature: 0.2\nseed: 7", *flags)
    assert (settings["temperature"], settings["seed"]) == (0.1, 7)


def test_flag_turns_a_yaml_switch_off(parse):
    assert parse("gradient_caching: true", "--gradient_caching", "false")["gradient_caching"] is False


@pytest.mark.parametrize("flag", ["--eval_sts_file", "--eval-sts-file"])
@pytest.mark.parametrize("yaml", ["", "eval_sts_file: [x=x.tsv, y=y.tsv]"])
def test_repeated_list_flag_accumulates_and_replaces_the_yaml(yaml, flag, parse):
    settings = parse(yaml, flag, "a=1.tsv", flag, "b=2.tsv")
    assert settings["eval_sts_file"] == ["a=1.tsv", "b=2.tsv"]


def test_list_flags_do_not_leak_into_the_next_parse(parse):
    parse("", "--eval_sts_file", "a=1.tsv")
    assert parse("")["eval_sts_file"] == []


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--resume_from_checkpoint"], "latest"),
        (["--resume_from_checkpoint", "--seed", "1"], "latest"),
        (["--resume_from_checkpoint", "runs/checkpoint-5"], "runs/checkpoint-5"),
        ([], None),
    ],
)
def test_resume_from_checkpoint(flags, value, parse):
    assert parse("", *flags)["resume_from_checkpoint"] == value


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("learnin_rate: 1", "did you mean 'learning_rate'?"),
        ("temperatur: 1", "did you mean 'temperature'?"),
        ("epochs: 1", "did you mean 'num_train_epochs'?"),
        ("batch-size: 1", "did you mean 'per_device_train_batch_size'?"),
        ("xyzzy: 1", "unknown key 'xyzzy'"),
        ("1: 2", "unknown key '1'"),
        ("a: [", "not YAML"),
        ("- a\n- b", "the file must hold lines of the form 'flag: value'"),
        # BUG: the user saw the traceback of a UnicodeDecodeError.
        ("train_file: café".encode("latin-1"), "not UTF-8"),
    ],
)
def test_bad_yaml(yaml, expected, parse, tmp_path):
    message = error_of(parse, yaml)
    assert re.match(f"--config {tmp_path / 'run.yaml'}(: | is )", message) and expected in message


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("temperature: warm", "argument --temperature: invalid float value: 'warm'"),
        ("max_length: 3.5", "argument --max_length: invalid int value: '3.5'"),
        (
            "eval_strategy: often",
            "argument --eval_strategy: invalid choice: 'often' (choose from 'no'",
        ),
        ("gradient_caching: perhaps", "argument --gradient_caching: Truthy value expected"),
        ("max_length: [32, 64]", "argument --max_length: expected one argument"),
        # BUG: with `no` or `off`, these flags kept their defaults, without a message.
        ("max_grad_norm: no", "argument --max_grad_norm: invalid float value: 'no'"),
        ("lr_scheduler_type: no", "argument --lr_scheduler_type: invalid choice: 'no'"),
        ("report_to: no", "report_to: unknown name 'no'; use "),
        ("dropout: no", "argument --dropout: invalid float value: 'no'"),
    ],
)
def test_bad_value_in_yaml_is_said_as_on_the_command_line(yaml, expected, parse):
    assert expected in error_of(parse, yaml)
    key, value = yaml.split(": ")
    other = {"eval_strategy": "no", "lr_scheduler_type": "linear", "report_to": "none", "dropout": "0.1"}.get(key, "1")
    assert parse(yaml, f"--{key}={other}")  # the command line overrides the file
    if "[" not in value:
        assert expected in error_of(parse, "", f"--{key}", value)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--learnin_rate", "1"], "--learnin_rate"),
        (["--temp", "1"], "--temp"),  # flags cannot be abbreviated
        (["stray"], "stray"),
        (["--temperature", "warm"], "'warm'"),
        (["--temperature"], "expected one argument"),
        (["--eval_strategy", "often"], "choose from 'no', 'steps', 'epoch'"),
        (["--chunk_tokens", "0"], "chunk_tokens is 0; it must be at least 1"),
        (["--prompts", '{"passage": "x"}'], "the keys are query and document"),
    ],
)
def test_bad_flag(flags, expected, parse):
    assert expected in error_of(parse, "", *flags)


@pytest.mark.parametrize("value", ["find: ", "[1]", '"query"'])
def test_bad_prompts_say_what_is_wanted(value, parse):
    # BUG: the message of the JSON parser named neither the flag nor the expected form, and a list raised a TypeError.
    message = error_of(parse, "", "--prompts", value)
    assert "prompts" in message and '{"query"' in message


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["nowhere.yaml"], "nowhere.yaml: this file does not exist"),
        ([], "needs a file"),
        (["a.yaml", "--config=b.yaml"], "--config is given twice; give a single file"),  # BUG: "unknown flag --config"
    ],
)
def test_bad_config_flag(flags, expected):
    assert expected in error_of(cli.parse, [SimCSE], argv=["--config", *flags])


def test_a_config_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my.yaml").write_text("temperature: 0.3")
    assert cli.parse([SimCSE], argv=["--config=~/my.yaml"])[0].temperature == 0.3  # the shell does not replace this "~"


@pytest.mark.parametrize(
    ("flags", "temperature"),
    [
        ([], 0.3),
        (["--config", "temperature: 0.4"], 0.4),
        (["--mlm_weight=1"], 0.05),
        # BUG: a file of settings dropped those of the preset that it did not name.
        (["--config", "hard_negative_weight: 1"], 0.3),
        (["--config", "temperature: 0.4", "--temperature=0.5"], 0.5),
        (["--config", "hard_negative_weight: 1", "--mlm_weight=1"], 0.05),
        (["--config", "mlm_weight: 1"], 0.05),
        (["--config", "mlm_weight:"], 0.3),  # a key without a value is not given
    ],
)
def test_a_preset_applies_to_what_is_not_given(flags, temperature, tmp_path):
    preset, other = tmp_path / "preset.yaml", tmp_path / "other.yaml"
    preset.write_text("temperature: 0.3")
    if "--config" in flags:
        other.write_text(flags[1])
        flags = ["--config", str(other), *flags[2:]]
    assert cli.read_flags([SimCSE], preset, ["mlm_weight"], flags).make(SimCSE).temperature == temperature


def test_run_ends_in_one_line_and_code_2(capsys):
    def main():
        raise InputError("no such file")

    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == 2 and capsys.readouterr().err == "error: no such file\n"


def test_messages_of_libraries_are_printed_once(caplog, monkeypatch):
    """BUG: datasets and huggingface_hub print their messages themselves, and the root logger printed them again."""
    own = logging.StreamHandler(io.StringIO())
    libraries = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    for library in libraries:
        monkeypatch.setattr(library, "handlers", [own])
    cli.run(lambda: [library.warning("retrying") for library in libraries])
    assert own.stream.getvalue() == ""
    assert caplog.messages == ["retrying"] * 2


def test_run_hides_no_other_error():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)


def test_characters_that_stdout_cannot_hold_are_escaped(monkeypatch):
    """BUG: a run whose output went to a file on Windows ended in a traceback at the first such text."""
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252", newline="\n"))
    cli.run(lambda: print("München, 東京"))
    assert written.getvalue() == b"M\xfcnchen, \\u6771\\u4eac\n"


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte-order mark"])
def test_piped_text_is_utf_8(monkeypatch, mark):
    """BUG: on Windows, a query from a file was read as cp1252, and other words were searched for."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(mark + "München, 東京\n".encode()), encoding="cp1252"))
    read = []
    cli.run(lambda: read.append(input()))
    assert read == ["München, 東京"]


def test_a_reader_that_has_ended_ends_the_run(monkeypatch):
    """BUG: `hf-embed sup-simcse --help | head` printed a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as closed, monkeypatch.context() as patched:
        patched.setattr("sys.stdout", closed)
        with pytest.raises(SystemExit) as end:
            cli.run(lambda: print("a line"))
        assert end.value.code == 141

    def main():
        raise BrokenPipeError("of a socket")

    with pytest.raises(BrokenPipeError, match="of a socket"):
        cli.run(main)


@dataclass
class Needy:
    model: str
    widths: tuple[int, ...] = field(default=(3, 2), metadata={"help": "Some widths."})
    inner: int = field(default=1, metadata={"flag": False})

    def __post_init__(self):
        if 0 in self.widths:
            raise InputError("a width is 0")


def test_flags_from_any_dataclass(tmp_path):
    """A tuple becomes a list, a field need not be a flag, and a required value may come from the file."""
    path = tmp_path / "run.yaml"
    path.write_text("model: mine\nwidths: [8, 4]")
    (made,) = cli.parse([Needy], argv=["--config", str(path)])
    assert (made.model, made.widths, made.inner) == ("mine", [8, 4], 1)
    assert cli.parse([Needy], argv=["--model", "m"])[0].widths == [3, 2]
    assert "the following arguments are required: --model" in error_of(cli.parse, [Needy], argv=[])
    assert "unknown flag --inner" in error_of(cli.parse, [Needy], argv=["--model", "m", "--inner", "2"])
    assert error_of(cli.parse, [Needy], argv=["--model", "m", "--widths", "0"]) == "a width is 0"


def test_a_file_name_without_a_flag_gets_a_suggestion():
    from hf_embed.kit.plan import read_flags

    assert error_of(read_flags, [], argv=["nli.csv"]) == (
        "nli.csv has no flag before it; give --train_file nli.csv (--help lists the flags)"
    )
    assert "unknown flag nli" in error_of(read_flags, [], argv=["nli"])
    assert error_of(read_flags, [], argv=["train_file", "nli.csv"]) == (  # BUG: "did you mean 'train_file'?"
        "train_file has no dashes before it; give --train_file (--help lists the flags)"
    )
    assert error_of(read_flags, [], argv=["--learning_rate", "x"]) == (
        "argument --learning_rate: invalid float value: 'x'; --help lists the flags"
    )


def test_flags_are_overridden_and_not_changed(tmp_path):
    kinds = [SimCSE, ContrastiveTrainingArguments]
    flags = cli.read_flags(kinds, argv=["--temperature", "0.1", "--seed", "3", "--load_best_model_at_end", "--eval_strategy",
                                        "epoch", "--save_strategy", "epoch", "--use_cpu"])  # fmt: skip
    args = flags.make(ContrastiveTrainingArguments)
    other = flags.override(seed=4, load_best_model_at_end=False).override_as_given({"temperature": 1, "eval-strategy": "no"})
    assert (flags.make(SimCSE).temperature, other.make(SimCSE).temperature) == (0.1, 1.0)
    assert flags.make(ContrastiveTrainingArguments) == args and args.metric_for_best_model == "auto"
    changed = other.make(ContrastiveTrainingArguments)  # values derived from the old flags are derived again
    assert (changed.seed, changed.metric_for_best_model, changed.do_eval) == (4, None, False)
    assert "unknown flag --temprature=1 (did you mean 'temperature'?)" in error_of(flags.override_as_given, {"temprature": 1})
    assert "argument --seed: invalid int value: 'x'" in error_of(flags.override_as_given, {"seed": "x"})
    assert "ignored explicit argument 'True'" in error_of(flags.override_as_given, {"no_mask_other_positives": True})
    assert "temperature is -1.0" in error_of(flags.override(temperature=-1.0).make, SimCSE)


def test_a_preset_is_named_as_one(tmp_path):
    """The message names the preset, because the user may not have given a --config."""
    path = tmp_path / "preset.yaml"
    path.write_text("temperture: 0.1")
    expected = f"the recipe's preset {path}: unknown key 'temperture' (did you mean 'temperature'?)"
    assert error_of(cli.read_flags, [SimCSE], path, argv=[]) == expected
    assert error_of(cli.read_flags, [SimCSE], argv=["--config", str(path)]) == expected.replace(
        "the recipe's preset", "--config"
    )
