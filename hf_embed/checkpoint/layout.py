"""The sentence-transformers files beside a checkpoint, written and read.

They are how sentence-transformers, mteb and `Encoder.from_pretrained` know pooling, max length, prompts and normalisation:

    modules.json  1_Pooling/  [1_LayerPooling/  2_Dense/  3_Normalize/]  sentence_bert_config.json
    config_sentence_transformers.json
"""

import json
import logging
from pathlib import Path, PurePosixPath

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

from hf_embed.errors import InputError
from hf_embed.pooling import MULTI_LAYER, Dense, saved_pooling

logger = logging.getLogger(__name__)

# Our pooling names and sentence-transformers' flags.
ST_POOLING = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken", "weighted_mean": "weightedmean_tokens"}
ST_FLAGS = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]
# sentence-transformers 6 calls them so.
ST_MODES = {"cls": "cls", "mean": "mean", "lasttoken": "last", "weightedmean": "weighted_mean"}

# sentence-transformers' modules that can be represented here, in the only order that can. Dropout may stand anywhere.
ORDER = ["Transformer", "WeightedLayerPooling", "Pooling", "Dense", "Normalize"]
# What sentence-transformers looks for, in its order.
TRANSFORMER_CONFIGS = [
    f"sentence_{kind}_config.json" for kind in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
]
EMPTY = [None, False, "", [], {}]
SENTENCE = {"module_input_name": ["sentence_embedding"], "module_output_name": ["sentence_embedding", None]}
WIDTH = {"word_embedding_dimension": int, "embedding_dimension": int}  # of no consequence
# The keys that a file or a module's config may have. With a type, the key is read here or no vector depends on it; with a
# list, these are the values that change nothing. Every other key that is not empty is refused: its meaning would be lost.
KEYS = {
    "modules.json": {"idx": int, "name": str, "path": str, "type": str, "kwargs": list},
    "config_sentence_transformers.json": {
        "__version__": object,
        "requirements": object,
        "model_type": ["SentenceTransformer"],
        "prompts": dict,
        "default_prompt_name": str,
        "similarity_fn_name": str,
        "truncate_dim": int,
    },
    "Transformer": {
        "max_seq_length": int,
        "do_lower_case": bool,
        "unpad_inputs": bool,  # another layout in memory, for flash attention
        "transformer_task": ["feature-extraction"],
        "modality_config": [{"text": {"method": "forward", "method_output_name": "last_hidden_state"}}],
        "module_output_name": ["token_embeddings"],
    },
    "WeightedLayerPooling": {"layer_start": int, "num_hidden_layers": int} | WIDTH,
    "Pooling": {"pooling_mode": str | list, "include_prompt": bool} | WIDTH | {f"pooling_mode_{f}": bool for f in ST_FLAGS},
    "Dense": {"in_features": int, "out_features": int, "bias": bool, "activation_function": str, "use_residual": bool}
    | SENTENCE,
    "Normalize": SENTENCE,
    "Dropout": {"dropout": object},
}


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
             "activation_function": f"{activation.__module__}.{activation.__qualname__}"}
            | ({"use_residual": True} if layer.residual is not None else {}),
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
        {"prompts": encoder.prompts, "default_prompt_name": encoder.default_prompt_name}
        | {"similarity_fn_name": encoder.similarity_fn_name}
        | ({"truncate_dim": encoder.truncate_dim} if encoder.truncate_dim else {}),
    )


