"""Apply TempScale to a model in memory, and remove it again.

Forward hooks divide by t the outputs that the registry names, as they come out of their submodule. Numbers that the registry
names, such as a cap of the scores, are divided in place. The model's own attention code, on any backend, does the rest.
`hf_embed.tempscale.fold` divides the weights that produce these outputs instead; the model is then an ordinary model again.

Shapes: B texts of a batch.
"""

import contextlib
import inspect
import logging
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from hf_embed.errors import InputError
from hf_embed.files.read_files import COPY_ANEW
from hf_embed.library_internals import CHECKPOINTING
from hf_embed.tempscale.config import TempScaleConfig
from hf_embed.tempscale.registry import Attentions, attentions, is_cross

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound=nn.Module)


def apply_tempscale(model: Model, config: TempScaleConfig | float = 0.9) -> Model:
    """Make `model` attend at the given temperature until `remove_tempscale` or `fold_tempscale`. Return the model.

    Afterwards the model can be trained, compiled or wrapped in DDP. It keeps its attention backend. PEFT adapters that are
    added later are scaled as soon as an `Encoder` or a trainer is made of the model. Cross-attention of a decoder is not
    changed. `model.config.temp_scale` records the settings. `model` may also be an `Encoder`, a `SentenceTransformer`, or
    another module around one transformers model.

    Raises:
        InputError: if an attention class is unknown (the message names it); if the model lacks a named layer; if the model is
            already scaled; if a submodule that the registry names is missing; or if the temperature grows with length, and the
            scores are not just queries times keys or no submodule outputs the queries.
    """
    config = config if isinstance(config, TempScaleConfig) else TempScaleConfig(config)
    base = model_in(model)
    check_unscaled(base)
    found = attentions(base)
    temperatures = temperatures_of(base, found, config)
    outputs, numbers = divided_outputs(base, found, temperatures), divided_numbers(found)
    tables = bias_tables(base, found, temperatures)
    if config.growth and (tables or numbers or any(len(handler.query) > 1 for _, handler in found.values())):
        raise InputError(
            f"TempScale with growth: the scores of {type(base).__name__} cannot be divided by another number for each text; "
            "use it without growth"
        )
    # All checks have passed. The model is changed only from here on.
    applied = Applied(config, temperatures)
    lengths = Lengths(config) if config.growth else None
    pre_hooks: list[tuple[nn.Module, ScaleBias | Lengths]] = [(base, lengths)] if lengths else []
    for name, factor in handed_biases(found, tables, temperatures):
        pre_hooks.append((found[name][0], ScaleBias(found[name][0], factor)))
    applied.handles += [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in pre_hooks]
    for output in outputs:
        applied.handles.append(base.get_submodule(output.module).register_forward_hook(Divide(output, lengths)))
    for name, (attribute, number) in numbers.items():
        applied.numbers.append((found[name][0], attribute, number))
        setattr(found[name][0], attribute, number / temperatures[name])
    if any(is_cross(name) for name, _ in base.named_modules()):
        logger.warning(f"TempScale does not change the cross-attention of {type(base).__name__} (attention to other texts)")
    setattr(base, STATE, applied)
    base.config.temp_scale = config.to_dict()
    return model


def remove_tempscale(model: Model) -> Model:
    """Undo `apply_tempscale`, so that the model is bit for bit what it was before. Return the model.

    Raises:
        InputError: if no TempScale is applied to the model.
    """
    base = model_in(model)
    applied = applied_to(base)
    if applied is None:
        raise InputError("there is no TempScale to remove: it was not applied, or it is folded")
    for handle in applied.handles:
        handle.remove()
    for attention, attribute, number in applied.numbers:
        setattr(attention, attribute, number)
    delattr(base, STATE)
    del base.config.temp_scale
    return model


@contextlib.contextmanager
def tempscale(model: nn.Module, config: TempScaleConfig | float) -> Iterator[nn.Module]:
    """Apply TempScale to a model inside a `with` block, and remove it afterwards.

    with tempscale(model, 0.9):
        vectors = encoder.encode(texts)
    """
    apply_tempscale(model, config)
    try:
        yield model
    finally:
        remove_tempscale(model)


# ---- what is applied to a model ----

STATE = "hf_embed_tempscale"


@dataclass
class Applied:
    """The changes that `apply_tempscale` made to a model, so that they can be undone or folded.

    The model holds this object in the attribute that `STATE` names. So a deep copy of the model has its own object, which
    refers to the modules of the copy, and a compiled model finds the object of the model inside it. Only `applied_to` reads the
    attribute.
    """

    config: TempScaleConfig
    temperatures: dict[str, float]  # temperature of each attention module, by name
    handles: list[RemovableHandle] = field(default_factory=list)
    numbers: list[tuple[nn.Module, str, float]] = field(default_factory=list)  # module, attribute, value before the division


def applied_to(model: nn.Module) -> Applied | None:
    """Return what `apply_tempscale` did to `model`, or to the model inside it; None if it is not scaled."""
    return getattr(model_in(model), STATE, None)


