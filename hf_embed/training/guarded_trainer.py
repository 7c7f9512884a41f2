"""A Trainer that handles signals, lost ranks, NaN or infinite gradients, and full GPU memory during a training."""

import copy
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import EarlyStoppingCallback
from transformers.optimization import GreedyLR
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_embed.arguments import READ_ONCE, ContrastiveTrainingArguments
from hf_embed.data.mixture import Mixture
from hf_embed.distributed import gather_objects
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError, RankError, listed
from hf_embed.evaluation.tasks import Task, logged_by, main_metric
from hf_embed.files.disk import disk_errors
from hf_embed.forward.activations import AS_NEEDED, Activations, check_caching
from hf_embed.forward.chunking import default_chunk_tokens
from hf_embed.forward.dropout import use_fast_dropout, use_plain_dropout
from hf_embed.forward.packing import copy_to
from hf_embed.library_internals import (
    accelerate_state,
    clear_accelerator_state,
    made_schedule,
    run_folder,
    set_accelerate_state,
    total_loss,
    train_batch_size,
)
from hf_embed.ranks import PeerWatch, peers_in_one_line, writing_alone
from hf_embed.step import own_parameters_missing_in
from hf_embed.training.checkpoint_trainer import CheckpointTrainer
from hf_embed.training.inputs import check_schedule_of, refuse_uncalled
from hf_embed.training.record import ends_training
from hf_embed.training.rows import own_tasks
from hf_embed.training.settings import check_batch, check_reader, check_settings
from hf_embed.training.stop import Stopped, StopRequests, how_to_go_on

logger = logging.getLogger(__name__)

# The settings with which Trainer makes an optimizer, and its schedule.
OF_OPTIMIZER = (
    "optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"
)  # fmt: skip
OF_SCHEDULE = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")