def write_json(folder: str, name: str, content: object) -> None:
    Path(folder, name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ---- reading ----


class Files:
    """The files of a local folder, or of a model on the Hub (`hub`: revision, token, cache_dir, local_files_only)."""

    def __init__(self, name: str, **hub):
        self.name, self.hub = name, hub

    def path(self, file: str) -> str | None:
        return cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **self.hub)

    def json(self, file: str, kind: type = dict):
        """What a JSON file says, a `kind`; None without the file."""
        path = self.path(file)
        if path is None:
            return None
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"model '{self.name}': {file} is not JSON ({error}); correct it or copy it anew") from error
        if not isinstance(content, kind):
            raise InputError(f"model '{self.name}': {file} has no {kind.__name__} at its top; copy it anew")
        return content

    def config(self, kind: str, file: str) -> dict:
        """The config of a module, checked; {} without the file."""
        config = self.json(file) or {}
        self.check_keys(kind, file, config)
        return config

    def check_keys(self, kind: str, file: str, config: dict) -> None:
        for key, value in config.items():
            known = KEYS[kind].get(key, EMPTY)
            if not (value in known if isinstance(known, list) else isinstance(value, known) or value in EMPTY):
                shown = json.dumps(value)
                raise self.refused(f"{key} {shown if len(shown) < 100 else shown[:100] + ' ...'} of {file}")

    def tensors(self, path: str) -> dict[str, Tensor]:
        """The weights of a module."""
        if file := self.path(f"{path}/model.safetensors"):
            return load_file(file)
        if file := self.path(f"{path}/pytorch_model.bin"):
            return torch.load(file, map_location="cpu", weights_only=True)
        raise InputError(f"model '{self.name}': '{path}' has no weights (model.safetensors or pytorch_model.bin); copy it anew")

    def refused(self, what: str, mend: str = "load it with sentence-transformers") -> InputError:
        return InputError(f"model '{self.name}': {what} cannot be represented here; {mend}")


def read_settings(name: str, backbone, tokenizer=None, pooling: str | None = None, **hub) -> dict:
    """What the sentence-transformers files beside a checkpoint say, as arguments of `Encoder`.

    `pooling` replaces the folder's own, which then need not be one that can be represented here. Raises InputError for
    whatever else would make other vectors than sentence-transformers makes.
    """
    files = Files(name, **hub)
    modules = read_modules(files)
    if modules is None:
        return plain_settings(files, backbone, tokenizer, pooling)
    own = None
    try:
        own = read_pooling(files, modules, backbone)
    except InputError as error:
        if pooling is None:
            raise
        logger.warning(f"pooling {pooling} is taken as given, for the folder's own cannot be read: {error}")
    dense = [path for kind, path in modules if kind == "Dense"]
    if own == "cls_mlp":
        head, *dense = dense
        if pooling not in (None, "cls_mlp"):
            logger.warning(
                f"model '{name}': pooling {pooling} leaves out the layer '{head}', the head of its own pooling, cls_mlp"
            )
    for kind, path in modules:
        if kind == "Normalize":
            files.config(kind, f"{path}/config.json")
        if kind == "Dropout":
            logger.warning(f"model '{name}': the module Dropout ('{path}') is left out; it changes no vector but in training")
    settings = {"pooling": pooling or own, "normalize": any(kind == "Normalize" for kind, _ in modules)}
    settings["dense"] = read_dense_layers(files, dense, backbone)
    return settings | read_transformer(files, modules[0][1], backbone, tokenizer) | read_model_config(files)


def plain_settings(files: Files, backbone, tokenizer, pooling: str | None) -> dict:
    """Of a checkpoint without modules.json, for which sentence-transformers has defaults: mean pooling in most cases."""
    left = [file for file in ("1_Pooling/config.json", "config_sentence_transformers.json") if files.path(file)]
    if left and pooling is None:
        raise InputError(
            f"model '{files.name}': there is {left[0]}, but no modules.json, so sentence-transformers reads none of it; give "
            "pooling=, or copy modules.json too"
        )
    if left:
        logger.warning(f"model '{files.name}': {' and '.join(left)} are not read, for there is no modules.json")
    if pooling is not None:
        return {"pooling": pooling}
    if getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"model '{files.name}': sentence-transformers puts texts through its chat template, which cannot be represented "
            "here; give pooling= (for a decoder, last): texts are then taken as they are"
        )
    architectures = getattr(backbone.config, "architectures", None) or [""]
    if architectures[0].endswith("ForCausalLM") and getattr(backbone.config, "is_causal", True):
        logger.warning(f"model '{files.name}': a causal language model, so pooling is last, as in sentence-transformers")
        return {"pooling": "last"}
    return {}


def transformer_folder(name: str, **hub) -> dict[str, str]:
    """Where below `name` the transformer and its tokenizer are, for their from_pretrained: {} or {"subfolder": ...}."""
    modules = read_modules(Files(name, **hub))
    return {"subfolder": modules[0][1]} if modules and modules[0][1] else {}


