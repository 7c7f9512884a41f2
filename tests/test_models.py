"""Test special properties of models: heads, unused parameters, half precision, and optimizers created before the trainer."""

import copy
import logging
import time

import pytest
import torch
import transformers
import worker_unused
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from test_distributed import HERE, launch, relative_error, run
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForPreTraining,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    BertModel,
)
from worker import NO_DROPOUT, WORDS

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, ImprovedContrastive, SimCSE
from hf_embed.step import make_step
from hf_embed.training.unused import freeze_unused

ROWS = [{"anchor": f"the {a}", "positive": f"a {a} by the {b}"} for a, b in zip(WORDS, WORDS[1:] + WORDS[:1])]
TEXTS = ["the cat", "rain on the river", "a house where nobody has lived for years"]


def arguments(folder, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 3, "report_to": [], "disable_tqdm": True, "use_cpu": True,
                "save_strategy": "no", "learning_rate": 1e-2}  # fmt: skip
    return ContrastiveTrainingArguments(str(folder), **(defaults | settings))


def trainer(folder, model, objective=None, optimizers=(None, None), **settings):
    return ContrastiveTrainer(
        model=model, processing_class=small_tokenizer(), objective=objective, train_dataset=Dataset.from_list(ROWS),
        args=arguments(folder, **settings), optimizers=optimizers,
    )  # fmt: skip


# ---- models with a head ----

HEADS = {
    "bert": [AutoModelForMaskedLM, AutoModelForTokenClassification, AutoModelForSequenceClassification,
             AutoModelForPreTraining, AutoModelForQuestionAnswering, AutoModelForMultipleChoice, AutoModelForCausalLM],
    "roberta": [AutoModelForMaskedLM],
    "distilbert": [AutoModelForMaskedLM],
    "modernbert": [AutoModelForMaskedLM],
    "qwen3": [AutoModelForCausalLM, AutoModelForSequenceClassification],
}  # fmt: skip


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in HEADS.items() for kind in kinds])
def test_a_head_is_left_out_and_said(name, kind, tmp_path, caplog):
    plain = tiny_model(name)
    model = kind.from_config(plain.config)
    model.base_model.load_state_dict(plain.state_dict(), strict=False)
    pooling = "last" if name == "qwen3" else "mean"
    expected = Encoder(plain, small_tokenizer(), pooling).encode(TEXTS, convert_to_tensor=True)
    run = trainer(tmp_path, model, pooling=pooling)
    warnings = [record.message for record in caplog.records if record.name == "hf_embed.text_models"]
    assert len(warnings) == 1 and type(model).__name__ in warnings[0]
    assert f"its {type(plain).__name__} is used, without the head" in warnings[0]
    assert torch.equal(run.encoder.encode(TEXTS, convert_to_tensor=True), expected)
    assert run.encoder.backbone is model.base_model
    assert torch.equal(Encoder(model, small_tokenizer(), pooling).encode(TEXTS, convert_to_tensor=True), expected)


def test_what_was_taken_is_saved(tmp_path):
    run = trainer(tmp_path, AutoModelForSequenceClassification.from_config(tiny_model().config))
    run.train()
    run.save_model()
    assert type(AutoModel.from_pretrained(tmp_path)) is BertModel
    expected, got = (e.encode(TEXTS, convert_to_tensor=True) for e in (run.encoder, Encoder.from_pretrained(tmp_path)))
    assert (got - expected).abs().max() < 1e-5


def test_models_without_a_head_are_taken_as_they_are(caplog):
    for name in ("bert", "distilbert", "modernbert", "qwen3"):
        model = tiny_model(name)
        assert Encoder(model, small_tokenizer()).backbone is model
    assert not caplog.messages


def test_what_is_within_has_to_be_a_model_by_itself(tmp_path):
    from transformers import DPRConfig, DPRQuestionEncoder, T5Config, T5EncoderModel, T5ForTokenClassification

    model = DPRQuestionEncoder(DPRConfig(**worker_unused.SMALL))
    assert "its DPREncoder cannot be saved by itself" in error_of(trainer, tmp_path, model)
    t5 = T5Config(vocab_size=12000, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4, pad_token_id=0)
    assert type(Encoder(T5ForTokenClassification(t5), small_tokenizer()).backbone) is T5EncoderModel


def test_the_mlm_auxiliary_keeps_its_head(tmp_path, caplog):
    run = trainer(tmp_path, BertForMaskedLM(tiny_model().config), SimCSE(mlm_weight=0.1))
    assert run.step.mlm_head is not None and "without the head" not in caplog.text


# ---- parameters that no embedding depends on ----


