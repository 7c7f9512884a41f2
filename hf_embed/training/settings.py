"""How this package treats every field of `transformers.TrainingArguments`, and the checks of the fields that it supports.

- `REFUSED`: fields that raise an error, because ignoring them would change the result.
- `IGNORED`: fields that have no effect and do no harm. A warning names them.
- All other fields do what they do in a plain Trainer. tests/test_training_arguments.py checks each of them.
"""

import dataclasses
import logging
import math
import os
from typing import Any, cast

import torch
from transformers import SchedulerType, Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import OptimizerNames, ParallelMode

from hf_embed.distributed import get_world_size
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.evaluation.held_out import HeldOut
from hf_embed.evaluation.sts import STS
from hf_embed.evaluation.tasks import Task, main_metric, metric_names
from hf_embed.library_internals import CHECKPOINTING, use_one_gpu, worker_settings
from hf_embed.ranges import ABOVE_ZERO, COUNT, SEED, Range, check_ranges, out_of_range

logger = logging.getLogger(__name__)

SHARE = Range(least=0, below=1)
NOT_NEGATIVE = Range(least=0)

RANGES = {
    "learning_rate": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "max_grad_norm": NOT_NEGATIVE, "warmup_steps": NOT_NEGATIVE,
    "adam_beta1": SHARE, "adam_beta2": SHARE, "adam_epsilon": NOT_NEGATIVE,
    "num_train_epochs": ABOVE_ZERO, "per_device_train_batch_size": COUNT, "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT, "logging_steps": ABOVE_ZERO, "eval_steps": ABOVE_ZERO, "save_steps": ABOVE_ZERO,
    "eval_delay": NOT_NEGATIVE, "save_total_limit": COUNT, "torch_empty_cache_steps": COUNT, "seed": SEED, "data_seed": SEED,
    "dataloader_num_workers": Range(least=0, whole=True), "dataloader_prefetch_factor": COUNT,
    "ddp_timeout": COUNT, "ddp_bucket_cap_mb": COUNT, "label_smoothing_factor": SHARE,
    "max_length": COUNT, "chunk_tokens": COUNT, "shuffle_buffer_size": COUNT, "temp_scale": ABOVE_ZERO,
    "source_alpha": Range(least=0, most=1),
}  # fmt: skip

REFUSED = {
    "label_smoothing_factor": "the loss has no labels to smooth",
    "neftune_noise_alpha": "the noise of a text would depend on the padding of its chunk",
    "train_sampling_strategy": "each batch is drawn from all rows, because its rows are each other's negatives",
    "auto_find_batch_size": "a smaller batch has fewer negatives, and gradient_caching makes a large batch fit into memory",
    "bf16_full_eval": "evaluation uses the precision of training, and bf16 sets both",
    "fp16_full_eval": "evaluation uses the precision of training, and fp16 sets both",
    "use_liger_kernel": "apply liger_kernel to the model before you pass it to the trainer",
    "liger_kernel_config": "apply liger_kernel to the model before you pass it to the trainer",
    "parallelism_config": "a text is not split among devices, and FSDP or DeepSpeed shards a large model",
    "debug": "it cannot handle boolean masks, and torch.autograd.set_detect_anomaly(True) finds a NaN",
}

IGNORED = {
    "per_device_eval_batch_size": "it is the batch of held-out rows, and eval_dataset has none",
    "prediction_loss_only": "every evaluation set computes its metrics",
    "include_for_metrics": "evaluation sets compute their own metrics",
    "batch_eval_metrics": "evaluation sets compute their own metrics",
    "eval_do_concat_batches": "evaluation sets compute their own metrics",
    "eval_accumulation_steps": "embeddings are moved to the CPU chunk by chunk",
    "eval_use_gather_object": "embeddings are gathered as they are",
    "average_tokens_across_devices": "the loss is a mean over rows, not tokens",
    "logging_nan_inf_filter": "a loss that is NaN or infinite ends the run, or its step is skipped and not logged",
    "label_names": "there are no labels",
    "length_column_name": "the trainer counts the tokens itself",
    "remove_unused_columns": "the trainer finds its columns by name",
    "do_train": "a recipe always trains, and evaluates if there are evaluation sets",
    "do_eval": "eval_strategy sets when to evaluate",
    "do_predict": "there is nothing to predict",
}

