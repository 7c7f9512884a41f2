"""Tests of the choice of columns: layouts known by their names, ambiguous tables, and columns that the user names."""

import shlex
from decimal import Decimal

import pandas
import pytest
import yaml
from conftest import error_of, tokenize_rows
from datasets import ClassLabel, Dataset, load_dataset
from test_data_files import datasets_cache, jsonl, listed, streamed, written  # noqa: F401  (a fixture)

from hf_embed import Source
from hf_embed.data.columns import ACCEPTED, ROLES, judging_columns, named_columns, read_columns, take_columns, text_columns
from hf_embed.data.source_files import read_sources
from hf_embed.data.sources import leave_out, read_file
from hf_embed.data.tokenization import RowTokenizer, tokenize_table
from hf_embed.kit import cli
from hf_embed.kit.inference import read_column
from hf_embed.kit.plan import DataArguments, read_flags, read_rows, read_train_rows

# ---- known by name ----

LAYOUTS = [
    # the columns of a table, whether a pair is required (None: optional), and the columns that are used
    (["question", "answer"], None, ["question", "answer"]),
    (["Answer", "QUESTION", "id"], True, ["QUESTION", "Answer"]),
    (["query", "answer"], None, ["query", "answer"]),
    (["query", "passage", "negative"], True, ["query", "passage", "negative"]),
    (["query", "document"], None, ["query", "document"]),
    (["id", "title", "context", "question", "answers"], None, ["question", "context"]),
    (["title", "body"], None, ["title", "body"]),
    (["title", "abstract"], None, ["title", "abstract"]),
    (["title", "text"], True, ["title", "text"]),
    (["title", "text"], None, ["text"]),  # a corpus of single texts, unless a pair is required
    (["text", "simplified"], None, ["text"]),
    (["anchor", "entailment"], None, ["anchor", "entailment"]),
    (["premise", "contradiction", "entailment"], None, ["premise", "entailment", "contradiction"]),
    (["summary", "article"], None, ["summary", "article"]),
    (["caption1", "caption2"], None, ["caption1", "caption2"]),
    (["sentence1", "sentence2"], True, ["sentence1", "sentence2"]),
    (["Sentence 1", "sentence_2"], True, ["Sentence 1", "sentence_2"]),
    (["sentence_0", "sentence_1"], None, ["sentence_0", "sentence_1"]),
    (["sentence_A", "sentence_B", "pair_ID"], None, ["sentence_A", "sentence_B"]),
    (["question1", "question2", "qid1", "qid2"], None, ["question1", "question2"]),
    (["query", "pos", "neg"], None, ["query", "pos", "neg"]),
    (["query", "positives", "negatives"], None, ["query", "positives", "negatives"]),
    (["query", "pos", "neg", "pos_scores", "neg_scores", "prompt", "type", "id"], None, ["query", "pos", "neg"]),
    (["question", "positive", "hard_neg"], None, ["question", "positive", "hard_neg"]),
    (["anchor", "pos"], None, ["anchor", "pos"]),
    (["query", "document", "negative_document"], None, ["query", "document", "negative_document"]),  # BUG: no negatives
    (
        ["query_id", "query", "positive_passages", "negative_passages"],
        None,
        ["query", "positive_passages", "negative_passages"],
    ),
    (
        ["dataset", "question", "answers", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"],
        True,
        ["question", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs"],
    ),
    (["repo", "path", "func_name", "code", "docstring", "code_tokens", "docstring_tokens"], True, ["docstring", "code"]),
    (["func_code_string", "func_documentation_string", "func_name"], None, ["func_documentation_string", "func_code_string"]),
    (["query", "positive", "answer"], None, ["query", "positive"]),  # the layout that names its positives
    (["sent0", "sent1", "question", "answer"], None, ["sent0", "sent1"]),
    (["text", "title", "body"], False, ["text"]),
]


@pytest.mark.parametrize(("found", "paired", "taken"), LAYOUTS)
def test_known_layouts_are_recognized(found, paired, taken, caplog):
    assert text_columns(found, "rows", paired) == taken
    unused = [column for column in found if column not in taken]
    alone = f"; each row is a single text, '{taken[0]}'" if paired is None and len(taken) == 1 else ""
    assert caplog.messages == ([f"rows: columns {', '.join(unused)} are not used{alone}"] if unused else [])


AMBIGUOUS = [
    (["question", "answer", "context"], None, "question and answer or question and context", "anchor=question positive=answer"),
    (["query", "document", "passage"], True, "query and passage or query and document", "anchor=query positive=passage"),
    (["question", "query", "answer"], None, "question and answer or query and answer", "anchor=question positive=answer"),
    (["title", "body", "text"], True, "title and body or title and text", "anchor=title positive=body"),
    (["text", "question", "answer"], None, "question and answer or text", "anchor=question positive=answer"),
    # BUG: this table was read as single texts.
    (["text", "positive", "negative"], None, "text and positive or text", "anchor=text positive=positive"),
    # BUG: the positive and the hard negative of triplets as sentence-transformers names them were trained on as pairs.
    (["sentence_0", "sentence_1", "sentence_2"], None, "sentence_0 and sentence_1 or sentence_1 and sentence_2",
     "anchor=sentence_0 positive=sentence_1"),
    # BUG: these were read as single texts.
    (["query", "text"], None, "query and text or text", "anchor=query positive=text"),
    (["question", "title", "sentence"], None, "question and sentence or sentence", "anchor=question positive=sentence"),
    (["sentence1", "sentence2", "question1", "question2"], None, "sentence1 and sentence2 or question1 and question2",
     "anchor=sentence1 positive=sentence2"),
]  # fmt: skip


@pytest.mark.parametrize(("found", "paired", "meant", "flag"), AMBIGUOUS)
def test_ambiguous_columns_are_refused(found, paired, meant, flag):
    message = error_of(text_columns, found, "a.csv", paired)
    assert message.startswith(
        f"a.csv: found the columns {', '.join(found)}, and more than one choice is possible: {meant}; "
        f"name the columns with --columns {flag} "
    )


@pytest.mark.parametrize("twin", ["Query", "que ry", "QUERY"])
def test_column_names_that_differ_only_in_spelling_are_refused(twin):
    message = error_of(text_columns, [twin, "query", "positive"], "a.csv")
    assert "differ only in case, spaces, hyphens or underscores" in message and "--ignore_columns" in message
    # Columns that are not used may have such names.
    assert text_columns(["query", "positive", "ID", "id"], "a.csv") == ["query", "positive"]


UNKNOWN = [
    (["frage", "antwort", "id"], None, ["anchor=frage", "positive=antwort"]),
    (["Unnamed: 0", "my question", "the answer", "url"], True, ["anchor=my question", "positive=the answer"]),
    (["frage", "antwort", "negative_1", "negative_2"], None,
     ["anchor=frage", "positive=antwort", "negative=negative_1", "negative=negative_2"]),
    (["premise", "hypothesis"], True, ["anchor=premise", "positive=hypothesis"]),  # without a label, their relation is unknown
    # BUG: the negatives were missing, so copying the flag left them out without a word.
    (["user_query", "positive_document", "hard_negative_document"], None,
     ["anchor=user_query", "positive=positive_document", "negative=hard_negative_document"]),
    (["prompt", "chosen", "rejected"], None, ["anchor=prompt", "positive=chosen", "negative=rejected"]),
    # BUG: the flag paired a name of a dataset, or the first two columns, whatever they were.
    (["dataset", "question", "reply"], None, ["anchor=question", "positive=reply"]),
    (["instruction", "input", "output"], None, ["anchor=instruction", "positive=output"]),
    # BUG: titles and texts were trained on as pairs, and the queries were left out.
    (["query", "title", "text"], True, ["anchor=query", "positive=text"]),
    (["title", "body", "question"], None, ["anchor=question", "positive=body"]),
    (["pos_doc", "title"], True, ["anchor=title", "positive=pos_doc"]),
    (["positive_a", "positive_b"], True, ["anchor=positive_a", "positive=positive_b"]),
    (["body", "id"], False, ["text=body"]),
]  # fmt: skip


def test_a_file_without_a_header(tmp_path):
    path = written(tmp_path / "a.tsv", "1\tHow do I open a door?\tHow is a door opened?\n1\ta\tb\n")
    message = error_of(text_columns, read_file(path).column_names, path, True)
    header = "if the first row is data, add a header above it; otherwise name the columns with --columns "
    assert f"{path}: found the columns 1, How do I open a door?, How is a door opened?; {header}" in message
    path = written(tmp_path / "b.tsv", "10\twhat is it\n11\twho is it\n")  # the queries of MS MARCO
    assert f"found the columns 10, what is it; {header}" in error_of(text_columns, read_file(path).column_names, path, True)
    assert header.split(";")[0] not in error_of(text_columns, ["my long question", "answer of it"], "a.csv", True)


def test_a_first_text_that_may_be_no_header_is_warned_of(tmp_path, caplog):
    """BUG: the first text of a file without a header was left out, and all vectors were one row off."""
    path = written(tmp_path / "a.csv", "what is it\nwho is it\n")
    assert read_column(path)[1][:] == ["who is it"]
    assert caplog.messages == [
        f"{path}: 'what is it' is read as the name of the only column; if it is a text, add a header above it"
    ]


def test_ids_in_place_of_texts_are_warned_of(tmp_path, tokenizer, caplog):
    """BUG: the triplets of ids that MS MARCO publishes were trained on as texts."""
    path = written(tmp_path / "a.tsv", "query\tpositive\tnegative\n" + "".join(f"{i}\t7{i}\t9{i}\n" for i in range(30)))
    tokenize_rows(read_file(path), tokenizer, 16, path)
    numbers = "every text looked at is a number, such as"
    assert [
        f"{path}, column '{column}': {numbers} {first}" in caplog.text for column, first in (("query", 0), ("positive", 70))
    ] == [True, True]
    caplog.clear()
    tokenize_rows(read_file(written(tmp_path / "b.tsv", "query\tpositive\n1\t2\ntwo\tthree\n")), tokenizer, 16)
    assert not caplog.messages


def test_the_flag_of_recipes_that_read_one_column(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"query": "a", "pos": "b"}])
    assert (
        error_of(read_column, path) == f"{path}: found the columns query, pos; give the column of the texts with --column NAME"
    )
    assert read_column(path, "pos")[1][:] == ["b"]


