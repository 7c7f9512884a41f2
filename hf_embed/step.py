"""TrainingStep: an encoder together with the parts that exist only during training. DDP and FSDP wrap this module.

Besides the encoder, there may be

- a training head: SimCSE's MLP between pooling and embedding (pooling `cls_mlp_train`). Evaluation and export leave it out;
- a masked-language-modeling head (`mlm_weight`; see `hf_embed.training.mlm`);
- the temperature of the loss, if the objective learns it.

One call of `forward` returns everything that has a gradient. So DDP reduces gradients once, and FSDP gathers weights once.

Shapes: N texts, S tokens in total. A chunk has b texts of T tokens. D is the width of an embedding.
"""

import logging
import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from hf_embed.adapters import check_adapters, has_adapters
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.model_files import Files
from hf_embed.checkpoint.save import needs_runtime
from hf_embed.checkpoint.settings import read_settings
from hf_embed.checkpoint.verify import verify_loadable
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.forward.activations import Activations, ChunkEncoder
from hf_embed.forward.chunking import default_chunk_tokens, encode_in_chunks
from hf_embed.forward.packing import Packing, precision
from hf_embed.hub_access import find_model
from hf_embed.library_internals import CHECKPOINTING, layers_to_wrap
from hf_embed.objectives.base import Objective
from hf_embed.pooling import POOLINGS
from hf_embed.tempscale import apply_tempscale
from hf_embed.text_models import ends_with, with_end_of_text
from hf_embed.training.mlm import check_mask_token, split_masked_lm
from hf_embed.training.unused import freeze_unused

logger = logging.getLogger(__name__)

# Lower limit of a learned temperature. Below it, training steps are dominated by noise. (CLIP's limit is 0.01.)
MIN_TEMPERATURE = 0.001
TEMPERATURE = "learned temperature"  # what messages call it


