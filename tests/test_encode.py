"""The options of `encode`: width, normalization, precision, devices and prompts.

Where sentence-transformers has the same option, the results are compared on the same folder.
"""

import copy
import inspect
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal, get_overloads, get_type_hints

import numpy as np
import pandas as pd
import pyarrow
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.util import quantize_embeddings
from torch import nn
from torch.nn import functional as F

from hf_embed import Encoder, TempScaleConfig, apply_tempscale, encoding
from hf_embed import encoder as encoder_module
from hf_embed.encoding import Options
from hf_embed.pooling import Dense
from hf_embed.vectors import as_floats, quantize

TEXTS = ["rain", "A cat sleeps on the warm windowsill.", "snow", "rain", "Two dogs ran across the field, barking."]
MANY = [f"{text} {i} " * (1 + i % 7) for i in range(40) for text in TEXTS]
PROMPTS = {"query": "search: ", "passage": "text: ", "topic": "about: "}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "normalised and cut"])
def both(request, tmp_path_factory):
    """Return an encoder, and the sentence-transformers model that was loaded from its folder."""
    folder = str(tmp_path_factory.mktemp("model"))
    settings = {"normalize": True, "truncate_dim": 24} if request.param else {}
    encoder = tiny_encoder(prompts=PROMPTS, default_prompt_name="topic", **settings)
    encoder.save_pretrained(folder, verify=False)
    return encoder, SentenceTransformer(folder, device="cpu")


def same(got, expected, tolerance=1e-6):
    assert got.shape == expected.shape and got.dtype == expected.dtype
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("width", [None, 8, 16, 32])
@pytest.mark.parametrize("normalize", [None, True])
def test_width_and_length_are_sentence_transformers(both, width, normalize):
    ours, theirs = both
    expected = theirs.encode(TEXTS, truncate_dim=width, normalize_embeddings=bool(normalize))
    same(ours.encode(TEXTS, truncate_dim=width, normalize=normalize), expected)
    same(ours.encode(TEXTS[1], truncate_dim=width, normalize=normalize), expected[1])
    if normalize:
        same(np.linalg.norm(expected, axis=1), np.ones(len(TEXTS), np.float32))


def test_normalize_false_leaves_vectors_as_they_are_pooled():
    encoder = tiny_encoder(normalize=True)
    same(encoder.encode(TEXTS, normalize=False), tiny_encoder().encode(TEXTS))
    assert encoder.encode(TEXTS, truncate_dim=8).shape == (5, 8) and encoder.truncate_dim is None and encoder.normalize


@pytest.mark.parametrize("width", [0, -1, 33, 8.0, True, "8"])
def test_a_width_that_there_is_not_is_refused(width):
    message = error_of(tiny_encoder().encode, TEXTS, truncate_dim=width)
    assert "a whole number from 1 to 32, the size of this model's vectors" in message


@pytest.mark.parametrize(
    ("name", "options"),
    [("encode", {}), ("encode_query", {}), ("encode_document", {}), ("encode", {"prompt_name": "query"}),
     ("encode_query", {"prompt_name": "passage"}), ("encode", {"prompt": "a: "}), ("encode", {"prompt": ""})],
)  # fmt: skip
def test_prompts_are_sentence_transformers(both, name, options):
    ours, theirs = both
    same(getattr(ours, name)(TEXTS, **options), getattr(theirs, name)(TEXTS, **options))


