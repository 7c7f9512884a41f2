"""Test a GPU whose memory is full: a step is repeated in smaller chunks with the same gradient, and a model can be saved."""

import copy
import gc
import logging
import re

import numpy as np
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from peft import LoraConfig, get_peft_model
from test_export import CHECKS, TEXTS, shift
from test_trainer import NO_DROPOUT, trainer
from transformers import BertForMaskedLM, PreTrainedModel

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, SimCSE
from hf_embed.checkpoint import verify
from hf_embed.errors import RankError
from hf_embed.forward.activations import Activations
from hf_embed.kit.cli import parse
from hf_embed.library_internals import CHECKPOINTING

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Full:
    """A forward hook on the passes of `encode_in_chunks` through the model. It raises where the memory would be full."""

    def __init__(self, at: list[int], backward: bool = False, above: int | None = None):
        self.at, self.backward, self.above, self.passes = at, backward, above, 0

    def __call__(self, module, inputs, output):
        if not module.training:
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


# `at` is the number of the chunk at which the memory is full. There are three batches, of two, three and two chunks. The first
# two batches are the first step. The backward pass of a batch begins with its last chunk.
@pytest.mark.parametrize("backward", [True, False])
@pytest.mark.parametrize("at", [4, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 3, 5, 6, 7))])
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
    monkeypatch.setattr("hf_embed.training.guarded_trainer.StepMemory.restore", lambda self, model: None)
    _, weights, _ = run(tmp_path, Full([4], backward=True))
    assert difference(weights, calm[1]) > 1e-6


def test_random_numbers_are_drawn_again(tmp_path, monkeypatch):
    """If the chunks stay the same, dropout draws the same numbers in the repeated step."""
    monkeypatch.setattr("hf_embed.training.guarded_trainer.GuardedTrainer._use_less_memory", lambda self, error: None)
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
    with pytest.raises(
        RankError, match="GPU memory of process 0 is full at step 1; set a smaller chunk_tokens, grad.* to true"
    ):
        made._use_less_memory(FULL)


