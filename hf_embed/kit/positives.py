"""Positives for training on plain sentences: what a sentence is paired with (SimCSE, section 3.1, tables 1 and 2).

    dropout            itself, under another dropout mask; SimCSE's own way
    same_mask          itself, under the same dropout mask: nothing to learn from but the other sentences
    delete_one_word    the quick brown fox jumps  ->  the quick fox jumps
    delete:0.3         as many of its words deleted
    crop:0.3           as many of its words cut off at the ends
    repeat:0.3         as many of its words said twice (ESimCSE, https://arxiv.org/abs/2109.04380)
    synonym:0.3        as many of its words replaced from a table
    mask_fill:0.3      as many of its words masked and filled in by a masked language model
    next_sentence      the sentence of the next row

The first two leave the rows as they are: `ContrastiveTrainer` makes both views of a row with a single text. The others make
rows of anchor and positive, and have the model's dropout on top (`--dropout 0` turns it off). What is drawn depends on the seed
and the row's number alone, so workers, ranks and batches do not matter.
"""

import logging
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_embed.data.cache import cached_map
from hf_embed.data.columns import text_columns
from hf_embed.errors import InputError
from hf_embed.hub_access import find_model
from hf_embed.progress import calm_libraries, progress_bar, table_bars

logger = logging.getLogger(__name__)


ChangeWords = Callable[..., list[str]]  # of a sentence
ChangeTexts = Callable[..., list[list[str]]]  # of several

# Functions of a sentence's words; `share` is above 0 and below 1, or 0 for a kind that takes none.


