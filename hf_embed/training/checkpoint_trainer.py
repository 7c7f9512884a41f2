"""A Trainer that writes checkpoints atomically, and that checks a checkpoint before it resumes from it.

A checkpoint is either complete or absent. `hf_embed.checkpoint.whole` seals and checks checkpoints.
`hf_embed.training.resume` compares the run that wrote a checkpoint with the current run. A checkpoint has

    model.safetensors, config.json, tokenizer.json ...    a model that every loader accepts
    training.safetensors                                  what exists only in training, if there is anything
    optimizer.pt, scheduler.pt, rng_state.pth             the states with which a resumed run goes on
    trainer_state.json                                    the log, the best checkpoint so far, the states of callbacks
    manifest.json                                         size and hash of each of these files, and facts about the run

The names of some files differ with FSDP and DeepSpeed.
"""

import contextlib
import logging
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint import whole
from hf_embed.data.loader import EpochDataLoader
from hf_embed.distributed import gather_objects, on_main
from hf_embed.errors import InputError, in_short
from hf_embed.files import safe_files
from hf_embed.files.disk import disk_errors
from hf_embed.files.read_files import read_json
from hf_embed.library_internals import (
    in_mixed_precision,
    run_folder,
    save_optimization,
    save_without_push,
    set_accelerate_state,
    set_base_rates,
    train_batch_size,
)
from hf_embed.objectives import Objective
from hf_embed.progress import hidden_bars, hidden_messages
from hf_embed.step import TrainingStep
from hf_embed.training import resume
from hf_embed.training.hub_trainer import HubTrainer
from hf_embed.training.watch import Watch

logger = logging.getLogger(__name__)

LATEST = "latest"  # the same as True, but easier to read on a command line
GATHERS = "stage3_gather_16bit_weights_on_model_save"  # a setting of DeepSpeed
# Parts of transformers' messages about a resumed run that this package replaces, or that are wrong here.
REPLACED_MESSAGES = (
    "The best checkpoint ",
    "Warning: The following arguments do not match the ones in the `trainer_state.json`",
)


