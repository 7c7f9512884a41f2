"""After thirty optimizer steps, the trainer has the weights of a loop that was written from the paper in plain PyTorch.

The loops are in reference_loops.py and use no code of hf_embed. Both sides start from the same weights, in float64, and train
on the same rows in the same order, so they differ only by rounding errors.
"""

import functools
import gc
import itertools
import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from conftest import small_tokenizer, tiny_model, with_plain_dropout
from datasets import Dataset
from reference_loops import POOLERS, Row, Settings, Words, embed, gte, mask_words, masked_word_loss, matryoshka, simcse, train
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import DefaultBatchSampler
from sentence_transformers.sentence_transformer import losses, modules
from torch import nn
from transformers import BertForMaskedLM, TrainerCallback

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, ImprovedContrastive, Matryoshka, SimCSE

ATOL = 1e-11  # for weights (the largest is 1) after 30 steps in float64; the measured differences are up to 2e-13
# For the comparison with sentence-transformers; the measured differences are 1e-13 and 4e-7. In float32 the key biases are not
# compared. They change no embedding, so their gradient is only rounding errors, but Adam makes steps from these errors (2e-5
# in total; 1e-13 in float64).
PEER_ATOL = {torch.float64: ATOL, torch.float32: 1e-5}
NOTICED = 1e-4  # weights differ by at least this much if the loop computes something else
BATCH = 8
LOOP = Settings(learning_rate=2e-3, weight_decay=0.1, max_grad_norm=1.0, adam_epsilon=1e-6, warmup_steps=5, steps=30, seed=100)
SETTINGS = {
    "max_steps": LOOP.steps, "learning_rate": LOOP.learning_rate, "weight_decay": LOOP.weight_decay, "use_cpu": True,
    "adam_epsilon": LOOP.adam_epsilon, "max_grad_norm": LOOP.max_grad_norm, "warmup_steps": LOOP.warmup_steps,
    "lr_scheduler_type": "linear", "save_strategy": "no", "report_to": [], "disable_tqdm": True,
}  # fmt: skip
WIDTH = 16
TINY = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# 22 rows of different lengths: two batches of 8 and one of 6 in each epoch.
NOUNS = ["cat", "dog", "rain", "house", "river", "bread", "table", "music", "winter", "garden", "train"]
TRIPLETS = [
    {"anchor": f"the {a} and {b} " * (1 + i % 3), "positive": f"a {a} near some {b}", "negative": f"no {b} " * (1 + i % 4)}
    for i, (a, b) in enumerate(itertools.islice(itertools.permutations(NOUNS, 2), 0, 110, 5))
]
PAIRS = [{key: row[key] for key in ("anchor", "positive")} for row in TRIPLETS]
SENTENCES = [{"text": row["anchor"]} for row in TRIPLETS]
# Every text is in two rows. One of them has two negatives, and the other one has none.
REPEATED = [
    {"anchor": row["anchor"], "positive": row["positive"], "negatives": negatives}
    for row in TRIPLETS[:9]
    for negatives in ([row["negative"], f"some {row['negative']}"], [])
]
REPEATED_PAIRS = PAIRS[:9] * 2


class Case(NamedTuple):
    """The rows, objective and settings of a training, and the loss of the loop, a function of embeddings and rows."""

    rows: list[dict[str, Any]]
    objective: Any
    loss: Callable
    pooling: str = "mean"
    dropout: bool = False
    settings: dict[str, Any] = {}


class Trained(NamedTuple):
    """The result of a training with the trainer."""

    start: nn.Module
    batches: list[list[Row]]  # the batches of all steps
    weights: dict[str, torch.Tensor]  # after the last step