# Settings of accelerate's data loader: {setting: (the values that agree with what this package does, why)}.
LOADER = {
    "split_batches": ((False,), "per_device_train_batch_size is the batch size of one process"),
    "dispatch_batches": ((None, False), "every process reads its own rows"),
    "even_batches": ((True,), "batches have the same number of rows on every process"),
    "use_seedable_sampler": ((True,), "the order of the rows depends only on the seed"),
    "non_blocking": ((False,), "batches are not copied by accelerate"),
}

# Fields that the training arguments of other libraries have, and what to use here instead. Other such fields must be removed.
OTHERS = {
    "prompts": 'give ContrastiveTrainingArguments(prompts={"query": "...", "document": "..."})',
    "batch_sampler": "remove it: a text that occurs twice in a batch is not used as a negative of itself",
    "multi_dataset_batch_sampler": "remove it: source_alpha=1 draws sources by size, and source_alpha=0 draws all alike",
}

OF_GEOMETRY = ("alignment", "uniformity")  # the ends of metric names of which transformers would take the greatest value
LOWER_IS_BETTER = ("loss", *OF_GEOMETRY)  # the ends of all metric names of which a smaller value is better
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")  # learning-rate schedules that read the evaluation metric
NEED_A_MODEL = ("galore", "apollo", "lomo", "adalomo")  # optimizers that need the model, so Trainer checks them later
WITHOUT_OPTIM_ARGS = ("adamw_torch", "adamw_torch_fused", "adafactor")  # optimizers that ignore `optim_args`


def default_of(field: dataclasses.Field) -> Any:
    """Return the default of a field."""
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def changed_from_default(args: TrainingArguments, name: str) -> bool:
    """Return whether a field of TrainingArguments has a value other than its default."""
    default = default_of(TrainingArguments.__dataclass_fields__[name])
    return getattr(args, name) not in (default, [], None)  # TrainingArguments and its parser turn "" into [] or None


def refuse_other_fields(args: TrainingArguments) -> None:
    """Raise InputError if a field that a subclass adds to TrainingArguments is set, because nothing here would read it."""
    kind = type(args).__name__
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(args):
        default, value = default_of(field), getattr(args, field.name)
        if field.name not in known and value is not default and value != default and value not in (None, [], {}):
            mend = OTHERS.get(field.name, "remove it, or use ContrastiveTrainingArguments")
            raise InputError(f"args: {field.name} is {value!r}, a setting of {kind} that is not supported; {mend}")


def check_given(args: TrainingArguments) -> None:
    """Raise InputError if the arguments are wrong as the user gave them, before TrainingArguments derives others from them."""
    check_ranges(args, RANGES)
    if args.max_steps != -1 and args.max_steps not in COUNT:
        raise out_of_range("max_steps", args.max_steps, f"{COUNT}, or -1 to use num_train_epochs")
    for name, reason in REFUSED.items():
        if changed_from_default(args, name):
            raise InputError(f"{name} is {getattr(args, name)!r}, which is not supported: {reason}; remove it")
    for name, kind in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        try:
            kind(getattr(args, name))
        except ValueError as error:
            raise InputError(f"{name}: {error}") from error
    workers = worker_settings(args) | {"persistent_workers": args.dataloader_persistent_workers}
    for name in ("multiprocessing_context", "persistent_workers"):
        if workers[name] and not args.dataloader_num_workers:
            raise InputError(f"dataloader_{name} is {workers[name]!r}, but there are no workers; set dataloader_num_workers")
    if workers["multiprocessing_context"] not in (None, "fork", "spawn", "forkserver"):
        raise InputError(
            f"dataloader_multiprocessing_context is {workers['multiprocessing_context']!r}; "
            "it must be one of fork, spawn, forkserver"
        )
    evaluated, saved = (str(getattr(value, "value", value)) for value in (args.eval_strategy, args.save_strategy))
    if args.load_best_model_at_end and saved not in (evaluated, "best"):
        raise InputError(
            f"load_best_model_at_end needs an evaluation of each checkpoint, but eval_strategy is {evaluated} and "
            f"save_strategy is {saved}; set both to steps, with eval_steps and save_steps, or both to epoch"
        )


