"""TempScale: sharper attention without training, on a model in memory or folded into its weights."""

from hf_embed.tempscale.attention import applied_tempscale, apply_tempscale, remove_tempscale, tempscale
from hf_embed.tempscale.config import TempScaleConfig
from hf_embed.tempscale.fold import fold_tempscale, unfold_tempscale
from hf_embed.tempscale.registry import register_tempscale

__all__ = [
    "TempScaleConfig",
    "applied_tempscale",
    "apply_tempscale",
    "fold_tempscale",
    "register_tempscale",
    "remove_tempscale",
    "tempscale",
    "unfold_tempscale",
]
