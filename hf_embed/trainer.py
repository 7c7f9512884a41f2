"""ContrastiveTrainer: the Trainer you know, with a contrastive step.

One step: the collator's flat batch -> `Encoder.forward` in length-sorted chunks (inside DDP or FSDP, one call) -> a grid of
embeddings -> one gather -> the objective on the own rows against all rows -> backward.

Shapes: B own rows, N rows of all ranks, V texts a row, D wide.
"""

import logging
import shutil
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProgressCallback, Trainer, set_seed
from transformers.trainer_utils import HubStrategy, seed_worker
from transformers.utils import PushInProgress

from hf_embed.adapters import check_adapters, has_adapters
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint import hub
from hf_embed.checkpoint.save import needs_runtime, save_encoder
from hf_embed.checkpoint.verify import verify_loadable
from hf_embed.data.collator import RaggedCollator
from hf_embed.data.mixture import Mixture, Source, check_prompts, make_mixture
from hf_embed.data.sampling import GlobalBatchSampler, SourceBatchSampler
from hf_embed.data.tokenization import most_texts, share_cut, tokenize_rows, warn_of_cut_texts
from hf_embed.distributed import gather_rows, get_world_size
from hf_embed.encoder import Encoder, embed_texts
from hf_embed.errors import InputError, without_secrets
from hf_embed.evaluation.sts import STS, check_sts
from hf_embed.evaluation.tasks import Task, score_tasks
from hf_embed.mlm import mask_tokens, split_masked_lm
from hf_embed.objectives import SimCSE
from hf_embed.tempscale import applied_tempscale, apply_tempscale
from hf_embed.tempscale.fold import folded
from hf_embed.trainer_settings import check_before, check_evaluation, check_metric, check_training, warn_of_ignored
from hf_embed.unused import settle_unused
from hf_embed.watch import Watch

logger = logging.getLogger(__name__)

# In a checkpoint: the tensors of the training model that the plain checkpoint beside it does not hold.
TRAINING_TENSORS = "training.safetensors"


