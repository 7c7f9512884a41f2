"""The modules of a sentence-transformers model, as a list that is made from an encoder or read from a folder.

Their files tell sentence-transformers, mteb and `Encoder.from_pretrained` the pooling, max length, prompts and normalization:

    modules.json  1_Pooling/  [1_LayerPooling/  2_Dense/  3_Normalize/]  sentence_bert_config.json
    config_sentence_transformers.json
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, Self, TypeVar, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_embed.checkpoint.model_files import Allowed, Files
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.files.safe_files import write_json
from hf_embed.pooling import POOLINGS, Dense, saved_pooling

# The pooling flags of sentence-transformers, in the order of its own files. All of them are written.
FLAGS = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
TANH = "torch.nn.modules.activation.Tanh"
# The config files that sentence-transformers looks for, in its order.
TRANSFORMER_CONFIGS = [
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
MODEL_CONFIG = "config_sentence_transformers.json"
# The keys that each file may have. A type means that the key is read here, or that no vector depends on it. A list holds the
# values that have no effect. Every other key that is not empty is refused, because its meaning would be lost.
MODULES_KEYS: dict[str, Allowed] = {"idx": int, "name": str, "path": str, "type": str, "kwargs": list}
MODEL_KEYS: dict[str, Allowed] = {
    "__version__": object,
    "requirements": object,
    "model_type": ["SentenceTransformer"],
    "prompts": dict,
    "default_prompt_name": str,
    "similarity_fn_name": str,
    "truncate_dim": int,
}
SENTENCE_KEYS: dict[str, Allowed] = {
    "module_input_name": ["sentence_embedding"],
    "module_output_name": ["sentence_embedding", None],
}
WIDTH_KEYS: dict[str, Allowed] = {"word_embedding_dimension": int, "embedding_dimension": int}  # no effect on the vectors


@dataclass
class Module:
    """One module as modules.json lists it: its folder below the model's folder, its config.json and its weights.

    A module that `read_modules` returns has neither config nor weights until `read` is called.
    """

    kind: ClassVar[str]
    keys: ClassVar[dict[str, Allowed]]  # the keys that its config.json may have
    has_weights: ClassVar[bool] = False
    needs_config: ClassVar[bool] = True

    path: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def write(self, folder: str) -> None:
        """Write config.json and the weights to the module's own folder below `folder`."""
        target = Path(folder, self.path)
        target.mkdir()
        write_json(target / "config.json", self.config)
        if self.tensors:
            tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.tensors.items()}
            save_file(tensors, target / "model.safetensors")

    def read(self, files: Files) -> Self:
        """Read config.json and the weights. Raise InputError if a file is missing or a setting is not supported."""
        if self.needs_config and files.path(f"{self.path}/config.json") is None:
            raise InputError(f"model '{files.name}': {self.path}/config.json is missing; copy the model again")
        self.config = files.config(f"{self.path}/config.json", self.keys)
        if self.has_weights:
            self.tensors = files.tensors(self.path)
        return self


class TransformerModule(Module):
    """The transformer itself. In folders that this package writes, it is at the top."""

    kind = "Transformer"
    keys = {
        "max_seq_length": int,
        "do_lower_case": bool,
        "unpad_inputs": bool,  # only another memory layout, for flash attention
        "transformer_task": ["feature-extraction"],
        "modality_config": [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}],
        "module_output_name": ["token_embeddings"],
    }
    file: str = TRANSFORMER_CONFIGS[0]  # the path of the file of `config`, below the model's folder

    def write(self, folder: str) -> None:
        """Write the settings. Their file is not called config.json, because that is the model's own config."""
        write_json(Path(folder, self.file), self.config)

    def read(self, files: Files) -> Self:
        """Read the settings as sentence-transformers finds them. Raise InputError for a chat template or an unknown key."""
        prefix = f"{self.path}/" if self.path else ""
        found = ((prefix + file, files.json(prefix + file)) for file in TRANSFORMER_CONFIGS)
        nothing: tuple[str, dict[str, Any]] = (prefix + TRANSFORMER_CONFIGS[0], {})
        self.file, self.config = next(((file, config) for file, config in found if config), nothing)
        modalities = self.config.get("modality_config")
        if isinstance(modalities, dict) and "message" in modalities:
            raise files.refused(f"the chat template that modality_config in {self.file} applies to texts")
        for key, value in self.config.items():  # sentence-transformers ignores trust_remote_code in this file
            if key.endswith(("_args", "_kwargs")) and isinstance(value, dict):
                self.config[key] = {name: argument for name, argument in value.items() if name != "trust_remote_code"}
        files.check_keys(self.file, self.config, self.keys)
        return self


