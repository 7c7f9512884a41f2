"""Wrappers for every private name of another library that this package uses. Each one is a function or a constant.

A private name may change with any release. tests/test_library_internals.py has one test for each name, so after an upgrade the
tests show at once which name has changed. Only this file must then be adapted. No other module may use a private name of
another library. The private methods that classes of this package override are listed in that test file.
"""

import argparse
import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import datasets
import torch
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments
from transformers.utils import PushInProgress, cached_file

if TYPE_CHECKING:
    from transformers import Trainer
    from transformers.trainer_utils import TrainerMemoryTracker

__all__ = ["PushInProgress"]  # internal to transformers, but `Trainer.push_in_progress` must be an object of this class

# Methods of `Trainer` that `ContrastiveTrainer` never calls, and what a subclass can define in their place.
NOT_CALLED = {
    "create_optimizer_and_scheduler": "create_optimizer and create_scheduler",
    "_get_train_sampler": "get_train_dataloader",
    "_get_eval_sampler": "evaluate",
    "get_eval_dataloader": "evaluate",
    "get_test_dataloader": "predict",
    "prediction_step": "evaluate",
    "evaluation_loop": "evaluate",
}


# What transformers calls the recomputation of layers in the backward pass. It had the second name before version 5.23.
CHECKPOINTING = next(n for n in ("activation_checkpointing", "gradient_checkpointing") if hasattr(TrainingArguments, n))


def worker_settings(args: TrainingArguments) -> dict[str, Any]:
    """Return the settings of a data loader that `TrainingArguments` has since transformers 5.15, or their defaults."""
    defaults = {"in_order": True, "multiprocessing_context": None}
    return {name: getattr(args, f"dataloader_{name}", default) for name, default in defaults.items()}


# ---- transformers: configs and models ----


def attention_backend(config: Any) -> str | dict | None:
    """Return a model's attention implementation: "sdpa", "flash_attention_2", a dict of them by submodel, or None."""
    return getattr(config, "_attn_implementation", None)


@contextlib.contextmanager
def plain_attention(model: PreTrainedModel) -> Iterator[None]:
    """Let a model compute attention as transformers' "eager" inside a `with` block, which every device can."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}.values()
    chosen = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation = "eager"
        yield
    finally:
        for config, attention in zip(configs, chosen):
            config._attn_implementation = attention


def keep_own_settings(config: PreTrainedConfig) -> None:
    """Let the config of a model with its own code be saved with settings such as `max_length` and `temperature`.

    transformers takes settings of these names for options of text generation, and refuses to save a config that has them.
    """
    kind: Any = type(config)
    kind._get_generation_parameters = lambda config: {}


def saves_its_code(kind: type) -> bool:
    """Return whether `register_for_auto_class` was called on a class, so that `save_pretrained` copies its code."""
    return getattr(kind, "_auto_class", None) is not None


def layers_to_wrap(model: nn.Module) -> Any:
    """Return the class names of the layers that FSDP wraps separately."""
    return model._no_split_modules


def forget_adapters(model: nn.Module) -> None:
    """Make `save_pretrained` write the whole model with its merged adapters, under its own names, and not the adapters only."""
    model._hf_peft_config_loaded = False  # type: ignore[assignment]
    model._weight_conversions = None  # type: ignore[assignment]  # those of adapters that transformers loaded


def optional_file(name: str, file: str, **hub: Any) -> str | None:
    """Return the local path of a file in a model folder or Hub repository, or None if there is no such file."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub)


# ---- transformers: the trainer ----


def use_one_gpu(args: TrainingArguments) -> None:
    """Prevent `Trainer` from wrapping the model in `DataParallel`, which it does if one process sees several GPUs."""
    args._n_gpu = 1


def accelerate_state() -> list[dict[str, Any]]:
    """Return accelerate's state of this process, for example its mixed precision."""
    return [dict(kind._shared_state) for kind in (PartialState, AcceleratorState)]


def in_mixed_precision(model: nn.Module) -> bool:
    """Return whether accelerate has prepared a model, so that it computes in mixed precision."""
    return hasattr(model, "_original_forward")


def clear_accelerator_state() -> None:
    """Let the next `Accelerator` of this process have its own settings, for example another mixed precision."""
    AcceleratorState._reset_state()


def set_accelerate_state(states: list[dict[str, Any]]) -> None:
    """Set accelerate's state of this process to what `accelerate_state` returned earlier."""
    for kind, state in zip((PartialState, AcceleratorState), states):
        kind._shared_state.clear()
        kind._shared_state.update(state)


def train_batch_size(trainer: "Trainer") -> int:
    """Return the number of rows in a micro-batch on this rank, as Trainer has set it."""
    return trainer._train_batch_size


def total_loss(trainer: "Trainer") -> float:
    """Return the sum of the losses of all steps of the last training."""
    return trainer._total_loss_scalar


def run_folder(trainer: "Trainer", trial: Any) -> str:
    """Return the folder of a training's checkpoints: a folder for each trial of a search, or the output folder."""
    return trainer._get_output_dir(trial)


