"""The script benchmarks/bench.py, with the built-in encoder and very few rows. Most trials run in the process of the test."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["batch=4", "steps=1", "warm_up=0", "max_length=16"]


@pytest.fixture
def bench(monkeypatch):
    """The script as a module. It does not start processes, because the imports of each would take seconds."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench
    import bench_trials

    bench.ran = []

    def run_trial(settings, checkout):
        bench.ran.append((settings["kind"], settings.get("side"), checkout))
        settings = json.loads(json.dumps(settings))
        return json.loads(json.dumps(bench_trials.TRIALS[settings["kind"]](SimpleNamespace(**settings))))

    monkeypatch.setattr(bench, "MACHINE", {"kind": "machine", "size": 64})
    monkeypatch.setattr(bench, "run_trial", run_trial)
    return bench


@pytest.fixture
def fake(bench, monkeypatch):
    """The script with trials that return made-up numbers: sentence-transformers is half as fast."""

    def run_trial(settings, checkout):
        bench.ran.append((settings["kind"], settings.get("side"), checkout))
        if settings["kind"] == "machine":
            return {"rates": {"float32": 100.0, "bfloat16": 200.0}, "device": "CPU", "threads": 1}
        own = settings["side"] == bench.OWN
        return {"seconds": 2.0 if own else 4.0, "amount": 10, "peak": 1.0, "above": 0.5, "flops": 1e11,
                "same": [1.0], "batch": 8}  # fmt: skip

    monkeypatch.setattr(bench, "run_trial", run_trial)
    return bench


def results(folder: Path) -> list[dict]:
    return json.loads((folder / "bench.json").read_text())


def test_training_beside_sentence_transformers(bench, tmp_path):
    command = ["--cases", "sup128", "--precisions", "float32", "--pairs", "1", "--output_dir", str(tmp_path), "--set", *TINY]
    assert bench.main(command) == 0
    (entry,) = results(tmp_path)
    assert (entry["name"], entry["precision"], entry["case"]["batch"]) == ("sup128", "float32", 4)
    (pair,) = entry["pairs"]
    assert pair["hf_embed"]["flops"] == pair["sentence_transformers"]["flops"] > 0
    for side in entry["sides"]:
        result = pair[side]
        assert result["amount"] == 4 and result["seconds"] > 0 and result["peak"] >= result["above"] > 0
        assert 0 < result["share"] < 1
    page = (tmp_path / "bench.md").read_text()
    assert page.startswith("    python benchmarks/bench.py --cases sup128") and "| sup128, float32 | " in page
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "further"),
    [
        ("unsup128", set()), ("gte128", set()), ("text128", set()), ("batch4096", set()), ("startup", None),
        ("encode-mixed", {"smallest cosine with float32", "speed : float32"}),
        ("encode-one", {"smallest cosine with float32", "speed : float32"}),
        ("collate", {"collation : training step"}), ("evaluate", {"nDCG@10"}),
    ],
)  # fmt: skip
def test_each_kind_of_trial(bench, tmp_path, case, further):
    numbers = [*TINY, "count=32"]
    assert bench.main(["--cases", case, "--pairs", "1", "--output_dir", str(tmp_path), "--set", *numbers]) == 0
    found = results(tmp_path)
    assert [entry["precision"] for entry in found] == list(bench.CASES[case].precisions)
    assert all(pair[side]["seconds"] > 0 for entry in found for pair in entry["pairs"] for side in entry["sides"])
    figures = found[-1]["pairs"][0]["hf_embed"].get("further", {})
    assert set(figures) == (further or set())
    if case.startswith("encode"):
        assert 0.99 < figures["smallest cosine with float32"] < 1
    if case == "evaluate":
        assert figures["nDCG@10"] == 100  # each query is equal to its document


