"""Packed chunks: the same vectors and gradients as padded ones, for every model that is packed, and no others."""

import copy
from functools import partial

import pytest
import torch
from conftest import SMALL, TINY, small_tokenizer, tiny_model
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AttentionInterface,
    BertConfig,
    BertModel,
    EsmConfig,
    EsmModel,
    StableLmConfig,
    StableLmModel,
    XLMRobertaModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_embed import Encoder, TempScaleConfig, apply_tempscale
from hf_embed.forward import packed_attention
from hf_embed.forward.chunking import plan_chunks
from hf_embed.forward.dropout import dropout, use_fast_dropout
from hf_embed.forward.packed_attention import PADDED, SHORT, ByHead, attend_by_text
from hf_embed.forward.packing import Packing, after_padding, from_zero, pack
from hf_embed.pooling import POOLINGS

LENGTHS = [3, 17, 9, 5, 40, 2, 9, 9, 30, 6, 1, 25]
PACKED = {"bert": from_zero, "roberta": after_padding, "xlm-roberta": after_padding, "distilbert": from_zero}


def flat_batch(seed=0):
    """Return a flat batch of random tokens, some of which are the padding token, as in users' texts."""
    ids = torch.randint(5, 200, (sum(LENGTHS),), generator=torch.Generator().manual_seed(seed))
    ids[::17] = 0
    return ids


def encoder_of(name="bert", pooling="mean", **config):
    return Encoder(tiny_model(name, **config), small_tokenizer(), pooling).double()


def both_ways(encoder, **options):
    """Return the embeddings and the gradients of the weights, packed and padded."""
    found = []
    for packed in (True, False):
        encoder.zero_grad()
        embeddings = encoder(flat_batch(), LENGTHS, packed=packed, **options)["embeddings"]
        weights = torch.randn(embeddings.shape, generator=torch.Generator().manual_seed(1), dtype=embeddings.dtype)
        (embeddings.sin() * weights).sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        found.append((embeddings.detach(), gradients))
    return found


# ---- which models are packed ----


@pytest.mark.parametrize("name", TINY)
def test_which_models_are_packed(name):
    encoder = Encoder(tiny_model(name, pad_token_id=0), small_tokenizer())
    assert encoder.numbering is PACKED.get(name)  # MPNet adds position biases, ModernBERT has windows, decoders a causal mask


def test_another_attention_is_padded():
    encoder = encoder_of("bert")
    assert encoder.numbering is from_zero
    encoder.backbone.set_attn_implementation("eager")
    assert encoder.numbering is None


class WindowedBert(BertModel):
    """A BERT whose attention is told of a sliding window, which packed attention does not know."""

    def forward(self, *args, **kwargs):
        """Add the window."""
        return super().forward(*args, **kwargs, sliding_window=4)


class StaggeredBert(BertModel):
    """A BERT that numbers tokens in its own way."""

    def forward(self, *args, position_ids=None, **kwargs):
        """Count from 1."""
        count = kwargs["input_ids"].shape[1]
        return super().forward(*args, position_ids=torch.arange(count).unsqueeze(0) % 60 + 1, **kwargs)


class ShortBert(BertModel):
    """A BERT that cannot read a row with more tokens than it has positions."""

    def forward(self, *args, **kwargs):
        """Refuse long rows."""
        assert kwargs["input_ids"].shape[1] <= self.config.max_position_embeddings
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [WindowedBert, StaggeredBert, ShortBert])
def test_a_model_with_other_vectors_or_an_error_is_padded(kind):
    model = kind(BertConfig(**SMALL, max_position_embeddings=66)).eval()
    encoder = Encoder(model, small_tokenizer())
    assert encoder.numbering is None
    assert encoder(flat_batch(), LENGTHS)["embeddings"].shape == (len(LENGTHS), 32)


