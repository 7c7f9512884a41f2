"""The statistics in the logs, the warning of a collapse, and the end of a run whose loss or gradients are not finite."""

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_tokenizer, tiny_model
from datasets import Dataset
from test_trainer import ROWS, arguments, trainer
from transformers import TrainerCallback

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, InputError, SimCSE
from hf_embed.data.mixture import Source
from hf_embed.evaluation.geometry import alignment, uniformity
from hf_embed.training.watch import Watch, batch_geometry, warning_of


def test_numbers_of_a_batch():
    torch.manual_seed(0)
    grid = torch.randn(6, 3, 8)
    ids = torch.arange(1, 19).view(6, 3)
    ids[3, 1] = ids[0, 1]  # two rows with the same positive
    found = batch_geometry(grid, ids)
    assert found["alignment"] == pytest.approx(alignment(grid[:, 0].numpy(), grid[:, 1].numpy()), rel=1e-5)
    assert found["uniformity"] == pytest.approx(uniformity(grid[:, 0].numpy()), rel=1e-5)
    norms = grid[:, 0].norm(dim=1)
    assert found["norm_spread"] == pytest.approx((norms.std() / norms.mean()).item())
    assert found["masked_share"] == pytest.approx(2 / 30)


def test_only_the_rows_that_are_needed_are_kept(monkeypatch):
    """BUG: the embeddings of a whole batch stayed in memory during the next step, 400 MB for 65,536 pairs of width 768."""
    monkeypatch.setattr("hf_embed.training.watch.ROWS", 2)
    watch, rows = Watch(), torch.arange(24.0).view(4, 2, 3)
    watch.see(torch.tensor(0.0), rows, torch.arange(8).view(4, 2), source=0, temperature=None)
    assert torch.equal(watch.last[0], rows[:2]) and watch.last[0].untyped_storage().nbytes() == 2 * 2 * 3 * 4


def test_every_log_has_them(tmp_path, capsys):
    run = trainer(tmp_path, max_steps=4, logging_steps=2)
    run.train()
    logs = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logs) == 2
    for log in logs:
        assert {"alignment", "uniformity", "norm_spread", "masked_share"} <= set(log)
        assert 0 < log["alignment"] < 4 and -4 < log["uniformity"] < 0


def history(*points: tuple[float, float, float], prefix: str = "eval_") -> list[dict]:
    """Return the log entries of a run from its points (alignment, uniformity, loss)."""
    entries = []
    for step, (a, u, loss) in enumerate(points):
        entries += [{"step": step, "loss": loss}, {"step": step, f"{prefix}alignment": a, f"{prefix}uniformity": u}]
    return entries


@pytest.mark.parametrize("prefix", ["eval_", ""])
def test_warning_of_uniformity_that_rises_back(prefix):
    learning = history((0.3, -1.0, 3.0), (0.3, -2.0, 2.0), (0.3, -2.5, 1.0), (0.3, -2.45, 0.9), prefix=prefix)
    assert warning_of(learning) is None
    collapsing = history((0.3, -1.0, 3.0), (0.3, -2.0, 2.0), (0.2, -1.2, 1.0), prefix=prefix)
    assert "uniformity has risen again, from -2.00 at step 1 to -1.20" in warning_of(collapsing)
    diverging = history((0.3, -1.0, 3.0), (0.3, -2.0, 2.0), (0.2, -1.2, 4.0), prefix=prefix)  # the loss shows it already
    assert warning_of(diverging) is None
    # The first steps of a supervised run look like this.
    aligning = history((0.4, -1.7, 3.0), (0.35, -1.4, 2.0), (0.37, -1.6, 1.5), prefix=prefix)
    assert all(warning_of(aligning[:n]) is None for n in range(7))
    assert "from -1.70 at step 0 to -0.80" in warning_of(history((0.4, -1.7, 3.0), (0.1, -0.8, 2.0), prefix=prefix))
    mixed = warning_of(collapsing, batches_alike=False)
    assert (mixed is None) is (prefix == "")  # batches of different sources are not comparable
    assert warning_of([]) is None and warning_of(history((0.3, math.nan, 1.0))) is None


