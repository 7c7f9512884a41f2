"""The parts of `Encoder.encode` around the model: check arguments and lengths, sort texts, use one or several devices.

All texts are sorted by length before they are cut into batches. So the texts of a batch have similar lengths, and its chunks
have hardly any padding. Only the tokens of the current batches are in memory.

Shapes: N texts, n texts in a batch, D numbers per vector.
"""

import contextlib
import functools
import itertools
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager
from queue import SimpleQueue
from threading import Lock, RLock
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from hf_embed.adapters import copy_of
from hf_embed.distributed import on_cpu
from hf_embed.errors import InputError, first_line, utf8
from hf_embed.forward.packing import copy_to
from hf_embed.pooling import check_pooling
from hf_embed.ranges import COUNT, check_one_of, out_of_range
from hf_embed.vectors import SIMILARITIES, check_packable, check_precision

if TYPE_CHECKING:
    from hf_embed.encoder import Encoder

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)
Item = TypeVar("Item")
Result = TypeVar("Result")
Texts: TypeAlias = str | Iterable[str] | DataLoader  # also arrays and columns of texts
Tokens: TypeAlias = list[list[int]]  # the token ids of each text of a batch
# The vectors of this many texts are fetched from a GPU at a time. If each batch were fetched by itself, the GPU would have
# nothing to do until the host has prepared the next one.
FETCHED = 4096
# What stands between words for every tokenizer. Python also splits words at control characters, which BERT's tokenizer removes.
SPACES = re.compile(r"[ \t\r\n]+")
# For each model inside `evaluating`: the threads that use it, and the modules that were in training mode.
_evaluated: dict[nn.Module, tuple[int, set[nn.Module]]] = {}
# Held while the modes of a model change, and during a whole check of its forward pass, which changes modes and data types.
model_lock = RLock()
# Arguments of sentence-transformers' encode, and what replaces them here.
ELSEWHERE = {
    "normalize_embeddings": "normalize=True or False",
    "pool": "device=['cuda:0', 'cuda:1'] for several devices",
    "chunk_size": "batch_size",
    "task": "encode_query or encode_document",
    "processing_kwargs": "max_length of Encoder.from_pretrained",
}
# Attributes of its model, and what replaces them here.
ATTRIBUTES = {
    "max_seq_length": "max_length",
    "get_max_seq_length": "max_length",
    "get_embedding_dimension": "dimension",
    "get_sentence_embedding_dimension": "dimension",
    "tokenize": "tokenizer",
    "start_multi_process_pool": "encode(device=[...])",
    "encode_multi_process": "encode(device=[...])",
    "save": "save_pretrained",
    "push_to_hub": "save_pretrained and `hf-embed push`",
    "fit": "ContrastiveTrainer",
    "add_adapter": "peft.get_peft_model on the model that you pass to ContrastiveTrainer",
}
# Longer texts are truncated unless the user asks for more, because the cost of attention grows with the length.
DEFAULT_MAX_LENGTH = 512


class Options(TypedDict, total=False):
    """Keyword arguments of `Encoder.encode`, which describes them."""

    batch_size: int
    show_progress_bar: bool | None
    chunk_tokens: int | None
    prompt_type: Any
    prompt: str | None
    truncate_dim: int | None
    normalize: bool | None
    device: str | torch.device | Sequence[str | torch.device] | None
    precision: str
    convert_to_numpy: bool
    output_value: str


def check_arguments(others: Mapping[str, Any], convert_to_tensor: bool) -> None:
    """Refuse arguments that `encode` does not have, and name their replacement.

    The default values of two arguments of sentence-transformers are accepted: convert_to_numpy=True and
    output_value="sentence_embedding".

    Raises:
        InputError: if one of these two has another value that asks for something else.
        TypeError: if an argument is unknown.
    """
    for name, value in others.items():
        if name == "convert_to_numpy":
            if not value and not convert_to_tensor:
                raise InputError(
                    "convert_to_numpy=False: encode() does not return a list of tensors; set convert_to_tensor=True"
                )
        elif name == "output_value":
            if value != "sentence_embedding":
                raise InputError(f"output_value={value!r}: encode() returns one vector per text; for tokens, call .backbone")
        else:
            mend = f"; use {ELSEWHERE[name]}" if name in ELSEWHERE else ""
            raise TypeError(f"encode() has no argument '{name}'{mend}")


