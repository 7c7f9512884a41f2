"""Read the sentence-transformers files beside a checkpoint, as arguments of `Encoder`.

Any setting that would give other vectors here than in sentence-transformers causes an InputError that names the setting.
"""

import json
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.checkpoint.layout import (
    MODEL_CONFIG,
    MODEL_KEYS,
    DenseModule,
    DropoutModule,
    LayerPoolingModule,
    Module,
    NormalizeModule,
    PoolingModule,
    TransformerModule,
    of_kind,
    read_modules,
)
from hf_embed.checkpoint.model_files import Files
from hf_embed.errors import InputError
from hf_embed.pooling import POOLINGS, Dense, find_pooling

logger = logging.getLogger(__name__)

Settings = dict[str, Any]  # arguments of `Encoder`
POOLING_MEND = "set pooling, or load it with sentence-transformers"


def read_settings(
    name: str,
    backbone: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pooling: str | None = None,
    **hub: Any,
) -> Settings:
    """Return the settings in the files of a folder or of a model on the Hub, as arguments of `Encoder`.

    Args:
        name: the folder, or the model on the Hub.
        backbone: the loaded model.
        tokenizer: the tokenizer. Without it, the settings have no max_length.
        pooling: replaces the folder's own pooling, which then need not be supported here.
        **hub: options as in `Files`.

    Raises:
        InputError: if any other setting would give other vectors than in sentence-transformers.
    """
    files = Files(name, **hub)
    modules = read_modules(files)
    if modules is None:
        return plain_settings(files, backbone, tokenizer, pooling)
    shared = read_model_config(files)
    own = own_pooling(files, modules, backbone, pooling)
    dense = of_kind(modules, DenseModule)
    if own is not None and POOLINGS[own].model_pooler:
        head, *dense = dense
        if pooling not in (None, own):
            logger.warning(
                f"model '{name}': pooling {pooling} does not use the layer '{head.path}', which belongs to the model's own "
                f"pooling {own}"
            )
    for normalize in of_kind(modules, NormalizeModule):
        normalize.read(files)
    for dropout in of_kind(modules, DropoutModule):
        logger.warning(
            f"model '{name}': the module Dropout ('{dropout.path}') is not used, because it changes vectors only in training"
        )
    settings: Settings = {"pooling": pooling or own, "normalize": bool(of_kind(modules, NormalizeModule))}
    settings["dense"] = read_dense_layers(files, dense, backbone)
    (transformer,) = of_kind(modules, TransformerModule)
    return settings | read_transformer(files, transformer, backbone, tokenizer) | shared


def plain_settings(
    files: Files, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, pooling: str | None
) -> Settings:
    """Return the settings of a checkpoint without modules.json.

    sentence-transformers has defaults for such a checkpoint, mostly mean pooling.

    Raises:
        InputError: if `pooling` is not given, and the model is no embedding model, or the defaults of sentence-transformers are
            unclear or not supported here.
    """
    left = [file for file in ("1_Pooling/config.json", MODEL_CONFIG) if files.path(file)]
    if left and pooling is None:
        raise InputError(
            f"model '{files.name}': {left[0]} exists, but modules.json does not, so sentence-transformers does not read it; "
            "set pooling, or copy modules.json too"
        )
    if left:
        logger.warning(
            f"model '{files.name}': hf_embed does not read {' and '.join(left)}, because modules.json does not exist"
        )
    if pooling is not None:
        return {"pooling": pooling}
    kind = (getattr(backbone.config, "architectures", None) or [""])[0]
    if kind.endswith(("ForSequenceClassification", "ColBERT")):
        raise InputError(
            f"model '{files.name}': it is a {kind} (a cross-encoder, classifier or multi-vector model), not an embedding "
            "model; set pooling to make one of its weights"
        )
    if getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"model '{files.name}': sentence-transformers applies its chat template to texts, which hf_embed does not support; "
            "set pooling (for a decoder: last) to use the texts as they are"
        )
    if kind.endswith("ForCausalLM") and getattr(backbone.config, "is_causal", True):
        logger.warning(f"model '{files.name}': it is a causal language model, so pooling is last, as in sentence-transformers")
        return {"pooling": "last"}
    return {}


# ---- the pooling ----


def own_pooling(files: Files, modules: Sequence[Module], backbone: PreTrainedModel, given: str | None) -> str | None:
    """Return the folder's own pooling. If it cannot be read and another one is `given`, warn and return None."""
    try:
        return read_pooling(files, modules, backbone)
    except InputError as error:
        if given is None:
            raise
        logger.warning(f"using pooling {given} as given, because the folder's own pooling is not supported: {error}")
        return None


