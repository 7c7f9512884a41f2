"""Test that each private name of another library that the package uses exists and does what `library_internals` says.

A failure after an upgrade names what has changed. Only hf_embed/library_internals.py has to be adapted.
"""

import argparse
import ast
import concurrent.futures
import inspect
import json
import types
from datetime import timedelta
from pathlib import Path

import evaluate
import huggingface_hub
import pytest
import torch
import torch.distributed as dist
import transformers.trainer
import transformers.utils.hub
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from conftest import tiny_encoder, tiny_model
from datasets import Dataset, concatenate_datasets, interleave_datasets
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig
from transformers import MODEL_MAPPING, AutoModel, BertConfig, BertModel, Trainer, TrainingArguments
from transformers.trainer_utils import HPSearchBackend, TrainerMemoryTracker

from hf_embed import ContrastiveTrainer
from hf_embed import library_internals as internals
from hf_embed.evaluation import metrics
from hf_embed.step import TrainingStep

ROOT = Path(__file__).parent.parent

# Private methods of `Trainer` that `ContrastiveTrainer` overrides, and those of their parameters that it names.
# fmt: off
REPLACED_TRAINER_METHODS: dict[str, tuple[str, ...]] = {
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_save_checkpoint": ("model", "trial"),
    "_determine_best_metric": ("metrics", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_prepare_for_training": (),
    "_init_training_state": (
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"
    ),
    "_run_epoch": (),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_finish_current_push": (),
    "_evaluate": ("trial", "ignore_keys_for_eval", "skip_scheduler"),
    "_maybe_log_save_evaluate": ("tr_loss", "grad_norm", "model", "trial"),
    "_get_grad_norm": ("model", "grad_norm"),
    "_prepare_input": ("data",),
}
# fmt: on
# Private methods of `evaluate.Metric` that a metric must define.
METRIC_METHODS = ("_info", "_compute")


def plain_trainer(folder, trainer_class: type[Trainer] = Trainer, **settings) -> Trainer:
    args = TrainingArguments(str(folder), use_cpu=True, report_to="none", **settings)
    return trainer_class(model=tiny_model(), args=args)


# ---- transformers: configs and models ----


def test_attention_backend():
    for backend in ("eager", "sdpa"):
        assert internals.attention_backend(tiny_model(attn_implementation=backend).config) == backend


def test_automodel_asks_the_public_mapping():
    assert AutoModel._model_mapping is MODEL_MAPPING  # so `MODEL_MAPPING` tells which class AutoModel chooses for a config


def test_keep_own_settings(tmp_path):
    config = type("ToyConfig", (BertConfig,), {})()
    config.max_length = 64
    with pytest.raises(ValueError, match="generation parameters"):
        config.save_pretrained(tmp_path)
    internals.keep_own_settings(config)
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["max_length"] == 64


class ToyModel(BertModel):
    pass


def test_saves_its_code(tmp_path):
    assert not internals.saves_its_code(ToyModel)
    ToyModel.register_for_auto_class("AutoModel")
    assert internals.saves_its_code(ToyModel) and not internals.saves_its_code(BertModel)
    ToyModel(BertConfig(**tiny_model().config.to_diff_dict())).save_pretrained(tmp_path)
    assert (tmp_path / Path(__file__).name).is_file()


def test_layers_to_wrap():
    encoder = tiny_encoder()
    assert "BertLayer" in internals.layers_to_wrap(encoder.base)
    plugin = FullyShardedDataParallelPlugin(auto_wrap_policy="transformer_based_wrap")
    plugin.set_auto_wrap_policy(TrainingStep(encoder))  # accelerate passes the module that is trained
    assert type(encoder.base.encoder.layer[0]) in plugin.auto_wrap_policy.keywords["transformer_layer_cls"]


def test_forget_adapters(tmp_path):
    model = tiny_model()
    model.add_adapter(LoraConfig(r=2, target_modules=["query"]))
    model.save_pretrained(tmp_path / "before")
    internals.forget_adapters(model)
    model.save_pretrained(tmp_path / "after")
    assert (tmp_path / "before" / "adapter_config.json").is_file() and not (tmp_path / "before" / "config.json").is_file()
    assert (tmp_path / "after" / "config.json").is_file() and not (tmp_path / "after" / "adapter_config.json").is_file()


def test_optional_file(tmp_path):
    (tmp_path / "here.json").write_text("{}")
    assert internals.optional_file(str(tmp_path), "here.json") == str(tmp_path / "here.json")
    assert internals.optional_file(str(tmp_path), "absent.json") is None


# ---- transformers: the trainer ----

TRAINER_MODULE = ast.parse(inspect.getsource(transformers.trainer))
CALLS_IN_TRAINER = [node for node in ast.walk(TRAINER_MODULE) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("name", REPLACED_TRAINER_METHODS)
def test_trainer_calls_the_methods_that_are_replaced(name):
    own, replaced = (inspect.signature(getattr(kind, name)) for kind in (ContrastiveTrainer, Trainer))
    named = REPLACED_TRAINER_METHODS[name]
    passed_on = [part.name for part in own.parameters.values() if part.kind in (part.VAR_POSITIONAL, part.VAR_KEYWORD)]
    assert tuple(own.parameters)[1:] == (*named, *passed_on)
    assert tuple(replaced.parameters)[1:][: len(named) if passed_on else None] == named
    calls = [
        node for node in ast.walk(TRAINER_MODULE) if isinstance(node, ast.Call) and ast.unparse(node.func) == f"self.{name}"
    ]
    assert calls
    for call in calls:
        own.bind(None, *call.args, **{keyword.arg: keyword.value for keyword in call.keywords})


def test_no_other_private_method_of_trainer_is_replaced():
    kinds = [kind for kind in ContrastiveTrainer.__mro__ if kind.__module__.startswith("hf_embed.")]
    private = {name for kind in kinds for name in vars(kind) if name.startswith("_") and not name.startswith("__")}
    assert {name for name in private if hasattr(Trainer, name)} == set(REPLACED_TRAINER_METHODS)


def test_use_one_gpu(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True)
    args._n_gpu = 4
    internals.use_one_gpu(args)
    assert args.n_gpu == 1


def test_accelerate_state(tmp_path):
    accelerator = Accelerator(cpu=True)
    kept = internals.accelerate_state()
    TrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(AttributeError):  # control
        accelerator.distributed_type  # noqa: B018
    internals.set_accelerate_state(kept)
    assert accelerator.distributed_type == DistributedType.NO and accelerator.state.initialized
    with pytest.raises(ValueError, match="already been initialized"):  # control
        Accelerator(cpu=True, mixed_precision="bf16")
    internals.clear_accelerator_state()
    model, accelerator = torch.nn.Linear(1, 1), Accelerator(cpu=True, mixed_precision="bf16")
    assert accelerator.mixed_precision == "bf16" and not internals.in_mixed_precision(model)
    assert internals.in_mixed_precision(accelerator.prepare_model(model, evaluation_mode=True))


def test_train_batch_size(tmp_path):
    assert internals.train_batch_size(plain_trainer(tmp_path, per_device_train_batch_size=3)) == 3
    assigned = [ast.unparse(node) for node in ast.walk(TRAINER_MODULE) if isinstance(node, ast.Assign)]
    assert "self._train_batch_size = batch_size" in assigned  # auto_find_batch_size sets the number in this way


def test_save_optimization(tmp_path):
    run = plain_trainer(tmp_path)
    run.create_optimizer_and_scheduler(4)
    (tmp_path / "saved").mkdir()
    internals.save_optimization(run, str(tmp_path / "saved"))
    assert {path.name for path in (tmp_path / "saved").iterdir()} == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}


def test_set_base_rates(tmp_path):
    """A schedule that is set to another rate gives the same rates as a schedule that began with this rate."""
    runs = [plain_trainer(tmp_path, learning_rate=rate) for rate in (1e-3, 1e-4)]
    for run in runs:
        run.create_optimizer_and_scheduler(4)
        run.optimizer.step()
        run.lr_scheduler.step()
    internals.set_base_rates(runs[0].lr_scheduler, [1e-4, 1e-4])
    for step in range(3):
        rates = [[*run.lr_scheduler.get_last_lr(), *(group["lr"] for group in run.optimizer.param_groups)] for run in runs]
        assert rates[0] == rates[1] == [1e-4 * (3 - step) / 4] * 4
        for run in runs:
            run.optimizer.step()
            run.lr_scheduler.step()


def test_total_loss(tmp_path):
    trainer = plain_trainer(tmp_path)
    trainer._total_loss_scalar = 7.0  # the name that Trainer.train sets
    assert internals.total_loss(trainer) == 7.0
    assert "self._total_loss_scalar += self._tr_loss.item()" in inspect.getsource(type(trainer)._finalize_training)


def test_made_schedule(tmp_path):
    trainer = plain_trainer(tmp_path)
    assert not internals.made_schedule(trainer)
    trainer.create_optimizer_and_scheduler(4)
    assert internals.made_schedule(trainer)


def test_memory_tracker(tmp_path):
    assert isinstance(internals.memory_tracker(plain_trainer(tmp_path)), TrainerMemoryTracker)
    tracker, found = TrainerMemoryTracker(skip_memory_metrics=False), {}
    tracker.init_reported = True  # no report of the init stage: Trainer's own __init__ takes four seconds for it

    def evaluate():  # the tracker reads the name of its caller
        tracker.start()
        tracker.stop_and_update_metrics(found)

    evaluate()
    assert "eval_mem_cpu_alloc_delta" in found


class NoticesPush(Trainer):
    pushed = 0

    def push_to_hub(self, *args, **kwargs):
        self.pushed += 1


def test_save_without_push(tmp_path):
    trainer = plain_trainer(tmp_path, NoticesPush)
    trainer.args.push_to_hub = True
    trainer.save_model()
    assert trainer.pushed == 1
    (tmp_path / "config.json").unlink()
    internals.save_without_push(trainer)
    assert trainer.pushed == 1 and (tmp_path / "config.json").is_file()


def test_methods_that_are_never_called_exist():
    for name, mend in internals.NOT_CALLED.items():
        assert all(callable(getattr(Trainer, method)) for method in (name, *mend.split(" and ")))


def test_run_folder(tmp_path):
    trainer = plain_trainer(tmp_path)
    assert internals.run_folder(trainer, None) == str(tmp_path)
    trainer.hp_search_backend, trainer.hp_name = HPSearchBackend.OPTUNA, None
    assert internals.run_folder(trainer, types.SimpleNamespace(number=3)) == str(tmp_path / "run-3")


def test_push_in_progress():
    assert transformers.trainer.PushInProgress is internals.PushInProgress
    job = concurrent.futures.Future()
    push = internals.PushInProgress([job])
    assert not push.is_done() and push.jobs == [job]
    job.set_result(None)
    push.wait_until_done()
    assert push.is_done()


@pytest.mark.skipif(not hasattr(transformers.utils.hub, "_hf_api"), reason="this version of transformers keeps no client")
def test_the_tests_of_the_hub_can_renew_the_client_of_transformers(monkeypatch):
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://localhost:1")
    assert transformers.utils.hub.hf_api().endpoint == "http://localhost:1"


def test_worker_settings():
    assert internals.worker_settings(TrainingArguments("out")) == {"in_order": True, "multiprocessing_context": None}
    if hasattr(TrainingArguments, "dataloader_in_order"):
        given = TrainingArguments("out", dataloader_in_order=False, dataloader_multiprocessing_context="spawn")
        assert internals.worker_settings(given) == {"in_order": False, "multiprocessing_context": "spawn"}


# ---- torch, datasets, evaluate, argparse ----


def test_has_gradient_hook():
    tensor = torch.ones(1, requires_grad=True)
    assert not internals.has_gradient_hook(tensor)
    handle = tensor.register_hook(lambda gradient: 2 * gradient)
    assert internals.has_gradient_hook(tensor)
    handle.remove()
    assert not internals.has_gradient_hook(tensor)


def test_uncompiled():
    model = tiny_model()
    assert internals.uncompiled(torch.compile(model)) is model and internals.uncompiled(model) is None


def test_set_group_timeout():
    """tests/test_ranks.py shows that gloo then waits as long as the timeout says."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        internals.set_group_timeout(timedelta(seconds=7))
        (backend,) = {dist.group.WORLD._get_backend(torch.device("cpu"))}
        assert backend.options._timeout == timedelta(seconds=7)
    finally:
        dist.destroy_process_group()


def test_indices_of():
    rows = Dataset.from_dict({"text": ["a", "b", "c"]})
    assert internals.indices_of(rows) is None and rows.select([2, 0]).data.num_rows == 3
    assert internals.indices_of(rows.select([2, 0])).column(0).to_pylist() == [2, 0]


def test_was_cut():
    rows = Dataset.from_dict({"text": ["a", "b", "c"]}).to_iterable_dataset()
    whole = [rows, rows.map(len), rows.shuffle(seed=0), interleave_datasets([rows, rows]), concatenate_datasets([rows, rows])]
    cut = [rows.take(1), rows.skip(1).map(len).shuffle(seed=0), interleave_datasets([rows, rows.skip(1)])]
    cut.append(concatenate_datasets([rows, rows.take(1)]).filter(len))
    assert [internals.was_cut(stream) for stream in whole + cut] == [False] * 5 + [True] * 4


def test_was_split():
    rows = Dataset.from_dict({"text": ["a", "b", "c"]}).to_iterable_dataset()
    assert not internals.was_split(rows) and internals.was_split(split_dataset_by_node(rows, 0, 2).take(1).shuffle(seed=0))


def test_metric_methods():
    assert all(hasattr(evaluate.Metric, name) for name in METRIC_METHODS)
    own = [kind for kind in vars(metrics).values() if isinstance(kind, type) and issubclass(kind, evaluate.Metric)]
    assert {name for kind in own for name in vars(kind) if name[0] == "_" != name[1]} == {"_info", "_compute"}
    assert metrics.SpearmanCosine().compute(predictions=[0.1, 0.2], references=[1, 2]) == {"spearman": pytest.approx(100)}


def test_parser_actions():
    parser = argparse.ArgumentParser(add_help=False)
    flag = parser.add_argument("--flag")
    assert internals.parser_actions(parser) == [flag]


def test_values_of_words():
    parser = argparse.ArgumentParser()
    one, several = (
        parser.add_argument("--one", type=int, choices=[3, 5]),
        parser.add_argument("--several", nargs="+", type=float),
    )
    assert internals.values_of_words(parser, one, ["3"]) == 3
    assert internals.values_of_words(parser, several, ["1e-5", "-2"]) == [1e-5, -2.0]
    for word in ("x", "4"):
        with pytest.raises(argparse.ArgumentError, match="argument --one: invalid"):
            internals.values_of_words(parser, one, [word])


# ---- private names are used in no other module ----


NAMED_TUPLE = {"_replace", "_asdict", "_fields"}  # public names, although they begin with an underscore


def private_names(source: str) -> tuple[set[str], set[str]]:
    """Return the private names that a module defines, and those that it uses."""
    defined, used = set(), set()
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Attribute):
            names = [node.attr]
            if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
                defined.add(node.attr)
        elif isinstance(node, ast.keyword):
            names = [node.arg or ""]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr", "delattr"):
            names = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        used |= {str(name) for name in names if str(name).startswith("_") and not str(name).startswith("__")}
    return defined, used - NAMED_TUPLE


def test_no_other_module_uses_a_private_name_of_a_library():
    paths = [path for folder in ("hf_embed", "recipes") for path in (ROOT / folder).rglob("*.py")]
    names = {path.relative_to(ROOT).as_posix(): private_names(path.read_text()) for path in paths}
    own = {name for defined, _ in names.values() for name in defined}
    foreign = {path: used - own for path, (_, used) in names.items() if used - own}
    assert set(foreign) == {"hf_embed/library_internals.py"}, foreign


def test_a_private_name_is_found():
    source = "from a._b import c\nmodel._d\ngetattr(model, '_e', 1)\nf(_g=1)\nrow._replace(a=1)\nself._h = 1\ndef _i(): pass"
    assert private_names(source) == ({"_h", "_i"}, {"_b", "_d", "_e", "_g", "_h"})
