"""A finished encoder to a plain folder, and back.

The folder is an ordinary checkpoint (`AutoModel.from_pretrained`, no code of ours), and beside it the files by which
sentence-transformers, mteb and `Encoder.from_pretrained` know pooling, max length, prompts and normalisation:

    config.json  model.safetensors  tokenizer.json ...   the checkpoint
    modules.json  1_Pooling/  [1_LayerPooling/  2_Dense/  3_Normalize/]  sentence_bert_config.json
    config_sentence_transformers.json
    README.md                                            which pooling to take, and how to load

Nothing is put in place before texts encoded through every loader agree with the encoder itself.
"""

import contextlib
import copy
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from hf_embed.card import write_card
from hf_embed.errors import InputError
from hf_embed.pooling import MULTI_LAYER, Dense, pool, saved_pooling
from hf_embed.tempscale import TempScaleConfig, applied_tempscale, apply_tempscale, fold_tempscale, remove_tempscale
from hf_embed.tempscale.fold import check_foldable, folded

TOLERANCE = 1e-5
DENSE_FILES = ("model.safetensors", "pytorch_model.bin")
PROBES = [
    "A cat sleeps on the warm windowsill.",
    "Rain.",
    "The committee, which had met twice that week without agreeing on anything at all, postponed the vote once more.",
]
# Our pooling names and sentence-transformers' flags.
ST_POOLING = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken", "weighted_mean": "weightedmean_tokens"}
ST_FLAGS = ["cls_token", "max_tokens", "mean_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"]


# What an earlier save may have left that loaders would take before, or put on top of, the new weights.
STALE = ["model*.safetensors", "model.safetensors.index.json", "pytorch_model.bin*", "pytorch_model-*.bin", "adapter_*"]


class ExportError(RuntimeError):
    """The saved folder would not give the encoder's own vectors."""


