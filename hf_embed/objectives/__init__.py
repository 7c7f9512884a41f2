"""Losses on embeddings: pure functions with the interface of base.py."""

from hf_embed.objectives.base import Objective, as_objective
from hf_embed.objectives.cosent import CoSENT
from hf_embed.objectives.gte import ImprovedContrastive
from hf_embed.objectives.matryoshka import Matryoshka
from hf_embed.objectives.simcse import SimCSE
from hf_embed.objectives.teacher import MarginMSE, TeacherKL, VectorDistillation

# Objectives by class name, the name under which a run records its loss. The model card reads `equation` and `paper` here.
OBJECTIVES: dict[str, type[Objective]] = {
    "CoSENT": CoSENT,
    "ImprovedContrastive": ImprovedContrastive,
    "MarginMSE": MarginMSE,
    "Matryoshka": Matryoshka,
    "SimCSE": SimCSE,
    "TeacherKL": TeacherKL,
    "VectorDistillation": VectorDistillation,
}

__all__ = [
    "OBJECTIVES",
    "CoSENT",
    "ImprovedContrastive",
    "MarginMSE",
    "Matryoshka",
    "Objective",
    "SimCSE",
    "TeacherKL",
    "VectorDistillation",
    "as_objective",
]
