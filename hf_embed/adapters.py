"""Support for PEFT adapters around a model (`get_peft_model`) or inside it (`model.add_adapter`, `inject_adapter_in_model`).

A saved folder is an ordinary checkpoint, so adapters are merged into a copy of the weights. Adapters that cannot be merged are
refused before the training: prompts and prefixes are not weights, and quantized weights would lose the adapters by rounding.

LoRA adapters on weights that bitsandbytes holds in 4 bits (QLoRA) are merged in float32: the saved weights are the values of
the 4-bit weights, which the adapters were trained on, plus the adapters. So the saved model computes what the trained one does.
Merging into the original weights would give other vectors, and rounding the sum to 4 bits again would too.
"""

import copy
import warnings
from typing import Any, TypeVar, cast

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from peft.utils.integrations import dequantize_bnb_weight
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_embed.errors import InputError, first_line
from hf_embed.library_internals import forget_adapters

Model = TypeVar("Model", bound=nn.Module)


def has_adapters(model: PreTrainedModel) -> bool:
    """Return whether PEFT has put adapters around `model` or inside it."""
    return hasattr(model, "peft_config")


def base_of(model: nn.Module) -> PreTrainedModel:
    """Return the model inside a PEFT model; return any other model unchanged."""
    whole: Any = model
    return whole.get_base_model() if hasattr(whole, "get_base_model") else whole


def configs_of(backbone: PreTrainedModel) -> list[dict[str, Any]]:
    """Return the config of a model and the configs of its adapters, as dicts."""
    adapters: list[Any] = list(backbone.peft_config.values()) if has_adapters(backbone) else []
    return [config.to_dict() for config in [backbone.config, *adapters]]


def check_adapters(model: PreTrainedModel) -> None:
    """Raise InputError, with the kind of the adapters, if they cannot be merged into the weights of `model`.

    Weights that are quantized cannot be trained themselves, so without adapters they are refused too.
    """
    quantized = getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None)
    if quantized and not has_adapters(model):
        raise InputError(
            "quantized weights cannot be trained; add LoRA adapters, or load the model without quantization_config"
        )
    if not has_adapters(model):
        return
    check_kinds(model)
    if in_4_bits(model):
        check_4_bits(model)
        return
    if quantized:
        raise InputError(
            "adapters cannot be merged into quantized weights without loss; load the base model in floating point (without "
            "quantization_config), or in 4 bits with bitsandbytes"
        )
    try:
        merged_shape(model)
    except (NotImplementedError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
        raise unmergeable(model, f" ({reason})") from error


def check_kinds(model: PreTrainedModel) -> None:
    """Raise InputError for adapters that are not weights, and for adapters of several kinds.

    Prompts, prefixes and gates that depend on the text are not weights. Layers that share their weights cannot hold different
    adapters. A model with adapters of several kinds does not give access to the model inside it.
    """
    if type(model).__name__ == "PeftMixedModel":
        raise InputError("PeftMixedModel is not supported; use adapters of one kind: get_peft_model without mixed=True")
    configs: list[Any] = list(model.peft_config.values())
    for config in configs:
        if config.is_prompt_learning or config.is_adaption_prompt or config.peft_type == "XLORA":
            raise unmergeable(model)
        if config.to_dict().get("layer_replication"):
            raise unmergeable(model, ": layer_replication uses the weights of a layer several times, with other adapters")


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


def with_saved_adapter(model: PreTrainedModel, name: str, folder: str) -> PreTrainedModel:
    """Merge a saved adapter into the weights of its base model.

    Args:
        model: the base model.
        name: the name of the adapter in messages.
        folder: the local folder of its files.

    Raises:
        InputError: if the adapter cannot be merged, if the model is quantized, or if the adapter's weights are those of another
            model. PEFT would compute without them.
    """
    if getattr(model, "is_quantized", False):
        raise InputError(
            f"model '{name}' is an adapter, which cannot be merged into quantized weights without loss; load it without "
            "quantization, and save it with save_pretrained"
        )
    adapted: Any = with_new_adapters(model, PeftConfig.from_pretrained(folder))
    check_kinds(adapted)
    saved = load_peft_weights(folder, device="cpu")
    needed = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    loaded: Any = set_peft_model_state_dict(adapted, saved)
    if wrong := sorted({*needed} - {*saved}) + sorted(loaded.unexpected_keys):
        problem = "its weights lack" if wrong[0] in needed else "the model has no"
        raise InputError(
            f"model '{name}': this adapter does not fit {type(model).__name__} of '{model.config.name_or_path}': {problem} "
            f"'{wrong[0]}'; merge it with PEFT into the model that it was trained on, and save that"
        )
    return merge_adapters(adapted).requires_grad_(True)  # PEFT has frozen the base model


def with_new_adapters(model: PreTrainedModel, config: PeftConfig) -> PreTrainedModel:
    """Put new adapters around a model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads a name that transformers has renamed
        return cast(PreTrainedModel, get_peft_model(model, config))


def merged_shape(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` with its adapters merged, from which names and shapes can be read.

    If possible, the copy has no values, so that it needs no memory.
    """
    try:
        return merge_adapters(without_weights(model))
    except RuntimeError:  # some kinds of adapters compute with the numbers, for example VB-LoRA
        return merge_adapters(copy_of(model))


def without_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model whose parameters are on the meta device, so that they need no memory. Buffers are copied.

    A model that FSDP has sharded cannot be copied, so the copy into which its adapters are merged is made from this one.
    """
    return copy_to_device(model, torch.device("meta"))


def copy_of(model: Model) -> Model:
    """Return a copy of a model: on its device, or on the CPU if the device has no memory for a second one."""
    try:
        return copy.deepcopy(model)
    except torch.OutOfMemoryError:
        return copy_to_device(model, torch.device("cpu")).cpu()


def copy_to_device(model: Model, device: torch.device) -> Model:
    """Return a copy of a model with its parameters on `device`. Buffers stay where they are."""
    parameters = {
        id(parameter): nn.Parameter(parameter.detach().to(device, copy=True), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, parameters)


# ---- base weights in 4 bits ----


def in_4_bits(model: nn.Module) -> bool:
    """Return whether bitsandbytes holds the weights of `model` in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))