def test_a_model_that_counts_the_mask_tokens_of_a_row_is_padded():
    """BUG: ESM scales word embeddings by the share of mask tokens in the row, so texts in a packed row changed each other."""
    mask = small_tokenizer().mask_token_id
    sizes = SMALL | {"max_position_embeddings": 66, "pad_token_id": 0, "mask_token_id": mask}
    for counts in (True, False):
        encoder = Encoder(EsmModel(EsmConfig(**sizes, token_dropout=counts)).eval(), small_tokenizer()).eval()
        ids, text = torch.randint(5, 200, (30,)), torch.tensor([7, mask, mask, mask, 9])
        together = encoder(torch.cat([text, ids]), [5, 30])["embeddings"][0]
        assert_close(together, encoder(text, [5])["embeddings"][0], rtol=1e-4, atol=1e-5)
        assert (encoder.numbering is None) == counts


# ---- the same vectors and gradients ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_does_not_hide_that_mask_tokens_count(dtype):
    """BUG: in bfloat16 the effect of one mask token was within the tolerance, and texts in a packed row changed each other."""
    sizes = SMALL | {"hidden_size": 64, "max_position_embeddings": 66, "pad_token_id": 0}
    config = EsmConfig(**sizes, mask_token_id=small_tokenizer().mask_token_id, token_dropout=True)
    encoder = Encoder(EsmModel(config, add_pooling_layer=False).to(dtype), small_tokenizer()).eval()
    assert encoder.numbering is None
    text = "rain on the hills in the old park"
    together, alone = encoder.encode([text, "[MASK] " * 13])[0], encoder.encode([text])[0]
    assert_close(together, alone, rtol=0.02, atol=0.02)


def test_a_model_that_masks_a_whole_row_is_padded():
    """StableLM does not pass the bounds of the texts on. transformers then masks the other texts of the row, which is slow."""
    model = StableLmModel(StableLmConfig(**SMALL, num_key_value_heads=4, max_position_embeddings=66)).eval()
    assert Encoder(model, small_tokenizer(), "last").numbering is None


class LocalBert(BertModel):
    """A BERT that builds a mask of its own for long rows."""

    def forward(self, *args, **kwargs):
        """Tell attention of a window if the row is long."""
        window = {"sliding_window": 4} if kwargs["input_ids"].shape[1] > 150 else {}
        return super().forward(*args, **kwargs, **window)


@pytest.mark.parametrize("caching", [False, True])
def test_a_model_that_cannot_pack_long_rows_is_padded_from_then_on(caplog, caching):
    """BUG: it passed the check, whose rows are short, and then `encode` raised an error."""
    model = LocalBert(BertConfig(**SMALL, max_position_embeddings=2000)).eval()
    encoder = Encoder(model, small_tokenizer()).eval()
    assert encoder.numbering is from_zero
    expected = encoder(flat_batch(), LENGTHS, packed=False)["embeddings"]
    found = encoder(flat_batch(), LENGTHS, gradient_caching=caching)["embeddings"]
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert encoder.numbering is None
    warning = "LocalBert: attention with sliding_window in a packed row is not possible; from now on, texts are padded"
    assert caplog.messages == [warning]
    found.sum().backward()


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_packed_equals_padded(name, pooling, training):
    """Training without dropout and evaluation use different functions for attention."""
    if pooling == "cls_mlp" and name == "distilbert":
        pytest.skip("DistilBERT has no pooler")
    none = ("dropout", "attention_dropout") if name == "distilbert" else ("hidden_dropout_prob", "attention_probs_dropout_prob")
    encoder = encoder_of(name, pooling, pad_token_id=0, **dict.fromkeys(none, 0.0)).train(training)
    (packed, gradients), (padded, expected) = both_ways(encoder, chunk_tokens=64)
    assert_close(packed, padded, rtol=1e-9, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for key in gradients:
        assert_close(gradients[key], expected[key], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("growth", [None, "log"])
def test_packed_equals_padded_with_tempscale(growth):
    encoder = encoder_of().eval()
    before = encoder(flat_batch(), LENGTHS)["embeddings"]
    apply_tempscale(encoder.backbone, TempScaleConfig(0.7, growth=growth, reference_length=4))
    (packed, _), (padded, _) = both_ways(encoder)
    assert_close(packed, padded, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(packed, before, rtol=1e-3)


def test_packed_equals_padded_in_bfloat16():
    encoder = Encoder(tiny_model(), small_tokenizer()).eval()
    with torch.autocast("cpu", torch.bfloat16):
        (packed, _), (padded, _) = both_ways(encoder)
    assert torch.nn.functional.cosine_similarity(packed.float(), padded.float()).min() > 0.9995


@pytest.mark.parametrize("layers_recomputed", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.1])
def test_caching_gives_the_same_gradients_bit_for_bit(layers_recomputed, rate):
    """Also with dropout, and with transformers' own recomputation of each layer."""
    found, rates = [], {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
    for caching in (False, True):
        encoder = Encoder(tiny_model(**rates), small_tokenizer()).train()
        use_fast_dropout(encoder.backbone)
        if layers_recomputed:
            encoder.backbone.gradient_checkpointing_enable()
        torch.manual_seed(0)
        encoder(flat_batch(), LENGTHS, chunk_tokens=64, gradient_caching=caching)["embeddings"].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in encoder.parameters() if p.grad is not None]))
    assert torch.equal(*found)