def frozen(model, folder, **settings):
    run = trainer(folder, model, **settings)
    return {name.removeprefix("backbone.") for name, p in run.encoder.named_parameters() if not p.requires_grad}, run.args


def test_the_pooler_is_frozen_unless_it_is_the_head(tmp_path, caplog):
    pooler = {"pooler.dense.weight", "pooler.dense.bias"}
    with caplog.at_level(logging.INFO, logger="hf_embed"):
        assert frozen(tiny_model(), tmp_path)[0] == pooler
    said = [message for message in caplog.messages if "do not affect the embedding" in message]
    assert len(said) == 1 and said[0].startswith("2 parameters (1,056 numbers)") and "pooler.dense.weight" in said[0]
    for pooling in ("cls", "cls_mlp_train", "first_last"):
        assert frozen(tiny_model(), tmp_path, pooling=pooling)[0] == pooler
    assert frozen(tiny_model(), tmp_path, pooling="cls_mlp")[0] == set()


def test_whatever_it_is_called(tmp_path):
    names, args = frozen(worker_unused.make("longformer"), tmp_path)
    assert {name.split(".")[-2] for name in names} == {"query_global", "key_global", "value_global", "dense"}
    assert args.ddp_find_unused_parameters is False
    names, args = frozen(worker_unused.make("luke"), tmp_path)
    assert {"entity_embeddings.entity_embeddings.weight", "encoder.layer.1.attention.self.e2e_query.weight"} <= names
    assert args.ddp_find_unused_parameters is False


def test_parameters_that_other_batches_touch_are_trained(tmp_path):
    """Examples are experts to which no token of the probe was routed, and layers that are dropped at random."""
    for kind in ("switch", "biogpt"):
        names, args = frozen(worker_unused.make(kind), tmp_path)
        assert names == set() and args.ddp_find_unused_parameters is True
    model = worker_unused.make("biogpt")
    model.config.layerdrop = 0.0
    assert frozen(model, tmp_path)[1].ddp_find_unused_parameters is False


def test_parameters_that_only_long_texts_use():
    """BUG: DDP would have waited for their gradients in a batch of short texts."""
    model, args = tiny_model(), ContrastiveTrainingArguments("unused", use_cpu=True, report_to=[])
    embed, late = model.embeddings.forward, torch.nn.Parameter(torch.zeros(32))
    model.embeddings.register_parameter("late", late)

    def forward(*inputs, **named):
        states = embed(*inputs, **named)
        return torch.cat([states[:, :8], states[:, 8:] + late], dim=1) if states.shape[1] > 8 else states

    model.embeddings.forward = forward
    freeze_unused(Encoder(model, small_tokenizer()), args)
    assert late.requires_grad and args.ddp_find_unused_parameters is True


def test_experts_in_one_tensor_need_no_search(tmp_path):
    config = AutoConfig.for_model(
        "qwen2_moe", vocab_size=12000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=32,
        num_experts_per_tok=1, pad_token_id=0,
    )  # fmt: skip
    names, args = frozen(AutoModel.from_config(config), tmp_path, pooling="last")
    assert names == set() and args.ddp_find_unused_parameters is False


def test_nothing_else_is_touched():
    """Random states, gradients, training modes, weights, and parameters that the user has frozen stay as they are."""
    encoder = tiny_encoder().train()
    encoder.backbone.encoder.layer[1].eval()
    encoder.backbone.embeddings.requires_grad_(False)
    modes = [module.training for module in encoder.modules()]
    gradient = torch.ones_like(encoder.backbone.encoder.layer[0].output.dense.weight)
    encoder.backbone.encoder.layer[0].output.dense.weight.grad = gradient.clone()
    weights, state = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    args = ContrastiveTrainingArguments("unused", use_cpu=True, report_to=[])
    freeze_unused(encoder, args)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in encoder.modules()] == modes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in encoder.state_dict().items())
    grads = {name for name, p in encoder.named_parameters() if p.grad is not None}
    assert grads == {"backbone.encoder.layer.0.output.dense.weight"}
    assert torch.equal(encoder.backbone.encoder.layer[0].output.dense.weight.grad, gradient)
    still = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert still == {
        f"backbone.{name}" for name, _ in encoder.backbone.named_parameters() if name.startswith(("embeddings", "pooler"))
    }


def test_a_later_training_may_use_what_an_earlier_one_froze():
    """BUG: the pooler of a model that was first trained with mean pooling was not trained with the pooling cls_mlp."""
    model, args = tiny_model(), ContrastiveTrainingArguments("unused", use_cpu=True, report_to=[])
    model.embeddings.requires_grad_(False)
    for pooling, still in (("mean", ("embeddings", "pooler")), ("cls_mlp", "embeddings"), ("cls", ("embeddings", "pooler"))):
        freeze_unused(Encoder(model, small_tokenizer(), pooling), args)
        assert all(parameter.requires_grad != name.startswith(still) for name, parameter in model.named_parameters())


