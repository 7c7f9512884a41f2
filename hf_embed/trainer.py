"""ContrastiveTrainer: the Trainer you know, with a contrastive step.

One step: the collator's flat batch -> `Encoder.forward` in length-sorted chunks (inside DDP or FSDP, one call) -> a grid of
embeddings -> one gather -> the objective on the own rows against all rows -> backward.

Shapes: B own rows, N rows of all ranks, V texts a row, D wide.
"""

import logging
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.trainer_utils import seed_worker

from hf_embed import export
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.data.collator import RaggedCollator
from hf_embed.data.sampling import GlobalBatchSampler
from hf_embed.data.tokenization import tokenize_rows
from hf_embed.distributed import gather_rows, world
from hf_embed.encoder import Encoder, embed_texts
from hf_embed.errors import InputError
from hf_embed.evaluation import sts
from hf_embed.mlm import mask_tokens, split_masked_lm
from hf_embed.objectives import SimCSE

logger = logging.getLogger(__name__)

# In a checkpoint: the tensors of the training model that the plain checkpoint beside it does not hold.
TRAINING_TENSORS = "training.safetensors"


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
            (`hf_embed.data.sources` lists what is accepted). It is tokenized here, once.
        eval_dataset: an STS set, a `datasets.Dataset` with sentence1, sentence2 and score, or a dict of such sets.
        processing_class: the tokenizer (an `Encoder` brings its own).
        callbacks, optimizers: as for `Trainer`.

    Evaluation logs `eval_NAME_spearman`, `eval_NAME_alignment` and `eval_NAME_uniformity` for each set, and their means
    `eval_spearman`, `eval_alignment`, `eval_uniformity`, which `metric_for_best_model` can name.

    Raises:
        InputError: what is wrong with the data or the settings, before the first step.
    """

    loss_is_scaled_for_ga = False  # the loss is a mean per batch; Trainer divides it among accumulated batches

    def __init__(
        self,
        model: PreTrainedModel | Encoder | None = None,
        args: ContrastiveTrainingArguments | None = None,
        objective=None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        train_name: str = "train_dataset",
        paired: bool | None = None,
    ):
        args = args or ContrastiveTrainingArguments("tmp_trainer")
        check_world(args)
        if args.n_gpu > 1:  # DataParallel would cut the flat batch in the wrong places
            logger.warning(f"{args.n_gpu} GPUs but one process: one GPU is used; `accelerate launch` uses them all")
            args._n_gpu = 1
        self.objective = objective or SimCSE()
        mlm_head = None
        if getattr(self.objective, "mlm_weight", 0):
            model, mlm_head = split_masked_lm(model)
        self.encoder = make_encoder(model, processing_class, args)
        if mlm_head is not None:
            self.encoder.mlm_head = mlm_head
        freeze_unused(self.encoder)
        views = 2
        if train_dataset is not None:
            with args.main_process_first(desc="tokenizing"):
                train_dataset = tokenize_rows(
                    train_dataset, self.encoder.tokenizer, self.encoder.max_length, train_name, paired,
                    self.encoder.prompts, args.drop_empty_rows,
                )  # fmt: skip
            views = max(2, max(map(len, train_dataset.select_columns("text_ids")[:]["text_ids"])))
            check_batch(args, len(train_dataset), train_name)
        super().__init__(
            model=self.encoder,
            args=args,
            data_collator=RaggedCollator(views),
            train_dataset=train_dataset,
            eval_dataset=named_sets(eval_dataset) or None,
            processing_class=self.encoder.tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )

    # ---- the step ----

    @property
    def sharded(self) -> bool:
        """Whether a layer's forward is a collective (FSDP, ZeRO-3), so that ranks must make equally many."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise InputError("training needs a train_dataset")
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = GlobalBatchSampler(
            len(self.train_dataset), self._train_batch_size, args.process_index, args.world_size, seed,
            args.dataloader_drop_last,
        )  # fmt: skip
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
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
        )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # `model` is the wrapped one: gradients synchronise only through its forward.
        args, input_ids = self.args, inputs["input_ids"]
        mlm = masked = None
        if self.encoder.mlm_head is not None:
            mlm = mask_tokens(input_ids, self.encoder.tokenizer)
            masked = (mlm[1] != -100).sum().view(1)
        embeddings = model(input_ids, inputs["lengths"], args.chunk_tokens, args.gradient_caching, mlm, self.sharded)
        if mlm is not None:
            embeddings, mlm_sum = embeddings
        if embeddings.dtype in (torch.float16, torch.bfloat16):
            embeddings = embeddings.float()
        text_ids = inputs["text_ids"]
        grid = to_grid(embeddings, inputs["slots"], text_ids.shape)  # (B, V, D)
        loss = self.objective(grid, text_ids, gather_rows(grid), gather_rows(text_ids), args.process_index * len(grid))
        if mlm is not None:  # the mean over the masked tokens of all ranks, before ranks are averaged
            loss = loss + self.objective.mlm_weight * mlm_sum * args.world_size / gather_rows(masked).sum().clamp(min=1)
        return (loss, {"embeddings": grid}) if return_outputs else loss

    # ---- evaluation ----

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Spearman x 100, alignment and uniformity on STS sets; every row counts once on any number of ranks."""
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(sets, str):
            sets = {sets: self.eval_dataset[sets]}
        elif eval_dataset is not None:
            sets = named_sets(sets)
        if not sets:
            raise InputError("evaluation needs an eval_dataset with the columns sentence1, sentence2 and score")
        self._memory_tracker.start()
        self.model.eval()
        with torch.inference_mode():
            scores = sts.score_sets(sets, self._embed)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._memory_tracker.stop_and_update_metrics(metrics)
        return metrics

    def _embed(self, texts: list[str]) -> Tensor:
        """(N, D) through the model as it is placed now: under FSDP only the wrapped one has its weights together."""
        return embed_texts(self.model, self.encoder, texts, self.args.chunk_tokens, equal_chunks=self.sharded).float()

    # ---- saving and loading ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """A plain checkpoint, verified when it is the final one, and what resuming needs beyond it."""
        if not self.args.should_save:
            return
        output_dir = output_dir or self.args.output_dir
        final = Path(output_dir) == Path(self.args.output_dir)
        sharded = state_dict is not None
        export.save_encoder(self.encoder, output_dir, verify=final and not sharded, state_dict=state_dict)
        if not final:
            tensors = self._training_tensors(state_dict or self.encoder.state_dict())
            if tensors:
                save_file(tensors, Path(output_dir, TRAINING_TENSORS))
        torch.save(self.args, Path(output_dir, "training_args.bin"))

    def _training_tensors(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Heads used while training; with LoRA, whose plain checkpoint is merged, all that is trained."""
        trained = {name for name, parameter in self.encoder.named_parameters() if parameter.requires_grad}
        peft = self.encoder.base is not self.encoder.backbone
        return {
            name: tensor.detach()
            .cpu()
            .clone(memory_format=torch.contiguous_format)  # tied tensors apart: safetensors wants each its own
            for name, tensor in state_dict.items()
            if not name.startswith("backbone.") or (peft and name in trained)
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        folder = Path(resume_from_checkpoint)
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder}: no checkpoint there (no config.json); give a checkpoint-N folder")
        if self.encoder.base is self.encoder.backbone:
            load_backbone(self.encoder.backbone, folder)
        if (folder / TRAINING_TENSORS).is_file():
            self.encoder.load_state_dict(load_file(folder / TRAINING_TENSORS), strict=False)

    def _load_best_model(self) -> None:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
            return
        logger.info(f"taking the best model, {self.state.best_model_checkpoint} ({self.state.best_metric:.2f})")
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Trainer copies weights and config to the folder it uploads; the files that say how to pool belong with them."""
        if self.is_world_process_zero():
            export.copy_settings(checkpoint_folder, self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Keep the card that `save_model` wrote; Trainer's own would replace it."""