@pytest.mark.parametrize("settings", [{"prompts": {"query": "find the text that says: "}}, {}])
def test_a_prompt_that_leaves_no_room_is_refused(settings):
    """BUG: every text was cut off behind the prompt, so all texts had the vector of the prompt."""
    encoder = tiny_encoder(max_length=8, **settings)  # 6 tokens and two special ones
    options = {"prompt_name": "query"} if settings else {"prompt": "find the text that says: "}
    expected = "the prompt 'find the text that says: ' has 6 tokens, so max_length 8 leaves no room for a text; shorten"
    assert expected in error_of(encoder.encode, TEXTS, **options)
    encoder.max_length = 9
    vectors = encoder.encode(["rain", "snow"], **options)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_queries_and_documents_of_a_model_without_their_prompts(tmp_path):
    encoder = tiny_encoder(prompts={"topic": "about: "}, default_prompt_name="topic")
    encoder.save_pretrained(str(tmp_path), verify=False)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    same(encoder.encode_query(TEXTS), theirs.encode_query(TEXTS))
    same(encoder.encode_document(TEXTS), theirs.encode_document(TEXTS))
    options = {"truncate_dim": 16, "normalize": True, "precision": "int8", "convert_to_tensor": True}
    assert torch.equal(encoder.encode_query(TEXTS, **options), encoder.encode(TEXTS, prompt="", **options))


# ---- arguments ----


@pytest.mark.parametrize(
    ("argument", "mend"),
    [({"normalize_embeddings": True}, "use normalize=True or False"), ({"pool": {}}, "use device="),
     ({"chunk_size": 3}, "use batch_size"), ({"nonsense": 1}, "encode.. has no argument 'nonsense'$")],
)  # fmt: skip
def test_arguments_of_sentence_transformers_are_refused_with_ours(argument, mend):
    with pytest.raises(TypeError, match=mend):
        tiny_encoder().encode(TEXTS, **argument)
    with pytest.raises(TypeError, match=mend):
        tiny_encoder().encode_query(TEXTS, **argument)


def test_arguments_that_change_nothing_are_taken():
    encoder = tiny_encoder()
    same(encoder.encode(TEXTS, convert_to_numpy=True, output_value="sentence_embedding", show_progress_bar=None),
         encoder.encode(TEXTS))  # fmt: skip
    assert encoder.encode(TEXTS, convert_to_numpy=False, convert_to_tensor=True).shape == (5, 32)
    assert "set convert_to_tensor=True" in error_of(encoder.encode, TEXTS, convert_to_numpy=False)
    assert "one vector per text" in error_of(encoder.encode, TEXTS, output_value="token_embeddings")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"batch_size": 0}, "batch_size is 0; it must be at least 1"), ({"batch_size": -5}, "at least 1"),
     ({"chunk_tokens": 0}, "chunk_tokens is 0"), ({"normalize": "l2"}, "normalize is 'l2'"),
     ({"prompt": 5}, "prompt is 5; give the text"), ({"prompt": "a\ud800"}, r"'a\ud800' holds half of a character")],
)  # fmt: skip
def test_values_that_mean_nothing_are_refused(options, message):
    """BUG: With a negative batch_size, `encode` returned no vectors."""
    assert message in error_of(tiny_encoder().encode, TEXTS, **options)


@pytest.mark.parametrize(
    "texts",
    [tuple(TEXTS), np.array(TEXTS), pd.Series(TEXTS, index=[9, 4, 2, 1, 0]), Dataset.from_dict({"text": TEXTS})["text"],
     (text for text in TEXTS), pyarrow.chunked_array([TEXTS[:2], TEXTS[2:]])],
    ids=["tuple", "array", "pandas", "datasets", "generator", "pyarrow"],
)  # fmt: skip
def test_texts_come_in_many_kinds(texts):
    encoder = tiny_encoder()
    same(encoder.encode(texts), encoder.encode(TEXTS))


@pytest.mark.parametrize(
    "texts",
    [{"text": TEXTS}, pd.DataFrame({"text": TEXTS}), set(TEXTS), [["a", "b"]], [*TEXTS, None],
     Dataset.from_dict({"a": TEXTS}), None, 5]
)  # fmt: skip
def test_what_is_no_list_of_texts_is_refused(texts):
    """BUG: For a DataFrame and a dict, `encode` encoded the names of the columns."""
    message = error_of(tiny_encoder().encode, texts)
    wanted = ("give a list of texts, or one column", "is not a string but", "give a text or a list of texts")
    assert any(part in message for part in wanted), message