class GuardedTrainer(CheckpointTrainer):
    """The part of `ContrastiveTrainer` that handles interruptions and failures of a training."""

    args: ContrastiveTrainingArguments
    encoder: Encoder
    eval_dataset: dict[str, Task] | None
    saves_later = False  # whether the checkpoint of a step waits for the end of the epoch
    fast_dropout = True  # False: train with the dropout of PyTorch, whose masks are other ones

    def __init__(self, *args: Any, **kwargs: Any):
        refuse_uncalled(type(self))
        self.stop_requests = StopRequests()
        self.step_memory = StepMemory([], torch.device("cpu"))
        self.activations = Activations()
        self.finite_losses = FiniteLosses()
        self.rows_trained = 0  # rows of all ranks in this training, from the step where it began or was resumed
        clear_accelerator_state()  # making `args` has cleared it, but another trainer may have set it again since then
        super().__init__(*args, **kwargs)
        self.settings_when_made, self.parts_when_made = self._settings_read_once(), self._fixed_parts()
        parts = ((self.optimizer, OF_OPTIMIZER), (self.lr_scheduler, OF_SCHEDULE))
        # The classes of the optimizer and the schedule that the user gave, and the settings that they replace.
        self.replaced_settings = {type(part).__name__: settings for part, settings in parts if part is not None}
        self.accelerate_state = accelerate_state()
        self.trainable_at_start: set[str] = set()  # the weights that required a gradient when the training began
        self.optimizer_made_for: dict[str, Any] | None = None  # what the optimizer was made for, if Trainer has made it
        self.check_skipping()
        self.check_caching()
        self.add_callback(self.stop_requests)
        # `enable_jit_checkpoint` adds this callback. It would end the run with exit status 0, so it is removed.
        if jit := self.pop_callback(JITCheckpointCallback):
            jit.on_train_end(self.args, self.state, self.control)  # restores the earlier signal handler

    @property
    def other_metrics(self) -> bool:
        """Whether a subclass defines `evaluate`, which may return metrics that no evaluation set has."""
        return not type(self).evaluate.__module__.startswith("hf_embed.")

    # ---- what may not change after the trainer was made ----

    def _settings_read_once(self) -> dict[str, Any]:
        """Return the settings that are read only when a trainer is made."""
        return {name: copy.deepcopy(getattr(self.args, name)) for name in READ_ONCE}

    def _fixed_parts(self) -> dict[str, Any]:
        """Return what cannot be changed: other parts were made from it, or the rows were tokenized with it."""
        parts = {name: getattr(self, name) for name in ("train_dataset", "data_collator", "main_objective")}
        return parts | {"encoder.max_length": self.encoder.max_length, "encoder.prompts": dict(self.encoder.prompts)}

    def check_read(self) -> None:
        """Raise InputError if a setting was changed after the trainer was made, and the change would have no effect."""
        made = self.settings_when_made
        for name, now in self._settings_read_once().items():
            if now != made[name]:
                raise InputError(
                    f"{name} was {made[name]!r} when the trainer was made and is now {now!r}, which would have no "
                    "effect; make a new ContrastiveTrainer with it (hyperparameter_search cannot search it)"
                )

    def _check_parts(self) -> None:
        """Raise InputError if a fixed part of the trainer, or its model, was changed since the trainer was made."""
        made = self.parts_when_made  # objects are compared by identity, numbers and texts by value
        changed = [name for name, part in self._fixed_parts().items() if part is not made[name] and part != made[name]]
        if self.model_init is None and not self.sharded and self.model is not self.step:
            changed.append("model")
        if changed:
            raise InputError(f"{changed[0]} was changed after the trainer was made; make a new ContrastiveTrainer with it")

    def check_during(self) -> None:
        """Check what a callback may have changed in the middle of a training.

        Raises:
            InputError: if a change has no effect, or if weights require a gradient only now and would not be trained rightly.
        """
        self.check_read()
        self._check_parts()
        before, now = train_batch_size(self), self.args.train_batch_size
        if now != before:
            raise InputError(
                f"per_device_train_batch_size was changed from {before} to {now} during the training, which has no effect; end "
                "the training, and call train again"
            )
        weights = {} if self.sharded else dict(self.step.named_parameters())
        late = [name for name, weight in weights.items() if weight.requires_grad and name not in self.trainable_at_start]
        held = {weight for group in cast(Any, self.optimizer).param_groups for weight in group["params"]}
        if late and (self.args.world_size > 1 or not held.issuperset(weights[name] for name in late)):
            raise InputError(
                f"{listed(late)}: the weights were frozen when the training began, so they are not trained now; unfreeze them "
                "after a first training, and call train again"
            )

    def check_unchanged(self) -> None:
        """Check, before a training, what a script may have changed since the trainer was made.

        Raises:
            InputError: if a change would have no effect, or if the settings or the callbacks are wrong now.
        """
        self._check_parts()
        self._renew_optimizer()
        check_settings(self.args, own_tasks(self), self.other_metrics)
        check_batch(self.args)
        self.check_skipping()
        self.check_caching()
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                check_reader(self.args, type(callback).__name__)

    def _prepare_for_training(self, *args: Any, **named: Any) -> tuple[nn.Module, Any]:
        """Prepare as `Trainer` does.

        Raises:
            InputError: if an optimizer that a subclass has made does not train what the trainer created, or if the schedule
                belongs to another optimizer.
        """
        prepared = super()._prepare_for_training(*args, **named)
        self.trainable_at_start = {name for name, weight in self.step.named_parameters() if weight.requires_grad}
        if not self.sharded:
            self.encoder.check_changed()  # `Trainer` has moved a model of `model_init` to its device
            if not made_schedule(self):
                check_schedule_of(self.optimizer, self.lr_scheduler)
            for what in own_parameters_missing_in(cast(Any, self.optimizer), self.step):
                raise InputError(
                    f"create_optimizer leaves out the {what}, which would not be trained; give the optimizer all parameters of "
                    "self.model"
                )
        return prepared

    def _renew_optimizer(self) -> None:
        """Let Trainer make a new optimizer if that of an earlier training does not suit the next one.

        It was made for other settings or other weights, or a schedule that reads the metric has lowered its learning rates. An
        optimizer that the user gave stays.
        """
        now = {name: getattr(self.args, name) for name in OF_OPTIMIZER}
        now["weights"] = [name for name, parameter in self.step.named_parameters() if parameter.requires_grad]
        lowered = isinstance(self.lr_scheduler, ReduceLROnPlateau | GreedyLR)  # such a schedule changes the rates themselves
        if self.optimizer_made_for is not None and (lowered or self.optimizer_made_for != now):
            self.optimizer = None
        if self.optimizer_made_for is not None or self.optimizer is None:
            self.optimizer_made_for = now

    def hyperparameter_search(self, hp_space: Any = None, compute_objective: Any = None, *args: Any, **named: Any) -> Any:
        """Search as `Trainer.hyperparameter_search` does.

        Raises:
            InputError: if `compute_objective` is not given, and the evaluation sets have other metrics than the loss. Also if
                `hp_space` names something that is no setting.
        """
        tasks = own_tasks(self)
        if compute_objective is None and any(logged_by(task) != {"loss"} for task in tasks.values()):
            raise InputError(
                "hyperparameter_search needs compute_objective, because the default of transformers is the sum of all metrics; "
                f"give, for example, compute_objective=lambda metrics: metrics['eval_{main_metric(tasks)}'] and "
                "direction='maximize'"
            )

        def space(trial: Any) -> Any:
            values = hp_space(trial)
            for name, value in values.items() if trial is not None else ():
                if not hasattr(self.args, name):
                    raise InputError(
                        f"hyperparameter_search cannot search {name}, which is no setting of args; make a new "
                        "ContrastiveTrainer for each value"
                    )
                if isinstance(value, float) and type(getattr(self.args, name)) is int:  # Trainer would cut it to an int
                    setattr(self.args, name, value)
            return values

        return super().hyperparameter_search(space if hp_space else None, compute_objective, *args, **named)

    # ---- signals and ranks ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train. SIGTERM, SIGUSR1 and SIGINT save a checkpoint and end the training, as `hf_embed.training.stop` describes.

        Args:
            resume_from_checkpoint: the folder of a checkpoint. True or "latest" means the newest complete checkpoint in
                `args.output_dir`.
            trial: leave it None.
            ignore_keys_for_eval: not used here.

        Raises:
            Stopped: if such a signal ended the training. It is a `SystemExit`.
            InputError: as described in `prepare_to_train`. Also if another run writes to the output folder, if another rank has
                ended or does not answer, if a loss, a gradient or a weight is NaN or infinite, or if GPU memory is full even
                with a single text at a time.
            DiskError: if the disk is full, or if something cannot be written. Earlier checkpoints stay complete.
        """
        set_accelerate_state(self.accelerate_state)  # other arguments or trainers may have emptied or replaced it
        folder, self.stopping, self.activations = Path(str(self.args.output_dir)), False, Activations()
        self.rows_trained, self.finite_losses, self.saves_later = 0, FiniteLosses(), False
        # Trainer would read the loss of each micro-batch, for which the host waits for the GPU, to log another in place of a
        # NaN or infinite one. `FiniteLosses` leaves these out.
        filtered, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, False
        try:
            alone, peers = writing_alone(folder), peers_in_one_line(self.args.ddp_timeout)
            with disk_errors(folder), alone, self.stop_requests, PeerWatch(), peers:
                return super().train(self.prepare_to_train(resume_from_checkpoint), trial, ignore_keys_for_eval)
        finally:
            self.args.logging_nan_inf_filter = filtered
            use_plain_dropout(self.encoder.backbone)

    def _maybe_log_save_evaluate(
        self, tr_loss: Tensor, grad_norm: Tensor | float | None, model: nn.Module, trial: Any, *args: Any, **named: Any
    ) -> None:
        """Log, evaluate and save if it is time for that. Then stop if a signal was received.

        A checkpoint of the last step of an epoch is saved after what is logged and evaluated at the end of the epoch.
        """
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save or control.should_training_stop:
            self.check_during()
        at_epoch_end = "epoch" in (self.args.eval_strategy, self.args.logging_strategy)
        if at_epoch_end and self.stop_requests.before_epoch_end(self.state):
            self.saves_later, self.control.should_save = self.control.should_save, False
        elif self.saves_later:
            self.saves_later, self.control.should_save = False, True
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, *args, **named)
        if number := self.stop_requests.due(self.state, self.control):
            self._stop(number, model, trial)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the micro-batches of a step, and keep them until the next step, in case the step must be repeated."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.step_memory = StepMemory(batches, device)
        self.rows_trained += self.args.world_size * sum(len(batch["text_ids"]) for batch in batches)
        return batches, items

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        """Finish the training, and return the loss that was logged."""
        trained = super()._finalize_training(trial, num_train_samples, start_time)
        return trained._replace(training_loss=trained.metrics.get("train_loss", trained.training_loss))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, but with means of the finite losses, and with more numbers. Every rank must call this.

        A training log also has the loss of each source, the learned temperature and the statistics of the watch. The last entry
        counts the steps of this call only, and the rows that they had, because a batch may not be full. For a resumed training,
        it also says from which step it counts.
        """
        if "loss" in logs:
            logs["loss"] *= self.finite_losses.factor(self.accelerator)
            for source, loss in self.watch.mean_losses(self.accelerator).items():
                logs[f"loss_{cast(Mixture, self.train_dataset).names[source]}"] = round(loss, 4)
            if self.watch.temperature is not None:
                logs["temperature"] = self.watch.temperature.item()
            if self.is_world_process_zero():
                logs |= self.watch.numbers()
        if ends_training(logs):
            steps, seconds = self.state.global_step - self.watch.first_step, max(logs["train_runtime"], 1e-4)
            losses = gather_objects(total_loss(self))  # since the last log, Trainer has added up this rank's losses only
            factor = self.finite_losses.factor(self.accelerator, of_all=True)
            logs["train_loss"] = factor * sum(losses) / len(losses) / max(steps, 1)
            logs["train_samples_per_second"] = round(self.rows_trained / seconds, 3)
            logs["train_steps_per_second"] = round(steps / seconds, 3)
            if self.watch.first_step:
                logs["resumed_at_step"] = self.watch.first_step
        super().log(logs, start_time)

    def _prepare_input(self, data: Any) -> Any:
        """Copy a batch to the GPU without waiting for it."""
        plain = isinstance(data, Tensor) and not self.is_deepspeed_enabled
        return copy_to(data, self.args.device) if plain else super()._prepare_input(data)

    def _stop(self, number: int, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint if this step has none yet, and raise Stopped. `number` is the number of the signal."""
        requests, step, checkpoint = self.stop_requests, self.state.global_step, None
        self.stopping = True
        if requests.saves:
            checkpoint = str(Path(run_folder(self, trial), f"{PREFIX_CHECKPOINT_DIR}-{step}"))
            if requests.saved_step != step:
                self.watch.check(self.args, self.state, model, of_weights=True)
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.accelerator.wait_for_everyone()
        logger.warning(how_to_go_on(number, step, checkpoint))
        raise Stopped(number)

    # ---- memory ----

    def check_caching(self) -> None:
        """Raise InputError if `gradient_caching` is not supported on this device, or together with other settings."""
        check_caching(self.args.gradient_caching, self.args.device)
        if self.args.gradient_caching == AS_NEEDED and self.sharded:
            raise InputError(
                "gradient_caching is as_needed, which is not supported with FSDP and DeepSpeed, because all processes must "
                "recompute the same layers; set it to true or false"
            )

    def begin_caching(self) -> bool | Activations:
        """Return how the step that begins uses gradient caching, as `encode_in_chunks` expects it."""
        if self.args.gradient_caching != AS_NEEDED:
            return bool(self.args.gradient_caching)
        self.activations.begin(self.state.global_step, self.args.device)
        return self.activations

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """Return the loss of a micro-batch, and accumulate its gradient.

        If a run of one process runs out of GPU memory, the step is repeated with half of `chunk_tokens` and with gradient
        caching. All later steps use the same settings. The gradient is the same except for dropout, which draws other random
        numbers in other chunks. If `gradient_caching` is "as_needed", it becomes True first, with the same chunks.

        Raises:
            InputError: if the memory is full even with a single text at a time.
            RankError: if the memory of one of several processes is full.
        """
        if self.fast_dropout:
            use_fast_dropout(self.encoder.backbone)  # `train` undoes this at its end
        memory, number = self.step_memory, self.step_memory.begin()
        try:
            return self._finite(super().training_step(model, inputs, num_items_in_batch))
        except torch.OutOfMemoryError as error:
            self._use_less_memory(error)
        while True:  # outside the except block, whose traceback would keep the tensors that fill the memory
            memory.restore(model)
            clear_device_cache(garbage_collection=True)
            try:
                for batch in memory.batches[: number + 1]:
                    loss = super().training_step(model, batch, num_items_in_batch)
                return self._finite(loss)
            except torch.OutOfMemoryError as error:
                self._use_less_memory(error)

    def _finite(self, loss: Tensor) -> Tensor:
        """Return the loss of a micro-batch for the log: 0 in place of a NaN or infinite one, if the run goes on after it.

        It goes on if it skips such steps, and in fp16, whose gradient scaler skips them.
        """
        if self.args.nan_steps != "skip" and not self.args.fp16:
            return loss
        return self.finite_losses.take(loss, 1 / self.current_gradient_accumulation_steps)

    def _use_less_memory(self, error: torch.OutOfMemoryError) -> None:
        """Recompute all chunks, halve `chunk_tokens`, and warn. Raise the error about full memory if this cannot help."""
        args, step = self.args, self.state.global_step + 1
        budget = args.chunk_tokens or default_chunk_tokens(args.device, kept=not args.gradient_caching)
        mend = "set a smaller chunk_tokens, gradient_caching to true, or a smaller per_device_train_batch_size"
        if args.world_size > 1 or self.sharded:
            raise RankError(f"GPU memory of process {args.process_index} is full at step {step}; {mend}") from error
        shortest = min(length for batch in self.step_memory.batches for length in batch["lengths"])
        if budget < 2 * shortest and args.gradient_caching is True:
            raise InputError(
                f"GPU memory is full at step {step}, even with a single text at a time; set a smaller max_length or "
                "per_device_train_batch_size"
            ) from error
        if args.gradient_caching != AS_NEEDED:  # otherwise, recomputing all chunks may already be enough
            args.chunk_tokens = max(1, budget // 2)
        args.gradient_caching = True
        logger.warning(
            f"GPU memory is full at step {step}; this step is repeated, and it and all later steps use chunk_tokens "
            f"{args.chunk_tokens or budget} and gradient_caching; set both to use them from the first step"
        )

    # ---- gradients that are NaN or infinite ----

    def check_skipping(self) -> None:
        """Raise InputError if `nan_steps` is "skip" and the optimizer cannot skip the update of a step."""
        optimizer = "DeepSpeed" if self.is_deepspeed_enabled else str(getattr(self.args.optim, "value", self.args.optim))
        if self.args.nan_steps == "skip" and optimizer in ("DeepSpeed", "lomo", "adalomo"):
            raise InputError(f"nan_steps is skip, but {optimizer} updates weights while it computes gradients; set it to stop")

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Return the gradient norm of a step, which is the same on every rank, and pass it to the watch."""
        norm = super()._get_grad_norm(model, grad_norm)
        self.watch.norm = None
        # The gradient scaler of fp16 skips such steps by itself. But it does not count them, and the watch would end the run.
        if self.accelerator.mixed_precision != "fp16" or self.args.nan_steps == "skip":
            self.watch.norm = norm.full_tensor() if isinstance(norm, DTensor) else norm  # FSDP may leave it distributed
        return norm


class FiniteLosses:
    """Turns the mean over all losses into that over the finite ones.

    The losses 2, NaN and 4 reach Trainer as 2, 0 and 4, and their mean is 2. The factor 3 / 2 makes it 3, the mean of 2 and 4.
    A micro-batch counts as the part of a step that it is.
    """

    def __init__(self) -> None:
        self.seen = 0.0  # parts of steps since the last log
        self.left_out: Tensor | float = 0.0  # those of them whose loss was left out, on this rank
        self.all_seen, self.all_left_out = 0.0, 0.0  # parts of steps up to the last log, the second as a mean over the ranks

    def take(self, loss: Tensor, part: float) -> Tensor:
        """Count a loss, and return it, or 0 if it is NaN or infinite. The host does not wait for the GPU."""
        self.seen += part
        finite = loss.isfinite()
        self.left_out = self.left_out + part * (~finite).float()
        return torch.where(finite, loss, torch.zeros_like(loss))

    def factor(self, accelerator: Accelerator, of_all: bool = False) -> float:
        """Return the number of losses divided by that of finite ones, over all ranks: 1 if all are finite, NaN if none is.

        Args:
            accelerator: for the mean over the ranks. Every rank must call this.
            of_all: count all losses of the training, and not only those since the last call.
        """
        left_out = accelerator.reduce(self.left_out, "mean").item() if isinstance(self.left_out, Tensor) else 0.0
        seen, self.seen, self.left_out = self.seen, 0.0, 0.0
        self.all_seen, self.all_left_out = self.all_seen + seen, self.all_left_out + left_out
        if of_all:
            seen, left_out = self.all_seen, self.all_left_out
        if not left_out:
            return 1.0
        return seen / (seen - left_out) if seen - left_out > 1e-5 * seen else math.nan


class StepMemory:
    """The data that is needed to repeat a step: its micro-batches, and the random state at its start."""

    def __init__(self, batches: list[dict[str, Any]], device: torch.device):
        self.batches = batches
        self.on_gpu = device.type == "cuda"
        self.begun = 0  # number of micro-batches that have begun
        self.random: list[Tensor] = []  # random states at the start of the step: CPU, then GPU

    def begin(self) -> int:
        """Record that a micro-batch begins, and return its number within the step, from 0."""
        if not self.begun:
            self.random = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if self.on_gpu else [])]
        self.begun += 1
        return self.begun - 1

    def restore(self, model: nn.Module) -> None:
        """Clear the gradients of the step, and restore the random state at its start."""
        model.zero_grad()
        torch.set_rng_state(self.random[0])
        for state in self.random[1:]:
            torch.cuda.set_rng_state(state)