def test_a_pair_recipe_names_the_recipe_for_single_texts():
    assert "train on single texts with unsup-simcse" in error_of(text_columns, ["text"], "a.txt", True)


@pytest.mark.parametrize(("found", "paired", "given"), UNKNOWN)
def test_the_printed_flag_works(found, paired, given, tmp_path):
    message = error_of(text_columns, found, "a.csv", paired)
    assert message.startswith(
        f"a.csv: found the columns {', '.join(found)}; name the column{'' if paired is False else 's'} with "
        f"--columns {shlex.join(given)} (or columns: "
    )
    assert message.endswith("text and sentence" if paired is False else ACCEPTED.removeprefix("text; " if paired else ""))
    flags = shlex.split(message.split(" with ")[1].split(" (or columns:")[0])
    pandas.DataFrame({name: [f"{name} {i}" for i in range(3)] for name in found}).to_csv(tmp_path / "a.csv", index=False)
    (data,) = cli.parse([DataArguments], argv=["--train_file", str(tmp_path / "a.csv"), *flags])
    rows, _ = read_train_rows(data)
    assert list(rows[1].values()) == [f"{word.split('=')[1]} 1" for word in given]
    assert text_columns(rows.column_names, "a.csv", paired) == rows.column_names


def test_a_lone_column_is_no_pair():
    assert "a pair needs two columns of texts" in error_of(text_columns, ["text", "id"], "a.csv", True)
    message = error_of(text_columns, ["source", "target"], "a.csv", True)  # BUG: it did not say what to do
    assert "if 'target' holds texts, give --columns anchor=source positive=target (or columns:" in message


