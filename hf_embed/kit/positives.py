"""Positives for training on plain sentences: the text that each sentence is paired with (SimCSE, section 3.1, tables 1 and 2).

    dropout            the sentence itself, with another dropout mask; SimCSE's own method
    same_mask          the sentence itself, with the same dropout mask; the loss then depends on the other sentences only
    delete_one_word    the quick brown fox jumps  ->  the quick fox jumps
    delete:0.3         the sentence with 30% of its words deleted
    crop:0.3           as many of its words deleted at the ends
    repeat:0.3         as many of its words repeated (ESimCSE, https://arxiv.org/abs/2109.04380)
    synonym:0.3        as many of its words replaced by synonyms from a table
    mask_fill:0.3      as many of its words masked and filled in by a masked language model
    next_sentence      the sentence of the next row

The first two kinds leave the rows as they are: `ContrastiveTrainer` encodes each row of a single text twice. The other kinds
make rows of anchor and positive. The model's dropout applies to these rows too (`--dropout 0` turns it off). The random choices
depend only on the seed and the row's number, not on workers, ranks or batches.
"""

import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset

from hf_embed.checkpoint.load import find_transformer, load_model, load_tokenizer
from hf_embed.data.cache import cached_map
from hf_embed.data.columns import text_columns
from hf_embed.errors import InputError, errors_of
from hf_embed.files.read_files import read_text
from hf_embed.hub_access import find_model
from hf_embed.progress import progress_bar, table_bars
from hf_embed.training.mlm import check_mask_token

logger = logging.getLogger(__name__)


ChangeWords = Callable[..., list[str]]  # changes the words of one sentence
ChangeTexts = Callable[..., list[list[str]]]  # changes the words of several sentences

# Functions that change the words of one sentence. `share` is above 0 and below 1, or 0 for a kind without a share.