class CheckpointTrainer(HubTrainer):
    """The part of `ContrastiveTrainer` that writes checkpoints and resumes from them."""

    args: ContrastiveTrainingArguments
    step: TrainingStep  # this and the next five are set by the classes that derive from this one
    main_objective: Objective
    teacher_identity: str
    watch: Watch
    optimizer_made_for: dict[str, Any] | None
    check_unchanged: Callable[[], None]
    run_facts: resume.Facts  # the description of this run; set when the training begins
    accelerate_state: list[dict[str, Any]]  # that of this trainer; see `set_accelerate_state`
    metric_of_step: dict[int, float]  # the metric that chooses the best model, by step; set when the training begins

    @property
    def sharded(self) -> bool:
        """Whether each layer's forward pass is a collective (FSDP, ZeRO-3), so all ranks must encode equally many chunks."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def prepare_to_train(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """Check what a training needs, remove what a killed run left, and return the checkpoint to resume from.

        Args:
            resume_from_checkpoint: as for `train`.

        Raises:
            InputError: if there are no training rows, if sharded weights would not be saved, if the checkpoint does not exist,
                is damaged or belongs to another model, or if ranks read different rows. Also if the checkpoint's run had other
                rows, another objective or the like, unless `args.allow_changed` is set.
        """
        if self.train_dataset is None:
            raise InputError("training needs a train_dataset")
        self.check_unchanged()
        self.check_gathering()
        if resume_from_checkpoint is None and self.args.resume_from_checkpoint:
            logger.warning(
                "this training does not resume: resume_from_checkpoint of the arguments is only for your script; call "
                "trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)"
            )
        self.run_facts = resume.facts_of(self)
        resume.check_ranks_alike(gather_objects(self.run_facts))
        checkpoint = None
        if resume_from_checkpoint:
            checkpoint = on_main(lambda: self.find_checkpoint(resume_from_checkpoint))
            self.check_on_each_node(checkpoint)
        if self.args.should_save:
            safe_files.clear_leftovers(Path(str(self.args.output_dir)))
            self._finish_current_push()  # removes the copy that a killed run was uploading
        self.accelerator.wait_for_everyone()
        return checkpoint

    def check_gathering(self) -> None:
        """Raise InputError if sharded weights would not be gathered, because Trainer would then save no model."""
        state, lost = self.accelerator.state, "so the trained model would not be saved"
        if self.is_fsdp_enabled and (kind := state.fsdp_plugin.state_dict_type.name) != "FULL_STATE_DICT":
            raise InputError(f"fsdp_state_dict_type is {kind}, {lost}; set it to FULL_STATE_DICT")
        config = state.deepspeed_plugin.hf_ds_config if self.is_deepspeed_enabled else None
        if config and config.is_zero3() and not config.get_value(f"zero_optimization.{GATHERS}"):
            raise InputError(f"ZeRO-3 gathers no weights, {lost}; set zero3_save_16bit_model (for DeepSpeed, {GATHERS})")

    def find_checkpoint(self, given: str | bool) -> str:
        """Return the checkpoint to resume from, after checking that it is complete and fits this run. Warn about changes.

        Raises:
            InputError: as described in `prepare_to_train`.
        """
        folder, latest = Path(str(self.args.output_dir)), given is True or given == LATEST
        checkpoint = whole.newest_whole(folder) if latest else Path(str(given))
        if checkpoint is None:
            raise InputError(f"No valid checkpoint found in output directory ({folder}): it has no checkpoint-N folder")
        if not latest:
            if not (checkpoint / TRAINER_STATE_NAME).is_file():
                raise InputError(
                    f"{checkpoint}: there is no checkpoint ({TRAINER_STATE_NAME} does not exist); give a checkpoint-N folder"
                )
            whole.check_whole(checkpoint)
        for line in resume.compare(checkpoint, whole.read_manifest(checkpoint)["run"], self.run_facts, self.args.allow_changed):
            logger.warning(line)
        # DeepSpeed stores the states in a folder of its own.
        if not any(name.startswith(("optimizer", "global_step")) for name in whole.names_in(checkpoint)):
            logger.warning(
                f"{checkpoint}: holds only the model (save_only_model): optimizer, learning-rate schedule and random states "
                "start again"
            )
        return str(checkpoint)

    def check_on_each_node(self, checkpoint: str) -> None:
        """Raise InputError if a machine has its own copy of the checkpoint (`save_on_each_node`) and that copy is damaged."""
        own = self.args.save_on_each_node and self.args.local_process_index == 0
        for rank, reason in enumerate(gather_objects(whole.damage(Path(checkpoint)) if own else None)):
            if reason is not None:
                raise InputError(f"{checkpoint}, on the machine of rank {rank}: {reason}; give another checkpoint")

    # ---- saving ----

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, as `Trainer.save_model` does. Every rank must call this.

        Args:
            output_dir: the folder. Default: `args.output_dir`.
            _internal_call: leave it False; Trainer sets it where it calls this method itself, so that nothing is pushed.

        Raises:
            DiskError: if the disk is full, or if something cannot be written. An earlier model there stays complete.
        """
        self.use_final_weights()
        with disk_errors(str(output_dir or self.args.output_dir)):
            super().save_model(output_dir, _internal_call)

    def use_final_weights(self) -> None:
        """Give the model its final weights, if the optimizer trains other weights (schedulefree does).

        At the next step, Trainer gives it the weights to train again.

        Raises:
            InputError: if there is no model, because a hyperparameter search ends without one.
        """
        if self.model is None:
            raise InputError("no model is left after a hyperparameter search; set the best trial's settings in args, and train")
        if hasattr(self.optimizer, "eval"):
            cast(Any, self.optimizer).eval()

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside a `with` block, compute embeddings without dropout and without gradients, in the precision of the training."""
        self.use_final_weights()
        model = cast(nn.Module, self.model)
        if self.accelerator.native_amp and not self.sharded and not in_mixed_precision(model):  # before the first training
            set_accelerate_state(self.accelerate_state)
            self.accelerator.prepare_model(model, evaluation_mode=True)
        model.eval()
        with torch.inference_mode(), hidden_bars(bool(self.args.disable_tqdm)):
            yield

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint under a temporary name, seal it after all ranks have written, and rename it to its final name."""
        args, state, run_dir = self.args, self.state, Path(run_folder(self, trial))
        self.store_flos()
        name = f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        aside = run_dir / f"{whole.ASIDE}{state.global_step}"
        if args.should_save:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            # Inside the `try`, so that the error reports the free space before the temporary folder is removed.
            with disk_errors(run_dir / name):
                save_without_push(self, str(aside))
                if not args.save_only_model:
                    save_optimization(self, str(aside))
                self._mark_best(run_dir / name)
                if args.should_save:
                    self._note_callbacks()
                    state.save_to_json(str(aside / TRAINER_STATE_NAME))
                self.accelerator.wait_for_everyone()
                if args.should_save:
                    whole.seal(aside, self.run_facts)
                    safe_files.replace_folder(aside, run_dir / name)
        finally:  # remove the temporary folder after an error, or on a machine that keeps no checkpoints
            if args.should_save or args.local_process_index == 0:
                shutil.rmtree(aside, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        if args.push_to_hub:
            self._push_from_checkpoint(str(run_dir / name))
        if args.should_save:
            best_name = Path(state.best_model_checkpoint or name).name
            whole.rotate(run_dir, args.save_total_limit, {name, best_name}, state.global_step)

    def _mark_best(self, checkpoint: Path) -> None:
        """Mark the checkpoint that is being written as the best one if its score is better than that of the marked one.

        Trainer marks only the step with the best score of all evaluations, even if no checkpoint is saved at that step. The
        checkpoint of a stop is not marked, because a run without the stop would not have saved it.
        """
        if self.stopping:
            return
        marked = self.state.best_model_checkpoint
        now = self.metric_of_step.get(self.state.global_step, math.nan)
        best = math.nan if marked is None else self.metric_of_step.get(whole.step_of(marked) or 0, math.nan)
        better = now > best if self.args.greater_is_better else now < best
        if better or (math.isnan(best) and not math.isnan(now)):
            self.state.best_model_checkpoint = str(checkpoint)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Note the score of this step, and return whether it is the best so far.

        `_mark_best` does not read it from the log, where a callback may have logged other sets, or a subclass other names.
        """
        better = super()._determine_best_metric(metrics, trial)
        if self.args.metric_for_best_model is not None:
            self.metric_of_step[self.state.global_step] = metrics[self._best_key()]
        return better

    def _best_key(self) -> str:
        """Return the name under which the metric that chooses the best model is logged."""
        return f"eval_{str(self.args.metric_for_best_model).removeprefix('eval_')}"

    def _note_callbacks(self) -> None:
        """Store the states of stateful callbacks in the trainer's state; several callbacks of one class become a list."""
        states: dict[str, list[dict]] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        noted = {name: found[0] if len(found) == 1 else found for name, found in states.items()}
        self.state.stateful_callbacks = cast(dict, self.state.stateful_callbacks) | noted  # type: ignore[assignment]

    # ---- resuming ----

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        if trial is not None:  # the trial has set some of the arguments
            self.check_unchanged()
            self.run_facts = resume.facts_of(self)
        with hidden_messages(REPLACED_MESSAGES, "transformers.trainer", "transformers.trainer_utils"):
            begun = super()._init_training_state(
                max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
            )
        key = self._best_key()
        self.metric_of_step = {int(entry["step"]): entry[key] for entry in self.state.log_history if key in entry}
        if resume_from_checkpoint is not None:
            # The current flags, and not those in the checkpoint, set the batch size and when to log, evaluate and save.
            self.state.compute_steps(self.args, max_steps)
            self.state.train_batch_size = train_batch_size(self)
            stored = read_json(Path(resume_from_checkpoint, TRAINER_STATE_NAME), with_nan=True).get("best_model_checkpoint")
            if stored is not None:  # look for it by its name, because the run's folder may have been moved or copied
                places = [Path(resume_from_checkpoint).parent / Path(stored).name, Path(stored)]
                self._record_best(next((place for place in places if place.is_dir()), places[0]))
        return begun

    def _record_best(self, best: Path) -> None:
        """Record a folder as the best checkpoint so far, or record None if the checkpoint is incomplete."""
        reason = on_main(lambda: whole.damage(best))
        self.state.best_model_checkpoint = str(best)
        if reason is not None:
            self.state.best_model_checkpoint = self.state.best_metric = self.state.best_global_step = None
            logger.warning(f"{best}: the best checkpoint is damaged ({reason}), so it is not used")

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> TrainOutput:
        """Finish the training as `Trainer` does, but ignore the best checkpoint if it is damaged.

        In that case, the model keeps the weights of the last step.
        """
        self.use_final_weights()
        if self.state.best_model_checkpoint is not None:
            self._record_best(Path(self.state.best_model_checkpoint))
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _load_best_model(self) -> None:
        if self.sharded:
            super()._load_best_model()
            return
        best = str(self.state.best_model_checkpoint)
        logger.info(f"loading the best model, {best}")
        self._load_from_checkpoint(best)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> dict[str, float]:
        """Evaluate as `Trainer` does, but not at the start of a resumed run: early stopping would count it as one more."""
        at_start = skip_scheduler  # Trainer sets it only there
        return {} if at_start and self.watch.first_step else super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    def _run_epoch(self, *args: Any, **named: Any) -> None:
        """Train one epoch, or nothing if the resumed run is already finished."""
        if self.state.global_step >= self.state.max_steps or self.control.should_training_stop:
            self.control.should_training_stop = True
            return
        loader = named["train_dataloader"]
        if isinstance(loader, EpochDataLoader):  # transformers before 5.17 does not call this where a run resumes
            loader.set_epoch(named["epoch"])
        super()._run_epoch(*args, **named)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Read the states of optimizer and learning-rate schedule, but keep the current settings, such as the learning rate.

        Raises:
            InputError: if a file cannot be read, or does not fit this run.
        """
        if checkpoint is None:
            return
        if self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = cast(Any, self.optimizer), cast(Any, self.lr_scheduler)
        settings, base_rates = settings_of_groups(optimizer, self.args), getattr(scheduler, "base_lrs", [])
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:
            raise InputError(
                f"{checkpoint}: {OPTIMIZER_NAME} and {SCHEDULER_NAME} do not fit this run ({in_short(error)}); give another "
                "checkpoint"
            ) from error
        by_schedule = {"lr"}  # what the schedule sets, and not the settings
        if getattr(scheduler, "cycle_momentum", False):
            by_schedule |= {"momentum", "betas"}
        for group, given in zip(optimizer.param_groups, settings):
            group.update({name: value for name, value in given.items() if name not in by_schedule})
        if isinstance(scheduler, LambdaLR):
            set_base_rates(scheduler, base_rates)


def settings_of_groups(optimizer: Any, args: ContrastiveTrainingArguments) -> list[dict[str, Any]]:
    """Return the settings of each parameter group.

    Optimizers of PyTorch and transformers keep only settings in a group, besides its parameters. Others also count there (for
    example schedulefree its steps, and Prodigy its estimate), so of theirs only the known settings are returned.
    """
    kind = type(getattr(optimizer, "optimizer", optimizer))  # accelerate wraps it
    known = {"lr", "weight_decay", "betas", "eps"} | {part.split("=")[0].strip() for part in (args.optim_args or "").split(",")}
    plain = kind.__module__.startswith(("torch.", "transformers."))
    return [
        {key: value for key, value in group.items() if key in known or (plain and key != "params")}
        for group in optimizer.param_groups
    ]