def test_a_label_beside_unknown_columns_is_mentioned():
    message = error_of(text_columns, ["frage", "antwort", "label"], "a.csv")
    assert "keep only the pairs that 'label' marks as a match; the others are not positives" in message


def test_graded_pairs_are_for_evaluation():
    """The STS benchmark of sentence-transformers has the columns sentence1, sentence2 and score."""
    message = error_of(text_columns, ["sentence1", "sentence2", "score"], "stsb")
    assert "the column 'score' judges the pairs" in message
    assert "to learn from graded pairs, use scored-pairs or the objective CoSENT" in message


def test_teacher_scores_do_not_judge_pairs():
    teacher = ["pos_scores", "neg_scores", "positive_score", "negative_scores"]
    assert judging_columns([*teacher, "score", "pos_label", "scores"]) == ["score", "pos_label", "scores"]
    # BUG: the advice named them as the positive and the negative.
    assert "--columns anchor=frage positive=antwort (or" in error_of(text_columns, ["frage", *teacher, "antwort"], "a.csv")


JUDGES = ["stars", "Votes", "match", "isCorrect", "valid", "human_verdict", "is_answer", "positive_pair", "vote", "is-match",
          "userVotes", "answer_correct", "votes_2", "isValid", "gold", "is_duplicate"]  # fmt: skip
