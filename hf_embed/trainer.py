"""ContrastiveTrainer: the Hugging Face Trainer with a contrastive training step.

One training step:

1. The collator makes a flat batch.
2. `TrainingStep.forward` encodes the batch in length-sorted chunks. It is a single call of the model that DDP or FSDP wraps.
3. The embeddings become a block with one row for each row of the data.
4. One gather exchanges the embeddings of all ranks.
5. The objective compares the rows of this rank with the rows of all ranks. The backward pass follows.

The base classes are in `hf_embed.training`: `HubTrainer` pushes, `CheckpointTrainer` writes checkpoints and resumes from them,
and `GuardedTrainer` handles signals, lost ranks, NaN and full memory. This file has the model, the step and the evaluation.

Shapes: B rows of this rank, N rows of all ranks, V texts per row, D width of an embedding.
"""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import EvalPrediction, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PredictionOutput

from hf_embed.adapters import has_adapters, in_4_bits, without_weights
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.layout import strip_prefix
from hf_embed.checkpoint.save import save_encoder
from hf_embed.checkpoint.training_state import load_training_state, save_training_tensors
from hf_embed.checkpoint.whole import ASIDE, step_of
from hf_embed.data.collator import RaggedCollator, further_arguments, to_rows
from hf_embed.data.loader import batch_sampler, make_loader
from hf_embed.data.mixture import Mixture
from hf_embed.data.python_rows import RowData
from hf_embed.distributed import gather_rows, take_weights_of_main
from hf_embed.encoding import embed_tokens, tokenize_texts
from hf_embed.errors import InputError, without_secrets
from hf_embed.evaluation.held_out import with_model
from hf_embed.evaluation.tasks import Task, score_tasks
from hf_embed.forward.check import check_kernel
from hf_embed.library_internals import memory_tracker, train_batch_size
from hf_embed.objectives import Objective
from hf_embed.step import TrainingStep, add_own_parameters, make_step
from hf_embed.training import inputs as trainer_inputs
from hf_embed.training import rows as trainer_rows
from hf_embed.training.guarded_trainer import GuardedTrainer
from hf_embed.training.inputs import EvalSets, Model, TrainRows
from hf_embed.training.log_lines import show_lines
from hf_embed.training.mlm import mask_tokens
from hf_embed.training.output import check_output
from hf_embed.training.preview import preview
from hf_embed.training.record import note_scores, origin_of, training_results
from hf_embed.training.settings import check_metric, check_settings, warn_of_ignored
from hf_embed.training.watch import Watch

logger = logging.getLogger(__name__)