def applied_tempscale(model: nn.Module) -> TempScaleConfig | None:
    """Return the settings that are applied to `model` and not folded into it; None if there are none."""
    applied = applied_to(model)
    return applied.config if applied else None


def check_unscaled(model: PreTrainedModel) -> None:
    """Raise InputError if TempScale is applied to `model` or folded into it."""
    if applied := applied_to(model):
        raise InputError(f"TempScale is already applied to this model ({applied.config}); call remove_tempscale first")
    entry = stated(model)
    if entry.get("folded"):
        raise InputError(
            f"TempScale is already folded into this model's weights ({entry}); call hf_embed.tempscale.unfold_tempscale first"
        )


def stated(model: PreTrainedModel) -> dict[str, Any]:
    """Return a copy of what the config of `model` states about TempScale; {} if nothing."""
    entry = getattr(model.config, "temp_scale", None) or {}
    if not isinstance(entry, dict):
        raise InputError(
            f"model '{model.name_or_path}': temp_scale in config.json is {entry!r}, which is not an object; {COPY_ANEW}"
        )
    return dict(entry)


def apply_stated(model: PreTrainedModel) -> None:
    """Apply the TempScale that the config of `model` states, unless it is folded into the weights.

    If it is applied already, it is applied anew, because adapters may have taken the place of a layer with a hook.
    """
    entry = stated(model)
    if applied := applied_to(model):
        remove_tempscale(model)
    if entry and not entry.get("folded"):
        apply_tempscale(model, applied.config if applied else TempScaleConfig.from_dict(entry))


def model_in(module: nn.Module) -> PreTrainedModel:
    """Return the transformers model in a module, without its head.

    Everything that is applied to the model belongs to this part, because an `Encoder` takes it out of the rest.

    Raises:
        InputError: if there is no such model, or if there are several.
    """
    found = models_in(module)
    if len(found) != 1:
        raise InputError(f"TempScale: {len(found)} transformers models are in the {type(module).__name__}; give one model")
    base: Any = found[0].base_model
    return base if isinstance(base, PreTrainedModel) else found[0]


def models_in(module: nn.Module) -> list[PreTrainedModel]:
    """Return the outermost transformers models in a module."""
    if isinstance(module, PreTrainedModel):
        return [module]
    return [model for child in module.children() for model in models_in(child)]


# ---- what is divided, and by what ----


def temperatures_of(model: PreTrainedModel, found: Attentions, config: TempScaleConfig) -> dict[str, float]:
    """Return the temperature of each attention, by its name. Raise InputError if the model lacks a named layer.

    The number of a layer is its index in the model's list of layers. If the attentions do not belong to one list with one
    attention per layer (an encoder and a decoder), they are numbered in their order.
    """
    places = [place for name in found if (place := re.match(r"(.*?)\.?(\d+)\.", name))]
    numbers = [int(place[2]) for place in places]
    lists = {place[1] for place in places}
    if len(lists) != 1 or len(set(numbers)) < len(found):
        return dict(zip(found, config.of_layers(len(found))))
    layers: Any = model.get_submodule(lists.pop())
    temperatures = config.of_layers(len(layers), numbers)
    return {name: temperatures[number] for name, number in zip(found, numbers)}


class Output(NamedTuple):
    """The output of a submodule that is divided by a temperature, or a part of the output."""

    module: str  # the name of the submodule
    temperature: float
    part: Callable[[int, torch.device], Tensor] | None = None
    norm_offset: float = 0.0


def divided_outputs(model: nn.Module, found: Attentions, temperatures: dict[str, float]) -> list[Output]:
    """Return the outputs that are divided: those of tables of position biases, and those that the registry names.

    Of the submodules that the registry names for a class, the first one must exist. Others may be missing, because they belong
    to options of the model.
    """
    outputs = [Output(name, temperature) for name, temperature in bias_tables(model, found, temperatures).items()]
    for name, (attention, handler) in found.items():
        part = partial(handler.part, attention) if handler.part else None
        for child in handler.query:
            if getattr(attention, child, None) is not None:
                outputs.append(Output(f"{name}.{child}", temperatures[name], part, handler.norm_offset))
            elif child == handler.query[0]:
                raise InputError(f"TempScale: {type(attention).__name__} has no submodule '{child}'")
    return outputs


def bias_tables(model: nn.Module, found: Attentions, temperatures: dict[str, float]) -> dict[str, float]:
    """Return the temperature by which each table of position biases is divided, by the name of the table.

    It is the temperature of the attention that owns the table. If no attention owns it, it is the temperature of the first
    layer. With the temperatures 0.5, 0.8 and 1.0 of three layers, and shortened names:

        T5      the first layer owns the only table     {"block.0.attention.relative_attention_bias": 0.5}
        UMT5    each layer owns one                     {"block.0...": 0.5, "block.1...": 0.8, "block.2...": 1.0}
        MPNet   the encoder owns the only table         {"encoder.relative_attention_bias": 0.5}
    """
    names = {handler.bias_table for _, handler in found.values() if handler.bias_table}
    tables = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in names]
    first = next(iter(temperatures.values()))
    return {table: temperatures.get(table.rpartition(".")[0], first) for table in tables}


