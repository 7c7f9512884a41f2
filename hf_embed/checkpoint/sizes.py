"""Does a config.json describe a model of the size of its weights? Known before the memory for it is taken."""

import copy
import os
import re
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_embed.checkpoint.files import Files
from hf_embed.errors import InputError
from hf_embed.read_files import COPY_ANEW

# Counts for each of which transformers makes objects, and more than any model has.
MOST: dict[re.Pattern[str], int] = {
    re.compile(r"num_labels"): 1_000_000,
    re.compile(r"(\w+_)?(num|n)_(\w+_)?(layers?|blocks)"): 1_000,
    re.compile(r"(\w+_)?(num|n)_(\w+_)?(heads?|experts)"): 10_000,
}
# A model of fewer numbers takes no memory to speak of, whatever its file holds.
SMALL = 5_000_000


def check_counts(files: Files, stated: dict[str, Any]) -> None:
    """Raise InputError for counts in config.json that no model has: to count up to them would take hours."""
    for key, value in stated.items():
        if isinstance(value, dict):
            check_counts(files, value)
        for pattern, most in MOST.items():
            if isinstance(value, int) and value > most and pattern.fullmatch(key):
                raise InputError(
                    f"model '{files.name}': {key} of config.json is {value:,}, more than any model has; {COPY_ANEW}"
                )


def check_size(files: Files, model_class: Any, config: PretrainedConfig) -> None:
    """Raise InputError for a config.json of a model that is too large for its weights files: it would fill the memory.

    Each number takes a byte of the files at least, unless the weights are quantised.

    Args:
        files: of the model.
        model_class: a class of transformers that loads it, or one of its auto classes.
        config: of the model; one that needs code of its own is not checked.
    """
    paths = list(files.weight_files().values()) or list(filter(None, [files.path("pytorch_model.bin")]))
    if not paths or getattr(config, "quantization_config", None) or getattr(config, "auto_map", None):
        return
    own = copy.deepcopy(config)  # a model writes into its config
    with torch.device("meta"):
        model = model_class.from_config(own) if hasattr(model_class, "from_config") else model_class(own)
    numbers = sum(tensor.numel() for tensor in [*model.parameters(), *model.buffers()])
    stored = sum(map(os.path.getsize, paths))
    if numbers > max(stored, SMALL):
        raise InputError(
            f"model '{files.name}': config.json describes {numbers:,} numbers, and the weights take {stored:,} bytes; they do "
            "not belong together: take the whole folder that save_pretrained wrote"
        )