class Progress(ProgressCallback):
    """The console shows the mean loss, alignment and uniformity; loggers and `log_history` have the rest."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        shown = {key: value for key, value in (logs or {}).items() if not key.startswith(("loss_", "norm_", "masked_"))}
        super().on_log(args, state, control, logs=shown, **kwargs)


class EpochDataLoader(DataLoader):
    """Tells its sampler the epoch; Trainer calls `set_epoch`."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class ContrastiveTrainer(Trainer):
    """Fine-tune `model` into a text encoder.

    Args:
        model: a `PreTrainedModel`, a PEFT model around one, or an `Encoder`.
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

    loss_is_scaled_for_ga = False  # the loss is a mean per batch; Trainer divides it among accumulated batches

    def __init__(
        self,
        model: PreTrainedModel | Encoder | None = None,
        args: ContrastiveTrainingArguments | None = None,
        objective=None,
        train_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | list[Source] | None = None,
        eval_dataset: Dataset | Task | dict[str, Dataset | Task] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        train_name: str = "train_dataset",
        paired: bool | None = None,
    ):
        args = args or ContrastiveTrainingArguments("tmp_trainer")
        check_world(args)
        check_before(args)  # once more, for a script may have changed them since
        tasks = named_tasks(eval_dataset)
        check_evaluation(args, tasks)
        check_metric(args, tasks)
        if args.n_gpu > 1:  # DataParallel would cut the flat batch in the wrong places
            logger.warning(f"{args.n_gpu} GPUs but one process: one GPU is used; `accelerate launch --quiet` uses them all")
            args._n_gpu = 1
        self.objective = objective or SimCSE()
        mlm_head = None
        if getattr(self.objective, "mlm_weight", 0):
            model, mlm_head = split_masked_lm(model)
        self.encoder = make_encoder(model, processing_class, args)
        if args.temp_scale is not None:
            apply_tempscale(self.encoder.backbone, args.temp_scale)
        needs_runtime(self.encoder, allowed=False)  # said now, not after the training
        verify_loadable(self.encoder)
        self.encoder.mlm_head, self.encoder.log_temperature = mlm_head, None  # not those of an earlier training
        settle_unused(self.encoder, args)
        check_widths(self.objective, self.encoder)
        warn_of_settings_for_encode(self.encoder)
        if getattr(self.objective, "learn_temperature", False):
            self.encoder.learn_temperature(self.objective.temperature)
        add_own_parameters(*optimizers, self.encoder)
        self.temperature, self.source_losses = None, {}  # the learned one at the last step; losses since the last log
        self.watch = Watch()
        views = [2]
        if train_dataset is not None:
            check_batch(args)
            check_prompts(self.encoder.prompts, self.encoder.tokenizer, self.encoder.max_length, "prompts")
            with args.main_process_first(desc="tokenizing"):
                train_dataset, views = tokenize_all(train_dataset, self.encoder, args, train_name, paired)
            if args.same_dropout_mask and (isinstance(train_dataset, Mixture) or most_texts(train_dataset) > 1):
                raise InputError(f"{train_name}: same_dropout_mask needs rows of a single text, which is both views")
            if getattr(self.objective, "hard_negative_weight", 0) and max(views) < 3:
                raise InputError(f"{train_name}: hard_negative_weight is set, but no row has a negative; leave it out")
            check_training(args, self.encoder, len(batch_sampler(train_dataset, args, args.train_batch_size)), train_name)
        if args.process_index == 0:
            warn_of_ignored(args)
        super().__init__(
            model=self.encoder,
            args=args,
            data_collator=RaggedCollator(views, args.same_dropout_mask),
            train_dataset=train_dataset,
            eval_dataset=tasks or None,
            processing_class=self.encoder.tokenizer,
            callbacks=[self.watch, *(callbacks or [])],
            optimizers=optimizers,
        )
        self.encoder.check_forward()  # as it will be trained: on this device, with its adapters and its temperature
        self.watch.batches_alike = not isinstance(train_dataset, Mixture)
        if self.pop_callback(ProgressCallback):
            self.add_callback(Progress)

    # ---- the step ----

    @property
    def sharded(self) -> bool:
        """Whether a layer's forward is a collective (FSDP, ZeRO-3), so that ranks must make equally many."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise InputError("training needs a train_dataset")
        args = self.args
        sampler = batch_sampler(self.train_dataset, args, self._train_batch_size)
        if isinstance(sampler, GlobalBatchSampler) and sampler.left_out:
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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # `model` is the wrapped one: gradients synchronise only through its forward.
        args, input_ids = self.args, inputs["input_ids"]
        mlm = masked = None
        if self.encoder.mlm_head is not None:
            mlm = mask_tokens(input_ids, self.encoder.tokenizer)
            masked = (mlm[1] != -100).sum().view(1)
        outputs = model(input_ids, inputs["lengths"], args.chunk_tokens, args.gradient_caching, mlm, self.sharded)
        embeddings = outputs["embeddings"]
        if embeddings.dtype in (torch.float16, torch.bfloat16):
            embeddings = embeddings.float()
        text_ids = inputs["text_ids"]
        if args.same_dropout_mask:  # one pass is both views
            embeddings = embeddings.repeat_interleave(2, 0)
        grid = to_grid(embeddings, inputs["slots"], text_ids.shape)  # (B, V, D)
        learned, first_row = {}, args.process_index * len(grid)
        if "temperature" in outputs:
            learned["temperature"], self.temperature = outputs["temperature"], outputs["temperature"].detach()
        loss = self.objective(grid, text_ids, gather_rows(grid), gather_rows(text_ids), first_row, **learned)
        if mlm is not None:  # the mean over the masked tokens of all ranks, before ranks are averaged
            tokens = gather_rows(masked).sum().clamp(min=1)
            loss = loss + self.objective.mlm_weight * outputs["mlm"] * args.world_size / tokens
        if model.training:
            self.watch.see(loss, grid, text_ids)
        if isinstance(self.train_dataset, Mixture) and model.training:
            self.source_losses.setdefault(inputs["source"], []).append(loss.detach())
        return (loss, {"embeddings": grid}) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a log of training, on every rank
            for source, losses in sorted(self.source_losses.items()):
                mean = self.accelerator.reduce(torch.stack(losses).mean(), "mean")
                logs[f"loss_{self.train_dataset.names[source]}"] = round(mean.item(), 4)
            self.source_losses.clear()
            if self.temperature is not None:
                logs["temperature"] = self.temperature.item()
            if self.is_world_process_zero():
                logs |= self.watch.numbers()
        super().log(logs, start_time)

    def get_decay_parameter_names(self, model) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith("log_temperature")]

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The metrics of every set, and their means; every text counts once on any number of ranks."""
        tasks = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(tasks, str):
            tasks = {tasks: self.eval_dataset[tasks]}
        elif eval_dataset is not None:
            tasks = named_tasks(tasks)
        if not tasks:
            raise InputError("evaluation needs an eval_dataset with the columns sentence1, sentence2 and score")
        self._memory_tracker.start()
        self.model.eval()
        with torch.inference_mode():
            scores = score_tasks(tasks, self._embed)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _embed(self, texts: list[str], prompt_name: str | None = None) -> Tensor:
        """(N, D) through the model as it is placed now: under FSDP only the wrapped one has its weights together."""
        texts = [self.encoder.prompt(prompt_name) + text for text in texts]
        embeddings = embed_texts(self.model, self.encoder, texts, self.args.chunk_tokens, sharded=self.sharded)
        return self.encoder.finish(embeddings.float())

    # ---- saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A plain checkpoint, verified when it is the final one, and what resuming needs beyond it."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        final = Path(output_dir) == Path(self.args.output_dir)
        sharded = state_dict is not None
        save_encoder(self.encoder, output_dir, verify=final and not sharded, state_dict=state_dict)
        if not final:
            tensors = self._training_tensors(state_dict or self.encoder.state_dict())
            if tensors:
                save_file(tensors, Path(output_dir, TRAINING_TENSORS))
        torch.save(without_secrets(self.args), Path(output_dir, hub.TRAINING_ARGS))

    def _training_tensors(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Heads used while training; with adapters, whose plain checkpoint is merged, all that is trained; with TempScale the
        weights that it is folded into there."""
        trained = {name for name, parameter in self.encoder.named_parameters() if parameter.requires_grad}
        peft = has_adapters(self.encoder.backbone)
        scaled = applied_tempscale(self.encoder.backbone) and not peft  # the plain checkpoint has these folded
        scaled = {f"backbone.{name}" for name in folded(self.encoder.backbone)[0]} if scaled else set()
        return {
            name: tensor.detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)  # tied tensors apart: safetensors wants each its own
            for name, tensor in state_dict.items()
            if not name.startswith("backbone.") or (peft and name in trained) or name in scaled
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no checkpoint there (no config.json); give a checkpoint-N folder")
        if not has_adapters(self.encoder.backbone):
            load_backbone(self.encoder.backbone, folder)
        if (folder / TRAINING_TENSORS).is_file():
            self.encoder.load_state_dict(load_file(folder / TRAINING_TENSORS), strict=False)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
            return
        logger.info(f"taking the best model, {self.state.best_model_checkpoint} ({self.state.best_metric:.2f})")
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    # ---- the Hub ----

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, before the first step: a name or a token that the Hub refuses is known then."""
        repo = self.args.hub_model_id or Path(self.args.output_dir).absolute().name
        hub.persist(partial(super().init_hf_repo, token, private), repo, hub.command(self.args.output_dir, repo))

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ):
        """Save, and upload the model's own files to `args.hub_model_id`; see `hf_embed.checkpoint.hub`.

        Returns the commit's address, a Future of it unless `blocking`, or None on other ranks than the first.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        push = partial(
            hub.push_folder, args.output_dir, self.hub_model_id, bool(private or args.hub_private_repo),
            revision or args.hub_revision, commit_message=commit_message, token=token or args.hub_token,
        )  # fmt: skip
        return push() if blocking else HfApi().run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint while the training goes on, from a copy: the checkpoint may be rotated away meanwhile."""
        args, copy = self.args, Path(self.args.output_dir, "_pushing")
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None:
            if not self.push_in_progress.is_done() and not args.hub_always_push:
                return
            self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(checkpoint_folder, copy, symlinks=True)
        message = f"Training in progress, step {self.state.global_step}"
        api = HfApi(token=args.hub_token)
        where = {"repo_id": self.hub_model_id, "revision": args.hub_revision, "run_as_future": True}
        jobs = [api.create_commit(operations=hub.additions(copy, self.hub_model_id), commit_message=message, **where)]
        if args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            name = "last-checkpoint" if args.hub_strategy == HubStrategy.CHECKPOINT else Path(checkpoint_folder).name
            resumable = hub.additions(copy, self.hub_model_id, everything=True, inside=name)
            jobs.append(api.create_commit(operations=resumable, commit_message=f"{message}, checkpoint", **where))
        self.push_in_progress = PushInProgress(jobs)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        for job in self.push_in_progress.jobs if getattr(self, "push_in_progress", None) else []:
            if error := job.exception():
                logger.warning(f"a checkpoint did not reach the Hub: {(hub.reason(error) or (error, False))[0]}")
        self.push_in_progress = None
        shutil.rmtree(Path(self.args.output_dir, "_pushing"), ignore_errors=True)

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the card that `save_model` wrote; Trainer's own would replace it."""


