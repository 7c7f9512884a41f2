"""A finished encoder to a plain folder.

The folder is an ordinary checkpoint (`AutoModel.from_pretrained`, no code of ours), with the files of
`hf_embed.checkpoint.layout` and a card (README.md) beside it. Nothing is put in place before texts encoded through every
loader agree with the encoder itself (`hf_embed.checkpoint.verify`). An earlier model in the folder is there as a whole until
the new one, its scores and its card take its place, at one rename.
"""

import contextlib
import copy
import functools
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_embed.adapters import has_adapters, merge_adapters
from hf_embed.checkpoint.card import keep_results, served_otherwise, write_card
from hf_embed.checkpoint.layout import strip_prefix, write_sentence_transformers_files
from hf_embed.checkpoint.load import own_code
from hf_embed.checkpoint.tables import Results
from hf_embed.checkpoint.verify import verify_folder, verify_loadable
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.pooling import POOLINGS
from hf_embed.progress import calm_libraries
from hf_embed.safe_files import SAVING, can_be_replaced, flush, flush_one, link_tree, new_folder
from hf_embed.tempscale import applied_tempscale, fold_tempscale, remove_tempscale
from hf_embed.tempscale.fold import check_foldable, folded
from hf_embed.text_models import is_remote

logger = logging.getLogger(__name__)

# What an earlier save may have left that loaders would take before, or put on top of, the new weights.
WEIGHTS = re.compile(r"model.*\.safetensors|model\.safetensors\.index\.json|pytorch_model(-.*)?\.bin.*|adapter_.*")
# What belongs to the weights in a folder: scores, pictures, extras and the modules behind the transformer.
RESULTS = re.compile(
    r"results\.json|(geometry|tempscale)\.png|trainer_state\.json|adapter|mteb|\d_(Layer)?Pooling|\d_Dense|\d_Normalize"
)


def save_encoder(
    encoder: Encoder,
    folder: str,
    verify: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    allow_runtime: bool = False,
    results: Results | None = None,
) -> None:
    """Write `encoder` to `folder` as a plain checkpoint; adapters are merged into a copy first, TempScale is folded.

    Args:
        encoder: the model, which stays as it is.
        folder: made if it is not there; an earlier model in it is replaced, other files stay.
        verify: check the folder before it is put in place.
        state_dict: replaces the encoder's own (FSDP gathers it).
        allow_runtime: TempScale that cannot be folded stays out of the weights: this package's loader applies it, others do
            not, and the card says so.
        results: what is known of the training, which the card says and results.json in the folder then holds; with {} the
            scores and extras of an earlier model go; default: the card says what results.json holds.

    Raises:
        ExportError: AutoModel or sentence-transformers (when installed) give other weights, or vectors that differ by more
            than 1e-5 of their norm. The folder is as it was.
        InputError: TempScale cannot be folded.
    """
    runtime = needs_runtime(encoder, allow_runtime)
    if verify:
        verify_loadable(encoder)
        warn_of_servers(served_otherwise(encoder))
    with renewed(Path(folder), clear=results == {}) as place:
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=place) as new:
            weights = write_checkpoint(encoder, new, state_dict, fold=not runtime)
            write_sentence_transformers_files(encoder, new, state_dict)
            if verify and not runtime:  # other loaders do not know it
                verify_folder(encoder, new, weights)
            put_in_place(Path(new), place)
        write_card(encoder, place, keep_results(place, results) if results else None)


@functools.cache
def warn_of_servers(note: str) -> None:
    """Say, once, that servers would give other vectors; "" where they would not."""
    if note:
        logger.warning(note)


@contextlib.contextmanager
def renewed(folder: Path, clear: bool = False) -> Iterator[Path]:
    """Yield where to put a model that is to stand in `folder`, with its scores and its card.

    Where a model is in `folder`, or no folder is there, that is a new folder, which takes its place at the end. Other files are
    in both, by links that are no copies. Else it is the folder itself: no loader takes it while it has no weights, which
    `put_in_place` puts there last.

    Args:
        folder: after an exception it is as it was.
        clear: what belongs to the model in `folder`, its scores and extras, does not stay.
    """
    folder = Path(os.path.realpath(folder))  # of a link, what it leads to is replaced
    there = os.listdir(folder) if folder.is_dir() else []
    if folder.is_dir() and not (any(map(WEIGHTS.fullmatch, there)) and can_be_replaced(folder)):
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as new:
        for name in there:
            if not (name.startswith(SAVING) or WEIGHTS.fullmatch(name) or (clear and RESULTS.fullmatch(name))):
                link_tree(folder / name, new / name)
        if there:
            shutil.copymode(folder, new)
        yield new