def test_weights_that_are_not_in_memory_are_not_looked_at():
    """Under FSDP, all ranks except the first have such weights."""
    with torch.device("meta"):
        model = BertModel(tiny_model().config)
    encoder = Encoder(model, small_tokenizer())
    args = ContrastiveTrainingArguments("unused", use_cpu=True, report_to=[])
    freeze_unused(encoder, args)
    assert all(p.requires_grad for p in encoder.parameters()) and args.ddp_find_unused_parameters is False


@pytest.mark.slow
def test_it_costs_less_than_a_second_on_bert_base():
    encoder = Encoder(BertModel(AutoConfig.for_model("bert", vocab_size=12000)), small_tokenizer())
    args = ContrastiveTrainingArguments("unused", use_cpu=True, report_to=[])
    start = time.process_time()
    freeze_unused(encoder, args)
    assert time.process_time() - start < 1


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Return what each of two gloo ranks trained. Without the freezing or the search, DDP would raise at the second step."""
    folder = tmp_path_factory.mktemp("unused")
    run(launch(2, HERE / "worker_unused.py", folder))
    return [torch.load(folder / f"2-{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*worker_unused.KINDS, "switch cached"])
def test_two_ranks_train_it(ranks, kind, tmp_path):
    one, other = (rank[kind] for rank in ranks)
    assert ranks[0]["ranks"] == 2
    start = dict(worker_unused.trainer(kind.split()[0], str(tmp_path)).encoder.named_parameters())
    assert all(torch.equal(one["weights"][name], other["weights"][name]) for name in start)
    changed = {name for name, tensor in one["weights"].items() if not torch.equal(tensor, start[name])}
    assert changed and changed <= one["trained"]
    assert one["find_unused"] == other["find_unused"] == (kind not in ("longformer", "luke"))
    if kind != "biogpt":  # its layers are dropped at random
        alone = worker_unused.train(kind.split()[0], str(tmp_path))
        assert relative_error(one["weights"], alone["weights"]) < (1e-9 if kind == "luke" else 1e-5)  # the others use float32
        assert relative_error(one["weights"], {name: p.detach() for name, p in start.items()}) > 1e-4  # control


# ---- precision, seeds and optimizers ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_training_head_has_the_models_precision(dtype, tmp_path):
    run = trainer(tmp_path, tiny_model().to(dtype), pooling="cls_mlp_train")
    assert {p.dtype for p in run.step.train_head.parameters()} == {dtype}
    run.train()
    assert all(p.isfinite().all() for p in run.encoder.parameters())
    assert {p.dtype for p in run.encoder.parameters()} == {dtype}


def test_the_training_head_is_where_the_model_is(tmp_path):
    with torch.device("meta"):
        model = BertModel(tiny_model().config)
    step = make_step(model, small_tokenizer(), arguments(tmp_path, pooling="cls_mlp_train"), SimCSE())
    assert {p.device.type for p in step.train_head.parameters()} == {"meta"}


def test_the_seed_fixes_the_training_head(tmp_path):
    heads = []
    for state, seed in ((1, 7), (2, 7), (2, 8)):
        torch.manual_seed(state)  # random numbers drawn before must not matter
        run = trainer(tmp_path, tiny_model(), pooling="cls_mlp_train", seed=seed)
        heads.append(run.step.train_head[0].weight.detach().clone())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    for state in (1, 2):  # an Encoder that gets its training head only now
        torch.manual_seed(state)
        run = trainer(tmp_path, tiny_encoder(pooling="cls"), pooling="cls_mlp_train", seed=7)
        assert torch.equal(run.step.train_head[0].weight, heads[0])


def test_the_heads_of_an_earlier_training_stay(tmp_path):
    objective = SimCSE(mlm_weight=0.1)
    earlier = trainer(tmp_path, BertForMaskedLM(tiny_model().config), objective, pooling="cls_mlp_train").step
    head = earlier.train_head[0].weight.detach().clone()
    again = trainer(tmp_path, earlier, objective, seed=2)
    assert torch.equal(again.step.train_head[0].weight, head) and again.step.mlm_head is earlier.mlm_head
    assert trainer(tmp_path, earlier).step.mlm_head is None  # an objective without the auxiliary does not use it
    other = trainer(tmp_path, earlier.encoder, seed=2)
    assert not torch.equal(other.step.train_head[0].weight, head)  # control: another seed gives another head


LEARNED = ImprovedContrastive(0.05, learn_temperature=True)


def test_an_optimizer_given_trains_what_the_trainer_makes(tmp_path):
    """The learned temperature and the training head end with the values that the trainer's own optimizer of this kind gives."""
    ends = []
    for own in (False, True):
        model = tiny_model(**NO_DROPOUT)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0) if own else None
        run = trainer(tmp_path, model, LEARNED, (optimizer, None), pooling="cls_mlp_train", optim="adamw_torch")
        run.train()
        ends.append({name: p.detach().clone() for name, p in run.step.named_parameters()})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.allclose(ends[0][name], ends[1][name], atol=1e-7) for name in ends[0])
    start = trainer(tmp_path, tiny_model(**NO_DROPOUT), LEARNED, pooling="cls_mlp_train").step
    for name in ("log_temperature", "train_head.0.weight"):
        assert (ends[1][name] - start.get_parameter(name)).abs().max() > 1e-3