def read_modules(files: Files) -> list[tuple[str, str]] | None:
    """(kind, folder) of every module, a Transformer first; None without modules.json. Raises InputError unless all are
    sentence-transformers' own, known here, and in an order that can be represented."""
    listed = files.json("modules.json", list)
    if listed is None:
        return None
    modules, before = [], None
    for module in listed:
        if not isinstance(module, dict) or not all(isinstance(module.get(key), str) for key in ("path", "type")):
            raise InputError(f"model '{files.name}': modules.json lists {module!r}, which has no path and type; copy it anew")
        files.check_keys("modules.json", "modules.json", module)
        path, (package, _, kind) = module["path"], module["type"].rpartition(".")
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise InputError(f"model '{files.name}': modules.json names '{path}', which is outside of the folder; correct it")
        if not package.startswith("sentence_transformers."):
            raise files.refused(f"the module {module['type']} ('{path}'), which is code of the model's own,")
        if kind not in KEYS:
            raise files.refused(f"the module {kind} ('{path}')")
        modules.append((kind, path))
        if sum(module.get("name") == other.get("name") for other in listed if isinstance(other, dict)) > 1:
            raise files.refused(f"the module {kind} ('{path}'), whose name '{module.get('name')}' another has too,")
        if kind == "Dropout":
            continue
        twice = kind == before and kind not in ("Dense", "Normalize")
        if twice or (before and ORDER.index(kind) < ORDER.index(before)):
            raise files.refused(f"the module {kind} ('{path}') behind {before}")
        before = kind
    if not modules or modules[0][0] != "Transformer":
        raise files.refused("a modules.json whose first module is no Transformer")
    return modules


def read_transformer(files: Files, path: str, backbone, tokenizer) -> dict:
    """max_length, as sentence-transformers finds it. Raises InputError where it would tokenize otherwise."""
    prefix = f"{path}/" if path else ""
    found = ((prefix + file, files.json(prefix + file)) for file in TRANSFORMER_CONFIGS)
    file, config = next(((file, config) for file, config in found if config), (prefix + TRANSFORMER_CONFIGS[0], {}))
    modalities = config.get("modality_config")
    if isinstance(modalities, dict) and "message" in modalities:
        raise files.refused(f"the chat template that texts go through by modality_config of {file}")
    for key, value in config.items():  # arguments of loading; sentence-transformers heeds no trust_remote_code from a file
        if key.endswith(("_args", "_kwargs")) and isinstance(value, dict):
            config[key] = {name: argument for name, argument in value.items() if name != "trust_remote_code"}
    files.check_keys("Transformer", file, config)
    if tokenizer is None:
        return {}
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float):
        raise InputError(
            f"model '{files.name}': model_max_length {longest!r} of tokenizer_config.json is no number; correct it"
        )
    if config.get("do_lower_case") and not lower_cases(tokenizer):
        raise files.refused(
            f"do_lower_case of {file}", "set it in tokenizer_config.json, or load it with sentence-transformers"
        )
    if config.get("max_seq_length"):
        return {"max_length": config["max_seq_length"]}
    positions = getattr(backbone.config, "max_position_embeddings", None) or -1  # XLNet says -1
    return {"max_length": int(min(longest, positions) if positions > 0 else longest)}


def lower_cases(tokenizer) -> bool:
    sample = "Ein ÄRGER in İstanbul"
    return tokenizer.tokenize(sample) == tokenizer.tokenize(sample.lower())


def read_model_config(files: Files) -> dict:
    file = "config_sentence_transformers.json"
    config = files.config(file, file)
    if config.get("requirements"):
        logger.warning(f"model '{files.name}' asks for {json.dumps(config['requirements'])}, which is not checked here")
    prompts = config.get("prompts") or {}
    if not all(isinstance(text, str | None) for text in prompts.values()):
        raise InputError(f"model '{files.name}': prompts {prompts!r} are no texts by name; correct {file}")
    prompts = {key: text or "" for key, text in prompts.items()}
    return {
        # sentence-transformers always has these two, empty.
        "prompts": {key: text for key, text in prompts.items() if text or key not in ("query", "document")},
        "default_prompt_name": config.get("default_prompt_name"),
        "similarity_fn_name": config.get("similarity_fn_name") or "cosine",
        "truncate_dim": config.get("truncate_dim"),
    }


