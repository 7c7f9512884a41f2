"""Export an encoder to ONNX. The graph computes vectors from token ids: pooling, dense layers and normalization are inside.

    folder/onnx/model.onnx             in float32 (above 2 GB, the weights are beside it, in model.onnx_data)
    folder/onnx/model_quantized.onnx   with int8 weights, on request

transformers.js and sentence-transformers look for these names. The inputs are those of the tokenizer: `input_ids`,
`attention_mask` and, if the tokenizer returns it, `token_type_ids`. The outputs are `last_hidden_state` and
`sentence_embedding`. For a pooling over two layers, the first output is the mean of both layers, and is called
`token_embeddings`.

Shapes: B texts of T tokens, padded on the right; `width` numbers per hidden state; D numbers per vector.
"""

import importlib.util
import inspect
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from hf_embed.checkpoint.save import renewed, save_encoder
from hf_embed.checkpoint.tables import Results
from hf_embed.checkpoint.verify import TOLERANCE
from hf_embed.encoder import Encoder
from hf_embed.encoding import check_encoder
from hf_embed.errors import InputError, in_short
from hf_embed.files.disk import check_folder, disk_errors
from hf_embed.files.safe_files import SAVING, put
from hf_embed.forward.check import TEXTS, TOLERANCES
from hf_embed.pooling import POOLINGS, states_to_pool
from hf_embed.progress import silent_libraries

FOLDER, FLOAT, INT8 = "onnx", "model.onnx", "model_quantized.onnx"
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_BYTES = 2**31 - 2**20  # of a single ONNX file, with some room for the graph beside the weights
# Batches on which the graph is checked: several lengths, also above those of the traced batch, single texts, a single token.
BATCHES = [TEXTS, *([text] for text in TEXTS), [" ".join(TEXTS * 20), "a"], [*TEXTS, " ".join(TEXTS * 3), "Snow.", "a"]]
Encode = Callable[[list[str]], np.ndarray]  # from B texts to their vectors (B, D)


@dataclass
class Exported:
    """What an export has written, and how its vectors compare with those of the encoder.

    Attributes:
        path: the float32 graph.
        difference: the largest difference between a vector of the float32 graph and the encoder's, as a share of its norm.
        int8_path: the graph with int8 weights, if it was asked for.
        cosine: the smallest cosine between a vector of that graph and the encoder's.
    """

    path: Path
    difference: float
    int8_path: Path | None = None
    cosine: float | None = None


def export_onnx(
    encoder: Encoder, folder: str | Path, int8: bool = False, overwrite: bool = False, results: Results | None = None
) -> Exported:
    """Write `encoder` as an ONNX graph to the subfolder onnx of a model folder, and check it with onnxruntime.

    If `folder` holds the encoder already, only the subfolder is added. Otherwise the whole model is saved there, with
    tokenizer, configuration and card, as `Encoder.save_pretrained` does it. The graph is in float32, whatever the precision of
    the weights. Prompts are not inside: put them before the texts.

    Args:
        encoder: the model, which is not changed.
        folder: the folder of the model, or a new one.
        int8: also write a graph with int8 weights, which is about a quarter of the size and less exact.
        overwrite: replace ONNX files, or another model, in `folder`.
        results: facts about the training for the card of a new folder, as in `hf_embed.checkpoint.save.save_encoder`.

    Raises:
        InputError: if the extra `onnx` is not installed; if the folder holds ONNX files, other files or another model; if the
            architecture cannot be exported; or if the vectors of the graph differ from the encoder's by more than 1e-5 of
            their norm. No ONNX file is then written.
        DiskError: if the disk is full or a file may not be written.
    """
    check_encoder(encoder)
    folder = Path(folder)
    check_output(folder, overwrite)
    with disk_errors(folder):
        saved = load(encoder, folder) if holds_model(folder) else None
        if saved is not None and is_same(encoder, saved):
            difference, cosine = add_graphs(saved, folder, int8)
        elif saved is not None and not overwrite:
            raise InputError(f"{folder} holds another model than the exported one; give another folder")
        else:
            with renewed(folder, clear=True) as place:
                save_encoder(encoder, str(place), results=results)
                difference, cosine = add_graphs(load(encoder, place), place, int8)
    return Exported(folder / FOLDER / FLOAT, difference, folder / FOLDER / INT8 if int8 else None, cosine)


