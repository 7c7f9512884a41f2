"""The sentence-transformers files beside a checkpoint, written and read.

They are how sentence-transformers, mteb and `Encoder.from_pretrained` know pooling, max length, prompts and normalisation:

    modules.json  1_Pooling/  [1_LayerPooling/  2_Dense/  3_Normalize/]  sentence_bert_config.json
    config_sentence_transformers.json
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

from hf_embed.errors import InputError
from hf_embed.pooling import MULTI_LAYER, Dense, saved_pooling

DENSE_FILES = ("model.safetensors", "pytorch_model.bin")
# Our pooling names and sentence-transformers' flags.
ST_POOLING = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken", "weighted_mean": "weightedmean_tokens"}
ST_FLAGS = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]


def strip_prefix(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}


def write_sentence_transformers_files(encoder, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
    pooling, dimension = saved_pooling(encoder.pooling), encoder.width
    modules = [("", "Transformer")]

    def add(name: str, config: dict, tensors: dict[str, Tensor] | None = None) -> None:
        # Every module but layer pooling counts up: 1_Pooling, 2_Dense, 3_Normalize.
        path = f"{len([m for m in modules if m[1] != 'WeightedLayerPooling'])}_{name.removeprefix('Weighted')}"
        modules.append((path, name))
        Path(folder, path).mkdir()
        write_json(folder, f"{path}/config.json", config)
        if tensors:
            save_file(tensors, Path(folder, path, "model.safetensors"))

    if pooling in MULTI_LAYER:
        layers = encoder.config.num_hidden_layers
        weights = torch.zeros(layers)
        weights[-1] += 1
        weights[0 if pooling == "first_last" else max(layers - 2, 0)] += 1
        add(
            "WeightedLayerPooling",
            {"word_embedding_dimension": dimension, "layer_start": 1, "num_hidden_layers": layers},
            {"layer_weights": weights},
        )
    flag = ST_POOLING.get("cls" if pooling == "cls_mlp" else pooling, "mean_tokens")
    add("Pooling", {"word_embedding_dimension": dimension} | {f"pooling_mode_{f}": f == flag for f in ST_FLAGS})
    if pooling == "cls_mlp":
        saved = {}
        for shard in Path(folder).glob("model*.safetensors"):
            saved |= load_file(shard)
        add(
            "Dense",
            {"in_features": dimension, "out_features": dimension, "bias": True,
             "activation_function": "torch.nn.modules.activation.Tanh"},
            {f"linear.{name}": saved[f"pooler.dense.{name}"] for name in ("weight", "bias")},
        )  # fmt: skip
    dense = strip_prefix(encoder.state_dict() if state_dict is None else state_dict, "dense.")
    for i, layer in enumerate(encoder.dense):
        linear, activation = layer.linear, type(layer.activation)
        add(
            "Dense",
            {"in_features": linear.in_features, "out_features": linear.out_features, "bias": linear.bias is not None,
             "activation_function": f"{activation.__module__}.{activation.__qualname__}"},
            {name: tensor.detach().cpu().contiguous() for name, tensor in strip_prefix(dense, f"{i}.").items()},
        )  # fmt: skip
    if encoder.normalize:
        add("Normalize", {})

    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(modules)
    ]
    write_json(folder, "modules.json", listed)
    write_json(folder, "sentence_bert_config.json", {"max_seq_length": encoder.max_length, "do_lower_case": False})
    write_json(
        folder,
        "config_sentence_transformers.json",
        {"prompts": encoder.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def write_json(folder: str, name: str, content: object) -> None:
    Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_settings(name: str, backbone) -> dict:
    """What the sentence-transformers files beside a checkpoint say; {} where there are none."""
    modules = read_json(name, "modules.json")
    if modules is None:
        return {}
    settings = {"pooling": "mean", "normalize": False, "dense": []}
    layers = None
    for module in modules:
        kind, path = module["type"].rsplit(".", 1)[-1], module["path"]
        if settings["normalize"] and kind != "Normalize":
            raise InputError(f"model '{name}': the module {kind} ('{path}') behind Normalize cannot be represented here")
        if kind == "Pooling":
            settings["pooling"] = read_pooling(name, path)
        elif kind == "WeightedLayerPooling":
            layers = read_layers(name, path)
        elif kind == "Dense" and settings["pooling"] == "cls" and not settings["dense"] and is_pooler(name, path, backbone):
            settings["pooling"] = "cls_mlp"
        elif kind == "Dense":
            settings["dense"].append(read_dense(name, path, next(backbone.parameters())))
        elif kind == "Normalize":
            settings["normalize"] = True
        elif kind != "Transformer":
            raise InputError(f"model '{name}': the module {kind} ('{path}') cannot be represented here")
    if layers:
        settings["pooling"] = layers
    transformer = read_json(name, "sentence_bert_config.json") or {}
    if transformer.get("do_lower_case"):
        raise InputError(f"model '{name}': do_lower_case of sentence_bert_config.json cannot be represented here")
    if transformer.get("max_seq_length"):
        settings["max_length"] = transformer["max_seq_length"]
    config = read_json(name, "config_sentence_transformers.json") or {}
    prompts = config.get("prompts") or {}
    if prompts.get(config.get("default_prompt_name")):
        raise InputError(f"model '{name}': a default_prompt_name cannot be represented here")
    settings["prompts"] = {key: text for key, text in prompts.items() if text}
    return settings


def read_pooling(name: str, path: str) -> str:
    config = read_json(name, f"{path}/config.json")
    if not config.get("include_prompt", True):
        raise InputError(f"model '{name}': pooling without the prompt (include_prompt false) cannot be represented here")
    modes = [flag for flag in ST_FLAGS if config.get(f"pooling_mode_{flag}")]
    if mode := config.get("pooling_mode"):  # sentence-transformers >= 6
        modes = [mode] if isinstance(mode, str) else list(mode)
    names = {flag: ours for ours, flag in ST_POOLING.items()}
    names |= {"cls": "cls", "mean": "mean", "lasttoken": "last", "weightedmean": "weighted_mean"}
    if len(modes) != 1 or modes[0] not in names:
        raise InputError(f"model '{name}': pooling {' + '.join(modes)} cannot be represented here")
    return names[modes[0]]


def read_layers(name: str, path: str) -> str:
    config = read_json(name, f"{path}/config.json")
    weights = load_file(cached_file(name, f"{path}/model.safetensors"))["layer_weights"].tolist()
    used = {config["layer_start"] + i: w for i, w in enumerate(weights) if w}
    last = config["num_hidden_layers"]
    if len(set(used.values())) == 1:
        if set(used) == {1, last}:
            return "first_last"
        if set(used) == {last - 1, last}:
            return "top2"
    raise InputError(f"model '{name}': layer weights {weights} of '{path}' cannot be represented here")


def is_pooler(name: str, path: str, backbone) -> bool:
    """Whether a Dense module is the backbone's own pooler, which is how the MLP head is saved."""
    dense = getattr(getattr(backbone, "pooler", None), "dense", None)
    weights = cached_file(name, f"{path}/model.safetensors", _raise_exceptions_for_missing_entries=False)
    if dense is None or weights is None:
        return False
    if not read_json(name, f"{path}/config.json").get("activation_function", "").endswith(".Tanh"):
        return False
    tensors = load_file(weights)
    return torch.equal(tensors["linear.weight"].to(dense.weight), dense.weight)


def read_dense(name: str, path: str, like: Tensor) -> Dense:
    """A layer behind the pooling, in the precision and on the device of `like`."""
    config = read_json(name, f"{path}/config.json")
    files = [cached_file(name, f"{path}/{file}", _raise_exceptions_for_missing_entries=False) for file in DENSE_FILES]
    package, _, kind = config.get("activation_function", "torch.nn.modules.activation.Tanh").rpartition(".")
    activation = getattr(torch.nn, kind, None) if package.startswith("torch.nn.") else None
    ends = {config.get(key, "sentence_embedding") for key in ("module_input_name", "module_output_name")}
    if not any(files):
        raise InputError(f"model '{name}': the module Dense ('{path}') has no weights ({' or '.join(DENSE_FILES)})")
    if activation is None or ends - {"sentence_embedding", None}:
        raise InputError(f"model '{name}': the module Dense ('{path}'), {config}, cannot be represented here")
    linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    weights = load_file(files[0]) if files[0] else torch.load(files[1], map_location="cpu", weights_only=True)
    linear.load_state_dict(strip_prefix(weights, "linear."))
    return Dense(linear, activation()).to(like)


def read_json(name: str, file: str):
    path = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(path).read_text(encoding="utf-8")) if path else None