class TrainingStep(nn.Module):
    """The module that is trained: an encoder, and optional heads and temperature.

    Args:
        encoder: the model that is trained and saved.
        train_head: maps pooled vectors (b, width) -> (b, width). It runs after the pooling, before the dense layers, and in
            training mode only.
        mlm_head: maps hidden states (M, width) of masked tokens to logits (M, vocabulary).
        temperature: the initial value of a learned temperature. None: the temperature is not learned.
    """

    encoder: Encoder
    train_head: nn.Module | None
    mlm_head: nn.Module | None
    log_temperature: nn.Parameter | None  # (1,)
    sharded = False  # whether FSDP or ZeRO shards the parameters, so that each layer is a collective; the trainer sets it

    def __init__(
        self,
        encoder: Encoder,
        train_head: nn.Module | None = None,
        mlm_head: nn.Module | None = None,
        temperature: float | None = None,
    ):
        super().__init__()
        self.log_temperature = None
        if temperature is not None:
            dtype = torch.promote_types(encoder.dtype, torch.float32)
            start = torch.tensor([math.log(temperature)], dtype=dtype, device=encoder.device)
            self.log_temperature = nn.Parameter(start)
        self.encoder = encoder
        self.train_head = train_head
        self.mlm_head = mlm_head

    def forward(
        self,
        input_ids: Tensor,
        lengths: list[int],
        chunk_tokens: int | None = None,
        gradient_caching: bool | Activations = False,
        mlm: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute everything that the loss needs from a flat batch.

        Args:
            input_ids: (S,) the tokens of all texts, one text after the other. This and the other arguments, except `mlm`, are
                as for `Encoder.forward`.
            lengths: the number of tokens of each text: N numbers that sum to S.
            chunk_tokens: the maximum number of tokens in a chunk, padding included.
            gradient_caching: recompute each chunk in the backward pass; with `Activations`, only some of the chunks.
            mlm: masked token ids and labels, both (S,), for the auxiliary masked-language-modeling loss.

        Returns:
            A dict with "embeddings" (N, D), not normalized. With `mlm` it also has "mlm", the summed cross-entropy of the
            masked tokens. With a learned temperature it also has "temperature", a scalar of at least `MIN_TEMPERATURE`.
        """
        outputs = self.encoder(input_ids, lengths, chunk_tokens, gradient_caching, self.sharded, embedder=self)
        if self.log_temperature is not None:
            # The gradient is not blocked at the limit, so a temperature below the limit can still rise again.
            below = (math.log(MIN_TEMPERATURE) - self.log_temperature.detach()).clamp(min=0)
            outputs["temperature"] = (self.log_temperature + below).exp().squeeze(0)
        if mlm is not None:
            chunk_tokens = chunk_tokens or default_chunk_tokens(input_ids.device)
            losses = encode_in_chunks(
                ChunkEncoder(partial(self.mlm_losses, *mlm), self, self.encoder.base, self.sharded),
                # The chunks get the places of their tokens instead of the ids: `mlm_losses` looks up masked ids and labels.
                torch.arange(len(input_ids), device=input_ids.device),
                lengths,
                pad_id=0,
                chunk_tokens=chunk_tokens,
                gradient_caching=bool(gradient_caching),
                equal_chunks=self.sharded,
            )
            outputs["mlm"] = losses.sum()
        return outputs

    def embed(self, input_ids: Tensor, mask: Tensor, packing: Packing | None = None) -> Tensor:
        """Embed a chunk as `Encoder.embed` does, but apply the training head in training mode."""
        pooled = self.encoder.pool(input_ids, mask, packing)
        if self.train_head is not None and self.training:
            pooled = self.train_head(pooled)
        return self.encoder.dense(pooled)

    def mlm_losses(self, masked_ids: Tensor, labels: Tensor, places: Tensor, mask: Tensor) -> Tensor:
        """Return the summed cross-entropy of the masked tokens, for each text of a chunk: (b, 1).

        Args:
            masked_ids: (S,) the tokens of the flat batch, some of them masked.
            labels: (S,) the original ids of the masked tokens, and -100 elsewhere.
            places: (b, T) the positions of the chunk's tokens in the flat batch.
            mask: (b, T) attention mask: 1 on tokens, 0 on padding.
        """
        assert self.mlm_head is not None
        ids = masked_ids[places].masked_fill(mask == 0, self.encoder.tokenizer.pad_token_id)
        with precision(self.encoder.base):
            states = self.encoder.backbone(input_ids=ids, attention_mask=mask)[0]
        labels = labels[places]
        # Only of masked tokens, because a vocabulary has many more words than a state has numbers. To find their places once,
        # the host waits for the GPU once. With a mask as index, it would wait for each use, also in the backward pass.
        chosen = ((labels != -100) & (mask == 1)).nonzero(as_tuple=True)
        losses = F.cross_entropy(self.mlm_head(states[chosen]), labels[chosen], reduction="none")
        return losses.new_zeros(labels.shape).index_put(chosen, losses).sum(1, keepdim=True)

    # Attributes that users, Trainer, accelerate and FSDP expect of a model. Some are left out on purpose, because these
    # libraries act differently if a model has them: `get_input_embeddings` (FSDP wraps them), `num_parameters` (total_flos).

    @property
    def config(self) -> PretrainedConfig:
        """The backbone's configuration."""
        return self.encoder.config

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.encoder.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the backbone's weights."""
        return self.encoder.dtype

    @property
    def save_pretrained(self) -> Callable[..., None]:
        """The method `save_pretrained` of the encoder, which leaves out the parts that exist only during training."""
        return self.encoder.save_pretrained

    @property
    def _no_split_modules(self) -> set[str] | list[str] | None:  # FSDP reads from this which layers to wrap
        return layers_to_wrap(self.encoder.base)

    def activation_checkpointing_enable(self, **kwargs: Any) -> None:
        """Turn on activation checkpointing, which recomputes each layer in the backward pass (--activation_checkpointing)."""
        try:
            getattr(self.encoder.backbone, f"{CHECKPOINTING}_enable")(**kwargs)
        except ValueError as error:
            raise InputError(f"{str(error).rstrip('.')}; use gradient_caching, which works for every model") from error

    gradient_checkpointing_enable = activation_checkpointing_enable  # its name before transformers 5.23


def make_step(
    model: PreTrainedModel | Encoder | TrainingStep | None,
    tokenizer: PreTrainedTokenizerBase | None,
    args: ContrastiveTrainingArguments,
    objective: Objective,
) -> TrainingStep:
    """Build the module to train: the encoder with the settings in `args`, and the heads that the objective needs.

    If `model` is an earlier `TrainingStep`, the heads that are still needed are kept. The temperature is reset to the initial
    value of the objective.

    Raises:
        InputError: if the model cannot be trained as asked, or could not be saved as a plain checkpoint.
    """
    train_head: nn.Module | None = None
    mlm_head: nn.Module | None = None
    if isinstance(model, TrainingStep):
        train_head, mlm_head = model.train_head, model.mlm_head
        model = model.encoder
    if objective.mlm_weight and mlm_head is None:
        model, mlm_head = split_masked_lm(model)
    encoder = make_encoder(model, tokenizer, args)
    if objective.mlm_weight:
        check_mask_token(encoder.tokenizer, "mlm_weight")
    if args.temp_scale is not None:
        apply_tempscale(encoder.backbone, args.temp_scale)
    needs_runtime(encoder, allowed=False)  # raises if TempScale could not be folded: better now than after the training
    verify_loadable(encoder)
    freeze_unused(encoder, args)
    objective.check_width(encoder.full_dimension)
    warn_of_settings_for_encode(encoder)
    warn_of_last_token(encoder)
    if not POOLINGS[encoder.pooling].training_head:
        train_head = None
    elif train_head is None:
        set_seed(args.seed)
        train_head = new_head(encoder.width, encoder.config).to(encoder.device, encoder.dtype)
    temperature = objective.temperature if objective.learn_temperature else None
    return TrainingStep(encoder, train_head, mlm_head if objective.mlm_weight else None, temperature)


def make_encoder(
    model: PreTrainedModel | Encoder | None, tokenizer: PreTrainedTokenizerBase | None, args: ContrastiveTrainingArguments
) -> Encoder:
    """Return the encoder to train, with the settings in `args`.

    Raises:
        InputError: if the model or the tokenizer is missing, if the adapters cannot be merged, if the weights are on several
            devices, or if the model does not support a setting.
    """
    if model is None:
        raise InputError("ContrastiveTrainer needs model=: a PreTrainedModel, an Encoder, or the name or folder of one")
    backbone = model.backbone if isinstance(model, Encoder) else model
    check_adapters(backbone)
    check_one_device(backbone)
    settings = {key: getattr(args, key) for key in ("pooling", "max_length", "normalize", "prompts")}
    given = {key: value for key, value in settings.items() if value is not None}
    if tokenizer is None and isinstance(model, Encoder):
        tokenizer = model.tokenizer
    if tokenizer is None:
        raise InputError("ContrastiveTrainer needs processing_class=, the model's tokenizer")
    if args.add_eos_token:
        tokenizer = with_end_of_text(tokenizer)
    if isinstance(model, Encoder):
        own = model.settings
        if "prompts" in given:  # these are only the query and document prompts, so keep the model's other prompts
            others = {key: text for key, text in model.prompts.items() if key not in ("query", "document")}
            given["prompts"] = others | given["prompts"]
        if tokenizer is not model.tokenizer or any(own[key] != value for key, value in given.items()):
            # The given object is trained, so it gets the new settings too: a script may encode and save with it later.
            vars(model).update(vars(Encoder(model.backbone, tokenizer, **(own | given))))
        encoder = model
    else:
        encoder = Encoder(model, tokenizer, **given)
        warn_of_settings_left_out(encoder, given)
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in encoder.backbone.parameters() if p.requires_grad):
        logger.warning(
            "the weights to train are in half precision, so every update would be rounded to it; load the model with "
            "dtype=torch.float32 and set bf16=True for speed"
        )
    return encoder


