"""hf_embed: fine-tune any PreTrainedModel into a text-embedding model with the Hugging Face Trainer."""

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.objectives import SimCSE
from hf_embed.trainer import ContrastiveTrainer

__version__ = "0.1.0"

__all__ = ["ContrastiveTrainer", "ContrastiveTrainingArguments", "Encoder", "InputError", "SimCSE"]
