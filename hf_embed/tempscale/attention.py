"""TempScale on a live model: applied, taken back, or folded into the weights.

Applied, the outputs that the registry names are divided by t as they come out of their submodule: the model's own attention
code, on whatever backend, does the rest. Folded, the weights that make these outputs are divided, and the model is an ordinary
one again.
"""

import contextlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hf_embed.errors import InputError
from hf_embed.tempscale.config import TempScaleConfig
from hf_embed.tempscale.registry import Handler, attentions, is_cross

logger = logging.getLogger(__name__)


@dataclass
class Applied:
    """What `apply_tempscale` did to a model, to be undone or folded.

    It is kept in the model's own dictionary, under `STATE`: a deep copy of the model then has its own, which names the copy's
    modules. A table of models beside them would know nothing of copies.
    """

    config: TempScaleConfig
    temperatures: dict[str, float]  # of each attention module, by name
    handles: list[RemovableHandle] = field(default_factory=list)
    numbers: list[tuple[nn.Module, str, float]] = field(
        default_factory=list
    )  # attributes that were divided, and what they were


STATE = "hf_embed_tempscale"


def applied_to(model: nn.Module) -> Applied | None:
    """Return what `apply_tempscale` did to `model` (or to the model within a PEFT model); None if it is not scaled."""
    return vars(base_of(model)).get(STATE)


class Divide:
    """Forward hook: divides a submodule's output, or a part of its last dimension, by the temperature."""

    def __init__(self, temperature: float, part: Callable | None = None, lengths: "Lengths | None" = None):
        self.temperature, self.part, self.lengths = temperature, part, lengths

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        divisor = self.temperature
        if self.lengths is not None:
            divisor = divisor * self.lengths.factor(output)
        if self.part is None:
            return output / divisor
        return torch.where(self.part(output.shape[-1], output.device), output / divisor, output)


class ScaleBias:
    """Forward pre-hook of an attention: multiplies the position biases that it is handed."""

    def __init__(self, attention: nn.Module, factor: float):
        self.place, self.factor = list(inspect.signature(attention.forward).parameters).index("position_bias"), factor

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if len(args) > self.place:
            return (*args[: self.place], args[self.place] * self.factor, *args[self.place + 1 :]), kwargs
        return args, kwargs | {"position_bias": kwargs["position_bias"] * self.factor}


class Lengths:
    """Forward pre-hook of the model: keeps the number of tokens of each text of the batch while its layers run."""

    def __init__(self, config: TempScaleConfig):
        self.config, self.tokens = config, None

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        if getattr(model, "is_activation_checkpointing", False) and model.training:
            raise RuntimeError("TempScale with growth cannot be trained under activation checkpointing; use gradient_caching")
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise InputError("TempScale with growth needs an attention_mask of one number a token, (texts, tokens)")
        if mask is None:
            inputs = given.get("input_ids") if given.get("input_ids") is not None else given["inputs_embeds"]
            mask = torch.ones(inputs.shape[:2], device=inputs.device)
        self.tokens = mask.sum(1)  # (B,)

    def factor(self, output: Tensor) -> Tensor:
        """What the temperature of each text is multiplied by, (B, 1, ...), for an output (B, ...)."""
        reference = self.config.reference_length
        tokens = self.tokens.clamp(min=reference).float()
        if self.config.growth == "log":
            factor = math.log(reference) / tokens.log()
        else:
            factor = (reference / tokens) ** self.config.exponent
        if len(factor) != output.shape[0]:
            raise RuntimeError(f"TempScale with growth: {len(factor)} texts, but queries of shape {tuple(output.shape)}")
        return factor.view(-1, *[1] * (output.dim() - 1)).to(output.dtype)


