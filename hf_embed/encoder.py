"""The `Encoder`: a backbone, a pooling and a tokenizer, which turn texts into vectors.

Shapes: N texts with S tokens in all; a chunk has b texts padded to T tokens; D is the width of an embedding, and `width` the
width of a hidden state.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.adapters import base_of
from hf_embed.encoding import (
    Options,
    Texts,
    Tokens,
    WithSettings,
    check_arguments,
    check_encode_options,
    check_max_length,
    check_prompt,
    check_sizes,
    embed_tokens,
    encode_by_length,
    evaluating,
    model_lock,
    on_cpu_by_default,
    on_devices,
    room_for_text,
    text_list,
    tokenize_texts,
)
from hf_embed.errors import InputError
from hf_embed.files.disk import disk_errors
from hf_embed.forward.activations import Activations, ChunkEncoder
from hf_embed.forward.check import check_kernel, measure
from hf_embed.forward.chunking import default_chunk_tokens, encode_in_chunks
from hf_embed.forward.packed_attention import CannotDrop, CannotPack
from hf_embed.forward.packing import Numbering, Packable, Packing, place_of, precision, ways_to_pack
from hf_embed.pooling import POOLINGS, Dense, states_to_pool
from hf_embed.tempscale.attention import applied_tempscale, apply_stated
from hf_embed.text_models import attend_fully, is_remote, text_encoder, with_padding, without_head
from hf_embed.vectors import SIMILARITIES, Compare, Vectors, as_floats, as_matrix, check_widths, precision_of, quantize

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

logger = logging.getLogger(__name__)


class Encoder(WithSettings):
    """A text encoder with its pooling.

    Args:
        backbone: any `PreTrainedModel` (or a PEFT model around one) whose first output is the hidden states of the tokens.
        tokenizer: the tokenizer of the backbone.
        pooling: one of `hf_embed.pooling.POOLINGS`.
        max_length: the largest number of tokens of a text. Default: the number of positions of the model, at most 512, and at
            most the tokenizer's `model_max_length`.
        normalize: return unit vectors from `encode`, and from every loader of the saved folder.
        prompts: {"query": ..., "document": ...}: texts that are put before queries and documents.
        dense: layers after the pooling. `AutoModel` does not load them; the model card says how to.
        truncate_dim: `encode` returns only this many leading numbers of each vector and does not normalize again after the cut.
            Training uses all numbers.
        similarity_fn_name: what `similarity` computes: cosine, dot, euclidean or manhattan (the last two are negated
            distances). Training and the evaluations of this package always compare by the cosine.
        default_prompt_name: the prompt that `encode` puts before texts if it is called without `prompt_name`.

    Raises:
        InputError: if the pooling, the similarity or the default prompt is unknown; if the architecture cannot compute the
            pooling; if `max_length` exceeds the model's positions; if `truncate_dim` is not a positive integer; or if the model
            fails the check of `hf_embed.forward.check`.
    """

    backbone: PreTrainedModel  # or a PEFT model around one
    dense: nn.Sequential
    packable: Packable | None  # how the texts of a chunk can share a row; None: they are padded

    def __init__(
        self,
        backbone: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pooling: str = "mean",
        max_length: int | None = None,
        normalize: bool = False,
        prompts: dict[str, str] | None = None,
        dense: Sequence[Dense] = (),
        truncate_dim: int | None = None,
        similarity_fn_name: str = "cosine",
        default_prompt_name: str | None = None,
    ):
        super().__init__()
        self.pooling = pooling
        self.normalize = normalize
        self.prompts = prompts or {}
        self.truncate_dim = truncate_dim
        self.similarity_fn_name = similarity_fn_name
        self.backbone = text_encoder(without_head(backbone))
        apply_stated(self.base)
        self.tokenizer = with_padding(tokenizer)
        self.default_prompt_name = default_prompt_name
        self.prompt()  # raises InputError if the default prompt does not exist
        self.config.use_cache, self.config.return_dict, self.config.output_attentions = False, True, False
        if POOLINGS[pooling].model_pooler and not hasattr(getattr(self.base, "pooler", None), "dense"):
            raise InputError(
                f"{type(self.base).__name__} has no pooler (dense + tanh) that could hold the MLP head; "
                "use pooling cls_mlp_train (with a head only in training) or cls"
            )
        self.dense = nn.Sequential(*dense)
        attend_fully(self.base)
        self.packable = None
        self.check_forward()
        self.max_length = check_max_length(max_length, self.positions, tokenizer)

    def check_forward(self) -> None:
        """Check that training and inference compute the same function, and measure it; see `hf_embed.forward.check`."""
        self.width, self.positions, self.packable = measure(self)
        self.checked = self._what_is_checked()

    def check_changed(self) -> None:
        """Check the forward pass again if something that it depends on has changed since the last check.

        Other threads wait for the end of the check before they encode.
        """
        with model_lock:
            if self.checked != self._what_is_checked():
                self.check_forward()

    def _what_is_checked(self) -> tuple[Any, ...]:
        """Return what the check depends on: attention, device, precision, TempScale, layers, pooling, size of the tokenizer."""
        layers = [type(module) for module in self.modules()]
        return *place_of(self.base), self.dtype, applied_tempscale(self.base), layers, self.pooling, len(self.tokenizer)

    @property
    def base(self) -> PreTrainedModel:
        """The backbone without the PEFT wrapper."""
        return base_of(self.backbone)

    @property
    def config(self) -> PretrainedConfig:
        """The configuration of the backbone."""
        return self.base.config

    @property
    def remote_code(self) -> bool:
        """Whether the model brings its own Python code, which loaders run only with `trust_remote_code=True`."""
        return is_remote(self.base) or is_remote(self.config) or is_remote(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """The device of the weights (of the first parameter)."""
        return next(self.backbone.parameters()).device

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, except backbone and tokenizer, that create an equal encoder."""
        names = ["pooling", "max_length", "normalize", "prompts", "truncate_dim", "similarity_fn_name", "default_prompt_name"]
        return {name: getattr(self, name) for name in names} | {"dense": list(self.dense)}

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the backbone's weights (of the first floating-point parameter)."""
        return next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())

    def prompt(self, name: str | None = None) -> str:
        """Return the text to put before texts: the prompt of this name, else the default prompt; "" if there is none.

        Raises:
            InputError: if the name is neither query nor document, and the model has no prompt of this name.
        """
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in ("query", "document", *self.prompts):
            raise InputError(f"unknown prompt_name '{name}'; use query, document or a prompt of the model")
        return self.prompts.get(name, "")

    @property
    def dimension(self) -> int:
        """The width of a vector from `encode`."""
        return min(self.full_dimension, self.truncate_dim or self.full_dimension)

    @property
    def full_dimension(self) -> int:
        """D, the width of an embedding in training: that of a hidden state, unless a dense layer changes it."""
        last = self.dense[-1] if len(self.dense) else None
        return last.linear.out_features if isinstance(last, Dense) else self.width

    def pool(self, input_ids: Tensor, mask: Tensor, packing: Packing | None = None, **further: Tensor) -> Tensor:
        """Pool the hidden states of a chunk.

        Args:
            input_ids: (b, T) padded token ids; (1, S) with a packing.
            mask: (b, T) 1 on tokens and 0 on padding.
            packing: where the texts lie if the chunk is one row without padding.
            further: other outputs of the tokenizer, by name.

        Returns:
            (b, width)

        Raises:
            InputError: if the first output of the model is not one hidden state per token.
        """
        entry = POOLINGS[self.pooling]
        everything = entry.layers is not None
        layout = {"attention_mask": mask} if packing is None else packing.arguments()
        with precision(self.base):
            output = self.backbone(input_ids=input_ids, output_hidden_states=everything, **layout, **further)
        if entry.model_pooler and packing is None:
            return output.pooler_output
        states = states_to_pool(self.pooling, output.hidden_states if everything else (output[0],))
        if states.shape[:2] != input_ids.shape:
            raise InputError(
                f"{type(self.base).__name__}: its first output has the shape {tuple(states.shape)} for "
                f"{tuple(input_ids.shape)} token ids, so there are no hidden states of tokens to pool; use a text encoder"
            )
        if packing is None:
            return entry.function(states, mask)
        groups = packing.unpack(states, mask)
        if entry.model_pooler:
            return torch.cat([cast(nn.Module, self.base.pooler)(unpacked) for unpacked, _ in groups])
        return torch.cat([entry.function(unpacked, masks) for unpacked, masks in groups])

    def embed(self, input_ids: Tensor, mask: Tensor, packing: Packing | None = None, **further: Tensor) -> Tensor:
        """Return embeddings (b, D): pool the hidden states and apply the layers after the pooling. Arguments as for `pool`."""
        return self.dense(self.pool(input_ids, mask, packing, **further))

    def forward(
        self,
        input_ids: Tensor,
        lengths: list[int],
        chunk_tokens: int | None = None,
        gradient_caching: bool | Activations = False,
        sharded: bool = False,
        embedder: nn.Module | None = None,
        packed: bool | None = None,
    ) -> dict[str, Tensor]:
        """Embed a flat batch, chunk by chunk.

        Args:
            input_ids: (S,) the tokens of all texts, one text after the other.
            lengths: the number of tokens of each text: N numbers that sum to S.
            chunk_tokens: largest number of padded tokens in a chunk; see `hf_embed.forward.chunking`.
            gradient_caching: recompute each chunk in the backward pass; see `hf_embed.forward.activations`.
            sharded: the parameters are sharded (FSDP, ZeRO), so each layer is a collective. All ranks then make equally many
                chunks, and the gradient of the word table is not shared by the chunks.
            embedder: the module whose `embed` embeds each chunk. Default: this encoder. A `TrainingStep` passes itself, because
                it may have a head between the pooling and the embedding.
            packed: True: pack the chunks if the model can be packed; False: pad them; None: pack them unless this fails.

        Returns:
            {"embeddings": (N, D)}, not normalized.
        """
        embedder = embedder or self
        encode = partial(
            encode_in_chunks,
            ChunkEncoder(cast(Callable[..., Tensor], embedder.embed), embedder, self.base, sharded),
            input_ids,
            lengths,
            self.tokenizer.pad_token_id,
            chunk_tokens or default_chunk_tokens(input_ids.device, kept=torch.is_grad_enabled() and not gradient_caching),
            gradient_caching=gradient_caching,
            equal_chunks=sharded,
        )
        try:
            return {"embeddings": encode(numbering=None if packed is False else self.numbering)}
        except CannotPack as error:  # the check packs short rows, and a model may build a mask only for long ones
            if packed:
                raise
            if not isinstance(error, CannotDrop):
                logger.warning(f"{type(self.base).__name__}: {error} is not possible; from now on, texts are padded")
                self.packable = None
            return {"embeddings": encode()}

    @property
    def numbering(self) -> Numbering | None:
        """The positions in a packed row; None if the model is not packed with its present attention, or on its device."""
        if self.packable is None or self.packable not in ways_to_pack(self.base):
            return None
        return self.packable.numbering

    @overload
    def encode(
        self, texts: Texts, prompt_name: str | None = ..., *, convert_to_tensor: Literal[True], **others: Unpack[Options]
    ) -> Tensor: ...
    @overload
    def encode(
        self, texts: Texts, prompt_name: str | None = ..., *, convert_to_tensor: Literal[False] = ..., **others: Unpack[Options]
    ) -> np.ndarray: ...
    def encode(
        self,
        texts: Texts,
        prompt_name: str | None = None,
        batch_size: int = 512,
        convert_to_tensor: bool = False,
        show_progress_bar: bool | None = False,
        chunk_tokens: int | None = None,
        prompt_type: Any = None,
        *,
        prompt: str | None = None,
        truncate_dim: int | None = None,
        normalize: bool | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        precision: str = "float32",
        **others: Any,
    ) -> np.ndarray | Tensor:
        """Encode texts in the same way as in training.

        Args:
            texts: one text, or N texts, or the batches that mteb passes.
            prompt_name: "query", "document" or another name in `prompts`: the prompt of this name is put before each text, if
                the model has it. Default: the model's default prompt, if it has one.
            batch_size: texts that are tokenized at a time. Memory depends on `chunk_tokens`, not on this number.
            convert_to_tensor: return a tensor on the model's device instead of an array.
            show_progress_bar: show a progress bar that counts texts.
            chunk_tokens: padded tokens that go through the model at once. Default: 2048 on a CPU, 16384 on other devices.
            prompt_type: mteb's name for `prompt_name`; used only if `texts` are mteb's batches.
            prompt: a text to put before each text instead of one of the model's prompts.
            truncate_dim: return only this many leading numbers of a vector; default: the model's own `truncate_dim`.
            normalize: True returns unit vectors, also after truncation. False returns the pooled vectors. Default: as the model
                was saved, normalized or not, and then truncated.
            device: where to compute. A single device: the model moves there and stays there. A list of devices: they share the
                texts, and each device except the model's own holds a copy of the model during this call.
            precision: one of `hf_embed.vectors.PRECISIONS`: float32, int8, or the packed signs binary and ubinary.
            others: convert_to_numpy and output_value, with the default values of sentence-transformers; with mteb's batches,
                the further arguments of mteb, of which only task_metadata is read.

        Returns:
            (N, D) in float32, or (D,) for a single text; int8 with precision int8; (N, D / 8) packed signs, in int8 (binary) or
            uint8 (ubinary).

        Raises:
            InputError: if a prompt is unknown, an entry is not a text or a text has no token; if the model's vectors have fewer
                than `truncate_dim` numbers; if vectors of this precision could not be compared by the model's similarity; if a
                device does not exist on this machine.
            TypeError: if an argument is unknown.
        """
        if isinstance(texts, DataLoader):
            from hf_embed.evaluation.mteb import texts_and_prompt

            texts, prompt_name = texts_and_prompt(texts, prompt_type, self.prompts, others.get("task_metadata"))
        else:
            check_arguments(others, convert_to_tensor)
        check_sizes(batch_size, chunk_tokens)
        check_encode_options(self, truncate_dim, normalize, precision)
        before = self.prompt(prompt_name) if prompt is None else prompt
        check_prompt(before)
        if before:
            room_for_text(self.tokenizer, [before], self.max_length)  # raises InputError if there is none
        listed = text_list(texts)

        def tokenize(part: list[str], numbers: Sequence[int]) -> Tokens:
            return tokenize_texts(self, [before + text for text in part] if before else part, numbers)

        def embed(encoder: Encoder, tokens: Tokens) -> Tensor:
            embeddings = embed_tokens(encoder, encoder, tokens, chunk_tokens)
            return quantize(self.finish(embeddings.float(), truncate_dim, normalize), precision)

        with evaluating(self), on_cpu_by_default():
            encoders = on_devices(self, device)
            for encoder in encoders:
                check_kernel(encoder.backbone, encoder.device)
                encoder.check_changed()
            if listed:
                kept_on = self.device if convert_to_tensor else torch.device("cpu")
                vectors = encode_by_length(encoders, tokenize, embed, listed, batch_size, kept_on, bool(show_progress_bar))
            else:
                none = torch.zeros(0, self.full_dimension, dtype=torch.float32, device=self.device)
                vectors = quantize(self.finish(none, truncate_dim, normalize), precision)
        result = vectors if convert_to_tensor else vectors.cpu().numpy()
        return result[0] if isinstance(texts, str) else result

    @overload
    def encode_query(
        self, texts: Texts, prompt_name: str | None = ..., *, convert_to_tensor: Literal[True], **others: Unpack[Options]
    ) -> Tensor: ...
    @overload
    def encode_query(
        self, texts: Texts, prompt_name: str | None = ..., *, convert_to_tensor: Literal[False] = ..., **others: Unpack[Options]
    ) -> np.ndarray: ...
    def encode_query(self, texts: Texts, prompt_name: str | None = None, **options: Any) -> np.ndarray | Tensor:
        """Encode queries as `encode` does `texts`. `prompt_name` is "query" by default, if the model has such a prompt."""
        return self.encode(texts, prompt_name or "query", **options)

    @overload
    def encode_document(
        self, texts: Texts, prompt_name: str | None = ..., *, convert_to_tensor: Literal[True], **others: Unpack[Options]
    ) -> Tensor: ...
    @overload
    def encode_document(
        self, texts: Texts, prompt_name: str | None = ..., *, convert_to_tensor: Literal[False] = ..., **others: Unpack[Options]
    ) -> np.ndarray: ...
    def encode_document(self, texts: Texts, prompt_name: str | None = None, **options: Any) -> np.ndarray | Tensor:
        """Encode documents as `encode` does `texts`. `prompt_name` is "document" by default, if the model has such a prompt."""
        return self.encode(texts, prompt_name or "document", **options)

    def finish(self, embeddings: Tensor, truncate_dim: int | None = None, normalize: bool | None = None) -> Tensor:
        """Turn embeddings (N, D) into the vectors of `encode`: normalize them if the model does, and truncate them.

        `truncate_dim` and `normalize` are arguments of `encode`; they replace the model's own settings.
        """
        as_saved = self.normalize if normalize is None else False  # normalize=True normalizes only once, after the cut
        vectors = F.normalize(embeddings, dim=-1) if as_saved else embeddings
        vectors = vectors[:, : truncate_dim or self.truncate_dim]
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def similarity(self, a: Vectors, b: Vectors, precision: str | None = None) -> Tensor:
        """Compare all vectors of `a`, (N, D), with all vectors of `b`, (M, D), by `similarity_fn_name`: (N, M).

        Vectors of any other precision than float32 are compared by the cosine, also with float32 vectors. Packed signs count as
        numbers of 1 and -1, whose cosine is 1 - 2 * Hamming distance / D. The precision is inferred from the data type and the
        width. For int8 vectors that were encoded with their own `truncate_dim` it may have to be given.

        Args:
            a: vectors from `encode`.
            b: vectors from `encode`.
            precision: int8 or binary, the precision of int8 vectors.

        Raises:
            InputError: if the widths differ, or int8 vectors may be packed or not.
        """
        first, second, compare = self.comparable(a, b, precision)
        return compare(first, second)

    def similarity_pairwise(self, a: Vectors, b: Vectors, precision: str | None = None) -> Tensor:
        """Compare the vectors of `a` and `b`, both (N, D), row by row: (N,). `precision` and the rest as for `similarity`."""
        first, second, compare = self.comparable(a, b, precision)
        if len(first) != len(second) and 1 not in (len(first), len(second)):
            raise InputError(f"{len(first)} vectors cannot be compared with {len(second)} row by row; use similarity")
        return compare(first.unsqueeze(1), second.unsqueeze(1))[:, 0, 0]

    def comparable(self, a: Vectors, b: Vectors, precision: str | None) -> tuple[Tensor, Tensor, Compare]:
        """Return both arguments as float32 vectors on the device of `a`, and the function that compares them."""
        both, name = [], self.similarity_fn_name
        for vectors in map(as_matrix, (a, b)):
            kind = precision_of(vectors, self.dimension, self.full_dimension, precision)
            name = name if kind == "float32" else "cosine"
            both.append(as_floats(vectors, kind))
        check_widths(*both)
        return both[0], both[1].to(both[0].device), SIMILARITIES[name]

    @property
    def mteb_model_meta(self) -> "ModelMeta":
        """The description of the model that mteb asks for; see `hf_embed.evaluation.mteb`."""
        from hf_embed.evaluation.mteb import model_meta

        return model_meta(self)

    def save_pretrained(self, folder: str | Path, verify: bool = True, allow_runtime: bool = False) -> None:
        """Write an ordinary checkpoint to `folder`; see `hf_embed.checkpoint.save`.

        `verify` compares the vectors of other loaders. `allow_runtime` accepts a TempScale that cannot be folded.

        Raises:
            ExportError, InputError: if other loaders would compute other vectors, or none; or if the folder is a file.
            DiskError: if the disk is full or a file may not be written. The previous content of the folder is then unchanged.
        """
        from hf_embed.checkpoint.save import save_encoder

        with disk_errors(folder):
            save_encoder(self, str(folder), verify=verify, allow_runtime=allow_runtime)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        pooling: str | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        trust_remote_code: bool = False,
        **model_kwargs: Any,
    ) -> "Encoder":
        """Load a folder or Hub model: one of this package, one of sentence-transformers, any `AutoModel`, or an adapter of one.

        All settings come from the sentence-transformers files beside the weights. Without such files the pooling is mean (last
        for a causal language model), and texts are truncated to at most 512 tokens.

        Args:
            name_or_path: a folder, or OWNER/NAME on the Hub.
            pooling: replaces the pooling of the folder.
            max_length: replaces the maximum length of the folder.
            normalize: replaces the setting of the folder.
            trust_remote_code: run the Python code that a model with its own architecture brings.
            model_kwargs: arguments for `AutoModel.from_pretrained`.

        Raises:
            InputError: if the model cannot be loaded, or if sentence-transformers would compute other vectors from its files.
        """
        from hf_embed.checkpoint.load import load_encoder

        return load_encoder(cls, name_or_path, pooling, max_length, normalize, trust_remote_code, **model_kwargs)
