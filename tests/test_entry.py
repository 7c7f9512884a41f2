"""Tests of the ways to start a recipe: as a script of a clone, by `python -m`, and by the command `hf-embed`."""

import ast
import configparser
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import types
import venv
from pathlib import Path

import pytest
from conftest import error_of
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import hf_embed
from hf_embed import ImprovedContrastive, SimCSE, entry
from hf_embed.kit import cli, command, plan
from hf_embed.kit import launch as launching

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("[!_]*.py"))


# ---- messages name recipes in the form that the user used ----


def test_the_form_of_a_script(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recipes/gte_finetune.py"])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(ROOT / "recipes" / "gte_finetune.py"), raising=False)
    assert entry.recipe_command("gte_pretrain") == "python recipes/gte_pretrain.py"


def test_the_form_of_the_command(monkeypatch):
    for first in ("hf-embed gte-finetune", "/usr/bin/hf-embed"):
        monkeypatch.setattr(sys, "argv", [first])
        assert entry.recipe_command("gte_pretrain") == "hf-embed gte-pretrain"


def test_the_form_of_a_module(monkeypatch):
    spec = types.SimpleNamespace(name="hf_embed.recipes.gte_finetune")
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    assert entry.recipe_command("gte_pretrain") == "python -m hf_embed.recipes.gte_pretrain"


@pytest.mark.parametrize("first", ["my_training.py", "/home/me/recipes/mine.py", ""])
def test_the_form_in_a_script_of_the_user(monkeypatch, first):
    """BUG: the message named recipes/push.py, which does not exist where the package was installed with pip."""
    monkeypatch.setattr(sys, "argv", [first])
    monkeypatch.setattr(sys.modules["__main__"], "__file__", first, raising=False)
    assert entry.recipe_command("push") == "hf-embed push"


# ---- files that ship with the recipes ----


def test_files_that_ship_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "recipes/configs/sup_simcse_bert_base.yaml"
    assert Path(entry.shipped(name)).is_file() and entry.shipped(name).endswith(name)
    assert entry.shipped("recipes/configs/absent.yaml") == "recipes/configs/absent.yaml"
    assert entry.shipped("configs/sup_simcse_bert_base.yaml") == "configs/sup_simcse_bert_base.yaml"
    Path("recipes/configs").mkdir(parents=True)
    Path(name).write_text("learning_rate: 1")
    assert entry.shipped(name) == name  # the user's own file has priority


def test_a_preset_is_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = plan.read_flags([SimCSE], argv=["--config", "recipes/configs/sup_simcse_bert_base.yaml", "--use_cpu"])
    assert flags.values["temperature"] == 0.05 and flags.values["model_name_or_path"] == "google-bert/bert-base-uncased"
    error = error_of(plan.read_flags, [SimCSE], argv=["--config", "recipes/configs/absent.yaml"])
    assert error == "--config recipes/configs/absent.yaml: this file does not exist; check the path"


@pytest.mark.parametrize(
    ("named", "batch"),
    [
        ("seed: 7", 128),
        ("seed: 7\nmodel_name_or_path:", 128),
        (f"seed: 7\nmodel_name_or_path: {plan.LANGUAGE_MODEL}", 8),  # another model has the defaults of all flags
    ],
)
def test_a_file_of_settings_is_the_same_as_flags(tmp_path, named, batch):
    """BUG: with `--config`, the built-in model lost the settings that the file does not name: batch 8 in place of 128."""
    (tmp_path / "run.yaml").write_text(named)
    preset = Path(entry.recipes_folder(), "configs", "sup_simcse_quickstart.yaml")
    words = [f"--{line.replace(': ', '=')}" for line in named.splitlines() if not line.endswith(":")]
    file, line = (
        plan.read_flags([SimCSE], preset, ["model_name_or_path"], [*given, "--use_cpu"]).values
        for given in (["--config", str(tmp_path / "run.yaml")], words)
    )
    assert file == line and file["seed"] == 7 and file["per_device_train_batch_size"] == batch


@pytest.mark.parametrize(
    ("words", "schedule", "keeps_best"),
    [
        ("", ("steps", "steps", 12, 12), True),
        ("--save_strategy no", ("steps", "no", 12, 12), False),
        ("--eval_strategy no", ("no", "steps", None, 12), False),
        ("--save_strategy epoch", ("epoch", "epoch", 12, 12), True),
        ("--eval_strategy epoch", ("epoch", "epoch", 12, 12), True),
        ("--save_strategy best", ("steps", "best", 12, 12), True),
        ("--save_steps 3", ("steps", "steps", 3, 3), True),
        ("--save_steps 0.5", ("steps", "steps", 0.5, 0.5), True),
        ("--save_steps 24", ("steps", "steps", 12, 24), True),  # each checkpoint is evaluated already
        ("--eval_steps 5", ("steps", "steps", 5, 5), True),
        ("--eval_steps 6", ("steps", "steps", 6, 12), True),
        ("--eval_steps 2 --save_steps 3", ("steps", "steps", 2, 3), False),
        ("--eval_steps 5 --save_strategy epoch", ("steps", "epoch", 5, 5), False),
        ("--eval_strategy no --save_strategy no", ("no", "no", None, 12), False),
        ("--save_steps 3 --load_best_model_at_end false", ("steps", "steps", 12, 3), False),
    ],
)
def test_what_the_user_gives_wins_over_the_preset(words, schedule, keeps_best, caplog):
    """BUG: these were errors about load_best_model_at_end and eval_steps, which the user had not given."""
    preset = Path(entry.recipes_folder(), "configs", "sup_simcse_quickstart.yaml")
    flags = plan.read_flags([SimCSE], preset, ["model_name_or_path"], [*words.split(), "--use_cpu"])
    names = ("eval_strategy", "save_strategy", "eval_steps", "save_steps")
    assert tuple(flags.values[name] for name in names) == schedule
    assert flags.values["load_best_model_at_end"] is keeps_best
    said = [message for message in caplog.messages if message.endswith("the last model is kept, not the best one")]
    assert len(said) == (not keeps_best and "load_best" not in words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--load_best_model_at_end --save_strategy no", "load_best_model_at_end needs an evaluation of each checkpoint"),
        ("--load_best_model_at_end --save_steps 3 --eval_steps 2", "found 3, which is not a round multiple of 2"),
        ("--load_best_model_at_end --save_strategy epoch --eval_strategy steps", "set both to steps"),
        ("--eval_steps 0", "eval_steps is 0"),
    ],
)
def test_what_contradicts_itself_is_refused(words, expected):
    preset = Path(entry.recipes_folder(), "configs", "sup_simcse_quickstart.yaml")
    assert expected in error_of(plan.read_flags, [SimCSE], preset, ["model_name_or_path"], [*words.split(), "--use_cpu"])


