"""The run of a `Plan`: the trainer, the scores before the training, the training itself, and the saved model.

`hf_embed.kit.report` scores the saved model and writes the results.
"""

import math
import shutil
from pathlib import Path
from typing import Any, cast

from peft import PeftModel
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from hf_embed.checkpoint.layout import MODEL_CONFIG, TRANSFORMER_CONFIGS
from hf_embed.checkpoint.model_files import MODULE, TOKENIZER
from hf_embed.data.mixture import Mixture
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.files.read_files import read_json
from hf_embed.files.safe_files import new_folder, write_json, write_text
from hf_embed.kit.models import load_model
from hf_embed.kit.overwrite import begin
from hf_embed.kit.plan import Plan
from hf_embed.library_internals import save_without_push
from hf_embed.trainer import ContrastiveTrainer
from hf_embed.training.record import publishable

ADAPTER_CARD = """# LoRA adapters of {of}

The embedding of a text is made of the hidden states of this model by the pooling `{pooling}`. sentence-transformers and
hf_embed load this folder like the folder of a whole model. To load the adapters alone:

```python
from peft import PeftModel
from transformers import AutoModel

model = PeftModel.from_pretrained(AutoModel.from_pretrained("{base}"), "adapter")  # this folder
```
"""

# The files of a saved model, beside its modules, that say how texts become vectors.
SETTINGS = {"modules.json", MODEL_CONFIG, TRANSFORMER_CONFIGS[0], *TOKENIZER}


def make_trainer(plan: Plan) -> ContrastiveTrainer:
    """Load the model of a plan, and make its trainer. The trainer tokenizes the rows.

    The main process prints a list of the sources, if there are several, and two rows as the model reads them.

    Raises:
        InputError: if the model cannot be loaded, trained or saved as the plan asks.
    """
    model, tokenizer, args = load_model(plan)
    patience = plan.run.early_stopping_patience
    trainer = ContrastiveTrainer(
        model=model, processing_class=tokenizer, args=args, objective=plan.objective,
        train_dataset=plan.rows, eval_dataset=plan.tasks, train_name=plan.source, paired=plan.paired,
        callbacks=[EarlyStopping(patience)] if patience else [],
    )  # fmt: skip
    trainer.describes_itself = False  # `hf_embed.kit.report` writes the results, with the scores of the saved folder
    if plan.model_args.save_adapter:
        check_adapter(trainer)
    if isinstance(trainer.train_dataset, Mixture) and trainer.is_world_process_zero():
        print(trainer.train_dataset)
    if plan.shows_rows and trainer.is_world_process_zero():
        print("\n".join(trainer.preview()))
    return trainer


class EarlyStopping(EarlyStoppingCallback):
    """transformers' early stopping, which keeps its count of evaluations when a run is resumed.

    A run that was stopped early does not train further when it is resumed.
    """

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the number of evaluations since the best one from the log of the resumed run."""
        super().on_train_begin(args, state, control, **kwargs)
        key = f"eval_{str(args.metric_for_best_model).removeprefix('eval_')}"
        self.early_stopping_patience_counter, best = 0, math.nan
        # Trainer does not compare with the evaluation at the start.
        for value in [entry[key] for entry in state.log_history if key in entry and entry["step"] > 0]:
            if math.isnan(best) or (value > best if args.greater_is_better else value < best):
                self.early_stopping_patience_counter, best = 0, value
            else:
                self.early_stopping_patience_counter += 1
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True


def score_model(trainer: ContrastiveTrainer) -> dict[str, float]:
    """Score the model before the training. Without evaluation sets, return an empty dict."""
    return trainer.evaluate() if trainer.eval_dataset else {}


def fine_tune(plan: Plan, trainer: ContrastiveTrainer) -> None:
    """Train the model and save it. After the first step, the files of an earlier run in the folder are removed."""
    trainer.add_callback(plan.earlier)
    if trainer.is_world_process_zero():
        begin(plan.folder)
    trainer.train(resume_from_checkpoint=plan.args.resume_from_checkpoint)
    trainer.drops_results = True  # scores from an earlier end of this run do not belong to these weights
    save_without_push(trainer)  # the report pushes the model together with its results
    trainer.drops_results = False
    if plan.model_args.save_adapter and trainer.is_world_process_zero():
        save_adapter(trainer.encoder, plan.folder / "adapter", plan.folder)
    trainer.accelerator.wait_for_everyone()


def check_adapter(trainer: ContrastiveTrainer) -> None:
    """Check that the adapters can be saved by themselves.

    Raises:
        InputError: if there are no adapters, if the adapters are sharded, or if the model has TempScale or layers after the
            pooling, which adapters do not hold.
    """
    for wrong, what in (
        (trainer.encoder.backbone is trainer.encoder.base, "there is no adapter without --lora_r; set it, for example to 16"),
        (trainer.sharded, "FSDP and ZeRO shard the adapters; remove the flag (the merged model is saved)"),
        (trainer.args.temp_scale is not None, "an adapter cannot hold the TempScale temperature; remove the flag"),
        (len(trainer.encoder.dense) > 0, "an adapter cannot hold this model's layers after the pooling; remove the flag"),
    ):
        if wrong:
            raise InputError(f"--save_adapter: {what}")


def save_adapter(encoder: Encoder, folder: Path, merged: Path) -> None:
    """Save the adapters in a folder of their own, as PEFT does, without the local path of the base model.

    The tokenizer, and the files of sentence-transformers, which hold the pooling, are copied from the merged model's folder.
    """
    base, adapted = str(encoder.config.name_or_path), cast(PeftModel, encoder.backbone)
    for config in adapted.peft_config.values():
        config.base_model_name_or_path = None  # PEFT would look for this model on the Hub, and warn if it is not there
    with new_folder(folder) as new:
        adapted.save_pretrained(str(new))
        for path in merged.iterdir():
            if path.name in SETTINGS:
                shutil.copy(path, new)
            elif MODULE.fullmatch(path.name):
                shutil.copytree(path, new / path.name)
        file = new / "adapter_config.json"
        on_hub = None if Path(base).exists() else base
        write_json(file, read_json(file) | {"base_model_name_or_path": on_hub})
        of = on_hub or f"the model in the folder {publishable(base)}"
        card = ["---", "library_name: peft", *([f"base_model: {on_hub}"] if on_hub else []), "---", ""]
        write_text(
            new / "README.md", "\n".join(card) + ADAPTER_CARD.format(of=of, base=publishable(base), pooling=encoder.pooling)
        )
