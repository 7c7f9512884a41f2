"""Save a finished encoder to a folder.

The folder is an ordinary checkpoint, which `AutoModel.from_pretrained` loads without code of this package. The files of
`hf_embed.checkpoint.layout` and a model card (README.md) are beside it. Nothing is put in place until texts encoded through
every loader agree with the encoder itself (`hf_embed.checkpoint.verify`). An earlier model in the folder stays complete until
the new model, its scores and its card replace it, by one atomic rename.
"""

import contextlib
import copy
import functools
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_embed.adapters import copy_of, full_copy, has_adapters, in_4_bits, merge_adapters
from hf_embed.checkpoint.card import replace_results, served_otherwise, write_card
from hf_embed.checkpoint.layout import strip_prefix, write_sentence_transformers_files
from hf_embed.checkpoint.load import own_config
from hf_embed.checkpoint.model_files import OLD_WEIGHTS, RESULTS, is_old
from hf_embed.checkpoint.tables import Results
from hf_embed.checkpoint.verify import load_and_check_tokenizer, verify_folder, verify_full_copy, verify_layers
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.files.disk import nearest
from hf_embed.files.safe_files import (
    SAVING,
    can_be_replaced,
    copy_permissions,
    flush,
    flush_one,
    link_tree,
    new_folder,
    remove,
    rename,
)
from hf_embed.pooling import POOLINGS
from hf_embed.progress import quiet_libraries
from hf_embed.tempscale import applied_tempscale, apply_tempscale, remove_tempscale
from hf_embed.tempscale.fold import folded, why_not_foldable
from hf_embed.text_models import is_remote

logger = logging.getLogger(__name__)


def save_encoder(
    encoder: Encoder,
    folder: str,
    verify: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    allow_runtime: bool = False,
    results: Results | None = None,
    unsharded: PreTrainedModel | None = None,
) -> None:
    """Write `encoder` to `folder` as a plain checkpoint. Adapters are merged into a copy first, and TempScale is folded.

    Adapters on weights in 4 bits are merged in float32, on the CPU; `hf_embed.adapters` says why.

    Args:
        encoder: the model, which is not changed.
        folder: created if it does not exist. An earlier model in it is replaced, with its tokenizer and its graphs (ONNX,
            OpenVINO). Other files stay.
        verify: check the new files before they are put in place.
        state_dict: replaces the encoder's own tensors (FSDP gathers them).
        allow_runtime: keep TempScale out of the weights if it cannot be folded. The loader of this package then applies it,
            other loaders do not, and the card says so.
        results: facts about the training, for the card and for results.json in the folder. {} removes the scores and extras of
            an earlier model. Default: the card shows what results.json already holds.
        unsharded: with adapters and `state_dict`, a copy of the backbone from before it was sharded (`without_weights`).

    Raises:
        ExportError: if AutoModel or sentence-transformers (when installed) gives other weights, or vectors that differ by more
            than 1e-5 of their norm (1e-2 in half precision). The folder is unchanged.
        InputError: if TempScale cannot be folded, if the model could not be loaded after it is saved, or if `folder` is a file.
    """
    runtime = needs_runtime(encoder, allow_runtime)
    outdated = [name for name in ("onnx", "openvino") if Path(folder, name).is_dir()]
    if has_adapters(encoder.backbone) and in_4_bits(encoder.backbone):
        encoder = full_encoder(encoder, verify)
    if verify:
        if state_dict is None:  # gathered tensors come from a training, which has checked the layers at its start
            verify_layers(encoder, encoder.config)
        warn_of_servers(served_otherwise(encoder))
    with renewed(Path(folder), clear=results == {}) as place:
        with tempfile.TemporaryDirectory(prefix=SAVING, dir=place) as new:
            weights = write_checkpoint(encoder, new, state_dict, not runtime, unsharded)
            tensors = encoder.state_dict() if state_dict is None else state_dict
            write_sentence_transformers_files(encoder, new, weights | tensors)  # the pooler and the dense layers
            if verify:
                tokenizer = load_and_check_tokenizer(encoder, new)
                if not runtime:  # other loaders do not apply TempScale at runtime
                    verify_folder(encoder, new, weights, tokenizer)
            put_in_place(Path(new), place)
        write_card(encoder, place, replace_results(place, results) if results else None)
    if outdated:
        graphs = " and ".join(outdated)
        logger.warning(
            f"{folder}: the files in {graphs} were of the earlier weights and have been removed; export the model again"
        )


def full_encoder(encoder: Encoder, verify: bool = True) -> Encoder:
    """Return a copy of an encoder in 4 bits, on the CPU and in float32, with its adapters merged.

    Raises:
        ExportError: if `verify` is set and the copy gives other vectors.
    """
    settings = encoder.settings | {"dense": copy.deepcopy(encoder.dense).to("cpu")}
    full = Encoder(full_copy(encoder.backbone), encoder.tokenizer, **settings).eval()
    if verify:
        verify_full_copy(full, encoder)
    return full


@functools.cache
def warn_of_servers(note: str) -> None:
    """Warn, once per note, that servers would give other vectors. An empty note causes no warning."""
    if note:
        logger.warning(note)


