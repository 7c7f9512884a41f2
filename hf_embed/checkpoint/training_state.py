"""What a checkpoint holds of a training beyond the plain model: the tensors that resuming needs and `AutoModel` does not.

They stand in training.safetensors, by the names that the encoder gives them (`backbone.…`, `dense.…`) and those of what exists
only while training (`train_head.…`, `mlm_head.…`, `log_temperature`). In the module that is trained, the encoder's names may
have `encoder.` before them.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_embed.adapters import has_adapters
from hf_embed.checkpoint.files import read_weights
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.tempscale import applied_tempscale
from hf_embed.tempscale.fold import folded

TRAINING_TENSORS = "training.safetensors"
ENCODER = "encoder."  # before the encoder's names, in the module that is trained


def with_file_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of the module that is trained by their names in the files."""
    return {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items()}


def save_training_tensors(folder: str | Path, trained: nn.Module, encoder: Encoder, state_dict: Mapping[str, Tensor]) -> None:
    """Write what the plain checkpoint in `folder` does not hold of the module that is trained, if there is anything.

    Args:
        folder: a checkpoint's, with the plain checkpoint.
        trained: the module that is trained, with `encoder` in it.
        encoder: the encoder.
        state_dict: its tensors (FSDP gathers them), by its own names or those of the files.
    """
    names = training_names(trained, encoder)
    kept = {
        # A copy of each: safetensors does not take tensors that share their memory.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in with_file_names(state_dict).items()
        if not name.startswith("backbone.") or name in names
    }
    if kept:
        save_file(kept, Path(folder, TRAINING_TENSORS))


def training_names(trained: nn.Module, encoder: Encoder) -> set[str]:
    """Return the names of the backbone's tensors that the plain checkpoint has otherwise, or not at all.

    With adapters, which it has merged, they are all that is trained; with TempScale the weights that it is folded into.
    """
    if has_adapters(encoder.backbone):
        return set(with_file_names({name: tensor for name, tensor in trained.named_parameters() if tensor.requires_grad}))
    if applied_tempscale(encoder.backbone):
        return {f"backbone.{name}" for name in folded(encoder.backbone)[0]}
    return set()


def load_training_state(folder: str | Path, trained: nn.Module, encoder: Encoder) -> None:
    """Read a checkpoint's tensors into the module that is trained, which has `encoder` in it.

    Raises:
        InputError: there is no checkpoint, or one of another model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no checkpoint there (no config.json); give a checkpoint-N folder")
    if not has_adapters(encoder.backbone):
        load_backbone(folder, encoder.backbone)
    if (folder / TRAINING_TENSORS).is_file():
        names = {name.removeprefix(ENCODER): name for name in trained.state_dict()}
        tensors = load_file(folder / TRAINING_TENSORS)
        trained.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()}, strict=False)


def load_backbone(folder: Path, backbone: PreTrainedModel) -> None:
    """Read the plain checkpoint in `folder` into `backbone`. Raises InputError if it is of another model."""
    missing, unexpected = backbone.load_state_dict(read_weights(folder), strict=False)
    tied = set(getattr(backbone, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise InputError(f"{folder}: the checkpoint is of another model ({(list(missing) + unexpected)[:3]} ...)")