OTHERS = ["correct_answer", "match_id", "validation", "startset", "best_matching_text", "votesystem", "pair_ID", "answer_id"]


def test_names_that_judge_pairs():
    """BUG: beside stars, votes, match or correct, every pair was trained as a positive."""
    assert judging_columns([*JUDGES, *OTHERS]) == JUDGES


def pairs_with(values):
    return [{"question": f"q {i}", "answer": f"a {i}", "x": value} for i, value in enumerate(values)]


JUDGED = [
    # the values of an unused column, and how a message shows them
    ([0, 1] * 6, "0, 1"), (["0", "1"] * 6, "0, 1"), ([True, False] * 6, "false, true"), ([-1, 1] * 6, "-1, 1"),
    ([0, 1, 2, 3, 4, 5] * 2, "0, 1, 2, 3, 4, 5"), ([0.0, 0.5, None] * 4, "0.0, 0.5"), (["1.5", "", "4"] * 4, "1.5, 4"),
    (["Yes", "no"] * 6, "no, yes"), ([0] * 11 + [1], "0, 1"), ([float("nan"), 1.0, 2.0] * 4, "1.0, 2.0"),
]  # fmt: skip
NOT_JUDGED = [
    list(range(12)), list(range(11)) * 3, [1] * 12, [None] * 12, ["en", "de"] * 6, [2019, 2020] * 6, ["01:30", "2:00"] * 6,
    [[0], [1]] * 6, [0, 1], [{"a": 1}, {"a": 0}] * 6, ["", " "] * 6,
]  # fmt: skip


@pytest.mark.parametrize("kind", ["rows", "csv", "jsonl", "stream", "columns", "stream with columns"])
@pytest.mark.parametrize(("values", "shown"), [*JUDGED, *((values, None) for values in NOT_JUDGED)])
def test_values_that_may_judge_pairs_are_named(kind, values, shown, tmp_path, tokenizer, caplog):
    rows = pairs_with(values)
    if kind == "csv":
        pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)
        table = read_file(str(tmp_path / "a.csv"))
    elif kind != "rows":
        table = read_file(jsonl(tmp_path / "a.jsonl", rows), streaming="stream" in kind)
    else:
        table = Dataset.from_list(rows)
    columns = {"query": "question", "positive": "answer"} if "columns" in kind else None
    source = Source("s", table, size=len(rows), columns=columns)
    if "stream" in kind:
        streamed(source, tokenizer)
    else:
        tokenize_rows(source.rows, tokenizer, 16)
    found = [message for message in caplog.messages if "may judge the pairs" in message]
    assert len(found) == (shown is not None)
    if shown is not None and not (kind == "csv" and any(value != value or value is None for value in values)):
        assert f"the column 'x' is not used, but its values ({shown}) may judge the pairs" in found[0]
        assert "--columns score=x" in found[0] and "--ignore_columns x" in found[0]