def test_the_temperature_is_not_decayed_by_an_optimizer_given(tmp_path):
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    run = trainer(tmp_path, model, LEARNED, (optimizer, None))
    (group,) = [g for g in optimizer.param_groups if any(p is run.step.log_temperature for p in g["params"])]
    assert group["weight_decay"] == 0 and group["lr"] == 1e-2


def test_an_optimizer_that_holds_everything_is_left_alone(tmp_path):
    encoder = tiny_encoder(pooling="cls_mlp_train")
    step = trainer(tmp_path, encoder).step
    optimizer = torch.optim.SGD(step.parameters(), lr=1e-2)
    trainer(tmp_path, step, optimizers=(optimizer, None))
    assert len(optimizer.param_groups) == 1


def test_a_scheduler_that_cannot_know_them_is_refused(tmp_path):
    for settings, objective, what in (
        ({"pooling": "cls_mlp_train"}, None, "training head"),
        ({}, LEARNED, "learned temperature"),
    ):
        model = tiny_model()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        message = error_of(trainer, tmp_path / "out", model, objective, (optimizer, scheduler), **settings)
        assert f"the scheduler was created before the {what}" in message
    trainer(tmp_path, model, None, (optimizer, scheduler)).train()  # nothing was created besides the model


def test_an_optimizer_of_another_model_is_refused(tmp_path):
    optimizer = torch.optim.AdamW(tiny_model().parameters(), lr=1e-2)
    assert "the optimizer has none of the model's parameters" in error_of(
        trainer, tmp_path, tiny_model(), None, (optimizer, None)
    )


# ---- models that are compiled or wrapped, and objects that are not models ----


def test_a_compiled_model_is_taken_as_it_was_before(caplog):
    model = tiny_model("bert")
    encoder = Encoder(torch.compile(model, backend="eager"), small_tokenizer())
    assert encoder.backbone is model
    assert [record.message for record in caplog.records if "compiled" in record.message]


@pytest.mark.parametrize("model", [lambda: torch.nn.DataParallel(tiny_model("bert")), lambda: 3])
def test_what_is_no_model_is_refused_by_its_type(model, tmp_path):
    args = ContrastiveTrainingArguments(str(tmp_path), report_to="none")
    message = error_of(ContrastiveTrainer, model(), args, processing_class=small_tokenizer())
    assert message.startswith(f"the model is of the type {type(model()).__name__}; give a PreTrainedModel")


def test_what_is_no_tokenizer_is_refused_by_its_type():
    assert "the tokenizer is of the type str; give the model's tokenizer" in error_of(Encoder, tiny_model("bert"), "bert")


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForNextSentencePrediction"])
def test_a_head_that_judges_pairs_is_no_head_of_masked_language_modeling(kind, tmp_path):
    model = getattr(transformers, kind)(tiny_model("bert").config)
    args = ContrastiveTrainingArguments(str(tmp_path), report_to="none")
    message = error_of(ContrastiveTrainer, model, args, processing_class=small_tokenizer(), objective=SimCSE(mlm_weight=0.1))
    assert f"{kind} has none: load AutoModelForMaskedLM" in message


def test_a_tokenizer_without_a_mask_token_masks_no_words(tmp_path):
    tokenizer = small_tokenizer()
    tokenizer.mask_token = None
    model = transformers.BertForMaskedLM(tiny_model("bert").config)
    args = ContrastiveTrainingArguments(str(tmp_path), report_to="none")
    message = error_of(ContrastiveTrainer, model, args, processing_class=tokenizer, objective=SimCSE(mlm_weight=0.1))
    assert message.startswith("mlm_weight masks tokens, but the tokenizer has no mask token")
