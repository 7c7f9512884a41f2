"""The run of a `Plan`: the trainer, the scores before, the training and the saved folder; `hf_embed.kit.report` is the rest."""

import math
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import TrainOutput

from hf_embed.checkpoint.files import read_text
from hf_embed.data.mixture import Mixture
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.kit.models import LoadedModel
from hf_embed.kit.overwrite import begin
from hf_embed.kit.plan import Plan
from hf_embed.library_internals import save_without_push
from hf_embed.safe_files import new_folder, write_text
from hf_embed.trainer import ContrastiveTrainer
from hf_embed.training_record import shown


def make_trainer(plan: Plan, loaded: LoadedModel) -> ContrastiveTrainer:
    """Make the trainer of a plan, which tokenizes the rows.

    The console lists several sources, and shows two rows as the model reads them.

    Raises InputError for what cannot be trained or saved as asked.
    """
    trainer = ContrastiveTrainer(
        model=loaded.model, processing_class=loaded.tokenizer, args=loaded.args, objective=plan.objective,
        train_dataset=plan.rows, eval_dataset=plan.tasks, train_name=plan.source, paired=plan.paired,
        callbacks=stopping(plan),
    )  # fmt: skip
    trainer.describes_itself = False  # `hf_embed.kit.report` does, with the scores of the saved folder
    if plan.model_args.save_adapter:
        check_adapter(trainer)
    if isinstance(trainer.train_dataset, Mixture) and trainer.is_world_process_zero():
        print(trainer.train_dataset)
    if plan.shows_rows and trainer.is_world_process_zero():
        print("\n".join(trainer.preview()))
    return trainer


def stopping(plan: Plan) -> list[TrainerCallback]:
    """Return what ends the run early, if that is asked for."""
    patience = plan.run.early_stopping_patience
    return [] if patience is None else [EarlyStopping(patience)]


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, whose count goes on where a run is resumed; one that has stopped stays so."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the evaluations since the best one, in the log of the run that is resumed."""
        super().on_train_begin(args, state, control, **kwargs)
        key = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        self.early_stopping_patience_counter, best = 0, math.nan
        for value in [entry[key] for entry in state.log_history if key in entry]:
            if math.isnan(best) or (value > best if args.greater_is_better else value < best):
                self.early_stopping_patience_counter, best = 0, value
            else:
                self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def score_model(trainer: ContrastiveTrainer) -> dict[str, float]:
    """Score the model as it is, before the training; without evaluation sets there are no scores."""
    return trainer.evaluate() if trainer.eval_dataset else {}


def fine_tune(plan: Plan, trainer: ContrastiveTrainer) -> TrainOutput:
    """Train, and save the model; what an earlier run left in the folder goes once the first step is done."""
    trainer.add_callback(plan.earlier)
    if trainer.is_world_process_zero():
        begin(plan.folder)
    trained = trainer.train(resume_from_checkpoint=plan.args.resume_from_checkpoint)
    trainer.drops_results = True  # those that an earlier end of this run has left are not of these weights
    save_without_push(trainer)  # pushed with its results, by the report
    trainer.drops_results = False
    if plan.model_args.save_adapter and trainer.is_world_process_zero():
        save_adapter(trainer.encoder, plan.folder / "adapter")
    trainer.accelerator.wait_for_everyone()
    return trained


def check_adapter(trainer: ContrastiveTrainer) -> None:
    """Raise InputError where the adapters would not be all that is trained, or cannot be gathered."""
    for wrong, what in (
        (trainer.encoder.backbone is trainer.encoder.base, "without --lora_r there is no adapter"),
        (trainer.sharded, "FSDP and ZeRO shard the adapters; the merged model is saved"),
        (trainer.args.temp_scale is not None, "an adapter knows no TempScale; the merged model has it folded in"),
        (len(trainer.encoder.dense) > 0, "this model has layers behind the pooling, which an adapter does not hold"),
    ):
        if wrong:
            raise InputError(f"--save_adapter: {what}")


def save_adapter(encoder: Encoder, folder: Path) -> None:
    """Save the adapters by themselves, as PEFT does, without the place where the base model lies here."""
    base, adapted = str(encoder.config.name_or_path), cast(PeftModel, encoder.backbone)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = shown(base)
    with new_folder(folder) as new:
        adapted.save_pretrained(str(new))
        readme = new / "README.md"
        write_text(readme, read_text(readme).replace(base, shown(base)))