@pytest.mark.parametrize(
    ("names", "shown"), [(["no", "yes"], "no, yes"), (["0", "1"], "0, 1"), (["news", "sport"], None), (None, "0, 1")]
)
def test_names_of_labels_and_decimal_numbers_may_judge_pairs(names, shown, tokenizer, caplog):
    """BUG: only plain numbers, texts and truth values were looked at."""
    rows = Dataset.from_list(pairs_with([None, -1, *[0, 1] * 6] if names else [Decimal(i % 2) for i in range(12)]))
    tokenize_rows(rows.cast_column("x", ClassLabel(names=names)) if names else rows, tokenizer, 16)
    assert (f"its values ({shown}) may judge the pairs" in caplog.text) == ("may judge" in caplog.text) == (shown is not None)


def test_values_of_ids_of_single_texts_and_beside_scores_judge_nothing(tokenizer, caplog):
    rows = Dataset.from_list(pairs_with([0, 1] * 6))
    tokenize_rows(rows.rename_column("x", "lang_id"), tokenizer, 16)
    tokenize_rows(rows.remove_columns("answer").rename_column("question", "text"), tokenizer, 16)
    scored = rows.add_column("score", [0.1 * i for i in range(12)])
    tokenize_table(scored, RowTokenizer(tokenizer, 16, scored=True), "rows")
    take_columns(scored.rename_column("score", "points"), {"query": "question", "positive": "answer", "score": "points"})
    assert "may judge" not in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_the_scores_of_a_teacher_stay_beside_named_columns(streaming):
    """BUG: they were left out in silence, so that the teacher's model scored the texts again, or there were no scores."""
    rows = Dataset.from_list([{"q": "a", "p": "b", "n": ["c"], "pos_scores": [1.0], "neg_scores": [0.5], "id": 1}] * 2)
    taken = take_columns(rows.to_iterable_dataset() if streaming else rows, {"anchor": "q", "positive": "p", "negative": "n"})
    assert list(taken) == [{"anchor": "a", "positive": "b", "negative": ["c"], "pos_scores": [1.0], "neg_scores": [0.5]}] * 2


def test_a_table_without_rows_has_no_values(tokenizer):
    rows = Dataset.from_list(pairs_with([0, 1])).select([])
    assert "there are 0 row(s)" in error_of(tokenize_rows, rows, tokenizer, 16)


def test_values_are_looked_at_in_the_whole_table(tokenizer, caplog):
    """A file may be sorted by the judgment."""
    tokenize_rows(Dataset.from_list(pairs_with([1] * 12_000 + [0] * 8_000)), tokenizer, 16)
    assert "its values (0, 1) may judge" in caplog.text