def check_derived(args: TrainingArguments) -> None:
    """Raise InputError if the arguments are wrong after TrainingArguments has converted them and derived others from them."""
    loader: Any = args.accelerator_config
    for name, (harmless, reason) in LOADER.items():
        if (value := getattr(loader, name)) not in harmless:
            raise InputError(f"accelerator_config: {name} is {value!r}, which is not supported: {reason}; remove it")
    if args.mixed_precision == "fp16" and args.device.type == "cpu":
        raise InputError("fp16 is set, but it is not supported on a CPU, which would compute in float32; use bf16, or neither")
    for name in args.report_to or []:
        if name not in INTEGRATION_TO_CALLBACK:
            raise InputError(f"report_to: unknown name '{name}'; use {', '.join(INTEGRATION_TO_CALLBACK)}, all or none")
        if name not in (*get_available_reporting_integrations(), "azure_ml", "flyte"):  # transformers never lists these two
            raise InputError(f"report_to: the package of {name} is not installed; install it, or set report_to to none")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise InputError("save_strategy is best, but eval_strategy is no, so nothing would be saved; set eval_strategy")
    if not worker_settings(args)["in_order"] and args.world_size > 1:
        raise InputError("dataloader_in_order is False, so processes could train on different batches in a step; remove it")
    if getattr(args, f"{CHECKPOINTING}_kwargs") and not getattr(args, CHECKPOINTING):
        raise InputError(f"{CHECKPOINTING}_kwargs is set, but {CHECKPOINTING} is False; set it to True")
    check_optimizer(args)
    check_schedule(args, args.max_steps if args.max_steps > 0 else None)


def check_optimizer(args: TrainingArguments) -> None:
    """Check the optimizer's settings by building the optimizer for a single weight.

    Raises:
        InputError: if the optimizer's package is missing, or if the optimizer does not accept the settings.
    """
    name = OptimizerNames(args.optim).value
    if args.optim_args and name in WITHOUT_OPTIM_ARGS:
        raise InputError(f"optim_args is {args.optim_args!r}, but {name} does not use it; remove it")
    if args.optim_target_modules and not name.startswith(("galore", "apollo")):
        raise InputError(f"optim_target_modules is only for galore and apollo, but optim is {name}; remove it")
    try:
        made_by, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
        if isinstance(made_by, type) and issubclass(made_by, torch.optim.Optimizer):
            made_by([torch.nn.Parameter(torch.zeros(1))], **kwargs)
    except Exception as error:
        if isinstance(error, ImportError) or not name.startswith(NEED_A_MODEL):
            raise InputError(f"optim {name}: {error}") from error


def check_schedule(args: TrainingArguments, steps: int | None = None) -> None:
    """Check the settings of the learning-rate schedule by building the schedule for a single weight.

    `steps` is the number of steps of the run, if it is known.

    Raises:
        InputError: if the schedule does not accept the settings.
    """
    name, given = SchedulerType(args.lr_scheduler_type).value, cast(dict, args.lr_scheduler_kwargs or {})
    if given and name in ("constant", "constant_with_warmup"):
        raise InputError(f"lr_scheduler_kwargs is {given!r}, but {name} does not use it; remove it")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.learning_rate)
    warmup = args.get_warmup_steps(steps or 1000)
    try:
        get_scheduler(name, optimizer, warmup, steps or 1000, given)
        if name == "polynomial" and warmup == steps:  # the last step would divide by 0
            raise ValueError(f"warmup_steps is {args.warmup_steps:g}, which are all steps of the run; set it to less")
    except Exception as error:
        raise InputError(f"lr_scheduler_type {name}: {error}") from error