def read_pooling(files: Files, modules: Sequence[Module], backbone: PreTrainedModel) -> str:
    """Return the name in `POOLINGS` of the pooling that the modules up to the first Dense compute."""
    mode = read_mode(files, of_kind(modules, PoolingModule))
    pooling, said, layers = find_pooling(mode), mode, None
    if layer_poolings := of_kind(modules, LayerPoolingModule):
        layers = layer_poolings[0].read(files).layers(files, backbone, POOLING_MEND)
    if layers is not None:
        said = f"{pooling or mode} of the layers of '{layer_poolings[0].path}'"
        pooling = find_pooling(mode, layers)
    if pooling is None:
        raise files.refused(f"pooling {said}", POOLING_MEND)
    dense = of_kind(modules, DenseModule)
    head = find_pooling(mode, layers, model_pooler=True)
    if head is not None and dense and is_pooler(files, dense[0], backbone):
        return head
    return pooling


def read_mode(files: Files, poolings: Sequence[PoolingModule]) -> str:
    """Return the name of the pooling in sentence-transformers: its flag, or its name in newer versions."""
    if not poolings:
        raise files.refused("a modules.json without Pooling", POOLING_MEND)
    module = poolings[0].read(files)
    if not module.config.get("include_prompt", True):
        raise files.refused("pooling without the prompt (include_prompt false)", POOLING_MEND)
    modes = module.modes()
    known = {mode for entry in POOLINGS.values() for mode in (entry.flag, entry.mode)}
    if len(modes) != 1 or modes[0] not in known:
        raise files.refused(f"pooling {' + '.join(modes)}", POOLING_MEND)
    return modes[0]


def has_mlp_head(name: str, backbone: PreTrainedModel) -> bool:
    """Return whether the folder's own pooling uses the model's own pooler."""
    files = Files(name)
    modules = read_modules(files)
    if not modules:
        return False
    try:
        return POOLINGS[read_pooling(files, modules, backbone)].model_pooler
    except InputError:
        return False


def is_pooler(files: Files, module: DenseModule, backbone: PreTrainedModel) -> bool:
    """Return whether a Dense module equals the backbone's own pooler. The MLP head is saved as such a module."""
    pooler = getattr(getattr(backbone, "pooler", None), "dense", None)
    layer = module.read(files).layer(files)
    if pooler is None or layer.residual is not None or not isinstance(layer.activation, nn.Tanh):
        return False
    own, saved = pooler.state_dict(), layer.linear.state_dict()
    return own.keys() == saved.keys() and all(torch.equal(saved[key].to(own[key]), own[key]) for key in own)


# ---- the other modules ----


def read_dense_layers(files: Files, modules: Sequence[DenseModule], backbone: PreTrainedModel) -> list[Dense]:
    """Return the dense layers after the pooling, with the data type and device of the backbone."""
    layers, width = [], getattr(backbone.config, "hidden_size", None)
    for module in modules:
        layer = module.read(files).layer(files)
        taken = layer.linear.in_features
        if width is not None and taken != width:
            raise files.refused(f"the module Dense ('{module.path}') with {taken} inputs instead of {width}")
        width = layer.linear.out_features
        layers.append(layer.to(next(backbone.parameters())))
    return layers


def read_transformer(
    files: Files, module: TransformerModule, backbone: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None
) -> Settings:
    """Return max_length as sentence-transformers finds it. Raise InputError if its tokenization would differ."""
    config = module.read(files).config
    if tokenizer is None:
        return {}
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise InputError(
            f"model '{files.name}': model_max_length {longest!r} in tokenizer_config.json is not a number; correct it"
        )
    sample = "Ein ÄRGER in İstanbul"
    if config.get("do_lower_case") and tokenizer.tokenize(sample) != tokenizer.tokenize(sample.lower()):
        raise files.refused(
            f"do_lower_case in {module.file}", "set it in tokenizer_config.json, or load it with sentence-transformers"
        )
    if config.get("max_seq_length") is not None:
        return {"max_length": config["max_seq_length"]}
    positions = getattr(backbone.config, "max_position_embeddings", None) or -1  # XLNet states -1
    return {"max_length": int(min(longest, positions) if positions > 0 else longest)}


def read_model_config(files: Files) -> Settings:
    """Return the settings that apply to the model as a whole."""
    config = files.config(MODEL_CONFIG, MODEL_KEYS)
    if config.get("requirements"):
        logger.warning(f"model '{files.name}' requires {json.dumps(config['requirements'])}; hf_embed does not check this")
    prompts = config.get("prompts") or {}
    if not all(isinstance(text, str | None) for text in prompts.values()):
        raise InputError(f"model '{files.name}': the prompts {prompts!r} are not all texts; correct {MODEL_CONFIG}")
    prompts = {key: text or "" for key, text in prompts.items()}
    return {
        # sentence-transformers always writes these two, even if they are empty.
        "prompts": {key: text for key, text in prompts.items() if text or key not in ("query", "document")},
        "default_prompt_name": config.get("default_prompt_name"),
        "similarity_fn_name": config.get("similarity_fn_name") or "cosine",
        "truncate_dim": config.get("truncate_dim"),
    }
