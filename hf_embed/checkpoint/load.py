"""Load an `Encoder` from a folder or from the Hub. Incomplete weights or tokenizer files are refused."""

import copy
import logging
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.adapters import unpack, with_saved_adapter
from hf_embed.checkpoint.layout import read_modules
from hf_embed.checkpoint.model_files import Files
from hf_embed.checkpoint.settings import read_settings
from hf_embed.encoder import Encoder
from hf_embed.encoding import check_max_length
from hf_embed.errors import InputError, first_line, listed
from hf_embed.files.read_files import tensor_dtypes, trouble_with
from hf_embed.forward.check import influences
from hf_embed.hub_access import WHAT_TO_GIVE, find_model
from hf_embed.progress import quiet_libraries
from hf_embed.text_models import is_remote, loading_class

# The data types that weights may have without quantization. transformers would read int8 numbers as if they were floats.
PLAIN_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "BOOL"}
MEND = "use the complete folder that save_pretrained wrote"

logger = logging.getLogger(__name__)

# The options that select files in a repository. They apply to all files of a model.
HUB = ("revision", "token", "cache_dir", "local_files_only")
# Arguments of transformers and of SentenceTransformer that `from_pretrained` does not have, and what to do instead.
ELSEWHERE = {
    "subfolder": "give the path of that folder as the model",
    "device": "move the encoder: .to(device)",
    "max_seq_length": "use max_length",
    "cache_folder": "use cache_dir",
    "model_kwargs": "give the arguments themselves, for example dtype=torch.bfloat16",
    "backend": "write the graph with export_onnx, and run it with onnxruntime",
    **dict.fromkeys(
        ("tokenizer_kwargs", "processor_kwargs", "config_kwargs"), "load both yourself, and make Encoder(model, tokenizer)"
    ),
    **dict.fromkeys(
        ("prompts", "default_prompt_name", "truncate_dim", "similarity_fn_name"), "set the attribute of the loaded encoder"
    ),
}
# A larger length means that there is no limit: such tokenizers state 10^30.
MOST_TOKENS = 10**9


@torch.inference_mode(False)  # a model that is loaded in inference mode could not be checked, and never be trained
def load_encoder(
    cls: type[Encoder],
    name_or_path: str | Path,
    pooling: str | None = None,
    max_length: int | None = None,
    normalize: bool | None = None,
    trust_remote_code: bool = False,
    new_pooler: bool = False,
    **model_kwargs: Any,
) -> Encoder:
    """Load the encoder of a folder or of a model on the Hub, as `Encoder.from_pretrained` describes.

    Args:
        cls: the class of the encoder.
        name_or_path: a folder, or a model on the Hub.
        pooling: replaces the pooling that the folder states.
        max_length: replaces the maximum length that the folder states.
        normalize: replaces the normalization that the folder states.
        trust_remote_code: run the Python code that comes with the model.
        new_pooler: accept weights without a pooler, because training starts it from random weights.
        **model_kwargs: arguments for `AutoModel.from_pretrained`.

    Raises:
        InputError: if the model cannot be reached, if weights or tokenizer files are missing, broken or of another model, or if
            a setting of sentence-transformers is not supported here.
    """
    for key in model_kwargs:
        if key in ELSEWHERE:
            raise InputError(f"from_pretrained does not support {key}; {ELSEWHERE[key]}")
    hub = {key: model_kwargs[key] for key in HUB if key in model_kwargs}
    found, name = find_model(name_or_path, **hub), str(name_or_path)
    hub, model_kwargs = hub | found, model_kwargs | found
    folder = find_transformer(name, **hub)
    backbone, missing = load_model(name, trust_remote_code=trust_remote_code, **folder, **model_kwargs)
    unpack(backbone)
    if base := base_without_modules(Files(name, **hub)):  # the settings of the base model apply
        name, hub = base, without_place(hub)
        folder = find_transformer(name, **hub)
    tokenizer = load_tokenizer(name, trust_remote_code, **folder, **hub)
    settings = read_settings(name, backbone, tokenizer, pooling, **hub)
    settings |= {} if normalize is None else {"normalize": normalize}
    stated = settings.pop("max_length", None)
    if (similarity := settings.get("similarity_fn_name", "cosine")) != "cosine":
        logger.warning(
            f"model '{name}': similarity() and mteb compare its vectors by {similarity}, the model's own similarity function; "
            "training and evaluation in hf_embed use the cosine"
        )
    warn_of_other_prompts(name, settings.get("prompts", {}))
    encoder = cls(backbone, tokenizer, **settings, max_length=max_length).eval()
    if max_length is None:
        encoder.max_length = length_of(encoder, name, stated)
    if new_pooler:
        missing = [key for key in missing if not key.startswith("pooler.")]
    if random := influences(encoder, missing):
        raise InputError(f"model '{name}': its weights file lacks {listed(random, 1)}, which would have random values; {MEND}")
    return encoder


