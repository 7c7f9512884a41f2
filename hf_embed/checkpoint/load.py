"""A folder or a model on the Hub to an `Encoder`; weights and tokenizer files that are not whole are refused."""

import re

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import cached_file

from hf_embed.checkpoint.layout import read_json, read_settings
from hf_embed.errors import InputError
from hf_embed.forward_check import influences
from hf_embed.tempscale import TempScaleConfig, apply_tempscale
from hf_embed.text_models import loading_class

# What a safetensors file may hold of a model that is not quantised. Transformers would read int8 as if it were float.
PLAIN_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}
MEND = "take the whole folder that save_pretrained wrote"


def load_encoder(cls, name: str, pooling=None, max_length=None, normalize=None, new_pooler: bool = False, **model_kwargs):
    """See Encoder.from_pretrained. With `new_pooler` the weights need not hold a pooler: it is trained from nothing.

    Raises:
        InputError: the model cannot be reached; weights or tokenizer files are missing, broken or of another model; a module
            of sentence-transformers that is unknown here.
    """
    backbone, missing = load_model(name, **model_kwargs)
    tokenizer = load_tokenizer(name)
    entry = getattr(backbone.config, "temp_scale", None)
    if entry and not entry.get("folded"):
        del backbone.config.temp_scale
        apply_tempscale(backbone, TempScaleConfig.from_dict(entry))
    settings = read_settings(name, backbone)
    for key, value in {"pooling": pooling, "max_length": max_length, "normalize": normalize}.items():
        if value is not None:
            settings[key] = value
    encoder = cls(backbone, tokenizer, **settings).eval()
    if new_pooler:
        missing = [key for key in missing if not key.startswith("pooler.")]
    if random := influences(encoder, missing):
        raise InputError(f"model '{name}': its weights file lacks {listed(random)}, which would be random; {MEND}")
    return encoder


def load_model(name: str, auto_class: str | None = None, **kwargs) -> tuple[PreTrainedModel, list[str]]:
    """The model, and the names of its parameters that the weights file does not have.

    `auto_class` is a class of transformers; default: the one that loads this model as a text encoder.
    """
    kwargs = {"dtype": "auto"} | kwargs
    try:
        refuse_adapter(name)
        config = kwargs.pop("config", None) or AutoConfig.from_pretrained(name)
        model_class = getattr(transformers, auto_class or loading_class(config))
        model, report = model_class.from_pretrained(
            name, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except InputError:
        raise
    except Exception as error:  # many kinds: no network, no file, not JSON, a broken header, a missing package
        raise unreachable(name, error) from error
    check_weights(name, model, report)
    return model, sorted(report["missing_keys"])


def refuse_adapter(name: str) -> None:
    if (adapter := read_json(name, "adapter_config.json")) is not None:
        base = adapter.get("base_model_name_or_path") or "an unnamed model"
        raise InputError(
            f"{name}: holds an adapter of {base}, not a model; load it with PEFT and merge it first (merge_and_unload, then "
            "save_pretrained)"
        )


def check_weights(name: str, model: PreTrainedModel, report: dict) -> None:
    """Raises InputError for weights of another shape, of more layers than the model has, quantised or not finite."""
    if report["mismatched_keys"]:
        key, found, wanted = sorted(report["mismatched_keys"])[0]
        raise InputError(f"model '{name}': '{key}' is {tuple(found)} in its weights file, but {tuple(wanted)} by config.json")
    known = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    if further := [key for key in sorted(report["unexpected_keys"]) if re.sub(r"\d+", "#", key) in known]:
        raise InputError(f"model '{name}': config.json has no place for {listed(further)} in its weights file; {MEND}")
    if getattr(model.config, "quantization_config", None) is None:
        for file in weight_files(name):
            with safe_open(file, "pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (no dict)
                    if (dtype := tensors.get_slice(key).get_dtype()) not in PLAIN_DTYPES:
                        raise InputError(
                            f"model '{name}': '{key}' is stored as {dtype}, but config.json names no quantization; save the "
                            "model in floating point"
                        )
    for key, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise InputError(f"model '{name}': '{key}' has values that are NaN or infinite; the weights are spoilt")


def weight_files(name: str) -> list[str]:
    """The safetensors files of a model, where they lie on this machine."""
    index = read_json(name, "model.safetensors.index.json")
    files = sorted(set(index["weight_map"].values())) if index else ["model.safetensors"]
    found = [cached_file(name, file, _raise_exceptions_for_missing_entries=False) for file in files]
    return [file for file in found if file]


def load_tokenizer(name: str, **kwargs):
    """The tokenizer of a model. Raises InputError if its files are missing or not whole."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **kwargs)
    except Exception as error:
        raise unreachable(name, error, "its tokenizer cannot be loaded") from error
    if not hasattr(tokenizer, "num_special_tokens_to_add"):
        raise InputError(f"model '{name}': it needs a {type(tokenizer).__name__}, not a tokenizer of plain text; take another")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = getattr(backend, "model", None)
    if type(model).__name__ == "BPE" and len(tokenizer) > 300 and not has_merges(model):
        raise InputError(f"model '{name}': its tokenizer has a vocabulary, but no merges; save merges.txt beside vocab.json")
    return tokenizer


def has_merges(model) -> bool:
    """Whether a byte-pair encoding joins anything: without merges each letter is a token of its own."""
    return any(len(model.tokenize(word)) < len(word) for word in ("the", "and", "ing", "tion", "ation"))


def listed(names: list[str]) -> str:
    """ "'a'", or "'a' and 11 more"."""
    return f"'{names[0]}'" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def unreachable(name: str, error: Exception, what: str = "cannot be loaded") -> InputError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
    return InputError(
        f"model '{name}' {what}: {reason}. Give a local folder that holds config.json, weights and tokenizer; "
        "a recipe without arguments runs offline on the built-in quickstart encoder"
    )
