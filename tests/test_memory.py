"""Test a GPU whose memory is full: the step is repeated in smaller chunks and gives the same gradient."""

import logging
import re

import pytest
import torch
from conftest import error_of, tiny_model
from test_trainer import NO_DROPOUT, trainer

from hf_embed.errors import RankError

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Full:
    """A forward hook on the passes of `encode_in_chunks` through the model. It raises where the memory would be full."""

    def __init__(self, at: list[int], backward: bool = False, above: int | None = None):
        self.at, self.backward, self.above, self.passes = at, backward, above, 0

    def __call__(self, module, inputs, output):
        if not (module.training and torch.is_grad_enabled()):
            return
        self.passes += 1
        texts, length = output.last_hidden_state.shape[:2]
        full = self.passes in self.at or (self.above is not None and texts * length > self.above)
        if full and not self.backward:
            raise FULL
        if full:
            output.last_hidden_state.register_hook(self.fail)

    def fail(self, gradient):
        raise FULL


def run(folder, full=None, dropout=False, **settings):
    """Train two steps in float64, with two batches accumulated. Return the trainer, the weights and the losses."""
    model = tiny_model(**({} if dropout else NO_DROPOUT)).double()
    made = trainer(folder, model, max_steps=2, gradient_accumulation_steps=2, logging_steps=1, chunk_tokens=40, optim="sgd",
                   **settings)  # fmt: skip
    full = full or Full([])
    made.encoder.backbone.register_forward_hook(full)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return made, {name: tensor.detach().clone() for name, tensor in made.step.named_parameters()}, losses


def difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return run(tmp_path_factory.mktemp("calm"))


# `at` is the number of the chunk at which the memory is full. There are three batches of three chunks each. The first two
# batches are the first step. The backward pass of a batch begins with its last chunk.
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("at", [4, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 3, 6, 7, 9))])
def test_the_step_begins_again_with_the_same_gradient(calm, tmp_path, caplog, at, backward):
    caplog.set_level(logging.WARNING)
    full = Full([at], backward)
    made, weights, losses = run(tmp_path, full)
    assert made.args.chunk_tokens == 20 and made.args.gradient_caching
    assert caplog.text.count("GPU memory is full") == 1
    assert "this step is repeated, and it and all later steps use chunk_tokens 20 and gradient_caching" in caplog.text
    assert difference(weights, calm[1]) < 1e-12
    assert losses == pytest.approx(calm[2], rel=1e-12)


def test_control_without_beginning_again_the_gradient_is_another_one(calm, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_embed.guarded_trainer.StepMemory.restore", lambda self, model: None)
    _, weights, _ = run(tmp_path, Full([4], backward=True))
    assert difference(weights, calm[1]) > 1e-6


def test_random_numbers_are_drawn_again(tmp_path, monkeypatch):
    """If the chunks stay the same, dropout draws the same numbers in the repeated step."""
    monkeypatch.setattr("hf_embed.guarded_trainer.GuardedTrainer._use_less_memory", lambda self, error: None)
    calm, full = (run(tmp_path / str(at), Full(at, backward=True), dropout=True)[1] for at in ([], [4]))
    assert difference(calm, full) == 0


def test_the_budget_is_halved_until_it_fits(calm, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    made, weights, _ = run(tmp_path, Full([], above=12))
    assert made.args.chunk_tokens == 10
    assert re.findall(r"this step is repeated, and it and all later steps use chunk_tokens (\d+)", caplog.text) == ["20", "10"]
    assert difference(weights, calm[1]) < 1e-12


def test_a_single_text_that_does_not_fit_ends_the_run_in_one_line(tmp_path):
    message = error_of(run, tmp_path, Full([], above=0))
    assert message.startswith("GPU memory is full at step 1, even with a single text at a time")


def test_several_processes_are_refused_in_one_line(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    made.get_batch_samples(iter(made.get_train_dataloader()), 1, torch.device("cpu"))
    monkeypatch.setattr(type(made.args), "world_size", 2)
    with pytest.raises(RankError, match="GPU memory of process 0 is full at step 1; set a smaller chunk_tokens, grad"):
        made._use_less_memory(FULL)