def test_the_vectors_of_a_text_do_not_depend_on_its_neighbours(monkeypatch):
    """Negative control: attention over the whole row gives other vectors."""
    encoder = encoder_of().eval()
    batch, count = flat_batch(), sum(LENGTHS[:3])
    together = encoder(batch, LENGTHS)["embeddings"][:3]
    assert_close(together, encoder(batch[:count], LENGTHS[:3])["embeddings"], rtol=1e-9, atol=1e-12)
    right = Packing.arguments
    monkeypatch.setattr(Packing, "arguments", lambda packing: right(packing) | {"text_bounds": torch.tensor([0, len(batch)])})
    whole_row = encoder(batch, LENGTHS, chunk_tokens=len(batch))["embeddings"][:3]
    assert not torch.allclose(whole_row, together, rtol=1e-2)


def test_another_attention_that_is_registered_later_is_padded():
    """BUG: then the bounds of the texts were ignored, and texts attended to each other."""
    encoder = encoder_of().eval()
    expected = encoder(flat_batch(), LENGTHS)["embeddings"]
    AttentionInterface.register("sdpa", lambda *args, **kwargs: PADDED(*args, **kwargs))
    try:
        assert encoder.numbering is None
        found = encoder(flat_batch(), LENGTHS)["embeddings"]
    finally:
        AttentionInterface.register("sdpa", attend_by_text)
    assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("given", [{}, {"dropout": 0.0, "scaling": 0.3, "is_causal": False}])
def test_bounds_from_elsewhere_are_left_to_transformers(given):
    """BUG: `cu_seq_lens_q` from transformers' own flattening collator, beside a mask, was taken for a packed row of ours."""
    query, key, value = torch.randn(3, 1, 2, 6, 4).unbind(0)
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(2, 2)).bool().view(1, 1, 6, 6)
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    found = attend_by_text(torch.nn.Module(), query, key, value, mask, cu_seq_lens_q=bounds, **given)[0]
    expected = sdpa_attention_forward(torch.nn.Module(), query, key, value, mask, **given)[0]
    assert torch.equal(found, expected)
    positional = attend_by_text(torch.nn.Module(), query, key, value, mask, 0.0, 0.3, False)[0]
    assert torch.equal(positional, sdpa_attention_forward(torch.nn.Module(), query, key, value, mask, 0.0, 0.3, False)[0])


def test_models_outside_of_this_package_compute_what_they_did():
    """The registered attention changes nothing for padded texts."""
    assert AttentionInterface()["sdpa"] is attend_by_text
    model = tiny_model("xlm-roberta").eval()
    ids = torch.randint(5, 200, (3, 12))
    mask = torch.arange(12) < torch.tensor([12, 5, 3]).unsqueeze(1)
    result = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    AttentionInterface.register("sdpa", sdpa_attention_forward)
    try:
        expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    finally:
        AttentionInterface.register("sdpa", attend_by_text)
    assert torch.equal(result, expected)