def made_schedule(trainer: "Trainer") -> bool:
    """Return whether Trainer itself has made the learning-rate schedule. For some optimizers it is one without effect."""
    return trainer._created_lr_scheduler


def memory_tracker(trainer: "Trainer") -> "TrainerMemoryTracker":
    """Return the object that measures memory if `skip_memory_metrics=False`. Start and stop it around an evaluation."""
    return trainer._memory_tracker


def save_without_push(trainer: "Trainer", folder: str | None = None) -> None:
    """Save the model in `folder` or in the output folder, without pushing it, even if `push_to_hub` is set."""
    trainer.save_model(folder, _internal_call=True)


def save_optimization(trainer: "Trainer", folder: str) -> None:
    """Write the states of optimizer, learning-rate schedule and gradient scaler, and this rank's random state, to `folder`."""
    trainer._save_optimizer_and_scheduler(folder)
    trainer._save_scaler(folder)
    trainer._save_rng_state(folder)


# ---- torch, datasets, argparse ----


def set_base_rates(scheduler: LambdaLR, rates: list[Any]) -> None:
    """Give a learning-rate schedule new base rates, one for each parameter group.

    The current learning rates become `rates` times the current factor of the schedule.
    """
    scheduler.base_lrs = rates
    scheduler._last_lr = [rate * factor(scheduler.last_epoch) for rate, factor in zip(rates, scheduler.lr_lambdas)]
    for group, rate in zip(scheduler.optimizer.param_groups, scheduler._last_lr):
        group["lr"] = rate


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, dropout: float, scale: float | None
) -> Tensor:
    """Attend within texts that lie one after the other, with PyTorch's flash attention for half precision on a GPU.

    PyTorch's public function for this, `varlen_attn`, has no dropout.

    Args:
        query: (S, H, d), the states of all texts.
        key: as `query`.
        value: as `query`.
        bounds: (b + 1,) int32, the first token of each text, and S.
        longest: the number of tokens of the longest text.
        dropout: the probability of dropping a weight.
        scale: the factor of the scores; None: 1 / sqrt(d).

    Returns:
        (S, H, d)
    """
    attend = torch.ops.aten._flash_attention_forward
    return attend(query, key, value, bounds, bounds, longest, longest, dropout, False, False, scale=scale)[0]


# Whether `efficient_attention` can have dropout. Before PyTorch 2.14, its forward pass takes 0 for the largest number of keys
# of a text (https://github.com/pytorch/pytorch/issues/115590), and the kernels compute from this number where the random
# numbers of a head and text begin. So all heads and texts lose the same weights, and the backward pass, which takes the right
# number, drops others.
EFFICIENT_DROPOUT = torch.__version__ >= "2.14"


def efficient_attention(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, dropout: float, scale: float | None
) -> Tensor:
    """Attend as `flash_attention` does, with PyTorch's memory-efficient attention, which knows float32 too."""
    attend, rows = torch.ops.aten._efficient_attention_forward, [states.unsqueeze(0) for states in (query, key, value)]
    # The logarithm of the sums is for the backward pass.
    options = {"compute_log_sumexp": True, "scale": scale}
    return attend(*rows, None, bounds, bounds, longest, longest, dropout, 0, **options)[0].squeeze(0)


def has_gradient_hook(tensor: Tensor) -> bool:
    """Return whether a function was registered that changes or sees the gradient of a tensor."""
    return bool(tensor._backward_hooks)


def uncompiled(model: nn.Module) -> nn.Module | None:
    """Return the model that `torch.compile` was given; None if `model` is not compiled."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else None


def set_group_timeout(timeout: timedelta) -> None:
    """Set how long a collective of the default group waits for other ranks, for both gloo and NCCL.

    The name is public from PyTorch 2.14 on, where the private name prints a warning.
    """
    group = torch.distributed.distributed_c10d
    set_timeout = group.set_timeout if hasattr(group, "set_timeout") else group._set_pg_timeout
    set_timeout(timeout)


def indices_of(rows: datasets.Dataset) -> "datasets.table.Table | None":
    """Return the numbers of the rows of `rows.data` that a table consists of, in order, or None if it has all of them."""
    return rows._indices


def was_cut(rows: datasets.IterableDataset) -> bool:
    """Return whether `take` or `skip` was called on a stream, or on a stream that is a part of it."""
    parts = [rows._ex_iterable]
    for part in parts:  # grows in the loop
        parts += [*vars(part).get("ex_iterables", ()), *filter(None, [vars(part).get("ex_iterable")])]
    return any("split_when_sharding" in vars(part) for part in parts)


def was_split(rows: datasets.IterableDataset) -> bool:
    """Return whether `datasets.distributed.split_dataset_by_node` was called on a stream."""
    return rows._distributed is not None


def parser_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Return all flags of a parser."""
    return parser._actions


def values_of_words(parser: argparse.ArgumentParser, action: argparse.Action, words: list[str]) -> Any:
    """Return the value of a flag that these words follow. Raises argparse.ArgumentError if the flag does not accept them."""
    return parser._get_values(action, words)