def check_settings(args: TrainingArguments, tasks: dict[str, Task], other_metrics: bool = False) -> None:
    """Check the arguments that a trainer is built with, and set those that follow from the evaluation sets.

    Raises:
        InputError: if a setting is not available here, or needs an evaluation set and there is none.
    """
    if get_world_size() != args.world_size:  # each process would silently train a model of its own
        raise InputError(
            f"{get_world_size()} processes were launched, but the training arguments count {args.world_size}; on a machine "
            "with a GPU, set --use_cpu for processes on the CPU"
        )
    if args.fsdp and args.parallel_mode in (ParallelMode.NOT_PARALLEL, ParallelMode.NOT_DISTRIBUTED):
        raise InputError("fsdp is set, but there is a single process; start several with accelerate launch, or remove fsdp")
    check_given(args)  # a second time, because a script may have changed the arguments after they were made
    check_derived(args)
    check_evaluation(args, tasks)
    check_metric(args, tasks, other_metrics)
    if args.n_gpu > 1:  # DataParallel would split the flat batch in the middle of texts
        logger.warning(f"{args.n_gpu} GPUs, but one process: only one GPU is used; `accelerate launch --quiet` uses them all")
        use_one_gpu(args)


def check_batch(args: TrainingArguments) -> None:
    """Raise InputError if a global batch has a single row, which has no negatives."""
    if args.per_device_train_batch_size * args.world_size < 2:
        raise InputError(
            "per_device_train_batch_size is 1, but a batch of one row has no negatives; set it to at least 2 "
            "(gradient accumulation does not add negatives; gradient_caching makes large batches fit into memory)"
        )


def check_metric(args: TrainingArguments, tasks: dict[str, Task], other_metrics: bool = False, scored: bool = False) -> None:
    """Resolve which metric of the evaluation sets chooses the best model ("auto": their main metric).

    For a schedule that reads the metric, this also sets `mode`: whether a larger or a smaller metric is better.

    With `compute_metrics`, any name is accepted until the sets are scored, because the names of its metrics are not known. With
    `other_metrics`, an `evaluate` of a subclass may add any name, and Trainer looks for it.

    Raises:
        InputError: if no evaluation set logs the metric, or if `mode` was given and is the wrong one.
    """
    if not tasks or args.metric_for_best_model is None:
        return
    if args.metric_for_best_model == "auto":
        args.metric_for_best_model = main_metric(tasks)
        if args.metric_for_best_model == "loss":
            args.greater_is_better = False
    if args.greater_is_better is None:  # a script has set the metric after the arguments were made
        args.greater_is_better = not args.metric_for_best_model.endswith(LOWER_IS_BETTER)
    names = metric_names(tasks)
    computed = not scored and any(isinstance(task, STS) and task.compute_metrics for task in tasks.values())
    if args.metric_for_best_model.removeprefix("eval_") not in names and not computed and not other_metrics:
        raise InputError(
            f"metric_for_best_model is '{args.metric_for_best_model}', which no evaluation set logs; set it to one of "
            f"{', '.join(sorted(names))}"
        )
    if SchedulerType(args.lr_scheduler_type).value in METRIC_SCHEDULES:
        mode, given = "max" if args.greater_is_better else "min", cast(dict, args.lr_scheduler_kwargs or {})
        if given.get("mode", mode) != mode:
            metric = args.metric_for_best_model
            raise InputError(f"lr_scheduler_kwargs: mode is {given['mode']}, but {metric} is best at its {mode}imum; remove it")
        args.lr_scheduler_kwargs = given | {"mode": mode}  # transformers would always use "min"