def check_sizes(batch_size: int, chunk_tokens: int | None) -> None:
    """Raise InputError unless both sizes are whole numbers of at least 1."""
    for name, size in {"batch_size": batch_size, "chunk_tokens": 1 if chunk_tokens is None else chunk_tokens}.items():
        if size not in COUNT:
            raise InputError(f"{name} is {size!r}; it must be {COUNT}")


class WithSettings(nn.Module):
    """A module whose settings are attributes. They are checked when they are set, so a wrong value never has an effect.

    The settings are those of `Encoder`: pooling, max_length, normalize, prompts, truncate_dim and similarity_fn_name.
    """

    tokenizer: PreTrainedTokenizerBase
    positions: int | None  # the number of positions of the model; None: no limit

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute.

        Raises:
            InputError: if it is a setting, and no encoder can have this value.
            AttributeError: if sentence-transformers has an attribute of this name, because here it would have no effect.
        """
        refuse_attribute(name)
        if name == "pooling":
            check_pooling(value)
        elif name == "max_length":
            value = check_max_length(value, self.positions, self.tokenizer)
        elif name == "normalize" and value not in (True, False):
            raise InputError(f"normalize is {value!r}; it must be True or False")
        elif name == "prompts":
            value = checked_prompts(value)
        elif name == "truncate_dim" and value is not None and not (type(value) is int and value > 0):
            raise InputError(f"truncate_dim is {value!r}; give the number of dimensions to keep, or None")
        elif name == "similarity_fn_name":
            check_one_of(name, value, SIMILARITIES)
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        refuse_attribute(name)
        return super().__getattr__(name)


def refuse_attribute(name: str) -> None:
    """Raise AttributeError if sentence-transformers has an attribute of this name, and `Encoder` has it under another name."""
    if name in ATTRIBUTES:
        raise AttributeError(f"Encoder has no attribute '{name}'; use {ATTRIBUTES[name]}")


def check_encoder(model: Any) -> None:
    """Raise InputError if `model` is not an `Encoder` but, for example, a name or a model of another library."""
    if not isinstance(model, WithSettings):
        raise InputError(
            f"the model is a {type(model).__name__}; give an Encoder, for example Encoder.from_pretrained(NAME), or "
            "trainer.encoder after a training"
        )


def checked_prompts(prompts: Any) -> dict[str, str]:
    """Return a copy of prompts by name; None means no prompts. Raise InputError if they are anything else."""
    prompts = {} if prompts is None else prompts
    if not isinstance(prompts, Mapping) or not all(isinstance(word, str) for pair in prompts.items() for word in pair):
        raise InputError(f'prompts are {prompts!r}; give texts by name, for example {{"query": "query: "}}')
    for prompt in prompts.values():
        check_prompt(prompt)
    return dict(prompts)


def check_prompt(prompt: Any) -> None:
    """Raise InputError if `prompt` is not a text, or holds half of a character."""
    if not isinstance(prompt, str):
        raise InputError(f"prompt is {prompt!r}; give the text to put before each text")
    utf8(prompt)


def text_list(texts: Any) -> list[str]:
    """Return texts as a list.

    Raises:
        InputError: if `texts` is not a text or a collection of texts with an order, or if a text holds half of a character.
    """
    if isinstance(texts, Mapping | set | frozenset) or hasattr(texts, "columns"):  # would yield keys, or any order
        raise InputError(f"the texts are of the type {type(texts).__name__}; give a list of texts, or one column")
    for method in ("tolist", "to_pylist"):  # of arrays, and of columns of pandas and pyarrow
        texts = getattr(texts, method)() if hasattr(texts, method) else texts
    if isinstance(texts, str):  # from an array without dimensions
        return [texts]
    if not isinstance(texts, list):
        if not isinstance(texts, Iterable):
            raise InputError(f"the texts are {texts!r}; give a text or a list of texts")
        texts = list(texts)
    for number, text in enumerate(texts, 1):
        if not isinstance(text, str):
            raise InputError(f"text {number} is not a string but {text!r}; convert it to a string or remove it")
        if not text.isascii():
            utf8(text)
    return texts


def beginning(text: str, max_length: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the part of a very long text that decides its first `max_length` tokens.

    Tokenizing a megabyte of text takes seconds. No tokenizer looks ahead further than a word or two, and nearly all words have
    a token. So the text after four words per token has no influence on the first tokens. The returned part ends between two
    words, and has more than `max_length` tokens. The whole text is returned if there is no such part, for example because most
    words are zero-width characters, which many tokenizers remove.
    """
    words = 4 * max_length
    if len(text) < 10 * words or tokenizer.truncation_side == "left":
        return text
    parts = SPACES.split(text, words)
    if len(parts) <= words:
        return text
    part = text[: len(text) - len(parts[-1])]
    tokens = tokenizer(part, truncation=True, max_length=max_length + 1)["input_ids"]
    return part if len(tokens) > max_length else text


