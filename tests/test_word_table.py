"""The chunks of a step share one gradient of the word table: it is the gradient of plain lookups, and is computed once."""

import copy
import gc
import itertools
import weakref

import pytest
import torch
from conftest import TINY, small_tokenizer, tiny_model
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from hf_embed import Encoder
from hf_embed.forward import word_table as module
from hf_embed.forward.activations import ChunkEncoder
from hf_embed.step import TrainingStep

IDS = torch.tensor([[3, 1, 4], [1, 5, 9]])


class Base(nn.Module):
    """A model that is only a word table, with what transformers' models have."""

    def __init__(self, table):
        super().__init__()
        self.table = table

    def get_input_embeddings(self):
        return self.table

    def forward(self, ids):
        return self.table(ids).sin()


class Scaled(nn.Embedding):
    """A table as Gemma has it."""

    def forward(self, ids):
        return super().forward(ids) * 1.7


TABLES = {
    "plain": lambda: nn.Embedding(10, 4),
    "padding": lambda: nn.Embedding(10, 4, padding_idx=1),
    "scaled": lambda: Scaled(10, 4, padding_idx=9),
    "sparse": lambda: nn.Embedding(10, 4, sparse=True),
    "by frequency": lambda: nn.Embedding(10, 4, scale_grad_by_freq=True),
    "renormalized": lambda: nn.Embedding(10, 4, max_norm=1.0),
}


def chunks_of(base):
    return ChunkEncoder(base, base, base, sharded=False)


def two_calls(base, first, second):
    """Return the gradient of the table from two chunks."""
    base.zero_grad()
    (first(IDS).square().sum() + second(IDS + 0).sum()).backward()
    return base.table.weight.grad.to_dense() if base.table.weight.grad.is_sparse else base.table.weight.grad.clone()


@pytest.mark.parametrize("name", TABLES)
def test_the_gradient_is_that_of_plain_lookups(name):
    torch.manual_seed(0)
    base = Base(TABLES[name]()).double()
    if base.table.max_norm:
        with torch.no_grad():  # renormalizing changes the weight, so begin with a weight that stays the same
            base.table.weight /= 2 * base.table.weight.norm(dim=1, keepdim=True)
    expected = two_calls(base, base, base)
    for first, second in itertools.product(("__call__", "recomputed"), repeat=2):
        encode = chunks_of(base)
        assert (encode.gradient is None) == (name in ("sparse", "by frequency", "renormalized"))
        result = two_calls(base, getattr(encode, first), getattr(encode, second))
        assert_close(result, expected, rtol=1e-12, atol=1e-12)


