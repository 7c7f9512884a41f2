"""The check of a saved folder: every loader gives the vectors of the encoder in memory."""

import contextlib
import importlib.util

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from hf_embed.checkpoint.layout import read_settings
from hf_embed.pooling import MULTI_LAYER, pool, saved_pooling

TOLERANCE = 1e-5
PROBES = [
    "A cat sleeps on the warm windowsill.",
    "Rain.",
    "The committee, which had met twice that week without agreeing on anything at all, postponed the vote once more.",
]


class ExportError(RuntimeError):
    """The saved folder would not give the encoder's own vectors."""


def verify_folder(encoder, folder: str) -> None:
    """Raise ExportError unless AutoModel and sentence-transformers give the encoder's vectors from `folder`."""
    expected = encoder.encode(PROBES, convert_to_tensor=True).cpu()
    dtype = next(encoder.backbone.parameters()).dtype
    loaded = {"AutoModel": through_automodel(encoder, folder, dtype)}
    if importlib.util.find_spec("sentence_transformers"):
        loaded["SentenceTransformer"] = through_sentence_transformers(encoder, folder, dtype)
    # Half precision rounds differently for every padding; the weights are what is checked then.
    tolerance = TOLERANCE if dtype in (torch.float32, torch.float64) else 2e-2
    for loader, vectors in loaded.items():
        difference = ((vectors - expected).abs().max() / expected.abs().max().clamp(min=1)).item()
        if not difference <= tolerance:  # also catches NaN
            raise ExportError(
                f"not saved: {loader} gives vectors that differ by {difference:.1e} from the trained model's "
                f"(pooling {encoder.pooling}, {type(encoder.base).__name__}); tolerance {tolerance:.0e}"
            )


def through_automodel(encoder, folder: str, dtype: torch.dtype) -> Tensor:
    with quiet():
        trusted = {"trust_remote_code": encoder.remote_code}  # it runs already
        model = AutoModel.from_pretrained(folder, dtype=dtype, **trusted).to(encoder.device).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, **trusted)
    tokenizer.padding_side = "right"
    batch = tokenizer(PROBES, padding=True, truncation=True, return_tensors="pt").to(encoder.device)
    pooling = saved_pooling(encoder.pooling)
    with torch.inference_mode():
        output = model(batch["input_ids"], attention_mask=batch["attention_mask"])
        if pooling == "cls_mlp":
            vectors = output.pooler_output
        else:
            layers = output.hidden_states if pooling in MULTI_LAYER else (output[0],)
            vectors = pool(pooling, layers, batch["attention_mask"])
        for layer in read_settings(folder, model).get("dense", []):
            vectors = layer(vectors)
    vectors = vectors.float()
    return (F.normalize(vectors, dim=-1) if encoder.normalize else vectors).cpu()


def through_sentence_transformers(encoder, folder: str, dtype: torch.dtype) -> Tensor:
    from sentence_transformers import SentenceTransformer

    with quiet():
        settings = {"trust_remote_code": encoder.remote_code, "model_kwargs": {"dtype": dtype}}
        model = SentenceTransformer(folder, device=str(encoder.device), **settings)
    return model.encode(PROBES, convert_to_tensor=True, show_progress_bar=False).float().cpu()


@contextlib.contextmanager
def quiet():
    """Loading for a check says nothing."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
