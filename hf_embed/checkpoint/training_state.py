"""The part of a checkpoint that resuming needs and `AutoModel` does not: tensors beyond the plain model.

They are in training.safetensors, under their names in the trained module: those of the modules that exist only during training
(`train_head.…`, `mlm_head.…`, `log_temperature`), the dense layers (`encoder.dense.…`), and those tensors of the backbone that
the plain checkpoint changes or lacks.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_embed.adapters import has_adapters
from hf_embed.checkpoint.model_files import read_weights
from hf_embed.errors import InputError, in_short, listed
from hf_embed.files.read_files import read_tensors
from hf_embed.step import TrainingStep
from hf_embed.tempscale import applied_tempscale
from hf_embed.tempscale.fold import folded

TRAINING_TENSORS = "training.safetensors"
BACKBONE = "encoder.backbone."  # prefix of the backbone's names in the trained module


def save_training_tensors(folder: str | Path, step: TrainingStep, state_dict: Mapping[str, Tensor]) -> None:
    """Write the tensors of `step` that the plain checkpoint in `folder` does not hold, if there are any.

    `state_dict` has the tensors of `step`, which FSDP gathers.
    """
    changed = changed_names(step)
    kept = {
        # Copy each tensor, because safetensors refuses tensors that share memory.
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in state_dict.items()
        if not name.startswith(BACKBONE) or name in changed
    }
    if kept:
        save_file(kept, Path(folder, TRAINING_TENSORS))


def changed_names(step: TrainingStep) -> set[str]:
    """Return the names of the backbone's tensors that the plain checkpoint changes or lacks.

    With adapters, these are all trained tensors, because the plain checkpoint holds the merged weights. With TempScale, these
    are the weights that it is folded into.
    """
    backbone = step.encoder.backbone
    if has_adapters(backbone):
        return {name for name, tensor in step.named_parameters() if tensor.requires_grad}
    return {BACKBONE + name for name in folded(backbone)[0]} if applied_tempscale(backbone) else set()


def load_training_state(folder: str | Path, step: TrainingStep) -> None:
    """Load a checkpoint's tensors into `step`.

    Raises:
        InputError: if there is no checkpoint, if it belongs to another model, or if a file is missing or cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: there is no checkpoint (config.json does not exist); give a checkpoint-N folder")
    adapted, file = has_adapters(step.encoder.backbone), folder / TRAINING_TENSORS
    if not adapted:
        load_backbone(folder, step.encoder.backbone)
    if not file.is_file():
        if adapted:
            raise InputError(f"{folder} has no {TRAINING_TENSORS}, so no adapters; give a checkpoint of a run with adapters")
        return
    names, tensors = set(step.state_dict()), read_tensors(file)
    expected = {name for name in names if not name.startswith(BACKBONE)} | changed_names(step)
    if other := sorted((set(tensors) - names) | (expected - set(tensors))):
        raise InputError(f"{file}: the checkpoint belongs to another model ({listed(other)})")
    put(tensors, step, file)


def load_backbone(folder: Path, backbone: PreTrainedModel) -> None:
    """Load the plain checkpoint in `folder` into `backbone`. Raise InputError if it belongs to another model."""
    missing, unexpected = put(read_weights(folder), backbone, folder)
    tied = set(getattr(backbone, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise InputError(f"{folder}: the checkpoint belongs to another model ({listed([*missing, *unexpected])})")


def put(tensors: Mapping[str, Tensor], module: nn.Module, where: Path) -> tuple[list[str], list[str]]:
    """Load tensors into a module.

    Returns:
        The names of the module's tensors that are missing, and the names of tensors that the module does not have.

    Raises:
        InputError: if a tensor has another shape. `where` begins the message.
    """
    try:
        result = module.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise InputError(f"{where}: the checkpoint belongs to another model ({in_short(error)})") from error
    return list(result.missing_keys), list(result.unexpected_keys)
