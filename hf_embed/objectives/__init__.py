"""Losses on embeddings: pure functions, by the protocol in base.py."""

from hf_embed.objectives.base import ContrastiveObjective, Objective, as_objective
from hf_embed.objectives.gte import ImprovedContrastive
from hf_embed.objectives.matryoshka import Matryoshka
from hf_embed.objectives.simcse import SimCSE

# By class name, as the results of a run name them; the model card takes the equation and the paper from here.
OBJECTIVES: dict[str, type[Objective]] = {
    "ImprovedContrastive": ImprovedContrastive,
    "Matryoshka": Matryoshka,
    "SimCSE": SimCSE,
}

__all__ = ["OBJECTIVES", "ContrastiveObjective", "ImprovedContrastive", "Matryoshka", "Objective", "SimCSE", "as_objective"]