def delete(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Delete a share of the words."""
    gone = places(words, share, draw)
    return [word for i, word in enumerate(words) if i not in gone]


def delete_one_word(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Delete one of the words."""
    gone = draw.randrange(len(words))
    return words[:gone] + words[gone + 1 :]


def crop(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Delete a share of the words at the ends."""
    kept = len(words) - len(places(words, share, draw))
    start = draw.randint(0, len(words) - kept)
    return words[start : start + kept]


def repeat(words: list[str], share: float, draw: random.Random) -> list[str]:
    """Say a share of the words twice."""
    twice = places(words, share, draw)
    return [word for i, word in enumerate(words) for _ in range(1 + (i in twice))]


def places(words: list[str], share: float, draw: random.Random) -> set[int]:
    """Draw the places of a share of the words, of one at least and never of all."""
    return set(draw.sample(range(len(words)), min(max(1, round(share * len(words))), len(words) - 1)))


def replace(words: list[str], share: float, draw: random.Random, table: dict[str, list[str]]) -> list[str]:
    """Replace as many words as `share` of all, of those that the table knows."""
    known = [i for i, word in enumerate(words) if word.lower() in table]
    chosen = draw.sample(known, min(max(1, round(share * len(words))), len(known)))
    return [draw.choice(table[word.lower()]) if i in chosen else word for i, word in enumerate(words)]


class Maker(NamedTuple):
    """A kind of positive: what changes the words of a sentence, given a share of them and a source of random numbers.

    Kinds without such a function need more than the words, and are made in `add_positives`.
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
    """Read "crop:0.3" as ("crop", 0.3).

    Raises:
        InputError: an unknown kind, or a share that is not between 0 and 1.
    """
    kind, colon, written = positive.partition(":")
    if kind not in MAKERS or bool(colon) != MAKERS[kind].takes_share:
        raise InputError(f"positive '{positive}'; there are {', '.join(KNOWN)}")
    try:
        share = float(written or 0)
    except ValueError:
        share = -1.0
    if colon and not 0 < share < 1:
        raise InputError(f"positive '{positive}': the share is of a sentence's words, above 0 and below 1, e.g. {kind}:0.1")
    return kind, share


def add_positives(
    rows: Dataset, positive: str, seed: int = 0, name: str = "train_dataset", synonyms: str | None = None,
    model: str | None = None, trust_remote_code: bool = False,
) -> Dataset:  # fmt: skip
    """Make rows of anchor and positive of rows of a single text; for "dropout" and "same_mask" the rows stay as they are.

    A sentence too short to be changed is its own positive; such rows are counted in a warning.

    Args:
        rows: with a column of texts.
        positive: one of the kinds above.
        seed: of what is drawn.
        name: what messages call the rows.
        synonyms: for "synonym", a file with a word, a tab, and its synonyms separated by commas, in each line.
        model: for "mask_fill", the masked language model.
        trust_remote_code: let that model's own code run.

    Raises:
        InputError: an unknown kind or a bad share; a table or a model that is missing or of no use.
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
        logger.warning(f"{name}: {same:,} of {len(pairs):,} rows could not be changed by {positive}; each is its own positive")
    return pairs


def make_pairs(batch: dict, numbers: list[int], column: str, change: ChangeTexts, seed: int) -> dict[str, list]:
    """Make the anchors and positives of a batch of rows, which have the numbers `numbers`."""
    anchors = batch[column]
    words = {i: text.split() for i, text in enumerate(anchors) if isinstance(text, str)}
    long = [i for i, split in words.items() if len(split) > 1]
    draws = [random.Random(f"{seed} {numbers[i]}") for i in long]
    positives = list(anchors)
    for i, changed in zip(long, change([words[i] for i in long], draws=draws)):
        positives[i] = " ".join(changed)
    return {"anchor": anchors, "positive": positives}


def one_by_one(change: ChangeWords, texts: list[list[str]], share: float, draws: list[random.Random]) -> list[list[str]]:
    """Change each text by itself."""
    return [change(words, share=share, draw=draw) for words, draw in zip(texts, draws)]


def read_synonyms(path: str | None) -> dict[str, list[str]]:
    """Read the synonyms of each word. Raises InputError for a file that is missing or no such table."""
    if path is None:
        raise InputError("positive synonym needs --synonyms FILE, lines of a word, a tab, and synonyms separated by commas")
    if not Path(path).is_file():
        raise InputError(f"--synonyms {path}: no such file")
    table = {}
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        word, _, listed = line.partition("\t")
        others = [other.strip() for other in listed.split(",") if other.strip()]
        if line.strip() and not (word.strip() and others):
            raise InputError(f"--synonyms {path}, line {number}: expected a word, a tab, and synonyms separated by commas")
        if others:
            table[word.strip().lower()] = others
    if not table:
        raise InputError(f"--synonyms {path}: the file has no words")
    return table


class MaskFill:
    """Masked words, each replaced by the model's best guess."""

    def __init__(self, name: str | None, trust_remote_code: bool = False):
        if name is None:
            raise InputError("positive mask_fill needs a masked language model")
        try:
            trusted = {"trust_remote_code": trust_remote_code} | find_model(name)
            with calm_libraries():
                model, loading = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True, **trusted)
        except (OSError, ValueError) as error:
            mend = "; --trust_remote_code lets its own code run" if "trust_remote_code=True" in str(error) else ""
            raise InputError(
                f"positive mask_fill: '{name}' is no masked language model ({str(error).splitlines()[0]}){mend}"
            ) from error
        if missing := sorted(key for key in loading["missing_keys"] if not key.startswith(model.base_model_prefix)):
            raise InputError(f"positive mask_fill: '{name}' has no masked-language-modelling head (no {missing[0]})")
        self.model, self.tokenizer = model.eval().to(PartialState().device), AutoTokenizer.from_pretrained(name, **trusted)

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
            for n, ids, best in zip(part, inputs["input_ids"], guesses):
                found = best[ids == self.tokenizer.mask_token_id]  # those behind the cut keep their words
                for i, guess in zip(chosen[n], self.tokenizer.convert_ids_to_tokens(found.tolist())):
                    if word := self.tokenizer.convert_tokens_to_string([guess]).replace("##", "").strip():
                        texts[n][i] = word
        return texts