class LayerPoolingModule(Module):
    """A weighted mean of the hidden states of several layers, computed before the pooling."""

    kind = "WeightedLayerPooling"
    keys = {"layer_start": int, "num_hidden_layers": int} | WIDTH_KEYS
    has_weights = True

    @classmethod
    def of(cls, width: int, depth: int, layers: tuple[int, int]) -> Self:
        """Return the module that averages two `layers`, numbered as in `Pooling`, of a model with `depth` layers."""
        weights = torch.zeros(depth)
        for number in layer_numbers(layers, depth):
            weights[max(number, 1) - 1] += 1
        config = {"word_embedding_dimension": width, "layer_start": 1, "num_hidden_layers": depth}
        return cls(config=config, tensors={"layer_weights": weights})

    def layers(self, files: Files, backbone: PreTrainedModel, mend: str) -> tuple[int, int] | None:
        """Return the two layers that are averaged, numbered as in `Pooling`, or None if only the last layer is used.

        Raises:
            InputError: if no pooling of this package has such weights, or if config.json lacks output_hidden_states, without
                which sentence-transformers skips the module. `mend` is the advice in the message.
        """
        depth: int = backbone.config.num_hidden_layers
        weights = self.tensors["layer_weights"].tolist()
        first = self.config.get("layer_start", 4) or 0
        used = tuple(first + i for i, weight in enumerate(weights) if weight)
        pairs = [entry.layers for entry in POOLINGS.values() if entry.layers and layer_numbers(entry.layers, depth) == used]
        equal = len({weight for weight in weights if weight}) == 1
        fits = self.config.get("num_hidden_layers", 12) == depth == first + len(weights) - 1
        if not (fits and equal and (pairs or used == (depth,))):
            raise files.refused(f"layer weights {weights} of '{self.path}'", mend)
        if not backbone.config.output_hidden_states:
            raise InputError(
                f"model '{files.name}': '{self.path}' has no effect, because config.json does not set output_hidden_states; "
                f"{mend}"
            )
        return pairs[0] if pairs else None


class PoolingModule(Module):
    """The pooling, which turns the hidden states of a text's tokens into one vector."""

    kind = "Pooling"
    keys = {"pooling_mode": str | list, "include_prompt": bool} | WIDTH_KEYS | {f"pooling_mode_{flag}": bool for flag in FLAGS}

    def modes(self) -> list[str]:
        """Return the pooling modes: flags, or names of sentence-transformers 6. Several modes mean concatenated vectors."""
        flags = [flag for flag in FLAGS if self.config.get(f"pooling_mode_{flag}")]
        modes = self.config.get("pooling_mode") or flags or ["mean"]
        return [modes] if isinstance(modes, str) else modes


