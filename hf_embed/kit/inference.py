"""Shared code of the recipes that encode but do not train: the flags of the model, its loading, and the texts of a file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Column

from hf_embed.data.sources import read_file, text_column
from hf_embed.distributed import on_cpu
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.kit.plan import TRUST
from hf_embed.progress import bars_shown
from hf_embed.ranges import COUNT, check_ranges, setting
from hf_embed.vector_files import filled, read_vectors

# How long a process waits for the others. One may be done long before another, for which accelerate gives a GPU 10 minutes.
WAIT = timedelta(hours=12)
MODEL_HELP = "Folder or Hub name of the model. Default: the built-in quickstart encoder."


@dataclass(kw_only=True)
class EncodingArguments:
    """Flags for how a model encodes. The dataclass of a recipe derives from this class."""

    pooling: str | None = setting(
        None, "Pooling of the token states. Default: that of the model's folder, else mean (of a causal model last)."
    )
    max_length: int | None = setting(None, "Maximum length of a text, in tokens. Default: the setting of the model's folder.")
    trust_remote_code: bool = setting(False, TRUST)

    def __post_init__(self) -> None:
        check_ranges(self, {"max_length": COUNT})


@dataclass(kw_only=True)
class FastEncodingArguments(EncodingArguments):
    """Flags for a recipe that encodes many texts and saves no model: what makes it faster."""

    bf16: bool = setting(
        False, "Compute in bfloat16. Faster on a GPU, and on a CPU with instructions for it; it rounds the vectors."
    )
    attn_implementation: str | None = setting(
        None, "Attention implementation: sdpa, or flash_attention_2 on a GPU ... Default: the model's."
    )


def process_state() -> PartialState:
    """Return accelerate's state of this process: on its GPU, or on the CPU without a GPU or if the launcher sets `use_cpu`."""
    return PartialState(cpu=on_cpu(), timeout=WAIT)


def load_for_encoding(name_or_path: str, flags: EncodingArguments, device: torch.device | str | None = None) -> Encoder:
    """Load a model with the settings that the flags ask for.

    Args:
        name_or_path: the name or the folder of the model.
        flags: the flags of the recipe.
        device: the device of this process, for a recipe that shares its work among several processes. Default, for a recipe
            that runs in one process: the GPU, or the CPU without a GPU or if the launcher sets `use_cpu`.

    Raises:
        InputError: if the model cannot be loaded, or if several processes were started for a recipe that runs in one. (Each of
            them would do the whole work.)
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if device is None and processes > 1:
        raise InputError(f"this recipe runs in a single process, but {processes} were started; start it without a launcher")
    options: dict[str, Any] = {"trust_remote_code": flags.trust_remote_code}
    if isinstance(flags, FastEncodingArguments):
        options |= {"dtype": torch.bfloat16} if flags.bf16 else {}
        options |= {"attn_implementation": flags.attn_implementation} if flags.attn_implementation else {}
    encoder = Encoder.from_pretrained(name_or_path, flags.pooling, flags.max_length, **options)
    return encoder.to(device or ("cpu" if on_cpu() else "cuda"))


def read_column(path: str, column: str | None = None) -> tuple[str, Column]:
    """Read the column of a file that holds the texts, with an entry for every row.

    Args:
        path: the file.
        column: the name of the column. Default: text or sentence, or the only column of the file.

    Returns:
        The name of the column, and the column. Its parts are read from the file when they are needed.

    Raises:
        InputError: if the file cannot be read, or has no such column.
    """
    rows = read_file(path)
    if column is None:
        column = text_column(rows.column_names, path, "give the column of the texts with --column NAME")
    if column not in rows.column_names:
        raise InputError(f"{path}: there is no column '{column}'; found {', '.join(rows.column_names)}")
    return column, rows[column]


def document_vectors(
    encoder: Encoder, texts: Sequence[str], name: str, path: str | None
) -> tuple[np.ndarray, dict[str, Any], str]:
    """Return the vectors of documents, the options for encoding queries, and the name of the similarity function.

    Args:
        encoder: the model.
        texts: the documents.
        name: the name of the texts in messages.
        path: a file of `hf_embed.vector_files.write_vectors` with the vectors. None: the texts are encoded now.

    Raises:
        InputError: if a text is empty, if the vectors in the file belong to other texts or another model, or if they were
            encoded without the prompt for documents.
    """
    if path is None:
        documents = list(filled(texts, name))
        return encoder.encode_document(documents, show_progress_bar=bars_shown()), {}, encoder.similarity_fn_name
    vectors, options = read_vectors(path, encoder, texts)
    if encoder.prompt(options.pop("prompt_name", None)) != encoder.prompt("document"):
        raise InputError(
            f"{path}: the texts were encoded without the model's prompt for documents; encode them again with --prompt_name "
            "document"
        )
    small = options.pop("precision", "float32") != "float32"  # only the documents: queries are encoded in float32
    return vectors, options, "cosine" if small else encoder.similarity_fn_name
