"""The positives that are made for single sentences: the properties of each kind, and reproducible results."""

import logging
import random

import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from pretended_gpu import GPU, pretended_gpu
from transformers import BertForMaskedLM

from hf_embed.kit.positives import KNOWN, MaskFill, add_positives, parse_positive, places

TEXTS = [" ".join(f"w{(i * 7 + j) % 23}" for j in range(5 + i % 9)) for i in range(40)]


def pairs(positive: str, texts=TEXTS, seed=0, **settings) -> list[tuple[list[str], list[str]]]:
    rows = add_positives(Dataset.from_dict({"text": texts}), positive, seed, **settings)
    assert rows.column_names == ["anchor", "positive"]
    return [(a.split(), b.split()) for a, b in zip(rows["anchor"], rows["positive"])]


def is_subsequence(short: list[str], long: list[str]) -> bool:
    words = iter(long)
    return all(word in words for word in short)


def test_dropout_and_same_mask_leave_the_rows():
    rows = Dataset.from_dict({"text": TEXTS})
    assert add_positives(rows, "dropout") is rows and add_positives(rows, "same_mask") is rows


def test_delete_one_word():
    for anchor, positive in pairs("delete_one_word"):
        assert len(positive) == len(anchor) - 1 and is_subsequence(positive, anchor)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9])
def test_shares_of_words(share):
    for kind in ("delete", "crop", "repeat"):
        for anchor, positive in pairs(f"{kind}:{share}"):
            changed = min(max(1, round(share * len(anchor))), len(anchor) - 1)
            assert len(positive) == len(anchor) + (changed if kind == "repeat" else -changed)
            if kind == "repeat":
                assert is_subsequence(anchor, positive) and set(positive) == set(anchor)
                # Each copy stands beside its word.
                assert [w for i, w in enumerate(positive) if i == 0 or w != positive[i - 1]] == anchor
            else:
                assert is_subsequence(positive, anchor)
            if kind == "crop":
                assert " ".join(positive) in " ".join(anchor)


def test_deleted_words_are_not_those_at_the_ends_alone():
    assert any(" ".join(positive) not in " ".join(anchor) for anchor, positive in pairs("delete:0.3"))


def test_next_sentence():
    rows = add_positives(Dataset.from_dict({"text": TEXTS}), "next_sentence")
    assert rows["anchor"][:] == TEXTS[:-1] and rows["positive"][:] == TEXTS[1:]


def test_synonyms(tmp_path):
    table = tmp_path / "synonyms.tsv"
    table.write_text("w1\tone\nW2\ttwo\n\nw2\tdeux\n")  # BUG: the last line of a word replaced its other lines
    known = {"w1": {"one"}, "w2": {"two", "deux"}}
    found = set()
    for anchor, positive in pairs("synonym:0.5", synonyms=str(table)):
        changed = [(a, b) for a, b in zip(anchor, positive, strict=True) if a != b]
        assert all(b in known[a] for a, b in changed)
        assert len(changed) == min(max(1, round(0.5 * len(anchor))), sum(word in known for word in anchor))
        found |= {b for _, b in changed}
    assert found == {"one", "two", "deux"}


def test_results_depend_only_on_the_row_and_the_seed():
    rows = Dataset.from_dict({"text": TEXTS * 30})  # more rows than one batch of `Dataset.map`
    for kind in ("delete_one_word", "crop:0.3", "repeat:0.3"):
        whole = add_positives(rows, kind, seed=1)["positive"][:]
        assert whole == add_positives(rows, kind, seed=1)["positive"][:]
        assert whole[:40] == add_positives(rows.select(range(40)), kind, seed=1)["positive"][:]
        assert whole != add_positives(rows, kind, seed=2)["positive"][:]
        assert whole[:40] != whole[40:80]  # the same text in another row is changed in another way


def test_short_sentences_are_kept_and_counted(caplog):
    caplog.set_level(logging.WARNING)
    assert pairs("delete_one_word", ["alone", "two words", " "]) [0] == (["alone"], ["alone"])  # fmt: skip
    assert "delete_one_word could not change 2 of 3 rows; each of these is its own positive" in caplog.text


