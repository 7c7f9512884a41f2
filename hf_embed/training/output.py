"""Check before the first step that a training run can write its output."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from hf_embed.adapters import count_parameters, in_4_bits
from hf_embed.distributed import gather_objects
from hf_embed.errors import InputError
from hf_embed.files.disk import another_place, check_folder, lack_of_room
from hf_embed.step import TrainingStep

logger = logging.getLogger(__name__)


def check_output(
    args: TrainingArguments, step: TrainingStep, optimizer: torch.optim.Optimizer | None, trains: bool = True
) -> None:
    """Check that a training run can write its output. Every rank calls this before the first step.

    Args:
        args: the training arguments.
        step: the training step, which holds all tensors that are trained.
        optimizer: the user's own optimizer, if there is one.
        trains: whether there is training data, so that there will be checkpoints.

    Raises:
        InputError: if on any rank the folder cannot be written to, or has no room for one checkpoint.
    """
    problem = None
    try:
        check_folder(str(args.output_dir))
        if trains:
            check_room(args, step, optimizer)
    except InputError as error:
        problem = str(error)
    if found := next((found for found in gather_objects(problem) if found), None):
        raise InputError(found)


def check_room(args: TrainingArguments, step: TrainingStep, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise InputError if one checkpoint, or the model, does not fit. Warn if two checkpoints and the model do not fit."""
    folder, model, checkpoint = str(args.output_dir), model_bytes(step), checkpoint_bytes(args, step, optimizer)
    saves = args.save_strategy != SaveStrategy.NO  # checkpoints during the training
    what, needed = ("a checkpoint needs", checkpoint) if saves else ("the model needs", model)
    if lack := lack_of_room(folder, needed, what):
        raise InputError(f"output_dir {lack}; free some space there, or {another_place(Path(folder))}")
    most = lack_of_room(folder, 2 * checkpoint + model, "two checkpoints and the model need")
    if saves and most:
        logger.warning(
            f"output_dir {most}; a new checkpoint is written before an old one is removed, so the disk may become full"
        )


def model_bytes(step: TrainingStep) -> int:
    """Return the approximate size in bytes of the finished model's file."""
    if in_4_bits(step.encoder.backbone):  # the saved weights are in float32
        return 4 * count_parameters(step.encoder)
    return size_of(step.encoder.state_dict())


def checkpoint_bytes(args: TrainingArguments, step: TrainingStep, optimizer: torch.optim.Optimizer | None) -> int:
    """Return the minimum size of a checkpoint in bytes.

    This is the size of the model, of the tensors that exist only during training, and of the two moments that Adam keeps. The
    state of other optimizers is not counted.
    """
    inside = {tensor.data_ptr() for tensor in step.encoder.backbone.state_dict().values()}
    beside = size_of({name: tensor for name, tensor in step.state_dict().items() if tensor.data_ptr() not in inside})
    adam = isinstance(optimizer, torch.optim.Adam) or (optimizer is None and args.optim in ("adamw_torch", "adamw_torch_fused"))
    if args.save_only_model or not adam:
        return model_bytes(step) + beside
    trained = {name: tensor for name, tensor in step.named_parameters() if tensor.requires_grad}
    return model_bytes(step) + beside + 2 * size_of(trained)


def size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the size of tensors in bytes. Tensors that share memory are counted once."""
    return sum({tensor.data_ptr() or name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}.values())