def room_for_text(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[str], max_length: int) -> int:
    """Return how many of `max_length` tokens the longest of these prompts leaves for the text, with its special tokens.

    Raises:
        InputError: if no room is left for a text, so that all texts would have the same vector.
    """
    lengths = {prompt: len(tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]) for prompt in prompts}
    longest = max(lengths, key=lambda prompt: lengths[prompt])
    left = max_length - lengths[longest]
    if left <= tokenizer.num_special_tokens_to_add():
        if not lengths[longest]:
            raise InputError(f"max_length {max_length} leaves no room for a token of text; set it higher")
        raise InputError(
            f"the prompt {longest[:40]!r} has {lengths[longest]} tokens, so max_length {max_length} leaves no room for a text; "
            "shorten the prompt, or increase max_length"
        )
    return left


def check_max_length(max_length: int | None, limit: int | None, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the largest number of tokens of a text, for a model with positions for `limit` tokens (None: no limit).

    Raises:
        InputError: if `max_length` exceeds the positions, or leaves no room for a token of text beside the special tokens.
    """
    if max_length is not None and max_length not in COUNT:
        raise out_of_range("max_length", max_length, COUNT)
    if max_length is None:
        return min(n for n in (limit, tokenizer.model_max_length, DEFAULT_MAX_LENGTH) if n)
    if limit is not None and max_length > limit:
        raise InputError(f"max_length {max_length} is above the {limit} positions of this model; set it to at most {limit}")
    room_for_text(tokenizer, [""], max_length)
    return int(max_length)  # a number of NumPy could not be saved


def tokenize_texts(encoder: "Encoder", texts: list[str], numbers: Sequence[int] | None = None) -> Tokens:
    """Return the token ids of each text.

    `numbers` are the positions of the texts in the user's list, from 0. Only the error message uses them.

    Raises:
        InputError: if a text has no token.
    """
    texts = [beginning(text, encoder.max_length, encoder.tokenizer) for text in texts]
    rows = encoder.tokenizer(
        texts, truncation=True, max_length=encoder.max_length, return_attention_mask=False, return_token_type_ids=False
    )["input_ids"]
    if empty := [i for i, row in enumerate(rows) if not row]:  # e.g. "" if the tokenizer adds no special tokens
        number = empty[0] if numbers is None else min(numbers[i] for i in empty)
        raise InputError(f"the tokenizer returns no tokens for text {number + 1}, so it has no embedding; remove empty texts")
    return rows


def embed_tokens(model: nn.Module, encoder: "Encoder", tokens: Tokens, chunk_tokens: int | None = None) -> Tensor:
    """Embed N texts through `model`: the encoder, or a module that contains it (the training step, FSDP). Return (N, D)."""
    flat = copy_to(torch.tensor(list(itertools.chain.from_iterable(tokens))), encoder.device)
    return model(flat, [len(row) for row in tokens], chunk_tokens=chunk_tokens)["embeddings"]


def encode_by_length(
    models: list[Model],
    tokenize: Callable[[list[str], Sequence[int]], Tokens],
    embed: Callable[[Model, Tokens], Tensor],
    texts: list[str],
    batch_size: int,
    output_device: torch.device,
    show_progress_bar: bool = False,
) -> Tensor:
    """Return the vectors (N, D) of N >= 1 texts, in the order of the texts, on `output_device`.

    Args:
        models: one model for each device. A model takes the next batch as soon as it is free.
        tokenize: `tokenize(texts, numbers)` -> the tokens of a batch, where `numbers` are the positions of these texts among
            all texts. It runs in another thread while a model encodes the batch before, but never twice at the same time.
        embed: `embed(model, tokens)` -> (n, D).
        texts: N texts.
        batch_size: largest number of texts in a batch.
        output_device: the device of the returned vectors.
        show_progress_bar: show a progress bar that counts texts.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    free: SimpleQueue[Model] = SimpleQueue()
    for model in models:
        free.put(model)

    tokenizing = Lock()  # fast tokenizers refuse to be used by two threads at the same time

    def tokens_of(batch: list[int]) -> Tokens:
        with tokenizing:
            return tokenize([texts[i] for i in batch], batch)

    def vectors_of(tokens: Tokens) -> Tensor:
        model = free.get()
        try:
            with torch.inference_mode():
                vectors = embed(model, tokens)
                return vectors.to(output_device) if len(models) > 1 else vectors
        finally:
            free.put(model)

    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=len(texts), desc="Encoding", unit=" texts", disable=not show_progress_bar))
        threads = stack.enter_context(ThreadPoolExecutor(len(models)))
        if len(models) > 1:
            parts = threads.map(lambda batch: vectors_of(tokens_of(batch)), batches)
        else:  # the model stays in this thread, because autocast and other contexts of the caller belong to it
            parts = map(vectors_of, one_ahead(threads, tokens_of, batches))
        return put_back(parts, order, output_device, bar.update)


