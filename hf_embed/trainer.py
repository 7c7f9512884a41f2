"""ContrastiveTrainer: the Trainer you know, with a contrastive step.

One step: the collator's flat batch -> `TrainingStep.forward` in length-sorted chunks (inside DDP or FSDP, one call) -> a block
of embeddings, a row for each row of the data -> one gather -> the objective on the own rows against all rows -> backward.

Shapes: B own rows, N rows of all ranks, V texts a row, D wide.
"""

import copy
import logging
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import HubStrategy, seed_worker

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint import hub
from hf_embed.checkpoint.save import save_encoder
from hf_embed.checkpoint.training_state import load_training_state, save_training_tensors, with_file_names
from hf_embed.data.collator import RaggedCollator, to_rows
from hf_embed.data.mixture import Mixture
from hf_embed.data.training_rows import EpochDataLoader, TrainData, batch_sampler, tokenize_all
from hf_embed.distributed import gather_rows
from hf_embed.encoder import Encoder, embed_texts
from hf_embed.errors import InputError, without_secrets
from hf_embed.evaluation.sts import EvalData, named_tasks
from hf_embed.evaluation.tasks import Task, score_tasks
from hf_embed.library_internals import PushInProgress, memory_tracker, save_without_push, train_batch_size
from hf_embed.log_lines import show_lines
from hf_embed.mlm import mask_tokens
from hf_embed.objectives import Objective, SimCSE, as_objective
from hf_embed.progress import hidden_bars
from hf_embed.step import TrainingStep, add_own_parameters, make_step
from hf_embed.trainer_settings import check_batch, check_settings, check_training, warn_of_ignored
from hf_embed.watch import Watch

logger = logging.getLogger(__name__)