def test_vectors_are_float32_whatever_the_default_is():
    """BUG: without texts, they had PyTorch's default type."""
    encoder = tiny_encoder()
    torch.set_default_dtype(torch.float64)
    try:
        assert encoder.encode([]).dtype == encoder.encode(TEXTS).dtype == np.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_the_default_device_is_not_used():
    """BUG: with another default device than the CPU, `encode` and the check of a new model ended in an error."""
    encoder = tiny_encoder()
    expected, other = encoder.encode(TEXTS), copy.deepcopy(encoder).double()  # whose check is repeated
    torch.set_default_device("meta")
    try:
        same(encoder.encode(TEXTS), expected)
        same(other.encode(TEXTS), expected)
    finally:
        torch.set_default_device(None)


def test_an_array_of_one_text_is_one_text():
    """BUG: `encode` encoded a zero-dimensional array letter by letter."""
    encoder = tiny_encoder()
    same(encoder.encode(np.array(TEXTS[0])), encoder.encode(TEXTS[:1]))


def test_a_bad_entry_is_named_before_anything_is_computed(monkeypatch):
    encoder = tiny_encoder()
    monkeypatch.setattr(encoder.backbone, "forward", lambda **_: 1 / 0)
    assert "text 201 is not a string but nan" in error_of(encoder.encode, [*MANY, float("nan")], batch_size=2)
    assert r"the text 'cut \ud83d' holds half of a character" in error_of(encoder.encode, ["a", "cut \ud83d"])


def test_a_text_without_a_token_is_named_by_its_place_among_all():
    from test_encoder import decoder_tokenizer

    encoder = Encoder(tiny_model("qwen2"), decoder_tokenizer(), "last").eval()
    message = error_of(encoder.encode, [*MANY, "", *MANY], batch_size=3)
    assert message.startswith("the tokenizer returns no tokens for text 201,")


def test_texts_are_sorted_over_all_of_them():
    """Texts of similar length share a batch, and the vectors are in the order of the texts."""
    encoder, widths = tiny_encoder(), []
    forward = encoder.backbone.forward
    encoder.backbone.forward = lambda **inputs: widths.append(inputs["max_length_q"]) or forward(**inputs)
    vectors = encoder.encode(MANY, batch_size=50)
    assert widths == sorted(widths, reverse=True) and len(set(widths)) > 4
    same(vectors, np.stack([encoder.encode(text) for text in MANY]), 1e-5)


# ---- precision ----


@pytest.mark.parametrize("precision", ["binary", "ubinary"])
@pytest.mark.parametrize("width", [None, 16])
def test_packed_signs_are_sentence_transformers(both, precision, width):
    ours, theirs = both
    expected = theirs.encode(MANY, precision=precision, truncate_dim=width)
    got = ours.encode(MANY, precision=precision, truncate_dim=width)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(ours.encode(MANY[3], precision=precision, truncate_dim=width), expected[3])
    np.testing.assert_array_equal(quantize_embeddings(ours.encode(MANY, truncate_dim=width), precision), got)


def test_int8_keeps_the_direction_whatever_the_batch():
    encoder = tiny_encoder()
    full, small = encoder.encode(MANY), encoder.encode(MANY, precision="int8")
    assert small.dtype == np.int8 and (np.abs(small.astype(int)).max(1) == 127).all()
    scaled = full / np.abs(full).max(1, keepdims=True) * 127
    assert np.abs(scaled - small).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(encoder.encode(MANY[:3], precision="int8"), small[:3])  # independent of the batch
    cosines = F.cosine_similarity(torch.tensor(full), torch.tensor(small).float())
    assert cosines.min() > 0.999