def warn_of_other_prompts(name: str, prompts: dict[str, str]) -> None:
    """Warn if queries or documents get no prompt, because the model's prompts for them have other names."""
    used = {key for key in ("query", "document") if prompts.get(key)}
    others = [key for key, prompt in prompts.items() if prompt and key not in used]
    if others and (not used or ("document" not in used and {"passage", "corpus"} & {*others})):
        logger.warning(
            f"model '{name}': training, evaluation, mining and search use only the prompts named query and document, not those "
            f"named {', '.join(others)}; rename the right ones in config_sentence_transformers.json, or set prompts"
        )


def find_transformer(name: str, **hub: Any) -> dict[str, str]:
    """Return the arguments with which `from_pretrained` finds the transformer and its tokenizer: {} or {"subfolder": ...}.

    Raises:
        InputError: if the model cannot be reached, or if its list of modules is wrong or not supported.
    """
    try:
        modules = read_modules(Files(name, **hub))
    except InputError:
        raise
    except Exception as error:  # the Hub client raises many kinds of errors
        raise unreachable(name, error) from error
    return {"subfolder": modules[0].path} if modules and modules[0].path else {}


def length_of(encoder: Encoder, name: str, stated: int | None) -> int:
    """Return the number of tokens after which texts are truncated.

    This is the length that the folder states, but at most the number of the model's positions. If the folder states none, it is
    the length that the encoder has chosen. A warning appears if texts are truncated earlier than in sentence-transformers.
    """
    limit, longest = encoder.positions, encoder.tokenizer.model_max_length
    if stated is None or (limit is None and stated > MOST_TOKENS):
        longest = min(limit or longest, longest)
        if longest > encoder.max_length:
            more = f"up to {longest:,}" if longest < MOST_TOKENS else "more"
            logger.warning(
                f"model '{name}': texts are truncated to {encoder.max_length} tokens, but the model accepts {more}; set "
                "max_length to use more"
            )
        return encoder.max_length
    if limit is not None and stated > limit:
        logger.warning(
            f"model '{name}': texts are truncated to {limit:,} tokens, not to {stated:,}, as it has only {limit:,} positions"
        )
        return limit
    return check_max_length(stated, limit, encoder.tokenizer)


def load_model(
    name: str, auto_class: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> tuple[PreTrainedModel, list[str]]:
    """Return the model, and the names of its parameters that are missing in the weights file.

    Args:
        name: a folder, or a model on the Hub.
        auto_class: a class of transformers. Default: the class that loads this model as a text encoder.
        trust_remote_code: run the Python code that comes with the model.
        **kwargs: arguments for the `from_pretrained` of that class.

    Raises:
        InputError: if the model cannot be reached, or if its weights are incomplete or belong to another model.
    """
    kwargs = ({} if "torch_dtype" in kwargs else {"dtype": "auto"}) | kwargs
    if kwargs.get("local_files_only"):  # else transformers would ask the Hub for an adapter
        kwargs.setdefault("adapter_kwargs", {"local_files_only": True})
    try:
        where = {key: value for key, value in kwargs.items() if key in (*HUB, "subfolder")}
        files = Files(name, **where)
        if base := base_of_adapter(files):
            model, missing = load_base(name, base, auto_class, trust_remote_code, **without_place(kwargs))
            return with_saved_adapter(model, name, fetched_adapter(files)), missing
        config = kwargs.pop("config", None) or read_config(name, trust_remote_code, **where)
        model_class = getattr(transformers, auto_class or loading_class(config))
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        with quiet_libraries():
            loaded = model_class.from_pretrained(name, config=config, trust_remote_code=trust_remote_code, **kwargs)
        if not isinstance(loaded, tuple):
            raise InputError(
                f"model '{name}': its own code replaces from_pretrained, so nothing tells whether its weights are complete; "
                "leave out trust_remote_code (transformers has some such architectures, for example nomic_bert)"
            )
        model, report = loaded
    except InputError:
        raise
    except Exception as error:  # such as no network, no file, not JSON, a broken header, a missing package
        attention = kwargs.get("attn_implementation")
        if attention and re.search("attention|attn|`kernels`", str(error), re.IGNORECASE):
            reason = first_line(error).rstrip(".")
            raise InputError(
                f"model '{name}': attn_implementation {attention} cannot be used: {reason}; give another one, or leave it out"
            ) from error
        raise unreachable(name, error) from error
    check_weights(files, model, report)
    if is_remote(model):
        check_buffers(name, model, partial(model_class.from_config, config, trust_remote_code=trust_remote_code))
    return model, sorted(report["missing_keys"])


def read_config(name: str, trust_remote_code: bool = False, **where: Any) -> PretrainedConfig:
    """Return the configuration of a model, or of the base model of an adapter. Raise InputError if it is missing or wrong.

    Args:
        name: a folder, or a model on the Hub.
        trust_remote_code: run the Python code that comes with the model.
        **where: options as in `Files`.
    """
    try:
        if base := base_of_adapter(Files(name, **where)):
            return read_config(base, trust_remote_code, **without_place(where))
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **where)
    except InputError:
        raise
    except Exception as error:  # any value in the config can cause an error
        raise unreachable(name, error) from error