class Seeds(TrainerCallback):
    """A callback that sets the seed of each step, as the loop does."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(LOOP.seed + state.global_step)


@functools.cache
def row_tokenizer():
    """Retrain the tokenizer on the few words of the rows. With its own 3,000 tokens, the tests would be slower."""
    texts = [text for row in TRIPLETS for text in row.values()]
    return small_tokenizer().train_new_from_iterator(texts, vocab_size=120)


# ---- the trainer ----


def make_trainer(case: Case, model: nn.Module, folder: str) -> ContrastiveTrainer:
    settings = SETTINGS | {"per_device_train_batch_size": BATCH, "pooling": case.pooling} | case.settings
    args = ContrastiveTrainingArguments(folder, **settings)
    trainer = ContrastiveTrainer(
        model=model, args=args, objective=case.objective, train_dataset=Dataset.from_list(case.rows), callbacks=[Seeds()],
        processing_class=row_tokenizer(),
    )  # fmt: skip
    return with_plain_dropout(trainer) if case.dropout else trainer


def numbers_of_batches(trainer: ContrastiveTrainer) -> list[list[int]]:
    """Return the row numbers of the batch of each step."""
    sampler = trainer.get_train_dataloader().batch_sampler
    batches: list[list[int]] = []
    epoch = 0
    while len(batches) < LOOP.steps:
        sampler.set_epoch(epoch)
        batches += sampler
        epoch += 1
    return batches[: LOOP.steps]


def texts_of(row: dict[str, Any]) -> list[str]:
    """Return the anchor, the positive and the negatives of a row. If the row has a single text, return it twice."""
    if "text" in row:
        return [row["text"]] * 2
    negatives = row.get("negatives", [row["negative"]] if "negative" in row else [])
    return [row["anchor"], row["positive"], *negatives]


def start_model(case: Case) -> nn.Module:
    model = tiny_model("bert", vocab_size=len(row_tokenizer()), **TINY, **({} if case.dropout else NO_DROPOUT)).double()
    if not case.objective.mlm_weight:
        return model
    masked_lm = BertForMaskedLM(model.config).double()
    masked_lm.bert.load_state_dict(model.state_dict(), strict=False)  # without the pooler
    return masked_lm


def encoder_of(model: nn.Module) -> nn.Module:
    """Return the encoder inside a masked language model. Return any other model unchanged."""
    return model.bert if isinstance(model, BertForMaskedLM) else model


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in model.state_dict().items()}


@functools.cache
def trained(name: str) -> Trained:
    case = CASES[name]
    model = start_model(case)
    start = deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, model, folder)
        if trainer.step.train_head is not None:
            encoder_of(start).training_head = deepcopy(trainer.step.train_head[0])
        tokenizer = trainer.encoder.tokenizer
        rows = [[tuple(tokenizer(text)["input_ids"]) for text in texts_of(row)] for row in case.rows]
        batches = [[rows[number] for number in numbers] for numbers in numbers_of_batches(trainer)]
        trainer.train()
    assert trainer.state.global_step == LOOP.steps
    if trainer.step.train_head is not None:
        encoder_of(model).training_head = trainer.step.train_head[0]
    return Trained(start, batches, weights_of(model))


# ---- the loop ----


def loop_weights(case: Case, start: nn.Module, batches: list[list[Row]], settings: Settings = LOOP) -> dict[str, torch.Tensor]:
    model = deepcopy(start)
    tokenizer = row_tokenizer()
    words = Words(len(tokenizer), tokenizer.mask_token_id, tokenizer.all_special_ids)
    once = case.settings.get("same_dropout_mask", False)

    def loss_of(rows: list[Row]) -> torch.Tensor:
        texts = [text for row in rows for text in (row[:1] if once else row)]
        if case.objective.mlm_weight:  # the masked words are drawn before the forward passes
            masked, chosen = mask_words(torch.tensor([token for text in texts for token in text]), words)
        vectors = embed(encoder_of(model), texts, POOLERS[case.pooling])
        loss = case.loss(vectors.repeat_interleave(2, 0) if once else vectors, rows)
        if case.objective.mlm_weight:
            loss = loss + case.objective.mlm_weight * masked_word_loss(model, texts, masked, chosen)
        return loss

    train(model, batches, loss_of, settings)
    return weights_of(model)


def largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in other)


# ---- the cases ----

CHUNKS = {"gradient_caching": True, "chunk_tokens": 120}
T = 0.1  # with the 0.01 of GTE, which the case "gte" has, only few texts get a gradient
WEIGHTED = SimCSE(T, hard_negative_weight=1.5)
weighted = partial(simcse, temperature=T, hard_negative_weight=1.5)
warm_gte = partial(gte, temperature=T)
WIDTHS = (WIDTH, 8, 4)

CASES = {
    # SimCSE, unsupervised: each pooler of the paper, and its ablations of dropout
    "unsupervised cls": Case(SENTENCES, SimCSE(), simcse, "cls", dropout=True),
    "unsupervised cls_mlp": Case(SENTENCES, SimCSE(), simcse, "cls_mlp", dropout=True),
    "unsupervised cls_mlp_train": Case(SENTENCES, SimCSE(), simcse, "cls_mlp_train", dropout=True),
    "unsupervised mean": Case(SENTENCES, SimCSE(), simcse, "mean", dropout=True),
    "unsupervised first_last": Case(SENTENCES, SimCSE(), simcse, "first_last", dropout=True),
    "unsupervised top2": Case(SENTENCES, SimCSE(), simcse, "top2", dropout=True),
    "unsupervised, cached": Case(SENTENCES, SimCSE(), simcse, "cls_mlp_train", True, {"gradient_caching": True}),
    "unsupervised, same mask": Case(SENTENCES, SimCSE(), simcse, "cls_mlp_train", True, {"same_dropout_mask": True}),
    "unsupervised, no dropout": Case(SENTENCES, SimCSE(), simcse, "cls_mlp_train", settings={"chunk_tokens": 120}),
    # SimCSE, supervised
    "supervised, pairs": Case(PAIRS, SimCSE(), simcse, "cls_mlp", dropout=True),
    "supervised": Case(TRIPLETS, SimCSE(), simcse, "cls_mlp", dropout=True),
    "supervised, chunks": Case(TRIPLETS, SimCSE(), simcse, "cls_mlp", settings=CHUNKS),
    "supervised, weight 1.5": Case(TRIPLETS, WEIGHTED, weighted, "cls"),
    "supervised, repeated texts": Case(REPEATED, WEIGHTED, weighted),
    # SimCSE with masked language modeling
    "mlm": Case(TRIPLETS, SimCSE(mlm_weight=0.1), simcse, "cls"),
    "mlm, chunks": Case(TRIPLETS, SimCSE(mlm_weight=0.1), simcse, "cls", settings=CHUNKS),
    "mlm, unsupervised": Case(SENTENCES, SimCSE(mlm_weight=0.3), simcse, "cls_mlp_train", dropout=True),
    # GTE
    "gte": Case(PAIRS, ImprovedContrastive(), gte),
    "gte, negatives": Case(TRIPLETS, ImprovedContrastive(T), warm_gte, dropout=True),
    "gte, chunks and tiles": Case(TRIPLETS, ImprovedContrastive(T, tile_rows=3), warm_gte, settings=CHUNKS),
    "gte, repeated texts": Case(REPEATED, ImprovedContrastive(T), warm_gte),
    "gte, positive once": Case(
        TRIPLETS, ImprovedContrastive(T, positive_once=True), partial(warm_gte, positive_twice=False)
    ),  # fmt: skip
    "vanilla": Case(TRIPLETS, ImprovedContrastive(T, ("query_to_doc",)), partial(warm_gte, sums=("qd",))),
    # Matryoshka
    "matryoshka": Case(TRIPLETS, Matryoshka(SimCSE(), WIDTHS), partial(matryoshka, widths=WIDTHS, loss=simcse)),
    "matryoshka of gte": Case(
        PAIRS, Matryoshka(ImprovedContrastive(T), WIDTHS), partial(matryoshka, widths=WIDTHS, loss=warm_gte)
    ),  # fmt: skip
}
SLOW = [
    "unsupervised cls_mlp_train", "unsupervised, no dropout", "supervised, pairs", "supervised", "supervised, weight 1.5",
    "mlm, chunks", "gte, negatives", "gte, positive once", "matryoshka", "unsupervised mean", "unsupervised top2",
    "mlm, unsupervised", "vanilla",
]  # fmt: skip
MARKED = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in CASES]


@pytest.mark.parametrize("name", MARKED)
def test_trainer_ends_in_the_weights_of_the_loop(name):
    start, batches, weights = trained(name)
    assert largest_difference(weights, weights_of(start)) > 0.01  # control: the training changed the weights
    expected = loop_weights(CASES[name], start, batches)
    assert weights.keys() == expected.keys()
    assert largest_difference(weights, expected) < ATOL


class Control(NamedTuple):
    """The difference between a loop and the trainer."""

    case: str
    changes: dict[str, Any] = {}
    settings: Settings = LOOP


CONTROLS = {
    "another temperature": Control("unsupervised, cached", {"loss": partial(simcse, temperature=0.051)}),
    "another pooler": Control("unsupervised first_last", {"pooling": "top2"}),
    "the positive is left out of the denominator": Control(
        "supervised, chunks", {"loss": partial(simcse, in_denominator=False)}
    ),
    "no weight": Control("supervised, weight 1.5", {"loss": partial(simcse, temperature=T)}),
    "equal texts are negatives": Control("supervised, repeated texts", {"loss": partial(weighted, masked=False)}),
    "another weight of masked words": Control("mlm", {"objective": SimCSE(mlm_weight=0.11)}),
    "the positive once": Control("gte", {"loss": partial(gte, positive_twice=False)}),
    "documents are not compared": Control("gte, chunks and tiles", {"loss": partial(warm_gte, sums=("qd", "qq", "dq"))}),
    "queries of equal documents are negatives": Control("gte, repeated texts", {"loss": partial(warm_gte, masked=False)}),
    "two sums": Control("vanilla", {"loss": partial(warm_gte, sums=("qd", "dq"))}),
    "two of three widths": Control("matryoshka of gte", {"loss": partial(matryoshka, widths=WIDTHS[:2], loss=warm_gte)}),
    "other dropout masks": Control("unsupervised mean", settings=LOOP._replace(seed=101)),
    "another weight decay": Control("vanilla", settings=LOOP._replace(weight_decay=0.05)),
    "no clipping": Control("vanilla", settings=LOOP._replace(max_grad_norm=1e9)),
    "another warm-up": Control("vanilla", settings=LOOP._replace(warmup_steps=6)),
}
SLOW_CONTROLS = list(CONTROLS)[-4:] + ["another pooler", "no weight", "two sums", "the positive once"]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW_CONTROLS else name for name in CONTROLS]
)
def test_control_another_loop_ends_elsewhere(name):
    control = CONTROLS[name]
    start, batches, weights = trained(control.case)
    other = loop_weights(CASES[control.case]._replace(**control.changes), start, batches, control.settings)
    assert largest_difference(weights, other) > NOTICED


def test_control_the_decoder_of_masked_words_is_tied():
    """The code of SimCSE trains a separate decoder that starts as a copy of the word embeddings. Here the two are tied."""
    start, batches, weights = trained("mlm")
    untied = deepcopy(start)
    untied.cls.predictions.decoder.weight = nn.Parameter(start.bert.embeddings.word_embeddings.weight.detach().clone())
    other = loop_weights(CASES["mlm"], untied, batches)
    table = "bert.embeddings.word_embeddings.weight"
    assert (weights[table] - other[table]).abs().max() > NOTICED
    assert torch.equal(weights[table], weights["cls.predictions.decoder.weight"])


# ---- the trainer of sentence-transformers ----


class GivenBatches(DefaultBatchSampler):
    """A batch sampler that yields the given batches in their order."""

    def __init__(self, batches: list[list[int]], dataset: Dataset, **settings):
        super().__init__(dataset, **settings)
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def peer_weights(start: nn.Module, case: Case, batches: list[list[int]], make_loss: Callable, folder: str) -> dict:
    """Train with sentence-transformers and mean pooling, and return the weights."""
    start.save_pretrained(f"{folder}/start")
    row_tokenizer().save_pretrained(f"{folder}/start")
    transformer = modules.Transformer(f"{folder}/start", max_seq_length=64)
    encoder = SentenceTransformer(modules=[transformer, modules.Pooling(WIDTH, "mean")], device="cpu").to(start.dtype)
    args = SentenceTransformerTrainingArguments(folder, batch_sampler=partial(GivenBatches, batches), **SETTINGS)
    trainer = SentenceTransformerTrainer(encoder, args, Dataset.from_list(case.rows), loss=make_loss(encoder))
    trainer.train()
    assert trainer.state.global_step == LOOP.steps
    return weights_of(encoder[0].auto_model)


DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
GTE_LOSS = partial(losses.MultipleNegativesRankingLoss, scale=1 / T, directions=DIRECTIONS)
PEERS = {
    "pairs": (Case(PAIRS, SimCSE(), None), losses.MultipleNegativesRankingLoss),
    "hard negatives": (Case(TRIPLETS, SimCSE(), None), losses.MultipleNegativesRankingLoss),
    "cached": (
        Case(TRIPLETS, SimCSE(), None, settings=CHUNKS),
        partial(losses.CachedMultipleNegativesRankingLoss, mini_batch_size=3),
    ),
    "matryoshka": (
        Case(TRIPLETS, Matryoshka(SimCSE(), WIDTHS), None),
        lambda model: losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), list(WIDTHS)),
    ),
    "gte": (Case(PAIRS, ImprovedContrastive(T), None), GTE_LOSS),
}


def both_trainers(case: Case, make_loss: Callable, dtype: torch.dtype, folder: str) -> tuple[dict[str, torch.Tensor], ...]:
    """Return the final weights of our trainer, those of sentence-transformers, and the weights at the start."""
    model = start_model(case).to(dtype)
    start = deepcopy(model)
    trainer = make_trainer(case, model, f"{folder}/ours")
    batches = numbers_of_batches(trainer)
    trainer.train()
    return weights_of(model), peer_weights(start, case, batches, make_loss, folder), weights_of(start)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", PEER_ATOL, ids=["float64", "float32"])
@pytest.mark.parametrize("name", PEERS)
def test_trainer_ends_in_the_weights_of_sentence_transformers(name, dtype, tmp_path):
    weights, expected, start = both_trainers(*PEERS[name], dtype, str(tmp_path))
    assert largest_difference(weights, start) > 0.01
    if dtype == torch.float32:
        expected = {key: weight for key, weight in expected.items() if not key.endswith(".key.bias")}
    assert largest_difference(weights, expected) < PEER_ATOL[dtype]


OTHERWISE = {
    "another temperature": (Case(TRIPLETS, SimCSE(0.051), None), losses.MultipleNegativesRankingLoss),
    # sentence-transformers leaves a row's own negatives out of the sum over documents; see docs/gte.md.
    "gte with negatives": (Case(TRIPLETS, ImprovedContrastive(T), None), GTE_LOSS),
    "equal texts": (Case(REPEATED_PAIRS, SimCSE(), None), losses.MultipleNegativesRankingLoss),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERWISE)
def test_control_sentence_transformers_ends_elsewhere(name, tmp_path):
    weights, other, _ = both_trainers(*OTHERWISE[name], torch.float32, str(tmp_path))
    assert largest_difference(weights, other) > NOTICED


@pytest.fixture(scope="module", autouse=True)
def few_objects_to_collect():
    """Exclude imported objects from the garbage collection at the start of a training, which takes as long as ten steps."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