@contextlib.contextmanager
def renewed(folder: Path, clear: bool = False) -> Iterator[Path]:
    """Yield the folder to which a model, its scores and its card are written. At the end, its content stands in `folder`.

        `folder` is                                          the yielded folder is
        absent, or a folder with a model                     a new one, which replaces `folder` at the end
        a folder without a model, or `can_be_replaced` is    `folder` itself. No loader accepts it while it has no weights,
        False                                                and `put_in_place` moves the weights there last

    Files of `folder` that belong to no model are also in a new one, as hard links and not as copies.

    Args:
        folder: the target. After an exception it is unchanged, unless files were already moved into it.
        clear: leave out what belongs to the earlier model in `folder`: its scores and extras.

    Raises:
        InputError: if `folder` is a file or lies inside one.
    """
    folder = Path(os.path.realpath(folder))  # the target of a link is replaced, not the link
    if not nearest(folder).is_dir():
        raise InputError(f"{nearest(folder)} is a file, so nothing can be saved to {folder}; give another folder")
    there = os.listdir(folder) if folder.is_dir() else []
    if folder.is_dir() and not (any(map(OLD_WEIGHTS.fullmatch, there)) and can_be_replaced(folder)):
        for name in there:
            if clear and RESULTS.fullmatch(name):
                remove(folder / name)
        yield folder
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as new:
        for name in there:
            if not (name.startswith(SAVING) or is_old(name) or (clear and RESULTS.fullmatch(name))):
                link_tree(folder / name, new / name)
        if there:
            copy_permissions(folder, new)
        yield new


def put_in_place(new: Path, folder: Path) -> None:
    """Move the complete checkpoint `new` into `folder`. An earlier model is removed first, and new weights are moved last."""
    flush(new)
    for path in list(folder.iterdir()):
        if is_old(path.name):
            remove(path)
    for name in sorted(os.listdir(new), key=lambda name: OLD_WEIGHTS.fullmatch(name) is not None):
        target = folder / name
        if target.is_dir():
            remove(target)
        rename(new / name, target)
    flush_one(folder)


def write_checkpoint(
    encoder: Encoder,
    folder: str,
    state_dict: dict[str, Tensor] | None = None,
    fold: bool = True,
    unsharded: PreTrainedModel | None = None,
) -> dict[str, Tensor]:
    """Write the weights, the config and the tokenizer. Return the written tensors by name. Arguments as for `save_encoder`."""
    backbone = encoder.backbone
    if has_adapters(backbone):
        backbone, state_dict = merged_copy(backbone if unsharded is None else unsharded, state_dict), None
    tensors = strip_prefix(state_dict, "backbone.") if state_dict else None
    # Poolings over several layers need all hidden states, in every loader.
    settings: dict[str, Any] = {} if POOLINGS[encoder.pooling].layers is None else {"output_hidden_states": True}
    if fold and applied_tempscale(backbone):
        changed, entries = folded(backbone, tensors)
        tensors, settings = (tensors or backbone.state_dict()) | changed, settings | entries
    if type(backbone).__module__.startswith("transformers_modules."):
        type(backbone).register_for_auto_class("AutoModel")  # so that its code is saved, whichever auto class loaded it
    with quiet_libraries():
        backbone.save_pretrained(folder, state_dict=None if tensors is None else {**tensors})  # it empties the dict
    config = own_config(backbone)
    for key, value in settings.items():
        setattr(config, key, value)
    config.save_pretrained(folder)
    write_tokenizer(encoder, folder)
    return backbone.state_dict() if tensors is None else tensors


def merged_copy(backbone: PreTrainedModel, state_dict: dict[str, Tensor] | None) -> PreTrainedModel:
    """Return a copy of `backbone` with its adapters merged. `state_dict` replaces the tensors of the copy."""
    scaling = applied_tempscale(backbone)
    backbone = copy_of(backbone)
    if state_dict is not None:
        backbone.load_state_dict(strip_prefix(state_dict, "backbone."), strict=False, assign=True)
    if scaling:
        remove_tempscale(backbone)
    backbone = merge_adapters(backbone)
    if scaling:
        apply_tempscale(backbone, scaling)
    return backbone


def write_tokenizer(encoder: Encoder, folder: str) -> None:
    """Write the tokenizer with the settings that the encoder uses."""
    tokenizer = copy.copy(encoder.tokenizer)
    tokenizer.init_kwargs = dict(tokenizer.init_kwargs)
    if not is_remote(tokenizer):
        tokenizer.init_kwargs.pop("auto_map", None)
    tokenizer.model_max_length = encoder.max_length
    # Without a mask, padding would count as text.
    tokenizer.model_input_names = [*dict.fromkeys([*tokenizer.model_input_names, "attention_mask"])]
    tokenizer.padding_side = "right"  # absolute positions and pooling "last" in the card count from the left
    # Otherwise transformers saves the values from loading, or none at all.
    tokenizer.init_kwargs |= {key: getattr(tokenizer, key) for key in ("model_input_names", "padding_side", "truncation_side")}
    tokenizer.save_pretrained(folder)


def needs_runtime(encoder: Encoder, allowed: bool) -> bool:
    """Return whether TempScale must stay out of the weights. Raise InputError if it must and that is not allowed."""
    error = why_not_foldable(encoder.backbone)
    if error and not allowed:
        raise InputError(f"{error}; save_pretrained(allow_runtime=True) saves it for loaders of hf_embed only") from error
    return error is not None
