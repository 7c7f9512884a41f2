"""Chunks: how texts are split into chunks, and that neither chunking nor gradient caching changes a gradient."""

import weakref

import pytest
import torch
from conftest import TINY, small_tokenizer, tiny_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from hf_embed import Encoder
from hf_embed.forward.activations import Activations
from hf_embed.forward.chunking import MAX_PADDING, pad_chunk, plan_chunks, split_chunks

# ---- splitting texts into chunks ----


def random_lengths(seed, n=200):
    return torch.randint(1, 60, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(params=[(0, 100, 10), (1, 500, 100), (2, 30, 30), (3, 100_000, 2000), (4, 100_000, 100_000)])
def cut(request):
    seed, chunk_tokens, min_tokens = request.param
    lengths = random_lengths(seed)
    return lengths, chunk_tokens, min_tokens, plan_chunks(lengths, chunk_tokens, min_tokens)


def test_every_text_once(cut):
    lengths, _, _, chunks = cut
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(lengths)))


def test_budget(cut):
    """A chunk has at most chunk_tokens padded tokens. A text that is longer than that has a chunk of its own."""
    lengths, chunk_tokens, _, chunks = cut
    assert all(len(chunk) == 1 or len(chunk) * lengths[chunk[0]] <= chunk_tokens for chunk in chunks)


def test_longest_first(cut):
    lengths, _, _, chunks = cut
    order = [lengths[i] for chunk in chunks for i in chunk]
    assert order == sorted(order, reverse=True)


def test_little_padding_beyond_a_small_chunk(cut):
    lengths, _, min_tokens, chunks = cut
    for chunk in chunks:
        longest = lengths[chunk[0]]
        late = [i for place, i in enumerate(chunk) if place * longest >= min_tokens]
        assert all(lengths[i] >= (1 - MAX_PADDING) * longest for i in late)


def test_no_needless_cut(cut):
    """A chunk ends only where the next text would not fit or would need too much padding."""
    lengths, chunk_tokens, min_tokens, chunks = cut
    for chunk, following in zip(chunks, chunks[1:]):
        longest, padded = lengths[chunk[0]], len(chunk) * lengths[chunk[0]]
        full = padded + longest > chunk_tokens
        assert full or (padded >= min_tokens and lengths[following[0]] < (1 - MAX_PADDING) * longest)


def test_no_texts():
    assert plan_chunks([], 10, 10) == []


def test_pad_chunk():
    ids, mask = pad_chunk(torch.tensor([4, 5, 6, 1]), torch.tensor([3, 1]), pad_id=9)
    assert ids.tolist() == [[4, 5, 6], [1, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# ---- the gradients ----

LENGTHS = [3, 17, 9, 5, 40, 2, 12, 9, 30, 6, 7, 25, 4, 8, 21, 3]
CONFIGS = {"bert": {}, "qwen3": {"attention_dropout": 0.1}}  # BERT has dropout 0.1 by default; qwen3 has none by default


def make_encoder(name):
    return Encoder(tiny_model(name, **CONFIGS[name]), small_tokenizer())


def texts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, 200, (n,), generator=generator) for n in LENGTHS]


def loss_of(embeddings):
    """Return a loss with a different weight for every number, so that exchanging two texts changes the gradient."""
    weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (embeddings.sin() * weights.to(embeddings.dtype)).sum()


def gradient(encoder, embeddings):
    """Return the gradients of all parameters as one vector."""
    encoder.zero_grad()
    loss_of(embeddings).backward()
    return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])


def chunked(encoder, chunk_tokens, gradient_caching=False):
    return encoder(torch.cat(texts()), LENGTHS, chunk_tokens, gradient_caching)["embeddings"]


def unchunked(encoder, mask_padding=True):
    ids = torch.nn.utils.rnn.pad_sequence(texts(), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS).unsqueeze(1)
    return encoder.embed(ids, (mask if mask_padding else torch.ones_like(mask)).long())