class DenseModule(Module):
    """A dense layer after the pooling."""

    kind = "Dense"
    keys = {"in_features": int, "out_features": int, "bias": bool, "activation_function": str, "use_residual": bool}
    keys |= SENTENCE_KEYS
    has_weights = True

    @classmethod
    def of(cls, layer: Dense, tensors: dict[str, Tensor]) -> Self:
        """Return the module of a layer with its tensors: linear.weight, linear.bias, residual.weight."""
        linear, activation = layer.linear, type(layer.activation)
        config = {
            "in_features": linear.in_features,
            "out_features": linear.out_features,
            "bias": linear.bias is not None,
            "activation_function": f"{activation.__module__}.{activation.__qualname__}",
        }
        return cls(config=config | ({"use_residual": True} if layer.residual is not None else {}), tensors=tensors)

    def layer(self, files: Files) -> Dense:
        """Build the layer. Raise InputError if the config and the weights do not fit together."""
        package, _, kind = (self.config.get("activation_function", TANH) or "").rpartition(".")
        activation = getattr(nn, kind, None) if f"{package}.".startswith("torch.nn.") else None
        taken: Any = self.config.get("in_features")
        made: Any = self.config.get("out_features")
        try:
            weight = self.tensors["linear.weight"]
            if not isinstance(activation, type) or weight.shape != (made, taken):  # before the layer is allocated
                raise TypeError("the activation is not from torch.nn, or the sizes differ from those of the weights")
            linear = nn.Linear(taken, made, bias=self.config.get("bias", True))
            dense = Dense(linear, activation(), residual=self.config.get("use_residual", False))
            dense.load_state_dict(self.tensors)
            if dense.eval()(weight.new_zeros(1, taken, dtype=torch.float32)).shape != (1, made):
                raise TypeError("the activation changes the width")
        except Exception as error:  # the activation can be any class of torch.nn
            sizes = {name: list(tensor.shape) for name, tensor in self.tensors.items()}
            raise files.refused(
                f"the module Dense ('{self.path}') with {json.dumps(self.config)} and weights {sizes}"
            ) from error
        return dense


class NormalizeModule(Module):
    """The normalization of vectors to unit length."""

    kind = "Normalize"
    keys = SENTENCE_KEYS
    needs_config = False


class DropoutModule(Module):
    """Dropout, which changes vectors only in training. This package leaves it out, wherever it stands in the list."""

    kind = "Dropout"
    keys = {"dropout": object}
    needs_config = False


# The supported modules, in the only supported order. Dropout may stand anywhere.
KINDS: dict[str, type[Module]] = {
    module.kind: module
    for module in (TransformerModule, LayerPoolingModule, PoolingModule, DenseModule, NormalizeModule, DropoutModule)
}
ORDER = list(KINDS)
Kind = TypeVar("Kind", bound=Module)


def layer_numbers(layers: tuple[int, int], depth: int) -> tuple[int, int]:
    """Return the numbers of two layers without negative indices. In a model with `depth` layers, -1 is layer `depth`.

    >>> layer_numbers((1, -1), depth=12), layer_numbers((-2, -1), depth=12)
    ((1, 12), (11, 12))
    """
    one, other = (layer if layer >= 0 else depth + 1 + layer for layer in layers)
    return one, other


def of_kind(modules: Sequence[Module], kind: type[Kind]) -> list[Kind]:
    """Return the modules of one kind."""
    return [module for module in modules if isinstance(module, kind)]


