"""Which part of a model encodes text: T5 and its kin are encoder-decoders whose encoder is a model of its own."""

import copy
import logging

import transformers
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.errors import InputError
from hf_embed.library_internals import saves_its_code

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
    """Return the name of the class in transformers that loads a model of this configuration as a text encoder."""
    return ENCODERS.get(config.model_type, "AutoModel")


def text_encoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model that encodes text: the encoder of T5 and its kin, with the same weights; any other model as it is.

    Raises:
        InputError: an encoder-decoder whose encoder is no model of its own, such as BART.
    """
    config, kind = model.config, type(model).__name__
    encoder_class = ENCODERS.get(config.model_type)
    if encoder_class == kind or not getattr(config, "is_encoder_decoder", False):
        return model
    if encoder_class is None or hasattr(model, "peft_config"):
        raise InputError(f"{kind} is an encoder-decoder, which has no token states of a text by itself; take a text encoder")
    logger.warning(f"{kind} is an encoder-decoder: its encoder is taken ({encoder_class})")
    encoder = getattr(transformers, encoder_class)(copy.deepcopy(config))
    encoder.load_state_dict(model.state_dict(), strict=False, assign=True)
    encoder.tie_weights()
    return encoder.train(model.training)


def is_remote(part: PreTrainedModel | PreTrainedConfig | PreTrainedTokenizerBase) -> bool:
    """Return whether a model, config or tokenizer is of a class whose code is saved with it (`auto_map`)."""
    return saves_its_code(type(part)) or type(part).__module__.startswith("transformers_modules.")
