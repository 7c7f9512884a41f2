"""What the vectors of a model depend on: the weights, the configuration, the tokenizer and the settings of the encoder.

`described` lists everything but the weights, so that two models can be compared. `fingerprint` is a hash of everything, so that
stored vectors and scores are not taken for those of another model.
"""

import hashlib
import json
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.adapters import has_adapters
from hf_embed.files.read_files import parse_json
from hf_embed.pooling import Dense
from hf_embed.tempscale import applied_tempscale

if TYPE_CHECKING:
    from hf_embed.encoder import Encoder

# Entries of config.json that no vector depends on. Dropout rates (any entry with "drop" in its name) matter only in training.
NO_EFFECT = {
    "_name_or_path", "architectures", "auto_map", "bos_token_id", "dtype", "eos_token_id", "gradient_checkpointing", "id2label",
    "initializer_range", "label2id", "problem_type", "return_dict", "tie_word_embeddings", "transformers_version", "use_cache",
}  # fmt: skip


def fingerprint(encoder: "Encoder") -> str:
    """Return a hash of everything that a vector depends on."""
    # The target modules of an adapter are a set, which has another order in each process.
    text = json.dumps(
        described(encoder), sort_keys=True, default=lambda value: sorted(value) if isinstance(value, set) else str(value)
    )
    found = hashlib.sha256(text.encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()[:16]


def described(encoder: "Encoder") -> dict[str, Any]:
    """Return everything that a vector depends on except the weights, by its name in messages."""
    config = {key: value for key, value in encoder.config.to_dict().items() if key not in NO_EFFECT and "drop" not in key}
    settings = {key: value for key, value in encoder.settings.items() if key != "dense"}
    return {
        "architecture": type(encoder.base).__name__,
        "config": config,
        "tokenizer": tokenizer_facts(encoder.tokenizer),
        **settings,
        "dense": [dense_facts(layer) for layer in cast("list[Dense]", list(encoder.dense))],
        "temp_scale": None if (applied := applied_tempscale(encoder.backbone)) is None else applied.to_dict(),
        "adapters": adapter_facts(encoder.backbone),
    }


def tokenizer_facts(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return what decides which token ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = {"vocab": tokenizer.get_vocab()} if backend is None else parse_json(backend.to_str())
    loose = {"padding", "truncation", "version"}  # settings of the last call
    return {key: value for key, value in state.items() if key not in loose} | {"truncation_side": tokenizer.truncation_side}


def dense_facts(layer: Dense) -> tuple[int, int, bool, str, str]:
    """Return the sizes and the kind of a layer after the pooling."""
    linear = layer.linear
    kinds = type(layer.activation).__name__, type(layer.residual).__name__
    return linear.in_features, linear.out_features, linear.bias is not None, *kinds


def adapter_facts(backbone: PreTrainedModel) -> dict[str, Any]:
    """Return the configurations of the adapters that are not merged into the weights, and which of them are active."""
    if not has_adapters(backbone):
        return {}
    layers = [module for module in backbone.modules() if isinstance(module, BaseTunerLayer) and not module.disable_adapters]
    configs: Any = backbone.peft_config
    return {
        "active": sorted({name for layer in layers for name in layer.active_adapters}),
        "configs": {name: config.to_dict() for name, config in configs.items()},
    }