def test_warning_of_equal_embeddings(tmp_path, caplog):
    """BUG: the first token of a causal model has the same vector in all texts. Training with it ran without a word."""
    args = ContrastiveTrainingArguments(
        tmp_path, pooling="cls", max_steps=4, logging_steps=1, report_to="none", save_strategy="no"
    )
    rows = [{"anchor": f"the cat {i}", "positive": f"the dog {i}"} for i in range(8)]
    for name, told in (("qwen3", 1), ("bert", 0)):
        caplog.clear()
        ContrastiveTrainer(tiny_model(name), args, train_dataset=rows, processing_class=small_tokenizer()).train()
        assert caplog.text.count("uniformity is 0: all embeddings are equal") == told
    assert warning_of(history((0.0, -0.0, 3.0))) and warning_of(history((0.0, -0.001, 3.0))) is None


def test_no_warning_of_uniformity_while_the_score_rises():
    points = history((0.3, -1.0, 3.0), (0.3, -2.0, 2.0), (0.2, -1.2, 1.0))
    for score, warned in ((48.0, True), (65.0, False)):
        scored = [entry | ({"eval_spearman": 49.0} if "eval_uniformity" in entry else {}) for entry in points]
        scored[-1]["eval_spearman"] = score
        assert (warning_of(scored) is not None) == warned


def test_warning_of_positives_that_drift_apart():
    start = {"step": 0, "eval_alignment": 0.2, "eval_uniformity": -1.0}  # before the first step there is no loss
    assert "alignment has risen from 0.20 to 0.31" in warning_of([start, *history((0.31, -2.5, 0.1))])
    assert warning_of([start, *history((0.29, -2.5, 0.1))]) is None
    assert warning_of([start, *history((0.25, -2.5, 0.1), (0.31, -2.5, 0.2))]) is None  # the loss rises
    for score, warned in ((48.0, True), (65.0, False)):  # no warning if the score is better than at the start
        *before, last = history((0.31, -2.5, 0.1))
        told = warning_of([start | {"eval_spearman": 49.0}, *before, last | {"eval_spearman": score}])
        assert (told is not None) == warned
    batches = history((0.2, -1.0, 1.0), (0.4, -2.0, 0.5), prefix="")  # two dropout views are not evaluation pairs
    assert warning_of(batches) is None