def read_pooling(files: Files, modules: list[tuple[str, str]], backbone) -> str:
    """Our name for what the modules up to the first Dense do."""
    mend = "give pooling=, or load it with sentence-transformers"
    paths = dict(reversed(modules))  # the first of each kind
    if "Pooling" not in paths:
        raise files.refused("a modules.json without Pooling", mend)
    file = f"{paths['Pooling']}/config.json"
    config = files.config("Pooling", file)
    if not config.get("include_prompt", True):
        raise files.refused("pooling without the prompt (include_prompt false)", mend)
    modes = config.get("pooling_mode") or [flag for flag in ST_FLAGS if config.get(f"pooling_mode_{flag}")] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    names = {flag: ours for ours, flag in ST_POOLING.items()} | ST_MODES
    if len(modes) != 1 or modes[0] not in names:
        raise files.refused(f"pooling {' + '.join(modes)}", mend)
    pooling = names[modes[0]]
    if "WeightedLayerPooling" in paths:
        layers = read_layers(files, paths["WeightedLayerPooling"], backbone, mend)
        if layers and pooling != "mean":
            raise files.refused(f"pooling {pooling} of the layers of '{paths['WeightedLayerPooling']}'", mend)
        pooling = layers or pooling
    if pooling == "cls" and "Dense" in paths and is_pooler(files, paths["Dense"], backbone):
        return "cls_mlp"
    return pooling


def read_layers(files: Files, path: str, backbone, mend: str) -> str | None:
    """Our name for a mean over layers; None if it is the last layer alone."""
    file = f"{path}/config.json"
    config, last = files.config("WeightedLayerPooling", file), backbone.config.num_hidden_layers
    weights = files.tensors(path)["layer_weights"].tolist()
    first = config.get("layer_start", 4) or 0
    used = {first + i: weight for i, weight in enumerate(weights) if weight}
    names = {(last,): None, (last - 1, last): "top2", (1, last): "first_last"}
    fits = config.get("num_hidden_layers", 12) == last == first + len(weights) - 1
    if not fits or len(set(used.values())) != 1 or tuple(used) not in names:
        raise files.refused(f"layer weights {weights} of '{path}'", mend)
    if not backbone.config.output_hidden_states:
        raise files.refused(f"'{path}' beside a config.json without output_hidden_states, by which it has no effect,", mend)
    return names[tuple(used)]


def has_mlp_head(name: str, backbone) -> bool:
    """Whether the folder's own pooling is cls_mlp."""
    files = Files(name)
    modules = read_modules(files)
    try:
        return bool(modules) and read_pooling(files, modules, backbone) == "cls_mlp"
    except InputError:
        return False


def is_pooler(files: Files, path: str, backbone) -> bool:
    """Whether a Dense module is the backbone's own pooler, which is how the MLP head is saved."""
    pooler = getattr(getattr(backbone, "pooler", None), "dense", None)
    dense = read_dense(files, path)
    if pooler is None or dense.residual is not None or not isinstance(dense.activation, nn.Tanh):
        return False
    own, saved = pooler.state_dict(), dense.linear.state_dict()
    return own.keys() == saved.keys() and all(torch.equal(saved[key].to(own[key]), own[key]) for key in own)


def read_dense_layers(files: Files, paths: list[str], backbone) -> list[Dense]:
    """The layers behind the pooling, in the precision and on the device of the backbone."""
    layers, width = [], getattr(backbone.config, "hidden_size", None)
    for path in paths:
        layer = read_dense(files, path)
        if width is not None and layer.linear.in_features != width:
            raise files.refused(f"the module Dense ('{path}'), which takes {layer.linear.in_features} numbers and not {width},")
        width = layer.linear.out_features
        layers.append(layer.to(next(backbone.parameters())))
    return layers


def read_dense(files: Files, path: str) -> Dense:
    file = f"{path}/config.json"
    config = files.config("Dense", file)
    package, _, kind = (config.get("activation_function", "torch.nn.modules.activation.Tanh") or "").rpartition(".")
    activation = getattr(nn, kind, None) if f"{package}.".startswith("torch.nn.") else None
    tensors = files.tensors(path)
    try:
        dense = Dense(
            nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True)),
            activation(),
            residual=config.get("use_residual", False),
        )
        dense.load_state_dict(tensors)
    except (TypeError, KeyError, RuntimeError) as error:
        sizes = {name: list(tensor.shape) for name, tensor in tensors.items()}
        raise files.refused(f"the module Dense ('{path}'), {json.dumps(config)} with weights {sizes},") from error
    return dense