def make_encoder(model, tokenizer, args: ContrastiveTrainingArguments) -> Encoder:
    """The encoder to train, with what `args` say about it."""
    if model is None:
        raise InputError("ContrastiveTrainer needs model=: a PreTrainedModel or an Encoder")
    given = {
        key: value
        for key in ("pooling", "max_length", "normalize", "prompts")
        if (value := getattr(args, key, None)) is not None
    }
    if isinstance(model, Encoder):
        own = {key: getattr(model, key) for key in ("pooling", "max_length", "normalize", "prompts")}
        if all(own[key] == value for key, value in given.items()):
            return model
        return Encoder(model.backbone, model.tokenizer, **(own | given))
    if tokenizer is None:
        raise InputError("ContrastiveTrainer needs processing_class=, the model's tokenizer")
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in model.parameters() if p.requires_grad):
        logger.warning(
            "the weights to train are in half precision, and so would be every update; load the model with "
            "dtype=torch.float32 and set bf16=True for speed"
        )
    return Encoder(model, tokenizer, **given)


def named_sets(sets: Dataset | dict[str, Dataset] | None) -> dict[str, Dataset]:
    """STS sets by name, checked; a single one is named "sts"."""
    sets = {"sts": sets} if isinstance(sets, Dataset) else sets or {}
    return {name: sts.check_sts(rows, name) for name, rows in sets.items()}


def freeze_unused(encoder: Encoder) -> None:
    """Parameters that no embedding touches would leave DDP waiting for their gradients: the pooler, unless it is the head."""
    pooler = getattr(encoder.base, "pooler", None)
    if isinstance(pooler, nn.Module) and encoder.pooling != "cls_mlp":
        pooler.requires_grad_(False)


def check_world(args: ContrastiveTrainingArguments) -> None:
    """Ranks that do not know of each other would train apart without a word."""
    if world()[1] != args.world_size:
        raise InputError(
            f"launched on {world()[1]} processes, but the training arguments count {args.world_size}; on a machine with a "
            "GPU, CPU processes need --use_cpu"
        )


def check_batch(args: ContrastiveTrainingArguments, rows: int, name: str) -> None:
    if args.per_device_train_batch_size * args.world_size < 2:
        raise InputError(
            "per_device_train_batch_size is 1: a batch of one row has no negatives; set at least 2 "
            "(gradient accumulation does not add negatives, gradient_caching makes large batches fit)"
        )
    if rows < args.world_size:
        raise InputError(f"{name}: {rows} rows for {args.world_size} processes; every process needs at least one")


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
