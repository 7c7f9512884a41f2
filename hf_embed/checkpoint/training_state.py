"""What a checkpoint holds of a training beyond the plain model: the tensors that resuming needs and `AutoModel` does not.

They stand in training.safetensors, by the names that the encoder gives them (`backbone.…`, `dense.…`) and those of what exists
only while training (`train_head.…`, `mlm_head.…`, `log_temperature`). In the module that is trained, the encoder's names may
have `encoder.` before them.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_embed.adapters import has_adapters
from hf_embed.checkpoint.files import read_weights
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError, in_short
from hf_embed.read_files import read_tensors
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
        InputError: there is no checkpoint, or one of another model; a file of it is missing or cannot be read.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder}: no checkpoint there (no config.json); give a checkpoint-N folder")
    adapted, file = has_adapters(encoder.backbone), folder / TRAINING_TENSORS
    if not adapted:
        load_backbone(folder, encoder.backbone)
    if not file.is_file():
        if adapted:
            raise InputError(f"{folder}: no {TRAINING_TENSORS}, so no adapters; give a checkpoint of a run with adapters")
        return
    names = {name.removeprefix(ENCODER): name for name in trained.state_dict()}
    tensors = read_tensors(file)
    expected = {name for name in names if not name.startswith("backbone.")} | training_names(trained, encoder)
    if other := sorted((set(tensors) - set(names)) | (expected - set(tensors))):
        raise InputError(f"{file}: the checkpoint is of another model ({other[:3]} ...)")
    put(tensors, trained, names, file)


def load_backbone(folder: Path, backbone: PreTrainedModel) -> None:
    """Read the plain checkpoint in `folder` into `backbone`. Raises InputError if it is of another model."""
    missing, unexpected = put(read_weights(folder), backbone, {}, folder)
    tied = set(getattr(backbone, "all_tied_weights_keys", None) or {})
    if unexpected or set(missing) - tied:
        raise InputError(f"{folder}: the checkpoint is of another model ({(list(missing) + unexpected)[:3]} ...)")


def put(tensors: Mapping[str, Tensor], module: nn.Module, names: Mapping[str, str], where: Path) -> tuple[list[str], list[str]]:
    """Read tensors into a module, under its own names of them where `names` has these.

    Returns:
        The names of the module's tensors that are missing, and of those that it does not have.

    Raises:
        InputError: a tensor has another shape; `where` is what the message calls them.
    """
    try:
        result = module.load_state_dict({names.get(name, name): tensor for name, tensor in tensors.items()}, strict=False)
    except RuntimeError as error:
        raise InputError(f"{where}: the checkpoint is of another model ({in_short(error)})") from error
    return list(result.missing_keys), list(result.unexpected_keys)
