"""Test every pooling against a loop over texts and tokens, and a new pooling, which needs only one entry of the table."""

import itertools
import json
import re

import pytest
import torch
from conftest import small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from torch.testing import assert_close
from worker import WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, InputError
from hf_embed.pooling import POOLINGS, Pooling, check_pooling, find_pooling, pool, saved_pooling
from hf_embed.step import TrainingStep, new_head

LENGTHS = [1, 4, 7, 2]
CLS = {"cls", "cls_mlp", "cls_mlp_train"}  # they pool alike; their heads belong to the encoder


def layers_and_mask(width=9, layers=4, dim=5):
    generator = torch.Generator().manual_seed(0)
    shape = (layers, len(LENGTHS), width, dim)
    states = tuple(torch.randn(shape, generator=generator, dtype=torch.float64))
    return states, torch.tensor([[int(t < n) for t in range(width)] for n in LENGTHS])


def mean(states, weight_of=lambda number: 1):
    total, weights = 0, 0
    for number, state in enumerate(states, 1):
        total, weights = total + weight_of(number) * state, weights + weight_of(number)
    return total / weights


# Each function takes the hidden states of one text, a list with one (tokens, D) per layer, and returns the text's vector.
LOOPS = {
    "cls": lambda layers: layers[-1][0],
    "cls_mlp": lambda layers: layers[-1][0],
    "cls_mlp_train": lambda layers: layers[-1][0],
    "last": lambda layers: layers[-1][-1],
    "mean": lambda layers: mean(layers[-1]),
    "weighted_mean": lambda layers: mean(layers[-1], lambda number: number),
    "first_last": lambda layers: (mean(layers[1]) + mean(layers[-1])) / 2,
    "top2": lambda layers: (mean(layers[-2]) + mean(layers[-1])) / 2,
}


def by_loop(pooling, layers, lengths=LENGTHS):
    """Pool texts of these lengths by a loop, without the heads. This is the reference for every test of poolings."""
    if pooling not in LOOPS:
        raise NotImplementedError(f"say in LOOPS, by a loop over the tokens, what pooling '{pooling}' computes")
    return torch.stack([LOOPS[pooling]([layer[i][:n] for layer in layers]) for i, n in enumerate(lengths)])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_loop(pooling):
    layers, mask = layers_and_mask()
    assert_close(pool(pooling, layers, mask), by_loop(pooling, layers), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("one", "other"), itertools.combinations(["cls", *(p for p in POOLINGS if p not in CLS)], 2))
def test_control_no_two_poolings_pass_for_each_other(one, other):
    layers, mask = layers_and_mask()
    assert not torch.allclose(pool(one, layers, mask), by_loop(other, layers), rtol=1e-3)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_states_at_padding_are_not_read(pooling):
    layers, mask = layers_and_mask()
    other = tuple(states + 1e3 * (1 - mask).unsqueeze(-1) for states in layers)
    assert torch.equal(pool(pooling, layers, mask), pool(pooling, other, mask))


@pytest.mark.parametrize(
    ("model", "pooling"), [*(("bert", p) for p in POOLINGS), ("qwen3", "last"), ("qwen3", "weighted_mean")]
)
def test_embedding_does_not_depend_on_padding(model, pooling):
    encoder = Encoder(tiny_model(model), small_tokenizer(), pooling).double().eval()
    ids = torch.randint(5, 200, (len(LENGTHS), 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[int(t < n) for t in range(9)] for n in LENGTHS])
    padded = encoder.embed(ids.masked_fill(mask == 0, 0), mask)
    alone = [encoder.embed(ids[i : i + 1, :n], mask[i : i + 1, :n])[0] for i, n in enumerate(LENGTHS)]
    assert_close(padded, torch.stack(alone), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("pooling", "training"), itertools.product(sorted(CLS), [True, False]))