def test_a_collapse_is_warned_of_once(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run = trainer(tmp_path, max_steps=1)
    run.train()
    for entry in history((0.3, -1.0, 3.0), (0.3, -2.0, 2.0), (0.2, -1.2, 1.0), (0.2, -1.1, 0.9)):
        run.log(entry)
    assert caplog.text.count("uniformity has risen again") == 1


class Spoil(SimCSE):
    """A loss that is NaN after its fifth call."""

    def __call__(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        loss = super().__call__(*args, **kwargs)
        return loss * math.nan if self.calls > 5 else loss


def test_nan_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    run = trainer(tmp_path, objective=Spoil(), max_steps=20, save_strategy="steps", save_steps=2, logging_steps=1)
    with pytest.raises(InputError, match=r"is NaN or infinite at step 6 .*the last good checkpoint is .*checkpoint-4; resume"):
        run.train()
    folders = sorted(path.name for path in Path(tmp_path).glob("checkpoint-*"))
    assert folders == ["checkpoint-2", "checkpoint-4"]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert all(np.isfinite(log["loss"]) for log in state["log_history"])


def test_the_same_trainer_goes_on_from_the_last_good_checkpoint(tmp_path):
    """BUG: The trainer remembered the loss that had ended the run, so every further training ended too."""
    run = trainer(tmp_path, objective=Spoil(), max_steps=8, save_strategy="steps", save_steps=2, logging_steps=1)
    with pytest.raises(InputError, match="is NaN or infinite"):
        run.train()
    run.main_objective.calls = -100  # the loss is finite again
    assert run.train(resume_from_checkpoint=True).global_step == 8


def test_nan_is_seen_where_checkpoints_are_of_epochs(tmp_path):
    run = trainer(tmp_path, objective=Spoil(), max_steps=-1, num_train_epochs=5, save_strategy="epoch", logging_steps=100)
    with pytest.raises(InputError, match=r"at step 6 .*the last good checkpoint is .*checkpoint-3; resume"):
        run.train()
    assert [path.name for path in Path(tmp_path).glob("checkpoint-*")] == ["checkpoint-3"]


def test_spoilt_weights_are_not_saved(tmp_path):
    class SpoilWeights(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:  # in the second step
                next(p for p in model.parameters() if p.requires_grad).data.fill_(math.inf)

    run = trainer(tmp_path, callbacks=[SpoilWeights()], max_steps=4, save_strategy="steps", save_steps=2, logging_steps=50)
    with pytest.raises(InputError, match="no checkpoint was saved before"):
        run.train()
    assert not list(Path(tmp_path).glob("checkpoint-*"))


class SpoiltGradients(TrainerCallback):
    """A callback that adds `value` to a gradient in the given steps (counted from 1), while the loss stays finite."""

    def __init__(self, *steps: int, value: float = math.nan):
        self.steps, self.value, self.weights = steps, value, {}

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        self.weights[state.global_step] = {name: p.detach().clone() for name, p in model.named_parameters()}
        if state.global_step + 1 in self.steps:
            parameter = next(p for p in model.parameters() if p.requires_grad)
            self.hook = parameter.register_hook(lambda gradient: gradient + self.value)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step in self.steps:
            self.hook.remove()


@pytest.mark.parametrize("max_grad_norm", [0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_spoilt_gradient_changes_no_weight(tmp_path, value, max_grad_norm):
    spoilt = SpoiltGradients(3, value=value)
    run = trainer(tmp_path, callbacks=[spoilt], max_steps=6, save_strategy="steps", save_steps=2, logging_steps=100,
                  max_grad_norm=max_grad_norm)  # fmt: skip
    with pytest.raises(InputError, match=r"is NaN or infinite at step 3 .*the last good checkpoint is .*checkpoint-2; resume"):
        run.train()
    now = dict(run.step.named_parameters())
    assert all(torch.equal(now[name], tensor) for name, tensor in spoilt.weights[2].items())


def test_a_spoilt_step_is_skipped(tmp_path):
    """A skipped step changes neither weights nor the optimizer's averages. The run continues, and the log counts the step."""
    spoilt = SpoiltGradients(3, 4)
    run = trainer(tmp_path, callbacks=[spoilt], max_steps=6, logging_steps=2, nan_steps="skip", weight_decay=0.1)
    run.train()
    weights = spoilt.weights
    for step in range(1, 5):  # weights[n] are those after n steps
        unchanged = all(torch.equal(weights[step][name], tensor) for name, tensor in weights[step - 1].items())
        assert unchanged == (step in (3, 4)), step
    assert [entry.get("skipped_steps") for entry in run.state.log_history if "loss" in entry] == [None, 2, None]
    assert all(torch.isfinite(p).all() for p in run.step.parameters())
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {4}


class SpoilOne(SimCSE):
    """A loss that is NaN or infinite in one call, counted from 1. It notes all its values."""

    def __init__(self, call: int, value: float = math.nan):
        super().__init__()
        self.call, self.value, self.losses = call, value, []

    def __call__(self, *args, **kwargs):
        loss = super().__call__(*args, **kwargs)
        loss = loss * self.value if len(self.losses) + 1 == self.call else loss
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("call", [1, 2, 6])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_logged_losses_are_means_of_the_finite_ones(tmp_path, call, accumulation, value):
    """BUG: Losses [2, NaN, 4] were logged as 2.33 and [NaN, 2, 4] as 2. The right value is 3."""
    objective = SpoilOne(call, value)
    run = trainer(tmp_path, objective=objective, max_steps=6, logging_steps=3, nan_steps="skip",
                  gradient_accumulation_steps=accumulation, per_device_train_batch_size=2)  # fmt: skip
    result = run.train()
    losses, middle = np.array(objective.losses), 3 * accumulation
    assert len(losses) == 2 * middle and np.isfinite(losses).sum() == len(losses) - 1
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert logged == pytest.approx([np.mean(part[np.isfinite(part)]) for part in (losses[:middle], losses[middle:])], abs=1e-5)
    whole = np.mean(losses[np.isfinite(losses)])
    assert result.training_loss == result.metrics["train_loss"] == pytest.approx(whole, abs=1e-5)
    assert run.state.log_history[-1]["train_loss"] == result.training_loss


def test_the_losses_after_the_last_log_count_too(tmp_path):
    objective = SpoilOne(5)
    result = trainer(tmp_path, objective=objective, max_steps=5, logging_steps=2, nan_steps="skip").train()
    assert result.training_loss == pytest.approx(np.mean(objective.losses[:4]), abs=1e-5)


def test_the_logged_loss_of_a_source_is_a_mean_of_the_finite_ones(tmp_path):
    objective = SpoilOne(2)
    run = ContrastiveTrainer(
        tiny_model(), arguments(tmp_path, max_steps=3, logging_steps=3, nan_steps="skip"), objective,
        [Source("a", Dataset.from_list(ROWS))], processing_class=small_tokenizer(),
    )  # fmt: skip
    run.train()
    (logged,) = [entry for entry in run.state.log_history if "loss" in entry]
    assert logged["loss_a"] == pytest.approx((objective.losses[0] + objective.losses[2]) / 2, abs=1e-4)


def test_a_log_without_a_finite_loss_has_none(tmp_path):
    run = trainer(tmp_path, objective=SpoilOne(2), max_steps=3, logging_steps=1, nan_steps="skip")
    run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert np.isnan(logged).tolist() == [False, True, False]


def test_without_a_skipped_step_losses_are_the_same_numbers(tmp_path):
    """Control: with and without counting, all logs are the same bit for bit, also with a small last step of an epoch."""
    settings = {"num_train_epochs": 2, "logging_steps": 2, "gradient_accumulation_steps": 3, "per_device_train_batch_size": 2}
    found = []
    for number, nan_steps in enumerate(("stop", "skip")):
        run = trainer(tmp_path / str(number), nan_steps=nan_steps, **settings)
        result = run.train()
        found.append([entry.get("loss") for entry in run.state.log_history] + [result.training_loss])
    assert found[0] == found[1] and len(found[0]) > 2


def test_a_loss_that_stays_no_number_ends_a_run_that_skips(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_embed.training.watch.MOST_SKIPPED", 3)
    run = trainer(tmp_path, objective=Spoil(), max_steps=20, logging_steps=1, nan_steps="skip")
    with pytest.raises(InputError, match="the gradients of 3 steps in a row were NaN or infinite, up to step 8"):
        run.train()


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_an_update_that_cannot_be_skipped_is_refused(tmp_path, optim, monkeypatch):
    run = trainer(tmp_path, nan_steps="skip")
    run.args.optim = optim
    with pytest.raises(InputError, match=f"nan_steps is skip, but {optim} updates weights while it computes gradients"):
        run.check_skipping()


def test_the_scaler_of_half_precision_keeps_its_own_way(tmp_path):
    run = trainer(tmp_path)
    run.accelerator.state._mixed_precision = "fp16"  # its scaler skips the step itself and lowers its factor
    next(run.step.parameters()).grad = torch.full_like(next(run.step.parameters()), math.inf)
    run._get_grad_norm(run.step)
    assert run.watch.norm is None


@pytest.mark.parametrize("settings", [{}, {"max_grad_norm": 0}])
def test_a_spoilt_step_is_skipped_in_half_precision(tmp_path, settings):
    """BUG: in fp16, a run with nan_steps skip ended at the first NaN loss, and did not count skipped steps."""
    run = trainer(tmp_path, objective=SpoilOne(3), max_steps=5, logging_steps=1, nan_steps="skip", **settings)
    run.accelerate_state[1]["_mixed_precision"] = "fp16"
    run.accelerator.native_amp, run.accelerator.scaler = True, torch.amp.GradScaler("cpu")
    assert run.train().global_step == 5
    logged = [(entry.get("skipped_steps", 0), math.isfinite(entry["grad_norm"])) for entry in run.state.log_history[:5]]
    assert logged == [(0, True), (0, True), (1, False), (0, True), (0, True)]
    assert run.accelerator.scaler.get_scale() == 2.0**15  # it was 2^16, and the scaler has halved it once


@pytest.mark.parametrize("value", ["never", ""])
def test_what_nan_steps_may_be(tmp_path, value):
    with pytest.raises(InputError, match="nan_steps is '.*'; it must be one of stop, skip"):
        trainer(tmp_path, nan_steps=value)
