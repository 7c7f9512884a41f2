"""hf_embed: fine-tune any PreTrainedModel into a text-embedding model with the Hugging Face Trainer.

Public names are imported when they are first used, because importing PyTorch and transformers takes seconds.
`import hf_embed` alone is immediate.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from hf_embed.entry import announce, starts_recipe
from hf_embed.version import __version__ as __version__

if TYPE_CHECKING:  # `x as x` makes a name public for type checkers
    # isort: off
    from hf_embed.arguments import ContrastiveTrainingArguments as ContrastiveTrainingArguments
    from hf_embed.averaging import average_models as average_models
    from hf_embed.checkpoint.card import write_card as write_card
    from hf_embed.checkpoint.onnx import export_onnx as export_onnx
    from hf_embed.data.mixture import Source as Source
    from hf_embed.encoder import Encoder as Encoder
    from hf_embed.errors import InputError as InputError
    from hf_embed.evaluation.held_out import HeldOut as HeldOut
    from hf_embed.evaluation.pair_classification import PairClassification as PairClassification
    from hf_embed.evaluation.reranking import Reranking as Reranking
    from hf_embed.evaluation.retrieval import Retrieval as Retrieval
    from hf_embed.evaluation.triplets import Triplets as Triplets
    from hf_embed.evaluation.zero_shot import ZeroShot as ZeroShot
    from hf_embed.mining import mine_hard_negatives as mine_hard_negatives
    from hf_embed.objectives import (
        CoSENT as CoSENT,
        ImprovedContrastive as ImprovedContrastive,
        MarginMSE as MarginMSE,
        Matryoshka as Matryoshka,
        SimCSE as SimCSE,
        TeacherKL as TeacherKL,
        VectorDistillation as VectorDistillation,
    )
    from hf_embed.search import semantic_search as semantic_search
    from hf_embed.tempscale import (
        TempScaleConfig as TempScaleConfig,
        apply_tempscale as apply_tempscale,
        fold_tempscale as fold_tempscale,
        register_tempscale as register_tempscale,
        remove_tempscale as remove_tempscale,
    )
    from hf_embed.trainer import ContrastiveTrainer as ContrastiveTrainer
    from hf_embed.vector_files import write_vectors as write_vectors

# The module of each public name. The imports above tell type checkers the same.
MODULES = {
    "arguments": ["ContrastiveTrainingArguments"],
    "averaging": ["average_models"],
    "checkpoint.card": ["write_card"],
    "checkpoint.onnx": ["export_onnx"],
    "data.mixture": ["Source"],
    "encoder": ["Encoder"],
    "errors": ["InputError"],
    "evaluation.held_out": ["HeldOut"],
    "evaluation.pair_classification": ["PairClassification"],
    "evaluation.reranking": ["Reranking"],
    "evaluation.retrieval": ["Retrieval"],
    "evaluation.triplets": ["Triplets"],
    "evaluation.zero_shot": ["ZeroShot"],
    "mining": ["mine_hard_negatives"],
    "objectives": ["CoSENT", "ImprovedContrastive", "MarginMSE", "Matryoshka", "SimCSE", "TeacherKL", "VectorDistillation"],
    "search": ["semantic_search"],
    "tempscale": ["TempScaleConfig", "apply_tempscale", "fold_tempscale", "register_tempscale", "remove_tempscale"],
    "trainer": ["ContrastiveTrainer"],
    "vector_files": ["write_vectors"],
}
__all__ = sorted(name for names in MODULES.values() for name in names)


def __getattr__(name: str) -> Any:
    """Import a public name, or a module of the package, when it is first used."""
    for module, names in MODULES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if starts_recipe():  # the `hf-embed` command announces the version itself, as soon as it knows the recipe
    announce(__version__)