def warn_of_settings_left_out(encoder: Encoder, given: dict[str, Any]) -> None:
    """Warn if the model comes from an embedding model with settings that AutoModel does not load and that are not `given`."""
    name, stated = encoder.config.name_or_path, {}
    # The folder may be gone, the Hub out of reach, a setting unsupported here, or the weights not yet in memory (FSDP).
    with suppress(InputError, OSError, RuntimeError):
        hub: dict[str, Any] = find_model(name) if name else {}
        if name and Files(name, **hub).path("modules.json"):
            stated = read_settings(name, encoder.base, encoder.tokenizer, **hub)
    own = encoder.settings
    missed = [key for key in ("pooling", "normalize", "max_length", "prompts") if stated.get(key, own[key]) != own[key]]
    if lost := [key for key in missed if key not in given] + ["layers after the pooling"] * bool(stated.get("dense")):
        mend = f"give model='{name}' in place of the loaded model"
        if has_adapters(encoder.backbone):
            mend = f"give encoder = Encoder.from_pretrained('{name}') with the adapters around encoder.backbone"
        logger.warning(
            f"AutoModel does not load these settings of '{name}', so they are not used: {', '.join(lost)} (the pooling is now "
            f"{own['pooling']}); {mend}, or set them"
        )


def check_one_device(model: PreTrainedModel) -> None:
    """Raise InputError if `device_map` has put the weights on several devices, since Trainer would move them to one."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(devices) > 1:
        raise InputError(
            f"device_map has put the model's weights on several devices ({', '.join(sorted(devices))}), which is only for "
            "encoding; load the model without device_map to train it"
        )


def warn_of_last_token(encoder: Encoder) -> None:
    """Warn if the pooling takes the last token of a text, and the tokenizer puts no end-of-text token there."""
    if encoder.pooling == "last" and ends_with(encoder.tokenizer) is None and encoder.tokenizer.eos_token is not None:
        logger.warning(
            "pooling last takes the last token of a text, which is a token of its last word, because the tokenizer adds no "
            f"end-of-text token; set add_eos_token=True to end each text with {encoder.tokenizer.eos_token!r}"
        )


def warn_of_settings_for_encode(encoder: Encoder) -> None:
    """Warn about settings of the model that only `encode` uses and that training ignores."""
    if encoder.prompt():
        logger.warning(
            f"encode puts the model's default prompt '{encoder.default_prompt_name}' before texts, but training uses the "
            "prompts named query and document, if there are any"
        )
    if encoder.dimension < encoder.full_dimension:
        logger.warning(
            f"training uses all {encoder.full_dimension} dimensions, but encode returns only the first {encoder.dimension} "
            "(truncate_dim)"
        )


def new_head(width: int, config: PretrainedConfig) -> nn.Sequential:
    """Return SimCSE's MLP head, (b, width) -> (b, width): a newly initialized dense layer, followed by tanh."""
    dense = nn.Linear(width, width)
    reset_dense(dense, config)
    return nn.Sequential(dense, nn.Tanh())


