"""Test architecture x pooling and head x LoRA x TempScale x normalization: train two steps, save, and compare all loaders.

By default, only so many cases run that every pair of two settings occurs in one of them. The other cases are marked slow.
"""

import itertools

import numpy as np
import pytest
import torch
from conftest import DECODERS, TINY, small_tokenizer, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from test_card import snippets
from worker import WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder
from hf_embed.pooling import POOLINGS, Dense

AXES = {
    "architecture": [name for name in TINY if name != "qwen2"], "pooling": sorted(POOLINGS), "lora": [False, True],
    "temp_scale": [None, 0.6], "normalize": [False, True], "dense": [False, True],
}  # fmt: skip
WITH_POOLER = {"bert", "roberta", "xlm-roberta", "mpnet"}
TEXTS = ["a cat", "a dog sleeping by the fire"]  # the texts in the code of the card


def makes_sense(case: dict) -> bool:
    if case["pooling"] == "cls_mlp" and case["architecture"] not in WITH_POOLER:
        return False
    return not (case["architecture"] in DECODERS and case["pooling"].startswith("cls"))


def parts(case: dict) -> set:
    """Return the architecture, and all pairs of two other settings."""
    (architecture, *others) = case.items()
    return {architecture, *itertools.combinations(others, 2)}


def cases() -> list:
    """Return all cases that make sense. All are marked slow except a selection.

    In the selection, every architecture and every pair of two other settings occurs. tests/test_export.py loads each pooling of
    each architecture.
    """
    every = [dict(zip(AXES, values)) for values in itertools.product(*AXES.values())]
    every = [case for case in every if makes_sense(case)]
    wanted, chosen = set().union(*(parts(case) for case in every)), []
    while wanted:
        best = max(every, key=lambda case: len(parts(case) & wanted))
        chosen.append(best)
        wanted -= parts(best)
    name = lambda case: "-".join(str(value) for value in case.values())  # noqa: E731
    return [pytest.param(c, id=name(c), marks=[] if c in chosen else pytest.mark.slow) for c in every]


@pytest.mark.parametrize("case", cases())
def test_trained_saved_and_loaded_everywhere(tmp_path, case):
    model = tiny_model(case["architecture"])
    torch.manual_seed(1)
    dense = [Dense(torch.nn.Linear(32, 48), torch.nn.GELU()), Dense(torch.nn.Linear(48, 8, bias=False), torch.nn.Identity())]
    dense = dense if case["dense"] else []
    before = Encoder(model, small_tokenizer(), case["pooling"], normalize=case["normalize"], dense=dense).encode(TEXTS)
    if case["lora"]:
        settings = LoraConfig(target_modules="all-linear", modules_to_save=["pooler"] if case["pooling"] == "cls_mlp" else None)
        model = get_peft_model(model, settings)
    args = ContrastiveTrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=5e-2, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, save_strategy="no", **{key: case[key] for key in ("pooling", "normalize", "temp_scale")},
    )  # fmt: skip
    rows = Dataset.from_list([{"anchor": f"the {word}", "positive": f"a {word} here"} for word in WORDS])
    encoder = Encoder(model, small_tokenizer(), case["pooling"], dense=dense)
    trainer = ContrastiveTrainer(model=encoder, args=args, train_dataset=rows)
    trainer.train()
    trainer.save_model()
    expected = trainer.encoder.encode(TEXTS)
    assert np.abs(expected - before).max() > 1e-3 * np.abs(expected).max()  # the training changed the vectors
    found = {"Encoder": Encoder.from_pretrained(tmp_path).encode(TEXTS)}
    found["SentenceTransformer"] = SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS)
    names = {}
    with torch.no_grad():
        exec(snippets((tmp_path / "README.md").read_text())[0].replace('"FOLDER"', repr(str(tmp_path))), names)
    found["AutoModel"] = names["vectors"].numpy()
    for loader, vectors in found.items():
        assert np.abs(vectors - expected).max() < 1e-5 * np.abs(expected).max(), loader
    assert not list(tmp_path.glob("adapter*"))
