"""The settings of TempScale: how much sharper attention becomes in each layer, and for texts of which length."""

import dataclasses
import logging
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from hf_embed.errors import InputError, errors_of
from hf_embed.ranges import ABOVE_ZERO, Range, check_ranges, is_one_of

logger = logging.getLogger(__name__)

NUMBER = re.compile(r"\s*[0-9]{1,4}\s*")  # the number of a layer; no model has 10,000 layers
ONE_HOT = 0.1  # below this temperature, a token attends almost only to its best match


@dataclass
class TempScaleConfig:
    """The settings of TempScale: attention becomes softmax(Q K' / (t sqrt(d))) with t < 1.

    The formula is equation 6 of the paper (https://arxiv.org/abs/2410.24200). The paper argues that self-attention is a
    low-pass filter, which removes more the longer a text is, so that the embeddings of long texts draw together. A temperature
    below 1 makes attention sharper and the filter weaker. Nothing is trained.

    The code goes beyond the paper, which has one t for all layers and all lengths. Here t may differ between layers and fall
    with the length of a text, and everything else that enters the scores before the softmax, such as position biases, is
    divided by t too.

        TempScaleConfig(0.9)                         all layers
        TempScaleConfig([1, 1, 0.9, 0.9])            each of four layers
        TempScaleConfig({"2-3": 0.9, "5": 0.8})      layers by number, from 0; layers without a number stay as they are
        TempScaleConfig(0.9, growth="log")           smaller for longer texts

    Layers are numbered as in the model. Layers without attention count too (in Jamba, every eighth layer has attention).

    Args:
        temperature: t; see above.
        growth: how t falls for texts with more tokens than `reference_length`. With n tokens and r = `reference_length`, "log"
            divides t by log n / log r, and "power" divides t by (n / r)^exponent. None: the same t for all lengths. A
            temperature that changes with the length cannot be folded into the weights.
        reference_length: the number of tokens above which t falls.
        exponent: the exponent of "power".

    Raises:
        InputError: if a temperature is not above 0, the growth is unknown, a number is out of range, or a layer is not a number
            or a range of numbers.
    """

    temperature: float | list[float] | dict[str, float] = 0.9
    growth: str | None = None
    reference_length: int = 128
    exponent: float = 0.1

    def __post_init__(self) -> None:
        values = self.temperature
        values = list(values.values()) if isinstance(values, dict) else values if isinstance(values, list) else [values]
        for value in values:
            if not isinstance(value, int | float) or value not in ABOVE_ZERO:
                raise InputError(f"TempScale temperature is {value!r}; give a number above 0, for example 0.9")
        if not values:
            raise InputError("TempScale has no temperature; give a number above 0, for example 0.9")
        if min(values) < ONE_HOT:
            logger.warning(
                f"TempScale temperature {min(values)} is very low: each token attends almost only to its best match; use a "
                "value from 0.5 to 1"
            )
        if isinstance(self.temperature, dict):
            named = [number for key in self.temperature for number in layer_numbers(key)]
            if twice := [number for i, number in enumerate(named) if number in named[:i]]:
                raise InputError(f"TempScale names layer {twice[0]} twice; name it once")
        if self.growth is not None and not is_one_of(self.growth, ("log", "power")):
            raise InputError(f"unknown TempScale growth '{self.growth}'; use log or power")
        with errors_of("TempScale"):
            check_ranges(self, {"reference_length": Range(least=2, whole=True), "exponent": ABOVE_ZERO})

    def of_layers(self, layers: int, attending: Collection[int] | None = None) -> list[float]:
        """Return the temperature of each layer of a model with this number of layers.

        `attending` are the numbers of the layers that have attention (default: all). Raise InputError if a named layer does not
        exist, or if a key names only layers without attention.
        """
        if isinstance(self.temperature, list):
            if len(self.temperature) != layers:
                raise InputError(
                    f"TempScale has {len(self.temperature)} temperatures, but the model has {layers} layers; give one for each"
                )
            return [float(t) for t in self.temperature]
        if not isinstance(self.temperature, dict):
            return [float(self.temperature)] * layers
        temperatures = [1.0] * layers
        for key, temperature in self.temperature.items():
            for number in layer_numbers(key):
                if number >= layers:
                    raise InputError(f"TempScale names layer {number}, but the model has only the layers 0 to {layers - 1}")
                temperatures[number] = float(temperature)
            if attending is not None and not set(attending) & set(layer_numbers(key)):
                named = ", ".join(map(str, sorted(attending)))
                raise InputError(f"TempScale names layer {key}, which has no attention; use the layers {named}")
        return temperatures

    def to_dict(self) -> dict[str, Any]:
        """Return the arguments in the form that `from_dict` and a model's config.json take."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, settings: dict[str, Any]) -> "TempScaleConfig":
        """Create a config from its arguments. Raise InputError if a key is not one of them."""
        names = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(settings) - names:
            raise InputError(f"TempScale: unknown key '{min(unknown)}'; use {', '.join(sorted(names))}")
        return cls(**settings)


def layer_numbers(key: str | int) -> range:
    """Return the numbers of the layers that a key names.

    >>> list(layer_numbers("3")), list(layer_numbers("2-5"))
    ([3], [2, 3, 4, 5])
    """
    first, dash, last = str(key).partition("-")
    if not NUMBER.fullmatch(first) or (dash and not NUMBER.fullmatch(last)):
        raise InputError(f"TempScale layers '{key}': give a number or a range, for example '3' or '2-5'")
    numbers = range(int(first), int(last or first) + 1)
    if not numbers:
        raise InputError(f"TempScale layers '{key}': the range is empty; give the smaller number first")
    return numbers
