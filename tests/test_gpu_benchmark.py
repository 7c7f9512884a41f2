"""The script benchmarks/gpu.py, run on a CPU with tiny models: the same code that a GPU runs."""

import json
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
PARTS = ["forward", "exact", "tempscale", "loss", "matrix", "step", "throughput", "encoding", "attention",
         "settings"]  # fmt: skip
ON_CPU = ["--device", "cpu", "--tiny"]


@pytest.fixture
def gpu(monkeypatch):
    """The script as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    return gpu


@pytest.mark.slow
def test_all_checks_that_apply_pass(tmp_path):
    command = [sys.executable, str(FOLDER / "gpu.py"), *ON_CPU, "--output_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert set(report) == {"machine", "settings", "seconds", "results"}
    assert report["machine"]["torch"] == torch.__version__ and report["settings"]["tiny"]
    results = report["results"]
    assert all(set(result) == {"part", "name", "status", "figures", "note"} for result in results)
    assert list(dict.fromkeys(result["part"] for result in results)) == PARTS
    passed = Counter(result["part"] for result in results if result["status"] == "PASS")
    assert passed == {"forward": 12, "exact": 16, "tempscale": 2, "loss": 1}
    assert {result["status"] for result in results} == {"PASS", "measured", "skipped"}
    assert all(result["note"] for result in results if result["status"] == "skipped")
    figures = {result["name"]: result["figures"] for result in results}
    assert len(figures["train = reference, sdpa, float64"]["all"]) == 8
    assert len(next(f["ten slowest"] for f in figures.values() if "ten slowest" in f)) == 10
    speeds = [result["figures"] for result in results if result["part"] == "throughput" and result["figures"]]
    assert len(speeds) == 2
    assert all(0 < f["share of the matrix rate"] < 1 and f["hf_embed rows/s"] > 0 for f in speeds)
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"| {result['name']} | {result['status']} |" in table for result in results)


def test_a_check_that_is_made_to_fail(gpu, monkeypatch, tmp_path):
    """A TempScale without effect fails. So does a check that raises an error, and the next check still runs."""
    arguments = [*ON_CPU, "--output_dir", str(tmp_path), "--parts", "tempscale"]

    def results() -> list[tuple[str, str]]:
        found = json.loads((tmp_path / "gpu.json").read_text())["results"]
        return [(result["status"], result["note"]) for result in found]

    assert gpu.main(arguments) == 0
    limit = "relative distance from the float64 reference <= 0.0001, and larger without TempScale"
    skipped = ("skipped", "flash attention needs a GPU")
    assert results() == [("PASS", limit), ("PASS", limit), skipped]
    monkeypatch.setattr(gpu, "apply_tempscale", lambda model, config: model)
    monkeypatch.setattr(gpu, "fold_tempscale", lambda model: model)
    assert gpu.main(arguments) == 1
    assert results() == [("FAIL", limit), ("FAIL", limit), skipped]
    monkeypatch.setattr(gpu, "Encoder", lambda *args: 1 / 0)
    assert gpu.main(arguments) == 1
    assert results() == [("FAIL", "ZeroDivisionError: division by zero")] * 2 + [skipped]


def test_time_limit(gpu, tmp_path):
    assert gpu.main([*ON_CPU, "--output_dir", str(tmp_path), "--parts", "matrix", "--time_limit", "-1"]) == 0
    (result,) = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert (result["status"], result["note"]) == ("skipped", "the time limit was reached")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(gpu, tmp_path, capsys):
    assert gpu.main(["--output_dir", str(tmp_path)]) == 2
    assert "PyTorch finds no GPU" in capsys.readouterr().err


def test_missing_packages(gpu, monkeypatch):
    assert gpu.gpu_bench.missing_packages() == []
    version = gpu.gpu_bench.importlib.metadata.version
    monkeypatch.setattr(
        gpu.gpu_bench.importlib.metadata, "version", lambda name: "5.8.1" if name == "transformers" else version(name)
    )
    assert gpu.gpu_bench.missing_packages() == ["transformers 5.8.1 is installed; hf_embed needs transformers>=5.9,<6"]


def test_the_kernels_of_attention_are_timed(gpu, monkeypatch):
    """On a CPU, with functions in place of the kernels that only a GPU has."""
    for name in ("flash", "efficient"):
        monkeypatch.setattr(gpu.gpu_step, f"{name}_attention", lambda query, key, value, *_: query + key + value)
    monkeypatch.setattr(gpu.gpu_step, "TOKENS", 64)
    (result,) = gpu.gpu_step.attention_times(gpu.Bench("cpu", gpu.gpu_bench.TINY, Path(), 0), 16)
    assert result.name.startswith("4 texts of 16 tokens")
    assert list(result.figures) == ["flash ms", "memory-efficient ms", "as a padded batch ms"]
    assert all(value > 0 for value in result.figures.values())


def test_synchronizations_are_counted_by_place(gpu):
    """PyTorch reports a host synchronization as a warning, which the script counts under the line that caused it."""
    found = Counter()
    with gpu.gpu_step.recorded_synchronizations(gpu.Bench("cpu", gpu.gpu_bench.TINY, Path(), 0), found):
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)
    (place,) = found
    assert place.startswith("tests/test_gpu_benchmark.py:") and found[place] == 2


def test_activations_as_needed(gpu, monkeypatch, tmp_path):
    """The check runs on a CPU that counts as a GPU. It fails if the chunks that are kept get another dropout mask."""

    class OnGPU(gpu.Bench):
        cuda = True

    for module in ("arguments", "training.guarded_trainer"):
        monkeypatch.setattr(f"hf_embed.{module}.check_caching", lambda caching, device: None)
    monkeypatch.setattr("hf_embed.forward.activations.unused", lambda device: 2**30)
    monkeypatch.setattr("hf_embed.forward.activations.forget_peak", lambda device: None)
    size = iter(range(0, 10**9, 1000))
    monkeypatch.setattr("hf_embed.forward.activations.allocated", lambda device: next(size))
    bench = OnGPU("cpu", gpu.gpu_bench.TINY, tmp_path, 0)
    (result,) = gpu.as_needed_check(bench)
    assert (result.status, result.figures["different"]) == ("PASS", 0)
    assert result.figures["limit, GiB"] == 0.8 and 0 < result.figures["bytes per token"] < 1000

    def spoiled(device):
        torch.rand(1)
        return next(size)

    monkeypatch.setattr("hf_embed.forward.activations.allocated", spoiled)
    (result,) = gpu.as_needed_check(bench)
    assert result.status == "FAIL" and result.figures["different"] > 0


def test_useful_flops(gpu):
    """A model with one layer, of a single matrix product each for queries, keys, values, outputs and the inner layer."""
    form = {"num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 8}
    rows = [{"anchor": "a cat", "positive": "a dog"}]
    tokens = [len(gpu.tokenizer()(text)["input_ids"]) for text in rows[0].values()]
    weights = 4 * 4 * 4 + 2 * 4 * 8
    scores = sum(2 * 2 * n * n * 4 for n in tokens)  # queries times keys, and weights times values, in the forward pass
    wanted = 3 * (2 * weights * sum(tokens) + scores)
    assert gpu.gpu_bench.useful_flops(form, gpu.LENGTHS["NLI-like"], rows) == wanted


def test_aims_of_speed(gpu):
    """On a GPU, the speed with BERT-base and short texts is compared with its aims."""

    class OnGPU(gpu.Bench):
        cuda = True

    judge, case = gpu.gpu_bench.judge_speed, gpu.gpu_bench.Case("BERT-base", "NLI-like", "sdpa")
    bench = OnGPU("cuda", gpu.gpu_bench.TINY, Path(), 0)
    reached = {"share of the matrix rate": 0.5, "ratio of rows/s": 2.1}
    assert judge(bench, case, reached, "").status == "PASS"
    assert judge(bench, case, reached | {"ratio of rows/s": 1.9}, "").status == "FAIL"
    assert judge(bench, case, reached | {"share of the matrix rate": 0.4}, "").status == "FAIL"
    alone = judge(bench, case, reached | {"ratio of rows/s": None}, "out of memory")
    assert (alone.status, alone.note) == ("PASS", "a share >= 0.45, and no ratio: out of memory")
    assert judge(bench, case._replace(texts="long texts"), {"share of the matrix rate": 0.1}, "").status == "measured"


def test_medians(gpu):
    ours, theirs = gpu.gpu_bench.OURS, gpu.gpu_bench.THEIRS
    rounds = [
        {ours: {"rows/s": rate, "peak GiB": 1.0}, theirs: {"rows/s": other, "peak GiB": memory}}
        for rate, other, memory in [(10, 5, 2.0), (30, 10, 4.0), (20, None, None)]
    ]
    assert gpu.gpu_bench.medians(rounds) == {
        f"{ours} rows/s": 20, f"{theirs} rows/s": 7.5, "ratio of rows/s": 2.5,
        f"{ours} peak GiB": 1.0, f"{theirs} peak GiB": 3.0, "ratio of peak GiB": 0.375,
    }  # fmt: skip