class ContrastiveTrainer(Trainer):
    """Fine-tune `model` into a text encoder.

    Args:
        model: a `PreTrainedModel`, a PEFT model around one, an `Encoder`, or the `TrainingStep` of an earlier training
            (`trainer.step`), whose heads stay.
        args: `ContrastiveTrainingArguments`; pooling, max_length, normalize and prompts given there go to the encoder.
        objective: e.g. `SimCSE(temperature=0.05)`, the default.
        train_dataset: a `datasets.Dataset` of texts with the columns anchor, positive and negatives, or text alone
            (`hf_embed.data.sources` lists what is accepted), tokenized here, once; or many sources, each batch of one of
            them: a dict of datasets by name, or a list of `Source`. An `IterableDataset` is streamed.
        eval_dataset: an STS set, a `datasets.Dataset` with sentence1, sentence2 and score; another task, e.g. a `Retrieval`
            (`hf_embed.evaluation.tasks`); or a dict of these by name.
        processing_class: the tokenizer (an `Encoder` brings its own).
        callbacks, optimizers: as for `Trainer`.

    Evaluation logs `eval_NAME_spearman`, `eval_NAME_alignment` and `eval_NAME_uniformity` for each STS set (`eval_NAME_ndcg@10`
    and so on for retrieval), and their means `eval_spearman` and so on, which `metric_for_best_model` can name. With several
    sources the log has `loss_NAME` for those drawn, with a learned temperature `temperature`; every log has the numbers of
    `hf_embed.watch`, which warns of a collapse and stops at NaN.

    Raises:
        InputError: what is wrong with the data or the settings, before the first step.
    """

    args: ContrastiveTrainingArguments
    model: nn.Module  # as it is placed: under FSDP this one has its weights together
    eval_dataset: dict[str, Task] | None
    objective: Objective
    push_in_progress: PushInProgress | None = None  # type: ignore[assignment]  # Trainer sets it with the repository
    loss_is_scaled_for_ga = False  # the loss is a mean per batch; Trainer divides it among accumulated batches

    def __init__(
        self,
        model: PreTrainedModel | Encoder | TrainingStep | None = None,
        args: ContrastiveTrainingArguments | None = None,
        objective: Objective | Callable[..., Tensor] | None = None,
        train_dataset: TrainData | None = None,
        eval_dataset: EvalData | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        train_name: str = "train_dataset",
        paired: bool | None = None,
    ):
        # A copy, for some settings follow from the data and the model: the caller's object stays as it is.
        args = copy.copy(args or ContrastiveTrainingArguments("tmp_trainer"))
        tasks = named_tasks(eval_dataset)
        check_settings(args, tasks)
        self.objective = as_objective(objective or SimCSE())
        self.step = make_step(model, processing_class, args, self.objective)
        self.encoder = self.step.encoder
        add_own_parameters(*optimizers, self.step)
        rows, views = self._read_rows(train_dataset, args, train_name, paired)
        if args.process_index == 0:
            warn_of_ignored(args)
        self.watch = Watch(batches_alike=not isinstance(rows, Mixture))
        super().__init__(
            model=self.step,
            args=args,
            data_collator=RaggedCollator(views, args.same_dropout_mask),
            train_dataset=rows,
            eval_dataset=tasks or None,
            processing_class=self.encoder.tokenizer,
            callbacks=[self.watch, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.encoder.check_forward()  # as it will be trained: on this device, with its adapters and its temperature
        self.temperature: Tensor | None = None  # the learned one at the last step
        self.source_losses: dict[int, list[Tensor]] = {}  # of each source, since the last log
        self.lines = show_lines(self, tasks)

    def _read_rows(
        self, rows: TrainData | None, args: ContrastiveTrainingArguments, name: str, paired: bool | None
    ) -> tuple[Dataset | Mixture | None, list[int]]:
        """Tokenize and check the rows to train on. Returns them, and the number of texts in a row of each source."""
        if rows is None:
            return None, [2]
        check_batch(args)
        with args.main_process_first(desc="tokenizing"), hidden_bars(bool(args.disable_tqdm)):
            tokens, views = tokenize_all(rows, self.encoder, args, name, paired)
        self.objective.check_rows(max(views), name)
        check_training(args, self.encoder, len(batch_sampler(tokens, args, args.train_batch_size)), name)
        return tokens, views

    # ---- the step ----

    @property
    def sharded(self) -> bool:
        """Whether a layer's forward is a collective (FSDP, ZeRO-3), so that ranks must make equally many."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def get_train_dataloader(self) -> DataLoader:
        """Return this rank's batches, which are a function of (seed, epoch, step)."""
        if self.train_dataset is None:
            raise InputError("training needs a train_dataset")
        args = self.args
        sampler = batch_sampler(self.train_dataset, args, train_batch_size(self))
        if sampler.left_out:
            logger.info(f"{sampler.left_out} rows do not fill a batch and sit out; other rows in each epoch")
        return EpochDataLoader(
            self.train_dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Return the mean loss of this rank's rows against the rows of all ranks, a scalar.

        Args:
            model: the wrapped `TrainingStep`: gradients synchronise only through its forward.
            inputs: a batch of `RaggedCollator`.
            return_outputs: also return {"embeddings": (B, V, D)}.
            num_items_in_batch: Trainer's number of tokens; the loss is a mean over rows and has no use for it.
        """
        args, input_ids, text_ids = self.args, inputs["input_ids"], inputs["text_ids"]
        mlm = None if self.step.mlm_head is None else mask_tokens(input_ids, self.encoder.tokenizer)
        outputs = model(input_ids, inputs["lengths"], args.chunk_tokens, args.gradient_caching, mlm, self.sharded)
        rows = to_rows(outputs["embeddings"], inputs["slots"], text_ids.shape, args.same_dropout_mask)  # (B, V, D)
        first_row = args.process_index * len(rows)
        learned = {"temperature": outputs["temperature"]} if "temperature" in outputs else {}
        loss = self.objective(rows, text_ids, gather_rows(rows), gather_rows(text_ids), first_row, **learned)
        if mlm is not None:  # the mean over the masked tokens of all ranks, before ranks are averaged
            masked = gather_rows((mlm[1] != -100).sum().view(1)).sum().clamp(min=1)
            loss = loss + self.objective.mlm_weight * outputs["mlm"] * args.world_size / masked
        if model.training:
            self._note(loss, rows, inputs, outputs)
        return (loss, {"embeddings": rows}) if return_outputs else loss

    def _note(self, loss: Tensor, rows: Tensor, inputs: dict, outputs: dict[str, Tensor]) -> None:
        """Keep what the next log is made of."""
        self.watch.see(loss, rows, inputs["text_ids"])
        if "temperature" in outputs:
            self.temperature = outputs["temperature"].detach()
        if isinstance(self.train_dataset, Mixture):
            self.source_losses.setdefault(inputs["source"], []).append(loss.detach())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses of the sources, the learned temperature and the numbers of `hf_embed.watch` to a log of training."""
        if "loss" in logs:  # on every rank
            if isinstance(self.train_dataset, Mixture):
                for source, losses in sorted(self.source_losses.items()):
                    mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean")
                    logs[f"loss_{self.train_dataset.names[source]}"] = round(mean.item(), 4)
                self.source_losses.clear()
            if self.temperature is not None:
                logs["temperature"] = self.temperature.item()
            if self.is_world_process_zero():
                logs |= self.watch.numbers()
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As Trainer's, without the learned temperature."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_temperature")]

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: EvalData | str | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the metrics of every set, and their means; every text counts once on any number of ranks.

        Args:
            eval_dataset: sets in place of the trainer's own, or the name of one of these.
            ignore_keys: of no use here.
            metric_key_prefix: what the metrics' names begin with.

        Raises:
            InputError: there is no evaluation set.
        """
        tasks = self.eval_dataset or {}
        if isinstance(eval_dataset, str):
            tasks = {eval_dataset: tasks[eval_dataset]}
        elif eval_dataset is not None:
            tasks = named_tasks(eval_dataset)
        if not tasks:
            raise InputError("evaluation needs an eval_dataset with the columns sentence1, sentence2 and score")
        memory = memory_tracker(self)
        memory.start()
        self.model.eval()
        with torch.inference_mode(), hidden_bars(bool(self.args.disable_tqdm)):
            scores = score_tasks(tasks, self._embed)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        self.lines.scored(tasks, metric_key_prefix)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        memory.stop_and_update_metrics(metrics)
        return metrics

    def _embed(self, texts: list[str], prompt_name: str | None = None) -> Tensor:
        """Return vectors (N, D), finished as `encode` does."""
        texts = [self.encoder.prompt(prompt_name) + text for text in texts]
        embeddings = embed_texts(self.model, self.encoder, texts, self.args.chunk_tokens, self.sharded)
        return self.encoder.finish(embeddings.float())

    # ---- saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """Write a plain checkpoint, verified when it is the final one, and what resuming needs beyond it."""
        args = self.args
        if not args.should_save:
            return
        folder = str(output_dir or args.output_dir)
        final = Path(folder) == Path(str(args.output_dir))
        of_encoder = None if state_dict is None else with_file_names(state_dict)
        save_encoder(self.encoder, folder, verify=final and state_dict is None, state_dict=of_encoder)
        if not final:
            save_training_tensors(folder, self.step, self.encoder, state_dict or self.step.state_dict())
        torch.save(without_secrets(args), Path(folder, hub.TRAINING_ARGS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_training_state(resume_from_checkpoint, self.step, self.encoder)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
            return
        best = str(self.state.best_model_checkpoint)
        logger.info(f"taking the best model, {best} ({self.state.best_metric:.2f})")
        self._load_from_checkpoint(best)

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, before the first step: a name or a token that the Hub refuses is known then."""
        hub.init_repository(partial(super().init_hf_repo, token, private), self.args)

    def push_to_hub(  # type: ignore[override]  # it takes nothing for Trainer's own card, and returns the commit's address
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | Future[str] | None:
        """Save, and upload the model's own files to `args.hub_model_id`; see `hf_embed.checkpoint.hub`.

        Returns the commit's address, a Future of it unless `blocking`, or None on other ranks than the first.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        save_without_push(self)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        push = partial(
            hub.push_folder, str(args.output_dir), str(self.hub_model_id), bool(private or args.hub_private_repo),
            revision or args.hub_revision, commit_message=str(commit_message), token=token or args.hub_token,
        )  # fmt: skip
        return push() if blocking else HfApi().run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint while the training goes on, from a copy: the checkpoint may be rotated away meanwhile."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None:
            if not self.push_in_progress.is_done() and not args.hub_always_push:
                return
            self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.push_in_progress = hub.push_checkpoint(checkpoint_folder, str(self.hub_model_id), args, self.state.global_step)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        hub.finish_push(self.push_in_progress, self.args)
        self.push_in_progress = None

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keep the card that `save_model` wrote; Trainer's own would replace it."""
