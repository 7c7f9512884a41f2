"""Losses on embeddings: pure functions that follow the protocol in base.py."""

from hf_embed.objectives.base import ContrastiveObjective, Objective, as_objective
from hf_embed.objectives.gte import ImprovedContrastive
from hf_embed.objectives.matryoshka import Matryoshka
from hf_embed.objectives.simcse import SimCSE

# Objectives by class name, the name under which a run records its loss. The model card reads `equation` and `paper` here.
OBJECTIVES: dict[str, type[Objective]] = {
    "ImprovedContrastive": ImprovedContrastive,
    "Matryoshka": Matryoshka,
    "SimCSE": SimCSE,
}

__all__ = ["OBJECTIVES", "ContrastiveObjective", "ImprovedContrastive", "Matryoshka", "Objective", "SimCSE", "as_objective"]