def base_of_adapter(files: Files) -> str | None:
    """Return the base model that adapter_config.json names, or None if the files are those of a whole model.

    Raises:
        InputError: if it names no base model.
    """
    adapter = files.json("adapter_config.json")
    if adapter is None:
        return None
    if not (base := adapter.get("base_model_name_or_path")):
        raise InputError(
            f"model '{files.name}' is an adapter, and its adapter_config.json names no base model; write the name or the "
            "folder of that model there, as base_model_name_or_path"
        )
    return str(base)


def fetched_adapter(files: Files) -> str:
    """Return the local folder of an adapter, after a download if needed. Raise InputError if it has no weights."""
    for weights in ("adapter_model.safetensors", "adapter_model.bin"):
        if path := files.path(weights):
            return str(Path(path).parent)
    raise InputError(f"model '{files.name}': the adapter has no weights (adapter_model.safetensors); copy it again")


def load_base(adapter: str, base: str, *given: Any, **kwargs: Any) -> tuple[PreTrainedModel, list[str]]:
    """Load the base model of an adapter, as `load_model` does. An InputError also names the adapter."""
    try:
        kwargs |= find_model(base, **{key: value for key, value in kwargs.items() if key in HUB})
        return load_model(base, *given, **kwargs)
    except InputError as error:
        raise InputError(f"model '{adapter}' is an adapter of '{base}': {error}") from error


def base_without_modules(files: Files) -> str | None:
    """Return the base model of an adapter that is saved without modules.json, or None for all other files."""
    base = base_of_adapter(files)
    return base if base and files.path("modules.json") is None else None


