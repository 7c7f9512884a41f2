"""The settings of the trainer. Recipes add dataclasses of their own, with further flags."""

import dataclasses
import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

import torch
from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import is_tensorboard_available

from hf_embed.distributed import warn_on_main_only
from hf_embed.errors import InputError, without_secrets
from hf_embed.files.read_files import parse_json
from hf_embed.forward.activations import check_caching
from hf_embed.pooling import POOLINGS, check_pooling
from hf_embed.ranges import setting
from hf_embed.ranks import limit_waiting
from hf_embed.training.settings import METRIC_SCHEDULES, OF_GEOMETRY, OTHERS, check_derived, check_given, refuse_other_fields


@dataclass
class ContrastiveTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the further settings that an embedding model needs.

    Some defaults differ from `transformers.TrainingArguments`:

    - `report_to` is TensorBoard if it is installed;
    - `ddp_find_unused_parameters` is False, because unused parameters are frozen;
    - with `load_best_model_at_end`, the metric is the mean STS Spearman. Without an STS set, it is the main metric of the first
      evaluation set, for example nDCG@10 or accuracy.

    Some fields of `TrainingArguments` have no meaning here. They raise an error, or cause a warning when the trainer is built.
    `hf_embed.training.settings` lists both groups.

    Raises:
        InputError: if a number is out of range, a name is unknown, or a package is not installed.
    """

    pooling: str | None = setting(
        None, f"One of {', '.join(POOLINGS)}. Default: the model's own, else mean (of a causal model last)."
    )
    max_length: int | None = setting(
        None, "Maximum tokens per text; longer texts are truncated. Default: the model's own, at most 512."
    )
    normalize: bool | None = setting(None, "Save a model that returns embeddings of unit length.")
    prompts: dict | str | None = setting(
        None, 'Texts that are put before queries and documents: {"query": "...", "document": "..."}.'
    )
    add_eos_token: bool = setting(False, "End each text with the end-of-text token.")
    chunk_tokens: int | None = setting(
        None, "Tokens (with padding) encoded at once. Default: 2048 on a CPU, 65536 on a GPU, 16384 with caching."
    )
    gradient_caching: bool | str = setting(
        False, "Recompute chunks in the backward pass to save memory; as_needed: only what does not fit a GPU."
    )
    same_dropout_mask: bool = setting(
        False, "For rows of a single text: use one dropout mask for both views (an ablation; SimCSE needs two)."
    )
    temp_scale: float | None = setting(
        None, "TempScale: train with this attention temperature, e.g. 0.9. It is folded into the saved weights."
    )
    report_to: None | str | list[str] = setting(
        None, "Where to log: 'none', 'wandb', 'all' ... Default: TensorBoard if it is installed."
    )
    drop_empty_rows: bool = setting(False, "Drop rows with an empty text, and count them.")
    source_alpha: float = setting(0.5, "With several sources, a source of n rows is drawn in proportion to n^alpha.")
    small_sources: str = setting(
        "repeat",
        "If a source has fewer rows than a global batch: repeat its rows in the batch, or refuse it.",
        choices=["repeat", "refuse"],
    )
    nan_steps: str = setting(
        "stop",
        "If a gradient is NaN or infinite: stop the run, or skip the update, at most 20 times in a row.",
        choices=["stop", "skip"],
    )
    shuffle_buffer_size: int = setting(10_000, "Number of rows of a streaming dataset that are shuffled at a time.")
    teacher: str | None = setting(None, "Model to learn from, or to be guided by.")
    allow_changed: bool = setting(
        False, "Resume even if the rows, the objective, the pooling or the like differ from the checkpoint's."
    )

    def __new__(cls, *args: Any, **settings: Any) -> Self:
        """Refuse settings of sentence-transformers by name. Without this, Python would call them unexpected arguments."""
        for name in settings.keys() & OTHERS.keys() - {field.name for field in dataclasses.fields(cls)}:
            raise InputError(f"ContrastiveTrainingArguments has no setting {name}; {OTHERS[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        check_given(self)
        chosen = self.load_best_model_at_end or self.save_strategy == "best" or self.lr_scheduler_type in METRIC_SCHEDULES
        if chosen and self.metric_for_best_model is None:
            self.metric_for_best_model = "auto"  # the trainer resolves it, because it knows the evaluation sets
        if self.greater_is_better is None and str(self.metric_for_best_model).endswith(OF_GEOMETRY):
            self.greater_is_better = False
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False
        if not torch.accelerator.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
            # Without this, transformers refuses bf16, treats several CPU processes as unrelated single processes, and takes the
            # GPU although the user has told `accelerate launch` to use the CPU.
            self.use_cpu = True
        launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
        if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and launched in ("bf16", "fp16") and not (self.bf16 or self.fp16):
            setattr(self, launched, True)  # transformers compares both with DeepSpeed's settings, which follow the launcher
        if self.report_to is None:
            self.report_to = "tensorboard" if is_tensorboard_available() else "none"
        try:
            super().__post_init__()
        except (ValueError, TypeError, OSError, ImportError, NotImplementedError) as error:
            raise InputError(str(error)) from error
        check_derived(self)
        join_ranks(self)
        self._check_own()

    def _check_own(self) -> None:
        """Parse the prompts, and raise InputError if a field that TrainingArguments does not have is wrong."""
        check_caching(self.gradient_caching, self.device)
        if self.pooling is not None:
            check_pooling(self.pooling)
        if isinstance(self.prompts, str):
            with suppress(ValueError):
                self.prompts = parse_json(self.prompts)
        if not isinstance(self.prompts, dict | None):
            raise InputError(f'prompts is {self.prompts!r}; give {{"query": "...", "document": "..."}}')
        if unknown := set(self.prompts or ()) - {"query", "document"}:
            raise InputError(f"prompts: unknown key {', '.join(sorted(unknown))}; the keys are query and document")

    @classmethod
    def of(cls, args: TrainingArguments, has_loss: bool = False) -> Self:
        """Convert plain `TrainingArguments`: add the fields that an embedding model needs, at their defaults.

        The trainer checks the result.

        Values stay as they are, and derived values are not derived again. There are three exceptions. An unset
        `ddp_find_unused_parameters` becomes False. If the loss would choose the best model, which is the default of
        transformers, but no evaluation set logs a loss, then the main metric of the evaluation sets chooses it. If alignment or
        uniformity chooses it, a smaller value is better, where transformers would take the greatest.

        Args:
            args: `TrainingArguments`, or a subclass whose additional fields are at their defaults.
            has_loss: whether an evaluation set logs a loss.

        Raises:
            InputError: if a setting is not available here.
        """
        refuse_other_fields(args)
        made = object.__new__(cls)
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        others = {field.name for field in dataclasses.fields(args)} - known
        own = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in known}
        vars(made).update(own | {name: value for name, value in vars(args).items() if name not in others})
        if made.ddp_find_unused_parameters is None:
            made.ddp_find_unused_parameters = False
        if made.metric_for_best_model in ("loss", "eval_loss") and not has_loss:
            made.metric_for_best_model, made.greater_is_better = "auto", True
        elif str(made.metric_for_best_model).endswith(OF_GEOMETRY):
            made.greater_is_better = False
        join_ranks(made)
        return made

    def to_dict(self) -> dict:
        """Return the settings for logs (TensorBoard, wandb and the like), without tokens."""
        return super(ContrastiveTrainingArguments, without_secrets(self)).to_dict()


def join_ranks(args: TrainingArguments) -> None:
    """Limit how long this process waits for others, and let only the main process warn (more with `log_level_replica`)."""
    limit_waiting(args.ddp_timeout)
    if args.log_level_replica not in ("debug", "info"):
        warn_on_main_only()


# The settings that are read once, when a trainer is made. All others are read in each training.
_READ_EACH_TIME = {field.name for field in dataclasses.fields(TrainingArguments)} - {
    "per_device_eval_batch_size", "bf16", "fp16", "tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode",
    "accelerator_config", "report_to", "skip_memory_metrics",
}  # fmt: skip
_READ_EACH_TIME |= {"chunk_tokens", "gradient_caching", "allow_changed"}
READ_ONCE = [field.name for field in dataclasses.fields(ContrastiveTrainingArguments) if field.name not in _READ_EACH_TIME]