def check_evaluation(args: TrainingArguments, tasks: dict[str, Task]) -> None:
    """Raise InputError if a setting needs an evaluation set and there is none."""
    schedule = SchedulerType(args.lr_scheduler_type).value
    for wanted, what in (
        (args.eval_strategy != "no", f"eval_strategy is {IntervalStrategy(args.eval_strategy).value}"),
        (args.eval_on_start, "eval_on_start is True"),
        (args.load_best_model_at_end, "load_best_model_at_end is True"),
        (args.save_strategy == "best", "save_strategy is best"),
        (schedule in METRIC_SCHEDULES, f"lr_scheduler_type is {schedule}"),
    ):
        if wanted and not tasks:
            raise InputError(f"{what}, but there is no evaluation set; give one, or remove this setting")
    if args.load_best_model_at_end:
        check_reader(args, "load_best_model_at_end")


def check_reader(args: TrainingArguments, reader: str) -> None:
    """Raise InputError if something that reads the evaluation metric, a callback or a schedule, would never read one."""
    missing = "eval_strategy" if args.eval_strategy == "no" else "metric_for_best_model"
    if args.eval_strategy == "no" or args.metric_for_best_model is None:
        raise InputError(f"{reader} reads the evaluation metric, but there is none; set {missing}")


def check_training(args: TrainingArguments, encoder: Encoder, batches: int, name: str) -> None:
    """Raise InputError if the run would train nothing, or if the settings of the schedule do not suit its number of steps.

    Args:
        args: the settings of the training.
        encoder: the model that is trained.
        batches: the number of batches per epoch on this rank.
        name: the name of the rows in messages.
    """
    trained = ("backbone.", "dense.")  # the parts that are saved; training heads and a learned temperature are not saved
    if not any(p.requires_grad for key, p in encoder.named_parameters() if key.startswith(trained)):
        raise InputError("no weight of the model requires a gradient, so nothing would be trained; unfreeze some weights")
    if not batches:
        raise InputError(
            f"{name}: there are too few rows for a batch of {args.per_device_train_batch_size} rows on each process; set a "
            "smaller per_device_train_batch_size, or set dataloader_drop_last to False"
        )
    updates = math.ceil(batches / args.gradient_accumulation_steps)
    steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
    check_schedule(args, steps)
    length, unit = (steps / updates, "epochs") if args.eval_strategy == "epoch" else (steps, "steps")
    if args.eval_strategy != "no" and args.eval_delay > length:
        raise InputError(
            f"eval_delay is {args.eval_delay:g}, but the run has {length:g} {unit}, so nothing would be evaluated; lower it"
        )


def warn_of_ignored(args: TrainingArguments, tasks: dict[str, Task]) -> None:
    """Warn about settings that have no effect, and about torch_compile, which makes training slower."""
    kinds = {task.kind for task in tasks.values()}
    read = set()
    if HeldOut.kind in kinds or not tasks:  # without sets, `evaluate` may still be given some
        read.add("per_device_eval_batch_size")
    if kinds == {HeldOut.kind}:
        read.add("prediction_loss_only")  # the loss is the only metric anyway
    for name, reason in IGNORED.items():
        if name not in read and changed_from_default(args, name) and not (name == "do_eval" and args.eval_strategy != "no"):
            logger.warning(f"{name} has no effect: {reason}")
    if args.eval_steps and args.eval_strategy == "no":
        logger.warning("eval_steps has no effect: eval_strategy is no; set eval_strategy to steps")
    compiles = args.torch_compile or os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no"  # a launch sets it
    if compiles:  # docs/results/speed.md has the measurement
        logger.warning(
            "torch_compile: the chunks of each step have other sizes, and each size is compiled anew; on a CPU the first steps "
            "took over a minute each instead of 0.3 s; remove it, unless you have measured that it is faster on your machine"
        )