def test_a_copy_and_a_saved_encoder_are_packed(tmp_path):
    encoder = Encoder(tiny_model("xlm-roberta", pad_token_id=0), small_tokenizer()).eval()
    expected = encoder(flat_batch(), LENGTHS)["embeddings"]
    assert copy.deepcopy(encoder).numbering is after_padding
    encoder.save_pretrained(str(tmp_path / "saved"))
    loaded = Encoder.from_pretrained(str(tmp_path / "saved")).eval()
    assert isinstance(loaded.base, XLMRobertaModel) and loaded.numbering is after_padding
    assert_close(loaded(flat_batch(), LENGTHS)["embeddings"], expected, rtol=1e-5, atol=1e-6)


# ---- the parts ----


def test_pack():
    ids = torch.tensor([4, 5, 6, 7, 8, 9])
    row, mask, packing = pack(ids, torch.tensor([3, 2, 1]), pad_id=0, numbering=from_zero)
    assert row.tolist() == [ids.tolist()]
    assert packing.position_ids.tolist() == [[0, 1, 2, 0, 1, 0]]
    assert packing.cu_seq_lens.tolist() == [0, 3, 5, 6] and packing.cu_seq_lens.dtype == torch.int32
    assert packing.longest == 3
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0]]
    states = torch.arange(6.0).view(1, 6, 1)
    ((unpacked, masks),) = packing.unpack(states, mask)
    assert unpacked.squeeze(-1).tolist() == [[0, 1, 2], [3, 4, 0], [5, 0, 0]] and masks.equal(mask)


class Largest(TorchDispatchMode):
    """Measures the largest tensor of numbers with a fraction that is made in this mode."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_long_text_among_short_ones_takes_little_memory(pooling):
    """BUG: all texts of a row were padded to its longest one for the pooling. 768 texts of 15 tokens and one of 512 needed 1.6
    times the memory of the texts without it.
    """
    encoder = Encoder(tiny_model().double(), small_tokenizer(), pooling).eval()
    lengths = [3, 60, *[2, 5] * 50]
    ids = torch.randint(5, 2000, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    with Largest() as largest:
        vectors = encoder(ids, lengths, packed=True)["embeddings"]
    assert largest.numbers <= max(2 * sum(lengths) * 64, 3000 * 32) < len(lengths) * 60 * 32  # in the model, and if padded
    packed = torch.autograd.grad(vectors.square().sum(), encoder.base.embeddings.word_embeddings.weight)[0]
    vectors_of_padded = encoder(ids, lengths, packed=False)["embeddings"]
    padded = torch.autograd.grad(vectors_of_padded.square().sum(), encoder.base.embeddings.word_embeddings.weight)[0]
    assert_close(vectors, vectors_of_padded, rtol=1e-9, atol=1e-9)
    assert_close(packed, padded, rtol=1e-9, atol=1e-9)


def test_rotated_queries_in_half_precision():
    """Rotary positions make queries and keys float32, while the values are bfloat16. The output is bfloat16."""
    module = torch.nn.Module().train()
    query, key, value = (torch.randn(1, 2, 6, 4, requires_grad=True) for _ in range(3))
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    for p in (0.0, 0.1):
        with torch.autocast("cpu", torch.bfloat16):
            output, _ = attend_by_text(module, query, key, value.bfloat16(), None, p, is_causal=False, text_bounds=bounds)
        assert output.dtype == torch.bfloat16


def test_a_row_is_rounded_up():
    """Padding tokens at the end are a text of their own, which no embedding reads."""
    ids, lengths = torch.arange(5, 305), torch.tensor([200, 100])
    assert pack(ids, lengths, pad_id=1, numbering=from_zero)[0].tolist() == [ids.tolist()]
    with torch.autocast("cpu", torch.bfloat16):
        row, mask, packing = pack(ids, lengths, pad_id=1, numbering=from_zero)
        small, *_ = pack(ids[:255], torch.tensor([255]), pad_id=1, numbering=from_zero)
    assert row.tolist() == [[*range(5, 305), *[1] * 4]]
    assert packing.position_ids.tolist() == [[*range(200), *range(100), *range(4)]]
    assert packing.cu_seq_lens.tolist() == [0, 200, 300, 304] and packing.longest == 200
    assert mask.shape == (2, 200) and packing.places.max() == 299
    assert small.shape == (1, 255)


@pytest.mark.parametrize("name", PACKED)
def test_a_rounded_row_changes_nothing(name, monkeypatch):
    """The vectors and gradients of 312 tokens in a row of 320 are those of padded texts, here in float64."""
    monkeypatch.setattr("hf_embed.forward.packing.row_size", lambda tokens, device: tokens + -tokens % 16)
    encoder = encoder_of(name).eval()
    sizes, ids = [], encoder.base.get_input_embeddings()
    ids.register_forward_hook(lambda table, args, output: sizes.append(args[0].shape))
    found = []
    for packed in (True, False):
        encoder.zero_grad()
        batch = torch.cat([flat_batch(0), flat_batch(1)])
        embeddings = encoder(batch, LENGTHS * 2, packed=packed)["embeddings"]
        embeddings.sin().sum().backward()
        found.append((embeddings.detach(), {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}))
    assert sizes[0] == (1, 320)
    assert_close(found[0], found[1], rtol=1e-9, atol=1e-10)


def test_plan_of_packed_chunks():
    chunks = plan_chunks(LENGTHS, 50, min_tokens=None)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(len(LENGTHS)))
    sizes = [sum(LENGTHS[i] for i in chunk) for chunk in chunks]
    assert all(size <= 50 for size in sizes)
    assert all(size + LENGTHS[following[0]] > 50 for size, following in zip(sizes, chunks[1:]))
    order = [LENGTHS[i] for chunk in chunks for i in chunk]
    assert order == sorted(order, reverse=True)
    assert plan_chunks([], 10, None) == [] and plan_chunks([30, 4], 10, None) == [[0], [1]]


@pytest.mark.parametrize(
    "given", [{"sliding_window": 4}, {"softcap": 5.0}, {"is_causal": True}, {"position_bias": torch.ones(1)}]
)
def test_attention_that_needs_more_is_refused(given):
    rows = torch.randn(1, 2, 6, 4)
    module = torch.nn.Module()
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match=next(iter(given.keys() - {"is_causal"}), "a mask")):
        attend_by_text(module, rows, rows, rows, None, text_bounds=bounds, **given)
    with pytest.raises(NotImplementedError, match="a mask"):
        attend_by_text(module, rows, rows, rows, torch.ones(1, 1, 6, 6), text_bounds=bounds)


def test_causal_attention_of_the_module_is_refused():
    """`is_causal=None` means what the module says, as in transformers' "sdpa"."""
    rows, module = torch.randn(1, 2, 6, 4), torch.nn.Module()
    module.is_causal = True
    bounds = torch.tensor([0, 4, 6], dtype=torch.int32)
    for given in ({}, {"is_causal": None}):
        with pytest.raises(NotImplementedError, match="a mask"):
            attend_by_text(module, rows, rows, rows, None, text_bounds=bounds, **given)


