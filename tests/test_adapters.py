"""PEFT adapters, added in any way. Mergeable ones are trained, resumed, merged and saved; others are refused at the start."""

import copy
import logging

import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    inject_adapter_in_model,
)
from transformers import AutoModel, BertForMaskedLM
from worker import WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, SimCSE

ROWS = [{"anchor": f"the {a}", "positive": f"a {a} by the {b}"} for a, b in zip(WORDS, WORDS[1:] + WORDS[:1])]
TEXTS = ["the cat", "rain on the river", "a house where nobody has lived for years"]
TARGETS = ["query", "value"]
CONFIGS = {
    "lora": LoraConfig(target_modules="all-linear", r=4),
    "dora": LoraConfig(target_modules=TARGETS, r=4, use_dora=True),
    "rslora with bias": LoraConfig(target_modules=TARGETS, r=4, use_rslora=True, bias="lora_only"),
    "lora of the word table": LoraConfig(target_modules=["query", "word_embeddings"], r=4),
    "lora and whole modules": LoraConfig(target_modules=TARGETS, r=4, modules_to_save=["LayerNorm"]),
    "some tokens": LoraConfig(target_modules=TARGETS, r=4, trainable_token_indices=[10, 11, 12]),
    "ia3": IA3Config(target_modules=["query", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "loha": LoHaConfig(target_modules=TARGETS, r=4),
    "oft": OFTConfig(target_modules=TARGETS, oft_block_size=4),
    "norms": LNTuningConfig(target_modules=["LayerNorm"]),
    "adalora": AdaLoraConfig(target_modules=TARGETS, init_r=4, target_r=2, total_step=10),
}


def wrapped(config, model=None):
    return get_peft_model(model or tiny_model(), copy.deepcopy(config))


def added(config, model=None):
    model = model or tiny_model()
    model.add_adapter(copy.deepcopy(config))
    return model


def trainer(folder, model, objective=None, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True,
                "save_strategy": "no", "learning_rate": 3e-2, "seed": 3}  # fmt: skip
    return ContrastiveTrainer(
        model=model, processing_class=small_tokenizer(), objective=objective, train_dataset=Dataset.from_list(ROWS),
        args=ContrastiveTrainingArguments(str(folder), **(defaults | settings)),
    )  # fmt: skip


def vectors(encoder):
    return encoder.encode(TEXTS, convert_to_tensor=True)


def apart(a, b):
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).max().item()


FAST = {"lora", "lora and whole modules"}


@pytest.mark.parametrize("put", [wrapped, added])
@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def test_trained_and_saved_as_an_ordinary_checkpoint(name, put, tmp_path):
    before = vectors(tiny_encoder())
    run = trainer(tmp_path, put(CONFIGS[name]))
    run.train()
    run.save_model()
    trained = vectors(run.encoder)
    assert apart(trained, before) > 1e-3  # control: the training changed the model
    assert not list(tmp_path.glob("adapter*"))
    assert apart(vectors(Encoder.from_pretrained(tmp_path)), trained) < 1e-5
    assert AutoModel.from_pretrained(tmp_path).state_dict().keys() == tiny_model().state_dict().keys()
    assert apart(vectors(run.encoder), trained) == 0  # the model that is trained keeps its adapters
    assert any(p.requires_grad for p in run.encoder.parameters())


@pytest.mark.parametrize("put", [wrapped, added])
@pytest.mark.parametrize(
    "name", ["lora and whole modules", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dora", "ia3"))]
)
def test_resumed_bit_for_bit(name, put, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 5}

    def weights(folder, resume=None):
        torch.manual_seed(0)
        run = trainer(folder, put(CONFIGS[name]), **settings)
        run.train(resume_from_checkpoint=resume)
        return {n: p.detach().clone() for n, p in run.step.named_parameters()}

    whole = weights(tmp_path / "whole")
    resumed = weights(tmp_path / "resumed", resume=str(tmp_path / "whole" / "checkpoint-2"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def randomised(model):
    """Give all LoRA weights random values, so that no adapter is zero, as after a training."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("active", ["one", "other", ["one", "other"]])
def test_active_adapters_are_merged_and_others_left_out(active, tmp_path):
    model = tiny_model()
    for name in ("one", "other"):
        model.add_adapter(LoraConfig(target_modules=TARGETS, r=4), adapter_name=name)
    randomised(model).set_adapter(active)
    encoder = Encoder(model, small_tokenizer())
    expected = vectors(encoder)
    encoder.save_pretrained(tmp_path)
    assert apart(vectors(Encoder.from_pretrained(tmp_path)), expected) < 1e-5
    model.set_adapter(["one"] if active != "one" else ["other"])
    assert apart(vectors(encoder), expected) > 1e-3  # control: the adapters differ


@pytest.mark.parametrize("put", [wrapped, added])
def test_adapters_that_are_switched_off_are_left_out(put, tmp_path):
    model = randomised(put(CONFIGS["lora"]))
    on = vectors(Encoder(model, small_tokenizer()))
    (model.base_model.disable_adapter_layers if put is wrapped else model.disable_adapters)()
    encoder = Encoder(model, small_tokenizer())
    encoder.save_pretrained(tmp_path)
    assert apart(vectors(Encoder.from_pretrained(tmp_path)), vectors(encoder)) < 1e-5
    assert apart(on, vectors(encoder)) > 1e-3  # control: the adapters change the vectors


# BUG: transformers had loaded the adapters and saved all weights under the names that adapters have, and the save was refused.
@pytest.mark.parametrize("auto", [True, False])
def test_adapters_that_transformers_loads_are_merged(auto, tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    peft_model = randomised(wrapped(CONFIGS["lora"], AutoModel.from_pretrained(tmp_path / "base")))
    expected = vectors(Encoder(peft_model, small_tokenizer()))
    peft_model.save_pretrained(tmp_path / "adapter")
    model = AutoModel.from_pretrained(tmp_path / ("adapter" if auto else "base"))
    if not auto:
        model.load_adapter(tmp_path / "adapter")
    Encoder(model, small_tokenizer()).save_pretrained(tmp_path / "merged")
    assert apart(vectors(Encoder.from_pretrained(tmp_path / "merged")), expected) < 1e-5


def test_injected_by_peft_and_scaled(tmp_path):
    """`inject_adapter_in_model` does not change the class of the model. TempScale is folded after the merge."""
    model = randomised(inject_adapter_in_model(LoraConfig(target_modules=TARGETS, r=4), tiny_model()))
    run = trainer(tmp_path, model, temp_scale=0.7)
    run.train()
    run.save_model()
    loaded = Encoder.from_pretrained(tmp_path)
    assert apart(vectors(loaded), vectors(run.encoder)) < 1e-5
    assert loaded.config.temp_scale["folded"] is True


def test_adapters_of_several_kinds_are_refused(tmp_path):
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["query"], r=4), "one", mixed=True)
    model.add_adapter("other", LoHaConfig(target_modules=["value"], r=4))
    for function, words in ((trainer, (tmp_path, model)), (Encoder, (model, small_tokenizer()))):
        assert "PeftMixedModel is not supported; use adapters of one kind" in error_of(function, *words)


PROMPTS = {
    "PREFIX_TUNING": PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4),
    "PROMPT_TUNING": PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4),
    "P_TUNING": PromptEncoderConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=4, encoder_hidden_size=32),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_are_refused_by_name(kind, tmp_path):
    model = wrapped(PROMPTS[kind])
    message = error_of(trainer, tmp_path / "out", model)
    assert f"the kind {kind} cannot be merged" in message and "LoraConfig" in message
    assert f"the kind {kind} cannot be merged" in error_of(Encoder, model, small_tokenizer())
    assert not (tmp_path / "out").exists()


def test_what_peft_cannot_merge_is_refused_before_the_training(tmp_path):
    config = LoraConfig(target_modules=TARGETS, r=4, alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM")
    for put in (added,):
        assert "the kind LORA cannot be merged" in error_of(trainer, tmp_path, put(config))


def test_adapters_of_replicated_layers_are_refused(tmp_path):
    """BUG: a saved adapter of this kind was merged into the layers that share weights, and its vectors were wrong."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    tiny_encoder().save_pretrained(base)
    model = wrapped(LoraConfig(target_modules=["query"], layer_replication=[[0, 2], [1, 2]]), AutoModel.from_pretrained(base))
    model.save_pretrained(adapter)
    for function, words in ((trainer, (tmp_path / "out", model)), (Encoder.from_pretrained, (str(adapter),))):
        assert "cannot be merged into the model's weights: layer_replication" in error_of(function, *words)


def test_quantised_bases_are_refused(tmp_path):
    model = added(CONFIGS["lora"])
    model.is_quantized = True  # bitsandbytes sets this attribute
    assert "quantized weights" in error_of(trainer, tmp_path, model)


def test_vera_shares_tensors_and_is_merged_all_the_same(tmp_path):
    run = trainer(tmp_path, wrapped(VeraConfig(target_modules=TARGETS, r=8)))
    run.train()
    run.save_model()
    assert apart(vectors(Encoder.from_pretrained(tmp_path)), vectors(run.encoder)) < 1e-5


@pytest.mark.parametrize("put", [wrapped, added])
def test_mlm_auxiliary_is_refused(put, tmp_path):
    model = put(CONFIGS["dora"], BertForMaskedLM(tiny_model().config))
    assert "mlm_weight trains all weights" in error_of(trainer, tmp_path, model, SimCSE(mlm_weight=0.1))


@pytest.mark.parametrize("put", [wrapped, added])
def test_adapters_on_a_model_with_a_head_are_refused(put, tmp_path):
    model = put(CONFIGS["dora"], BertForMaskedLM(tiny_model().config))
    assert "the adapters are on a BertForMaskedLM" in error_of(trainer, tmp_path, model)


def test_adapters_that_nothing_touches_are_frozen(tmp_path, caplog):
    """The adapters are on all linear layers. One of these is the pooler, which mean pooling does not use."""
    with caplog.at_level(logging.INFO, logger="hf_embed"):
        run = trainer(tmp_path, added(CONFIGS["lora"]))
    assert "pooler.dense.lora_A.default.weight" in caplog.text
    trained = {name for name, p in run.step.named_parameters() if p.requires_grad}
    assert trained and not any("pooler" in name for name in trained)
