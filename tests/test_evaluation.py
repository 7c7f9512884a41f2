"""STS, alignment and uniformity are compared with loops. Files that are not valid STS sets are refused."""

import itertools
import json
import math
import os
import socket
import zlib

import datasets
import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats

from hf_embed import InputError
from hf_embed.evaluation.geometry import alignment, uniformity
from hf_embed.evaluation.metrics import Alignment, SpearmanCosine, Uniformity
from hf_embed.evaluation.sts import STS, check_sts, read_sts
from hf_embed.evaluation.tasks import score_tasks
from hf_embed.kit.eval_flags import EvalArguments, read_tasks
from hf_embed.kit.report import plot_trajectory


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def error_of(function, *args):
    with pytest.raises(InputError) as error:
        function(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


def vectors(n, seed=0, dim=4):
    """Return random vectors that are not of unit length."""
    return np.random.default_rng(seed).normal(size=(n, dim)) * 3


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y)) / math.hypot(*x) / math.hypot(*y)


def squared_distance(x, y):
    return sum((a / math.hypot(*x) - b / math.hypot(*y)) ** 2 for a, b in zip(x, y))


def alignment_by_loop(first, second):
    return sum(squared_distance(x, y) for x, y in zip(first, second)) / len(first)


def uniformity_by_loop(points):
    pairs = list(itertools.combinations(points, 2))
    return math.log(sum(math.exp(-2 * squared_distance(x, y)) for x, y in pairs) / len(pairs))


# ---- metrics ----


def test_alignment():
    first, second = vectors(9), vectors(9, seed=1)
    assert alignment(first, second) == pytest.approx(alignment_by_loop(first, second), rel=1e-12)


@pytest.mark.parametrize("block", [1, 4, 9, 100])
def test_uniformity(block):
    assert uniformity(vectors(9), block) == pytest.approx(uniformity_by_loop(vectors(9)), rel=1e-12)


def test_control_other_vectors_other_values():
    assert alignment(vectors(9), vectors(9, 1)) != pytest.approx(alignment_by_loop(vectors(9), vectors(9, 2)), rel=0.01)
    assert uniformity(vectors(9)) != pytest.approx(uniformity_by_loop(vectors(8)), rel=0.001)


def test_known_values():
    """Equal vectors have alignment 0 and uniformity 0. Opposite vectors have alignment 4 and uniformity -8."""
    x = vectors(1)
    assert (alignment(x, 5 * x), alignment(x, -x)) == pytest.approx((0, 4))
    assert (uniformity(np.concatenate([x, 2 * x])), uniformity(np.concatenate([x, -x]))) == pytest.approx((0, -8))


def test_nothing_to_measure_is_nan():
    assert math.isnan(alignment(vectors(0), vectors(0))) and math.isnan(uniformity(vectors(1)))


def test_spearman_with_ties():
    """Spearman's correlation is Pearson's correlation of the ranks. Equal values share their mean rank."""
    predictions, references = [0.1, 0.5, 0.5, -0.3, 0.9, 0.2], [1, 4, 3, 1, 5, 2.5]

    def ranks(values):
        return [sum(w < v for w in values) + (sum(w == v for w in values) + 1) / 2 for v in values]

    expected = 100 * np.corrcoef(ranks(predictions), ranks(references))[0, 1]
    result = SpearmanCosine().compute(predictions=predictions, references=references)
    assert result == {"spearman": pytest.approx(expected)}


def test_metrics_are_of_evaluate_and_need_no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a metric reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    metrics = [SpearmanCosine(), Alignment(), Uniformity()]
    assert all(isinstance(metric, evaluate.Metric) for metric in metrics)
    x, y = vectors(5), vectors(5, seed=1)
    results = metrics[0].compute(predictions=[1, 2, 3], references=[1, 3, 2])
    results |= metrics[1].compute(predictions=x, references=y) | metrics[2].compute(predictions=x)
    expected = {"spearman": 50.0, "alignment": alignment_by_loop(x, y), "uniformity": uniformity_by_loop(x)}
    assert results == pytest.approx(expected, rel=1e-5)


# ---- an evaluation set ----


def make_set(scores, repeated=False):
    second = [f"b{i}" for i in range(len(scores))]
    if repeated:
        second[1] = "a0"
    return Dataset.from_dict({"sentence1": [f"a{i}" for i in range(len(scores))], "sentence2": second, "score": scores})


def embed(texts, prompt_name=None):
    return torch.tensor(np.stack([vectors(1, seed=zlib.crc32(text.encode()))[0] for text in texts]))