def relative(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 50, 300, 10_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_equal_one_padded_batch(name, chunk_tokens, caching):
    encoder = make_encoder(name).double().eval()
    one, many = unchunked(encoder), chunked(encoder, chunk_tokens, caching)
    assert_close(many, one, rtol=1e-9, atol=1e-12)
    assert relative(gradient(encoder, many), gradient(encoder, one)) < 1e-9


@pytest.mark.parametrize("spoil", ["padding attended to", "two texts exchanged", "a text dropped"])
def test_control_comparison_notices(spoil):
    encoder = make_encoder("bert").double().eval()
    wrong = unchunked(encoder, mask_padding=spoil != "padding attended to")
    if spoil == "two texts exchanged":
        wrong = wrong[[1, 0, *range(2, len(LENGTHS))]]
    elif spoil == "a text dropped":
        wrong = torch.cat([wrong[:-1], wrong[-1:].detach()])
    right = unchunked(encoder)
    assert relative(gradient(encoder, wrong), gradient(encoder, right)) > 1e-3


def with_dropout(encoder, caching, seed=0, bf16=False):
    torch.manual_seed(seed)
    with torch.autocast("cpu", torch.bfloat16, bf16):
        return gradient(encoder.train(), chunked(encoder, 100, caching))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", TINY)
def test_caching_is_bit_identical_under_dropout(name, bf16):
    encoder = Encoder(tiny_model(name, **CONFIGS.get(name, {})), small_tokenizer())
    assert torch.equal(with_dropout(encoder, True, bf16=bf16), with_dropout(encoder, False, bf16=bf16))


def test_hooks_of_parameters_run_once():
    """A hook that doubles a gradient doubles the sum of the chunks, and not the gradient of each chunk too."""
    encoder = make_encoder("bert")
    expected = with_dropout(encoder, False)
    for parameter in encoder.parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    assert torch.equal(with_dropout(encoder, True), 2 * expected)


def test_some_chunks_are_recomputed():
    """Chunks that are kept and chunks that are recomputed take no weights from each other's cache of cast weights."""
    encoder = make_encoder("bert")
    caching = Activations(limit=300.0)
    caching.per_token = 1.0
    caching.keep = lambda encode, tokens, *inputs: encode(*inputs)
    assert 0 < caching.recomputed([100, 100, 100, 100]) < 3
    assert torch.equal(with_dropout(encoder, caching, bf16=True), with_dropout(encoder, False, bf16=True))


@pytest.mark.parametrize("caching", [False, True])
def test_gradients_of_chunks_are_summed_in_float32(caching, monkeypatch):
    """In bfloat16, the gradient of many chunks is the exact sum of the gradients of each chunk alone."""
    encoder = make_encoder("bert").eval()
    sizes, rows, total = [16] * 20, torch.randint(5, 200, (20, 16), generator=torch.Generator().manual_seed(0)), 0

    def of(rows):
        with torch.autocast("cpu", torch.bfloat16):
            embeddings = encoder(rows.flatten(), sizes[: len(rows)], chunk_tokens=16, gradient_caching=caching)["embeddings"]
        encoder.zero_grad()
        embeddings.float().sin().sum().backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None])

    for row in rows:
        total = total + of(row.unsqueeze(0)).double()
    assert relative(of(rows).double(), total) < 1e-6
    if not caching:  # negative control
        monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)
        assert relative(of(rows).double(), total) > 1e-3


@pytest.mark.parametrize("name", CONFIGS)
def test_control_another_seed_is_another_gradient(name):
    """Dropout is really on, and the comparison above would notice different dropout masks."""
    encoder = make_encoder(name)
    assert relative(with_dropout(encoder, True, seed=1), with_dropout(encoder, False, seed=0)) > 1e-3


# ---- the memory ----


def saved_bytes(caching):
    """Return the size in bytes of the activations that autograd keeps for the backward pass."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    encoder = make_encoder("bert").train()
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        embeddings = chunked(encoder, 100, caching)
    assert embeddings.requires_grad
    return sum(size for place, size in saved.items() if place not in weights)


def test_caching_saves_hardly_anything():
    assert 0 < 20 * saved_bytes(caching=True) < saved_bytes(caching=False)


class LivePeak(TorchDispatchMode):
    """Measures the peak memory in bytes of all tensors that are created in this mode."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size):
        self.now -= size


def peak_of_a_step(caching):
    encoder = make_encoder("bert").train()
    encoder.backbone.resize_token_embeddings(200)  # the gradient of a larger word table would hide the activations
    for p in encoder.parameters():
        p.grad = torch.zeros_like(p)
    with LivePeak() as live:
        loss_of(encoder(torch.cat(2 * texts()), 2 * LENGTHS, 100, caching)["embeddings"]).backward()
    return live.peak


def test_caching_lowers_the_peak_of_the_whole_step():
    """This includes the activations that the backward pass computes again."""
    assert 2 * peak_of_a_step(caching=True) < peak_of_a_step(caching=False)


# ---- activations as needed ----


@pytest.mark.parametrize(
    ("limit", "per_token", "recomputed"),
    [
        (0, 0, 3),
        (0, 10, 3),
        (10_000, 0, 3),
        (299, 10, 3),
        (699, 10, 3),
        (700, 10, 2),
        (1199, 10, 2),
        (1200, 10, 1),
        (1699, 10, 1),
        (1700, 10, 0),
        (9e9, 10, 0),
    ],
)
def test_the_last_chunks_that_fit_are_kept(limit, per_token, recomputed):
    """The last chunk is kept even without a limit, because the backward pass begins with it."""
    activations = Activations(limit)
    activations.per_token = per_token
    assert activations.recomputed([50, 50, 40, 30]) == recomputed