def test_other_presets_follow_too():
    """These presets evaluate or save nothing by themselves."""
    words = ["--load_best_model_at_end", "--eval_strategy", "steps", "--eval_steps", "10", "--use_cpu"]
    for name, steps in (("gte_finetune", 500), ("distill", 500)):
        preset = Path(entry.recipes_folder(), "configs", f"{name}_quickstart.yaml")
        values = plan.read_flags([] if name == "distill" else [ImprovedContrastive], preset, argv=words).values
        assert (values["save_strategy"], values["eval_steps"], values["save_steps"]) == ("steps", 10, steps)
    values = plan.read_flags([], preset, argv=["--load_best_model_at_end", "--use_cpu"]).values
    assert (values["eval_steps"], values["save_steps"]) == (72, 72)


def test_ctrl_c_is_one_line_of_the_first_process(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    entry.show_error(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "interrupted\n"
    entry.show_error(ValueError, ValueError("of another kind"), None)
    assert capsys.readouterr().err == "ValueError: of another kind\n"
    monkeypatch.setenv("RANK", "1")
    entry.show_error(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == ""


# ---- several processes ----


@pytest.fixture
def launched(monkeypatch):
    """Return a function that runs `hf-embed launch` and returns the arguments that accelerate would get."""

    def arguments(*words):
        def stop(args):
            raise KeyboardInterrupt(args)

        monkeypatch.setattr(launching, "launch_command", stop)
        monkeypatch.setattr(sys, "argv", ["hf-embed", "launch", *words])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 130
        return ended.value.__context__.args[0]

    return arguments


def test_launch_separates_the_flags_of_the_launcher_from_those_of_the_recipe(launched):
    args = launched("--config_file", "recipes/accelerate/ddp_8gpu.yaml", "gte-pretrain", "--learning_rate", "1e-4")
    assert args.module and args.training_script == "hf_embed.recipes.gte_pretrain"
    assert args.training_script_args == ["--learning_rate", "1e-4"]
    assert Path(args.config_file).is_file()


def test_launch_takes_the_configuration_that_starts_several_processes_on_cpus(launched, monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    args = launched("--num_processes", "3", "sup_simcse")
    assert args.config_file.endswith("cpu_2.yaml") and args.num_processes == 3 and not args.cpu
    assert launched("sup_simcse").config_file is None
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    assert launched("--num_processes", "3", "sup_simcse").config_file is None
    assert launched("--cpu", "--num_processes", "3", "sup_simcse").config_file.endswith("cpu_2.yaml")


def test_launch_refuses_in_one_line(monkeypatch, capsys):
    def message(*words):
        monkeypatch.setattr(sys, "argv", ["hf-embed", "launch", *words])
        with pytest.raises(SystemExit) as ended:
            command.main()
        assert ended.value.code == 2
        *first, last = capsys.readouterr().err.splitlines()
        assert first in ([], ["hf_embed 0.1.0: starting the processes ..."])
        return last.removeprefix("error: ")

    assert message("sup-simse") == "there is no recipe 'sup-simse' (did you mean 'sup-simcse'?); hf-embed lists the recipes"
    assert message("--num_processes", "2") == (
        "no recipe is given; give hf-embed launch --config_file FILE RECIPE [FLAGS] (hf-embed lists the recipes)"
    )
    assert message("--bogus", "2", "sup-simcse") == (
        "unrecognized arguments: --bogus; accelerate launch --help lists its flags"
    )
    assert message("--config_file", "absent.yaml", "sup-simcse").startswith(
        "The passed configuration file `absent.yaml` does not exist."
    )


def test_the_status_of_a_process_that_failed(capsys):
    def failure(status):
        return ProcessFailure(local_rank=1, pid=1, exitcode=status, error_file="")

    assert launching.status_of(failure(2), 1) == 2 and capsys.readouterr().err == ""
    assert launching.status_of(failure(-9), 1) == 137
    assert capsys.readouterr().err == ("error: process 1 was ended by SIGKILL; the system does this when memory runs out\n")


def test_one_process_in_place_of_several_is_noticed(monkeypatch):
    """The launcher sets MASTER_ADDR for its child if several processes were requested.

    On a cluster, MASTER_ADDR may also be in the environment of the launcher itself. Then it proves nothing.
    """
    of_launcher = {"MASTER_ADDR": "127.0.0.1"}
    launcher = types.SimpleNamespace(environ=lambda: of_launcher)
    monkeypatch.setattr(cli.psutil, "Process", lambda: types.SimpleNamespace(parent=lambda: launcher))
    for name, value in {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cli.check_processes()
    of_launcher.clear()
    started = "accelerate started one process although several were requested (it does this on CPUs)"
    assert error_of(cli.check_processes).startswith(started)
    monkeypatch.setenv("WORLD_SIZE", "2")
    cli.check_processes()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--config_file", "recipes/accelerate/cpu_2.yaml"], ["--num_processes", "2"], []])
def test_an_error_of_several_processes_is_one_line(words):
    script = str(Path(sysconfig.get_path("scripts"), "hf-embed"))
    call = [script, "launch", *words, "sup-simcse", "--learning_rte", "1"]
    done = subprocess.run(call, env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    # Lines that start with hf_embed only report progress, for example that PyTorch is loaded.
    errors = [line for line in done.stderr.splitlines() if not line.startswith("hf_embed ")]
    assert errors == ["error: unknown flag --learning_rte (did you mean 'learning_rate'?); --help lists the flags"]


# ---- the command ----

LIST = [sys.executable, "-c", "from hf_embed.kit.command import main; main()"]


def test_the_command_lists_every_recipe():
    shown = subprocess.run(LIST, capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in shown.splitlines()[2:-2]] == [name.replace("_", "-") for name in RECIPES]


def test_a_reader_that_has_ended_ends_the_list_without_a_message():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(LIST, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (-signal.SIGPIPE, "")


def test_the_command_works_where_there_is_no_sigpipe(monkeypatch, capsys):
    """BUG: on Windows, `hf-embed` without arguments ended in a traceback."""
    monkeypatch.delattr(signal, "SIGPIPE")
    monkeypatch.setattr(sys, "argv", ["hf-embed"])
    command.main()
    assert "sup-simcse" in capsys.readouterr().out


def test_an_unknown_recipe_is_one_line():
    assert (
        error_of(command.find_recipe, "sup_simces")
        == "there is no recipe 'sup_simces' (did you mean 'sup-simcse'?); hf-embed lists the recipes"
    )


# ---- the first line ----

SLOW_TORCH = "import sys\nprint('torch is imported', file=sys.stderr)\nsys.exit(7)\n"


def start(words: list, tmp_path: Path, **environment) -> subprocess.CompletedProcess:
    """Start Python with a module torch, in place of the real one, that ends the process when it is imported."""
    (tmp_path / "stubs").mkdir(exist_ok=True)
    (tmp_path / "stubs" / "torch.py").write_text(SLOW_TORCH)
    (tmp_path / "hf-embed").write_text("from hf_embed.kit.command import main\nmain()\n")
    paths = {"PYTHONPATH": os.pathsep.join([str(tmp_path / "stubs"), str(ROOT)])}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT | paths | environment, text=True, capture_output=True)


FIRST = f"hf_embed {hf_embed.__version__}: loading PyTorch and transformers ...\n"


QUICK = ["sup_simcse", "encode", "evaluate", "tempscale"]


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES])
def test_a_recipe_speaks_before_torch_is_imported(name, tmp_path):
    done = start([ROOT / "recipes" / f"{name}.py"], tmp_path)
    assert (done.returncode, done.stderr, done.stdout) == (7, FIRST + "torch is imported\n", "")


@pytest.mark.parametrize(
    "words", [["-m", "hf_embed.recipes.evaluate"], ["hf-embed", "evaluate"], ["hf-embed", "push", "--help"]]
)
def test_every_form_speaks_first_and_once(words, tmp_path):
    assert start(words, tmp_path).stderr == FIRST + "torch is imported\n"
    assert start(words, tmp_path, RANK="1").stderr == "torch is imported\n"  # only the main process prints it


@pytest.mark.parametrize(
    ("words", "code"),
    [(["hf-embed"], 0), (["hf-embed", "--help"], 0), (["hf-embed", "--version"], 0), (["hf-embed", "absent"], 2),
     (["-c", "import hf_embed; hf_embed.__version__; dir(hf_embed)"], 0)],
)  # fmt: skip
def test_commands_that_need_no_torch_do_not_import_it(words, code, tmp_path):
    done = start(words, tmp_path)
    assert done.returncode == code and FIRST not in done.stderr and "torch is imported" not in done.stderr, done.stderr


@pytest.mark.parametrize("script", ["import hf_embed.kit.plan", "from hf_embed import Encoder"])
def test_a_script_of_the_user_has_no_first_line(script, tmp_path):
    (tmp_path / "mine.py").write_text(script)
    assert start(["mine.py"], tmp_path).stderr == "torch is imported\n"


def test_names_are_imported_when_they_are_used():
    listed = {name for names in hf_embed.MODULES.values() for name in names}
    assert listed == set(hf_embed.__all__) and set(hf_embed.__all__) <= set(dir(hf_embed))
    for module, names in hf_embed.MODULES.items():
        for name in names:
            assert getattr(hf_embed, name) is getattr(importlib.import_module(f"hf_embed.{module}"), name)
    checked = next(node for node in ast.parse(Path(hf_embed.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {node.module.removeprefix("hf_embed."): [alias.name for alias in node.names] for node in checked.body}
    assert seen == hf_embed.MODULES  # type checkers see the names that are imported
    assert hf_embed.mining.__name__ == "hf_embed.mining"
    with pytest.raises(AttributeError, match="module 'hf_embed' has no attribute 'Encodr'"):
        hf_embed.Encodr  # noqa: B018


# ---- the package ----


def test_setup_lists_every_package():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    folders = {path.parent for path in (ROOT / "hf_embed").rglob("__init__.py")}
    assert listed == {".".join(folder.relative_to(ROOT).parts) for folder in folders} | {"hf_embed.recipes"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """Install the wheel in a new virtual environment, and return that environment's folder of programs.

    The new environment uses the dependencies of the present one.
    """
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], check=True, env=ENVIRONMENT)
    venv.create(folder / "env", with_pip=True)
    python = folder / "env" / "bin" / "python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run([python, *pip[1:], "install", "--no-deps", wheel], check=True, env=ENVIRONMENT)
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(ask, check=True, text=True, capture_output=True).stdout.strip()
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.parent


@pytest.mark.slow
def test_the_wheel_trains_from_any_folder(installed, tmp_path):
    settings = {"cwd": tmp_path, "env": ENVIRONMENT, "text": True, "capture_output": True, "timeout": 600}
    where = subprocess.run([installed / "python", "-c", "import hf_embed; print(hf_embed.__file__)"], **settings)
    assert str(installed.parent) in where.stdout, where.stdout + where.stderr
    preset = "from hf_embed.entry import shipped; print(shipped('recipes/configs/sup_simcse_bert_base.yaml'))"
    found = subprocess.run([installed / "python", "-c", preset], **settings).stdout.strip()
    assert found.startswith(str(installed.parent)) and Path(found).is_file()
    short = ["--max_steps", "2", "--use_cpu"]
    done = subprocess.run([installed / "hf-embed", "sup-simcse", *short], **settings)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "outputs/quickstart/results.json").read_text())["train"]["steps"] == 2
    launch = [installed / "python", "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    again = [*launch, "-m", "hf_embed.recipes.unsup_simcse"]
    done = subprocess.run([*again, *short, "--output_dir", "out"], **settings)
    assert done.returncode == 0 and (tmp_path / "out" / "config.json").is_file(), done.stderr[-2000:]
    done = subprocess.run([installed / "hf-embed", "gte-finetune"], **settings)
    assert done.returncode == 2 and "run hf-embed gte-pretrain first" in done.stderr
    done = subprocess.run([installed / "hf-embed", "evaluate", "--help"], **settings)
    assert done.returncode == 0 and done.stdout.startswith("usage: hf-embed evaluate")


@pytest.mark.slow
def test_the_six_commands_of_the_quickstart_page(installed, tmp_path):
    page = (ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")
    (faq,), (commands,), (snippet,) = (
        re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL) for kind in ("csv", "bash", "python")
    )
    install, *commands = commands.splitlines()
    assert install == "pip install hf_embed" and len(commands) == 5  # the fixture has done the installation
    (tmp_path / "faq.csv").write_text(faq, encoding="utf-8")
    environment = ENVIRONMENT | {"PATH": f"{installed}{os.pathsep}{ENVIRONMENT['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    settings = {"cwd": tmp_path, "env": environment, "text": True, "capture_output": True, "timeout": 900}
    outputs = []
    for command_line in commands:
        done = subprocess.run(command_line, shell=True, **settings)
        assert done.returncode == 0, f"{command_line}\n{done.stderr[-2000:]}"
        assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr
        outputs.append(done.stdout)
    first, mine = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("first", "mine"))
    assert first["after"]["sts"]["quickstart"] > first["before"]["sts"]["quickstart"] + 10
    assert mine["train"]["rows"] == 16
    assert json.loads((tmp_path / "scores" / "results.json").read_text())["retrieval"]["json"]["ndcg@10"] > 30
    assert "wrote answers.npy: 16 vectors of 192 numbers, float32" in outputs[3]
    found = [line for line in outputs[4].splitlines() if line.strip()]
    assert "a new one costs five euros" in found[found.index("my card is gone") + 1]
    assert "we read stories to children" in found[found.index("stories for my daughter") + 1]
    done = subprocess.run([installed / "python", "-c", f"{snippet}print(vectors.shape)"], **settings)
    assert done.returncode == 0 and "(2, 192)" in done.stdout, done.stderr[-2000:]