def delete(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Delete a share of the words."""
    gone = places(words, share, draw)
    return [word for i, word in enumerate(words) if i not in gone]


def delete_one_word(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Delete one random word."""
    gone = draw.randrange(len(words))
    return words[:gone] + words[gone + 1 :]


def crop(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Keep a random run of consecutive words, so that a share of the words is deleted at the two ends."""
    kept = len(words) - len(places(words, share, draw))
    start = draw.randint(0, len(words) - kept)
    return words[start : start + kept]


def repeat(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Repeat a share of the words."""
    twice = places(words, share, draw)
    return [word for i, word in enumerate(words) for _ in range(1 + (i in twice))]


def places(words: list[str], share: float, draw: random.Random) -> set[int]:
    """Draw the positions of a share of the words: at least one position, and never all."""
    return set(draw.sample(range(len(words)), min(max(1, round(share * len(words))), len(words) - 1)))


def replace(words: list[str], share: float, draw: random.Random, table: dict[str, list[str]]) -> list[str]:
    """Replace words that are in the table, as many as `share` of all words."""
    known = [i for i, word in enumerate(words) if word.lower() in table]
    chosen = draw.sample(known, min(max(1, round(share * len(words))), len(known)))
    return [draw.choice(table[word.lower()]) if i in chosen else word for i, word in enumerate(words)]


class Maker(NamedTuple):
    """A kind of positive.

    `change` is a function that changes the words of a sentence, given a share of the words and a random number generator. It is
    None for kinds that need more than the words. `add_positives` makes these kinds.
    """

    change: ChangeWords | None = None
    takes_share: bool = False  # KIND:SHARE, as in crop:0.3


MAKERS = {
    "dropout": Maker(),
    "same_mask": Maker(),
    "delete_one_word": Maker(delete_one_word),
    "delete": Maker(delete, takes_share=True),
    "crop": Maker(crop, takes_share=True),
    "repeat": Maker(repeat, takes_share=True),
    "synonym": Maker(takes_share=True),
    "mask_fill": Maker(takes_share=True),
    "next_sentence": Maker(),
}
WITHOUT_ROWS = ("dropout", "same_mask")
KNOWN = tuple(f"{kind}:SHARE" if maker.takes_share else kind for kind, maker in MAKERS.items())


def parse_positive(positive: str) -> tuple[str, float]:
    """Parse "crop:0.3" as ("crop", 0.3). The share is 0 for a kind without a share.

    Raises:
        InputError: if the kind is unknown, or if the share is missing, not allowed for the kind, or not between 0 and 1.
    """
    kind, colon, written = positive.partition(":")
    if kind not in MAKERS or bool(colon) != MAKERS[kind].takes_share:
        raise InputError(f"unknown positive '{positive}'; give one of {', '.join(KNOWN)}")
    try:
        share = float(written or 0)
    except ValueError:
        share = -1.0
    if colon and not 0 < share < 1:
        raise InputError(f"positive '{positive}': the share of the words must be above 0 and below 1, for example {kind}:0.1")
    return kind, share


def add_positives(
    rows: Dataset, positive: str, seed: int = 0, name: str = "train_dataset", synonyms: str | None = None,
    model: str | None = None, trust_remote_code: bool = False,
) -> Dataset:  # fmt: skip
    """Make rows of anchor and positive from rows of a single text. For "dropout" and "same_mask", return the rows unchanged.

    A sentence that cannot be changed, for example because it has one word, is its own positive. A warning counts such rows.

    Args:
        rows: a dataset with a column of texts.
        positive: one of the kinds of the module docstring.
        seed: the seed of the random choices.
        name: the name of the rows in messages.
        synonyms: for "synonym", a file whose lines hold a word, a tab, and the synonyms of the word, separated by commas.
        model: for "mask_fill", the name or the folder of the masked language model.
        trust_remote_code: allow the model's own code to run.

    Raises:
        InputError: if the kind is unknown, if the share is invalid, or if the table or the model is missing or unusable.
    """
    kind, share = parse_positive(positive)
    if kind in WITHOUT_ROWS:
        return rows
    column = text_columns(rows.column_names, name, paired=False)[0]
    texts = rows.select_columns([column])
    if kind == "next_sentence":
        sentences = texts[column][:]
        return Dataset.from_dict({"anchor": sentences[:-1], "positive": sentences[1:]})
    if kind == "mask_fill":
        change: ChangeTexts = MaskFill(model, trust_remote_code)
    elif kind == "synonym":
        change = partial(one_by_one, partial(replace, table=read_synonyms(synonyms)))
    elif change_words := MAKERS[kind].change:
        change = partial(one_by_one, change_words)
    make = partial(make_pairs, column=column, change=partial(change, share=share), seed=seed)
    with table_bars():
        pairs = cached_map(texts, make, with_indices=True, batched=True, remove_columns=[column], desc=f"Positives: {positive}")
    same = sum(a == b for batch in pairs.iter(10_000) for a, b in zip(batch["anchor"], batch["positive"]))
    if same:
        logger.warning(
            f"{name}: {positive} could not change {same:,} of {len(pairs):,} rows; each of these is its own positive"
        )
    return pairs


def make_pairs(batch: dict, numbers: list[int], column: str, change: ChangeTexts, seed: int) -> dict[str, list]:
    """Make the anchors and positives of a batch of rows. The random choices depend on `seed` and the rows' `numbers`."""
    anchors = batch[column]
    words = {i: text.split() for i, text in enumerate(anchors) if isinstance(text, str)}
    long = [i for i, split in words.items() if len(split) > 1]
    draws = [random.Random(f"{seed} {numbers[i]}") for i in long]
    positives = list(anchors)
    for i, changed in zip(long, change([words[i] for i in long], draws=draws)):
        positives[i] = " ".join(changed)
    return {"anchor": anchors, "positive": positives}


def one_by_one(change: ChangeWords, texts: list[list[str]], share: float, draws: list[random.Random]) -> list[list[str]]:
    """Apply `change` to each text separately."""
    return [change(words, share=share, draw=draw) for words, draw in zip(texts, draws)]


def read_synonyms(path: str | None) -> dict[str, list[str]]:
    """Read the synonyms of each word.

    Raises:
        InputError: if no file is given, or if the file cannot be read, has a malformed line, or holds no words.
    """
    if path is None:
        raise InputError(
            "positive synonym needs --synonyms FILE; each line holds a word, a tab, and its synonyms, separated by commas"
        )
    table: dict[str, list[str]] = {}
    for number, line in enumerate(read_text(path, f"--synonyms {path}").splitlines(), 1):
        word, _, listed = line.partition("\t")
        others = [other.strip() for other in listed.split(",") if other.strip()]
        if line.strip() and not (word.strip() and others):
            raise InputError(f"--synonyms {path}, line {number}: expected a word, a tab, and synonyms separated by commas")
        if others:
            table.setdefault(word.strip().lower(), []).extend(others)
    if not table:
        raise InputError(f"--synonyms {path}: the file has no words; give another file")
    return table


def masks_of(words: list[str], chosen: list[int], mask: str) -> list[int | None]:
    """Return for each mask token of a masked text, in order, the place of the masked word. None: the text has it itself.

    >>> masks_of(["I", "saw", "[MASK]", "and", "left"], [1, 4], "[MASK]")
    [1, None, 4]
    """
    found: list[int | None] = []
    for i, word in enumerate(words):
        found += [i] if i in chosen else [None] * word.count(mask)
    return found


class MaskFill:
    """A function that masks words, and replaces each by the best guess of a masked language model."""

    def __init__(self, name: str | None, trust_remote_code: bool = False):
        if name is None:
            raise InputError("positive mask_fill needs a masked language model; give its name or folder")
        with errors_of("positive mask_fill"):
            found = find_model(name)
            where: dict[str, Any] = find_transformer(name, **found) | found
            model, missing = load_model(name, "AutoModelForMaskedLM", trust_remote_code, **where)
            self.tokenizer = load_tokenizer(name, trust_remote_code, **where)
            if missing := [key for key in missing if not key.startswith(model.base_model_prefix)]:
                raise InputError(f"'{name}' has no masked-language-modeling head ({missing[0]} is missing); give another model")
            check_mask_token(self.tokenizer, f"'{name}'")
        self.model = model.eval().to(PartialState().device)

    @torch.inference_mode()
    def __call__(self, texts: list[list[str]], share: float, draws: list[random.Random]) -> list[list[str]]:
        """Replace a share of the words of each text."""
        texts, mask = [list(words) for words in texts], self.tokenizer.mask_token
        chosen = [sorted(places(words, share, draw)) for words, draw in zip(texts, draws)]
        for start in progress_bar(range(0, len(texts), 64), desc="Filling masks", unit="batch"):
            part = range(start, min(start + 64, len(texts)))
            masked = [" ".join(mask if i in chosen[n] else word for i, word in enumerate(texts[n])) for n in part]
            inputs = self.tokenizer(masked, truncation=True, padding=True, return_tensors="pt").to(self.model.device)
            guesses = self.model(**inputs).logits.argmax(-1)
            for n, ids, best in zip(part, inputs["input_ids"].cpu(), guesses.cpu()):  # the host waits for a GPU once
                found = best[ids == self.tokenizer.mask_token_id]  # words after the truncation have no guess
                for i, guess in zip(masks_of(texts[n], chosen[n], mask), self.tokenizer.convert_ids_to_tokens(found.tolist())):
                    word = self.tokenizer.convert_tokens_to_string([guess]).replace("##", "").strip()
                    if word and i is not None:
                        texts[n][i] = word
        return texts
