"""Contexts in which a model computes as exactly as it can, so that its vectors can be compared."""

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from torch import nn


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[bool]:
    """Hold weights in half precision in float32 inside a `with` block, if they are not quantized and there is memory for it.

    The rounding of half precision hides small differences between vectors, and large ones between vectors that have much in
    common, as those of trained models do.

    Yields:
        Whether the weights were changed.
    """
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device
    half = [tensor for tensor in tensors if tensor.dtype in (torch.float16, torch.bfloat16)]
    quantized = any(not parameter.is_floating_point() for parameter in model.parameters())
    if quantized or 8 * sum(tensor.numel() for tensor in half) > free_memory(device):  # 4 bytes each, and as much again
        half = []
    stored = [tensor.data for tensor in half]
    try:
        for tensor in half:
            tensor.data = tensor.data.float()
        yield bool(half)
    finally:
        for tensor, data in zip(half, stored):
            tensor.data = data


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a device, or of the machine if the device is not a GPU of its own."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute products of float32 numbers exactly inside a `with` block. The error of TF32 is larger than every tolerance.

    PyTorch has a setting for all products, one for cuDNN, and one for each kind of products. A kind without a value of its own
    inherits one. It is not touched, because no value that could be set later means the same: the default "tf32" of the kinds of
    cuDNN gives way to the general settings, but a "tf32" that was set does not. The older function
    `torch.set_float32_matmul_precision` cannot be mixed with these settings, which `tf32=True` of `TrainingArguments` uses.
    """
    every: Any = torch.backends
    general, kinds = [every, every.cudnn], [every.cuda.matmul, every.mkldnn.matmul, every.cudnn.conv, every.cudnn.rnn]
    before = []
    try:
        for level in general:  # without the level above, which is now "none", a level shows its own value
            before.append((level, level.fp32_precision))
            level.fp32_precision = "none"
        for level in general:
            level.fp32_precision = "ieee"
        for level in kinds:
            if level.fp32_precision != "ieee":
                before.append((level, level.fp32_precision))
                level.fp32_precision = "ieee"
        yield
    finally:
        for level, value in reversed(before):
            level.fp32_precision = value
