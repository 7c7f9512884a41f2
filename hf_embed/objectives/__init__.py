from hf_embed.objectives.simcse import SimCSE

__all__ = ["SimCSE"]