def make_encoder(model, tokenizer, args: ContrastiveTrainingArguments) -> Encoder:
    """The encoder to train, with what `args` say about it."""
    if model is None:
        raise InputError("ContrastiveTrainer needs model=: a PreTrainedModel or an Encoder")
    check_adapters(model.backbone if isinstance(model, Encoder) else model)
    given = {
        key: value
        for key in ("pooling", "max_length", "normalize", "prompts")
        if (value := getattr(args, key, None)) is not None
    }
    if isinstance(model, Encoder):
        own = model.settings
        if "prompts" in given:  # which speak of queries and documents alone
            others = {key: text for key, text in model.prompts.items() if key not in ("query", "document")}
            given["prompts"] = others | given["prompts"]
        if all(own[key] == value for key, value in given.items()):
            return model
        set_seed(args.seed)  # of a new training head
        return Encoder(model.backbone, model.tokenizer, **(own | given))
    if tokenizer is None:
        raise InputError("ContrastiveTrainer needs processing_class=, the model's tokenizer")
    set_seed(args.seed)  # of a new training head
    encoder = Encoder(model, tokenizer, **given)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in encoder.backbone.parameters() if p.requires_grad):
        logger.warning(
            "the weights to train are in half precision, and so would be every update; load the model with "
            "dtype=torch.float32 and set bf16=True for speed"
        )
    return encoder


