"""Run the recipes that learn from scores or from a teacher, and those that a teacher guides."""

import json

import pytest
from conftest import error_of, tiny_encoder
from test_recipes import QUIET, load_recipe
from worker import WORDS

from hf_embed import Encoder
from hf_embed.checkpoint.card import read_results

SCORED, DISTILL, SUP, MINE = (load_recipe(name) for name in ("scored_pairs", "distill", "sup_simcse", "mine_hard_negatives"))
GRADED = [(i % 6, f"the {a}", f"a {b}") for i, (a, b) in enumerate(zip(WORDS, WORDS[::-1]))]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return the folders of a student and of a teacher."""
    folder = tmp_path_factory.mktemp("models")
    tiny_encoder().save_pretrained(folder / "model", verify=False)
    tiny_encoder(seed=5).save_pretrained(folder / "teacher", verify=False)
    return {name: folder / name for name in ("model", "teacher")}


@pytest.fixture
def files(tmp_path, models):
    """Return the folder of a student and of a teacher, and training files of each kind."""
    made = dict(models)
    made["graded"] = tmp_path / "graded.tsv"
    made["graded"].write_text("\n".join(["score\tsentence1\tsentence2", *("\t".join(map(str, row)) for row in GRADED)]))
    made["pairs"] = tmp_path / "pairs.jsonl"
    pairs = [{"query": f"the {word}", "positive": f"a {word} there"} for word in WORDS]
    made["pairs"].write_text("\n".join(map(json.dumps, pairs)))
    made["texts"] = tmp_path / "texts.txt"
    made["texts"].write_text("\n".join(f"{a} and {b}" for a, b in zip(WORDS, WORDS[::-1])))
    return made


def run(module, files, train, out, *argv):
    given = [*QUIET, "--model_name_or_path", files["model"], "--train_file", files[train], "--output_dir", out,
             "--max_steps", 3, "--per_device_train_batch_size", 4, "--max_length", 32]  # fmt: skip
    return module.main([*map(str, [*given, *argv])])


def mine(files, output, monkeypatch):
    argv = ["mine_hard_negatives.py", files["teacher"], "--train_file", files["pairs"], "--output_file", output,
            "--write_scores", "--num_negatives", 2, "--relative_margin", -9]  # fmt: skip
    monkeypatch.setattr("sys.argv", [*map(str, argv)])
    MINE.main()


def test_scored_pairs(tmp_path, files, capsys):
    results = run(SCORED, files, "graded", tmp_path / "out", "--eval_sts_file", f"dev={files['graded']}")
    assert results["train"]["objective"] == {"name": "CoSENT", "temperature": 0.05}
    assert "(score 0)" in capsys.readouterr().out
    assert "CoSENT" in (tmp_path / "out" / "README.md").read_text()
    assert Encoder.from_pretrained(tmp_path / "out").encode(["a cat"]).shape == (1, 32)


def test_a_file_of_scored_pairs_without_a_header(tmp_path, files):
    """Such a file is read as an evaluation set is: score, sentence1, sentence2."""
    lines = files["graded"].read_text().splitlines()
    files["bare"] = tmp_path / "bare.tsv"
    files["bare"].write_text("\n".join(lines[1:]))
    results = [run(SCORED, files, name, tmp_path / name, "--seed", 3) for name in ("graded", "bare")]
    assert results[0]["train"]["loss"] == results[1]["train"]["loss"] and results[1]["train"]["rows"] == len(GRADED)


def test_named_columns(tmp_path, files):
    files["stars"] = tmp_path / "stars.csv"
    files["stars"].write_text("\n".join(["points,a,b", *(",".join(map(str, row)) for row in GRADED)]))
    results = run(SCORED, files, "stars", tmp_path / "out", "--columns", "anchor=a", "positive=b", "score=points")
    assert results["train"]["rows"] == len(GRADED)
    message = error_of(run, SCORED, files, "stars", tmp_path / "other", "--columns", "anchor=a", "positive=b")
    assert "the objective needs a score for each pair" in message
    files["stars"].write_text(files["stars"].read_text().replace("points", "stars"))
    message = error_of(run, SCORED, files, "stars", tmp_path / "other", "--columns", "anchor=a", "positive=b")
    assert message.endswith("use scored-pairs or the objective CoSENT")


def test_pairs_without_scores_are_refused(tmp_path, files):
    assert "the objective needs a score for each pair" in error_of(run, SCORED, files, "pairs", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert "--preflight looks for false negatives" in error_of(run, SCORED, files, "graded", tmp_path / "out", "--preflight")


@pytest.mark.parametrize("train", ["texts", "pairs"])
def test_vectors_of_a_teacher(tmp_path, files, train):
    results = run(DISTILL, files, train, tmp_path / "out", "--teacher", files["teacher"])
    assert results["train"]["objective"] == {"name": "VectorDistillation", "loss": "cosine"}
    assert results["train"]["settings"]["teacher"] == "teacher"  # the folder of this machine stays private
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()
    assert read_results(tmp_path / "out")


def test_scores_from_mining(tmp_path, files, monkeypatch):
    """The recipe for mining writes scores, `distill` learns from them, and `sup_simcse` trains without them."""
    mined = files["mined"] = tmp_path / "mined.jsonl"
    mine(files, mined, monkeypatch)
    row = json.loads(mined.read_text().splitlines()[0])
    vectors = Encoder.from_pretrained(files["teacher"]).encode(
        [row["query"], row["positive"], *row["negatives"]], normalize=True
    )
    assert row["pos_scores"] + row["neg_scores"] == pytest.approx((vectors[1:] @ vectors[0]).tolist(), abs=1e-5)
    for flags in (["TeacherKL", "--teacher_temperature", 0.05], ["MarginMSE", "--similarity", "cosine"]):
        results = run(DISTILL, files, "mined", tmp_path / flags[0], "--objective", *flags)
        assert results["train"]["objective"]["name"] == flags[0]
    run(SUP, files, "mined", tmp_path / "sup")


def test_scores_of_a_teacher_model_equal_those_of_mining(tmp_path, files, monkeypatch):
    mined = files["mined"] = tmp_path / "mined.jsonl"
    mine(files, mined, monkeypatch)
    rows = [json.loads(line) for line in mined.read_text().splitlines()]
    files["plain"] = tmp_path / "plain.jsonl"
    files["plain"].write_text("\n".join(json.dumps({k: row[k] for k in ("query", "positive", "negatives")}) for row in rows))
    flags = ["--objective", "MarginMSE", "--similarity", "cosine"]
    columns = run(DISTILL, files, "mined", tmp_path / "a", *flags)
    model = run(DISTILL, files, "plain", tmp_path / "b", *flags, "--teacher", files["teacher"])
    assert model["train"]["loss"] == pytest.approx(columns["train"]["loss"], rel=1e-4)


def test_flags_of_another_objective_are_refused(tmp_path, files):
    argv = DISTILL, files, "texts", tmp_path / "out", "--teacher", files["teacher"]
    message = error_of(run, *argv, "--candidates", "batch")
    assert "--candidates is a setting of TeacherKL, but --objective is VectorDistillation; remove the flag" in message
    for loss in ("mse", "cosine"):  # the second is the default
        assert "--loss is a setting of VectorDistillation" in error_of(run, *argv, "--objective", "TeacherKL", "--loss", loss)


def test_a_guide_in_other_recipes(tmp_path, files):
    results = run(SUP, files, "pairs", tmp_path / "out", "--teacher", files["teacher"], "--guide_margin", 0)
    assert results["train"]["objective"]["guide_margin"] == 0
    message = error_of(run, SUP, files, "pairs", tmp_path / "other", "--teacher", files["teacher"])
    assert "but no objective uses it" in message
    assert "needs the vectors of a teacher" in error_of(run, SUP, files, "pairs", tmp_path / "other", "--guide_margin", 0)


def test_sources_with_their_own_objective(tmp_path, files):
    """The card names the objective of each source that has its own."""
    sources = files["sources"] = tmp_path / "sources.yaml"
    sources.write_text("- {name: graded, file: graded.tsv, objective: CoSENT}\n- {name: pairs, file: pairs.jsonl}\n")
    given = [*QUIET, "--model_name_or_path", files["model"], "--sources", sources, "--output_dir", tmp_path / "out",
             "--max_steps", 6, "--per_device_train_batch_size", 4]  # fmt: skip
    results = SUP.main([*map(str, given)])
    assert results["train"]["source_objectives"] == {"graded": {"name": "CoSENT", "temperature": 0.05}}
    assert "Objective of graded" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["scored_pairs", "distill"])
def test_the_recipe_without_arguments_improves_the_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = load_recipe(name).main(["--use_cpu", "--report_to", "none"])
    assert results["after"]["sts"]["quickstart"] > results["before"]["sts"]["quickstart"] + 2