def test_the_limit_is_set_once_after_the_first_update(monkeypatch):
    """BUG: the peak of an earlier training in the process counted, so `--seeds` recomputed what would have fitted."""
    peaks = [9000]  # of 10,000 bytes; the first step needs at most 2,000
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (4000, 10000))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda device: 6000)
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: max(peaks))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda device: peaks.clear())
    activations, limits = Activations(), []
    for step in (7, 7, 8, 8, 9):  # two micro-batches in each step; the run goes on from step 7
        activations.begin(step, torch.device("cpu"))
        limits.append(activations.limit)
        peaks.append(2000 * (step - 6))
    assert limits == [0, 0, 6400, 6400, 6400]


def step_as_needed(name, monkeypatch, limit):
    """Return the gradient of a step with dropout, and how often the model ran in the forward and in the backward pass."""
    monkeypatch.setattr("hf_embed.forward.activations.allocated", lambda device: 0)
    encoder, runs = make_encoder(name), []
    encoder.backbone.register_forward_hook(lambda *_: runs.append(1))
    activations = Activations(limit)
    activations.per_token = 1.0
    torch.manual_seed(0)
    embeddings = chunked(encoder.train(), 40, activations)
    forward = len(runs)
    return gradient(encoder, embeddings), forward, len(runs) - forward


@pytest.mark.parametrize("name", CONFIGS)
def test_as_needed_is_bit_identical_under_dropout(name, monkeypatch):
    """With a token of one byte, the limit is a number of tokens. It grows until no chunk is recomputed."""
    encoder = make_encoder(name)
    torch.manual_seed(0)
    expected = gradient(encoder.train(), chunked(encoder, 40))
    seen = set()
    for limit in (0, 80, 120, 1000):
        grads, forward, backward = step_as_needed(name, monkeypatch, limit)
        assert torch.equal(grads, expected)
        seen.add(backward)
        assert backward < forward
    assert len(seen) == 4 and 0 in seen


def test_measured_activations_are_those_that_stay():
    """A limit for kept activations holds: `Activations` measures at least the memory that they take, and at most 30% more."""
    peaks, measured = [], []
    for limit in (0, 1e9):
        encoder = make_encoder("bert").train()
        activations = Activations(limit)
        with LivePeak() as live, pytest.MonkeyPatch.context() as patch:
            patch.setattr("hf_embed.forward.activations.allocated", lambda device, live=live: live.now)
            for _ in range(2):  # the second pass knows the bytes for each token
                embeddings = chunked(encoder, 100, activations)
                before = live.now
                del embeddings
            peaks.append(before - live.now)
        measured.append(activations.per_token)
    kept = sum(LENGTHS) - sum(LENGTHS[i] for i in plan_chunks(LENGTHS, 100, None)[-1])
    assert 1 <= measured[1] * kept / (peaks[1] - peaks[0]) < 1.3


def test_as_needed_evaluates_without_gradients(monkeypatch):
    monkeypatch.setattr("hf_embed.forward.activations.allocated", None)  # nothing is measured
    encoder = make_encoder("bert").eval()
    with torch.no_grad():
        assert_close(chunked(encoder, 100, Activations(1e9)), chunked(encoder, 100))


@pytest.mark.parametrize("count", [2, 3, 5, 7])
def test_split_chunks_gives_every_rank_the_same_count(count):
    chunks = split_chunks([[3, 1, 0], [2, 4]], count)
    assert len(chunks) == count
    assert all(chunks)
    assert {i for chunk in chunks for i in chunk} == set(range(5))


def test_a_text_encoded_twice_changes_no_gradient(monkeypatch):
    """A rank with fewer texts than another rank has chunks encodes a text again, so that all ranks run the same collectives."""
    encoder = Encoder(tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double(), small_tokenizer())
    ids, lengths = torch.arange(5, 17), [5, 4, 3]
    gradients = []
    for others in (1, 6):
        monkeypatch.setattr("hf_embed.forward.chunking.largest", lambda own, others=others: max(own, others))
        encoder.zero_grad()
        embeddings = encoder(ids, lengths, chunk_tokens=100, sharded=True)["embeddings"]
        (embeddings**3).sum().backward()
        gradients.append(encoder.backbone.embeddings.word_embeddings.weight.grad.clone())
    assert_close(*gradients, rtol=1e-9, atol=1e-12)
    assert gradients[0].abs().max() > 0
