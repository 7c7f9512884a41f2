"""Two gloo ranks give the gradients, weights and scores of one process, with one reduction and one gather a step."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CPU_2 = HERE.parent / "recipes" / "accelerate" / "cpu_2.yaml"


def relative_error(got: dict, expected: dict) -> float:
    assert got.keys() == expected.keys()
    largest = max(t.abs().max() for t in expected.values())
    return (max((got[name] - expected[name]).abs().max() for name in expected) / largest).item()


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, dict]:
    """(one process, two processes): what tests/worker.py saw."""
    folder = tmp_path_factory.mktemp("ranks")
    worker = str(HERE / "worker.py")
    accelerate = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CPU_2)]
    for command in ([sys.executable, worker], [*accelerate, worker]):
        done = subprocess.run([*command, str(folder)], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "1.pt"), torch.load(folder / "2.pt")


def test_two_ranks_are_two(runs):
    one, two = runs
    assert one["plain"]["ranks"] == 1
    assert two["plain"]["ranks"] == 2


@pytest.mark.parametrize("kind", ["plain", "cached", "mlm"])
def test_gradients_and_weights_equal_one_process(runs, kind):
    one, two = runs
    assert relative_error(two[kind]["gradients"], one[kind]["gradients"]) < 1e-9
    assert relative_error(two[kind]["weights"], one[kind]["weights"]) < 1e-9


def test_control_a_gather_without_gradient_is_found(runs):
    one, two = runs
    broken = two["no_gradient_through_gather"]["gradients"]
    assert relative_error(broken, one["plain"]["gradients"]) > 1e-2


def test_caching_changes_nothing_on_two_ranks(runs):
    _, two = runs
    assert relative_error(two["cached"]["gradients"], two["plain"]["gradients"]) == 0


@pytest.mark.parametrize("kind", ["plain", "cached"])
def test_one_reduction_and_one_embedding_gather_a_step(runs, kind):
    _, two = runs
    assert two[kind]["reductions"] == 2  # two steps; the tiny model is one bucket
    assert two[kind]["embedding_gathers"] == 2


def test_every_row_is_scored_once(runs):
    one, two = runs
    for key, value in one["plain"]["scores"].items():
        assert two["plain"]["scores"][key] == pytest.approx(value, abs=1e-9), key