def check_output(folder: Path, overwrite: bool = False) -> None:
    """Check what can be checked before a model is loaded.

    Raises:
        InputError: if the extra `onnx` is not installed; or if the folder cannot be written, holds ONNX files or files that
            belong to no model, and `overwrite` is not set.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise InputError(f'the export to ONNX needs {", ".join(missing)}; run pip install "hf_embed[onnx]"')
    check_folder(folder)
    if (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise InputError(f"{folder} has its transformer in a subfolder, where ONNX loaders do not look; give another folder")
    if overwrite or not folder.is_dir():
        return
    for name in (FLOAT, INT8):
        if (folder / FOLDER / name).exists():
            raise InputError(f"{folder / FOLDER / name} exists; replace it with --overwrite_output_dir (overwrite=True)")
    if not holds_model(folder) and any(folder.iterdir()):
        raise InputError(f"{folder} holds files but no model; give another folder, or --overwrite_output_dir (overwrite=True)")


def holds_model(folder: Path) -> bool:
    """Return whether a folder holds a model, also one whose weights another library wrote."""
    return (folder / "config.json").is_file()


def load(encoder: Encoder, folder: Path) -> Encoder:
    """Load a folder on the CPU in float32. TempScale and adapters of `encoder` are in the weights there."""
    with silent_libraries():
        return Encoder.from_pretrained(str(folder), trust_remote_code=encoder.remote_code, dtype=torch.float32)


def is_same(encoder: Encoder, saved: Encoder) -> bool:
    """Return whether two encoders compute the same vectors, up to the precision of the weights of the first."""
    if (encoder.max_length, encoder.dimension) != (saved.max_length, saved.dimension):
        return False
    difference, _ = compare(encoder, lambda texts: np.asarray(saved.encode(texts)), prompt=None)
    return difference <= TOLERANCES[encoder.dtype]


# ---- the graph ----


class Graph(nn.Module):
    """The module that is exported: an encoder with its pooling, its dense layers and its normalization."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the hidden states that are pooled, (B, T, width), and the vectors, (B, D). The inputs are (B, T)."""
        entry = POOLINGS[self.encoder.pooling]
        further = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        several = entry.layers is not None
        output = self.encoder.backbone(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=several, **further
        )
        states = states_to_pool(entry.name, output.hidden_states if several else (output[0],))
        vectors = output.pooler_output if entry.model_pooler else entry.function(states, attention_mask)
        return states, self.encoder.finish(self.encoder.dense(vectors))


def input_names(encoder: Encoder) -> list[str]:
    """Return the inputs of the graph: the outputs of the tokenizer that the model reads."""
    read = inspect.signature(encoder.base.forward).parameters.keys() & encoder.tokenizer.model_input_names
    return ["input_ids", "attention_mask", *({"token_type_ids"} & read)]


def tokenize(encoder: Encoder, texts: list[str], kind: str) -> dict:
    """Return the inputs of the graph for B texts, each (B, T), as tensors ("pt") or arrays ("np")."""
    rows = encoder.tokenizer(
        texts, padding=True, padding_side="right", truncation=True, max_length=encoder.max_length, return_tensors=kind,
        return_attention_mask=True, return_token_type_ids=True,
    )  # fmt: skip
    return {name: rows[name] for name in input_names(encoder)}


def write_graph(encoder: Encoder, path: Path) -> None:
    """Trace an encoder and write its graph, with any number of texts and any length up to the positions of the model.

    Raises:
        InputError: if PyTorch cannot trace the architecture with variable shapes, or has no ONNX operator for a part of it.
    """
    import onnx

    inputs = tokenize(encoder, TEXTS, "pt")
    shape = {0: torch.export.Dim("batch_size"), 1: torch.export.Dim("sequence_length", max=encoder.positions)}
    shapes = (shape,) * len(inputs)
    states = "last_hidden_state" if POOLINGS[encoder.pooling].layers is None else "token_embeddings"
    size = sum(tensor.nbytes for tensor in encoder.state_dict().values())
    with silent_libraries(), torch.no_grad():
        try:
            graph = torch.export.export(Graph(encoder).eval(), tuple(inputs.values()), dynamic_shapes=shapes)
            program = torch.onnx.export(
                graph, input_names=list(inputs), output_names=[states, "sentence_embedding"], dynamic_shapes=shapes,
                dynamo=True, verbose=False,
            )  # fmt: skip
        except Exception as error:  # the tracer and the converter raise many kinds of errors
            reason = reason_of(error)
            raise not_exported(encoder, f"{type(reason).__name__}: {in_short(reason)}") from error
        assert program is not None
        if size < MOST_BYTES:
            program.save(path, external_data=False)
        else:  # the weights are in a file beside the graph, where loaders expect them
            data = f"{path.name}_data"
            onnx.save_model(program.model_proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location=data)


