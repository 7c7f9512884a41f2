"""How much sharper attention is made, layer by layer and by the length of the text."""

import dataclasses
import logging
import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hf_embed.errors import InputError
from hf_embed.ranges import is_one_of

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"\s*[0-9]{1,4}\s*")  # of a layer; no model has more
ONE_HOT = 0.1  # below, a token attends to hardly anything but its best match


@dataclass
class TempScaleConfig:
    """Attention becomes softmax(scores / t): TempScale (https://arxiv.org/abs/2410.24200, equation 6), t < 1.

    The paper's argument: self-attention is a low-pass filter, and the longer a text the more it takes away, so that embeddings
    of long texts draw together; a temperature below 1 makes attention sharper and the filter weaker. Nothing is trained.

        TempScaleConfig(0.9)                         all layers
        TempScaleConfig([1, 1, 0.9, 0.9])            each of four layers
        TempScaleConfig({"2-3": 0.9, "5": 0.8})      layers by number, from 0; those not named stay as they are
        TempScaleConfig(0.9, growth="log")           and smaller for longer texts

    Layers are numbered as in the model, those without attention too (Jamba has it in every eighth).

    Args:
        temperature: t; see above.
        growth: how t falls with the number n of tokens, of texts longer than `reference_length`, r: "log" divides it by
            log n / log r, "power" by (n / r)^exponent. None: the same for all lengths. With growth a model cannot be folded.
        reference_length: the length, in tokens, from which on t falls.
        exponent: of "power".

    Raises:
        InputError: a temperature that is not above 0, an unknown growth, a layer that is not a number or a range of numbers.
    """

    temperature: float | list[float] | dict[str, float] = 0.9
    growth: str | None = None
    reference_length: int = 128
    exponent: float = 0.1

    def __post_init__(self) -> None:
        values = self.temperature
        values = list(values.values()) if isinstance(values, dict) else values if isinstance(values, list) else [values]
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int | float) or not (math.isfinite(value) and value > 0):
                raise InputError(f"TempScale temperature is {value!r}; give a number above 0, 0.9 for example")
        if not values:
            raise InputError("TempScale has no temperature; give a number above 0, 0.9 for example")
        if min(values) < ONE_HOT:
            logger.warning(
                f"TempScale temperature {min(values)}: attention is all but one-hot, each token sees its best match alone; "
                "0.5 to 1 is what helps"
            )
        if isinstance(self.temperature, dict):
            named = [number for key in self.temperature for number in layer_numbers(key)]
            if twice := [number for i, number in enumerate(named) if number in named[:i]]:
                raise InputError(f"TempScale names layer {twice[0]} twice")
        if self.growth is not None and not is_one_of(self.growth, ("log", "power")):
            raise InputError(f"unknown TempScale growth '{self.growth}'; there are log and power")
        if not isinstance(self.reference_length, int) or self.reference_length < 2:
            raise InputError(f"TempScale reference_length is {self.reference_length!r}; it must be a whole number above 1")
        if not (isinstance(self.exponent, int | float) and math.isfinite(self.exponent) and self.exponent > 0):
            raise InputError(f"TempScale exponent is {self.exponent!r}; it must be a number above 0")

    def of_layers(self, layers: int, attending: Collection[int] | None = None) -> list[float]:
        """Return the temperature of each of so many layers, of which `attending` have attention (default: all).

        Raises InputError for layers that there are not, or that have no attention.
        """
        if isinstance(self.temperature, list):
            if len(self.temperature) != layers:
                raise InputError(f"TempScale has {len(self.temperature)} temperatures; the model has {layers} layers")
            return [float(t) for t in self.temperature]
        if not isinstance(self.temperature, dict):
            return [float(self.temperature)] * layers
        temperatures = [1.0] * layers
        for key, temperature in self.temperature.items():
            for number in layer_numbers(key):
                if number >= layers:
                    raise InputError(f"TempScale names layer {number}; the model has the layers 0 to {layers - 1}")
                temperatures[number] = float(temperature)
            if attending is not None and not set(attending) & set(layer_numbers(key)):
                named = ", ".join(map(str, sorted(attending)))
                raise InputError(f"TempScale names layer {key}, which has no attention; the layers {named} have it")
        return temperatures

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments, as `from_dict` and a model's config.json take them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TempScaleConfig":
        """Make a config of its arguments. Raises InputError for a key that is none of them."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(settings) - names:
            raise InputError(f"TempScale: unknown key '{min(unknown)}'; there are {', '.join(sorted(names))}")
        return cls(**settings)


def layer_numbers(key: str | int) -> range:
    """Return the layers that a key names.

    >>> list(layer_numbers("3")), list(layer_numbers("2-5"))
    ([3], [2, 3, 4, 5])
    """
    first, dash, last = str(key).partition("-")
    if not NUMBER.fullmatch(first) or (dash and not NUMBER.fullmatch(last)):
        raise InputError(f"TempScale layers '{key}': give a number or a range, '3' or '2-5'")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers:
        raise InputError(f"TempScale layers '{key}': the range is empty; give the smaller number first")
    return numbers
