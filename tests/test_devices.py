"""Test what other devices than a CPU lack, and models that are on several devices."""

import contextlib
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from test_trainer import ROWS, trainer
from torch import nn
from torch.distributed.fsdp import StateDictType
from torch.overrides import TorchFunctionMode
from transformers import TrainingArguments

from hf_embed import ContrastiveTrainingArguments, Encoder, SimCSE
from hf_embed.errors import InputError
from hf_embed.forward.activations import ChunkEncoder
from hf_embed.forward.packing import copy_to, precision
from hf_embed.objectives import CoSENT, ImprovedContrastive, MarginMSE, Matryoshka, TeacherKL, VectorDistillation
from hf_embed.training.mlm import mask_tokens


class OnApple(torch.Tensor):
    """A tensor on Apple's GPU: PyTorch has no float64 and no `pdist` there."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.pdist or function is torch.Tensor.double:
            raise TypeError(f"{function.__name__} on MPS")
        found = super().__torch_function__(function, types, args, kwargs)
        return found.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else found


def on_apple(model: nn.Module) -> nn.Module:
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(parameter.detach().as_subclass(OnApple)))
    return model


def test_a_training_on_apple(tmp_path):
    """BUG: the check of a new encoder used float64, and the statistics of a log used `pdist`."""
    sts = [{"sentence1": row["anchor"], "sentence2": row["positive"], "score": i} for i, row in enumerate(ROWS)]
    made = trainer(tmp_path, on_apple(tiny_model()), eval_dataset={"sts": sts, "held_out": ROWS[:4]}, logging_steps=1)
    made.train()
    made.evaluate()
    assert isinstance(made.encoder.encode("a cat", convert_to_tensor=True), OnApple)
    assert "uniformity" in made.state.log_history[0]


class Ids(torch.Tensor):
    """Token ids on Apple's GPU, by name."""

    device = torch.device("mps", 0)


def test_dropout_is_repeated_on_apple(monkeypatch):
    """BUG: PyTorch's checkpoints do not restore this random state, so the gradient was that of other dropout masks."""
    random = torch.Generator()  # that of the GPU
    monkeypatch.setattr(torch.mps, "get_rng_state", random.get_state)
    monkeypatch.setattr(torch.mps, "set_rng_state", random.set_state)
    module = nn.Linear(8, 1)
    encoder = ChunkEncoder(lambda ids: module.weight * torch.rand(8, generator=random), module, module, sharded=False)
    before = random.get_state()
    chunks = [encoder.recomputed(torch.ones(3).as_subclass(Ids)) for _ in range(2)]
    after = random.get_state()
    sum(chunks).sum().backward()
    assert torch.equal(random.get_state(), after)
    masks = torch.rand(2, 8, generator=random.set_state(before))
    assert torch.equal(module.weight.grad, masks.sum(0, keepdim=True)) and not torch.equal(*masks)