def strip_prefix(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with `prefix`, and remove `prefix` from the names."""
    return {name.removeprefix(prefix): tensor for name, tensor in state_dict.items() if name.startswith(prefix)}


# ---- writing ----


def modules_of(encoder: Encoder, tensors: dict[str, Tensor]) -> list[Module]:
    """Return the modules of an encoder, each with its folder.

    For example, with mean pooling, a dense layer and normalization:

        TransformerModule    ""               {"max_seq_length": 512, "do_lower_case": False}
        PoolingModule        "1_Pooling"      {"word_embedding_dimension": 768, "pooling_mode_mean_tokens": True, ...}
        DenseModule          "2_Dense"        {"in_features": 768, "out_features": 256, ...}, and its weights
        NormalizeModule      "3_Normalize"    {}

    Args:
        encoder: the encoder to save, or to describe in a model card.
        tensors: the tensors of the dense layers, `dense.0.linear.weight` and so on. If the pooling is the model's own pooler,
            also `pooler.dense.weight` and `pooler.dense.bias`. {} if the caller needs only the folders.
    """
    pooling, width = POOLINGS[saved_pooling(encoder.pooling)], encoder.width
    modules: list[Module] = [TransformerModule(config={"max_seq_length": encoder.max_length, "do_lower_case": False})]
    if pooling.layers is not None:
        modules.append(LayerPoolingModule.of(width, encoder.config.num_hidden_layers, pooling.layers))
    flags = {f"pooling_mode_{flag}": flag == pooling.flag for flag in FLAGS}
    modules.append(PoolingModule(config={"word_embedding_dimension": width} | flags))
    if pooling.model_pooler:
        config = {"in_features": width, "out_features": width, "bias": True, "activation_function": TANH}
        pooler = {f"linear.{name}": tensor for name, tensor in strip_prefix(tensors, "pooler.dense.").items()}
        modules.append(DenseModule(config=config, tensors=pooler))
    for i, layer in enumerate(cast("list[Dense]", list(encoder.dense))):
        modules.append(DenseModule.of(layer, strip_prefix(tensors, f"dense.{i}.")))
    if encoder.normalize:
        modules.append(NormalizeModule())
    counted = 1
    for module in modules[1:]:
        module.path = f"{counted}_{module.kind.removeprefix('Weighted')}"
        counted += not isinstance(module, LayerPoolingModule)  # it comes before the pooling: 1_LayerPooling, 1_Pooling, 2_Dense
    return modules


def write_sentence_transformers_files(encoder: Encoder, folder: str, tensors: dict[str, Tensor]) -> None:
    """Write the modules and configs beside the checkpoint in `folder`. `tensors` as for `modules_of`."""
    modules = modules_of(encoder, tensors)
    for module in modules:
        module.write(folder)
    listed = [
        {"idx": i, "name": str(i), "path": module.path, "type": f"sentence_transformers.models.{module.kind}"}
        for i, module in enumerate(modules)
    ]
    write_json(Path(folder, "modules.json"), listed)
    config = {
        "prompts": encoder.prompts,
        "default_prompt_name": encoder.default_prompt_name,
        "similarity_fn_name": encoder.similarity_fn_name,
    }
    write_json(Path(folder, MODEL_CONFIG), config | ({"truncate_dim": encoder.truncate_dim} if encoder.truncate_dim else {}))


# ---- reading ----


def read_modules(files: Files) -> list[Module] | None:
    """Return the modules that modules.json lists, the transformer first, or None if there is no modules.json.

    The configs and weights of the modules are not read yet.

    Raises:
        InputError: if a module is not part of sentence-transformers or not supported here, if two modules have the same name,
            or if the order is not supported.
    """
    listed = files.json("modules.json", list)
    if listed is None:
        return None
    modules = [read_module(files, entry) for entry in listed]
    names = [entry.get("name") for entry in listed]
    for module, name in zip(modules, names):
        if names.count(name) > 1:
            raise files.refused(f"the module {module.kind} ('{module.path}') with the name '{name}' of another module")
    ordered = [module for module in modules if not isinstance(module, DropoutModule)]
    for module, following in pairwise(ordered):
        repeats = following.kind == module.kind and not isinstance(module, DenseModule | NormalizeModule)
        if repeats or ORDER.index(following.kind) < ORDER.index(module.kind):
            raise files.refused(f"the module {following.kind} ('{following.path}') after {module.kind}")
    if not modules or not isinstance(modules[0], TransformerModule):
        raise files.refused("a modules.json whose first module is not a Transformer")
    return modules


def read_module(files: Files, entry: Any) -> Module:
    """Return the module of one entry of modules.json. Raise InputError if the entry is not valid or not supported."""
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("path", "type")):
        raise InputError(f"model '{files.name}': modules.json lists {entry!r}, which lacks a path or a type; copy it again")
    files.check_keys("modules.json", entry, MODULES_KEYS)
    path, (package, _, kind) = entry["path"], entry["type"].rpartition(".")
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        raise InputError(f"model '{files.name}': modules.json names '{path}', which is outside the folder; correct it")
    if not package.startswith("sentence_transformers."):
        raise files.refused(f"the module {entry['type']} ('{path}'), which is the model's own code")
    if kind not in KINDS:
        raise files.refused(f"the module {kind} ('{path}')")
    return KINDS[kind](path)