@pytest.mark.parametrize(
    ("scores", "positives"),
    [([0.0, 3.9, 4.0, 5.0, 4.6], [2, 3, 4]), ([1.0, 4.1, 4.2, 5.0, 2.0], [2, 3]), ([0.0, 1.0, 0.79, 0.8], [1, 3])],
)
def test_positives_are_the_top_fifth_of_the_scale(scores, positives):
    rows = make_set(scores)
    first, second = embed(rows["sentence1"]), embed(rows["sentence2"])
    expected = alignment_by_loop(first[positives].tolist(), second[positives].tolist())
    assert score_tasks({"x": STS(rows)}, embed)["x_alignment"] == pytest.approx(expected, rel=1e-5)


def test_score_tasks():
    """Spearman uses all pairs of a set, uniformity counts a repeated text once, and the means are over the sets."""
    sets = {"one": make_set([0.0, 2.0, 5.0, 3.5]), "two": make_set([5.0, 1.0, 2.0], repeated=True)}
    metrics = score_tasks({name: STS(rows) for name, rows in sets.items()}, embed)
    for name, rows in sets.items():
        first, second = embed(rows["sentence1"]).tolist(), embed(rows["sentence2"]).tolist()
        cosines = [cosine(x, y) for x, y in zip(first, second)]
        assert metrics[f"{name}_spearman"] == pytest.approx(100 * stats.spearmanr(cosines, rows["score"][:]).statistic)
        texts = sorted({*rows["sentence1"], *rows["sentence2"]})
        assert metrics[f"{name}_uniformity"] == pytest.approx(uniformity_by_loop(embed(texts).tolist()), rel=1e-5)
    for key in ("spearman", "alignment", "uniformity"):
        assert metrics[key] == pytest.approx((metrics[f"one_{key}"] + metrics[f"two_{key}"]) / 2)


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_a_set_without_a_spearman_does_not_spoil_the_mean():
    metrics = score_tasks({"flat": STS(make_set([3.0, 3.0])), "good": STS(make_set([0.0, 2.0, 5.0]))}, embed)
    assert math.isnan(metrics["flat_spearman"]) and metrics["spearman"] == metrics["good_spearman"]


# ---- files ----

ROWS = [("4.5", 'he said "hi"', "a cat"), ("0", "NA", "007")]


def write(path, table, sep="\t"):
    path.write_text("".join(sep.join(row) + "\n" for row in table), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("header", "order"),
    [
        (["score", "sentence1", "sentence2"], (0, 1, 2)),
        (["sentence1", "sentence2", "score"], (1, 2, 0)),
        (["Sentence2", "SCORE", "Sentence1"], (2, 0, 1)),
        (None, (0, 1, 2)),
    ],
)
def test_read_sts_by_name_else_by_position(header, order, tmp_path):
    table = [[row[i] for i in order] for row in ROWS]
    rows = read_sts(write(tmp_path / "a.tsv", [header, *table] if header else table))
    assert rows.to_dict() == {"sentence1": [ROWS[0][1], "NA"], "sentence2": ["a cat", "007"], "score": [4.5, 0.0]}


def test_read_sts_without_header_ignores_further_columns(tmp_path):
    rows = read_sts(write(tmp_path / "a.csv", [["5", "a", "a", "x"], ["1", "b", "c", "y"]], ","))
    assert rows.to_dict() == {"sentence1": ["a", "b"], "sentence2": ["a", "c"], "score": [5.0, 1.0]}


def test_read_sts_jsonl(tmp_path):
    items = [{"score": 1, "sentence1": "a", "sentence2": "b"}, {"score": 2.5, "sentence1": "c", "sentence2": "d"}]
    rows = read_sts(write(tmp_path / "a.jsonl", [[json.dumps(item)] for item in items]))
    assert rows.to_dict() == {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "score": [1.0, 2.5]}