def test_attention_equals_a_loop_over_texts():
    """Keys and values may have fewer heads than queries."""
    query, key, value = (torch.randn(1, heads, 9, 4, dtype=torch.float64) for heads in (4, 2, 2))
    bounds = torch.tensor([0, 3, 6, 8, 9], dtype=torch.int32)
    out, _ = attend_by_text(torch.nn.Module(), query, key, value, None, text_bounds=bounds, scaling=0.3)
    for start, end in zip(bounds[:-1], bounds[1:]):
        for head in range(4):
            q, k, v = query[0, head, start:end], key[0, head // 2, start:end], value[0, head // 2, start:end]
            assert_close(out[0, start:end, head], (0.3 * q @ k.T).softmax(-1) @ v)


def test_rows_by_head():
    """Texts of 2 and 1 tokens with 2 heads: token a has the rows 0 and 1, token b 2 and 3, token c 4 and 5."""
    order = ByHead((2, 1), heads=2)
    assert order.rows.tolist() == [0, 2, 1, 3, 4, 5]
    states = torch.arange(6.0).view(3, 2, 1)
    assert [part.squeeze(-1).tolist() for part in order.split(order.sort(states))] == [[[0, 2], [1, 3]], [[4], [5]]]
    assert torch.equal(order.restore(order.sort(states)), states)


def attended(lengths, seed=0, width=4, **given):
    """Return the result of attention in a packed row, (S, 2, width), and the gradients of query, key and value."""
    draw = torch.Generator().manual_seed(seed)
    sizes = (4, 4, width)
    rows = [torch.randn(1, 2, sum(lengths), d, dtype=torch.float64, generator=draw).requires_grad_() for d in sizes]
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    out = attend_by_text(torch.nn.Module().train(), *rows, None, is_causal=False, text_bounds=bounds, **given)[0]
    weights = torch.randn(out.shape, dtype=torch.float64, generator=draw)
    return [out, *torch.autograd.grad((out * weights).sum(), rows)]


@pytest.mark.parametrize("lengths", [[7], [SHORT, 3, 3, 1], [5, 2, 5, 2, 2]])
@pytest.mark.parametrize("width", [4, 6])
def test_the_own_backward_pass_equals_that_of_the_function_of_pytorch(lengths, width, monkeypatch):
    """Values may be wider than queries. The control: with another scale, all gradients differ."""
    found, other = attended(lengths, width=width, scaling=0.3), attended(lengths, width=width, scaling=0.2)
    monkeypatch.setattr("hf_embed.forward.packed_attention.SHORT", 0)
    expected = attended(lengths, width=width, scaling=0.3)
    for one, another, right in zip(found, other, expected, strict=True):
        assert_close(one, right, rtol=1e-9, atol=1e-12)
        assert not torch.allclose(another, right, rtol=1e-3)


@pytest.mark.parametrize("longest", [SHORT, SHORT + 1])
def test_long_texts_have_the_function_of_pytorch(longest, monkeypatch):
    """Its memory does not grow with the square of the length. In evaluation it is as fast, so it is used there too."""
    own = []
    function = packed_attention._Attend.apply
    monkeypatch.setattr(packed_attention._Attend, "apply", lambda *args: own.append(1) or function(*args))
    attended([longest, 2])
    assert bool(own) == (longest == SHORT)
    own.clear()
    rows = torch.randn(1, 2, longest, 4)
    attend_by_text(torch.nn.Module().eval(), rows, rows, rows, None, text_bounds=torch.tensor([0, longest]).int())
    assert not own


def test_attention_in_inference_mode_and_then_in_training():
    """The order of the rows is kept from call to call, and tensors made in inference mode cannot be saved for a gradient."""
    lengths = [6, 5, 5, 3]
    with torch.inference_mode():
        rows = torch.randn(1, 2, sum(lengths), 4)
        bounds = torch.tensor([0, *lengths]).cumsum(0).int()
        attend_by_text(torch.nn.Module().train(), rows, rows, rows, None, dropout=0.1, text_bounds=bounds)
    assert all(tensor.isfinite().all() for tensor in attended(lengths))


def attention_with_dropout(dtype):
    """Return the result of packed attention with dropout, its gradients, and what they should be with the same masks."""
    draw = torch.Generator().manual_seed(0)
    given = [torch.randn(1, 4, 9, 4, dtype=torch.float64, generator=draw) for _ in range(3)]
    query, key, value = (x.to(dtype).requires_grad_() for x in given)
    bounds = torch.tensor([0, 3, 6, 8, 9], dtype=torch.int32)
    torch.manual_seed(1)
    out, _ = attend_by_text(torch.nn.Module(), query, key, value, None, text_bounds=bounds, dropout=0.4, scaling=0.3)
    weight = torch.randn(out.shape, dtype=torch.float64, generator=draw)
    found = [out, *torch.autograd.grad((out * weight.to(dtype)).sum(), (query, key, value))]
    references = [x.requires_grad_() for x in given]
    torch.manual_seed(1)
    expected = torch.empty_like(out, dtype=torch.float64)
    for first, texts, length in ((0, 2, 3), (6, 1, 2), (8, 1, 1)):  # the groups of texts of the same length draw together
        kept = dropout(torch.ones(texts, 4, length, length, dtype=torch.float64), 0.4)
        for text in range(texts):
            part = slice(first + text * length, first + (text + 1) * length)
            for head in range(4):
                q, k, v = (x[0, head, part] for x in references)
                expected[0, part, head] = ((0.3 * q @ k.T).softmax(-1) * kept[text, head]) @ v
    return found, [expected, *torch.autograd.grad((expected * weight).sum(), references)]


def test_attention_with_dropout_equals_a_loop_with_the_same_masks():
    found, expected = attention_with_dropout(torch.float64)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-12)


