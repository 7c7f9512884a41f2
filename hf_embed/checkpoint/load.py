"""A folder or a model on the Hub to an `Encoder`."""

from transformers import AutoModel, AutoTokenizer

from hf_embed.checkpoint.layout import read_settings
from hf_embed.errors import InputError
from hf_embed.tempscale import TempScaleConfig, apply_tempscale


def load_encoder(cls, name: str, pooling=None, max_length=None, normalize=None, trust_remote_code=False, **model_kwargs):
    """See Encoder.from_pretrained. Raises InputError if the model cannot be reached or has a module unknown here."""
    model_kwargs = {"dtype": "auto"} | model_kwargs
    try:
        backbone = AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code, **model_kwargs)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
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


def is_remote(part) -> bool:
    """Whether a model, config or tokenizer is of a class whose code is saved with it (`auto_map`)."""
    return getattr(type(part), "_auto_class", None) is not None or type(part).__module__.startswith("transformers_modules.")


def unreachable(name: str, error: Exception) -> InputError:
    if "trust_remote_code=True" in str(error):
        return InputError(
            f"model '{name}' brings Python code of its own, which is not run unless you say so: read it, then give "
            "--trust_remote_code on the command line (in Python, trust_remote_code=True)"
        )
    reason = str(error).strip().splitlines()[0].rstrip(".")
    return InputError(
        f"model '{name}' cannot be loaded: {reason}. Give a local folder that holds config.json, weights and tokenizer; "
        "a recipe without arguments runs offline on the built-in quickstart encoder"
    )
