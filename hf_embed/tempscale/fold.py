"""Fold TempScale into the weights. The model is then an ordinary checkpoint, as fast as before, that needs no code of ours.

With ' for the transpose, W and b the weight and bias of the query projection, and x its input:

    softmax(Q K' / (t sqrt d)) = softmax((Q / t) K' / sqrt d),    Q / t = x (W / t)' + b / t

This also holds with rotary position embeddings, because a rotation of the queries commutes with the division. If a norm follows
the projection, its weight is divided instead.

`fold_tempscale` changes a model in memory. Saving an encoder writes what `folded` returns, and leaves the model as it is. Both
check first whether the weights can hold the temperature (`check_foldable`).

Shapes: a weight is (out, in) or, of a norm, (out,); a bias is (out,). `out` is the width of a submodule's output.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_embed.errors import InputError
from hf_embed.tempscale.attention import (
    Applied,
    Model,
    Output,
    applied_tempscale,
    applied_to,
    apply_tempscale,
    bias_tables,
    divided_outputs,
    model_in,
    remove_tempscale,
    stated,
    temperatures_of,
)
from hf_embed.tempscale.config import TempScaleConfig
from hf_embed.tempscale.registry import Attentions, attentions


def fold_tempscale(model: Model, config: TempScaleConfig | float | None = None) -> Model:
    """Fold the temperature that is applied to `model`, or that of `config`, into the weights. Return the model.

    `model.config.temp_scale` records the settings, marked as folded, so they are never applied again. If folding fails, the
    model stays unchanged.

    Raises:
        InputError: if no TempScale is applied and no config is given; if the temperature grows with length; if layers with
            different temperatures share a table of position biases or a cap of the scores; if an attention class has no entry
            in the registry; if PEFT adapters are not merged; or if the weights are quantized.
    """
    if config is not None:
        apply_tempscale(model, config)
        try:
            return fold_tempscale(model)
        except InputError:
            remove_tempscale(model)
            raise
    tensors, settings = folded(model)
    remove_tempscale(model)
    write(model_in(model), tensors, settings)
    return model


def unfold_tempscale(model: Model) -> Model:
    """Undo `fold_tempscale`: restore the weights up to one more rounding. Return the model.

    Raises:
        InputError: if nothing is folded into the model.
    """
    base = model_in(model)
    entry = stated(base)
    if not entry.pop("folded", False):
        raise InputError("no TempScale is folded into this model")
    temperatures = temperatures_of(base, attentions(base), TempScaleConfig.from_dict(entry))
    write(base, *new_weights_and_caps(base, {name: 1 / temperature for name, temperature in temperatures.items()}))
    del base.config.temp_scale
    return model


def folded(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what folding changes in this scaled model: the new tensors by name, and the new config entries.

    `state_dict` replaces the model's own tensors, which FSDP has to gather. Raises InputError like `fold_tempscale`.
    """
    applied = check_foldable(model)
    if hasattr(model, "get_base_model"):
        raise InputError("TempScale cannot be folded into a model with PEFT adapters; call merge_and_unload first")
    tensors, settings = new_weights_and_caps(model_in(model), applied.temperatures, state_dict)
    return tensors, settings | {"temp_scale": applied.config.to_dict() | {"folded": True}}


def check_foldable(model: nn.Module) -> Applied:
    """Return what is applied to `model`. Raise InputError if nothing is, or if the weights cannot hold it."""
    applied = applied_to(model)
    if applied is None:
        raise InputError("there is no TempScale to fold; call apply_tempscale first, or give a TempScaleConfig")
    base = model_in(model)
    found = attentions(base)
    if applied.config.growth:
        raise InputError(
            "TempScale with growth cannot be folded, because it depends on the length of the text; use it without growth"
        )
    for attention, handler in found.values():
        if not handler.query:
            kind = type(attention).__name__
            raise InputError(
                f"TempScale cannot be folded: it is unknown which weights compute the queries of {kind}; if a submodule "
                f"does, register it: register_tempscale('{kind}', query='q_proj')"
            )
    if len(set(applied.temperatures.values())) > 1 and (shared := shared_by_layers(base, found, applied.temperatures)):
        raise InputError(f"TempScale: {type(base).__name__} has one {shared} for several layers; use one temperature")
    return applied


def shared_by_layers(model: PreTrainedModel, found: Attentions, temperatures: dict[str, float]) -> str | None:
    """Return the name of a number or table that several layers share, if it can hold one temperature only; else None."""
    attributes = {handler.attribute for _, handler in found.values() if handler.attribute}
    shared = {attribute for attribute in attributes if getattr(model.config, attribute, None)}
    tables = bias_tables(model, found, temperatures)
    if 0 < len(tables) < len(found):
        shared.add(next(iter(tables)).rpartition(".")[2])
    return min(shared, default=None)


def why_not_foldable(model: nn.Module) -> InputError | None:
    """Return the error if the weights of `model` cannot hold what is applied to it; None if they can, or nothing is applied."""
    try:
        if applied_tempscale(model) is not None:
            check_foldable(model)
    except InputError as error:
        return error
    return None


def new_weights_and_caps(
    model: PreTrainedModel, temperatures: dict[str, float], state_dict: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return new parameters, {name: tensor}, and config entries, {key: number}, that divide the scores by the temperatures."""
    state_dict = dict(model.named_parameters()) if state_dict is None else state_dict
    found = attentions(model)
    tensors: dict[str, Tensor] = {}
    for output in divided_outputs(model, found, temperatures):
        tensors |= new_weights(model, output, state_dict)
    caps = {
        handler.attribute: cap / temperatures[name]
        for name, (_, handler) in found.items()
        if handler.attribute and (cap := getattr(model.config, handler.attribute, None)) is not None
    }
    return tensors, caps


@torch.no_grad()
def new_weights(model: nn.Module, output: Output, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return new parameters of a linear layer, a norm or an embedding that divide its output, or a part of it."""
    name, temperature, part, norm_offset = output
    module = model.get_submodule(name)
    tensors: dict[str, Tensor] = {}
    keys = dict(module.named_parameters())
    if "weight" not in keys or not set(keys) <= {"weight", "bias"}:
        raise InputError(f"{name} is a {type(module).__name__} and cannot be folded; merge adapters (merge_and_unload) first")
    for key in keys:
        tensor = state_dict[f"{name}.{key}"]
        if not tensor.is_floating_point():
            raise InputError(f"{name} holds quantized weights ({tensor.dtype}) and cannot be folded; load it in floating point")
        offset = norm_offset if key == "weight" else 0.0
        wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
        # So that offset + new = (offset + old) / t, without the rounding of offset + old.
        new = (wide / temperature + offset * (1 / temperature - 1)).to(tensor.dtype)
        if part is not None:
            chosen = part(len(tensor), tensor.device)
            new = torch.where(chosen.view(-1, *[1] * (tensor.dim() - 1)), new, tensor)
        tensors[f"{name}.{key}"] = new
    return tensors


@torch.no_grad()
def write(model: PreTrainedModel, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Write tensors into the parameters of a model, and settings into its config and its attention modules."""
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)
    for key, value in settings.items():
        setattr(model.config, key, value)
    for attention, handler in attentions(model).values():
        if handler.attribute and handler.attribute in settings:
            setattr(attention, handler.attribute, settings[handler.attribute])