def warn_of_settings_for_encode(encoder: Encoder) -> None:
    """Say which settings of the model training has no use for."""
    if encoder.prompt():
        logger.warning(
            f"encode puts the model's default prompt '{encoder.default_prompt_name}' before texts; training puts those named "
            "query and document before them, where there are such"
        )
    if encoder.dimension < encoder.full_dimension:
        logger.warning(
            f"training uses all {encoder.full_dimension} dimensions; encode gives the first {encoder.dimension} (truncate_dim)"
        )


def named_tasks(sets: Dataset | Task | dict[str, Dataset | Task] | None) -> dict[str, Task]:
    """Tasks by name; a `Dataset` is an STS set, and is checked. A single one is named by its kind."""
    if sets is not None and not isinstance(sets, dict):
        sets = {getattr(sets, "kind", "sts"): sets}
    return {name: STS(check_sts(task, name)) if isinstance(task, Dataset) else task for name, task in (sets or {}).items()}


def tokenize_all(rows, encoder: Encoder, args, name: str, paired: bool | None) -> tuple[Dataset | Mixture, list[int]]:
    """What `train_dataset` may be to rows of tokens, and the number of texts in a row of each source."""
    if isinstance(rows, Dataset):
        tokens = tokenize_rows(rows, encoder.tokenizer, encoder.max_length, name, paired, encoder.prompts, args.drop_empty_rows)
        if len(tokens) < args.world_size:
            raise InputError(f"{name}: {len(tokens)} rows for {args.world_size} processes; every process needs at least one")
        warn_of_cut_texts({name: share_cut(tokens)})
        return tokens, [max(2, most_texts(tokens))]
    if isinstance(rows, IterableDataset):
        # An epoch is the whole run: else its last update would accumulate fewer batches than the others.
        batches = args.max_steps * args.gradient_accumulation_steps
        known = batches * args.per_device_train_batch_size * args.world_size if args.max_steps > 0 else None
        rows = [Source(name, rows, size=known)]
    elif isinstance(rows, dict):
        if splits := {"train", "validation", "test"} & set(rows):
            raise InputError(f"{name}: a dict is of sources by name, and '{min(splits)}' looks like a split; choose one split")
        rows = [Source(key, table) for key, table in rows.items()]
    elif not isinstance(rows, list) or not all(isinstance(source, Source) for source in rows):
        rows = [Source(name, rows)]  # which says what it cannot be
    mixture = make_mixture(rows, encoder, args)
    return mixture, mixture.views


