"""TempScale into the weights: the model is an ordinary checkpoint again, as fast as it was, and nobody needs this package.

    softmax(Q K' / (t sqrt d)) = softmax((Q / t) K' / sqrt d),    Q / t = x (W / t)' + b / t

Rotary position embeddings turn queries and commute with it; a norm behind the projection is divided in its place.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_embed.errors import InputError
from hf_embed.tempscale.attention import (
    Applied,
    applied_tempscale,
    applied_to,
    apply_tempscale,
    base_of,
    bias_tables,
    projections,
    remove_tempscale,
    temperatures_of,
)
from hf_embed.tempscale.config import TempScaleConfig
from hf_embed.tempscale.registry import Attentions, attentions


def fold_tempscale(model: nn.Module, config: TempScaleConfig | float | None = None) -> nn.Module:
    """Put the temperature that is applied to `model`, or the one of `config`, into its weights. Returns the model.

    `model.config.temp_scale` keeps what was folded, marked so; it is never applied again.

    Raises:
        InputError: nothing is applied and no config given; a temperature that grows with length; several temperatures for
            layers that share a table of position biases or a cap of the scores; an attention without a line in the registry;
            PEFT adapters that are not merged; quantised weights. The model is then as it was.
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
    write(base_of(model), tensors, settings)
    return model


def unfold_tempscale(model: nn.Module) -> nn.Module:
    """Undo `fold_tempscale`: the weights are what they were, to within one more rounding. Returns the model.

    Raises:
        InputError: nothing is folded into the model.
    """
    config: Any = model.config
    entry = dict(getattr(config, "temp_scale", None) or {})
    if not entry.pop("folded", False):
        raise InputError("no TempScale is folded into this model")
    base = base_of(model)
    temperatures = temperatures_of(base, attentions(base), TempScaleConfig.from_dict(entry))
    write(base, *scaled(base, {name: 1 / temperature for name, temperature in temperatures.items()}))
    del config.temp_scale
    return model


def folded(model: nn.Module, state_dict: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a folded model has in place of the tensors of this scaled one, by name, and in its config.

    `state_dict` is taken for the model's own (FSDP gathers it). Raises as `fold_tempscale`.
    """
    applied = applied_for_folding(model)
    if model is not base_of(model):
        raise InputError("TempScale cannot be folded into a model with PEFT adapters; merge_and_unload first")
    check_foldable(model)
    tensors, settings = scaled(base_of(model), applied.temperatures, state_dict)
    return tensors, settings | {"temp_scale": applied.config.to_dict() | {"folded": True}}


def applied_for_folding(model: nn.Module) -> Applied:
    """Return what is applied to `model`. Raises InputError if nothing is."""
    applied = applied_to(model)
    if applied is None:
        raise InputError("there is no TempScale to fold; apply_tempscale first, or give a TempScaleConfig")
    return applied


def check_foldable(model: nn.Module) -> None:
    """Raise InputError if weights cannot hold what is applied to `model`."""
    base = base_of(model)
    applied, found = applied_for_folding(base), attentions(base)
    if applied.config.growth:
        raise InputError("TempScale that grows with length cannot be folded: weights do not know how long the text is")
    for attention, handler in found.values():
        if not handler.query:
            kind = type(attention).__name__
            raise InputError(
                f"TempScale cannot be folded: which weights make the queries of {kind} is not known; if a submodule does, "
                f"say so: register_tempscale('{kind}', query='q_proj')"
            )
    if len(set(applied.temperatures.values())) > 1 and (shared := shared_by_layers(base, found, applied.temperatures)):
        raise InputError(f"TempScale: {type(base).__name__} has one {shared} for several layers; fold one temperature")


def shared_by_layers(model: PreTrainedModel, found: Attentions, temperatures: dict[str, float]) -> str | None:
    """Return the name of a number or table that several layers share, and that has room for one temperature only."""
    attributes = {handler.attribute for _, handler in found.values() if handler.attribute}
    shared = {attribute for attribute in attributes if getattr(model.config, attribute, None)}
    tables = bias_tables(model, found, temperatures)
    if 0 < len(tables) < len(found):
        shared.add(next(iter(tables)).rpartition(".")[2])
    return min(shared, default=None)


def is_foldable(model: nn.Module) -> bool:
    """Return whether weights can hold what is applied to `model`, if anything is."""
    try:
        if applied_tempscale(model) is not None:
            check_foldable(model)
    except InputError:
        return False
    return True


def scaled(
    model: PreTrainedModel, temperatures: dict[str, float], state_dict: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return what divides the scores of each attention by its temperature: {parameter: tensor} and {config key: number}."""
    state_dict = dict(model.named_parameters()) if state_dict is None else state_dict
    found = attentions(model)
    tensors: dict[str, Tensor] = {}
    caps: dict[str, float] = {}
    for name, (attention, handler) in found.items():
        part = partial(handler.part, attention) if handler.part else None
        for child in projections(attention, handler):
            tensors |= divided(model, f"{name}.{child}", temperatures[name], state_dict, part, handler.norm_offset)
        cap = getattr(model.config, handler.attribute, None) if handler.attribute else None
        if handler.attribute and cap is not None:
            caps[handler.attribute] = cap / temperatures[name]
    for name, temperature in bias_tables(model, found, temperatures).items():
        tensors |= divided(model, name, temperature, state_dict)
    return tensors, caps


@torch.no_grad()
def divided(
    model: nn.Module,
    name: str,
    temperature: float,
    state_dict: Mapping[str, Tensor],
    part: Callable[[int, torch.device], Tensor] | None = None,
    norm_offset: float = 0.0,
) -> dict[str, Tensor]:
    """Return new parameters for a linear layer, a norm or an embedding, with which its output is divided."""
    module = model.get_submodule(name)
    tensors: dict[str, Tensor] = {}
    keys = dict(module.named_parameters())
    if "weight" not in keys or not set(keys) <= {"weight", "bias"}:
        raise InputError(f"{name} is a {type(module).__name__} and cannot be folded; merge adapters (merge_and_unload) first")
    for key in keys:
        tensor = state_dict[f"{name}.{key}"]
        if not tensor.is_floating_point():
            raise InputError(f"{name} holds quantised weights ({tensor.dtype}) and cannot be folded; load it in floating point")
        offset = norm_offset if key == "weight" else 0.0
        new = (tensor + offset) / temperature - offset
        if part is not None:
            chosen = part(len(tensor), tensor.device)
            new = torch.where(chosen.view(-1, *[1] * (tensor.dim() - 1)), new, tensor)
        tensors[f"{name}.{key}"] = new
    return tensors


@torch.no_grad()
def write(model: PreTrainedModel, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    """Put tensors into the parameters of a model, and settings into its config and its attention modules."""
    for name, tensor in tensors.items():
        model.get_parameter(name).copy_(tensor)
    for key, value in settings.items():
        setattr(model.config, key, value)
    for attention, handler in attentions(model).values():
        if handler.attribute and handler.attribute in settings:
            setattr(attention, handler.attribute, settings[handler.attribute])