def put_back(parts: Iterable[Tensor], order: list[int], device: torch.device, seen: Callable[[int], Any]) -> Tensor:
    """Return vectors (N, D) on `device`, in the order of the texts.

    Args:
        parts: the vectors of each batch, (n, D).
        order: the number of the text to which each vector belongs.
        device: the device of the returned vectors. Vectors on another one are copied `FETCHED` at a time.
        seen: called with n for each part.
    """
    vectors, waiting, done = torch.empty(0), list[Tensor](), 0
    for part in parts:
        waiting.append(part)
        seen(len(part))
        if sum(map(len, waiting)) >= min(FETCHED, len(order) - done):
            rows, waiting = torch.cat(waiting).to(device), []
            if not len(vectors):
                vectors = rows.new_empty(len(order), rows.shape[1])
            vectors[copy_to(torch.tensor(order[done : done + len(rows)]), device)] = rows
            done += len(rows)
    return vectors


def one_ahead(thread: Executor, function: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """Yield `function(item)` for each of at least one item. The thread computes the next one while the caller uses the last."""
    result = function(items[0])
    for item in items[1:]:
        following = thread.submit(function, item)
        yield result
        result = following.result()
    yield result


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch a model to evaluation mode (no dropout) inside a `with` block.

    Afterwards, every submodule is in the mode it had before. For example, a layer that was frozen in evaluation mode stays so.
    If several threads are inside with the same model, the last one to leave restores the modes.
    """
    with model_lock:
        users, training = _evaluated.get(model, (0, set()))
        switched = {module for module in model.modules() if module.training}
        _evaluated[model] = users + 1, training | switched
        if switched:
            model.eval()
    try:
        yield
    finally:
        with model_lock:
            users, training = _evaluated.pop(model)
            if users > 1:
                _evaluated[model] = users - 1, training
            elif training or model.training:  # the forward check switches a model to training mode
                for module in model.modules():
                    module.training = module in training


def on_cpu_by_default() -> AbstractContextManager:
    """Return a context in which new tensors are on the CPU, also after `torch.set_default_device`, as the code here expects."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def check_encode_options(encoder: "Encoder", truncate_dim: int | None, normalize: bool | None, precision: str) -> None:
    """Raise InputError for options that `Encoder.encode` cannot fulfill; the arguments are those of `encode`."""
    most, name = encoder.full_dimension, encoder.similarity_fn_name
    if normalize not in (None, True, False):
        raise InputError(f"normalize is {normalize!r}; it must be True, False or None (as the model was saved)")
    if truncate_dim is not None and (type(truncate_dim) is not int or not 1 <= truncate_dim <= most):
        raise InputError(
            f"truncate_dim is {truncate_dim!r}; it must be a whole number from 1 to {most}, the size of this model's vectors"
        )
    check_precision(precision)
    if precision == "float32":
        return
    width = truncate_dim or encoder.dimension
    unit = normalize or (normalize is None and encoder.normalize and width == most)
    if name != "cosine" and not (unit and name == "dot"):
        mend = ", or set normalize=True" if name == "dot" else ""
        raise InputError(
            f"precision {precision} loses the length of a vector, which this model's similarity ({name}) needs; use "
            f"float32{mend}"
        )
    check_packable(precision, width)
    if width != encoder.dimension and encoder.dimension in (8 * width, width / 8):
        raise InputError(
            f"precision {precision} with truncate_dim {width}: `similarity` could not distinguish these vectors from the "
            f"model's vectors of {encoder.dimension} numbers; use another truncate_dim"
        )


def on_devices(encoder: "Encoder", device: str | torch.device | Sequence[str | torch.device] | None) -> "list[Encoder]":
    """Return the encoder moved to one device, or one encoder per device of a list; see `Encoder.encode`."""
    if device is None:
        if encoder.device.type == "cpu" and not on_cpu():
            say_that_a_gpu_is_idle()
        return [encoder]
    if isinstance(device, str | int | torch.device):
        return [encoder.to(usable_device(device))]
    devices = [usable_device(name) for name in device]
    if not devices:
        raise InputError("device is an empty list; name a device, or remove device")
    own = devices.index(encoder.device) if encoder.device in devices else None
    return [encoder if i == own else copy_of(encoder).to(place) for i, place in enumerate(devices)]


@functools.cache  # once in a process
def say_that_a_gpu_is_idle() -> None:
    """Log that `encode` computes on the CPU of a machine with a GPU: sentence-transformers would have moved the model there."""
    logger.warning('the model is on the CPU, although there is a GPU; move it there with .to("cuda"), or give device="cpu"')


def usable_device(name: str | int | torch.device) -> torch.device:
    """Return the device with this name, with its index. Raise InputError if this machine does not have it."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {name!r}: {first_line(error)}") from error
    if device.type == "cpu":
        return device
    found = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    kind = torch.accelerator.current_accelerator().type if found else "cpu"  # type: ignore[union-attr]
    if device.type != kind or (device.index or 0) >= found:
        here = f"{found} of the type {kind}" if found else "only a CPU"
        raise InputError(f"device '{name}' is not available: this machine has {here}; name another device, or remove device")
    return device if device.index is not None else torch.device(kind, torch.accelerator.current_device_index())
