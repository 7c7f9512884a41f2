"""Support for PEFT adapters around a model (`get_peft_model`) or inside it (`model.add_adapter`, `inject_adapter_in_model`).

A saved folder is an ordinary checkpoint, so adapters are merged into a copy of the weights. Adapters that cannot be merged are
refused before the training: prompts and prefixes are not weights, and quantized weights would lose the adapters by rounding.
"""

import copy
from typing import Any

from transformers import PreTrainedModel

from hf_embed.errors import InputError
from hf_embed.library_internals import forget_adapters


def has_adapters(model: PreTrainedModel) -> bool:
    """Return whether PEFT has put adapters around `model` or inside it."""
    return hasattr(model, "peft_config")


def check_adapters(model: PreTrainedModel) -> None:
    """Raise InputError, with the kind of the adapters, if they cannot be merged into the weights of `model`."""
    if not has_adapters(model):
        return
    check_kinds(model)
    if getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None):
        raise InputError(
            "adapters cannot be merged into quantized weights without loss; load the base model in floating point "
            "(without quantization_config)"
        )
    try:
        merge_adapters(copy.deepcopy(model))
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise unmergeable(model, f" ({reason})") from error


def check_kinds(model: PreTrainedModel) -> None:
    """Raise InputError for adapters that are not weights, and for adapters of several kinds.

    Prompts, prefixes and gates that depend on the text are not weights. A model with adapters of several kinds does not give
    access to the model inside it.
    """
    if type(model).__name__ == "PeftMixedModel":
        raise InputError("PeftMixedModel is not supported; use adapters of one kind: get_peft_model without mixed=True")
    configs: list[Any] = list(model.peft_config.values())
    for config in configs:
        if config.is_prompt_learning or config.is_adaption_prompt or config.peft_type == "XLORA":
            raise unmergeable(model)


def unmergeable(model: PreTrainedModel, reason: str = "") -> InputError:
    """Return the error for the adapters of `model`."""
    types = [config.peft_type for config in model.peft_config.values()]
    kinds = " and ".join(sorted({str(getattr(kind, "value", kind)) for kind in types}))
    return InputError(
        f"PEFT adapters of the kind {kinds} cannot be merged into the model's weights{reason}, so an ordinary checkpoint "
        "cannot hold them; use adapters that can be merged, e.g. peft.LoraConfig"
    )


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Merge the active adapters of `model` into its weights in place, drop the others, and return the model without adapters.

    Adapters that are switched off (`disable_adapters`) are dropped too, because the model computes without them.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    disabled = any(module.disable_adapters for module in model.modules() if isinstance(module, BaseTunerLayer))
    if hasattr(model, "get_base_model"):
        wrapper: Any = model  # a PeftModel
        return wrapper.unload() if disabled else wrapper.merge_and_unload()
    adapted: dict[str, Any] = {}  # only outermost modules: each is replaced with all that it contains
    for name, module in model.named_modules():
        is_adapter = isinstance(module, BaseTunerLayer) or hasattr(module, "unload_and_optionally_merge_module")
        if is_adapter and not any(name.startswith(f"{outer}.") for outer in adapted):
            adapted[name] = module
    for name, module in adapted.items():
        if hasattr(module, "unload_and_optionally_merge_module"):
            module = module.unload_and_optionally_merge_module(merge=not disabled, safe_merge=False, adapter_names=None)
        else:
            if not disabled:
                module.merge()
            module = module.get_base_layer()
        model.set_submodule(name, module)
    del model.peft_config
    forget_adapters(model)
    return model
