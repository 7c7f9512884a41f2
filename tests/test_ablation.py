"""Tests of the SimCSE ablation, which compares variants, and of `--seeds`, which runs a recipe with several seeds."""

import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import error_of
from datasets import Dataset
from test_recipes import QUIET, RECIPES, UNSUP, files, flags, load_recipe, sup  # noqa: F401
from worker import WORDS

from hf_embed import Encoder
from hf_embed.data.mixture import Source
from hf_embed.evaluation.held_out import HeldOut
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.kit import ablation
from hf_embed.kit.ablation import VARIANTS, AblationArguments, plot_variants, read_variants, seeds_of, summary, table
from hf_embed.kit.content import content_hash, source_facts
from hf_embed.kit.plan import PositiveArguments, read_flags
from hf_embed.kit.seeds import read_seeds
from hf_embed.objectives import SimCSE

ABLATION = load_recipe("simcse_ablation")
SMALL = ["--eval_steps", 1, "--max_steps", 2, "--learning_rate", "1e-3"]


@pytest.fixture
def sentences(files, tmp_path):  # noqa: F811
    texts = [f"the {word} of the day is not here" for word in WORDS]
    (tmp_path / "sentences.txt").write_text("\n".join(texts) + "\n")
    return files | {"nli": tmp_path / "sentences.txt"}


def run(sentences, folder, *more) -> dict:
    argv = [*QUIET, *flags(sentences), *SMALL, "--output_dir", folder, *more]
    return ABLATION.main([str(word) for word in argv])


def test_variants_and_seeds(sentences, tmp_path, capsys):
    folder = tmp_path / "out"
    assert AblationArguments().variants == ["dropout", "no dropout", "same mask", "delete one word"]
    results = run(sentences, folder, "--variants", "dropout", "delete one word", "--seeds", "1,2")
    assert list(results) == ["dropout", "delete one word"]
    assert json.loads((folder / "results.json").read_text()) == {"variants": results}
    for result in results.values():
        assert set(result["seeds"]) == {"1", "2"}
        for path in result["seeds"].values():
            assert [point["step"] for point in path] == [0, 1, 2]
        last = [path[-1]["spearman"] for path in result["seeds"].values()]
        assert result["spearman"] == pytest.approx([np.mean(last), min(last), max(last)], abs=1e-3)
        best = [max(point["spearman"] for point in path[1:]) for path in result["seeds"].values()]
        assert result["best"][0] == pytest.approx(np.mean(best), abs=1e-3)
    starts = {json.dumps(path[0]) for result in results.values() for path in result["seeds"].values()}
    assert len(starts) == 1  # all runs start from the same model
    ends = {json.dumps(path[-1]) for result in results.values() for path in result["seeds"].values()}
    assert len(ends) == 4  # two variants times two seeds, and each run ends with other scores
    out = capsys.readouterr().out
    assert all(line in out for line in table(results)) and "ablation.png" in out
    assert (folder / "ablation.png").read_bytes()[:4] == b"\x89PNG"
    assert not list(folder.rglob("*.safetensors"))  # an ablation saves no models


@pytest.mark.slow
def test_a_variant_scores_like_the_recipe_with_the_same_flags(sentences, tmp_path):
    """The scores of a variant equal those of a run of unsup_simcse.py with the same flags."""
    path = run(sentences, tmp_path / "out", "--variants", "delete one word")["delete one word"]["seeds"]["1"]
    argv = [*QUIET, *flags(sentences), *SMALL, "--positive", "delete_one_word", "--seed", 1, "--output_dir", tmp_path / "one"]
    alone = UNSUP.main([str(word) for word in argv])
    assert alone["before"]["sts"]["s"] == pytest.approx(path[0]["spearman"], abs=0.01)
    assert alone["after"]["sts"]["s"] == pytest.approx(path[-1]["spearman"], abs=0.01)


