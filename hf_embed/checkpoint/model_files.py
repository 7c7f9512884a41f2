"""The names of the files of a model, and readers for its configs and weights, in a local folder or on the Hub."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_embed.errors import InputError
from hf_embed.files.read_files import COPY_ANEW, read_json, read_tensors
from hf_embed.library_internals import optional_file

# The allowed values of a key in a config file: a type, or a list of the values that have no effect.
Allowed = Any
# Values that are allowed for every key, because they set nothing.
EMPTY: list[Any] = [None, False, "", [], {}]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

# ---- the names of the files in a model's folder ----

# The exact names, because these files are uploaded. A pattern such as vocab* could also upload a user's private files.
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# The files of all tokenizers in transformers (their `vocab_files_names`), and those that every tokenizer has.
TOKENIZER = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "chat_template.json", "vocab.txt", "vocab.json", "vocab-src.json", "vocab-tgt.json", "target_vocab.json",
    "entity_vocab.json", "merges.txt", "bpe.codes", "byte_maps.json", "dict.txt", "emoji.json", "normalizer.json",
    "prophetnet.tokenizer", "sentencepiece.bpe.model", "sentencepiece.model", "source.spm", "target.spm", "spiece.model",
    "spm.model", "spm_char.model", "tokenizer.model", "word_pronunciation.json", "word_shape.json",
}  # fmt: skip
FILES = frozenset({
    "README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "adapter_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "results.json", "geometry.png",
    "tempscale.png", "model.safetensors", "adapter_model.safetensors", *TOKENIZER,
})  # fmt: skip
MODULE = re.compile(r"\d+_[A-Z]\w*")  # 1_Pooling, 2_Dense
MODULE_FILES = ("config.json", "model.safetensors")
ONNX = ("model.onnx", "model.onnx_data", "model_quantized.onnx", "model_quantized.onnx_data")  # in the folder onnx
# Files that belong to the weights in a folder: scores, pictures, extras and the modules after the transformer.
RESULTS = re.compile(
    r"results\.json|(geometry|tempscale)\.png|trainer_state\.json|adapter|mteb|\d_(Layer)?Pooling|\d_Dense|\d_Normalize"
)
# Files of an earlier model that loaders would prefer to the new weights, or apply on top of them. The folders onnx and openvino
# hold the earlier weights as graphs.
OLD_WEIGHTS = re.compile(
    r"model.*\.safetensors|model\.safetensors\.index\.json|pytorch_model(-.*)?\.bin.*|adapter_.*|onnx|openvino|tf_model\.h5"
    r"|flax_model\.msgpack"
)
# The same of its tokenizer and its processor.
OLD_TOKENIZER = re.compile(
    r"(tokenizer|added_tokens|special_tokens_map|processor_config|preprocessor_config|chat_template)\.json|chat_template\.jinja"
)


def is_old(name: str) -> bool:
    """Return whether a file or folder of this name, in a model's folder, would change a new model that is put there."""
    return bool(OLD_WEIGHTS.fullmatch(name) or OLD_TOKENIZER.fullmatch(name))


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Return all tensors of a folder by name, from model.safetensors or from its shards.

    Raises:
        InputError: if the folder has no weights, or if a weights file is missing, damaged, or lacks a tensor that the index
            lists for it.
    """
    listed = Files(str(folder)).weight_map()
    if listed is None:
        return read_tensors(Path(folder, WEIGHTS))
    shards = {name: read_tensors(Path(folder, name)) for name in sorted(set(listed.values()))}
    if missing := [key for key, name in listed.items() if key not in shards[name]]:
        raise InputError(
            f"{folder}: '{missing[0]}' is not in {listed[missing[0]]}, although {INDEX} lists it there; copy both files again"
        )
    return {key: shards[name][key] for key, name in listed.items()}


class Files:
    """The files of one model, in a local folder or on the Hub.

    Args:
        name: the folder, or the name of the model on the Hub.
        **hub: options of `cached_file`: revision, token, cache_dir, local_files_only, subfolder.
    """

    def __init__(self, name: str, **hub: Any):
        self.name, self.hub = name, hub

    def path(self, file: str) -> str | None:
        """Return the local path of a file, after a download if needed, or None if the model has no such file."""
        return optional_file(self.name, file, **self.hub)

    def json(self, file: str, kind: type = dict) -> Any:
        """Return the content of a JSON file, or None if there is no such file. The top-level value must be of type `kind`."""
        path = self.path(file)
        if path is None:
            return None
        return read_json(path, kind, f"model '{self.name}': {file}")

    def config(self, file: str, keys: dict[str, Allowed]) -> dict[str, Any]:
        """Return the content of a config file after `check_keys`, or {} if there is no such file."""
        config = self.json(file) or {}
        self.check_keys(file, config, keys)
        return config

    def check_keys(self, file: str, config: dict[str, Any], keys: dict[str, Allowed]) -> None:
        """Raise InputError for a key or a value in `config` that `keys` does not allow. Empty values are always allowed."""
        for key, value in sorted(config.items(), key=lambda item: item[0] not in keys):  # model_type says most
            allowed = keys.get(key, EMPTY)
            if not (value in allowed if isinstance(allowed, list) else isinstance(value, allowed) or value in EMPTY):
                shown = json.dumps(value)
                raise self.refused(f"{key} {shown if len(shown) < 100 else shown[:100] + ' ...'} in {file}")

    def tensors(self, folder: str) -> dict[str, Tensor]:
        """Return the weights of a module from its folder. Raise InputError if they are missing or no finite numbers."""
        for name in (WEIGHTS, "pytorch_model.bin"):
            if path := self.path(f"{folder}/{name}"):
                tensors = read_tensors(path, where := f"model '{self.name}': {folder}/{name}")
                for key, tensor in tensors.items():
                    if not tensor.is_floating_point():
                        raise InputError(f"{where}: '{key}' is stored as {tensor.dtype}; save it as floating-point numbers")
                    if not torch.isfinite(tensor).all():
                        raise InputError(f"{where}: '{key}' has NaN or infinite values; use undamaged weights")
                return tensors
        raise InputError(
            f"model '{self.name}': '{folder}' has no weights (model.safetensors or pytorch_model.bin); copy it again"
        )

    def weight_map(self) -> dict[str, str] | None:
        """Return the name of the shard that holds each tensor, or None if the weights are not in shards.

        Raises:
            InputError: if the index of the shards is not valid, or names a file outside the folder.
        """
        if self.path(WEIGHTS) or (index := self.json(INDEX)) is None:  # transformers prefers the single file
            return None
        listed = index.get("weight_map")
        if not isinstance(listed, dict) or not listed or not all(isinstance(shard, str) for shard in listed.values()):
            raise InputError(f"model '{self.name}': {INDEX} has no weight_map from tensors to files; {COPY_ANEW}")
        if outside := [shard for shard in listed.values() if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard)]:
            raise InputError(
                f"model '{self.name}': {INDEX} names '{outside[0]}', which is not a file in the folder; {COPY_ANEW}"
            )
        return listed

    def weight_files(self) -> dict[str, str]:
        """Return the local paths of the model's safetensors files by name, or {} if its weights have another format.

        Raises:
            InputError: if one of the shards is missing.
        """
        listed = self.weight_map()
        found = {name: self.path(name) for name in (sorted(set(listed.values())) if listed else [WEIGHTS])}
        if listed and (missing := [name for name, path in found.items() if path is None]):
            raise InputError(f"model '{self.name}': {missing[0]}, which {INDEX} names, does not exist; {COPY_ANEW}")
        return {name: path for name, path in found.items() if path is not None}

    def refused(self, what: str, mend: str = "load it with sentence-transformers") -> InputError:
        """Return the error for a feature of sentence-transformers that this package does not support."""
        return InputError(f"model '{self.name}': hf_embed does not support {what}; {mend}")