def put_in_place(new: Path, folder: Path) -> None:
    """Move the whole checkpoint `new` into `folder`, over an earlier one, whose weights go first; the new ones come last."""
    flush(new)
    for path in list(folder.iterdir()):
        if WEIGHTS.fullmatch(path.name):
            path.unlink()
    for name in sorted(os.listdir(new), key=lambda name: WEIGHTS.fullmatch(name) is not None):
        target = folder / name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(new / name, target)
    flush_one(folder)


def write_checkpoint(
    encoder: Encoder, folder: str, state_dict: dict[str, Tensor] | None = None, fold: bool = True
) -> dict[str, Tensor]:
    """Write the weights, config and tokenizer. Returns the tensors that were written, by name."""
    backbone = encoder.backbone
    settings: dict[str, Any] = {}
    if has_adapters(backbone):
        backbone, state_dict = merged_copy(backbone, state_dict, fold), None
    else:
        state_dict, settings = tensors_to_save(backbone, state_dict, fold)
    if type(backbone).__module__.startswith("transformers_modules."):
        type(backbone).register_for_auto_class("AutoModel")  # so that its code is saved, whichever class it came in
    with config_for_saving(backbone.config, encoder.pooling, settings), own_code(backbone), calm_libraries():
        backbone.save_pretrained(folder, state_dict=state_dict)
    write_tokenizer(encoder, folder)
    return backbone.state_dict() if state_dict is None else state_dict


def merged_copy(backbone: PreTrainedModel, state_dict: dict[str, Tensor] | None, fold: bool) -> PreTrainedModel:
    """Return a copy of `backbone` with its adapters merged, and TempScale folded or noted in its config.

    The one in training goes on as it is. `state_dict` replaces its tensors.
    """
    scaling = applied_tempscale(backbone)
    backbone = copy.deepcopy(backbone)
    if state_dict is not None:
        backbone.load_state_dict(strip_prefix(state_dict, "backbone."), strict=False)
    if scaling:
        remove_tempscale(backbone)
    backbone = merge_adapters(backbone)
    if scaling and fold:
        fold_tempscale(backbone, scaling)
    elif scaling:
        backbone.config.temp_scale = scaling.to_dict()
    return backbone


def tensors_to_save(
    backbone: PreTrainedModel, state_dict: dict[str, Tensor] | None, fold: bool
) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Return the tensors to save in place of the model's own, if any, and the settings of its config, with TempScale folded."""
    tensors = strip_prefix(state_dict, "backbone.") if state_dict else None
    if not (applied_tempscale(backbone) and fold):
        return tensors, {}
    changed, settings = folded(backbone, tensors)
    return (tensors or backbone.state_dict()) | changed, settings


def write_tokenizer(encoder: Encoder, folder: str) -> None:
    """Write the tokenizer as the encoder uses it."""
    tokenizer = copy.deepcopy(encoder.tokenizer)
    if not is_remote(tokenizer):
        tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.model_max_length = encoder.max_length
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names  # saved as it is now, not as it was loaded
    tokenizer.padding_side = "right"  # absolute positions and the card's "last" count from the left
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def config_for_saving(config: PreTrainedConfig, pooling: str, settings: dict[str, Any]) -> Iterator[None]:
    """Give the config `settings` for a while.

    Poolings over several layers need the model to hand out the states of all layers, in every loader.
    """
    all_layers = POOLINGS[pooling].layers is not None
    settings = {"output_hidden_states": config.output_hidden_states or all_layers} | settings
    before = {key: getattr(config, key) for key in settings}
    try:
        for key, value in settings.items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


def needs_runtime(encoder: Encoder, allowed: bool) -> bool:
    """Return whether TempScale has to stay out of the weights. Raises InputError if that is not allowed."""
    if applied_tempscale(encoder.backbone) is None:
        return False
    try:
        check_foldable(encoder.backbone)
    except InputError as error:
        if not allowed:
            raise InputError(f"{error}; save_pretrained(allow_runtime=True) saves it for loaders of hf_embed alone") from error
        return True
    return False
