"""Encoder.encode returns one vector per text, whatever the batch, the chunks, the precision or the mode of the model."""

import numpy as np
import pytest
import torch
from conftest import DECODERS, TINY, small_tokenizer, tiny_encoder, tiny_model
from tokenizers.processors import TemplateProcessing

from hf_embed import Encoder, InputError
from hf_embed.step import TrainingStep, new_head

LONG = "the committee postponed the vote once more and went home " * 12  # longer than the maximum length of every tiny model
TEXTS = ["rain", "A cat sleeps on the warm windowsill.", LONG, "", "rain", "Two dogs ran across the field, barking."]


def decoder_tokenizer():
    """Return a tokenizer like those of decoders: an end-of-text token, no padding token, no special tokens around a text."""
    tokenizer = small_tokenizer()
    tokenizer.eos_token, tokenizer.pad_token = "[SEP]", None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return tokenizer


def assert_close(got, expected, tolerance=1e-5):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


WAYS = {
    "alone": lambda encoder: np.stack([encoder.encode(text) for text in TEXTS]),
    "reversed": lambda encoder: encoder.encode(TEXTS[::-1])[::-1],
    "a chunk for each text": lambda encoder: encoder.encode(TEXTS, chunk_tokens=1),
    "one chunk": lambda encoder: encoder.encode(TEXTS, chunk_tokens=10**6),
    "batches of two": lambda encoder: encoder.encode(TEXTS, batch_size=2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("architecture", TINY)
def test_a_vector_depends_on_its_text_alone(architecture, way):
    encoder = tiny_encoder(architecture, "last" if architecture in DECODERS else "mean")
    assert_close(WAYS[way](encoder), encoder.encode(TEXTS))


@pytest.mark.parametrize("architecture", TINY)
def test_different_texts_get_different_vectors(architecture):
    vectors = tiny_encoder(architecture, "last" if architecture in DECODERS else "mean").encode(TEXTS)
    distances = np.abs(vectors[:, None] - vectors[None]).max(-1)
    assert (distances > 0.1).sum() == 6 * 5 - 2  # "rain" is the only text that comes twice
    assert distances[0, 4] < 1e-5


def test_a_single_string_gives_a_single_vector():
    vector = tiny_encoder().encode("rain")
    assert vector.shape == (32,)
    assert vector.dtype == np.float32


def test_a_list_of_one_gives_a_matrix():
    assert tiny_encoder().encode(["rain"]).shape == (1, 32)


def test_no_texts_give_no_vectors():
    assert tiny_encoder().encode([]).shape == (0, 32)


def test_a_tensor_on_request():
    encoder = tiny_encoder()
    vectors = encoder.encode(TEXTS, convert_to_tensor=True)
    assert vectors.device == encoder.device
    assert not vectors.requires_grad
    assert_close(vectors.numpy(), encoder.encode(TEXTS))


@pytest.mark.parametrize(("prompt_name", "prompt"), [("query", "search: "), ("document", ""), (None, "")])
def test_prompt_name_puts_the_prompt_before_each_text(prompt_name, prompt):
    encoder = tiny_encoder(prompts={"query": "search: "})
    expected = encoder.encode([prompt + text for text in TEXTS])
    assert_close(encoder.encode(TEXTS, prompt_name=prompt_name), expected)


def test_a_prompt_changes_the_vector_of_a_single_string():
    encoder = tiny_encoder(prompts={"query": "search: "})
    assert_close(encoder.encode("rain", prompt_name="query"), encoder.encode("search: rain"))
    assert np.abs(encoder.encode("rain", prompt_name="query") - encoder.encode("rain")).max() > 0.1


def test_normalize_gives_unit_vectors_of_the_same_direction():
    raw, unit = tiny_encoder().encode(TEXTS), tiny_encoder(normalize=True).encode(TEXTS)
    assert_close(unit, raw / np.linalg.norm(raw, axis=1, keepdims=True))
    assert np.abs(np.linalg.norm(raw, axis=1) - 1).min() > 0.1  # without normalize, the vectors are not unit vectors


def test_the_head_of_cls_mlp_train_is_for_training_only():
    encoder, plain = tiny_encoder(pooling="cls_mlp_train"), tiny_encoder(pooling="cls")
    assert_close(encoder.encode(TEXTS), plain.encode(TEXTS))
    ids = torch.tensor([[2, 90, 1280, 3]])
    step = TrainingStep(encoder, new_head(encoder.width, encoder.config))
    trained = step.train().embed(ids, torch.ones_like(ids))
    assert trained.abs().max() <= 1  # the head ends with tanh
    assert not torch.allclose(trained, encoder.eval().embed(ids, torch.ones_like(ids)), atol=0.1)


# ---- max_length ----

# (architecture, its config, positions for tokens). RoBERTa reserves the positions up to its padding id; MPNet reserves two.
LIMITS = [("bert", {}, 66), ("distilbert", {}, 66), ("roberta", {}, 65), ("roberta", {"pad_token_id": 1}, 64),
          ("mpnet", {}, 64), ("modernbert", {}, 64), ("qwen2", {}, 64)]  # fmt: skip


@pytest.mark.parametrize(("architecture", "config", "limit"), LIMITS)
def test_max_length_is_by_default_what_the_model_has_positions_for(architecture, config, limit):
    encoder = Encoder(tiny_model(architecture, **config), small_tokenizer())
    assert encoder.max_length == limit
    assert np.isfinite(encoder.encode(LONG)).all()  # one position too many would raise an IndexError


@pytest.mark.parametrize(("architecture", "config", "limit"), LIMITS)
def test_max_length_above_the_positions_is_refused(architecture, config, limit):
    model = tiny_model(architecture, **config)
    assert Encoder(model, small_tokenizer(), max_length=limit).max_length == limit
    with pytest.raises(InputError, match=f"max_length {limit + 1} .* set it to at most {limit}"):
        Encoder(model, small_tokenizer(), max_length=limit + 1)


def test_max_length_is_by_default_at_most_512():
    assert Encoder(tiny_model(max_position_embeddings=1024), small_tokenizer()).max_length == 512


def test_max_length_is_by_default_at_most_the_tokenizers():
    tokenizer = small_tokenizer()
    tokenizer.model_max_length = 20
    assert Encoder(tiny_model(), tokenizer).max_length == 20


def test_max_length_without_room_for_text_is_refused():
    assert tiny_encoder(max_length=3).encode("rain").shape == (32,)
    with pytest.raises(InputError, match="max_length 2 leaves no room"):
        tiny_encoder(max_length=2)


def test_max_length_cuts_a_text_and_keeps_its_special_tokens():
    cut, whole = tiny_encoder(max_length=5), tiny_encoder()
    assert_close(cut.encode("rain and rain and snow"), whole.encode("rain and rain"))


# ---- settings that are refused ----


@pytest.mark.parametrize("architecture", ["distilbert", "modernbert", "qwen2"])
def test_cls_mlp_without_a_pooler_is_refused(architecture):
    with pytest.raises(InputError, match=f"{type(tiny_model(architecture)).__name__} has no pooler .* cls_mlp_train"):
        tiny_encoder(architecture, "cls_mlp")


def test_an_unknown_pooling_is_refused():
    with pytest.raises(InputError, match="unknown pooling 'middle'; use one of cls, "):
        tiny_encoder(pooling="middle")


# ---- decoders ----


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_decoder_without_a_padding_token_pads_with_its_end_of_text(pooling):
    encoder = Encoder(tiny_model("qwen2"), decoder_tokenizer(), pooling).eval()
    assert encoder.tokenizer.pad_token == "[SEP]"
    texts = [text for text in TEXTS if text]
    assert_close(encoder.encode(texts), np.stack([encoder.encode(text) for text in texts]))


def test_a_tokenizer_with_neither_token_is_refused():
    tokenizer = decoder_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"neither a padding nor an end-of-text token.*tokenizer\.pad_token"):
        Encoder(tiny_model("qwen2"), tokenizer)


# ---- precision and mode ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_vectors_near_the_full_ones(dtype):
    encoder = tiny_encoder(normalize=True)
    full = encoder.encode(TEXTS)
    half = encoder.to(dtype).encode(TEXTS)
    assert half.dtype == np.float32
    assert_close(half, full, tolerance=0.02)


# BUG: The sums over tokens were in float16, which cannot hold 1 + 2 + ... + 400. They must be in float32.
@pytest.mark.parametrize("pooling", ["mean", "weighted_mean"])
def test_half_precision_holds_the_sum_over_a_long_text(pooling):
    encoder = Encoder(tiny_model(max_position_embeddings=512), small_tokenizer(), pooling).eval()
    full = encoder.encode(LONG * 4)
    assert_close(encoder.half().encode(LONG * 4), full, tolerance=0.02)


@pytest.mark.parametrize("training", [True, False])
def test_encode_leaves_the_mode_as_it_was(training):
    encoder = tiny_encoder().train(training)
    encoder.encode(TEXTS)
    assert [module.training for module in encoder.modules()] == [training] * len(list(encoder.modules()))


def test_encode_leaves_frozen_layers_as_they_were():
    encoder = tiny_encoder().train()
    frozen = encoder.backbone.embeddings.dropout.eval()
    encoder.encode(TEXTS)
    assert not frozen.training and encoder.training
    encoder.eval()
    frozen.train()  # the opposite case: one layer is in training mode and the model is not
    encoder.encode(TEXTS)
    assert frozen.training and not encoder.training


def test_encode_has_no_dropout_while_training():
    encoder = tiny_encoder()
    expected = encoder.encode(TEXTS)
    assert_close(encoder.train().encode(TEXTS), expected)


# BUG: If `encode` failed, the model stayed in evaluation mode, and the training continued without dropout.
def test_a_failing_encode_leaves_the_mode_as_it_was(monkeypatch):
    encoder = tiny_encoder().train()
    monkeypatch.setattr(encoder.backbone, "forward", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(TEXTS)
    assert encoder.training