@pytest.mark.parametrize("precision", ["int8", "binary", "ubinary"])
def test_similarity_knows_small_vectors(precision):
    encoder = tiny_encoder()
    a, b = encoder.encode(MANY[:9], precision=precision), encoder.encode(MANY[9:20], precision=precision)
    first, second = (as_floats(torch.tensor(x), precision).numpy() for x in (a, b))
    expected = first @ second.T / np.linalg.norm(first, axis=1)[:, None] / np.linalg.norm(second, axis=1)
    same(encoder.similarity(a, b).numpy(), expected.astype(np.float32))
    same(encoder.similarity_pairwise(a, b[:9]).numpy(), np.diagonal(expected[:, :9]).astype(np.float32))
    if precision != "int8":  # the cosine of signs is the share of equal bits, rescaled to [-1, 1]
        bits = [np.unpackbits((x.astype(int) + (128 if precision == "binary" else 0)).astype(np.uint8), axis=1) for x in (a, b)]
        np.testing.assert_allclose(expected, 1 - 2 * (bits[0][:, None] != bits[1]).mean(-1), atol=1e-6)
    queries = encoder.encode(MANY[:9])  # float32 queries against quantized documents
    near = encoder.similarity(queries, encoder.encode(MANY[:9], precision=precision)).numpy()
    assert (np.diagonal(near) > near.max(1) - 1e-6).all() and near.min() < 0.9
    tensor = encoder.encode(MANY[:9], precision=precision, convert_to_tensor=True)
    assert tensor.device == encoder.device and np.array_equal(tensor.numpy(), a)
    assert encoder.encode([], precision=precision).shape == (0, a.shape[1])
    assert encoder.encode([], precision=precision).dtype == a.dtype


def test_int8_vectors_that_may_be_packed_need_a_word():
    encoder = tiny_encoder()  # vectors have 32 numbers; 2 bytes may be 16 signs or 2 numbers
    packed = encoder.encode(MANY[:4], precision="binary", truncate_dim=16)
    assert "set precision='int8' or" in error_of(encoder.similarity, packed, packed)
    expected = encoder.similarity(*[encoder.encode(MANY[:4], precision="ubinary", truncate_dim=16)] * 2)
    assert torch.equal(encoder.similarity(packed, packed, precision="binary"), expected)
    cut = encoder.encode(MANY[:4], precision="int8", truncate_dim=16)  # 16 bytes: too many for 32 packed signs
    assert torch.equal(encoder.similarity(cut, cut), encoder.similarity(cut, cut, precision="int8"))
    assert "could not distinguish" in error_of(encoder.encode, TEXTS, precision="int8", truncate_dim=4)
    assert "cannot be compared" in error_of(encoder.similarity, cut, encoder.encode(TEXTS))
    assert "not the packed signs" in error_of(encoder.similarity, cut.view(np.uint8), cut)
    assert "int8 vectors have the precision int8 or binary" in error_of(encoder.similarity, packed, packed, "ubinary")
    assert "4 vectors cannot be compared with 3 row by row" in error_of(encoder.similarity_pairwise, cut, cut[:3])
    same(encoder.similarity_pairwise(cut, cut[:1]).numpy(), encoder.similarity(cut, cut[:1])[:, 0].numpy())


@pytest.mark.parametrize("precision", ["int8", "binary"])
def test_a_length_that_the_similarity_needs_is_not_lost(precision):
    for name in ("dot", "euclidean", "manhattan"):
        encoder = tiny_encoder(similarity_fn_name=name)
        assert f"loses the length of a vector, which this model's similarity ({name})" in error_of(
            encoder.encode, TEXTS, precision=precision
        )
    dot = tiny_encoder(similarity_fn_name="dot")
    small = dot.encode(MANY, normalize=True, precision=precision)
    full = dot.encode(MANY, normalize=True)
    assert np.corrcoef(dot.similarity(small, small).numpy().ravel(), (full @ full.T).ravel())[0, 1] > 0.6
    unit = tiny_encoder(similarity_fn_name="dot", normalize=True)
    assert unit.encode(TEXTS, precision=precision).dtype == np.int8
    assert "loses the length" in error_of(unit.encode, TEXTS, precision=precision, truncate_dim=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"precision": "uint8"}, "use int8, or ubinary"), ({"precision": "int4"}, "use one of float32, int8, binary, ubinary"),
     ({"precision": "binary", "truncate_dim": 12}, "packs 8 numbers into a byte, but a vector has 12")],
)  # fmt: skip
def test_precisions_that_cannot_be(options, message):
    assert message in error_of(tiny_encoder().encode, TEXTS, **options)