def handed_biases(found: Attentions, tables: dict[str, float], temperatures: dict[str, float]) -> list[tuple[str, float]]:
    """Return the attentions that receive biases divided by another temperature than their own, each with a correcting factor.

    A layer at temperature t has to add b / t to its scores, where b is the output of the table. With the temperatures 0.5, 0.8
    and 1.0 of three layers:

        T5      the first layer's table gives b / 0.5, and each layer passes what it added on to the next layer:
                layer 1 receives b / 0.5 and needs b / 0.8: the factor is 0.5 / 0.8
                layer 2 receives b / 0.8 and needs b / 1.0: the factor is 0.8 / 1.0
        MPNet   the encoder's table gives b / 0.5, and the encoder passes that to each layer:
                layer 0 needs no factor, layer 1 needs 0.5 / 0.8, layer 2 needs 0.5 / 1.0
        UMT5    nothing is passed on: each layer has its own table
    """
    if not tables:
        return []
    owners = {table.rpartition(".")[0] for table in tables}
    handed_on = bool(owners & found.keys())  # from layer to layer, not from the encoder to each layer
    given, factors = next(iter(tables.values())), []
    for name, (_, handler) in found.items():
        needed = temperatures[name]
        if handler.bias_table and name not in owners and needed != given:
            factors.append((name, given / needed))
        if handed_on:
            given = needed
    return factors


def divided_numbers(found: Attentions) -> dict[str, tuple[str, float]]:
    """Return the numbers that are divided, as (attribute, number), by the name of the attention module that holds them."""
    return {
        name: (handler.attribute, number)
        for name, (attention, handler) in found.items()
        if handler.attribute and (number := getattr(attention, handler.attribute, None)) is not None
    }


# ---- hooks ----


class Divide:
    """A forward hook that divides the output of a submodule, or a part of its last dimension, by the temperature."""

    def __init__(self, divided: Output, lengths: "Lengths | None"):
        self.temperature, self.part, self.lengths = divided.temperature, divided.part, lengths

    def __call__(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Return the output to use instead."""
        divisor: float | Tensor = self.temperature
        if self.lengths is not None:
            divisor = divisor * self.lengths.factor(output)
        if self.part is None:  # (Q / t) K' = Q K' / t: equation 6 of the paper without a change of the attention code
            return output / divisor
        return torch.where(self.part(output.shape[-1], output.device), output / divisor, output)


class ScaleBias:
    """A forward pre-hook of an attention that multiplies the position biases that it receives."""

    def __init__(self, attention: nn.Module, factor: float):
        self.place, self.factor = list(inspect.signature(attention.forward).parameters).index("position_bias"), factor

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Return the arguments to use instead."""
        if len(args) > self.place:
            return (*args[: self.place], args[self.place] * self.factor, *args[self.place + 1 :]), kwargs
        return args, kwargs | {"position_bias": kwargs["position_bias"] * self.factor}


class Lengths:
    """A forward pre-hook of the model that stores the number of tokens of each text of the batch while the layers run."""

    def __init__(self, config: TempScaleConfig):
        self.config = config
        # For each thread: (B, 1), or for a packed row of S tokens (1, S), the length of the text of each token.
        self.tokens: dict[int, Tensor] = {}

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Count the tokens of each text, padded or packed (`hf_embed.forward.packing`).

        Raises:
            InputError: if the attention mask does not have the two dimensions (texts, tokens).
            RuntimeError: under activation checkpointing. The layers would run again in the backward pass, when the stored
                numbers may belong to another batch.
        """
        if getattr(model, f"is_{CHECKPOINTING}", False) and model.training:
            raise RuntimeError("TempScale with growth cannot be trained with activation checkpointing; use gradient_caching")
        if (bounds := kwargs.get("cu_seq_lens_q")) is not None:
            lengths = bounds.diff()
            self.tokens[get_ident()] = lengths.repeat_interleave(lengths).unsqueeze(0)
            return
        given = inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments
        mask = given.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise InputError("TempScale with growth needs an attention_mask with one number per token, (texts, tokens)")
        if mask is None:
            inputs = given["inputs_embeds"] if given.get("input_ids") is None else given["input_ids"]
            mask = torch.ones(inputs.shape[:2], device=inputs.device)
        self.tokens[get_ident()] = mask.sum(1, keepdim=True)

    def factor(self, output: Tensor) -> Tensor:
        """Return the factor for the temperature of each text, (B, 1, ...), for an output (B, T, ...); see `TempScaleConfig`.

        For the output (1, S, ...) of a packed row, it is (1, S, 1, ...).
        """
        reference = self.config.reference_length
        tokens = self.tokens[get_ident()].clamp(min=reference).float()
        if self.config.growth == "log":
            factor = math.log(reference) / tokens.log()
        else:
            factor = (reference / tokens) ** self.config.exponent
        if len(factor) != output.shape[0] or factor.shape[1] not in (1, output.shape[1]):
            raise RuntimeError(f"TempScale with growth: {len(factor)} texts, but queries of shape {tuple(output.shape)}")
        return factor.view(*factor.shape, *[1] * (output.dim() - 2)).to(output.dtype)
