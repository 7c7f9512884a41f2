"""Every private name of another library that this package relies on, each behind a function or constant.

A private name may change with any release. tests/test_library_internals.py has one test for each, so that an upgrade tells at
once which one moved; only this file has to follow then. No other module may use a private name of another library.
"""

import argparse
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.utils import PushInProgress, cached_file

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import TrainerMemoryTracker

__all__ = ["PushInProgress"]  # transformers calls it internal: `Trainer.push_in_progress` has to be one

# Private methods of `Trainer` that `ContrastiveTrainer` replaces, and the parameters that they are called with.
# fmt: off
REPLACED_TRAINER_METHODS: dict[str, tuple[str, ...]] = {
    "_save": ("output_dir", "state_dict"),
    "_load_from_checkpoint": ("resume_from_checkpoint", "model"),
    "_load_best_model": (),
    "_save_checkpoint": ("model", "trial"),
    "_load_optimizer_and_scheduler": ("checkpoint",),
    "_load_rng_state": ("checkpoint",),
    "_init_training_state": (
        "max_steps", "num_update_steps_per_epoch", "num_train_epochs", "resume_from_checkpoint", "trial"
    ),
    "_run_epoch": (
        "model", "epoch", "train_dataloader", "steps_in_epoch", "num_update_steps_per_epoch", "trial", "ignore_keys_for_eval",
        "start_time", "resume_from_checkpoint", "epochs_trained", "steps_trained_in_current_epoch",
    ),
    "_finalize_training": ("trial", "num_train_samples", "start_time"),
    "_push_from_checkpoint": ("checkpoint_folder",),
    "_finish_current_push": (),
    "_maybe_log_save_evaluate": (
        "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time", "learning_rate",
    ),
    "_get_grad_norm": ("model", "grad_norm"),
}
# fmt: on
# Private methods of `evaluate.Metric` that a metric has to define.
METRIC_METHODS = ("_info", "_compute")


# ---- transformers: configs and models ----


def attention_backend(config: Any) -> str | dict | None:
    """Return the attention that a model runs on: "sdpa", "flash_attention_2", a dict of them by submodel, or None."""
    return getattr(config, "_attn_implementation", None)


def saves_its_code(kind: type) -> bool:
    """Return whether `register_for_auto_class` was called on a class, so that `save_pretrained` copies its code."""
    return getattr(kind, "_auto_class", None) is not None


def layers_to_wrap(model: nn.Module) -> Any:
    """Return the class names of the layers that FSDP wraps one by one."""
    return model._no_split_modules


def forget_adapters(model: nn.Module) -> None:
    """Let `save_pretrained` write the whole model, whose adapters are merged, instead of adapters alone."""
    model._hf_peft_config_loaded = False  # type: ignore[assignment]


def optional_file(name: str, file: str, **hub: Any) -> str | None:
    """Return the local path of a file of a model folder or Hub repository; None if there is no such file."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)


# ---- transformers: the trainer ----


def use_one_gpu(args: TrainingArguments) -> None:
    """Keep `Trainer` from wrapping the model in `DataParallel`, which it does where one process sees several GPUs."""
    args._n_gpu = 1


def train_batch_size(trainer: "Trainer") -> int:
    """Return the rows of a batch on this rank, as `auto_find_batch_size` has set them."""
    return trainer._train_batch_size


def first_step(trainer: "Trainer") -> int:
    """Return the step from which the last training went on; 0 where it was not resumed."""
    return trainer._initial_global_step


def memory_tracker(trainer: "Trainer") -> "TrainerMemoryTracker":
    """Return what measures memory for `skip_memory_metrics=False`; to be started and stopped around an evaluation."""
    return trainer._memory_tracker


def save_without_push(trainer: "Trainer", folder: str | None = None) -> None:
    """Save the model in `folder` or the output folder, and do not push it even where `push_to_hub` is set."""
    trainer.save_model(folder, _internal_call=True)


def save_optimization(trainer: "Trainer", folder: str) -> None:
    """Write the states of optimizer, schedule and gradient scaler, and of this rank's random numbers, into `folder`."""
    trainer._save_optimizer_and_scheduler(folder)
    trainer._save_scaler(folder)
    trainer._save_rng_state(folder)


def save_checkpoint(trainer: "Trainer", model: nn.Module, trial: Any) -> None:
    """Save a checkpoint of this step, with what resuming needs."""
    trainer._save_checkpoint(model, trial)


# ---- torch, datasets, argparse ----


def set_base_rates(scheduler: LambdaLR, rates: list[Any]) -> None:
    """Let a schedule go on from other learning rates, one of each group of weights: they are `rates` times its factor now."""
    scheduler.base_lrs = rates
    scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr):
        group["lr"] = rate


def uncompiled(model: nn.Module) -> nn.Module | None:
    """Return the model that `torch.compile` was given; None if `model` is not compiled."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else None


def set_group_timeout(timeout: timedelta) -> None:
    """Set how long a collective of the default group waits for other ranks, with gloo as with NCCL."""
    torch.distributed.distributed_c10d._set_pg_timeout(timeout)


def set_fingerprint(rows: datasets.Dataset, fingerprint: str) -> None:
    """Set what `Dataset.map` names its cache by, so that the same file is not tokenized twice."""
    rows._fingerprint = fingerprint


def fingerprint_of(rows: datasets.Dataset) -> str:
    """Return what `Dataset.map` names the cache of these rows by."""
    return rows._fingerprint


def parser_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return all flags of a parser."""
    return parser._actions