def test_attention_with_dropout_in_bfloat16():
    found, expected = attention_with_dropout(torch.bfloat16)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert_close(one.double(), other, rtol=0.05, atol=0.05)


def test_dropout_of_attention_has_no_bias():
    """The mean over many masks is the attention without dropout. The control: another scale is another mean."""
    rows = torch.randn(3, 1, 2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).repeat(1, 1, 1, 4000, 1)
    bounds = torch.arange(0, 5 * 4000 + 1, 5, dtype=torch.int32)
    attend = partial(attend_by_text, torch.nn.Module(), *rows, None, text_bounds=bounds)
    mean = attend(dropout=0.3)[0].view(4000, 5, 2, 4).mean(0)
    expected = attend()[0].view(4000, 5, 2, 4)[0]
    assert_close(mean, expected, rtol=0, atol=0.06)
    assert (attend(scaling=0.1)[0].view(4000, 5, 2, 4)[0] - expected).abs().max() > 0.2


def test_attention_with_dropout_and_fewer_heads_of_keys():
    """Then it is PyTorch's function, so only the share of dropped weights is checked: with a value of 1, the sums show it."""
    query, key = torch.randn(1, 4, 4000, 8), torch.randn(1, 2, 4000, 8)
    bounds = torch.arange(0, 4001, 2, dtype=torch.int32)
    out, _ = attend_by_text(torch.nn.Module(), query, key, torch.ones_like(key), None, text_bounds=bounds, dropout=0.5)
    assert out.mean().item() == pytest.approx(1, abs=0.05) and (out == 0).float().mean() == pytest.approx(0.25, abs=0.02)