def without_place(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return `kwargs` without the revision and the folder of an adapter, which are not those of its base model."""
    return {key: value for key, value in kwargs.items() if key not in ("revision", "subfolder")}


def check_weights(files: Files, model: PreTrainedModel, report: dict) -> None:
    """Raise InputError if the weights do not fit the model.

    That is the case for a wrong shape, for more layers than the model has, for quantized weights although config.json names no
    quantization, and for numbers that are not finite.
    """
    name = files.name
    if report["mismatched_keys"]:
        key, found, wanted = sorted(report["mismatched_keys"])[0]
        raise InputError(
            f"model '{name}': '{key}' has the shape {tuple(found)} in the weights file, but {tuple(wanted)} according to "
            f"config.json; {MEND}"
        )
    known = {re.sub(r"\d+", "#", key) for key in model.state_dict()}
    if further := [key for key in sorted(report["unexpected_keys"]) if re.sub(r"\d+", "#", key) in known]:
        raise InputError(f"model '{name}': its weights file has {listed(further, 1)}, which does not fit config.json; {MEND}")
    if getattr(model.config, "quantization_config", None) is None:
        floats = tuple(f".{key}" for key, tensor in model.state_dict().items() if tensor.is_floating_point())
        for file, path in files.weight_files().items():
            for key, dtype in tensor_dtypes(path, f"model '{name}': {file}").items():
                if dtype not in PLAIN_DTYPES and f".{key}".endswith(floats):  # others, such as old masks, are not read
                    raise InputError(
                        f"model '{name}': '{key}' is stored as {dtype}, but config.json names no quantization; save the model "
                        "in floating point"
                    )
    for key, parameter in model.named_parameters():
        if not parameter.is_meta and parameter.is_floating_point() and not torch.isfinite(parameter).all():
            raise InputError(f"model '{name}': '{key}' has NaN or infinite values; use undamaged weights")


def check_buffers(name: str, model: PreTrainedModel, make: Callable[..., PreTrainedModel]) -> None:
    """Raise InputError if a loaded model with its own code has lost what it computes when it is made, and does not save.

    Since version 5, transformers makes a model without values and then loads the weights. It leaves other buffers, such as
    rotary frequencies, with random content, unless `_init_weights` of the model computes them again. `make` makes the model
    from its configuration.
    """
    if not all(parameter.numel() for parameter in model.parameters()):
        return  # ZeRO-3 would take parts of the second model too
    with init_empty_weights(include_buffers=False), quiet_libraries():  # parameters without values, which need no memory
        made = dict(make(dtype=model.dtype).named_buffers())
    saved = model.state_dict()
    for key, buffer in model.named_buffers():
        right = made.get(key)
        if key in saved or right is None or right.shape != buffer.shape or right.is_meta or buffer.is_meta:
            continue
        if not torch.isclose(buffer.cpu(), right.to(buffer.dtype), rtol=1e-2, atol=1e-5, equal_nan=True).all():
            raise InputError(
                f"model '{name}': transformers {transformers.__version__} loads it without the values of '{key}', which its "
                "own code computes, so its vectors would be random; use code of this model that is made for transformers 5"
            )


def load_tokenizer(name: str, trust_remote_code: bool = False, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model. Raise InputError if its files are missing or incomplete."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    except Exception as error:
        raise unreachable(name, error, "has a tokenizer that cannot be loaded") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a damaged file causes a Rust panic, not an Exception
            raise
        raise unreachable(name, error, "has a damaged tokenizer") from error
    if not hasattr(tokenizer, "num_special_tokens_to_add"):
        raise InputError(
            f"model '{name}': it needs a {type(tokenizer).__name__}, not a tokenizer for plain text; use another model"
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.model if isinstance(backend, Tokenizer) else None
    if isinstance(model, BPE) and len(tokenizer) > 300 and not has_merges(model):
        raise InputError(f"model '{name}': its tokenizer has a vocabulary but no merges; save merges.txt beside vocab.json")
    where = {key: value for key, value in kwargs.items() if key in (*HUB, "subfolder")}
    check_added_tokens(Files(name, **where).json("tokenizer_config.json") or {}, tokenizer, name)
    return tokenizer


def check_added_tokens(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise InputError if the tokenizer does not add a token that tokenizer_config.json asks for, before or after each text.

    Since version 5, transformers follows only tokenizer.json. If it lacks the end-of-text token, a model that pools this token
    would pool a word instead.
    """
    for kind, end in (("bos", slice(1)), ("eos", slice(-1, None))):
        token = getattr(tokenizer, f"{kind}_token_id")
        if config.get(f"add_{kind}_token") is True and token is not None and tokenizer("a")["input_ids"][end] != [token]:
            raise InputError(
                f"model '{name}': tokenizer_config.json asks for add_{kind}_token, but transformers follows tokenizer.json, "
                "which does not add this token; load the tokenizer with AutoTokenizer.from_pretrained and both add_bos_token "
                "and add_eos_token, and save it into the folder"
            )


def has_merges(model: BPE) -> bool:
    """Return whether a byte-pair encoding joins any letters. Without merges, each letter is a token of its own."""
    return any(len(model.tokenize(word)) < len(word) for word in ("the", "and", "ing", "tion", "ation"))


def own_config(backbone: PreTrainedModel) -> PretrainedConfig:
    """Return a copy of the config, without `auto_map` if the model uses no custom code, because no such code is saved."""
    config = copy.deepcopy(backbone.config)
    if not (is_remote(backbone) or is_remote(config)):
        vars(config).pop("auto_map", None)
    return config


def unreachable(name: str, error: BaseException, what: str = "cannot be loaded") -> InputError:
    """Return the error for a model whose loading raised `error`."""
    if "trust_remote_code=True" in str(error):
        return InputError(
            f"model '{name}' needs its own Python code, which runs only if you allow it; read the code, then set "
            "--trust_remote_code on the command line (in Python: trust_remote_code=True)"
        )
    if closed := [path for path in sorted(Path(name).glob("*")) if path.is_file() and not os.access(path, os.R_OK)]:
        return InputError(f"model '{name}' {what}: {closed[0]}: {trouble_with(closed[0])}")  # safetensors calls it missing
    reason = first_line(error).rstrip(".")
    if reason.startswith("Unrecognized model") and os.path.isdir(name) and not os.path.exists(f"{name}/config.json"):
        reason = "the folder has no config.json"
    return InputError(f"model '{name}' {what}: {reason}. {WHAT_TO_GIVE}")
