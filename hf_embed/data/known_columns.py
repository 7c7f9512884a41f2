"""The columns of rows of text that this package knows, by their names. `hf_embed.data.columns` chooses among them.

    text | sentence                             one text per row; in unsupervised training it is its own positive
    anchor | query | question, positive         as in sentence-transformers and retrieval; also `positives` or `pos`; also
                                                `positive_passages` (Tevatron) and `positive_ctxs` (DPR)
    sent0, sent1                                as in SimCSE's own NLI files
    anchor | premise, entailment                with `contradiction` as the negative
    question | query, answer | passage | document | context
    title, body | abstract                      also title, text if the caller asks for pairs
    summary, article; comment | docstring, code
    sentence1, sentence2                        also question, text, title or caption with 1 and 2, and sentence_A, sentence_B
    premise, hypothesis, label                  also the pairs of the line above with a column of labels;
                                                `hf_embed.data.labeled` converts them to positives and negatives

All pairs may have negatives: `negative`, `negative_1`, `negative_2` ..., or `negatives`, `neg`, `hard_neg`; in Tevatron and DPR
`negative_passages`, `negative_ctxs`, `hard_negative_ctxs`. `hf_embed.data.sources` says what the cells may hold. `--columns
anchor=frage positive=antwort` names columns with other names.

Other columns are not used. But an unused column that judges the pairs (its name says label or score, for example) is refused,
because then some pairs may not be positives. If only its values look like judgments, a warning names it.

Names are compared in their plain form (`plain`): case, spaces, hyphens and underscores do not matter.
"""

import re
from collections.abc import Iterable, Sequence

# All names here are in their plain form. A layout is the names of two columns: of the anchors, and of their positives.
SINGLE = ("text", "sentence")
ANCHORS, POSITIVES = ("anchor", "query", "question"), ("positive", "positives", "pos", "positivepassages", "positivectxs")

# These layouts name their positives. The first one that a table has is used, whatever other columns there are.
LAYOUTS = [
    *((anchor, positive) for anchor in ANCHORS for positive in POSITIVES),
    ("sent0", "sent1"),
    ("anchor", "entailment"),
    ("premise", "entailment"),
]
# These layouts, and those in `ALIKE`, only describe what their texts are. They are used only if a table has no other layout.
DESCRIBED = [
    *((query, document) for query in ("question", "query") for document in ("answer", "passage", "document", "context")),
    ("title", "body"),
    ("title", "abstract"),
    ("summary", "article"),
    ("comment", "code"),
    ("docstring", "code"),
    ("funcdocumentationstring", "funccodestring"),
]
# The two texts of a pair are of the same kind. A column of `LABELS` may say which pairs belong together.
ALIKE = [
    ("sentence0", "sentence1"),
    ("sentence1", "sentence2"),
    ("sentencea", "sentenceb"),
    ("question1", "question2"),
    ("text1", "text2"),
    ("title1", "title2"),
    ("caption1", "caption2"),
]
# A table with a column `text` counts as single texts, unless the caller asks for pairs.
WITH_TEXT = [("title", "text")]
INFERENCE = ("premise", "hypothesis")  # without a label, the relation between the two is unknown
LABELS = ("label", "labels", "goldlabel", "isduplicate", "duplicate", "isparaphrase", "paraphrase", "entailmentlabel")

# Patterns of plain names: of a column of negatives, and of the scores that a teacher gives to the texts of a row. Such scores
# do not judge a pair, because it is already known whether the scored texts are positives or negatives.
NEGATIVE_NAME = r"(hard)?neg(ative)?s?(\d*|(passage|ctx|document|doc|text)s?)"
TEACHER_SCORE_NAME = r"(pos|neg)(itive|ative)?s?\d*scores?\d*"

JUDGMENT, NO_TEXT = "judgment", "no text"
# What a column holds if its name contains one of these words. The first line with such a word counts. A judgment says whether
# two texts belong together: label, gold_label, is_duplicate, relevance_score ...
WORDS = {
    JUDGMENT: {"label", "labels", "score", "scores", "similarity", "sim", "gold", "duplicate", "paraphrase", "relevance",
               "relevant", "relatedness", "entailment", "judgment", "judgement", "grade", "rating", "target", "y",
               "isanswer", "ispositive", "positivepair"},
    NO_TEXT: {"id", "ids", "idx", "index", "url", "urls", "link", "lang", "language", "date", "split", "unnamed", "type",
              "genre", "uid", "key", "hash", "number", "nr"},
    "negative": {"neg", "negative", "negatives", "rejected"},
    "anchor": {"query", "question", "anchor", "instruction", "prompt"},
    "positive": {"pos", "positive", "positives", "answer", "answers", "passage", "document", "doc", "text", "body", "output",
                 "response", "reply", "chosen"},
}  # fmt: skip
# These words mean a judgment only at the end of a name: user_votes and isCorrect, but not correct_answer.
JUDGMENT_AT_END = {"star", "stars", "vote", "votes", "upvotes", "downvotes", "match", "matched", "correct", "valid", "verdict"}


def plain(name: str) -> str:
    """Return a name in lower case without spaces, hyphens and underscores: "Sentence 1" becomes "sentence1"."""
    return re.sub(r"[\s_-]+", "", name).lower()


def words_of(name: str) -> list[str]:
    """Return the words of a name in lower case: relevanceScore becomes relevance, score."""
    return re.findall(r"[^\W_\d]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def numbers_in(name: str) -> list[int]:
    """Return the numbers in a name: 2 of negative_2_score. They sort negative_10 after negative_9."""
    return [int(digits) for digits in re.findall(r"\d+", name)]


def by_plain_name(names: Sequence[str]) -> dict[str, str]:
    """Return the columns by their plain names. If several have the same plain name, it stands for the first of them."""
    return {plain(name): name for name in reversed(names)}


def matching(layouts: Iterable[tuple[str, str]], names: Sequence[str]) -> list[list[str]]:
    """Return the two columns of each layout that a table with these columns has."""
    found = by_plain_name(names)
    return [[found[name] for name in layout] for layout in layouts if found.keys() >= set(layout)]


def is_negative(name: str) -> bool:
    """Return whether a column holds negatives."""
    return re.fullmatch(NEGATIVE_NAME, plain(name)) is not None


def is_teacher_score(name: str) -> bool:
    """Return whether a column holds the scores of a teacher."""
    return re.fullmatch(TEACHER_SCORE_NAME, plain(name)) is not None


def seems_to_hold(name: str) -> str:
    """Return what a column seems to hold, by the words in its name: one of the keys of `WORDS`, or "text".

    >>> [seems_to_hold(name) for name in ("gold_label", "userVotes", "page_url", "user question", "frage")]
    ['judgment', 'judgment', 'no text', 'anchor', 'text']
    """
    if is_teacher_score(name):
        return NO_TEXT
    if is_negative(name):
        return "negative"
    words = words_of(name)
    if JUDGMENT_AT_END.intersection(words[-1:]):
        return JUDGMENT
    return next((held for held, known in WORDS.items() if not known.isdisjoint([*words, plain(name)])), "text")