def test_vectors_that_are_not_finite_are_not_hidden():
    assert "not finite" in error_of(quantize, torch.tensor([[1.0, float("nan")]]), "int8")
    assert quantize(torch.zeros(1, 8), "int8").tolist() == [[0] * 8]


# ---- devices ----


def scaled_encoder():
    encoder = tiny_encoder()
    apply_tempscale(encoder.backbone, 0.5)
    return encoder


def growing_encoder():
    from hf_embed import TempScaleConfig

    encoder = tiny_encoder()
    apply_tempscale(encoder.backbone, TempScaleConfig(temperature=0.7, growth="log", reference_length=4))
    return encoder


def adapted_encoder():
    torch.manual_seed(3)
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["query"], init_lora_weights=False))
    return Encoder(model, small_tokenizer()).eval()


def dense_encoder():
    torch.manual_seed(3)
    return tiny_encoder(dense=[Dense(nn.Linear(32, 16), nn.Tanh())], normalize=True)


KINDS = {"plain": tiny_encoder, "tempscale": scaled_encoder, "growth": growing_encoder, "lora": adapted_encoder,
         "dense": dense_encoder, "modernbert": lambda: tiny_encoder("modernbert"),
         "mpnet": lambda: tiny_encoder("mpnet")}  # fmt: skip