HEADER = ["score", "sentence1", "sentence2"]
BAD_SETS = {
    "NaN score": ([["1", "a", "b"], ["nan", "c", "d"]], "row 2: the score is 'nan', not a number"),
    "score that is no number": ([HEADER, ["1", "a", "b"], ["high", "c", "d"]], "row 2: the score is 'high'"),
    "endless score": ([["inf", "a", "b"], ["1", "c", "d"]], "row 1: the score is 'inf'"),
    "no score": ([HEADER, ["", "a", "b"], ["1", "c", "d"]], "row 1: the score is '', not a number"),
    "empty sentence": ([["1", "a", "b"], ["2", "c", " "]], "row 2, column 'sentence2': the text is empty"),
    "too few columns": ([["1", "a"], ["2", "b"]], "found the columns 1, a; expected score, sentence1 and sentence2, by name"),
    "another order": ([["a", "b", "1"], ["c", "d", "2"]], "should hold the scores, but it begins with 'a'; add a header"),
    # BUG: pandas writes row numbers into the first column; they were the scores, and the scores were sentences.
    "row numbers": ([["0", "1.5", "a", "b"], ["1", "2", "c", "d"]], "column 2 holds only numbers too; remove a column"),
    # BUG: the row numbers of SICK-R without its header were the scores, and its scores were left out.
    "row numbers and scores": (
        [["1", "a", "b", "4.5", "NEUTRAL"], ["2", "c", "d", "3.2", "ENTAILMENT"]],
        "column 4 holds only numbers too; remove a column of row numbers, or add a header",
    ),
    "one row": ([HEADER, ["1", "a", "b"]], "there are 1 row(s), but a rank correlation needs at least 2"),
    # BUG: If the header had only two of the three names, columns were used by position and the header counted as a row.
    "a column misnamed": (
        [["score", "sentence1", "other"], ["1", "a", "b"], ["2", "c", "d"]],
        "found the columns score, sentence1, other; expected score, sentence1 and sentence2",
    ),
}


@pytest.mark.parametrize("case", BAD_SETS)
def test_bad_sts_file(case, tmp_path):
    table, expected = BAD_SETS[case]
    path = write(tmp_path / "sts.tsv", table)
    message = error_of(read_sts, path)
    assert message.startswith(path) and expected in message


@pytest.mark.parametrize(("cell", "wrong"), [(5, "not a string (5)"), (None, "missing"), (False, "not a string (False)")])
def test_sts_sentence_that_is_not_a_text(cell, wrong, tmp_path):
    items = [{"score": 1, "sentence1": "a", "sentence2": "b"}, {"score": 2.5, "sentence1": "c", "sentence2": cell}]
    path = write(tmp_path / "a.jsonl", [[json.dumps(item)] for item in items])
    assert error_of(read_sts, path).startswith(f"{path}, row 2, column 'sentence2': the text is {wrong}; ")


@pytest.mark.parametrize("missing", HEADER)
def test_missing_column(missing):
    rows = Dataset.from_dict({c: ["1", "2"] for c in HEADER if c != missing})
    assert error_of(check_sts, rows, "dev").startswith(f"dev: there is no column {missing}; found ")


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["a=FILE", "a=FILE"], "two sets are named 'a'"),
        (["FILE"], "give NAME=PATH, for example --eval_sts_file dev="),
        (["a="], "give NAME=PATH"),
        (["=FILE"], "give NAME=PATH"),
        (["a=nowhere.tsv"], "nowhere.tsv: this file does not exist"),
    ],
)
def test_bad_named_sets(items, expected, tmp_path):
    path = write(tmp_path / "sts.tsv", ROWS)
    assert expected in error_of(read_tasks, EvalArguments(eval_sts_file=[item.replace("FILE", path) for item in items]))


def test_named_sets_keep_name_and_order(tmp_path):
    path = write(tmp_path / "x=y.tsv", ROWS)
    tasks = read_tasks(EvalArguments(eval_sts_file=[f"b={path}", f"a={path}"]))
    assert list(tasks) == ["b", "a"] and all(len(task.rows) == 2 for task in tasks.values())


# ---- the picture ----


def point(step, alignment, spearman=50.0):
    return {"step": step, "eval_alignment": alignment, "eval_uniformity": -2.0, "eval_spearman": spearman}


@pytest.mark.parametrize(
    ("history", "drawn"),
    [
        ([point(0, 0.2), {"step": 5, "loss": 1.0}, point(10, 0.3)], True),
        ([point(0, 0.2)], True),
        ([point(0, math.nan)], False),
        ([{"step": 5, "loss": 1.0}], False),
    ],
)
def test_plot_trajectory(history, drawn, tmp_path):
    path = tmp_path / "geometry.png"
    plot_trajectory(history, path)
    assert (path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n") if drawn else not path.exists()


def test_a_picture_leaves_the_plots_of_a_notebook_alone(tmp_path):
    """BUG: after a training, the pictures of a notebook were no longer shown, because its backend had been replaced."""
    import matplotlib
    import matplotlib.pyplot as plt

    before = matplotlib.get_backend()
    matplotlib.use("svg")
    try:
        own = plt.figure()
        plot_trajectory([point(0, 0.2), point(10, 0.3)], tmp_path / "geometry.png")
        assert matplotlib.get_backend() == "svg" and plt.get_fignums() == [own.number]
    finally:
        plt.close("all")
        matplotlib.use(before)
