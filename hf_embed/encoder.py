"""Encoder: a backbone, a pooling and a tokenizer; texts in, vectors out.

Shapes: N texts, S tokens in all; a chunk has b texts of T tokens; D is the width of an embedding.
"""

import inspect
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.checkpoint.load import is_remote, load_encoder
from hf_embed.checkpoint.save import save_encoder
from hf_embed.chunking import encode_in_chunks
from hf_embed.errors import InputError
from hf_embed.evaluation.mteb import cosines, model_meta, texts_and_prompt
from hf_embed.pooling import MULTI_LAYER, Dense, check_pooling, pool

# Padded tokens a chunk may have. A GPU wants large chunks; a CPU is fastest when a chunk's activations stay in its cache.
DEFAULT_CHUNK_TOKENS = {"cpu": 2048, "default": 16384}
# Texts longer than this are cut unless the user asks for more: attention over them is what costs.
DEFAULT_MAX_LENGTH = 512
# A learned temperature stops here: below, a step of training is a step of noise (CLIP stops at 0.01).
MIN_TEMPERATURE = 0.001


class Encoder(nn.Module):
    """A text encoder with its pooling.

    Args:
        backbone: any `PreTrainedModel` (or a PEFT model around one) whose first output is the token states.
        tokenizer: its tokenizer.
        pooling: one of `hf_embed.pooling.POOLINGS`.
        max_length: tokens a text may have; default: what the model has positions for, at most 512.
        normalize: give unit vectors from `encode` (and from every loader of the saved folder).
        prompts: {"query": ..., "document": ...}: text put before queries and documents.
        dense: layers behind the pooling. `AutoModel` knows nothing of them: the card says how to load them.

    Raises:
        InputError: unknown pooling; a pooling the architecture cannot compute; `max_length` above the model's positions.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: str = "mean",
        max_length: int | None = None,
        normalize: bool = False,
        prompts: dict[str, str] | None = None,
        dense: Sequence[Dense] = (),
    ):
        super().__init__()
        check_pooling(pooling)
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.pooling = pooling
        self.max_length = check_max_length(max_length, backbone, tokenizer)
        self.normalize = normalize
        self.prompts = dict(prompts or {})
        self.config.use_cache = False
        if tokenizer.pad_token_id is None:
            if tokenizer.eos_token_id is None:
                raise InputError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
            tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any id does
        if pooling == "cls_mlp" and not hasattr(getattr(self.base, "pooler", None), "dense"):
            raise InputError(
                f"{type(self.base).__name__} has no pooler (dense + tanh) that could hold the MLP head; "
                "take pooling cls_mlp_train (head while training only) or cls"
            )
        self.dense = nn.Sequential(*dense)
        self.train_head = new_head(self.config) if pooling == "cls_mlp_train" else None
        self.takes_embeddings = "inputs_embeds" in inspect.signature(self.base.forward).parameters
        self.mlm_head: nn.Module | None = None  # set where masked language modelling is an auxiliary; see hf_embed.mlm
        self.log_temperature: nn.Parameter | None = None  # (1,), set where the objective learns its temperature

    @property
    def base(self) -> PreTrainedModel:
        """The backbone without PEFT's wrapping."""
        return self.backbone.get_base_model() if hasattr(self.backbone, "get_base_model") else self.backbone

    @property
    def config(self):
        return self.base.config

    @property
    def _no_split_modules(self) -> list[str]:  # FSDP asks which layers to wrap
        return self.base._no_split_modules

    def activation_checkpointing_enable(self, **kwargs) -> None:  # Trainer's --activation_checkpointing, layer by layer
        self.backbone.activation_checkpointing_enable(**kwargs)

    @property
    def remote_code(self) -> bool:
        """Whether code of the model's own is at work, which loaders run only with `trust_remote_code=True`."""
        return any(map(is_remote, (self.base, self.config, self.tokenizer)))

    @property
    def device(self) -> torch.device:
        return next(self.backbone.parameters()).device

    @property
    def dimension(self) -> int:
        return self.dense[-1].linear.out_features if self.dense else self.config.hidden_size

    def embed(self, input_ids: Tensor, mask: Tensor, inputs_embeds: Tensor | None = None) -> Tensor:
        """Embeddings (b, D) of padded token ids and their mask, both (b, T); or of the tokens' word embeddings."""
        everything = self.pooling in MULTI_LAYER
        tokens = {"input_ids": input_ids} if inputs_embeds is None else {"inputs_embeds": inputs_embeds}
        output = self.backbone(**tokens, attention_mask=mask, output_hidden_states=everything)
        states = output.hidden_states if everything else (output[0],)
        if self.pooling == "cls_mlp":
            return self.dense(output.pooler_output)
        embeddings = pool(self.pooling, states, mask)
        if self.train_head is not None and self.training:
            embeddings = self.train_head(embeddings)
        return self.dense(embeddings)

    def forward(
        self,
        input_ids: Tensor,
        lengths: list[int],
        chunk_tokens: int | None = None,
        gradient_caching: bool = False,
        mlm: tuple[Tensor, Tensor] | None = None,
        sharded: bool = False,
    ) -> dict[str, Tensor]:
        """{"embeddings": (N, D)}, not normalised, of a flat batch: `input_ids` (S,), `lengths` N numbers summing to S.

        With `mlm`, masked token ids and labels, both (S,), also "mlm", the summed cross-entropy of the masked tokens; with a
        learned temperature "temperature", a scalar. All come out of one forward, as DDP and FSDP need. `sharded`: layers are
        collectives (FSDP, ZeRO), so ranks make equally many chunks, and each reads the word table inside the model.
        """
        chunk_tokens = chunk_tokens or default_chunk_tokens(input_ids.device)
        pad_id = self.tokenizer.pad_token_id
        settings = {"chunk_tokens": chunk_tokens, "gradient_caching": gradient_caching, "equal_chunks": sharded}
        once = torch.is_grad_enabled() and self.takes_embeddings and not sharded
        words = self.base.get_input_embeddings() if once else None
        outputs = {"embeddings": encode_in_chunks(self.embed, input_ids, lengths, pad_id, embed_tokens=words, **settings)}
        if self.log_temperature is not None:
            below = (math.log(MIN_TEMPERATURE) - self.log_temperature.detach()).clamp(min=0)  # a floor that lets gradients by
            outputs["temperature"] = (self.log_temperature + below).exp().squeeze(0)
        if mlm is None:
            return outputs
        masked_ids, labels = mlm

        def losses(places: Tensor, mask: Tensor, _) -> Tensor:  # places in the flat batch, (b, T) -> (b, 1)
            ids = masked_ids[places].masked_fill(mask == 0, pad_id)
            logits = self.mlm_head(self.backbone(input_ids=ids, attention_mask=mask)[0])
            wanted = labels[places].masked_fill(mask == 0, -100)
            return F.cross_entropy(logits.transpose(1, 2), wanted, reduction="none").sum(1, keepdim=True)

        places = torch.arange(len(input_ids), device=input_ids.device)
        outputs["mlm"] = encode_in_chunks(losses, places, lengths, 0, **settings).sum()
        return outputs

    def learn_temperature(self, start: float) -> None:
        """Make the temperature of the loss a parameter of the model in training; it is not part of the exported checkpoint."""
        dtype = torch.promote_types(next(self.backbone.parameters()).dtype, torch.float32)
        self.log_temperature = nn.Parameter(torch.tensor([math.log(start)], dtype=dtype, device=self.device))

    def encode(
        self,
        texts: str | list[str],
        prompt_name: str | None = None,
        batch_size: int = 512,
        convert_to_tensor: bool = False,
        show_progress_bar: bool = False,
        chunk_tokens: int | None = None,
        prompt_type=None,
        **mteb,
    ):
        """Vectors of texts, as trained: (N, D) float32 NumPy array, or (D,) for a single string.

        Args:
            prompt_name: "query" or "document": put that prompt, if the model has one, before each text.
            batch_size: texts tokenized and sorted by length at a time; memory depends on `chunk_tokens`, not on this.
            convert_to_tensor: give a tensor on the model's device instead.
            prompt_type: with mteb's batches in place of texts, mteb's word for prompt_name; what else it says has no effect.
        """
        if isinstance(texts, DataLoader):
            texts, prompt_name = texts_and_prompt(texts, prompt_type)
        elif mteb:
            raise TypeError(f"encode() has no argument '{next(iter(mteb))}'")
        if isinstance(texts, str):
            return self.encode([texts], prompt_name, 1, convert_to_tensor, False, chunk_tokens)[0]
        if prompt_name not in (None, "query", "document", *self.prompts):
            raise InputError(f"unknown prompt_name '{prompt_name}'; there are query, document and the model's own")
        prompt = self.prompts.get(prompt_name, "")
        was_training = self.training
        self.eval()
        parts = []
        try:
            with torch.inference_mode():
                for start in tqdm(range(0, len(texts), batch_size), desc="Encoding", disable=not show_progress_bar):
                    part = [prompt + text for text in texts[start : start + batch_size]]
                    parts.append(embed_texts(self, self, part, chunk_tokens).float())
        finally:
            self.train(was_training)
        vectors = torch.cat(parts) if parts else torch.zeros(0, self.dimension)
        if self.normalize:
            vectors = F.normalize(vectors, dim=-1)
        return vectors if convert_to_tensor else vectors.cpu().numpy()

    def similarity(self, a, b) -> Tensor:
        """Cosines of all vectors of `a`, (N, D), with all of `b`, (M, D): (N, M)."""
        return cosines(torch.as_tensor(a), torch.as_tensor(b))

    def similarity_pairwise(self, a, b) -> Tensor:
        """Cosines of the vectors of `a` and `b`, both (N, D), row by row: (N,)."""
        return F.cosine_similarity(torch.as_tensor(a).float(), torch.as_tensor(b).float(), dim=-1)

    @property
    def mteb_model_meta(self):
        """What mteb wants to know of a model; see `hf_embed.evaluation.mteb`."""
        return model_meta(self)

    def save_pretrained(self, folder: str, verify: bool = True, allow_runtime: bool = False) -> None:
        """Write a plain checkpoint; see `hf_embed.checkpoint.save`."""
        save_encoder(self, folder, verify=verify, allow_runtime=allow_runtime)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        pooling: str | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        trust_remote_code: bool = False,
        **model_kwargs,
    ) -> "Encoder":
        """Load a folder or Hub model: ours, sentence-transformers', or any `AutoModel` (then mean pooling, unless told).

        Pooling, normalisation, max length and prompts come from the sentence-transformers files beside the weights;
        arguments given here override them. `trust_remote_code`: run the Python code that the model brings, where it has its own
        architecture. `model_kwargs` go to `AutoModel.from_pretrained`.
        """
        settings = {"pooling": pooling, "max_length": max_length, "normalize": normalize}
        return load_encoder(cls, name_or_path, trust_remote_code=trust_remote_code, **settings, **model_kwargs)