@pytest.mark.slow
def test_trials_in_processes_of_their_own(tmp_path, monkeypatch):
    """The memory of a loss, and a loss that does not fit into the memory."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import bench

    settings = vars(bench.CASES["loss-4096"]) | {"count": 64, "width": 8, "precision": "float32", "path": "", "files": {}}
    both = [bench.run_trial(settings | {"side": side}, str(bench.ROOT)) for side in (bench.OWN, bench.PEER)]
    bench.compare(*both)
    assert all(0 <= result["above"] < 0.1 < result["peak"] for result in both)
    assert bench.run_trial(settings | {"side": bench.PEER, "count": 10**6}, str(bench.ROOT)) == {}
    with pytest.raises(bench.TrialError, match="KeyError: 'nothing'"):
        bench.run_trial({"kind": "nothing", "side": bench.OWN}, str(bench.ROOT))


def test_floating_point_operations_are_those_of_a_forward_and_a_backward_pass(bench):
    """All matrix products of a text without padding, and none of the pooler. Negative control: the backward pass is needed."""
    import bench_trials

    config = BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24, vocab_size=50)
    model = BertModel._from_config(config, attn_implementation="eager")
    counted = {}
    for n in (5, 9):
        with FlopCounterMode(display=False) as forward:
            states = model.encoder(model.embeddings(input_ids=torch.arange(n).view(1, n))).last_hidden_state
        with FlopCounterMode(display=False) as backward:
            states.sum().backward()
        counted[n] = forward.get_total_flops()
        assert bench_trials.forward_flops(model, [n]) == counted[n]
        assert backward.get_total_flops() == 2 * counted[n] > 0
    assert bench_trials.forward_flops(model, [5, 9, 9]) == counted[5] + 2 * counted[9]


def test_medians_and_ratios(fake):
    pairs = [{"hf_embed": {"seconds": a, "amount": 1}, "earlier version": {"seconds": b, "amount": 1}}
             for a, b in [(1, 2), (2, 2), (4, 20)]]  # fmt: skip
    pairs.append({"hf_embed": {"seconds": 3, "amount": 1}, "earlier version": {}})  # not enough memory
    assert fake.median(pairs, "hf_embed", "seconds") == 2.5 and fake.median(pairs, "earlier version", "seconds") == 2
    assert fake.ratios(pairs, "seconds", ("earlier version", "hf_embed")) == [2, 1, 5]  # not the ratio of the medians
    assert fake.median(pairs[3:], "earlier version", "seconds") is None
    entry = {"name": "sup128", "precision": "float32", "case": {"kind": "loss"}, "sides": list(pairs[0]), "pairs": pairs}
    assert fake.row_of(entry)[1:4] == ["2.50 s : 2.00 s", "**2.00x** (1.00 to 5.00)", "4"]
    assert fake.row_of(entry | {"pairs": pairs[3:]})[1:4] == ["3.00 s : not enough memory", "-", "1"]


def test_sides_take_turns_and_finished_cases_are_not_repeated(fake, tmp_path):
    command = ["--cases", "sup128", "encode-one", "--precisions", "float32", "--pairs", "3", "--output_dir", str(tmp_path)]
    assert fake.main(command) == 0
    training = [side for kind, side, _ in fake.ran if kind == "train"]
    assert training == [fake.OWN, fake.PEER, fake.PEER, fake.OWN, fake.OWN, fake.PEER]
    (row,) = [line for line in (tmp_path / "bench.md").read_text().splitlines() if line.startswith("| sup128")]
    assert "5.0 rows/s : 2.5 rows/s | **2.00x** (2.00 to 2.00) | 3 | 1.00 : 1.00; 1.00x" in row and "50% : 25%" in row
    for further, kinds in ([], {"machine"}), (["--set", "steps=3"], {"machine", "train", "encode", "tune"}):
        fake.ran.clear()
        assert fake.main([*command, *further]) == 0
        assert {kind for kind, *_ in fake.ran} == kinds
    assert len(results(tmp_path)) == 4


def test_an_earlier_version_is_the_other_side(fake, tmp_path):
    command = ["--cases", "sup128", "encode-mixed", "--pairs", "1", "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        fake.main([*command, "--against", str(tmp_path)])  # there is no hf_embed
    (tmp_path / "hf_embed").mkdir()
    fake.ran.clear()
    assert fake.main([*command, "--against", str(tmp_path)]) == 0
    checkouts = {side: checkout for kind, side, checkout in fake.ran if kind in ("train", "encode")}
    assert checkouts == {fake.OWN: str(fake.ROOT), fake.EARLIER: str(tmp_path)}


def test_a_case_that_fails(fake, monkeypatch, tmp_path, capsys):
    """Different results of the two sides, and an error of a trial: the exit status is 1, and the other cases are measured."""
    trial = fake.run_trial

    def run_trial(settings, checkout):
        if settings["kind"] == "startup":
            raise fake.TrialError("a traceback")
        wrong = {"same": [1.01]} if settings["kind"] == "loss" and settings["side"] == fake.PEER else {}
        return trial(settings, checkout) | wrong

    monkeypatch.setattr(fake, "run_trial", run_trial)
    command = ["--cases", "loss-4096", "startup", "encode-one", "--precisions", "float32", "--pairs", "1"]
    assert fake.main([*command, "--output_dir", str(tmp_path)]) == 1
    assert [entry["name"] for entry in results(tmp_path)] == ["encode-one"]
    errors = capsys.readouterr().err
    assert "different results: [1.0] and [1.01]" in errors and "startup, float32 failed: a traceback" in errors


@pytest.mark.parametrize("change", ["batches=3", "batch=many", "batch"])
def test_changes_of_numbers_are_checked(fake, capsys, change):
    with pytest.raises(SystemExit):
        fake.main(["--set", change])
    assert "give a whole number for one of batch, caching, chunk_tokens" in capsys.readouterr().err
