"""What the recipes share that encode and do not train: the flags of the model, and its loading."""

from dataclasses import dataclass, field

import torch

from hf_embed.encoder import Encoder
from hf_embed.kit.plan import TRUST
from hf_embed.ranges import COUNT, check_ranges

MODEL_HELP = "A folder or a Hub name. Default: the built-in quickstart encoder."


@dataclass(kw_only=True)
class EncodingArguments:
    """Flags of how a model encodes; a recipe's own dataclass derives from it."""

    pooling: str | None = field(default=None, metadata={"help": "Default: the folder's own, else mean."})
    max_length: int | None = field(default=None, metadata={"help": "Default: the folder's own."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST})

    def __post_init__(self) -> None:
        check_ranges(self, {"max_length": COUNT})


def load_for_encoding(name_or_path: str, flags: EncodingArguments, device: torch.device | str | None = None) -> Encoder:
    """Load a model as the flags ask; default device: the GPU, where there is one."""
    encoder = Encoder.from_pretrained(name_or_path, flags.pooling, flags.max_length, trust_remote_code=flags.trust_remote_code)
    return encoder.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