@pytest.fixture(scope="module")
def masked_lm(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("mlm")
    torch.manual_seed(0)
    BertForMaskedLM(tiny_model().config).save_pretrained(folder)
    small_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_mask_token_in_the_text_keeps_its_place(masked_lm):
    """BUG: its guess went to the next masked word, and all later guesses were shifted."""
    fill, words = MaskFill(masked_lm), ["I", "saw", "[MASK]", "today", "and", "left", "the", "house"]
    model, tokenizer = BertForMaskedLM.from_pretrained(masked_lm).eval(), small_tokenizer()
    for seed in range(10):
        chosen = sorted(places(words, 0.3, random.Random(seed)))
        ids = tokenizer(" ".join("[MASK]" if i in chosen else word for i, word in enumerate(words)), return_tensors="pt")
        best = model(**ids).logits[0].argmax(-1)[ids["input_ids"][0] == tokenizer.mask_token_id].tolist()
        masked = sorted({*chosen, 2})  # the places of all mask tokens
        guess = {place: tokenizer.decode([token]).replace("##", "").strip() for place, token in zip(masked, best, strict=True)}
        expected = [guess[i] or word if i in chosen else word for i, word in enumerate(words)]
        assert fill([words], 0.3, [random.Random(seed)]) == [expected]


def test_filling_masks_waits_for_a_batch_and_not_for_each_text(masked_lm):
    """BUG: on a GPU, the host waited twice for each text."""
    fill, waits = MaskFill(masked_lm), []
    with pretended_gpu() as noted:
        fill.model.to(GPU)
        for texts in (2, 20):
            noted.clear()
            fill([["the", "cat", "sat"]] * texts, 0.3, [random.Random(seed) for seed in range(texts)])
            waits.append(noted.total())
    assert waits[0] == waits[1]


def test_masked_words_are_filled_by_the_model(masked_lm):
    texts = ["the cat sat on the mat by the door", "rain again", "a house by the river"] * 30
    model, tokenizer = BertForMaskedLM.from_pretrained(masked_lm).eval(), small_tokenizer()
    for anchor, positive in pairs("mask_fill:0.3", texts, model=masked_lm)[:9]:
        places = [i for i, (a, b) in enumerate(zip(anchor, positive, strict=True)) if a != b]
        assert 0 < len(places) <= min(max(1, round(0.3 * len(anchor))), len(anchor) - 1)
        masked = " ".join(tokenizer.mask_token if i in places else word for i, word in enumerate(anchor))
        ids = tokenizer(masked, return_tensors="pt")
        best = model(**ids).logits[0].argmax(-1)[ids["input_ids"][0] == tokenizer.mask_token_id]
        if len(places) == round(0.3 * len(anchor)):  # otherwise the model filled in the original word at a masked position
            assert [positive[i] for i in places] == [tokenizer.decode([i]).replace("##", "").strip() for i in best.tolist()]


def test_bad_input(tmp_path, masked_lm):
    rows = Dataset.from_dict({"text": TEXTS})
    for positive in ("drop", "crop", "delete_one_word:0.1", "dropout:0.1", ""):
        assert f"unknown positive '{positive}'; give one of {', '.join(KNOWN)}" == error_of(parse_positive, positive)
    for share in ("1", "1.0", "0", "-0.1", "nan", "x", "10%"):
        assert "above 0 and below 1, for example crop:0.1" in error_of(parse_positive, f"crop:{share}")
    bad = tmp_path / "bad.tsv"
    bad.write_text("word other\n")
    for settings, message in (
        ({}, "needs --synonyms FILE"), ({"synonyms": "absent"}, "absent: this file does not exist"),
        ({"synonyms": str(bad)}, "bad.tsv, line 1: expected a word, a tab"),
    ):  # fmt: skip
        assert message in error_of(add_positives, rows, "synonym:0.1", **settings)
    bad.write_text("\n")
    assert "the file has no words" in error_of(add_positives, rows, "synonym:0.1", synonyms=str(bad))
    tiny_encoder().save_pretrained(tmp_path / "plain", verify=False)
    assert "plain' has no masked-language-modeling head (cls." in error_of(
        add_positives, rows, "mask_fill:0.1", model=str(tmp_path / "plain")
    )
    absent = error_of(add_positives, rows, "mask_fill:0.1", model=str(tmp_path / "absent"))
    assert absent.startswith(f"positive mask_fill: model '{tmp_path / 'absent'}' cannot be loaded: this folder does not exist")
    without = small_tokenizer()
    without.mask_token = None
    without.save_pretrained(masked_lm)
    assert "the tokenizer has no mask token" in error_of(add_positives, rows, "mask_fill:0.1", model=masked_lm)
    small_tokenizer().save_pretrained(masked_lm)