def save_encoder(
    encoder, folder: str, verify: bool = True, state_dict: dict[str, Tensor] | None = None, allow_runtime: bool = False
) -> None:
    """Write `encoder` to `folder` as a plain checkpoint; LoRA weights are merged into a copy first, TempScale is folded.

    `state_dict` replaces the encoder's own (FSDP gathers it). Raises ExportError, and leaves the folder as it was, if
    AutoModel or sentence-transformers (when installed) give other vectors, by more than 1e-5 of the largest component; and
    InputError if TempScale cannot be folded. With `allow_runtime` it then stays out of the weights: this package's loader
    applies it, others do not, and the card says so.
    """
    runtime = needs_runtime(encoder, allow_runtime)
    made = not os.path.isdir(folder)
    os.makedirs(folder, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
            write_checkpoint(encoder, new, state_dict, fold=not runtime)
            write_sentence_transformers_files(encoder, new, state_dict)
            if verify and not runtime:  # other loaders do not know it
                verify_folder(encoder, new)
            names = set(os.listdir(new))
            for name in names:
                target = Path(folder, name)
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(Path(new, name), target)
            for path in [path for pattern in STALE for path in Path(folder).glob(pattern) if path.name not in names]:
                path.unlink()
        write_card(encoder, folder)
    except BaseException:
        if made:
            with contextlib.suppress(OSError):  # not empty: someone else writes there
                os.rmdir(folder)
        raise


def write_checkpoint(encoder, folder: str, state_dict: dict[str, Tensor] | None = None, fold: bool = True) -> None:
    backbone, settings = encoder.backbone, {}
    scaling = applied_tempscale(backbone)
    if encoder.base is not backbone:  # PEFT: merge a copy, the one in training goes on as it is
        backbone = copy.deepcopy(backbone)
        if state_dict is not None:
            backbone.load_state_dict(strip_prefix(state_dict, "backbone."), strict=False)
            state_dict = None
        if scaling:
            remove_tempscale(backbone)
        backbone = backbone.merge_and_unload()
        if scaling and fold:
            fold_tempscale(backbone, scaling)
        elif scaling:
            backbone.config.temp_scale = scaling.to_dict()
    else:
        state_dict = state_dict and strip_prefix(state_dict, "backbone.")
        if scaling and fold:
            tensors, settings = folded(backbone, state_dict)
            state_dict = (state_dict or backbone.state_dict()) | tensors
    with config_for_saving(backbone.config, encoder.pooling, settings):
        backbone.save_pretrained(folder, state_dict=state_dict)
    tokenizer = copy.deepcopy(encoder.tokenizer)
    tokenizer.model_max_length = encoder.max_length
    tokenizer.padding_side = "right"  # absolute positions and the card's "last" count from the left
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def config_for_saving(config, pooling: str, settings: dict):
    """The config with `settings`. Poolings over several layers need the model to hand them out, in every loader."""
    settings = {"output_hidden_states": config.output_hidden_states or pooling in MULTI_LAYER} | settings
    before = {key: getattr(config, key) for key in settings}
    try:
        for key, value in settings.items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def needs_runtime(encoder, allowed: bool) -> bool:
    """Whether TempScale has to stay out of the weights. Raises InputError if that is not allowed."""
    if applied_tempscale(encoder.backbone) is None:
        return False
    try:
        check_foldable(encoder.backbone)
    except InputError as error:
        if not allowed:
            raise InputError(f"{error}; save_pretrained(allow_runtime=True) saves it for loaders of hf_embed alone") from error
        return True
    return False


def strip_prefix(state_dict: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}


def write_sentence_transformers_files(encoder, folder: str, state_dict: dict[str, Tensor] | None = None) -> None:
    pooling, dimension = saved_pooling(encoder.pooling), encoder.config.hidden_size
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


def verify_folder(encoder, folder: str) -> None:
    """Raise ExportError unless AutoModel and sentence-transformers give the encoder's vectors from `folder`."""
    expected = encoder.encode(PROBES, convert_to_tensor=True).cpu()
    dtype = next(encoder.backbone.parameters()).dtype
    loaded = {"AutoModel": through_automodel(encoder, folder, dtype)}
    if importlib.util.find_spec("sentence_transformers"):
        loaded["SentenceTransformer"] = through_sentence_transformers(encoder, folder, dtype)
    # Half precision rounds differently for every padding; the weights are what is checked then.
    tolerance = TOLERANCE if dtype in (torch.float32, torch.float64) else 2e-2
    for loader, vectors in loaded.items():
        difference = ((vectors - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
        if not difference <= tolerance:  # also catches NaN
            raise ExportError(
                f"not saved: {loader} gives vectors that differ by {difference:.1e} from the trained model's "
                f"(pooling {encoder.pooling}, {type(encoder.base).__name__}); tolerance {tolerance:.0e}"
            )


def through_automodel(encoder, folder: str, dtype: torch.dtype) -> Tensor:
    with quiet():
        model = AutoModel.from_pretrained(folder, dtype=dtype).to(encoder.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.padding_side = "right"
    batch = tokenizer(PROBES, padding=True, truncation=True, return_tensors="pt").to(encoder.device)
    pooling = saved_pooling(encoder.pooling)
    with torch.inference_mode():
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        if pooling == "cls_mlp":
            vectors = output.pooler_output
        else:
            layers = output.hidden_states if pooling in MULTI_LAYER else (output[0],)
            vectors = pool(pooling, layers, batch["attention_mask"])
        for layer in read_settings(folder, model).get("dense", []):
            vectors = layer(vectors)
    vectors = vectors.float()
    return (F.normalize(vectors, dim=-1) if encoder.normalize else vectors).cpu()


def through_sentence_transformers(encoder, folder: str, dtype: torch.dtype) -> Tensor:
    from sentence_transformers import SentenceTransformer

    with quiet():
        model = SentenceTransformer(folder, device=str(encoder.device), model_kwargs={"dtype": dtype})
    return model.encode(PROBES, convert_to_tensor=True, show_progress_bar=False).float().cpu()


@contextlib.contextmanager
def quiet():
    """Loading for a check says nothing."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def load_encoder(cls, name: str, pooling=None, max_length=None, normalize=None, **model_kwargs):
    """See Encoder.from_pretrained. Raises InputError if the model cannot be reached or has a module unknown here."""
    model_kwargs = {"dtype": "auto"} | model_kwargs
    try:
        backbone = AutoModel.from_pretrained(name, **model_kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise unreachable(name, error) from error
    if getattr(backbone, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{name}: holds an adapter, not a model; merge it first (PEFT's merge_and_unload, then save_pretrained)"
        )
    entry = getattr(backbone.config, "temp_scale", None)
    if entry and not entry.get("folded"):
        del backbone.config.temp_scale
        apply_tempscale(backbone, TempScaleConfig.from_dict(entry))
    settings = read_settings(name, backbone)
    for key, value in {"pooling": pooling, "max_length": max_length, "normalize": normalize}.items():
        if value is not None:
            settings[key] = value
    return cls(backbone, tokenizer, **settings).eval()


def unreachable(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return InputError(
        f"model '{name}' cannot be loaded: {reason}. Give a local folder that holds config.json, weights and tokenizer; "
        "a recipe without arguments runs offline on the built-in quickstart encoder"
    )


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
