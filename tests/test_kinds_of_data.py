"""Tests that a recipe's `main` trains the built-in encoder on each common kind of data, and scores it."""

import csv
import json
from pathlib import Path

import pytest
import yaml
from conftest import error_of
from test_data_files import datasets_cache  # noqa: F401  (a fixture)
from test_recipes import QUIET, load_recipe
from worker import WORDS

from hf_embed.kit.docstrings import write_beir
from hf_embed.kit.plan import QUICKSTART

# The words of a question do not show which answer belongs to it, so the model has to learn the pairs.
PAIRS = [
    (f"who has the {thing}?", f"the one with a {WORDS[5 * i % 11 + 1]} and a {WORDS[i]}") for i, thing in enumerate(WORDS[::-1])
]
WRONG = [answer for _, answer in PAIRS[1:] + PAIRS[:1]]


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flag_embedding(folder: Path) -> list:
    rows = [
        {"query": question, "pos": [answer, f"surely {answer}"][: 1 + i % 2], "neg": [WRONG[i]] if i % 3 else [],
         "pos_scores": [0.9], "neg_scores": [0.1], "prompt": "p", "type": "normal", "id": str(i)}
        for i, (question, answer) in enumerate(PAIRS)
    ]  # fmt: skip
    return ["--train_file", write_lines(folder / "bge.jsonl", rows)]


def snli(folder: Path) -> list:
    labels = ["entailment", "neutral", "contradiction"]
    rows = [
        {"gold_label": label, "sentence1": question, "sentence2": text}
        for (question, answer), wrong in zip(PAIRS, WRONG)
        for label, text in zip(labels, (answer, "somebody", wrong))
    ]
    return ["--train_file", write_lines(folder / "snli.jsonl", [*rows, rows[0] | {"gold_label": "-"}])]


def duplicates(folder: Path) -> list:
    with open(folder / "quora.tsv", "w") as file:
        print("question1\tquestion2\tis_duplicate", file=file)
        for (question, answer), wrong in zip(PAIRS, WRONG):
            print(f"{question}\t{answer}\t1\n{question}\t{wrong}\t0", file=file)
    return ["--train_file", folder / "quora.tsv"]


def faq(folder: Path, header: tuple[str, str] = ("Frage", "Antwort")) -> list:
    with open(folder / "faq.csv", "w", newline="") as file:
        csv.writer(file).writerows([["nr", *header], *([i, *pair] for i, pair in enumerate(PAIRS))])
    return ["--train_file", folder / "faq.csv", "--columns", f"anchor={header[0]}", f"positive={header[1]}"]


def question_answer(folder: Path) -> list:
    return faq(folder, ("Question", "Answer"))[:2]


def named_in_yaml(folder: Path) -> list:
    faq(folder), flag_embedding(folder)
    sources = [
        {"name": "faq", "file": "faq.csv", "columns": {"anchor": "Frage", "positive": "Antwort"}},
        {"name": "bge", "file": "bge.jsonl"},
        {"name": "stream", "file": "bge.jsonl", "streaming": True, "rows": 12, "negatives": 1},
    ]
    (folder / "sources.yaml").write_text(yaml.safe_dump(sources))
    return ["--sources", folder / "sources.yaml"]


def beir(folder: Path) -> list:
    """Mine negatives for the judged pairs of a BEIR folder. Return the flag that trains on the result."""
    command = ["--model_name_or_path", QUICKSTART / "encoder", "--retrieval_dir", folder / "beir", "--num_negatives", 1]
    mine = load_recipe("mine_hard_negatives")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["mine", *map(str, command), "--output_file", str(folder / "mined.jsonl")])
        mine.main()
    return ["--train_file", folder / "mined.jsonl"]


KINDS = {
    "FlagEmbedding": (flag_embedding, "12 rows became 18, one per positive"),
    "SNLI": (
        snli,
        "37 pairs of sentence1 and sentence2 became 12 triplets of 12 anchors; left out: 12 neutral, 1 without a label",
    ),
    "duplicates": (duplicates, "24 pairs of question1 and question2 became 12 pairs with 12 hard negatives of 12 anchors"),
    "--columns": (faq, None),
    "question, answer": (question_answer, "columns nr are not used"),
    "BEIR": (beir, None),
}


