from hf_embed.objectives.gte import ImprovedContrastive
from hf_embed.objectives.matryoshka import Matryoshka
from hf_embed.objectives.simcse import SimCSE

__all__ = ["ImprovedContrastive", "Matryoshka", "SimCSE"]