# ---- flash attention: the same path, with a twin on the CPU ----


def flash_on_the_cpu(module, query, key, value, attention_mask, **options):
    """Attend as flash attention does: only in half precision, and only to the texts whose bounds it is given."""
    assert query.dtype in (torch.float16, torch.bfloat16)
    if "cu_seq_lens_q" in options:
        assert attention_mask is None
        assert options["cu_seq_lens_q"].dtype == options["cu_seq_lens_k"].dtype == torch.int32
        assert options["max_length_q"] == options["max_length_k"] == max(options["cu_seq_lens_q"].diff().tolist())
        return attend_by_text(module, query, key, value, None, **options)
    mask = None if attention_mask is None else attention_mask[:, None, None].bool()
    return attend_by_text(module, query, key, value, mask, **options)


@pytest.fixture
def flash(monkeypatch):
    """Let models with "flash_attention_2" run on the CPU."""
    right = AttentionInterface()["flash_attention_2"]
    AttentionInterface.register("flash_attention_2", flash_on_the_cpu)
    monkeypatch.setattr("hf_embed.forward.packing.PACKED_ATTENTION", [("flash_attention_2", "cpu")])
    monkeypatch.setattr("hf_embed.forward.check.lacks_kernel", lambda backbone, device: False)
    yield
    AttentionInterface.register("flash_attention_2", right)


@pytest.mark.parametrize("name", ["bert", "xlm-roberta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attention_is_packed_and_computes_in_half_precision(name, dtype, flash):
    """Weights in float32 need autocast, which training with bf16 turns on, and which the encoder turns on elsewhere."""
    model = tiny_model(name, pad_token_id=0)
    expected = Encoder(copy.deepcopy(model), small_tokenizer()).eval()(flat_batch(), LENGTHS)["embeddings"]
    model.config._attn_implementation = "flash_attention_2"
    encoder = Encoder(model.to(dtype), small_tokenizer()).eval()
    assert encoder.numbering is PACKED[name]
    vectors = encoder(flat_batch(), LENGTHS)["embeddings"]
    assert torch.nn.functional.cosine_similarity(vectors.float(), expected).min() > 0.999
    texts = ["A short one.", "Here is a text that has a few more words.", "Rain"]
    alone = torch.stack([encoder.encode(text, convert_to_tensor=True) for text in texts])
    assert torch.nn.functional.cosine_similarity(encoder.encode(texts, convert_to_tensor=True), alone).min() > 0.999
