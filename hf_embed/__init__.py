"""hf_embed: fine-tune any PreTrainedModel into a text-embedding model with the Hugging Face Trainer."""

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.card import write_card
from hf_embed.data.mixture import Source
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.evaluation.held_out import HeldOut
from hf_embed.evaluation.pair_classification import PairClassification
from hf_embed.evaluation.reranking import Reranking
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.evaluation.triplets import Triplets
from hf_embed.evaluation.zero_shot import ZeroShot
from hf_embed.mining import mine_hard_negatives
from hf_embed.objectives import ImprovedContrastive, Matryoshka, SimCSE
from hf_embed.search import semantic_search
from hf_embed.tempscale import TempScaleConfig, apply_tempscale, fold_tempscale, register_tempscale, remove_tempscale
from hf_embed.trainer import ContrastiveTrainer
from hf_embed.vector_files import write_vectors
from hf_embed.version import __version__

__all__ = [
    "ContrastiveTrainer",
    "ContrastiveTrainingArguments",
    "Encoder",
    "HeldOut",
    "ImprovedContrastive",
    "InputError",
    "Matryoshka",
    "PairClassification",
    "Reranking",
    "Retrieval",
    "SimCSE",
    "Source",
    "TempScaleConfig",
    "Triplets",
    "ZeroShot",
    "__version__",
    "apply_tempscale",
    "fold_tempscale",
    "mine_hard_negatives",
    "register_tempscale",
    "remove_tempscale",
    "semantic_search",
    "write_card",
    "write_vectors",
]
