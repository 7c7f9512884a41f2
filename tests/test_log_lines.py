"""Test what a user sees of a run: one line per log or evaluation, in a file, on a terminal and in a notebook.

The progress bars are tested too.
"""

import contextlib
import io
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import transformers.trainer
from conftest import tiny_model
from datasets import Dataset
from test_trainer import ROWS, trainer
from transformers import AutoModel, PrinterCallback, ProgressCallback, TrainerCallback, TrainerState
from worker import STS

from hf_embed import ContrastiveTrainingArguments, PairClassification, Retrieval
from hf_embed.progress import bars_shown, duration, hidden_bars, progress_bar, quiet_libraries
from hf_embed.training import log_lines
from hf_embed.training.log_lines import LogLines, Printer, Progress, closing_line, digits

SETS = {"stsb": Dataset.from_list(STS), "sick": Dataset.from_list(STS[::-1])}
ROOT = Path(__file__).parent.parent
EVERY = {"eval_strategy": "steps", "eval_steps": 4, "logging_steps": 2, "max_steps": 6}
NUMBER = r"-?[\d.]+"


def test_a_line_for_a_log_and_one_where_an_evaluation_is_due(tmp_path, capsys):
    run = trainer(tmp_path, eval_dataset=SETS, **EVERY)
    run.evaluate()
    run.train()
    lines = capsys.readouterr().out.splitlines()
    scores = f"stsb {NUMBER}  sick {NUMBER}  mean spearman {NUMBER}  alignment {NUMBER}  uniformity {NUMBER}"
    expected = [
        f"step 0  {scores}", f"step 2/6  loss {NUMBER}", f"step 4/6  loss {NUMBER}  {scores}",
        f"step 6/6  loss {NUMBER}  {scores}",
        rf"trained 6 steps in {NUMBER} s, {NUMBER} rows/s, mean loss {NUMBER}",
    ]  # fmt: skip
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected):
        assert re.fullmatch(pattern, line), (line, pattern)
    logged = [entry for entry in run.state.log_history if "eval_spearman" in entry][0]
    assert f"stsb {digits(logged['eval_stsb_spearman'], 4)}  " in lines[2]
    keys = {"eval_stsb_spearman", "eval_sick_alignment", "eval_spearman", "eval_alignment", "eval_uniformity"}
    assert keys <= set(logged)  # the loggers receive all of them
    assert {"norm_spread", "masked_share", "grad_norm", "learning_rate"} <= set(run.state.log_history[0])


@pytest.mark.parametrize("counted", ["all", "non_padding"])
def test_counted_tokens_leave_the_lines_as_they_are(tmp_path, capsys, counted):
    """BUG: with include_num_input_tokens_seen, each log was shown as the end of the training, without its loss."""
    shown = []
    for kind in ("no", counted):
        run = trainer(tmp_path, eval_dataset=SETS["stsb"], **EVERY, include_num_input_tokens_seen=kind)
        run.train()
        shown.append([re.sub("in .* rows/s", "", line) for line in capsys.readouterr().out.splitlines()])
    assert shown[0] == shown[1] and shown[0][0].startswith("step 2/6  loss ") and len(shown[0]) == 4
    assert run.state.log_history[0]["train_tokens_per_second"] > 0  # the loggers receive it


