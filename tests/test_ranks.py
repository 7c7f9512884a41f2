"""When one rank fails or stalls, all ranks end soon, and the user sees the message of that rank once."""

import importlib
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import error_of
from worker_ranks import MESSAGE
from worker_stop import make_trainer

from hf_embed import ContrastiveTrainingArguments, InputError, distributed, ranks
from hf_embed.errors import RankError
from hf_embed.files.safe_files import locks
from hf_embed.files.work_files import claimed

HERE = Path(__file__).parent
PLACES = ["reading", "construction", "step", "evaluation", "saving"]
QUICK = ["RankError:step", "kill:evaluation"]
SLOW = ["InputError:step", "RuntimeError:step", "MemoryError:step", "exit:step", "kill:step", "stall:step", "stall:saving",
        *(f"{kind}:{place}" for kind in ("InputError", "RuntimeError", "kill") for place in PLACES if place != "step"),
        ]  # fmt: skip


def run_cases(folder: Path, cases: list[str]) -> dict:
    command = [sys.executable, str(HERE / "worker_ranks.py"), str(folder), *cases]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "found.json").read_text())


def check(case: str, found: dict) -> None:
    kind, _ = case.split(":")
    (main, failing), (of_main, of_failing) = found["status"], found["said"]
    limit = 10 if kind != "stall" else 20  # seconds; a stall includes the timeout of 5 s
    assert found["seconds"] < limit and main != 0, (case, found)
    if kind == "stall":
        assert of_main.count("error: another process of this run has not answered for 5 s") == 1
        assert of_main.count("error:") == 1 and "--ddp_timeout" in of_main and "Traceback" not in of_main
        return
    said_by_main = [line for line in of_main.splitlines() if not line.startswith("step ")]  # without the training log
    assert said_by_main in ([], ["error: another process of this run has ended; its own error says why"])
    assert failing == {"InputError": 2, "RankError": 2, "exit": 3, "kill": -9}.get(kind, 1)
    said = "" if kind in ("exit", "kill") else MESSAGE
    assert of_failing.count(MESSAGE) == bool(said) * (1 if "Error" in kind and failing == 2 else of_failing.count(MESSAGE))
    assert of_failing.strip().endswith(said)
    assert ("Traceback" in of_failing) == (kind in ("RuntimeError", "MemoryError"))


def test_all_ranks_end_when_one_fails(tmp_path):
    for case, found in run_cases(tmp_path, QUICK).items():
        check(case, found)


@pytest.mark.slow
def test_all_ranks_end_wherever_one_fails_or_stalls(tmp_path):
    found = run_cases(tmp_path, SLOW)
    assert list(found) == SLOW
    for case, of_case in found.items():
        check(case, of_case)


BUSY_AT_EXIT = """
import torch, torch.distributed as dist
from hf_embed.distributed import wait_at_exit
if {waits}:
    wait_at_exit()
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
for _ in range(1000):  # the threads of gloo still run these when the script has ended
    dist.all_reduce(torch.ones(9), async_op=True).get_future().then(lambda future: sum(range(3000)))
"""


@pytest.mark.slow
def test_threads_of_gloo_do_not_abort_a_process_that_has_ended():
    def aborts(waits: bool) -> bool:
        run = subprocess.run([sys.executable, "-c", BUSY_AT_EXIT.format(waits=waits)], capture_output=True)
        return b"terminate called" in run.stderr

    assert not any(aborts(waits=True) for _ in range(2))
    assert any(aborts(waits=False) for _ in range(10))  # control: on an idle machine, nearly every run is aborted


def test_a_process_that_has_gathered_waits_once(monkeypatch):
    registered = []
    monkeypatch.setattr(distributed.atexit, "register", lambda *call: registered.append(call))
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda gathered, thing: None)
    distributed.wait_at_exit.cache_clear()
    distributed.gather_objects("a")
    distributed.gather_objects("b")
    assert registered == [(time.sleep, distributed.MOMENT)]
    distributed.wait_at_exit.cache_clear()


@pytest.mark.parametrize(
    ("main", "replica", "own", "level"),
    [
        (False, "warning", logging.NOTSET, logging.ERROR),
        (False, "info", logging.NOTSET, logging.NOTSET),
        (False, "warning", logging.INFO, logging.INFO),  # the user has set a level
        (True, "warning", logging.NOTSET, logging.NOTSET),
    ],
)
def test_only_the_main_process_warns(tmp_path, monkeypatch, main, replica, own, level):
    """BUG: a warning about the rows was printed by each process."""
    package = logging.getLogger("hf_embed")
    monkeypatch.setattr(package, "level", own)
    monkeypatch.setattr(distributed, "is_main_process", lambda: main)
    ContrastiveTrainingArguments(str(tmp_path), log_level_replica=replica)
    assert package.level == level


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4"), ranks.PeerError),
        (dist.DistBackendError("ncclRemoteError: remote process exited or there was a network error"), ranks.PeerError),
        (dist.DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."), ranks.PeerError),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"), InputError),
        (RuntimeError("gloo does not support this"), RuntimeError),
        (RuntimeError("of another kind: Connection closed by peer"), RuntimeError),
        (ValueError("gloo: Connection closed by peer"), ValueError),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("count", [1, 2])
def test_only_errors_about_other_ranks_become_one_line(error, kind, count, monkeypatch):
    monkeypatch.setattr(ranks, "get_world_size", lambda: count)
    monkeypatch.setattr(ranks, "SOON", 0)
    with pytest.raises(type(error) if count == 1 else kind) as raised, ranks.peers_in_one_line(7):
        raise error
    assert "\n" not in str(raised.value)
    if count == 2 and kind is InputError:
        assert "has not answered for 7 s" in str(raised.value) and not isinstance(raised.value, RankError)


# ---- one run at a time ----

HOLD = """
import sys, time
from pathlib import Path
from hf_embed.files.safe_files import lock_folder
Path(sys.argv[1]).mkdir()
lock_folder(Path(sys.argv[1]))
print("here", flush=True)
time.sleep(120)
"""


@pytest.fixture
def other_run(tmp_path):
    """Start another process that locks the folder `out`, as a run does that writes to it."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "here\n"
    yield process
    process.kill()
    process.wait()


def test_a_second_run_is_refused_until_the_first_is_gone(other_run, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    refused = f"{folder}: another process is writing to this folder"
    assert refused in error_of(make_trainer(folder, {"max_steps": 1}).train)
    flags = ["--output_dir", str(folder), "--max_steps", "1", "--use_cpu", "--report_to", "none"]
    monkeypatch.setattr("hf_embed.recipes.sup_simcse.read_rows", None)  # the recipe is refused before it reads
    for recipe in ("sup_simcse", "simcse_ablation"):
        assert refused in error_of(importlib.import_module(f"hf_embed.recipes.{recipe}").main, flags)
    with pytest.raises(InputError, match="another process is writing to this folder"), claimed(folder, "the same work"):
        pass
    other_run.kill()  # a killed process leaves no lock behind
    other_run.wait()
    make_trainer(folder, {"max_steps": 1}).train()
    with claimed(folder, "the same work"):
        pass
    assert not locks  # BUG: The lock of work that failed was kept until the process ended.


def test_a_folder_made_for_nothing_goes(tmp_path):
    before = dict(ranks.locks)
    with pytest.raises(InputError), ranks.writing_alone(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
        with ranks.writing_alone(tmp_path / "a" / "b"):
            pass
        assert ranks.locks == before or (tmp_path / "a" / "b").parent.is_dir()
        raise InputError("the data are wrong")
    assert not (tmp_path / "a").exists() and ranks.locks == before
