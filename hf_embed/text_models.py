"""Find the part of a model that encodes text, and prepare it and its tokenizer.

T5 and similar models are encoder-decoders with a separate class for their encoder. Other models have a head around the encoder.
"""

import copy
import logging
from typing import Any, cast

import transformers
from transformers import MODEL_MAPPING, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.adapters import base_of, check_kinds, has_adapters
from hf_embed.errors import InputError
from hf_embed.library_internals import keep_own_settings, saves_its_code, uncompiled

logger = logging.getLogger(__name__)

# model_type of an encoder-decoder -> the class of its encoder
ENCODERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "longt5": "LongT5EncoderModel",
    "switch_transformers": "SwitchTransformersEncoderModel",
    "t5gemma": "T5GemmaEncoderModel",
}


def loading_class(config: PreTrainedConfig) -> str:
    """Return the name of the transformers class that loads a model with this configuration as a text encoder."""
    return ENCODERS.get(config.model_type, "AutoModel")


def text_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that encodes text: of T5 and similar models the encoder, with the same weights; else the model itself.

    If the config has its own code, it can be saved afterwards with any settings.

    Raises:
        InputError: if the model is an encoder-decoder without a class for its encoder, such as BART, or one with PEFT adapters.
    """
    config, kind = model.config, type(model).__name__
    if is_remote(config):
        keep_own_settings(config)
    encoder_class = ENCODERS.get(config.model_type)
    if encoder_class == kind or not getattr(config, "is_encoder_decoder", False):
        return model
    if encoder_class is None or hasattr(model, "peft_config"):
        raise InputError(f"{kind} is an encoder-decoder, which has no hidden states for a single text; use a text encoder")
    logger.warning(f"{kind} is an encoder-decoder: only its encoder is used ({encoder_class})")
    encoder = getattr(transformers, encoder_class)(copy.deepcopy(config))
    encoder.load_state_dict(model.state_dict(), strict=False, assign=True)
    encoder.tie_weights()
    return encoder.train(model.training)


def is_remote(part: PreTrainedModel | PreTrainedConfig | PreTrainedTokenizerBase) -> bool:
    """Return whether the code of a model's, config's or tokenizer's class is saved with it (`auto_map`)."""
    return saves_its_code(type(part)) or type(part).__module__.startswith("transformers_modules.")


def without_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its head (`AutoModelForMaskedLM`, `AutoModelForCausalLM` and so on), and warn if there was one.

    The first output of a model with a head is logits and not hidden states.

    Raises:
        InputError: if the argument is not a model; if its adapters cannot be kept; or if no loader can create the inner model
            by itself (as for DPR).
    """
    if (plain := uncompiled(model)) is not None:
        logger.warning("the model is compiled; the uncompiled model is used")
        model = cast(PreTrainedModel, plain)
    if not hasattr(model, "config"):
        raise InputError(
            f"the model is of the type {type(model).__name__}; give a PreTrainedModel; for a wrapped model, give model.module"
        )
    if has_adapters(model):
        check_kinds(model)
    whole = base_of(model)
    base = getattr(whole, "base_model", whole)
    if base is whole or not isinstance(base, PreTrainedModel):
        return model
    if has_adapters(model):
        raise InputError(
            f"the adapters are on a {type(whole).__name__}, whose head returns no hidden states; load the model with "
            "AutoModel, and add the adapters to that"
        )
    loaded = loaded_classes(base.config)  # unknown for a model with its own code
    if loaded and type(base) not in loaded and base.config.model_type not in ENCODERS:
        raise InputError(
            f"{type(whole).__name__} returns no hidden states to pool, and its {type(base).__name__} cannot be saved by "
            "itself; load its weights into a model that AutoModel supports"
        )
    logger.warning(f"{type(whole).__name__} returns no hidden states: its {type(base).__name__} is used, without the head")
    return base


def loaded_classes(config: PreTrainedConfig) -> list[type]:
    """Return the classes of which `loading_class` would create one from a configuration, if they are in transformers."""
    loader, found = loading_class(config), None
    if loader != "AutoModel":
        found = getattr(transformers, loader)
    elif type(config) in MODEL_MAPPING:  # the same test as in AutoModel; get() would find more classes
        found = MODEL_MAPPING[type(config)]
    return [*found] if isinstance(found, list | tuple) else [found] if found else []


def with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return the tokenizer with a padding token. Padding is masked, so any token can serve as one.

    Raises:
        InputError: if the argument is not a tokenizer, or has no token that could serve.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise InputError(
            f"the tokenizer is of the type {type(tokenizer).__name__}; give the model's tokenizer, from "
            "AutoTokenizer.from_pretrained"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has neither a padding nor an end-of-text token; set tokenizer.pad_token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def ends_with(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the special token that the tokenizer puts after each text, or None if it puts none there."""
    ids = tokenizer("a")["input_ids"]
    return ids[-1] if ids and ids[-1] in tokenizer.all_special_ids else None


def with_end_of_text(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return a tokenizer that puts the end-of-text token (`eos_token`) after each text, also after a truncated text.

    The argument is returned if it does so already. It is never changed, because it may belong to the user. The files of the
    returned tokenizer add the token in every loader.

    Raises:
        InputError: if the tokenizer has no end-of-text token, ends each text with another token, or cannot be changed.
    """
    end, wanted = ends_with(tokenizer), tokenizer.eos_token_id
    if wanted is None:
        raise InputError("add_eos_token: the tokenizer has no end-of-text token; set tokenizer.eos_token")
    if end == wanted:
        return tokenizer
    if end is not None:
        raise InputError(
            f"add_eos_token: the tokenizer already ends each text with {tokenizer.convert_ids_to_tokens(end)!r}; remove "
            "add_eos_token"
        )
    changed: Any = copy.deepcopy(tokenizer)
    before = [tokenizer(text)["input_ids"] for text in ("a", "a b")]
    changed.add_bos_token = bool(before[0]) and before[0][0] == tokenizer.bos_token_id
    changed.add_eos_token = True  # transformers makes a new template of the special tokens from these two settings
    if [changed(text)["input_ids"] for text in ("a", "a b")] != [[*ids, wanted] for ids in before]:
        raise InputError(
            f"add_eos_token: the tokenizer ({type(tokenizer).__name__}) cannot be changed to end each text with "
            f"{tokenizer.eos_token!r}; use a tokenizer that adds this token by itself"
        )
    return changed


def attend_fully(base: PreTrainedModel) -> None:
    """Give BigBird full attention.

    The first short batch turns its sparse attention off for good, so the vectors of later batches would change.
    """
    if getattr(base.config, "attention_type", None) == "block_sparse" and hasattr(base, "set_attention_type"):
        logger.warning(f"{type(base).__name__}: block-sparse attention is replaced by full attention, which short texts need")
        base.set_attention_type("original_full")  # type: ignore[operator]
        base.config.attention_type = "original_full"