@pytest.mark.parametrize(
    ("settings", "rows"),
    [
        ({"max_steps": 3, "per_device_train_batch_size": 512}, 3 * 12),  # BUG: 3 * 512
        ({"max_steps": 2, "per_device_train_batch_size": 5}, 10),
        ({"max_steps": 4, "per_device_train_batch_size": 5}, 12 + 5),  # two full batches and one of two rows in each epoch
        ({"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 5, "dataloader_drop_last": True}, 20),
        ({"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}, 12),
    ],
)
def test_rows_per_second_count_the_rows_that_were_trained_on(tmp_path, settings, rows):
    run = trainer(tmp_path, rows=ROWS[:12], **settings)
    metrics = run.train().metrics
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(rows, abs=0.2)


def test_rows_per_second_of_a_resumed_training(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 512, "max_steps": 3}
    trainer(tmp_path, rows=ROWS[:12], **settings).train()
    run = trainer(tmp_path, rows=ROWS[:12], **settings)
    metrics = run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1")).metrics
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(2 * 12, abs=0.2)


def test_thresholds_are_for_loggers_and_no_set_hides_another_number(tmp_path, capsys):
    """BUG: a line showed four thresholds of a set of pairs, and the score of a set named loss replaced the training loss."""
    pairs = PairClassification(["a cat", "a dog"], ["the cat", "some house"], [1, 0])
    sets = {"loss": SETS["stsb"], "alignment": pairs}
    run = trainer(tmp_path, eval_dataset=sets, eval_strategy="steps", eval_steps=1, logging_steps=1, max_steps=1)
    run.train()
    line = capsys.readouterr().out.splitlines()[0]
    scores = f"loss spearman {NUMBER}  alignment pair_ap {NUMBER}  alignment {NUMBER}  uniformity {NUMBER}"
    assert re.fullmatch(f"step 1/1  loss {NUMBER}  {scores}", line), line
    assert "eval_alignment_pair_f1_threshold" in run.state.log_history[1]  # the loggers receive the thresholds


def test_one_set_has_no_mean_and_other_sets_are_shown_too(tmp_path, capsys):
    run = trainer(tmp_path, eval_dataset=SETS["stsb"])
    run.evaluate()
    assert "mean" not in capsys.readouterr().out
    documents = {"a": "the cat", "b": "the dog"}
    faq = Retrieval(queries={"1": "cat"}, corpus=documents, qrels={"1": {"a": 1.0}})
    run.evaluate({"faq": faq}, metric_key_prefix="test")
    line = capsys.readouterr().out.strip()
    assert re.fullmatch(rf"step 0  faq {NUMBER}", line), line


def test_without_evaluation_the_lines_have_the_batch(tmp_path, capsys):
    trainer(tmp_path, logging_steps=3).train()
    line = capsys.readouterr().out.splitlines()[0]
    assert re.fullmatch(rf"step 3/3  loss {NUMBER}  alignment {NUMBER}  uniformity {NUMBER}", line), line


def test_an_evaluation_at_the_end_of_an_epoch_and_an_own_log(tmp_path, capsys):
    run = trainer(tmp_path, eval_dataset=SETS["stsb"], eval_strategy="epoch", num_train_epochs=1, max_steps=-1, logging_steps=3)
    run.train()
    run.log({"my_score": 0.5, "note": "as it is"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == ["step 3/3", "step 3/3"] and "  sts " in lines[1]
    assert lines[-1] == "step 3/3  my score 0.500  note as it is"


def made(**settings) -> tuple[LogLines, ContrastiveTrainingArguments, TrainerState, types.SimpleNamespace]:
    state = TrainerState(global_step=20, max_steps=1000)
    args = ContrastiveTrainingArguments("out", report_to=[], use_cpu=True, **settings)
    return LogLines(), args, state, types.SimpleNamespace(should_evaluate=False)


def test_the_learning_rate_where_it_follows_the_evaluation():
    lines, args, state, control = made()
    log = {"loss": 0.42, "learning_rate": 3e-5, "temperature": 0.05, "loss_nli": 0.3, "loss_faq": 0.5, "epoch": 1}
    assert lines.add(log, args, state, control) == ["step    20/1,000  loss 0.420  temperature 0.0500"]
    args.lr_scheduler_type = "reduce_lr_on_plateau"
    assert "learning rate 3e-05" in lines.add(log, args, state, control)[0]


def test_a_log_whose_evaluation_does_not_come_is_not_lost():
    lines, args, state, control = made()
    control.should_evaluate = True
    assert lines.add({"loss": 1.0}, args, state, control) == []
    state.global_step = 40
    assert lines.add({"loss": 2.0}, args, state, control) == ["step    20/1,000  loss 1.00"]
    assert lines.add({"eval_loss": 0.7, "eval_runtime": 3.0}, args, state, control) == [
        "step    40/1,000  loss 2.00  eval loss 0.7000"
    ]


def test_written_numbers():
    written = ["3.88", "0.420", "-1.72", "123", "1.23e-05", "0.00", "12.0", "nan", "7", "1,234", "word", "1,000", "999"]
    numbers = [3.8751, 0.42, -1.718, 123.4, 1.23e-5, 0.0, 12.0, float("nan"), 7, 1234, "word", 999.7, 999.4]
    assert [digits(number) for number in numbers] == written
    assert digits(100.0, 4) == "100.0" and digits(12345.6) == "12,346"
    assert [duration(seconds) for seconds in (2.34, 59.6, 137.1, 7300)] == ["2.3 s", "1 min 0 s", "2 min 17 s", "2 h 1 min"]
    assert closing_line({"train_runtime": 3.0}, TrainerState(global_step=1)) == "trained 1 step in 3.0 s"
    resumed = {"train_runtime": 3.0, "resumed_at_step": 2}
    assert closing_line(resumed, TrainerState(global_step=5)) == "trained 3 of 5 steps in 3.0 s"
    assert closing_line(resumed, TrainerState(global_step=2)) == "no steps were left to train: all 2 were trained before"


def test_other_ranks_print_nothing(tmp_path, capsys):
    run = trainer(tmp_path, eval_dataset=SETS["stsb"], **EVERY)
    run.state.is_world_process_zero = False
    for callback in run.callback_handler.callbacks:
        if isinstance(callback, Printer):
            callback.on_log(run.args, run.state, run.control, logs={"loss": 1.0})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("quiet", [True, False])
def test_what_people_remove_is_there_to_be_removed(tmp_path, capsys, quiet):
    run = trainer(tmp_path, disable_tqdm=quiet)
    kind, other = (PrinterCallback, ProgressCallback) if quiet else (ProgressCallback, PrinterCallback)
    own = Printer if quiet else Progress
    assert [type(c) for c in run.callback_handler.callbacks if isinstance(c, kind)] == [own]
    assert not [c for c in run.callback_handler.callbacks if isinstance(c, other)]
    run.remove_callback(kind)
    run.train()
    assert capsys.readouterr().out == ""


def test_a_notebook_gets_the_lines_in_place_of_the_table_of_transformers(tmp_path, monkeypatch):
    class Table(TrainerCallback):
        pass

    for module in (transformers.trainer, log_lines):
        monkeypatch.setattr(module, "DEFAULT_PROGRESS_CALLBACK", Table)
    kinds = [type(callback) for callback in trainer(tmp_path, disable_tqdm=False).callback_handler.callbacks]
    assert Progress in kinds and Table not in kinds


# ---- progress bars ----


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bars_are_for_the_terminal_of_the_main_process(monkeypatch):
    assert not bars_shown() and progress_bar(range(3)).disable
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert bars_shown()
    with hidden_bars():
        assert not bars_shown()
    with hidden_bars(False):
        assert bars_shown()
    assert list(progress_bar(range(3), desc="Counting")) == [0, 1, 2]
    assert "Counting" in sys.stderr.getvalue()
    monkeypatch.setenv("RANK", "1")
    assert not bars_shown()


def test_libraries_show_no_bar_of_short_work(monkeypatch, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with quiet_libraries():
        AutoModel.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert sys.stderr.getvalue() == ""
    AutoModel.from_pretrained(tmp_path)
    assert "Loading weights" in sys.stderr.getvalue()  # outside `quiet_libraries`, bars are shown as before


TRAINING = """
import sys
sys.path.insert(0, "tests")
from datasets import Dataset
from test_trainer import ROWS, trainer
from worker import STS
run = trainer(sys.argv[1], eval_dataset=Dataset.from_list(STS), eval_strategy="steps", eval_steps=2, save_strategy="steps",
              save_steps=2, logging_steps=2, max_steps=4, disable_tqdm=False)
run.train()
run.save_model()
"""


@pytest.mark.slow
@pytest.mark.parametrize("terminal", [True, False])
def test_the_console_of_a_script(tmp_path, terminal):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-c", TRAINING, str(tmp_path / "out")]
    if not terminal:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert "%|" not in done.stderr and len(done.stdout.splitlines()) == 3
        return
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=theirs, stderr=theirs)
    os.close(theirs)
    parts = []
    with contextlib.suppress(OSError):  # reading fails once the other end is closed
        while part := os.read(ours, 10_000):
            parts.append(part)
    assert process.wait() == 0
    shown = b"".join(parts).decode()
    assert "Tokenizing" in shown and "4/4" in shown and "Writing" not in shown and "Loading" not in shown