def test_heads(pooling, training):
    """cls_mlp always uses the pooler, cls_mlp_train uses its head only in training, and cls uses no head."""
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = Encoder(model, small_tokenizer(), pooling)
    head = new_head(encoder.width, encoder.config) if pooling == "cls_mlp_train" else None
    step = TrainingStep(encoder, head).train(training)
    ids = torch.tensor([[2, 90, 91, 3]])
    first = model(ids)[0][:, 0]
    expected = first
    if pooling == "cls_mlp":
        expected = torch.tanh(first @ model.pooler.dense.weight.T + model.pooler.dense.bias)
    elif pooling == "cls_mlp_train" and training:
        expected = torch.tanh(first @ head[0].weight.T + head[0].bias)
    assert_close(step.embed(ids, torch.ones_like(ids)), expected)


def test_unknown_pooling_names_the_known():
    with pytest.raises(InputError) as error:
        check_pooling("unheard-of")
    assert all(name in str(error.value) for name in ["'unheard-of'", *POOLINGS]) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", POOLINGS)
def test_entries_are_complete(name):
    """A saved pooling is found again by its flag and by its newer name, and each pooling has code for the card."""
    entry = POOLINGS[saved_pooling(name)]
    assert POOLINGS[name].name == name and POOLINGS[name].description
    for mode in (entry.flag, entry.mode):
        assert find_pooling(mode, entry.layers, entry.model_pooler) == entry.name
    assert entry.card[-1].startswith("vectors = ") and "\n" not in "".join(entry.card)


# ---- a new pooling ----


def largest(states, mask):
    return states.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf).amax(1)


MAX = Pooling(
    name="max",
    description="the largest number of each dimension over the tokens",
    function=largest,
    flag="max_tokens",
    card=(
        'padding = batch["attention_mask"].unsqueeze(-1) == 0',
        "vectors = output.last_hidden_state.masked_fill(padding, -torch.inf).amax(1)",
    ),
)
TEXTS = ["a cat", "a dog sleeping by the fire"]  # the texts in the code of the card


def test_a_new_pooling_is_one_entry(tmp_path, monkeypatch):
    """The new pooling is trained and saved. The card's code, sentence-transformers and Encoder load it. Encoder names it."""
    monkeypatch.setitem(POOLINGS, "max", MAX)
    args = ContrastiveTrainingArguments(
        str(tmp_path / "out"), pooling="max", max_steps=2, per_device_train_batch_size=4, save_strategy="no", report_to=[],
        disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    rows = Dataset.from_list([{"anchor": f"the {word}", "positive": f"a {word}"} for word in WORDS])
    run = ContrastiveTrainer(tiny_model(), args, train_dataset=rows, processing_class=small_tokenizer())
    run.train()
    run.save_model()
    expected = run.encoder.encode(TEXTS, convert_to_tensor=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| Pooling | `max`" in card
    names = {}
    exec(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0].replace('"FOLDER"', repr(str(tmp_path / "out"))), names)
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu").encode(TEXTS, convert_to_tensor=True)
    loaded = Encoder.from_pretrained(tmp_path / "out")
    for vectors in (names["vectors"], theirs, loaded.encode(TEXTS, convert_to_tensor=True)):
        assert_close(vectors, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    assert loaded.pooling == "max"
    mean = Encoder.from_pretrained(tmp_path / "out", pooling="mean")  # control: the pooling matters
    assert not torch.allclose(mean.encode(TEXTS, convert_to_tensor=True), expected, atol=1e-2)


def test_a_new_pooling_of_two_layers_is_one_entry(tmp_path, monkeypatch):
    entry = Pooling(
        name="ends_max", description="the largest numbers of the first and the last layer's average", function=largest,
        flag="max_tokens", card=("vectors = ...",), layers=(1, -1),
    )  # fmt: skip
    monkeypatch.setitem(POOLINGS, "ends_max", entry)
    encoder = tiny_encoder(pooling="ends_max")
    encoder.save_pretrained(tmp_path)  # this also checks the vectors of sentence-transformers
    assert json.loads((tmp_path / "modules.json").read_text())[1]["path"] == "1_LayerPooling"
    assert Encoder.from_pretrained(tmp_path).pooling == "ends_max"