# ---- named by the user ----


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["anchor=q", "positive=a"], {"anchor": "q", "positive": "a"}),
        (["query=q", "positive=a", "negative=n", "negative=m"], {"query": "q", "positive": "a", "negative": ["n", "m"]}),
        (["text=a=b"], {"text": "a=b"}),
        (["anchor=my q", "positive=a"], {"anchor": "my q", "positive": "a"}),
        ([], {}),
    ],
)
def test_columns_of_the_flag(given, read):
    assert read_columns(given) == read
    (data,) = cli.parse([DataArguments], argv=["--columns", *given] if given else [])
    assert data.columns == given


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["anchor"], "--columns anchor: give ROLE=COLUMN"),
        (["anchor="], "--columns anchor=: give ROLE=COLUMN"),
        (["=a"], "--columns =a: give ROLE=COLUMN"),
        (["title=a"], f"--columns title=a: unknown role 'title'; use one of {', '.join(ROLES)}"),
        (["anchor=a", "anchor=b"], "--columns: the role anchor is given twice, as a and as b; give it once"),
        (["positive=a", "positive=b"], "--columns: the role positive is given twice"),
    ],
)
def test_wrong_flags(given, expected):
    assert error_of(cli.parse, [DataArguments], argv=["--columns", *given]).startswith(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["anchor=frage", "positive=c"], "there is no column 'c'; found frage, antwort, falsch, id"),
        (["anchor=frage", "positive=frage"], "columns: 'frage' is named twice"),
        (["anchor=frage", "query=antwort", "positive=id"], "columns: two roles mean the same (query and anchor"),
        (["negative=falsch", "negatives=id", "anchor=frage", "positive=antwort"], "two roles mean the same"),
        (["anchor=frage"], "columns: the roles are anchor; give anchor and positive (and negative, if any), or only text"),
        (["score=id"], "columns: the roles are score; give anchor and positive"),
        (["positive=frage", "negative=falsch"], "give anchor and positive"),
        (["text=frage", "positive=antwort"], "give anchor and positive"),
    ],
)
def test_invalid_roles_of_columns_are_refused(given, expected, tmp_path):
    path = written(tmp_path / "a.csv", "frage,antwort,falsch,id\nf,a,n,1\ng,b,m,2\n")
    message = error_of(read_train_rows, DataArguments(train_file=path, columns=given))
    assert message.startswith(f"{path}: ") and expected in message


@pytest.mark.parametrize(
    ("found", "rest"),
    [
        (["question", "answer", "punkte"], ["question", "answer"]),
        (["punkte", "Sentence 1", "sentence_2"], ["Sentence 1", "sentence_2"]),
        (["query", "positive", "neg_1", "neg_2", "punkte"], ["query", "positive", "neg_1", "neg_2"]),
    ],
)
def test_a_named_score_needs_no_other_name_beside_known_columns(found, rest):
    """BUG: the advice `--columns score=COLUMN` led to the next error."""
    rows = Dataset.from_dict({name: [f"{name} {i}" for i in range(2)] for name in found})
    named = named_columns(rows, ["score=punkte"], "a.csv")
    roles = ["anchor", "positive", "negative_1", "negative_2"][: len(rest)]
    assert named[1] == {role: f"{column} 1" for role, column in zip(roles, rest)} | {"score": "punkte 1"}


KINDS = ["csv", "tsv", "jsonl", "parquet", "csv.gz"]


@pytest.mark.parametrize("kind", KINDS)
def test_named_columns_of_every_kind_of_file(kind, tmp_path, tokenizer):
    table = pandas.DataFrame({"Frage": ["f1", "f2"], "Antwort": ["a1", "a2"], "falsch": ["n1", "n2"], "id": [1, 2]})
    path = str(tmp_path / f"a.{kind}")
    if kind == "jsonl":
        table.to_json(path, orient="records", lines=True)
    elif kind == "parquet":
        table.to_parquet(path)
    else:
        table.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    columns = {"query": "Frage", "positive": "Antwort", "negative": ["falsch"]}
    expected = {"anchor": "f2", "positive": "a2", "negative": "n2"}
    flags = ["query=Frage", "positive=Antwort", "negative=falsch"]
    rows, _ = read_train_rows(DataArguments(train_file=path, columns=flags))
    entry = {"name": "s", "file": f"a.{kind}", "columns": columns}
    (source,) = read_sources(listed(tmp_path, entry))
    own = Source("s", read_file(path), columns=columns)
    assert rows[1] == source.rows[1] == own.rows[1] == expected
    for stream in (
        read_sources(listed(tmp_path, entry | {"streaming": True, "rows": 2, "negatives": 1}))[0],
        Source("s", read_file(path, streaming=True), size=2, negatives=1, columns=columns),
    ):
        assert list(stream.rows)[1] == expected
        assert len(streamed(stream, tokenizer).__getitems__([0, 1])) == 2
    assert len(tokenize_rows(rows, tokenizer, 16)) == 2