# ---- activations as needed ----


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Let the CPU count as a GPU whose tensors take 100 bytes for each token of a kept chunk, with 6,000 unused bytes."""
    for module in ("arguments", "training.guarded_trainer"):
        monkeypatch.setattr(f"hf_embed.{module}.check_caching", lambda caching, device: None)
    monkeypatch.setattr("hf_embed.forward.activations.unused", lambda device: 6000)
    monkeypatch.setattr("hf_embed.forward.activations.forget_peak", lambda device: None)
    monkeypatch.setattr(Activations, "keep", keep_100_bytes)


def keep_100_bytes(self, encode, tokens, *inputs):
    self.per_token = 100.0
    return encode(*inputs)


def counted(folder, full=None, **settings):
    """Train as `run` does. Also return how often the model ran in training mode."""
    passes = full or Full([])
    return *run(folder, passes, dropout=True, **settings), passes.passes


def test_as_needed_trains_the_same_weights_with_fewer_passes(tmp_path, like_a_gpu):
    made, weights, losses, some = counted(tmp_path / "some", gradient_caching="as_needed")
    _, expected, expected_losses, all_chunks = counted(tmp_path / "all", gradient_caching=True)
    _, _, _, none = counted(tmp_path / "none")
    assert difference(weights, expected) == 0 and losses == expected_losses
    assert made.activations.limit == 4800
    assert none < some < all_chunks


def test_full_memory_recomputes_all_chunks_and_keeps_their_size(tmp_path, like_a_gpu, caplog):
    caplog.set_level(logging.WARNING)
    made, weights, _, _ = counted(tmp_path / "full", Full([5]), gradient_caching="as_needed")
    _, expected, _, _ = counted(tmp_path / "all", gradient_caching=True)
    assert (made.args.gradient_caching, made.args.chunk_tokens) == (True, 40)
    assert caplog.text.count("GPU memory is full at step 1; this step is repeated") == 1
    assert difference(weights, expected) == 0


@pytest.mark.parametrize("value", ["as_needed", "sometimes", 2, None])
def test_values_that_are_not_supported_here_are_refused(tmp_path, value):
    wanted = "needs a GPU" if value == "as_needed" else "must be True, False or 'as_needed'"
    assert wanted in error_of(trainer, tmp_path, gradient_caching=value)


@pytest.mark.parametrize("name", sorted({CHECKPOINTING, "gradient_checkpointing"}))
def test_reentrant_checkpoints_of_layers(tmp_path, name):
    settings = {name: True, f"{name}_kwargs": {"use_reentrant": True}}
    weights = []
    for number, given in enumerate(({}, {"gradient_caching": True}, {"gradient_caching": True, name: True}, settings)):
        weights.append(run(tmp_path / str(number), dropout=True, **given)[1])
    assert [difference(other, weights[0]) for other in weights[1:3]] == [0, 0]
    assert difference(weights[3], weights[0]) < 1e-15  # it adds in another order


def test_a_value_that_a_script_sets_later_is_checked(tmp_path):
    args = ContrastiveTrainingArguments(tmp_path, use_cpu=True, report_to="none")
    args.gradient_caching = "as_needed"
    assert "needs a GPU" in error_of(ContrastiveTrainer, tiny_model(), args, processing_class=small_tokenizer())


@pytest.mark.parametrize(
    ("words", "value"),
    [([], False), (["--gradient_caching"], True), (["--gradient_caching", "false"], False),
     (["--gradient_caching", "true"], True), (["--gradient_caching", "as_needed"], "as_needed")],
)  # fmt: skip
def test_flag(tmp_path, like_a_gpu, words, value):
    argv = ["--output_dir", str(tmp_path), *words]
    assert parse([ContrastiveTrainingArguments], argv=argv)[0].gradient_caching == value


@pytest.mark.parametrize("value", ["false", "true", "as_needed"])
def test_yaml(tmp_path, like_a_gpu, value):
    config = tmp_path / "config.yaml"
    config.write_text(f"gradient_caching: {value}\noutput_dir: {tmp_path}\n")
    made = parse([ContrastiveTrainingArguments], argv=["--config", str(config)])[0]
    assert made.gradient_caching == {"false": False, "true": True}.get(value, value)


def test_a_misspelled_value_on_the_command_line(tmp_path):
    argv = ["--output_dir", str(tmp_path), "--gradient_caching", "sometimes"]
    assert "gradient_caching" in error_of(parse, [ContrastiveTrainingArguments], argv=argv)


# ---- gradient caching changes no weight ----


def masked_lm(model):
    return BertForMaskedLM(model.config)


def word_adapters(model):
    return get_peft_model(model, LoraConfig(target_modules=["query", "word_embeddings"]))


def frozen_words(model):
    model.embeddings.requires_grad_(False)
    return model


KINDS = {
    "plain": (lambda model: model, {}),
    "masked words": (masked_lm, {"objective": SimCSE(mlm_weight=0.1)}),  # its head reads the word table too
    "word adapters": (word_adapters, {}),
    "frozen words": (frozen_words, {}),
    "training head": (lambda model: model, {"pooling": "cls_mlp_train"}),
    "accumulated": (lambda model: model, {"gradient_accumulation_steps": 2}),
}


@pytest.mark.parametrize(("kind", "bf16"), [*((kind, False) for kind in KINDS), ("plain", True), ("masked words", True)])
def test_caching_ends_in_the_same_weights(kind, bf16, tmp_path):
    """Bit for bit, after two steps with dropout. Another seed ends in other weights (negative control)."""
    change, settings = KINDS[kind]

    def weights(folder, seed=1, **caching):
        torch.manual_seed(0)
        made = trainer(tmp_path / folder, change(tiny_model()), max_steps=2, chunk_tokens=40, bf16=bf16, seed=seed, **settings,
                       **caching)  # fmt: skip
        made.train()
        return {name: tensor.detach().clone() for name, tensor in made.step.named_parameters()}

    expected = weights("kept")
    assert difference(weights("recomputed", gradient_caching=True), expected) == 0
    if kind == "plain":
        assert difference(weights("other", seed=2), expected) > 0


# ---- saving ----

GPU = torch.device("cpu", 0)  # PyTorch computes on it as on the CPU, but it is another device by name


def full_on_gpu(function, device_of):
    """Return `function`, which fails for lack of memory if `device_of` its arguments is the GPU."""

    def changed(*args, **kwargs):
        if device_of(args) == GPU:
            raise FULL
        return function(*args, **kwargs)

    return changed


@pytest.mark.parametrize("loader", CHECKS)
@pytest.mark.parametrize("by", [0, 5e-5, 2e-4])
def test_a_gpu_without_memory_for_a_second_model(tmp_path, monkeypatch, loader, by):
    """BUG: a save ended in an OutOfMemoryError of the check, for example at the first checkpoint of a run."""
    encoder = tiny_encoder()
    monkeypatch.setattr(Encoder, "device", GPU)
    shift(monkeypatch, loader, by * float(np.linalg.norm(encoder.encode("a cat"))) / 32**0.5)
    monkeypatch.setattr(verify, loader, full_on_gpu(getattr(verify, loader), lambda args: args[-1]))
    if by < 1e-4:  # two devices round differently
        encoder.save_pretrained(tmp_path)
        assert np.abs(Encoder.from_pretrained(tmp_path).encode("a cat") - encoder.encode("a cat")).max() < 1e-5
    else:
        with pytest.raises(verify.ExportError, match="tolerance 1e-04"):
            encoder.save_pretrained(tmp_path)


def test_no_copy_stays_on_the_gpu(tmp_path, monkeypatch):
    """BUG: the model of sentence-transformers refers to itself, so it stayed until Python collected its garbage."""
    encoder = tiny_encoder()
    monkeypatch.setattr(Encoder, "device", GPU)
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(each, PreTrainedModel) for each in gc.get_objects())
        encoder.save_pretrained(tmp_path)
        assert sum(isinstance(each, PreTrainedModel) for each in gc.get_objects()) == before
    finally:
        gc.enable()


def test_a_cpu_without_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "through_automodel", full_on_gpu(verify.through_automodel, lambda args: GPU))
    with pytest.raises(torch.OutOfMemoryError):
        tiny_encoder().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_adapters_are_merged_on_the_cpu_if_the_gpu_is_full(tmp_path, monkeypatch):
    encoder = Encoder(get_peft_model(tiny_model(), LoraConfig(init_lora_weights=False)), small_tokenizer())
    expected, deepcopy = encoder.encode(TEXTS), copy.deepcopy

    def on_gpu(model, memo=None):
        if isinstance(model, torch.nn.Module) and not memo:
            raise FULL
        return deepcopy(model, memo)

    monkeypatch.setattr("hf_embed.adapters.copy.deepcopy", on_gpu)
    np.testing.assert_allclose(encoder.encode(TEXTS, device=["cpu", "cpu"]), expected, atol=1e-5)
    encoder.save_pretrained(tmp_path)
    for saved in (encoder, Encoder.from_pretrained(tmp_path)):
        np.testing.assert_allclose(saved.encode(TEXTS), expected, atol=1e-5)