def check_4_bits(model: PreTrainedModel) -> None:
    """Check that adapters on weights in 4 bits can be merged, and prepare the weights for training on a CPU.

    Raises:
        InputError: if the adapters are not plain LoRA.
    """
    for layer in model.modules():
        plain = isinstance(layer, LoraLayer) and not layer.lora_variant and not any(layer.lora_bias.values())
        if isinstance(layer, BaseTunerLayer) and not plain:
            raise unmergeable(
                model, ": on weights in 4 bits, only plain LoRA can be merged, without DoRA and without lora_bias"
            )
    unpack(model)


def unpack(model: nn.Module) -> None:
    """Undo the packing of 4-bit weights that bitsandbytes uses for inference on some CPUs, and turn it off.

    No gradient flows through a packed layer, and its numbers are in another order than `dequantize_bnb_weight` expects.
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.state_dict()  # unpacks the weight
            layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def full_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model in 4 bits, on the CPU and in float32, with the active adapters merged.

    The weights of `model` stay as they are.
    """
    unpack(model)
    adapted = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    inside = {id(layer.get_base_layer()) for layer in adapted}
    layers = adapted + [layer for layer in model.modules() if is_4_bit(layer) and id(layer) not in inside]
    merged: dict[int, Any] = {id(layer): full_linear(layer) for layer in layers if is_4_bit(base_layer(layer))}
    copied: Any = merge_adapters(copy.deepcopy(model, merged))  # deepcopy puts the merged layers in the places of the others
    copied.hf_quantizer.remove_quantization_config(copied)
    del copied.is_loaded_in_4bit
    return copied.to("cpu", torch.float32)


def base_layer(layer: nn.Module) -> nn.Module:
    """Return the layer below the adapters of a layer, or a layer without adapters itself."""
    return layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer


def is_4_bit(layer: nn.Module) -> bool:
    """Return whether the weight of a layer is one of bitsandbytes in 4 bits."""
    kinds = {type(parameter).__name__ for parameter in layer.parameters(recurse=False)}
    return "Params4bit" in kinds


def full_linear(layer: nn.Module) -> nn.Linear:
    """Return a linear layer on the CPU, in float32, that computes what a 4-bit layer with its active LoRA adapters does."""
    base: Any = base_layer(layer)
    weight: Tensor = dequantize_bnb_weight(base.weight).float()
    if isinstance(layer, LoraLayer) and not layer.disable_adapters:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name).float()  # type: ignore[operator]
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=base.bias is not None, device="meta")
    made.weight = nn.Parameter(weight.detach().cpu(), requires_grad=False)
    if base.bias is not None:
        made.bias = nn.Parameter(base.bias.detach().float().cpu(), requires_grad=False)
    return made


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters that `model` has when it is saved: without adapters, and with 4-bit weights unpacked."""
    kinds = {config.peft_type for part in model.modules() for config in getattr(part, "peft_config", {}).values()}
    added = [PEFT_TYPE_TO_PREFIX_MAPPING[kind] for kind in kinds if kind in PEFT_TYPE_TO_PREFIX_MAPPING]
    count = 0
    for name, parameter in model.named_parameters():
        if not any(prefix in name for prefix in (*added, "modules_to_save.", "trainable_tokens_", "ranknum")):
            state = getattr(parameter, "quant_state", None)
            count += parameter.numel() if state is None else state.shape.numel()
    return count