class ContrastiveTrainer(GuardedTrainer):
    """Fine-tune `model` into a text encoder.

    Args:
        model: one of

            - the name or folder of a model, which `Encoder.from_pretrained` loads in float32;
            - a `PreTrainedModel`, a PEFT model around one, or an `Encoder`, which takes over the settings in `args`;
            - the `TrainingStep` of an earlier training (`trainer.step`), whose heads are kept.
        args: `ContrastiveTrainingArguments`. Its pooling, max_length, normalize and prompts are passed to the encoder. Plain
            `TrainingArguments` are also accepted and keep their values. The trainer has a copy: `trainer.args`.
        objective: the loss. The default is `SimCSE(temperature=0.05)`.
        train_dataset: one of

            - a `datasets.Dataset` of texts with the columns anchor, positive and negatives, or with the column text alone
              (`hf_embed.data.known_columns` lists the accepted ones). The trainer tokenizes it once;
            - a pandas DataFrame, a list, or the path of a file (`hf_embed.data.python_rows`);
            - many sources: a dict from names to the kinds above, or a list of `Source`. Each batch comes from one source.

            An `IterableDataset` is streamed.
        eval_dataset: one of

            - rows of the same kinds as `train_dataset`. Rows with sentence1, sentence2 and score are an STS set. Rows with
              anchor and positive are held out, and `eval_loss` is the objective's loss on them
              (`hf_embed.evaluation.held_out`);
            - another task, for example a `Retrieval` (`hf_embed.evaluation.tasks`);
            - a dict from names to these.
        processing_class: the tokenizer, or its name. An `Encoder` and a model that is given by name have their own.
        callbacks, optimizers: as for `Trainer`.
        train_name: what messages and the card call the training rows. Default: "train_dataset" in messages, and what is known
            of their origin in the card.
        paired: True requires rows with anchor and positive, and False single texts. Default: the columns decide.
        model_init: a function that returns a new model for each training, for `hyperparameter_search`, in place of `model`.
        compute_metrics: a function of an `EvalPrediction` with the cosines (`predictions`) and the scores (`label_ids`) of the
            pairs of an STS set. The metrics that it returns are logged as `eval_NAME_METRIC`.

    Evaluation logs `eval_NAME_spearman`, `eval_NAME_alignment` and `eval_NAME_uniformity` for each STS set, and
    `eval_NAME_ndcg@10` and further metrics for retrieval. It also logs the mean of each metric over the sets that have it, for
    example `eval_spearman`. `metric_for_best_model` can name any of these metrics. With several sources, the training log has
    `loss_NAME` for each source that was drawn. With a learned temperature, it has `temperature`. Every training log has the
    statistics of `hf_embed.training.watch`, which warns of a collapse and stops the run at NaN or infinity.

    Raises:
        InputError: if something is wrong with the data or the settings. This is raised before the first step.
    """

    args: ContrastiveTrainingArguments
    model: nn.Module  # the module that Trainer has placed on the device. Under FSDP only this module gathers its weights.
    main_objective: Objective  # `objective` is a number of hyperparameter_search in transformers' Trainer
    drops_results = False  # True: `save_model` removes the scores that an earlier model left in the folder
    describes_itself = True  # True: `save_model` writes the training record. Recipes set False and write a longer report.
    loss_is_scaled_for_ga = False  # the loss is a mean per micro-batch, so Trainer divides it by the accumulation steps

    def __init__(
        self,
        model: Model | None = None,
        args: TrainingArguments | None = None,
        objective: Objective | Callable[..., Tensor] | None = None,
        train_dataset: TrainRows | None = None,
        eval_dataset: EvalSets | None = None,
        processing_class: PreTrainedTokenizerBase | str | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        train_name: str = "train_dataset",
        paired: bool | None = None,
        model_init: Callable[..., Model] | None = None,
        compute_metrics: Callable[[EvalPrediction], Mapping[str, float]] | None = None,
        **unknown: Any,
    ):
        # 1. Check the arguments, and convert them to the kinds that are used here.
        trainer_inputs.refuse_unknown(unknown)
        tasks = trainer_inputs.with_metrics(trainer_inputs.as_tasks(eval_dataset), compute_metrics)
        args = trainer_inputs.as_arguments(args, tasks)
        check_settings(args, tasks, self.other_metrics)
        self.main_objective = trainer_inputs.checked_objective(objective)
        optimizers = trainer_inputs.checked_optimizers(optimizers, args)
        model = trainer_inputs.first_model(model, model_init, optimizers)
        rows = trainer_inputs.as_train_data(train_dataset, train_name, args)
        # 2. Make the module that is trained.
        self.given_tokenizer = processing_class  # `call_model_init` uses it again
        model, tokenizer = trainer_inputs.as_model(model, processing_class, args)
        self.step = make_step(model, tokenizer, args, self.main_objective)
        self.encoder = self.step.encoder
        add_own_parameters(*optimizers, self.step)
        check_output(args, self.step, optimizers[0], trains=rows is not None)
        # 3. Tokenize and check the rows to train on, and the held-out rows.
        training = trainer_rows.read_training_rows(rows, self.step, args, self.main_objective, train_name, paired)
        tokens, self.objectives = training.tokens, training.objectives  # one for each source
        self.teacher_identity = "".join({vectors.identity for vectors in training.vectors.values()})  # of one file, or ""
        tasks = trainer_rows.make_held_out(tasks, self.step, args, self.main_objective, training.vectors, tokens)
        warn_of_ignored(args, tasks)
        self.origin = origin_of(train_dataset, train_name)
        self.scored_tasks: dict[str, Task] = {}  # the tasks evaluated so far, by name
        self.unrecorded: list[dict[str, float]] = []  # log entries that do not belong in the record; see `note_scores`
        self.watch = Watch(batches_alike=not isinstance(tokens, Mixture))
        # No warning of a bad geometry if the objective learns scores or vectors: these decide which geometry is right.
        self.watch.warned = bool({"scores", "target"} & set(self.main_objective.needs))
        # 4. Let Trainer place the model on its device and make the accelerator. Then check what depends on them.
        super().__init__(
            model=self.step if model_init is None else None,
            model_init=model_init,
            args=args,
            data_collator=RaggedCollator(training.texts_per_row, args.same_dropout_mask, training.vectors),
            train_dataset=tokens,
            eval_dataset=tasks or None,
            processing_class=self.encoder.tokenizer,
            callbacks=[self.watch, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.step.sharded = self.sharded
        if self.sharded and in_4_bits(self.encoder.backbone):
            raise InputError("weights in 4 bits cannot be sharded (FSDP, DeepSpeed); train on one GPU or with DDP")
        if not self.sharded:
            take_weights_of_main(self.step)  # otherwise, an evaluation before the training could mix several models
        adapted = self.sharded and has_adapters(self.encoder.backbone)
        self.unsharded = without_weights(self.encoder.backbone) if adapted else None  # adapters are merged into a copy of it
        check_kernel(self.encoder.backbone, args.device)
        self.encoder.check_changed()  # now that the model is on its device and has its adapters and TempScale
        self.compute_metrics = cast(Any, compute_metrics)  # the STS sets call it, and not Trainer
        if self.is_world_process_zero() and logger.isEnabledFor(logging.INFO):
            logger.info("\n".join(self.preview()))
        self.log_lines = show_lines(self, tasks)

    def call_model_init(self, trial: Any = None) -> TrainingStep:
        """Make the model anew, with the heads that the objective needs. Trainer calls this before each training."""
        given = super().call_model_init(trial)
        model, tokenizer = trainer_inputs.as_model(given, self.given_tokenizer, self.args)
        self.step = make_step(model, tokenizer, self.args, self.main_objective)
        trainer_rows.check_same_tokens(self.encoder, self.step.encoder)
        self.encoder, self.step.sharded = self.step.encoder, self.sharded
        return self.step

    # ---- the step ----

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of this rank's batches, which depend only on (seed, epoch, step)."""
        if self.train_dataset is None:
            raise InputError("training needs a train_dataset")
        args = self.args
        sampler = batch_sampler(self.train_dataset, args, train_batch_size(self))
        if sampler.left_out:
            logger.info(f"{sampler.left_out} rows do not fill a batch and are skipped; each epoch skips other rows")
        return make_loader(self.train_dataset, sampler, cast(RaggedCollator, self.data_collator), args)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of this rank's rows against the rows of all ranks, a scalar.

        Args:
            model: the wrapped `TrainingStep`. It must be called through the wrapper, or gradients are not synchronized.
            inputs: a batch of `RaggedCollator`.
            return_outputs: also return {"embeddings": (B, V, D)}.
            num_items_in_batch: the token count that Trainer passes. It is not used, because the loss is a mean over rows.
        """
        args, input_ids, text_ids = self.args, inputs["input_ids"], inputs["text_ids"]
        mlm = None if self.step.mlm_head is None else mask_tokens(input_ids, self.encoder.tokenizer)  # (masked ids, labels)
        outputs = model(input_ids, inputs["lengths"], args.chunk_tokens, self.begin_caching(), mlm)
        rows = to_rows(outputs["embeddings"], inputs["slots"], text_ids.shape)  # (B, V, D)
        vectors = F.normalize(rows, dim=-1) if self.encoder.normalize else rows  # what the saved model returns
        first_row = args.process_index * len(rows)
        arguments = {"temperature": outputs["temperature"]} if "temperature" in outputs else {}
        objective = self.objectives[inputs["source"]]
        arguments |= further_arguments(inputs["further"], objective.needs, gather_rows)
        loss = objective(vectors, text_ids, gather_rows(vectors), gather_rows(text_ids), first_row, **arguments)
        # DDP averages gradients over ranks. The factor world_size cancels that, which leaves the mean over all masked tokens.
        if mlm is not None:
            masked = gather_rows((mlm[1] != -100).sum().view(1)).sum().clamp(min=1)
            loss = loss + self.main_objective.mlm_weight * outputs["mlm"] * args.world_size / masked
        if model.training:  # for the next log; see `GuardedTrainer.log`
            self.watch.see(loss, rows, text_ids, inputs["source"], outputs.get("temperature"))
        return (loss, {"embeddings": vectors}) if return_outputs else loss

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Return the names that Trainer returns, without the learned temperature, which gets no weight decay."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_temperature")]

    def preview(self) -> list[str]:
        """Return lines that describe the training rows and show two of them as the model reads them."""
        if self.train_dataset is None:
            return []
        return preview(self.train_dataset, self.encoder, self.origin.name, self.args.same_dropout_mask, self.objectives[0])

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: EvalSets | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the metrics of every evaluation set, and the means of metrics that several sets share.

        Every text counts once, whatever the number of ranks.

        Args:
            eval_dataset: evaluation sets to use in place of the trainer's own, or the name of one of the trainer's own.
            ignore_keys: not used here.
            metric_key_prefix: the prefix of the metric names.

        Raises:
            InputError: if there is no evaluation set, or none with the given name, or no metric `metric_for_best_model`.
        """
        tasks = trainer_rows.choose_tasks(self, eval_dataset)
        memory = memory_tracker(self)
        memory.start()
        with self.evaluating():
            scores = score_tasks(with_model(tasks, self.model), self._embed)
        if eval_dataset is None:
            check_metric(self.args, tasks, self.other_metrics, scored=True)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        self.log_lines.scored(tasks, metric_key_prefix)
        due = self.control.should_log, self.control.should_evaluate
        self.log(metrics)
        if metric_key_prefix == "eval":
            note_scores(self, tasks)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if eval_dataset is not None:  # a callback may call this in the middle of a step, whose own log and evaluation stay due
            self.control.should_log, self.control.should_evaluate = due
        memory.stop_and_update_metrics(metrics)
        return metrics

    def predict(
        self, test_dataset: RowData, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Embed the texts of a dataset; see `hf_embed.training.rows.predict`. `ignore_keys` is not used here."""
        with self.evaluating():
            output = trainer_rows.predict(test_dataset, self._embed, metric_key_prefix)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, output.metrics)
        return output

    def get_eval_dataloader(self, *sets: Any) -> DataLoader:
        """Raise InputError, because an evaluation set is a task that encodes its own texts, and not batches for the model."""
        raise InputError("an evaluation set has no dataloader; trainer.evaluate scores sets, trainer.predict embeds texts")

    get_test_dataloader = get_eval_dataloader  # type: ignore[assignment]

    def _embed(self, texts: list[str], prompt_name: str | None = None) -> Tensor:
        """Return the embeddings of texts, (texts, D), with the same final operations as in `encode`."""
        tokens = tokenize_texts(self.encoder, [self.encoder.prompt(prompt_name) + text for text in texts])
        embeddings = embed_tokens(self.model, self.encoder, tokens, self.args.chunk_tokens)
        return self.encoder.finish(embeddings.float())

    # ---- saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Save the model, and the state that a resumed run needs.

        The final model is verified (unless FSDP or DeepSpeed gathered its tensors) and gets a results.json. A checkpoint of a
        running training also gets the tensors that a plain model folder does not hold.
        """
        args = self.args
        if not args.should_save:
            return
        folder = str(output_dir or args.output_dir)
        final = step_of(folder) is None and not Path(folder).name.startswith(ASIDE)
        results: dict[str, Any] | None = training_results(self) if final else {}
        if not results and not self.drops_results:
            results = None  # keep the scores that are in the folder; {} would remove them
        encoder_tensors = None if state_dict is None else strip_prefix(state_dict, "encoder.")
        verify = final and state_dict is None
        save_encoder(self.encoder, folder, verify, encoder_tensors, results=results, unsharded=self.unsharded)
        if not final:
            save_training_tensors(folder, self.step, state_dict or self.step.state_dict())
        torch.save(without_secrets(args), Path(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_training_state(resume_from_checkpoint, self.step)
