"""The model of a recipe that encodes and does not train."""

from typing import Protocol

import torch

from hf_embed.encoder import Encoder


class EncoderFlags(Protocol):
    """The flags by which such a recipe names its model."""

    model_name_or_path: str
    pooling: str | None
    max_length: int | None
    trust_remote_code: bool


def load_for_encoding(flags: EncoderFlags, device: torch.device | str | None = None) -> Encoder:
    """Load the model that the flags name; default device: the GPU, where there is one."""
    encoder = Encoder.from_pretrained(
        flags.model_name_or_path, flags.pooling, flags.max_length, trust_remote_code=flags.trust_remote_code
    )
    return encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