def reset_dense(dense: nn.Linear, config: PretrainedConfig) -> None:
    """Initialize a dense layer in the same way as the layers of the model."""
    nn.init.normal_(dense.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(dense.bias)


def add_own_parameters(optimizer: torch.optim.Optimizer | None, scheduler: object, step: TrainingStep) -> None:
    """Add the parameters that the trainer created to the user's optimizer: the learned temperature and the training head.

    The temperature gets no weight decay.

    Raises:
        InputError: if the optimizer holds no parameter of this model, or if a scheduler was given that was built before these
            parameters existed.
    """
    if optimizer is None:
        return
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if held.isdisjoint(step.parameters()):
        raise InputError("optimizers: the optimizer has none of the model's parameters; create it for the model that you train")
    for what, parameters in own_parameters_missing_in(optimizer, step).items():
        if scheduler is not None:
            raise InputError(
                f"optimizers: the scheduler was created before the {what} and cannot set its learning rate; give only the "
                "optimizer, (optimizer, None), and set lr_scheduler_type"
            )
        optimizer.add_param_group({"params": parameters, **({"weight_decay": 0.0} if what == TEMPERATURE else {})})


def own_parameters_missing_in(optimizer: torch.optim.Optimizer, step: TrainingStep) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that the trainer created and that the optimizer does not hold, by their name in messages."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    created = {
        "training head": [] if step.train_head is None else list(step.train_head.parameters()),
        TEMPERATURE: [] if step.log_temperature is None else [step.log_temperature],
    }
    missing = {what: [each for each in parameters if each not in held] for what, parameters in created.items()}
    return {what: parameters for what, parameters in missing.items() if parameters}