def test_a_label_beside_named_columns(tmp_path):
    path = written(tmp_path / "a.csv", "frage,antwort,label\nf,a,1\ng,b,0\n")
    given = DataArguments(train_file=path, columns=["anchor=frage", "positive=antwort"])
    assert error_of(read_train_rows, given).startswith(f"{path}: columns: the column 'label' judges the pairs")
    given.ignore_columns = ["label"]
    assert read_train_rows(given)[0].column_names == ["anchor", "positive"]
    message = error_of(Source, "s", read_file(path), columns={"anchor": "frage", "positive": "antwort"})
    assert message.startswith("source 's': columns: the column 'label' judges the pairs")
    named = take_columns(read_file(path), {"text": "frage"})  # a label is no judgment of a single text
    assert named.to_dict() == {"text": ["f", "g"]}


def test_lists_of_positives_under_another_name(tmp_path, tokenizer):
    path = jsonl(tmp_path / "a.jsonl", [{"q": f"q{i}", "right": ["a", "b"], "wrong": ["c"]} for i in range(2)])
    rows = named_columns(read_file(path), ["anchor=q", "positive=right", "negative=wrong"], "a.jsonl")
    assert [len(texts) for texts in tokenize_rows(rows, tokenizer, 16)["text_ids"]] == [3] * 4


def test_named_columns_of_a_dataset_folder(tmp_path):
    """A dataset folder is read like a dataset on the Hub."""
    written(tmp_path / "data" / "train.csv", "frage,antwort,id\nf,a,1\ng,b,2\n")
    given = DataArguments(dataset_name=str(tmp_path / "data"), columns=["anchor=frage", "positive=antwort"])
    assert read_train_rows(given)[0][0] == {"anchor": "f", "positive": "a"}
    stream = load_dataset(str(tmp_path / "data"), split="train", streaming=True)
    source = Source("s", stream, size=2, columns={"anchor": "frage", "positive": "antwort"})
    assert list(source.rows)[1] == {"anchor": "g", "positive": "b"}
    with_id = leave_out(load_dataset(str(tmp_path / "data"), split="train"), ["id"], "s")
    assert with_id.column_names == ["frage", "antwort"]


def test_flags_of_columns_are_refused_with_sources(tmp_path):
    path = written(tmp_path / "s.yaml", yaml.safe_dump([{"name": "a", "file": "a.csv"}]))
    message = error_of(read_train_rows, DataArguments(sources=path, columns=["text=a"]))
    assert "--columns" in message and "do not apply to --sources; set them in the sources file" in message


@pytest.mark.parametrize("flag", ["columns", "ignore_columns"])
def test_a_flag_of_columns_without_data_is_refused(flag):
    """BUG: without training data, --ignore_columns had no effect and no message."""
    flags = read_flags([], argv=[f"--{flag}", "text=a"])
    assert error_of(read_rows, flags, "sentences.txt").startswith(f"--{flag} has no effect without training data")


@pytest.mark.parametrize("columns", [{"anchor": ["a", "b"], "positive": "c"}, {"query": "a", "positive": ["b", "c"]}])
def test_only_negatives_have_several_columns(columns):
    rows = Dataset.from_list([{"a": "x", "b": "y", "c": "z"}])
    assert "give one column; only negatives may have several" in error_of(take_columns, rows, columns)


@pytest.mark.parametrize(
    "name",
    ["negative", "Negative-1", "negative1", "neg 1", "NEG_2", "hard negative", "hard-neg", "hard_neg_3"],
)
def test_columns_of_negatives_are_known_under_every_form_of_their_names(name):
    """BUG: "hard negative", "negative1" and the like were not used, although case and separators are said not to matter."""
    assert text_columns(["anchor", "positive", name], "rows") == ["anchor", "positive", name]
    numbered = [f"negative{number}" for number in (10, 9, 1)]
    assert text_columns(["anchor", "positive", *numbered], "rows")[2:] == ["negative1", "negative9", "negative10"]


@pytest.mark.parametrize("name", ["negation", "negatively", "not_negative", "negative_score", "negotiation", "hard"])
def test_other_columns_are_no_negatives(name):
    assert name not in text_columns(["anchor", "positive", name], "rows")