def base_of(model: nn.Module) -> nn.Module:
    """The model within a PEFT model."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def applied_tempscale(model: nn.Module) -> TempScaleConfig | None:
    """Return the config that is applied to `model`, not folded into it; None if there is none."""
    applied = applied_to(model)
    return applied.config if applied else None


def apply_tempscale(model: nn.Module, config: TempScaleConfig | float = 0.9) -> nn.Module:
    """Let `model` attend at the given temperature, until `remove_tempscale` or `fold_tempscale`. Returns the model.

    The model may be trained, compiled, wrapped in DDP or carry PEFT adapters afterwards, and runs on the attention backend it
    had. `model.config.temp_scale` says what was done. Attention of a decoder to another text is left alone.

    Raises:
        InputError: an attention class that is not known, by name; layers that there are not; a model that is scaled already;
            growth where the scores are more than queries times keys, or the queries not to be had.
    """
    config = config if isinstance(config, TempScaleConfig) else TempScaleConfig(config)
    whole, model = model, base_of(model)
    check_unscaled(model)
    found = attentions(model)
    applied = Applied(config, temperatures_of(model, found, config))
    tables = bias_tables(model, found, applied.temperatures)
    numbers = divided_numbers(found)
    if config.growth and (tables or numbers or any(len(handler.query) > 1 for _, handler in found.values())):
        raise InputError(f"TempScale with growth: the scores of {type(model).__name__} cannot be divided text by text")
    lengths = Lengths(config) if config.growth else None
    hooks = [(model.get_submodule(name), Divide(temperature)) for name, temperature in tables.items()]
    for name, (attention, handler) in found.items():
        for projection in projections(attention, handler).values():
            part = partial(handler.part, attention) if handler.part else None
            hooks.append((projection, Divide(applied.temperatures[name], part, lengths)))
    # All is known to be right; only now the model is touched.
    applied.handles = [module.register_forward_hook(hook) for module, hook in hooks]
    if lengths:
        applied.handles.append(model.register_forward_pre_hook(lengths, with_kwargs=True))
    for attention, factor in handed_biases(found, tables, applied.temperatures):
        applied.handles.append(attention.register_forward_pre_hook(ScaleBias(attention, factor), with_kwargs=True))
    for name, number in numbers.items():
        attention, handler = found[name]
        applied.numbers.append((attention, handler.attribute, number))
        setattr(attention, handler.attribute, number / applied.temperatures[name])
    if any(is_cross(name) for name, _ in model.named_modules()):
        logger.warning(f"TempScale leaves the attention of {type(model).__name__} to other texts (cross-attention) as it is")
    vars(model)[STATE] = applied
    model.config.temp_scale = config.to_dict()
    return whole


def temperatures_of(model: nn.Module, found: dict, config: TempScaleConfig) -> dict[str, float]:
    """The temperature of each attention, by its name. Raises InputError for layers that there are not.

    Layers are counted by their place in the model's list of layers; where attentions are not of one such list, one each
    (an encoder and a decoder), they are counted in their order.
    """
    places = [re.match(r"(.*?)\.?(\d+)\.", name) for name in found]
    numbers = [int(place[2]) for place in places if place]
    lists = {place and place[1] for place in places}
    if None in lists or len(lists) > 1 or len(set(numbers)) < len(found):
        return dict(zip(found, config.of_layers(len(found))))
    temperatures = config.of_layers(len(model.get_submodule(lists.pop())), numbers)
    return {name: temperatures[number] for name, number in zip(found, numbers)}


def check_unscaled(model: nn.Module) -> None:
    entry = getattr(model.config, "temp_scale", None)
    if applied := applied_to(model):
        raise InputError(f"the model is scaled already ({applied.config}); remove_tempscale first")
    if entry and entry.get("folded"):
        raise InputError(f"TempScale is folded into this model's weights already ({entry}); unfold_tempscale first")


def projections(attention: nn.Module, handler: Handler) -> dict[str, nn.Module]:
    """The submodules whose outputs are divided. The first has to be there; others belong to options of the model."""
    found = {name: getattr(attention, name, None) for name in handler.query}
    if handler.query and found[handler.query[0]] is None:
        raise InputError(f"TempScale: {type(attention).__name__} has no submodule '{handler.query[0]}'")
    return {name: module for name, module in found.items() if module is not None}


def bias_tables(model: nn.Module, found: dict, temperatures: dict[str, float]) -> dict[str, float]:
    """The tables of position biases by name, and the temperature of each: of its own layer, or of the first."""
    names = {handler.bias_table for _, handler in found.values() if handler.bias_table}
    tables = [name for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    first = next(iter(temperatures.values()))
    return {table: temperatures.get(table.rpartition(".")[0], first) for table in tables}


def handed_biases(found: dict, tables: dict[str, float], temperatures: dict[str, float]) -> list[tuple[nn.Module, float]]:
    """The attentions that are handed position biases divided by another temperature than theirs, and what these lack.

    T5 hands them on from layer to layer, MPNet from the table to each.
    """
    owners = {table.rpartition(".")[0] for table in tables}
    lacking, given = [], next(iter(tables.values()), None)
    for name, (attention, handler) in found.items():
        if tables and handler.bias_table and name not in owners and given != temperatures[name]:
            lacking.append((attention, given / temperatures[name]))
        if owners & found.keys():
            given = temperatures[name]
    return lacking


def divided_numbers(found: dict) -> dict[str, float]:
    """The number of an attention module that is divided, by the module's name, where there is one."""
    numbers = {
        name: getattr(attention, handler.attribute, None) for name, (attention, handler) in found.items() if handler.attribute
    }
    return {name: number for name, number in numbers.items() if number is not None}


def remove_tempscale(model: nn.Module) -> nn.Module:
    """Undo `apply_tempscale`: the model is what it was, bit for bit. Raises InputError if it is not scaled."""
    whole, model = model, base_of(model)
    applied = applied_to(model)
    if applied is None:
        raise InputError("there is no TempScale to remove: it was not applied, or is folded")
    for handle in applied.handles:
        handle.remove()
    for attention, attribute, value in applied.numbers:
        setattr(attention, attribute, value)
    del vars(model)[STATE], model.config.temp_scale
    return whole


@contextlib.contextmanager
def tempscale(model: nn.Module, config: TempScaleConfig | float) -> Iterator[nn.Module]:
    """`with tempscale(model, 0.9):` the model is scaled within, and as before afterwards."""
    apply_tempscale(model, config)
    try:
        yield model
    finally:
        remove_tempscale(model)