def embed_texts(model, encoder: Encoder, texts: list[str], chunk_tokens: int | None = None, **kwargs) -> Tensor:
    """Embeddings (N, D) of texts through `model`, which is the encoder or whatever wraps it (FSDP, autocast)."""
    rows = encoder.tokenizer(texts, truncation=True, max_length=encoder.max_length)["input_ids"]
    rows = [row or [encoder.tokenizer.pad_token_id] for row in rows]  # "" is no token at all to most decoders
    flat = torch.tensor([token for row in rows for token in row], device=encoder.device)
    return model(flat, [len(row) for row in rows], chunk_tokens=chunk_tokens, **kwargs)["embeddings"]


def default_chunk_tokens(device: torch.device) -> int:
    return DEFAULT_CHUNK_TOKENS.get(device.type, DEFAULT_CHUNK_TOKENS["default"])


def new_head(config) -> nn.Sequential:
    """SimCSE's MLP head, (D,) -> (D,): a dense layer started like the model's own, and tanh."""
    dense = nn.Linear(config.hidden_size, config.hidden_size)
    reset_dense(dense, config)
    return nn.Sequential(dense, nn.Tanh())


def reset_dense(dense: nn.Linear, config) -> None:
    nn.init.normal_(dense.weight, std=getattr(config, "initializer_range", 0.02))
    nn.init.zeros_(dense.bias)


def positions(backbone: PreTrainedModel) -> int | None:
    """How many tokens the model has positions for; None if it does not say (relative positions)."""
    for name, module in backbone.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa and MPNet number positions from padding_idx + 1.
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - reserved
    return getattr(backbone.config, "max_position_embeddings", None)


def check_max_length(max_length: int | None, backbone: PreTrainedModel, tokenizer) -> int:
    limit = positions(backbone)
    if max_length is None:
        return min(n for n in (limit, tokenizer.model_max_length, DEFAULT_MAX_LENGTH) if n)
    if limit is not None and max_length > limit:
        raise InputError(f"max_length {max_length} is above the {limit} positions of this model; set at most {limit}")
    if max_length < tokenizer.num_special_tokens_to_add() + 1:
        raise InputError(f"max_length {max_length} leaves no room for a token of text")
    return max_length