def reason_of(error: BaseException) -> BaseException:
    """Return the first error of a chain. The converter wraps it in advice for its own developers."""
    return error if error.__cause__ is None else reason_of(error.__cause__)


def not_exported(encoder: Encoder, reason: str) -> InputError:
    """Return the error for an architecture that cannot be exported."""
    return InputError(
        f"{type(encoder.base).__name__} (pooling {encoder.pooling}) cannot be exported to ONNX with PyTorch "
        f"{torch.__version__} ({reason}); use it with PyTorch, or train another architecture"
    )


# ---- files ----


def add_graphs(encoder: Encoder, folder: Path, int8: bool) -> tuple[float, float | None]:
    """Write the graphs, check them, and move them to the subfolder of `folder` when they are right.

    Returns:
        The difference and the cosine of `Exported`.
    """
    target = folder / FOLDER
    with tempfile.TemporaryDirectory(prefix=SAVING, dir=folder) as name:
        new = Path(name)
        write_graph(encoder, new / FLOAT)
        difference = verify_graph(encoder, new / FLOAT)
        cosine = write_int8(encoder, new / FLOAT, new / INT8) if int8 else None
        target.mkdir(exist_ok=True)
        for path in sorted(new.iterdir(), key=lambda path: path.suffix == ".onnx"):  # each graph after its weights
            put(path, target / path.name)
    return difference, cosine


def verify_graph(encoder: Encoder, path: Path) -> float:
    """Return the largest difference between a vector of the graph and the encoder's, as a share of its norm.

    Raises:
        InputError: if onnxruntime cannot run the graph, or if the difference is above 1e-5.
    """
    try:
        difference, _ = compare(encoder, through_onnx(encoder, path))
    except InputError:
        raise
    except Exception as error:  # onnxruntime raises many kinds of errors
        raise not_exported(encoder, f"onnxruntime: {in_short(error)}") from error
    if not difference <= TOLERANCE:  # also catches NaN
        raise not_exported(encoder, f"its vectors differ by {difference:.1e} of their norm; tolerance {TOLERANCE:.0e}")
    return difference


def write_int8(encoder: Encoder, path: Path, int8_path: Path) -> float:
    """Write the graph `path` again with int8 weights, and return the smallest cosine with the encoder's vectors."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with silent_libraries():  # a scale for each channel is far more exact; 7 bits do not overflow on processors without VNNI
        quantize_dynamic(path, int8_path, weight_type=QuantType.QInt8, per_channel=True, reduce_range=True)
    return compare(encoder, through_onnx(encoder, int8_path))[1]


def through_onnx(encoder: Encoder, path: Path) -> Encode:
    """Return a function that encodes texts with onnxruntime on the CPU."""
    from onnxruntime import InferenceSession

    session = InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda texts: session.run(["sentence_embedding"], tokenize(encoder, texts, "np"))[0]


def compare(encoder: Encoder, other: Encode, prompt: str | None = "") -> tuple[float, float]:
    """Return the largest difference as a share of the norm, and the smallest cosine, between vectors on all batches.

    `prompt` is put before the texts of the encoder; None: its default prompt.
    """
    differences, cosines = [], []
    for texts in BATCHES:
        vectors, others = np.asarray(encoder.encode(texts, prompt=prompt)), other(texts)
        norms = np.linalg.norm(vectors, axis=-1)
        differences.append((np.linalg.norm(others - vectors, axis=-1) / norms).max())
        cosines.append(((vectors * others).sum(-1) / norms / np.linalg.norm(others, axis=-1)).min())
    return float(np.max(differences)), float(np.min(cosines))