def batch_sampler(rows: Dataset | Mixture, args, batch_size: int) -> GlobalBatchSampler | SourceBatchSampler:
    """This rank's batches of `rows`, which are tokenized."""
    seed = args.seed if args.data_seed is None else args.data_seed
    share = {"batch_size": batch_size, "rank": args.process_index, "ranks": args.world_size, "seed": seed}
    if isinstance(rows, Mixture):
        return SourceBatchSampler(rows.sizes, rows.probabilities, streams=rows.streams, **share)
    return GlobalBatchSampler(len(rows), drop_last=args.dataloader_drop_last, **share)


def add_own_parameters(optimizer: torch.optim.Optimizer | None, scheduler, encoder: Encoder) -> None:
    """Let the user's optimizer train what the trainer itself has made: the learned temperature, without weight decay, and the
    training head. Raises InputError if a scheduler would not know of them, or the optimizer is of another model."""
    if optimizer is None:
        return
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(encoder.parameters()):
        raise InputError("optimizers: the optimizer holds no parameter of the model; make it of the model that is trained")
    head = [] if encoder.train_head is None else list(encoder.train_head.parameters())
    temperature = [] if encoder.log_temperature is None else [encoder.log_temperature]
    for what, parameters, settings in (
        ("training head", head, {}), ("learned temperature", temperature, {"weight_decay": 0.0})
    ):  # fmt: skip
        parameters = [parameter for parameter in parameters if parameter not in held]
        if parameters and scheduler is not None:
            raise InputError(
                f"optimizers: the scheduler was made before the {what}, and cannot set its learning rate; give the optimizer "
                "alone, (optimizer, None), and lr_scheduler_type"
            )
        if parameters:
            optimizer.add_param_group({"params": parameters} | settings)


def check_world(args: ContrastiveTrainingArguments) -> None:
    """Ranks that do not know of each other would train apart without a word."""
    if get_world_size() != args.world_size:
        raise InputError(
            f"launched on {get_world_size()} processes, but the training arguments count {args.world_size}; on a machine with "
            "a GPU, CPU processes need --use_cpu"
        )


def check_widths(objective, encoder: Encoder) -> None:
    if max(getattr(objective, "dims", ()), default=0) > encoder.full_dimension:
        raise InputError(f"Matryoshka dims {max(objective.dims)}: the embedding is {encoder.full_dimension} wide")


def check_batch(args: ContrastiveTrainingArguments) -> None:
    if args.per_device_train_batch_size * args.world_size < 2:
        raise InputError(
            "per_device_train_batch_size is 1: a batch of one row has no negatives; set at least 2 "
            "(gradient accumulation does not add negatives, gradient_caching makes large batches fit)"
        )


def to_grid(embeddings: Tensor, slots: Tensor, shape: tuple[int, int]) -> Tensor:
    """Embeddings (texts, D) into their slots of a (B, V, D) grid; an absent text is zero."""
    rows, views = shape
    grid = embeddings.new_zeros(rows * views, embeddings.shape[1])
    return grid.index_copy(0, slots, embeddings).view(rows, views, -1)


def load_backbone(backbone: PreTrainedModel, folder: Path) -> None:
    tensors = {}
    for shard in folder.glob("model*.safetensors"):
        tensors |= load_file(shard)
    missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    tied = set(getattr(backbone, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise InputError(f"{folder}: the checkpoint is of another model ({(list(missing) + unexpected)[:3]} ...)")