def test_only_the_lookups_of_the_table_are_shared():
    """Another table is read as usual, also by a lookup of the same ids inside the call of the table."""
    torch.manual_seed(0)

    class Both(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + F.embedding(ids, other)

    other = nn.Parameter(torch.randn(10, 4, dtype=torch.double))
    base = Base(Both(10, 4)).double()
    gradients = []
    base.other = other
    for encode in (base, chunks_of(base), chunks_of(base).recomputed):
        other.grad = None
        gradients.append((two_calls(base, encode, encode), other.grad))
    assert_close(gradients[1:], gradients[:1] * 2, rtol=1e-12, atol=1e-12)
    assert gradients[0][1].abs().sum() > 0


def test_what_needs_no_gradient_is_left_alone():
    base = Base(nn.Embedding(10, 4))
    with torch.no_grad():
        assert chunks_of(base).gradient is None
    base.table.requires_grad_(False)  # frozen, for example under LoRA
    assert chunks_of(base).gradient is None
    assert ChunkEncoder(base, base, base, sharded=True).gradient is None


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_table_is_restored(wrapped):
    """After a chunk, and also after an error, the table has the `forward` it had: its own or that of another library."""
    base = Base(nn.Embedding(10, 4))
    calls = []
    if wrapped:
        inner = base.table.forward
        base.table.forward = lambda ids: calls.append(ids) or inner(ids)
    before = vars(base.table).get("forward")
    encode = chunks_of(base)
    encode(IDS)
    with pytest.raises(IndexError):
        encode(IDS + 100)
    assert vars(base.table).get("forward") is before
    assert len(calls) == (2 if wrapped else 0)


def test_hooks_of_the_table_run():
    base = Base(nn.Embedding(10, 4))
    seen = []
    base.table.register_forward_hook(lambda table, args, output: seen.append(output.shape))
    chunks_of(base)(IDS)
    assert seen == [(2, 3, 4)]


def test_a_gradient_in_half_precision_is_summed_in_float32():
    """In bfloat16, 1 + 1/512 is 1: the sum of many small gradients would stop growing."""
    table = nn.Embedding(4, 1, dtype=torch.bfloat16)
    base = Base(table)
    encode = ChunkEncoder(table, base, base, sharded=False)
    ids = torch.zeros(1, 4, dtype=torch.long)
    sum((encode(ids).float() / 1024).sum() for _ in range(1024)).backward()
    assert table.weight.grad.dtype == torch.bfloat16
    assert table.weight.grad[0].item() == 4
    plain = nn.Embedding(4, 1, dtype=torch.bfloat16)
    sum((plain(ids).float() / 1024).sum() for _ in range(1024)).backward()
    assert plain.weight.grad[0].item() < 4  # negative control


def test_the_sum_has_one_order():
    """With several threads, the gradient of frequent tokens is the same every time, bit for bit."""
    table = nn.Embedding(50, 64)
    ids = torch.randint(0, 50, (4000,), generator=torch.Generator().manual_seed(0))
    rows = torch.randn(4000, 64, generator=torch.Generator().manual_seed(1))
    threads, sums = torch.get_num_threads(), []
    torch.set_num_threads(4)
    try:
        for _ in range(20):
            gradient = module.SharedGradient(table)
            gradient.add(ids, rows)
            sums.append(gradient.total)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(other, sums[0]) for other in sums)


@pytest.mark.parametrize("name", ["__call__", "recomputed"])
def test_nothing_is_kept_after_the_step(name):
    base = Base(nn.Embedding(10, 4))
    gc.disable()
    try:
        encode = chunks_of(base)
        gradient = weakref.ref(encode.gradient)
        getattr(encode, name)(IDS).sum().backward()
        assert gradient().total is None
        del encode
        assert gradient() is None  # freed at once, without waiting for the garbage collector
    finally:
        gc.enable()


@pytest.mark.parametrize("architecture", TINY)
def test_models(architecture, monkeypatch):
    """The vectors and gradients of every kind of model are those of plain lookups, and a step makes one gradient."""
    encoder = Encoder(tiny_model(architecture), small_tokenizer()).eval()
    ids, lengths = torch.arange(5, 25), [5, 9, 2, 4]
    weights = torch.randn(4, encoder.full_dimension, generator=torch.Generator().manual_seed(0))
    made, zeros = [], torch.zeros_like
    monkeypatch.setattr(module.torch, "zeros_like", lambda *args, **options: made.append(1) or zeros(*args, **options))

    def step(sharded):
        encoder.zero_grad()
        embeddings = encoder(ids, lengths, chunk_tokens=12, sharded=sharded)["embeddings"]
        made.clear()
        (embeddings * weights).sum().backward()
        return embeddings.detach(), encoder.base.get_input_embeddings().weight.grad.clone()

    expected = step(sharded=True)  # a sharded model uses plain lookups
    plain = len(made)
    result = step(sharded=False)
    assert len(made) == plain + 1
    assert_close(result, expected, rtol=1e-5, atol=1e-6)
    assert expected[1].abs().sum() > 0


@pytest.mark.slow
def test_a_compiled_step_has_the_same_gradients():
    """BUG: with a padded model, gradient caching and torch.compile, the table had lost its `forward`."""
    model = tiny_model("mpnet", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_hidden_layers=1)
    gradients = []
    for compiled in (False, True):
        step = TrainingStep(Encoder(copy.deepcopy(model), small_tokenizer()))
        run = torch.compile(step, backend="eager") if compiled else step
        run(torch.arange(5, 25), [9, 7, 4], 10, True)["embeddings"].square().sum().backward()
        gradients.append(step.encoder.backbone.embeddings.word_embeddings.weight.grad)
    torch._dynamo.reset()
    assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
    assert gradients[0][5:25].abs().sum(1).gt(0).all()