def test_a_training_on_the_cpu_of_a_machine_with_a_gpu(tmp_path, monkeypatch):
    """BUG: with `use_cpu`, the random state of the GPU was read, which takes memory there, or fails if it is full."""
    made = trainer(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_rng_state", lambda: pytest.fail("the GPU was used"))
    made.get_batch_samples(iter(made.get_train_dataloader()), 1, made.args.device)
    assert made.step_memory.begin() == 0 and len(made.step_memory.random) == 1


class NoNumbersFromTheHost(TorchFunctionMode):
    """A context in which copying numbers from the host fails where the host would wait for the GPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.new_tensor or function is torch.tensor and (kwargs or {}).get("device"):
            raise AssertionError(f"{function.__name__}: the host waits for the GPU")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "objective",
    [SimCSE(), SimCSE(guide_margin=0.0), ImprovedContrastive(), ImprovedContrastive(guide_margin=0.0, margin=None),
     Matryoshka(SimCSE(), [4, 8]), CoSENT(), TeacherKL(), MarginMSE(), VectorDistillation()],
    ids=lambda objective: type(objective).__name__,
)  # fmt: skip
def test_the_host_does_not_wait_for_the_gpu_in_an_objective(objective, monkeypatch):
    """Tensors on the meta device have no numbers that could be read. BUG: ImprovedContrastive waited for each loss."""
    rows, ids = torch.randn(4, 3, 8, device="meta", requires_grad=True), torch.ones(4, 3, device="meta", dtype=torch.long)
    shapes = {"scores": (4, 2), "teacher": (4, 3, 6), "target": (4, 3, 8)}
    given = {name: torch.ones(shapes[name], device="meta") for name in objective.needs}
    monkeypatch.setattr("torch.autocast", lambda *_, **__: contextlib.nullcontext())  # the meta device has none
    with NoNumbersFromTheHost():
        objective(rows, ids, rows, ids, 0, **given).backward()


def test_the_host_does_not_wait_for_the_gpu_to_mask_tokens():
    with NoNumbersFromTheHost():
        masked, labels = mask_tokens(torch.ones(9, device="meta", dtype=torch.long), small_tokenizer())
    assert masked.shape == labels.shape == (9,)


def test_a_model_on_several_devices_is_not_trained(tmp_path):
    """BUG: a model that `device_map` had spread ended in an error of PyTorch about meta tensors. It can encode."""
    tiny_encoder().save_pretrained(tmp_path / "model")
    places = {"embeddings": "cpu", "encoder.layer.0": "cpu", "encoder.layer.1": "disk", "encoder.layer.2": "disk",
              "pooler": "cpu"}  # fmt: skip
    spread = Encoder.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk")
    assert np.abs(spread.encode("a cat") - tiny_encoder().encode("a cat")).max() < 1e-5
    for model in (spread, spread.backbone):
        assert "on several devices (cpu, disk), which is only for encoding; load the model w" in error_of(
            trainer, tmp_path / "out", model
        )


@pytest.mark.parametrize("place", ["cpu", "cuda"])
def test_only_tensors_on_the_cpu_are_pinned(place):
    """BUG: a `training_step` of a subclass that moves its batch itself ended in PyTorch's "cannot pin" on a GPU."""
    calls, gpu = [], torch.device("cuda", 0)
    tensor = SimpleNamespace(device=torch.device(place), to=lambda device, **how: calls.append((device, how)))
    tensor.pin_memory = lambda: calls.append("pinned") or tensor
    copy_to(tensor, gpu)
    assert calls == (["pinned", (gpu, {"non_blocking": True})] if place == "cpu" else [(gpu, {})])


GATHERED = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize(
    ("by", "saved", "lost", "words"),
    [
        ("fsdp", {"state_dict_type": StateDictType.FULL_STATE_DICT}, {"state_dict_type": StateDictType.SHARDED_STATE_DICT},
         "fsdp_state_dict_type is SHARDED_STATE_DICT, .* set it to FULL_STATE_DICT"),
        ("deepspeed", {"hf_ds_config": HfDeepSpeedConfig({"zero_optimization": GATHERED})},
         {"hf_ds_config": HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})}, "ZeRO-3 gathers no weights, .* set zero3"),
    ],
    ids=["fsdp", "deepspeed"],
)  # fmt: skip
def test_a_run_that_would_save_no_model_is_refused(tmp_path, by, saved, lost, words):
    """BUG: such a run trained to its end and left no weights. accelerate's defaults for FSDP 2 and ZeRO-3 are such."""
    made = trainer(tmp_path)
    setattr(made, f"is_{by}_enabled", True)
    made.accelerator = SimpleNamespace(state=SimpleNamespace(**{f"{by}_plugin": SimpleNamespace(**saved)}))
    made.check_gathering()
    setattr(made.accelerator.state, f"{by}_plugin", SimpleNamespace(**lost))
    with pytest.raises(InputError, match=words):
        made.train()


def test_vectors_on_two_devices_are_compared():
    """BUG: a query on a GPU and stored vectors in an array ended in an error of PyTorch."""
    on_gpu, stored = torch.ones(2, 32, device="meta"), np.ones((2, 32), dtype=np.float32)
    first, second, compare = tiny_encoder().comparable(on_gpu, stored, None)
    assert first.device == second.device == compare(first, second).device == on_gpu.device


@pytest.mark.parametrize(
    ("launched", "given", "expected"),
    [
        ("bf16", {}, (True, False)),
        ("fp16", {}, (False, True)),
        ("no", {}, (False, False)),
        ("bf16", {"fp16": True}, (False, True)),
    ],
)
def test_deepspeed_takes_the_precision_of_the_launcher(tmp_path, monkeypatch, launched, given, expected):
    """BUG: zero2_8gpu.yaml ended in an error of transformers, unless --bf16 was given too."""
    real, seen = importlib.util.find_spec, []

    def as_transformers_sees_them(args):  # the package deepspeed is not needed here
        seen.append((args.bf16, args.fp16))
        raise ValueError("enough")

    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: name == "deepspeed" or real(name, *more))
    monkeypatch.setattr(TrainingArguments, "__post_init__", as_transformers_sees_them)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    for by_deepspeed in ("true", "false"):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", by_deepspeed)
        error_of(ContrastiveTrainingArguments, str(tmp_path), report_to="none", **given)
    assert seen == [expected, (False, "fp16" in given)]  # control: without DeepSpeed, accelerate reads the launcher's precision


def test_a_model_without_flash_attention_is_not_asked_for_its_device():
    """BUG: in the backward pass of FSDP 1, which shows no parameters then, gradient caching ended in StopIteration."""
    model = tiny_model()
    model.parameters = lambda *_: iter(())
    assert isinstance(precision(model), contextlib.nullcontext)