@pytest.mark.parametrize("kind", ["plain", "dense", "modernbert", "mpnet"])
def test_a_folder_in_bfloat16(kind, tmp_path):
    """All weights are then in bfloat16, also those of the layers after the pooling, and the vectors are rounded."""
    encoder = KINDS[kind]()
    encoder.save_pretrained(str(tmp_path / "model"), verify=False)
    half = Encoder.from_pretrained(str(tmp_path / "model"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    vectors, expected = half.encode(MANY), encoder.encode(MANY)
    assert vectors.dtype == np.float32 and np.abs(vectors - expected).max() > 1e-5
    assert F.cosine_similarity(torch.tensor(vectors), torch.tensor(expected)).min() > 0.999


@pytest.mark.parametrize("kind", KINDS)
def test_several_devices_give_what_one_gives(kind):
    encoder = KINDS[kind]()
    expected = encoder.encode(MANY, batch_size=20)
    np.testing.assert_array_equal(encoder.encode(MANY, batch_size=20, device=["cpu", "cpu", "cpu"]), expected)
    assert np.abs(expected - tiny_encoder().encode(MANY)).max() > 1e-3 if expected.shape[1] == 32 and kind != "plain" else True


def test_each_device_has_a_copy_and_takes_batches(monkeypatch):
    encoder, seen, lock = tiny_encoder(), {}, threading.Lock()
    both_at_work = threading.Barrier(2, timeout=20)
    forward = Encoder.forward

    def watched(self, *args, **kwargs):
        with lock:
            first = id(self) not in seen
            seen[id(self)] = threading.get_ident()
        if first:
            both_at_work.wait()
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Encoder, "forward", watched)
    encoder.train().encode(MANY, batch_size=10, device=["cpu", "cpu"])
    assert len(seen) == 2 and id(encoder) in seen and encoder.training


def test_an_error_on_a_device_reaches_the_caller(monkeypatch):
    encoder = tiny_encoder().train()
    monkeypatch.setattr(Encoder, "forward", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoder.encode(MANY, batch_size=10, device=["cpu", "cpu"])
    assert encoder.training and threading.active_count() < 20


def watch_tokenization(monkeypatch, enter, leave=lambda: None):
    """Call `enter` and `leave` around each tokenization."""
    tokenize = encoder_module.tokenize_texts

    def watched(*args):
        enter()
        try:
            return tokenize(*args)
        finally:
            leave()

    monkeypatch.setattr(encoder_module, "tokenize_texts", watched)


def test_a_batch_is_tokenized_while_the_model_encodes_the_one_before(monkeypatch):
    """The model stays in the thread of the caller, where the caller's autocast is."""
    encoder, begun, seen = tiny_encoder(), [], []
    forward = Encoder.forward

    def watched(self, *args, **kwargs):
        seen.append(threading.get_ident())
        end = time.monotonic() + 20
        while len(begun) < min(4, len(seen) + 1):
            assert time.monotonic() < end, "the tokenization of the next batch has not begun"
            time.sleep(0.01)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Encoder, "forward", watched)
    watch_tokenization(monkeypatch, lambda: begun.append(1))
    vectors = encoder.encode(MANY[:40], batch_size=10)
    assert seen == [threading.get_ident()] * 4
    monkeypatch.undo()
    np.testing.assert_array_equal(vectors, encoder.encode(MANY[:40], batch_size=10))


def test_threads_that_share_an_encoder_in_training_mode_use_no_dropout():
    """BUG: the thread that came first turned dropout on again when it left, while the other one still computed."""
    encoder = Encoder(tiny_model(hidden_dropout_prob=0.5), small_tokenizer())
    encoder.train()
    encoder.dense.eval()
    expected = encoder.encode(TEXTS)
    inside, leave = ({name: threading.Event() for name in ("first", "second")} for _ in range(2))
    embed, found = encoder.embed, {}

    def slow(*arguments):
        name = threading.current_thread().name
        inside[name].set()
        assert leave[name].wait(timeout=20)
        return embed(*arguments)

    def encode():
        found[threading.current_thread().name] = encoder.encode(TEXTS)

    encoder.embed = slow
    threads = [threading.Thread(target=encode, name=name) for name in inside]
    for thread in threads:
        thread.start()
        assert inside[thread.name].wait(timeout=20)
    for thread in threads:
        leave[thread.name].set()
        thread.join()
        np.testing.assert_allclose(found[thread.name], expected, rtol=1e-5, atol=1e-6)
        assert encoder.training == encoder.backbone.training == (thread.name == "second")
    assert not encoder.dense.training


def test_threads_wait_for_the_check_of_a_changed_model(monkeypatch):
    """BUG: each thread made the check, which changes data types and turns dropout on, while others made it or encoded."""
    encoder = Encoder(tiny_model(hidden_dropout_prob=0.5), small_tokenizer()).bfloat16().eval()
    expected, measure, checks = copy.deepcopy(encoder).encode(TEXTS), encoder_module.measure, []

    def slow(model):
        checks.append(model.train())
        time.sleep(0.1)
        return measure(model.eval())

    monkeypatch.setattr(encoder_module, "measure", slow)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: encoder.encode(TEXTS), range(8)))
    for vectors in found:
        np.testing.assert_array_equal(vectors, expected)
    assert len(checks) == 1 and not encoder.training


def test_types_tell_arrays_from_tensors():
    """Type checkers know what a call returns, and which options it has."""
    accepted = {*inspect.signature(Encoder.encode).parameters, "convert_to_numpy", "output_value"}
    assert accepted - Options.__annotations__.keys() == {"self", "texts", "prompt_name", "convert_to_tensor", "others"}
    assert accepted >= Options.__annotations__.keys()
    for method in (Encoder.encode, Encoder.encode_query, Encoder.encode_document):
        hints = [get_type_hints(overload) for overload in get_overloads(method)]
        assert [(hint["convert_to_tensor"], hint["return"]) for hint in hints] == [
            (Literal[True], torch.Tensor),
            (Literal[False], np.ndarray),
        ]