def run(recipe: str, folder: Path, data: list, *more) -> dict:
    """Train for a few steps, and return the content of results.json."""
    sts = "".join(f"{i % 6}\tthe {a}\tsome {a} and {b}\n" for i, (a, b) in enumerate(zip(WORDS, WORDS[::-1])))
    (folder / "sts.tsv").write_text(sts)
    scores = ["--eval_sts_file", f"s={folder / 'sts.tsv'}", "--eval_retrieval_dir", f"r={folder / 'beir'}"]
    model = ["--model_name_or_path", QUICKSTART / "encoder", "--max_length", 16, "--learning_rate", 3e-4]
    steps = ["--max_steps", 20, "--per_device_train_batch_size", 8, "--save_strategy", "no", "--output_dir", folder / "out"]
    return load_recipe(recipe).main([*QUIET, *map(str, [*model, *data, *scores, *steps, *more])])


def gain(results: dict) -> float:
    """Return by how many points the training has raised nDCG@10 x 100."""
    before, after = (results[part]["retrieval"]["r"]["ndcg@10"] for part in ("before", "after"))
    return after - before


@pytest.fixture
def folder(tmp_path):
    write_beir(tmp_path / "beir", PAIRS)
    return tmp_path


QUICK = ("FlagEmbedding", "--columns")


@pytest.mark.parametrize("kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS])
def test_a_kind_of_data_trains_and_scores(kind, folder, caplog):
    make, said = KINDS[kind]
    data = make(folder)
    caplog.clear()
    results = run("sup_simcse", folder, data)
    assert results["train"]["rows"] == (18 if kind == "FlagEmbedding" else 12) and results["train"]["steps"] == 20
    assert gain(results) > 8 and set(results["after"]["sts"]) == {"s"}
    assert said is None or caplog.text.count(said) == 1


@pytest.mark.slow
def test_kinds_of_data_in_one_list_of_sources(folder):
    """The training uses the improved contrastive loss with two Matryoshka dimensions."""
    results = run("gte_finetune", folder, named_in_yaml(folder), "--matryoshka_dims", 64, 32, "--temperature", 0.05)
    assert results["train"]["rows"] == 12 + 18 + 12 and gain(results) > 8


@pytest.mark.slow
def test_single_texts_of_a_named_column(folder):
    (folder / "texts.csv").write_text("nr,body\n" + "".join(f"{i},{answer}\n" for i, (_, answer) in enumerate(PAIRS)))
    data = ["--train_file", folder / "texts.csv", "--columns", "text=body"]
    results = run("unsup_simcse", folder, data)
    assert results["train"]["rows"] == 12 and results["train"]["steps"] == 20
    message = error_of(run, "unsup_simcse", folder, [*data[:2], "--overwrite_output_dir"])
    assert "found the columns nr, body; name the column with --columns text=body" in message


def test_negatives_are_mined_for_each_positive_of_named_columns(folder):
    rows = [{"frage": question, "richtig": [answer, f"surely {answer}"]} for question, answer in PAIRS]
    path = write_lines(folder / "a.jsonl", rows)
    mine = load_recipe("mine_hard_negatives")
    args = mine.Arguments("model", "out.jsonl", train_file=str(path), columns=["query=frage", "positive=richtig"])
    pairs, corpus = mine.read_pairs(args)
    assert len(pairs) == 24 and pairs[1] == (PAIRS[0][0], f"surely {PAIRS[0][1]}") and not corpus
    args.columns = ["anchor=frage"]
    assert f"{path}: columns: the roles are anchor; give anchor and positive" in error_of(mine.read_pairs, args)
    given = mine.Arguments("model", "out.jsonl", retrieval_dir=str(folder / "beir"), columns=["anchor=frage"])
    assert "--columns and --ignore_columns apply to --train_file only" in error_of(mine.read_pairs, given)
