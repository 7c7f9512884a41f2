"""A signal ends a training with a checkpoint; what goes on from it ends bit for bit where the calm run ends."""

import json
import os
import signal
from pathlib import Path

import pytest
from test_distributed import launch, run
from worker_stop import CASES, stop_and_go_on

HERE = Path(__file__).parent
QUICK = ["a step", "the end of an epoch", "the best"]
NUMBERS = {"a step": signal.SIGUSR1, "the best": signal.SIGINT}


def check(found: dict, case: str, number: int) -> None:
    step = CASES[case][2]
    assert found["code"] == 128 + number
    assert found["stopped at"] == step and found["checkpoint"] == f"checkpoint-{step}"
    assert all(name.startswith("checkpoint-") for name in found["files"])  # no final model
    assert found["restored"]
    assert found["steps"][0] == found["steps"][1] and found["same"] and found["evaluations"]


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_a_signal_stops_and_the_run_goes_on_exactly(case, tmp_path):
    number = NUMBERS.get(case, signal.SIGTERM)
    check(stop_and_go_on(tmp_path, case, number), case, number)
