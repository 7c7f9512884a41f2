"""A folder or a model on the Hub to an `Encoder`."""

import logging

from transformers import AutoModel, AutoTokenizer

from hf_embed.checkpoint.layout import read_settings, transformer_folder
from hf_embed.errors import InputError
from hf_embed.tempscale import TempScaleConfig, apply_tempscale

logger = logging.getLogger(__name__)

# Which files of a repository; they count for all of them.
HUB = ("revision", "token", "cache_dir", "local_files_only")
# Tokenizers without a limit say 10^30.
MOST_TOKENS = 10**9


def load_encoder(cls, name: str, pooling=None, max_length=None, normalize=None, **model_kwargs):
    """See Encoder.from_pretrained. Raises InputError if the model cannot be reached or has a module unknown here."""
    model_kwargs = {"dtype": "auto"} | model_kwargs
    hub = {key: model_kwargs[key] for key in HUB if key in model_kwargs}
    if "subfolder" in model_kwargs:
        raise InputError(f"model '{name}': from_pretrained takes no subfolder; give the path of that folder as the model")
    try:
        folder = transformer_folder(name, **hub)
        backbone = AutoModel.from_pretrained(name, **folder, **model_kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name, **folder, **hub)
    except InputError:
        raise
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
    settings = read_settings(name, backbone, tokenizer, pooling, **hub)
    settings |= {} if normalize is None else {"normalize": normalize}
    stated = settings.pop("max_length", None)
    if settings.get("similarity_fn_name", "cosine") != "cosine":
        logger.warning(
            f"model '{name}': similarity() and mteb compare its vectors by {settings['similarity_fn_name']}, as it says; "
            "training and the evaluations of this package do so by the cosine"
        )
    encoder = cls(backbone, tokenizer, **settings, max_length=max_length).eval()
    if max_length is None:
        encoder.max_length = length_of(encoder, name, stated)
    return encoder


def length_of(encoder, name: str, stated: int | None) -> int:
    """After how many tokens to cut texts: as the folder states, if the model takes so many; else as the encoder does.

    Says so in a warning where that is earlier than sentence-transformers cuts them.
    """
    from hf_embed.encoder import check_max_length, positions

    limit, longest = positions(encoder.backbone), encoder.tokenizer.model_max_length
    if stated is None or (limit is None and stated > MOST_TOKENS):
        longest = min(limit or longest, longest)
        if longest > encoder.max_length:
            more = f"up to {longest:,}" if longest < MOST_TOKENS else "longer ones"
            logger.warning(
                f"model '{name}': texts are cut after {encoder.max_length} tokens; it takes {more}: give max_length="
            )
        return encoder.max_length
    if limit is not None and stated > limit:
        logger.warning(f"model '{name}': texts are cut after the {limit:,} tokens that it has positions for, not {stated:,}")
        return limit
    return check_max_length(stated, encoder.backbone, encoder.tokenizer)


def unreachable(name: str, error: Exception) -> InputError:
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return InputError(
        f"model '{name}' cannot be loaded: {reason}. Give a local folder that holds config.json, weights and tokenizer; "
        "a recipe without arguments runs offline on the built-in quickstart encoder"
    )