@pytest.mark.slow
def test_only_missing_runs_are_trained(sentences, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    first = run(sentences, folder, "--variants", "dropout", "same mask")
    made = []
    make = ablation.make_trainer
    monkeypatch.setattr(ablation, "make_trainer", lambda plan: made.append(plan) or make(plan))
    assert run(sentences, folder, "--variants", "dropout", "same mask") == first and not made
    (folder / "runs" / "same-mask-seed-1" / "path.json").unlink()
    assert run(sentences, folder, "--variants", "dropout", "same mask") == first and len(made) == 1
    run(sentences, folder, "--variants", "dropout", "crop 10%")
    assert len(made) == 2
    message = error_of(run, sentences, folder, "--variants", "dropout", "--temperature", "0.1")
    assert "dropout-seed-1 holds a run with a different setting (temperature)" in message and len(made) == 2
    other = tmp_path / "other.tsv"
    other.write_text("".join(sentences["sts"].read_text().splitlines(keepends=True)[:6]))
    message = error_of(run, sentences | {"sts": other}, folder, "--variants", "dropout")
    assert "dropout-seed-1 holds a run with a different setting (evaluation set)" in message and len(made) == 2
    run(sentences, folder, "--variants", "dropout", "--temperature", "0.1", "--overwrite_output_dir")
    assert len(made) == 3 and not (folder / "runs" / "same-mask-seed-1").exists()


@pytest.mark.slow
def test_a_finished_run_of_other_rows_is_refused(sentences, tmp_path):
    run(sentences, tmp_path / "out", "--variants", "dropout")
    sentences["nli"].write_text("".join(f"a {word} is not here\n" for word in WORDS))  # other rows under the same name
    message = error_of(run, sentences, tmp_path / "out", "--variants", "dropout")
    assert "dropout-seed-1 holds a run with a different setting (training rows)" in message


@pytest.mark.slow
def test_killed_and_started_again(sentences, tmp_path):
    """Kill the ablation after its first run. The same command keeps that run and trains only the missing one."""
    folder = tmp_path / "out"
    argv = [*QUIET, *flags(sentences), *SMALL, "--output_dir", folder, "--variants", "dropout", "no dropout"]
    command = [sys.executable, *map(str, [RECIPES / "simcse_ablation.py", *argv])]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = folder / "runs" / "dropout-seed-1" / "path.json"
    deadline = time.time() + 120
    while not done.exists() and time.time() < deadline:
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    first.wait()
    kept = done.read_text()
    assert not (folder / "results.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stderr[-2000:]
    assert done.read_text() == kept and "no dropout, seed 1" in again.stdout
    assert set(json.loads((folder / "results.json").read_text())["variants"]) == {"dropout", "no dropout"}


@pytest.mark.slow
def test_variants_of_a_yaml_file(sentences, tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("variants: {warm: {temperature: 0.1}, CLS: {pooling: cls}}\nseeds: 3\n")
    results = run(sentences, tmp_path / "out", "--config", config, "--synonyms", "not used, not read")
    assert results["warm"]["flags"] == {"temperature": 0.1} and set(results["CLS"]["seeds"]) == {"3"}
    assert results["warm"]["before"] != results["CLS"]["before"]


def test_bad_input_before_the_first_run(sentences, tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "make_trainer", lambda plan: pytest.fail("a run was started"))
    config = tmp_path / "bad.yaml"
    for variants, message in (
        ("{a > b: {}, a < b: {}}", "the name of another variant differs only in punctuation"),
        ("{a: {poolin: cls}}", "unknown flag --poolin=cls"), ("{a: 3}", "variant 'a' has no dict of flags; give the flags"),
        ("{a: {seed: 3}}", "variant 'a': seed has no effect in a single variant"),
        ("{a: {}, b: {positive: 'crop:1'}}", "positive 'crop:1': the share"),
        ("{a: {}, b: {positive: 'mask_fill:0.1'}}", "has no masked-language-modeling head"),
    ):  # fmt: skip
        config.write_text(f"variants: {variants}\n")
        assert message in error_of(run, sentences, tmp_path / "out", "--config", config)
    for words, message in (
        (["--variants", "nothing"], f"unknown variant 'nothing'; give one of {str(list(VARIANTS))[1:-1]}"),
        (["--seeds", "0,x"], "--seeds '0,x' is not a list of seeds; give different whole numbers"),
        (["--seeds", ","], "give different whole"),
        (["--seeds", "1,1"], "give different whole numbers"),
        (["--seeds", "1,2", "--seed", "3"], "--seed 3 has no effect with --seeds; remove one of them"),
        (["--push_to_hub"], "--push_to_hub has no effect in an ablation"),
        (["--title", "Mine"], "--title has no effect in an ablation"),
        (["--eval_strategy", "epoch"], "--eval_strategy has no effect in an ablation"),
    ):  # fmt: skip
        assert message in error_of(run, sentences, tmp_path / "out", *words)
    assert read_seeds("1, 2") == [1, 2] and read_variants(["dropout"]) == {"dropout": {}}


def test_an_sts_set_is_needed(sentences, tmp_path):
    argv = ["--train_file", sentences["nli"], "--model_name_or_path", sentences["model"], "--output_dir", tmp_path / "o"]
    assert "give --eval_sts_file NAME=PATH" in error_of(ABLATION.main, [str(word) for word in [*QUIET, *argv, *SMALL]])


def test_picture_of_many_variants(tmp_path):
    path = [{"step": i, "spearman": 50 + i, "alignment": 0.3 + i / 10, "uniformity": -1 - i} for i in range(2)]
    result = {"before": 50, "seeds": {"1": path}, "spearman": [51, 51, 51], "best": [51, 51, 51]}
    plot_variants({f"variant {i}": result for i in range(9)}, tmp_path / "p.png")
    from PIL import Image

    assert Image.open(tmp_path / "p.png").size == (800, 600)


def test_the_table_of_one_seed_has_no_range():
    """With one seed, the table shows the score only. With several seeds, it also shows the lowest and the highest."""
    path = [{"step": 0, "spearman": 42.6, "alignment": 0.4, "uniformity": -1.7}]
    path.append(path[0] | {"step": 1, "spearman": 40.67})
    one = table({"dropout": {"seeds": {"1": path}} | summary([path])})
    assert one[1].split() == ["dropout", "42.60", "40.67", "40.67", "0.400", "-1.700"]
    two = table({"dropout": {"seeds": {"1": path, "2": path}} | summary([path, path])})
    assert "40.67 (40.67 to 40.67)" in two[1]
    assert len({len(line) for line in one}) == len({len(line) for line in two}) == 1  # each table is aligned


def test_a_collapsed_run_has_no_score(tmp_path):
    start = {"step": 0, "spearman": 42.6, "alignment": 0.4, "uniformity": -1.7}
    end = {"step": 2, "spearman": None, "alignment": 0, "uniformity": None}
    paths = [[start, start | {"step": 1, "spearman": 41.0}, last] for last in (end, start | {"step": 2})]
    results = {"a": {"seeds": dict(zip("12", paths))}, "b": {"seeds": {"1": [end]}}}
    results = {name: result | summary(list(result["seeds"].values())) for name, result in results.items()}
    assert results["a"]["spearman"] == [None] * 3 and results["a"]["best"] == [41.8, 41.0, 42.6]
    assert table(results)[2].split() == ["b", "nan", "nan", "(nan", "to", "nan)", "nan", "(nan", "to", "nan)", "0.000", "nan"]
    plot_variants(results, tmp_path / "p.png")
    assert (tmp_path / "p.png").is_file()


@pytest.mark.parametrize(("words", "seeds"), [([], [1]), (["--seed", "7"], [7]), (["--seeds", "2,3"], [2, 3])])
def test_the_seeds_that_the_flags_name(words, seeds):
    assert seeds_of(read_flags([SimCSE, PositiveArguments, AblationArguments], argv=[*QUIET, *words])) == seeds


# ---- --seeds of a recipe ----


def test_seeds_of_a_recipe(files, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "out"
    argv = [*flags(files), "--max_steps", 2, "--learning_rate", "1e-2", "--output_dir", folder]
    results = sup(*argv, "--seeds", "1,2")
    runs = {seed: json.loads((folder / f"seed-{seed}" / "results.json").read_text()) for seed in (1, 2)}
    scores = {seed: run["after"]["sts"]["s"] for seed, run in runs.items()}
    assert len(set(scores.values())) > 1
    best = max(scores, key=scores.get)
    assert results["seed"] == best and results["after"] == runs[best]["after"]
    assert results["seeds"] == {str(seed): run["after"] for seed, run in runs.items()}
    assert json.loads((folder / "results.json").read_text()) == results
    texts = ["the cat", "a house by the river"]
    kept = Encoder.from_pretrained(folder).encode(texts)
    assert np.array_equal(kept, Encoder.from_pretrained(folder / f"seed-{best}").encode(texts))
    line = f"{np.mean(list(scores.values())):8.2f}  {min(scores.values()):8.2f}  {max(scores.values()):8.2f}"
    assert line in (folder / "README.md").read_text() and line in capsys.readouterr().out
    assert not list(folder.glob("checkpoint-*"))
    assert "holds another run" in error_of(sup, *argv, "--seeds", "1,2")


@pytest.mark.slow
def test_resumed_seeds_train_only_what_is_missing(files, tmp_path):  # noqa: F811
    folder = tmp_path / "out"
    argv = [*flags(files), "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2, "--output_dir", folder]
    whole = sup(*argv, "--seeds", "1,2")
    weights = torch.load(folder / "seed-2" / "checkpoint-4" / "optimizer.pt")
    (folder / "seed-2" / "results.json").unlink()
    shutil.rmtree(folder / "seed-2" / "checkpoint-4")
    first = (folder / "seed-1" / "model.safetensors").stat().st_mtime_ns
    again = sup(*argv, "--seeds", "1,2", "--resume_from_checkpoint")
    assert again["seeds"] == whole["seeds"] and (folder / "seed-1" / "model.safetensors").stat().st_mtime_ns == first
    resumed = torch.load(folder / "seed-2" / "checkpoint-4" / "optimizer.pt")
    assert all(torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(weights["state"].values(), resumed["state"].values()))


@pytest.mark.slow
def test_seeds_with_other_settings_are_trained_again(files, tmp_path, capsys):  # noqa: F811
    folder, fresh = tmp_path / "out", tmp_path / "fresh"
    argv = [*flags(files), "--max_steps", 4, "--save_strategy", "steps", "--save_steps", 2]
    sup(*argv, "--output_dir", folder, "--seeds", "1,2")
    (folder / "seed-2" / "results.json").unlink()  # as if the run with seed 2 had been interrupted
    shutil.rmtree(folder / "seed-2" / "checkpoint-4")
    capsys.readouterr()
    other = ["--seeds", "1,2", "--learning_rate", "0.01"]
    again = sup(*argv, "--output_dir", folder, *other, "--resume_from_checkpoint")
    shown = capsys.readouterr().out
    again_for = "training it again, because its earlier run had other settings or data"
    assert f"seed 1: {again_for}" in shown and f"seed 2: {again_for}" in shown
    assert again["seeds"] == sup(*argv, "--output_dir", fresh, *other)["seeds"]
    capsys.readouterr()
    sup(*argv, "--output_dir", folder, *other, "--resume_from_checkpoint")
    assert "training it again" not in capsys.readouterr().out  # control: with unchanged settings, no run is trained again


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["nli", "sts"])
def test_seeds_with_other_data_are_trained_again(files, tmp_path, capsys, changed):  # noqa: F811
    """A finished seed of other training rows or evaluation pairs is trained again, even if the files have the same names."""
    folder, fresh = tmp_path / "out", tmp_path / "fresh"
    argv = [*flags(files), "--max_steps", 2, "--learning_rate", "1e-2", "--seeds", "1,2"]
    first = sup(*argv, "--output_dir", folder)
    lines = files[changed].read_text().splitlines(keepends=True)
    files[changed].write_text("".join([*lines[:1], *lines[3:]]))
    again = sup(*argv, "--output_dir", folder, "--resume_from_checkpoint", "latest")
    shown = capsys.readouterr().out
    again_for = "training it again, because its earlier run had other settings or data"
    assert f"seed 1: {again_for}" in shown and f"seed 2: {again_for}" in shown
    assert first["seeds"] != again["seeds"] == sup(*argv, "--output_dir", fresh)["seeds"]


@pytest.mark.slow
def test_seeds_with_made_positives_are_not_trained_again(sentences, tmp_path, capsys):
    """Each seed makes other positives from the same texts, which is no change of the data."""
    argv = [*QUIET, *flags(sentences), "--max_steps", 2, "--positive", "delete_one_word", "--output_dir", tmp_path / "out"]
    argv = [str(word) for word in [*argv, "--seeds", "1,2"]]
    first = UNSUP.main(argv)
    capsys.readouterr()
    assert UNSUP.main([*argv, "--resume_from_checkpoint", "latest"]) == first
    assert "training it again" not in capsys.readouterr().out


def test_the_hash_of_the_data():
    """The hash of the data changes with rows, weights, objectives and evaluation sets, and not with the place of a table."""

    def rows(count: int = 3) -> Dataset:
        return Dataset.from_dict({"anchor": WORDS[:count], "positive": WORDS[1 : count + 1]})

    stream = Source("a", rows().to_iterable_dataset(), size=3, origin="a.csv")
    stream_of_other_rows = Source("a", rows(4).to_iterable_dataset(), size=3, origin="a.csv")
    sources = [
        Source("a", rows()), Source("a", rows(4)), Source("a", rows(), weight=2.0), Source("a", rows(), max_length=9),
        Source("a", rows(), objective=SimCSE(temperature=0.1)), Source("a", rows(), objective=SimCSE(temperature=0.2)), stream,
    ]  # fmt: skip
    found = [content_hash([source_facts(source)]) for source in sources]
    assert len(set(found)) == len(found)
    assert found[0] == content_hash([source_facts(Source("a", rows(), origin="b.csv"))])
    assert found[-1] == content_hash([source_facts(stream_of_other_rows)])  # a limit: streams are not read
    sets = [{"r": Retrieval({"q": "a"}, {"d": text, "e": "c"}, {"q": {"d": grade}})} for text in ("a", "b") for grade in (1, 2)]
    sets += [{"other": sets[0]["r"]}, sets[0] | {"h": HeldOut(rows())}]
    assert len({content_hash(tasks) for tasks in sets}) == len(sets)


def test_seeds_need_an_evaluation_set(files, tmp_path):  # noqa: F811
    argv = ["--train_file", files["nli"], "--model_name_or_path", files["model"], "--output_dir", tmp_path / "o"]
    assert "--seeds needs an evaluation set to choose the best run" in error_of(sup, *argv, "--seeds", "1,2")
    argv = [*flags(files), "--output_dir", tmp_path / "o", "--seeds", "1,2", "--push_to_hub"]
    assert "upload the finished folder with hf-embed push FOLDER NAME instead" in error_of(sup, *argv)


def test_flags_of_other_positives_are_refused(sentences):
    for words in (["--synonyms", "absent"], ["--fill_model", sentences["model"], "--positive", "crop:0.1"]):
        argv = [str(word) for word in [*QUIET, *flags(sentences), *words]]
        assert f"{words[0]} has no effect with --positive" in error_of(UNSUP.main, argv)


def test_positive_is_refused_with_sources(files, tmp_path):  # noqa: F811
    sources = tmp_path / "sources.yaml"
    sources.write_text(f"- name: a\n  file: {files['nli']}\n  columns: {{text: sent0}}\n")
    argv = [
        "--sources",
        sources,
        "--model_name_or_path",
        files["model"],
        "--positive",
        "crop:0.1",
        "--output_dir",
        tmp_path / "o",
    ]
    assert "give --train_file or --dataset_name, not --sources" in error_of(UNSUP.main, [*QUIET, *map(str, argv)])
