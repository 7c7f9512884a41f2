"""hf_embed: fine-tune any PreTrainedModel into a text-embedding model with the Hugging Face Trainer.

A name is imported when it is used, for PyTorch and transformers take seconds: `import hf_embed` alone takes none.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from hf_embed.entry import announce, starts_recipe

if TYPE_CHECKING:
    from hf_embed.arguments import ContrastiveTrainingArguments
    from hf_embed.data.mixture import Source
    from hf_embed.encoder import Encoder
    from hf_embed.errors import InputError
    from hf_embed.evaluation.retrieval import Retrieval
    from hf_embed.evaluation.zero_shot import ZeroShot
    from hf_embed.objectives import ImprovedContrastive, Matryoshka, SimCSE
    from hf_embed.tempscale import TempScaleConfig, apply_tempscale, fold_tempscale, register_tempscale, remove_tempscale
    from hf_embed.trainer import ContrastiveTrainer

__version__ = "0.1.0"

__all__ = [
    "ContrastiveTrainer",
    "ContrastiveTrainingArguments",
    "Encoder",
    "ImprovedContrastive",
    "InputError",
    "Matryoshka",
    "Retrieval",
    "SimCSE",
    "Source",
    "TempScaleConfig",
    "ZeroShot",
    "apply_tempscale",
    "fold_tempscale",
    "register_tempscale",
    "remove_tempscale",
]

# Where each name of `__all__` is, as the imports above say to type checkers.
MODULES = {
    "arguments": ["ContrastiveTrainingArguments"],
    "data.mixture": ["Source"],
    "encoder": ["Encoder"],
    "errors": ["InputError"],
    "evaluation.retrieval": ["Retrieval"],
    "evaluation.zero_shot": ["ZeroShot"],
    "objectives": ["ImprovedContrastive", "Matryoshka", "SimCSE"],
    "tempscale": ["TempScaleConfig", "apply_tempscale", "fold_tempscale", "register_tempscale", "remove_tempscale"],
    "trainer": ["ContrastiveTrainer"],
}


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


if starts_recipe():  # `hf-embed` says it when it knows the recipe
    announce(__version__)
