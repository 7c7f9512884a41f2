"""Check that config.json describes a model of the size of its weights, before memory for the model is allocated."""

import copy
import os
import re
from typing import Any

import torch
from transformers import PretrainedConfig

from hf_embed.checkpoint.files import Files
from hf_embed.errors import InputError
from hf_embed.read_files import COPY_ANEW

# Upper limits of counts in config.json. transformers creates one object per unit, and no real model reaches the limits.
MOST: dict[re.Pattern[str], int] = {
    re.compile(r"num_labels"): 1_000_000,
    re.compile(r"(\w+_)?(num|n)_(\w+_)?(layers?|blocks)"): 1_000,
    re.compile(r"(\w+_)?(num|n)_(\w+_)?(heads?|experts)"): 10_000,
}
# A model with fewer numbers than this needs little memory, whatever its weights file holds.
SMALL = 5_000_000
# The same for buffers that are not saved, such as GPT-Neo's causal masks: their size says nothing of that of the weights.
SMALL_BUFFERS = 2**30


def check_counts(files: Files, stated: dict[str, Any]) -> None:
    """Raise InputError for a count in config.json that no real model has. Building such a model would take hours."""
    for key, value in stated.items():
        if isinstance(value, dict):
            check_counts(files, value)
        for pattern, most in MOST.items():
            if isinstance(value, int) and value > most and pattern.fullmatch(key):
                raise InputError(
                    f"model '{files.name}': {key} in config.json is {value:,}, more than any model has; {COPY_ANEW}"
                )


def check_size(files: Files, model_class: Any, config: PretrainedConfig) -> None:
    """Raise InputError if config.json describes a model too large for its weights files, which would fill the memory.

    Each number takes at least one byte in the files, unless the weights are quantized.

    Args:
        files: the files of the model.
        model_class: the class of transformers that loads the model, or one of the auto classes.
        config: the config of the model. A config that needs custom code is not checked.
    """
    paths = list(files.weight_files().values()) or list(filter(None, [files.path("pytorch_model.bin")]))
    if not paths or getattr(config, "quantization_config", None) or getattr(config, "auto_map", None):
        return
    own = copy.deepcopy(config)  # because the model changes its config
    with torch.device("meta"):
        model = model_class.from_config(own) if hasattr(model_class, "from_config") else model_class(own)
    saved, buffers = model.state_dict().keys(), dict(model.named_buffers())
    numbers = sum(tensor.numel() for tensor in [*model.parameters(), *buffers.values()])
    unsaved = sum(tensor.numel() for name, tensor in buffers.items() if name not in saved)
    stored = sum(map(os.path.getsize, paths))
    if numbers - unsaved > max(stored, SMALL) or unsaved > SMALL_BUFFERS:
        raise InputError(
            f"model '{files.name}': config.json describes {numbers:,} numbers, but the weights have {stored:,} bytes, so they "
            "do not belong together; use the complete folder that save_pretrained wrote"
        )
