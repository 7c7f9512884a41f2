"""semantic_search finds what sentence-transformers finds, for every block size, similarity and precision."""

import numpy as np
import pytest
import torch
from conftest import error_of, tiny_encoder
from sentence_transformers.util import semantic_search as theirs

from hf_embed import search, semantic_search
from hf_embed.vectors import SIMILARITIES, as_floats, quantize

RNG = np.random.default_rng(0)
QUERIES, CORPUS = (RNG.standard_normal((rows, 32)).astype(np.float32) for rows in (7, 50))


@pytest.fixture(params=[(2048, 16384), (3, 8)], ids=["one block", "many blocks"])
def blocks(request, monkeypatch):
    monkeypatch.setattr(search, "QUERIES", request.param[0])
    monkeypatch.setattr(search, "BLOCK", request.param[1])


def same(got, expected):
    assert [[hit["corpus_id"] for hit in hits] for hits in got] == [[hit["corpus_id"] for hit in hits] for hits in expected]
    scores = [[[hit["score"] for hit in hits] for hits in found] for found in (got, expected)]
    np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.parametrize("top_k", [1, 10, 99])
def test_it_finds_what_sentence_transformers_finds(blocks, top_k):
    expected = theirs(torch.tensor(QUERIES), torch.tensor(CORPUS), top_k=top_k)
    same(semantic_search(QUERIES, CORPUS, top_k), expected)
    same(semantic_search(torch.tensor(QUERIES), list(torch.tensor(CORPUS)), top_k=top_k), expected)
    same(semantic_search(QUERIES[0], CORPUS.tolist(), top_k), expected[:1])


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_every_similarity(blocks, similarity):
    scores = SIMILARITIES[similarity](torch.tensor(QUERIES), torch.tensor(CORPUS)).numpy()
    for row, hits in zip(scores, semantic_search(QUERIES, CORPUS, 5, similarity)):
        np.testing.assert_allclose([hit["score"] for hit in hits], np.sort(row)[::-1][:5], atol=1e-5)
        np.testing.assert_allclose(row[[hit["corpus_id"] for hit in hits]], [hit["score"] for hit in hits], atol=1e-5)


@pytest.mark.parametrize("precision", ["int8", "binary", "ubinary"])
@pytest.mark.parametrize("full_queries", [True, False])
def test_small_vectors(blocks, precision, full_queries):
    corpus = quantize(torch.tensor(CORPUS), precision)
    queries = torch.tensor(QUERIES) if full_queries else quantize(torch.tensor(QUERIES), precision)
    floats = queries if full_queries else as_floats(queries, precision)
    scores = SIMILARITIES["cosine"](floats, as_floats(corpus, precision)).numpy()
    given = None if full_queries or precision == "ubinary" else precision
    for row, hits in zip(scores, semantic_search(queries.numpy(), corpus.numpy(), 5, precision=given)):
        np.testing.assert_allclose(row[[hit["corpus_id"] for hit in hits]], np.sort(row)[::-1][:5], atol=1e-6)


def test_a_memory_map(tmp_path):
    np.save(tmp_path / "corpus.npy", CORPUS)
    same(semantic_search(QUERIES, np.load(tmp_path / "corpus.npy", mmap_mode="r")), semantic_search(QUERIES, CORPUS))


# BUG: such arrays were refused ("give an array (N, D)"), or ended in a TypeError.
@pytest.mark.parametrize("array", [CORPUS[::-1], CORPUS.astype(">f4")], ids=["reversed", "big-endian"])
def test_every_array_is_searched_and_compared(array):
    plain = array.astype(np.float32, order="C")
    assert semantic_search(array[:3], array) == semantic_search(plain[:3], plain)
    encoder = tiny_encoder()
    assert torch.equal(encoder.similarity(array[:3], array), encoder.similarity(plain[:3], plain))


def test_no_corpus_gives_no_hits():
    assert semantic_search(QUERIES, CORPUS[:0]) == [[]] * 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((QUERIES, CORPUS[:, :8]), "32 numbers cannot be compared with vectors of 8"), ((QUERIES, CORPUS, 0), "top_k is 0"),
     ((QUERIES, CORPUS, 5, "hamming"), "use one of cosine, dot, euclidean, manhattan"),
     ((CORPUS.astype(np.int8), CORPUS.astype(np.int8)), "set precision='int8' or precision='binary'"),
     ((QUERIES, CORPUS.astype(np.int8), 5, "dot"), "do not keep their length; use cosine"),
     ((QUERIES, np.where(CORPUS[3] == CORPUS, np.nan, CORPUS)), "not finite")],
)  # fmt: skip
def test_what_cannot_be_searched_is_refused(arguments, message):
    assert message in error_of(semantic_search, *arguments)


@pytest.mark.parametrize("rows", [20, 40, 5000])
def test_the_euclidean_search_tells_near_vectors_apart(rows):
    """BUG: from 26 rows on, PyTorch computes distances from products, whose rounding is larger than these distances."""
    generator = torch.Generator().manual_seed(0)
    query, directions = torch.randn(1, 768, generator=generator), torch.randn(rows, 768, generator=generator)
    query *= 30 / query.norm()
    distances = torch.linspace(0, 0.02 * rows / 40, rows)
    corpus = query + directions / directions.norm(dim=1, keepdim=True) * distances.unsqueeze(1)
    hits = semantic_search(query, corpus, 3, "euclidean")[0]
    assert [hit["corpus_id"] for hit in hits] == [0, 1, 2]
    assert [hit["score"] for hit in hits] == pytest.approx([-distance for distance in distances[:3].tolist()], abs=2e-5)