def test_a_forked_process_encodes():
    """BUG: it waited forever for threads that are not copied (gunicorn --preload, datasets.map with num_proc)."""
    encoder, threads = tiny_encoder(), torch.get_num_threads()
    expected = encoder.encode(TEXTS)
    try:
        torch.set_num_threads(2)
        torch.ones(10**6).sum()  # starts the threads
        if (child := os.fork()) == 0:
            right = False
            try:
                right = np.allclose(encoder.encode(TEXTS), expected, atol=1e-6)
            finally:
                os._exit(0 if right else 1)
    finally:
        torch.set_num_threads(threads)
    end, found = time.monotonic() + 20, (0, 0)
    while found == (0, 0) and time.monotonic() < end:
        time.sleep(0.01)
        found = os.waitpid(child, os.WNOHANG)
    if found == (0, 0):
        os.kill(child, signal.SIGKILL)
    assert found == (child, 0)


def test_threads_that_share_an_encoder_scale_each_text_by_its_own_length():
    """BUG: the lengths of the texts of one thread were those of another one."""
    encoder = apply_tempscale(tiny_encoder(), TempScaleConfig(0.5, growth="log", reference_length=4))
    parts = [MANY[start : start + 10] for start in range(0, 40, 10)]
    expected = [encoder.encode(part, chunk_tokens=20) for part in parts]
    with ThreadPoolExecutor(len(parts)) as threads:
        for _ in range(3):
            for found, wanted in zip(threads.map(partial(encoder.encode, chunk_tokens=20), parts), expected):
                same(found, wanted)


def test_a_tokenizer_is_used_by_one_thread_at_a_time(monkeypatch):
    """Fast tokenizers raise "Already borrowed" if two threads use them."""
    now, most, lock = 0, 0, threading.Lock()

    def count(by):
        nonlocal now, most
        with lock:
            now += by
            most = max(most, now)
        time.sleep(0.01)

    watch_tokenization(monkeypatch, partial(count, 1), partial(count, -1))
    tiny_encoder().encode(MANY, batch_size=5, device=["cpu", "cpu", "cpu"])
    assert most == 1


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
def test_an_error_of_a_later_batch_reaches_the_caller(devices, monkeypatch):
    """The number is that of the text in the user's list."""
    encoder = tiny_encoder()
    tokenizer = type(encoder.tokenizer)
    call = tokenizer.__call__

    def forgetful(self, texts, **options):
        found = call(self, texts, **options)
        return found | {"input_ids": [[] if text == "a" else ids for text, ids in zip(texts, found["input_ids"])]}

    monkeypatch.setattr(tokenizer, "__call__", forgetful)
    texts = ["a longer text than that"] * 30 + ["a"] + ["another text"] * 4
    assert "no tokens for text 31" in error_of(encoder.encode, texts, batch_size=8, device=devices)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", ["cpu", "cuda:99"], []])
def test_a_device_that_is_not_here_is_refused(device):
    assert "device" in error_of(tiny_encoder().encode, TEXTS, device=device)


def test_a_gpu_that_is_not_used_is_named_once(monkeypatch, caplog):
    """BUG: a model that was not moved encoded on the CPU without a word; sentence-transformers moves models by itself."""
    encoder = tiny_encoder()
    encoding.say_that_a_gpu_is_idle.cache_clear()
    for available, device, said in ((False, None, 0), (True, "cpu", 0), (True, None, 1), (True, None, 1)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        encoder.encode(TEXTS, device=device)
        assert caplog.text.count("the model is on the CPU, although there is a GPU; move it there with") == said
    encoding.say_that_a_gpu_is_idle.cache_clear()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")  # the launcher was told to use the CPU
    caplog.clear()
    encoder.encode(TEXTS)
    assert not caplog.text


def test_one_device_is_where_the_model_goes():
    encoder = tiny_encoder()
    same(encoder.encode(TEXTS, device="cpu"), encoder.encode(TEXTS, device=torch.device("cpu")))
    assert copy.deepcopy(encoder).encode(TEXTS, device=["cpu"]).shape == (5, 32)
