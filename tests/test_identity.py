"""Test which texts count as the same text.

Texts with equal tokens after truncation are not negatives of each other. Their prompts do not count. The other positives of an
anchor are not its negatives either.
"""

import math
from collections import Counter

import pytest
import torch
from conftest import tiny_encoder, tiny_model, tokenize_rows
from datasets import Dataset, load_dataset
from torch.testing import assert_close
from worker import WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, ImprovedContrastive, SimCSE
from hf_embed.data.mixture import Source
from hf_embed.data.stream import Stream
from hf_embed.data.tokenization import RowTokenizer
from hf_embed.kit.plan import QUICKSTART

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"  # at least 16 tokens
ROWS = 16


def first_loss(folder, rows, objective=None, tokenizer=None, **settings):
    """Return the loss of the first batch, which holds all rows, for a model without dropout."""
    args = ContrastiveTrainingArguments(
        str(folder), per_device_train_batch_size=len(rows), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", **settings,
    )  # fmt: skip
    model = tiny_model(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    run = ContrastiveTrainer(
        model=model, processing_class=tokenizer, args=args, objective=objective, train_dataset=Dataset.from_list(rows)
    )
    return run.compute_loss(run.model, next(iter(run.get_train_dataloader()))).item()


def hashes(tokenizer, rows, max_length=16, **prompts):
    return RowTokenizer(tokenizer, max_length, **prompts)(rows)["text_ids"]


# Each anchor has one answer. The answers of one kind have equal tokens, so the model cannot tell them apart.
SAME_TOKENS = {
    "cut to the same tokens": [f"{LONG} and then {word}" for word in WORDS + WORDS[:4]],
    "case": ["".join(c.upper() if i == j else c for j, c in enumerate("the long answer to it")) for i in range(ROWS)],
    "white space": [f"an{' ' * (1 + i)}answer" for i in range(ROWS)],
}


@pytest.mark.parametrize("kind", SAME_TOKENS)
def test_texts_of_the_same_tokens_are_no_negatives(kind, tmp_path, tokenizer):
    positives = SAME_TOKENS[kind]
    rows = [{"anchor": f"question {i}", "positive": positive} for i, positive in enumerate(positives)]
    assert first_loss(tmp_path, rows, tokenizer=tokenizer, max_length=16) == pytest.approx(0, abs=1e-6)
    negatives = [{"anchor": f"question {i}", "positive": p, "negative": positives[i - 1]} for i, p in enumerate(positives)]
    assert first_loss(tmp_path, negatives, tokenizer=tokenizer, max_length=16) == pytest.approx(0, abs=1e-6)
    gte = ImprovedContrastive(0.05, directions=("query_to_doc", "doc_to_doc"))
    assert first_loss(tmp_path, rows, gte, tokenizer, max_length=16) == pytest.approx(0, abs=1e-6)
    # control: a different first word gives the texts different tokens, and then they are negatives
    others = [{"anchor": f"question {i}", "positive": f"{word} {LONG}"} for i, word in enumerate(WORDS)]
    assert first_loss(tmp_path, others, tokenizer=tokenizer, max_length=16) > 0.1


def test_unsupervised_texts_of_the_same_tokens_are_no_negatives(tmp_path, tokenizer):
    rows = [{"text": text} for text in SAME_TOKENS["case"]]
    assert first_loss(tmp_path, rows, tokenizer=tokenizer) == pytest.approx(0, abs=1e-6)


def test_prompts_are_left_out(tokenizer):
    """A query and a document with the same text count as the same text, whatever prompts stand before them."""
    text = "the cat sleeps"
    ((query, document, other),) = hashes(tokenizer, [[text, text, "a dog"]], query_prompt="find: ", document_prompt="text: ")
    assert query == document != other
    assert hashes(tokenizer, [[text]]) == [[query]]
    assert hashes(tokenizer, [[text]], query_prompt="something else: ") == [[query]]
    prompted = RowTokenizer(tokenizer, 16, "find: ", "text: ")([[text, text]])["input_ids"][0]
    assert prompted == tokenizer([f"find: {text}", f"text: {text}"])["input_ids"]  # control: the model sees the prompts


@pytest.mark.parametrize("prompts", [{"query_prompt": "find: "}, {"document_prompt": "one two three: "},
                                     {"query_prompt": "find: ", "document_prompt": "one two three: "}])  # fmt: skip
def test_a_prompt_that_leaves_less_room(prompts, tokenizer):
    """Texts whose tokens are equal after the prompt and truncation count as the same text.

    The query and the document of one text also count as the same if only the longer prompt causes truncation.
    """
    texts = [f"{LONG} {ending}" for ending in WORDS] + [LONG]
    rows = RowTokenizer(tokenizer, 16, **prompts)([[text, text] for text in texts])
    for view in (0, 1):
        assert len({tuple(row[view]) for row in rows["input_ids"]}) == 1  # control: the same tokens
    assert len({number for row in rows["text_ids"] for number in row}) == 1
    early = RowTokenizer(tokenizer, 16, **prompts)([[f"{word} {LONG}", f"{word} {LONG}"] for word in WORDS])
    assert all(query == document for query, document in early["text_ids"])
    assert len({query for query, _ in early["text_ids"]}) == len(WORDS)


def test_every_source_has_its_own_length(tmp_path, tokenizer):
    """This holds for tables and for streams."""
    path = tmp_path / "rows.csv"
    path.write_text("anchor,positive\n" + "".join(f"question {word},{LONG} {word}\n" for word in WORDS))
    rows = load_dataset("csv", data_files=str(path), split="train", streaming=True)
    for length, different in ((16, 1), (40, len(WORDS))):
        stream = Stream(Source("s", rows, size=12), RowTokenizer(tokenizer, length), 0, 1, 0, 10, False)
        streamed = {row["text_ids"][1] for row in stream.__getitems__(list(range(12)))}
        table = tokenize_rows(Dataset.from_csv(str(path)), tokenizer, length)
        assert streamed == {row[1] for row in table["text_ids"]} and len(streamed) == different


def test_other_tokenizers_tell_other_texts_apart(tokenizer):
    """Control: the tokenizer decides whether two texts count as the same, not their characters."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    cased = Tokenizer(models.WordLevel({"[UNK]": 0, "Cat": 1, "cat": 2}, unk_token="[UNK]"))
    cased.pre_tokenizer = pre_tokenizers.Whitespace()
    cased = PreTrainedTokenizerFast(tokenizer_object=cased, unk_token="[UNK]")
    ((a, b, unknown, unknown_too),) = hashes(cased, [["Cat", "cat", "dog", "house"]])
    assert a != b and unknown == unknown_too
    ((a, b),) = hashes(tokenizer, [["Cat", "cat"]])
    assert a == b


# ---- one anchor with several positives ----


def perfect(ids: list[list[int]]) -> torch.Tensor:
    """Return unit vectors (B, V, D): an anchor and all its positives share one axis, and each other text has its own axis."""
    axis = {}
    for anchor, positive, *_ in ids:
        axis[positive] = axis[anchor] = axis.get(anchor, len(axis))
    for row in ids:
        for negative in row[2:]:
            axis.setdefault(negative, len(axis) + 100)
    numbers = torch.tensor([[axis[text] for text in row] for row in ids])
    return torch.nn.functional.one_hot(numbers, 300).double()


def test_one_query_with_two_answers_has_no_loss_on_perfect_embeddings():
    ids = [[1, 2], [1, 3], [4, 5]]
    z, ids = perfect(ids), torch.tensor(ids)
    assert SimCSE(0.05)(z, ids).item() == pytest.approx(0, abs=1e-6)
    paper = SimCSE(0.05, mask_other_positives=False)(z, ids).item()
    assert paper == pytest.approx(2 / 3 * math.log(2), abs=1e-6)  # 0.46
    assert ImprovedContrastive(0.05, directions=("query_to_doc",))(z, ids).item() == pytest.approx(0, abs=1e-6)


def test_one_query_with_two_answers_in_a_run(tmp_path, tokenizer):
    """Two rows share an anchor, so neither has a negative. In the paper's form of the loss, the other answer is a negative."""
    rows = [{"anchor": "what is a cat", "positive": "an animal"}, {"anchor": "What is a CAT", "positive": "a pet"}]
    assert first_loss(tmp_path, rows, tokenizer=tokenizer) == pytest.approx(0, abs=1e-6)
    assert first_loss(tmp_path, rows, SimCSE(mask_other_positives=False), tokenizer) > 0.01


def test_negatives_of_rows_with_the_same_anchor_stay():
    """The hard negatives of the other row do not answer the anchor, so they stay candidates."""
    ids = torch.tensor([[1, 2, 10], [1, 3, 11], [4, 5, 12]])
    z = torch.randn(3, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    unit = torch.nn.functional.normalize(z, dim=-1)
    losses = []
    for i, left_out in enumerate(({1}, {0}, set())):
        candidates = [unit[j, 1] for j in range(3) if j not in left_out] + [unit[j, 2] for j in range(3)]
        logits = torch.stack([unit[i, 0] @ candidate for candidate in candidates]) / 0.5
        losses.append(logits.logsumexp(0) - unit[i, 0] @ unit[i, 1] / 0.5)
    assert_close(SimCSE(0.5)(z, ids), sum(losses) / 3, rtol=1e-12, atol=0)
    assert abs(SimCSE(0.5, mask_other_positives=False)(z, ids) - sum(losses) / 3) > 1e-3  # control


def test_two_halves_give_the_gradient_of_the_whole_batch():
    """Two rows with the same anchor are on different ranks."""
    z = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    ids, loss = torch.tensor([[1, 2, 10], [4, 5, 11], [1, 3, 12], [6, 1, 0]]), SimCSE(0.5, 0.7)
    whole = loss(z, ids)
    parts = sum(loss(z[i : i + 2], ids[i : i + 2], z, ids, i) for i in (0, 2)) / 2
    assert_close(parts, whole, rtol=1e-12, atol=0)
    assert_close(*(torch.autograd.grad(value, z)[0] for value in (parts, whole)), rtol=1e-9, atol=1e-12)


def test_unsupervised_rows_are_as_they_were():
    """Both forms of the loss are equal to the last bit if each text is its own positive, because it has no other positive.

    This also holds if the batch contains equal texts.
    """
    z = torch.randn(6, 2, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 1], [2, 2], [1, 1], [3, 3], [4, 4], [2, 2]])
    assert torch.equal(SimCSE()(z, ids), SimCSE(mask_other_positives=False)(z, ids))


def test_the_quickstart_texts_have_one_row_for_each_anchor(tokenizer):
    """Therefore the offline runs are the same in both forms of the loss."""
    encoder = tiny_encoder()
    tokens = tokenize_rows(Dataset.from_csv(str(QUICKSTART / "triplets.csv")), encoder.tokenizer, encoder.max_length)
    anchors = Counter(row[0] for row in tokens["text_ids"])
    assert len(anchors) > 500 and max(anchors.values()) == 1
    assert not anchors.keys() & {row[1] for row in tokens["text_ids"]}
