"""Encoder: a backbone, a pooling and a tokenizer; texts in, vectors out.

Shapes: N texts, S tokens in all; a chunk has b texts of T tokens; D is the width of an embedding.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.chunking import encode_in_chunks
from hf_embed.data.tokenization import beginning
from hf_embed.disk import disk_errors
from hf_embed.encoding import check_arguments, check_output, check_sizes, encode_by_length, evaluating, on_devices, text_list
from hf_embed.errors import InputError
from hf_embed.forward_check import measure, word_table
from hf_embed.pooling import POOLINGS, Dense, check_pooling, pool
from hf_embed.tempscale.attention import base_of
from hf_embed.text_models import attend_fully, check_max_length, is_remote, text_encoder, with_padding, without_head
from hf_embed.vectors import SIMILARITIES, Compare, Vectors, as_floats, as_matrix, check_widths, precision_of, quantize

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

# Padded tokens a chunk may have. A GPU wants large chunks; a CPU is fastest when a chunk's activations stay in its cache.
DEFAULT_CHUNK_TOKENS = {"cpu": 2048, "default": 16384}
# The same without a backward pass, where a CPU has smaller things to keep.
ENCODE_CHUNK_TOKENS = {"cpu": 1024, "default": 16384}


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
        truncate_dim: `encode` gives the first so many numbers of a vector, not normalised again; training uses all.
        similarity_fn_name: what `similarity` computes: cosine, dot, euclidean or manhattan (the last two negated distances).
            Training and the evaluations of this package compare by the cosine, whatever it is.
        default_prompt_name: the prompt that `encode` puts before texts when it is given no `prompt_name`.

    Raises:
        InputError: unknown pooling, similarity or default prompt; a pooling the architecture cannot compute; `max_length` above
            the model's positions; a `truncate_dim` that is no positive integer.
    """

    backbone: PreTrainedModel  # or a PEFT model around one
    dense: nn.Sequential

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
        check_pooling(pooling)
        if similarity_fn_name not in SIMILARITIES:
            raise InputError(f"unknown similarity_fn_name {similarity_fn_name!r}; take one of {', '.join(SIMILARITIES)}")
        if truncate_dim is not None and not (isinstance(truncate_dim, int) and truncate_dim > 0):
            raise InputError(f"truncate_dim is {truncate_dim!r}; give the number of dimensions to keep, or None")
        self.backbone = text_encoder(without_head(backbone))
        self.tokenizer = with_padding(tokenizer)
        self.pooling = pooling
        self.normalize = normalize
        self.prompts = dict(prompts or {})
        self.truncate_dim = truncate_dim
        self.similarity_fn_name = similarity_fn_name
        self.default_prompt_name = default_prompt_name
        self.prompt()  # is the default one there?
        self.config.use_cache = False
        if POOLINGS[pooling].model_pooler and not hasattr(getattr(self.base, "pooler", None), "dense"):
            raise InputError(
                f"{type(self.base).__name__} has no pooler (dense + tanh) that could hold the MLP head; "
                "take pooling cls_mlp_train (head while training only) or cls"
            )
        self.dense = nn.Sequential(*dense)
        attend_fully(self.base)
        self.check_forward()
        self.max_length = check_max_length(max_length, self.positions, tokenizer)

    def check_forward(self) -> None:
        """Check that training and inference compute one function, and measure its width; see `hf_embed.forward_check`."""
        measured = measure(self)
        self.width, self.positions = measured.width, measured.positions

    @property
    def base(self) -> PreTrainedModel:
        """The backbone without PEFT's wrapping."""
        return base_of(self.backbone)

    @property
    def config(self) -> PretrainedConfig:
        """The backbone's configuration."""
        return self.base.config

    @property
    def remote_code(self) -> bool:
        """Whether code of the model's own is at work, which loaders run only with `trust_remote_code=True`."""
        return is_remote(self.base) or is_remote(self.config) or is_remote(self.tokenizer)

    @property
    def device(self) -> torch.device:
        """Where the weights are (the first of them)."""
        return next(self.backbone.parameters()).device

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments, beside backbone and tokenizer, that make such an encoder."""
        names = ["pooling", "max_length", "normalize", "prompts", "truncate_dim", "similarity_fn_name", "default_prompt_name"]
        return {name: getattr(self, name) for name in names} | {"dense": list(self.dense)}

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the backbone's weights (the first of them in floating point)."""
        return next(p.dtype for p in self.backbone.parameters() if p.is_floating_point())

    def prompt(self, name: str | None = None) -> str:
        """Return the text that goes before texts: the prompt of that name, or the default one; "" if there is neither.

        Raises:
            InputError: a name, other than query and document, of which the model has no prompt.
        """
        name = self.default_prompt_name if name is None else name
        if name is None:
            return ""
        if name not in ("query", "document", *self.prompts):
            raise InputError(f"unknown prompt_name '{name}'; there are query, document and the model's own")
        return self.prompts.get(name, "")

    @property
    def dimension(self) -> int:
        """The length of a vector from `encode`."""
        return min(self.full_dimension, self.truncate_dim or self.full_dimension)

    @property
    def full_dimension(self) -> int:
        """D, the length of an embedding in training."""
        last = self.dense[-1] if len(self.dense) else None
        return last.linear.out_features if isinstance(last, Dense) else self.width

    def pool(self, input_ids: Tensor, mask: Tensor, words: Tensor | None = None, **further: Tensor) -> Tensor:
        """Pool the token states of a chunk.

        Args:
            input_ids: (b, T) padded token ids.
            mask: (b, T) 1 on tokens and 0 on padding.
            words: (b, T, width) these tokens' rows of the word table, if they have been read already.
            further: what else the tokenizer returns, by name.

        Returns:
            (b, width)

        Raises:
            InputError: the model's first output is not the states of these tokens.
        """
        entry = POOLINGS[self.pooling]
        everything = entry.layers is not None
        with serve_words(self.word_table, input_ids, words):
            output = self.backbone(input_ids=input_ids, attention_mask=mask, output_hidden_states=everything, **further)
        if entry.model_pooler:
            return output.pooler_output
        states = output.hidden_states if everything else (output[0],)
        if states[-1].shape[:2] != input_ids.shape:
            raise InputError(
                f"{type(self.base).__name__}: its first output has the shape {tuple(states[-1].shape)} for "
                f"{tuple(input_ids.shape)} token ids, so there are no token states to pool; take a text encoder"
            )
        return pool(self.pooling, states, mask)

    def embed(self, input_ids: Tensor, mask: Tensor, words: Tensor | None = None, **further: Tensor) -> Tensor:
        """Return embeddings (b, D), the pooled states after the layers behind the pooling; arguments as for `pool`."""
        return self.dense(self.pool(input_ids, mask, words, **further))

    def forward(
        self,
        input_ids: Tensor,
        lengths: list[int],
        chunk_tokens: int | None = None,
        gradient_caching: bool = False,
        sharded: bool = False,
        embed: Callable[..., Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Embed a flat batch, chunk by chunk.

        Args:
            input_ids: (S,) the tokens of all texts, one text behind the other.
            lengths: the tokens of each text, N numbers that sum to S.
            chunk_tokens: padded tokens of a chunk; see `hf_embed.chunking`.
            gradient_caching: compute a chunk again in the backward pass instead of keeping its activations.
            sharded: each layer is a collective (FSDP, ZeRO), so that ranks make equally many chunks, and each chunk reads the
                word table inside the model.
            embed: what embeds a chunk; default: `self.embed`. Training has a head there.

        Returns:
            {"embeddings": (N, D)}, not normalised.
        """
        words = self.word_table if torch.is_grad_enabled() and not sharded else None
        embeddings = encode_in_chunks(
            embed or self.embed,
            input_ids,
            lengths,
            self.tokenizer.pad_token_id,
            chunk_tokens or default_chunk_tokens(input_ids.device),
            gradient_caching=gradient_caching,
            equal_chunks=sharded,
            embed_tokens=words,
        )
        return {"embeddings": embeddings}

    @property
    def word_table(self) -> nn.Embedding | None:
        """The model's table of token embeddings, if it is an ordinary one."""
        return word_table(self.base)

    def encode(
        self,
        texts: str | Sequence[str] | DataLoader,
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
        """Encode texts, as trained.

        Args:
            texts: one text, or N of them; mteb gives its batches.
            prompt_name: "query", "document" or another name in `prompts`: put that prompt, if the model has it, before each
                text. Without a name it is the default prompt, if the model has one.
            batch_size: texts tokenized at a time; memory depends on `chunk_tokens`, not on this.
            convert_to_tensor: give a tensor on the model's device instead of an array.
            show_progress_bar: of the texts, on the console.
            chunk_tokens: padded tokens that go through the model at once. Default: 1024 on a CPU, 16384 elsewhere.
            prompt_type: with mteb's batches in place of texts, mteb's word for prompt_name.
            prompt: a text to put before each text, in place of a prompt of the model.
            truncate_dim: give the first so many numbers of a vector; default: the model's own `truncate_dim`.
            normalize: True gives unit vectors, also where they are truncated; False leaves them as they are pooled. Default: as
                the model was saved, normalised or not, and truncated after that.
            device: where to compute. The model is moved to a single device, and stays there; a list of devices shares the
                texts, and each but the model's own has a copy of the model for this call.
            precision: one of `hf_embed.vectors.PRECISIONS`: float32, int8, or the packed signs binary and ubinary.
            others: convert_to_numpy and output_value, as sentence-transformers has them by default; with mteb's batches what
                else mteb says of them, which has no effect.

        Returns:
            (N, D) in float32, or (D,) for a single text; int8 with precision int8; (N, D / 8) of packed signs, in int8
            (binary) or uint8 (ubinary).

        Raises:
            InputError: an unknown prompt, an entry that is no text, or a text without a token; a `truncate_dim` that the model
                does not have; a precision whose vectors could not be compared as the model's are; a device that is not here.
            TypeError: an unknown argument.
        """
        if isinstance(texts, DataLoader):
            from hf_embed.evaluation.mteb import texts_and_prompt

            texts, prompt_name = texts_and_prompt(texts, prompt_type, self.prompts, others.get("task_metadata"))
        else:
            check_arguments(others, convert_to_tensor)
        check_sizes(batch_size, chunk_tokens)
        check_output(self, truncate_dim, normalize, precision)
        before = self.prompt(prompt_name) if prompt is None else prompt
        listed = text_list(texts)

        def embed(encoder: Encoder, part: list[str], numbers: Sequence[int]) -> Tensor:
            part = [before + text for text in part] if before else part
            tokens = chunk_tokens or ENCODE_CHUNK_TOKENS.get(encoder.device.type, ENCODE_CHUNK_TOKENS["default"])
            embeddings = embed_texts(encoder, encoder, part, tokens, numbers=numbers)
            return quantize(self.finish(embeddings.float(), truncate_dim, normalize), precision)

        with evaluating(self):
            encoders = on_devices(self, device)
            if listed:
                kept_on = self.device if convert_to_tensor else torch.device("cpu")
                vectors = encode_by_length(encoders, embed, listed, batch_size, kept_on, bool(show_progress_bar))
            else:
                none = torch.zeros(0, self.full_dimension, device=self.device)
                vectors = quantize(self.finish(none, truncate_dim, normalize), precision)
        result = vectors if convert_to_tensor else vectors.cpu().numpy()
        return result[0] if isinstance(texts, str) else result

    def encode_query(self, texts: str | Sequence[str], prompt_name: str | None = None, **options: Any) -> np.ndarray | Tensor:
        """Encode queries: `encode`, whose arguments these are, with the prompt "query", if the model has one."""
        return self.encode(texts, prompt_name or "query", **options)

    def encode_document(
        self, texts: str | Sequence[str], prompt_name: str | None = None, **options: Any
    ) -> np.ndarray | Tensor:
        """Encode documents: `encode`, whose arguments these are, with the prompt "document", if the model has one."""
        return self.encode(texts, prompt_name or "document", **options)

    def finish(self, embeddings: Tensor, truncate_dim: int | None = None, normalize: bool | None = None) -> Tensor:
        """Turn embeddings (N, D) into what `encode` gives: unit vectors where the model normalises, cut to `truncate_dim`.

        The arguments are those of `encode`, in place of the model's own settings.
        """
        as_saved = self.normalize if normalize is None else False  # True normalises once, after the cut
        vectors = F.normalize(embeddings, dim=-1) if as_saved else embeddings
        vectors = vectors[:, : truncate_dim or self.truncate_dim]
        return F.normalize(vectors, dim=-1) if normalize else vectors

    def similarity(self, a: Vectors, b: Vectors, precision: str | None = None) -> Tensor:
        """Compare all vectors of `a`, (N, D), with all of `b`, (M, D), by `similarity_fn_name`: (N, M).

        Vectors of another precision than float32 are compared by the cosine, also with those in float32; packed signs as
        numbers of 1 and -1, whose cosine is 1 - 2 * Hamming distance / D. They are known by their type and their width; int8
        vectors of a `truncate_dim` of the call may need a word.

        Args:
            a: what `encode` gave.
            b: the same.
            precision: int8 or binary, of int8 vectors.

        Raises:
            InputError: different widths, or int8 vectors that may be packed or not.
        """
        first, second, compare = self.comparable(a, b, precision)
        return compare(first, second)

    def similarity_pairwise(self, a: Vectors, b: Vectors, precision: str | None = None) -> Tensor:
        """Compare the vectors of `a` and `b`, both (N, D), row by row: (N,); the rest is as in `similarity`."""
        first, second, compare = self.comparable(a, b, precision)
        return compare(first.unsqueeze(1), second.unsqueeze(1))[:, 0, 0]

    def comparable(self, a: Vectors, b: Vectors, precision: str | None) -> tuple[Tensor, Tensor, Compare]:
        """Return vectors in float32, and what compares them."""
        both, name = [], self.similarity_fn_name
        for vectors in map(as_matrix, (a, b)):
            kind = precision_of(vectors, self.dimension, self.full_dimension, precision)
            name = name if kind == "float32" else "cosine"
            both.append(as_floats(vectors, kind))
        check_widths(*both)
        return both[0], both[1], SIMILARITIES[name]

    @property
    def mteb_model_meta(self) -> "ModelMeta":
        """What mteb wants to know of a model; see `hf_embed.evaluation.mteb`."""
        from hf_embed.evaluation.mteb import model_meta

        return model_meta(self)

    def save_pretrained(self, folder: str, verify: bool = True, allow_runtime: bool = False) -> None:
        """Write a plain checkpoint; see `hf_embed.checkpoint.save`.

        Raises:
            ExportError: other loaders would give other vectors.
            DiskError: the disk is full, or something may not be written. What was in the folder is whole.
        """
        from hf_embed.checkpoint.save import save_encoder

        with disk_errors(folder):
            save_encoder(self, folder, verify=verify, allow_runtime=allow_runtime)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        pooling: str | None = None,
        max_length: int | None = None,
        normalize: bool | None = None,
        trust_remote_code: bool = False,
        **model_kwargs: Any,
    ) -> "Encoder":
        """Load a folder or Hub model: one of this package, sentence-transformers' or any `AutoModel`.

        All settings come from the sentence-transformers files beside the weights. Without such files pooling is mean (last for
        a causal language model), and texts are cut after 512 tokens at most.

        Args:
            name_or_path: a folder, or OWNER/NAME on the Hub.
            pooling: in place of the folder's own.
            max_length: the same.
            normalize: the same.
            trust_remote_code: run the Python code that the model brings, where it has its own architecture.
            model_kwargs: for `AutoModel.from_pretrained`.

        Raises:
            InputError: the model cannot be loaded, or its files say what would give other vectors here than in
                sentence-transformers.
        """
        from hf_embed.checkpoint.load import load_encoder

        return load_encoder(cls, name_or_path, pooling, max_length, normalize, trust_remote_code, **model_kwargs)


def embed_texts(
    model: nn.Module,
    encoder: Encoder,
    texts: list[str],
    chunk_tokens: int | None = None,
    sharded: bool = False,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Embed texts, (N, D), through `model`: the encoder, or what has it inside (the step in training, FSDP).

    Raises:
        InputError: a text without a token; `numbers`, from 0, are what the message counts by.
    """
    texts = [beginning(text, encoder.max_length, encoder.tokenizer) for text in texts]
    rows = encoder.tokenizer(
        texts, truncation=True, max_length=encoder.max_length, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    if empty := [i for i, row in enumerate(rows) if not row]:  # "" under a tokenizer without special tokens
        number = empty[0] if numbers is None else min(numbers[i] for i in empty)
        raise InputError(f"text {number + 1} of these has no token, so it has no vector; leave empty texts out")
    flat = torch.tensor(list(itertools.chain.from_iterable(rows)), device=encoder.device)
    return model(flat, [len(row) for row in rows], chunk_tokens=chunk_tokens, sharded=sharded)["embeddings"]


def default_chunk_tokens(device: torch.device) -> int:
    """Return how many padded tokens a chunk may have where nothing is said."""
    return DEFAULT_CHUNK_TOKENS.get(device.type, DEFAULT_CHUNK_TOKENS["default"])


@contextlib.contextmanager
def serve_words(table: nn.Embedding | None, input_ids: Tensor, words: Tensor | None) -> Iterator[None]:
    """Let lookups of `input_ids` (b, T) in `table` give `words` (b, T, width), which are these rows, read before.

    Without words the model looks up for itself. In any case it gets its token ids, so whatever else it makes of them
    (positions, masks) is as in inference. A lookup of other ids, for example of ids that the model has padded further, goes to
    the table.
    """
    if table is None or words is None:
        yield
        return

    def served(module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor:
        ids = args[0] if args else kwargs["input"]
        return words if ids.shape == input_ids.shape and ids.data_ptr() == input_ids.data_ptr() else output

    handle = table.register_forward_hook(served, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
