"""The average of the weights of several finished models, which have one architecture and differ only in their training.

Models that were trained from the same start, with other data or other seeds, can be averaged weight by weight: the average has
the size and the speed of one model ("model soup", https://arxiv.org/abs/2203.05482). Current public embedding models end their
training this way. Models from different starts cannot be averaged, because their weights do not correspond. Nothing in a folder
tells the start of a training, so this is not checked: evaluate the average.

    encoder = average_models(["outputs/a", "outputs/b"], [3, 1])  # 0.75 * a + 0.25 * b
    encoder.save_pretrained("outputs/average")
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_embed.checkpoint.save import renewed, save_encoder
from hf_embed.checkpoint.tables import Results
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.files.disk import disk_errors
from hf_embed.fingerprint import described
from hf_embed.training.record import on_the_hub, publishable


def average_models(
    names: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    max_length: int | None = None,
    trust_remote_code: bool = False,
) -> Encoder:
    """Return the model whose weights are the weighted mean of the weights of several models.

    The mean is computed in float32, whatever the data type of the stored weights is, and the returned model is in float32. At
    most two models are in memory at a time.

    Args:
        names: two or more folders, or names of models on the Hub.
        weights: a number above 0 for each model. They are divided by their sum. Default: all models count the same.
        max_length: the maximum length of a text, in tokens. Needed only if the models state different lengths.
        trust_remote_code: run the Python code that comes with the models.

    Raises:
        InputError: if there are fewer than two models, if the weights do not fit, if a model cannot be loaded, or if the models
            differ in something other than their weights: the message names it.
    """
    shares = shares_of(names, weights)
    load = {"max_length": max_length, "trust_remote_code": trust_remote_code, "dtype": torch.float32}
    first, *others = map(str, names)
    average = Encoder.from_pretrained(first, **load)  # type: ignore[arg-type]
    expected, total = described(average), tensors_of(average)
    for tensor in total.values():
        if tensor.is_floating_point():
            tensor.mul_(shares[0])
    for name, share in zip(others, shares[1:]):
        encoder = Encoder.from_pretrained(name, **load)  # type: ignore[arg-type]
        check_can_be_averaged(described(encoder), expected, name, first)
        add(total, tensors_of(encoder), share, name, first)
    return average


def save_average(encoder: Encoder, folder: str | Path, names: Sequence[str], weights: Sequence[float] | None = None) -> None:
    """Save an average of models. Its card and results.json tell which models it is made of, and their shares.

    Args:
        encoder: the result of `average_models`.
        folder: the output folder, as for `Encoder.save_pretrained`. The scores of an earlier model in it are removed.
        names: the models, as for `average_models`.
        weights: their weights, as for `average_models`.

    Raises:
        ExportError: if other loaders would compute other vectors.
        DiskError: if the disk is full or a file may not be written.
    """
    averaged = [{"model": publishable(name), "share": share} for name, share in zip(names, shares_of(names, weights))]
    results: Results = {"averaged": averaged, "card": {"tags": ["merge"]}}
    if bases := [name for name in names if on_the_hub(name)]:
        results["card"]["base_model"] = bases
    with disk_errors(folder), renewed(Path(folder), clear=True) as place:
        save_encoder(encoder, str(place), results=results)


def shares_of(names: Sequence[str | Path], weights: Sequence[float] | None) -> list[float]:
    """Return the share of each model in the average. The shares sum to 1.

    Raises:
        InputError: if there are fewer than two models, or if the weights are not one number above 0 for each model.
    """
    if isinstance(names, str) or len(names) < 2:
        raise InputError("an average needs at least two models; give two or more folders")
    weights = [1.0] * len(names) if weights is None else list(weights)
    if len(weights) != len(names):
        raise InputError(f"weights: there are {len(weights)} numbers for {len(names)} models; give one number for each model")
    for weight in weights:
        if not (math.isfinite(weight) and weight > 0):
            raise InputError(f"weights: {weight:g} is not a number above 0; remove the model, or give it a weight above 0")
    return [weight / sum(weights) for weight in weights]


# ---- what has to be the same ----


def check_can_be_averaged(found: dict[str, Any], expected: dict[str, Any], name: str, first: str) -> None:
    """Raise InputError, with the name of the first difference, if two models cannot be averaged."""
    key = next((key for key, value in expected.items() if found[key] != value), None)
    if key is None:
        return
    what, mine, other = key, found[key], expected[key]
    if key == "config":
        entry = min(entry for entry in mine.keys() | other.keys() if mine.get(entry) != other.get(entry))
        what, mine, other = f"architecture ({entry} in config.json)", mine.get(entry), other.get(entry)
    values = "" if key == "tokenizer" else f": {mine!r} and {other!r}"
    mend = ", or set max_length for all of them" if key == "max_length" else ""
    raise InputError(
        f"'{name}' and '{first}' cannot be averaged, because they differ in {what}{values}; average models that differ only in "
        f"their weights{mend}"
    )


# ---- the weights ----


def tensors_of(encoder: Encoder) -> dict[str, Tensor]:
    """Return the tensors of a model that are saved, each once, without their gradients. They share the model's memory."""
    saved = encoder.state_dict().keys()
    named = itertools.chain(encoder.named_parameters(), encoder.named_buffers())
    return {name: tensor.detach() for name, tensor in named if name in saved}


def add(total: dict[str, Tensor], tensors: dict[str, Tensor], share: float, name: str, first: str) -> None:
    """Add the tensors of one model, times its share, to `total` in place.

    Raises:
        InputError: if the model has other tensors, or other values in a tensor of whole numbers, which have no mean.
    """
    for key in total.keys() | tensors.keys():
        same = key in total and key in tensors and total[key].shape == tensors[key].shape
        if same and total[key].is_floating_point():
            total[key].add_(tensors[key], alpha=share)
        elif not (same and torch.equal(total[key], tensors[key])):
            raise InputError(
                f"'{name}' and '{first}' cannot be averaged, because they differ in architecture: the tensor '{key}' is not in "
                "both, or has another shape or other whole numbers; average models that differ only in their weights"
            )
