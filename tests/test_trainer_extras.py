"""Test what a user of Trainer expects beside training: model_init, a hyperparameter search, compute_metrics, predict."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from scipy.stats import pearsonr
from transformers import AutoModel, EarlyStoppingCallback, TrainerCallback
from worker import NO_DROPOUT

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, ImprovedContrastive, SimCSE

WORDS = ["cat", "dog", "rain", "house", "river", "bread", "table", "music", "winter", "garden"]
PAIRS = Dataset.from_list([{"anchor": f"the {word}", "positive": f"a {word} there"} for word in WORDS])
GRADED = Dataset.from_list(
    [{"sentence1": f"the {a}", "sentence2": f"a {b}", "score": i % 6} for i, (a, b) in enumerate(zip(WORDS, WORDS[::-1]))]
)


def new_model():
    return tiny_model(**NO_DROPOUT)


def trainer(tmp_path, **given) -> ContrastiveTrainer:
    own = {"save_strategy": "no", "max_steps": 2, "per_device_train_batch_size": 4, **given.pop("settings", {})}
    args = ContrastiveTrainingArguments(tmp_path / "out", report_to=[], disable_tqdm=True, use_cpu=True, **own)
    if "model_init" not in given:
        given.setdefault("model", tiny_model())
    given = {"train_dataset": PAIRS, "eval_dataset": {"dev": GRADED}, "processing_class": small_tokenizer()} | given
    return given.pop("kind", ContrastiveTrainer)(args=args, **given)


# ---- model_init ----


def test_each_training_starts_from_a_new_model(tmp_path):
    made = trainer(tmp_path, model_init=new_model, settings={"learning_rate": 1e-2})
    start = made.encoder.encode(WORDS)
    made.train()
    first = made.encoder.encode(WORDS)
    made.train()
    assert np.abs(first - start).max() > 1e-2
    assert np.array_equal(made.encoder.encode(WORDS), first)  # the same start, the same rows, the same seed
    assert made.model is made.step and made.step.encoder is made.encoder
    made.save_model(str(tmp_path / "saved"))
    assert np.abs(Encoder.from_pretrained(str(tmp_path / "saved")).encode(WORDS) - first).max() < 1e-5


def test_model_init_equals_the_model_itself(tmp_path):
    """Without dropout, whose draws differ, both ways end in the same weights."""
    runs = []
    for given in ({"model": new_model()}, {"model_init": new_model}):
        made = trainer(tmp_path, **given, settings={"pooling": "cls_mlp_train", "learning_rate": 1e-2})
        made.train()
        runs.append(made.encoder.encode(WORDS))
    assert np.abs(runs[0] - runs[1]).max() < 1e-6


def test_model_init_may_return_what_model_may_be(tmp_path):
    tiny_encoder().save_pretrained(tmp_path / "model")
    kinds = [lambda: str(tmp_path / "model"), lambda: tiny_encoder(), lambda _: AutoModel.from_pretrained(tmp_path / "model")]
    for init in kinds:
        assert trainer(tmp_path, model_init=init).train().global_step == 2


def test_model_init_that_cannot_be(tmp_path):
    assert "model and model_init are both given" in error_of(trainer, tmp_path, model=tiny_model(), model_init=new_model)
    assert "it may have one, the trial of a search" in error_of(trainer, tmp_path, model_init=lambda a, b: tiny_model())
    optimizer = torch.optim.SGD(tiny_model().parameters(), 0.1)
    assert "optimizers= cannot be given" in error_of(trainer, tmp_path, model_init=new_model, optimizers=(optimizer, None))


def test_models_of_model_init_must_read_the_same_tokens(tmp_path):
    """BUG: the rows were tokenized for the first model, and a later one was trained on them and evaluated in its own way."""
    settings = {"max_length": 32}
    made = trainer(tmp_path, model_init=lambda: Encoder(new_model(), small_tokenizer(), **settings), processing_class=None)
    made.train()
    for name, value in (("max_length", 4), ("prompts", {"query": "find: "})):
        settings.update({"max_length": 32, name: value})
        assert f"model_init returns models with different {name}" in error_of(made.train)


def test_hyperparameter_search(tmp_path):
    """Each trial trains with its own settings, and the best one is that of the highest metric."""
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rates = [1e-6, 3e-2]
    made = trainer(tmp_path, model_init=new_model, objective=SimCSE(0.1), settings={"max_steps": 6})
    best = made.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", rates)},
        n_trials=2, direction="maximize", compute_objective=lambda metrics: metrics["eval_spearman"], backend="optuna",
        sampler=optuna.samplers.GridSampler({"learning_rate": rates}),
    )  # fmt: skip
    scores = {}
    for rate in rates:
        single = trainer(
            tmp_path, model_init=new_model, objective=SimCSE(0.1), settings={"max_steps": 6, "learning_rate": rate}
        )
        single.train()
        scores[rate] = single.evaluate()["eval_spearman"]
    assert scores[rates[0]] != scores[rates[1]]
    assert best.hyperparameters["learning_rate"] == max(scores, key=scores.get)
    assert best.objective == pytest.approx(max(scores.values()), abs=1e-6)
    made.train()  # the trainer still has its objective


def test_a_search_without_an_objective_is_refused(tmp_path):
    """BUG: the default of transformers minimizes the sum of all metrics, so the search returned the worst trial."""
    pytest.importorskip("optuna")
    made = trainer(tmp_path, model_init=new_model)
    assert "needs compute_objective" in error_of(made.hyperparameter_search, n_trials=1, backend="optuna")
    made.eval_dataset = {"loss": PAIRS.select(range(4))}
    best = made.hyperparameter_search(lambda trial: {}, n_trials=1, backend="optuna")
    for method in (made.evaluate, made.save_model):
        assert "no model is left after a hyperparameter search" in error_of(method)
    made.train()
    assert best.objective == made.evaluate()["eval_loss"]


class EachRate(TrainerCallback):
    """Record the learning rate of each step."""

    def __init__(self, rates: list[float]):
        self.rates = rates

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


def search(made, space) -> object:
    optuna = pytest.importorskip("optuna")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return made.hyperparameter_search(
        space, lambda metrics: metrics["eval_spearman"], n_trials=2, direction="maximize", backend="optuna",
        sampler=optuna.samplers.BruteForceSampler(seed=0),
    )  # fmt: skip


def test_a_search_takes_each_value_as_it_is_or_refuses_its_name(tmp_path):
    """BUG: a share of the steps as warmup became 0, because the default is whole, and an unknown name did nothing."""
    made, rates = trainer(tmp_path, model_init=new_model, settings={"logging_steps": 1, "max_steps": 4}), []
    made.add_callback(EachRate(rates))
    search(made, lambda trial: {"warmup_steps": trial.suggest_categorical("warmup_steps", [0.5, 2])})
    assert rates == 2 * [0.0, 2.5e-5, 5e-5, 2.5e-5]
    problem = error_of(search, made, lambda trial: {"temperature": trial.suggest_categorical("temperature", [0.1, 0.2])})
    assert problem.startswith("hyperparameter_search cannot search temperature, which is no setting of args; make a new")


def test_each_trial_keeps_its_checkpoints(tmp_path):
    """BUG: all trials wrote to the same folders, and each checkpoint told the learning rate of the trial before."""
    made = trainer(tmp_path, model_init=new_model, settings={"save_strategy": "steps", "save_steps": 2})
    best = search(made, lambda trial: {"learning_rate": trial.suggest_categorical("learning_rate", [1e-6, 3e-2])})
    assert {path.name for path in (tmp_path / "out").glob("*")} == {"run-0", "run-1"}
    folder = tmp_path / "out" / f"run-{best.run_id}" / "checkpoint-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["run"]["settings"]["learning_rate"] == best.hyperparameters["learning_rate"]
    single = trainer(tmp_path, model_init=new_model, settings=best.hyperparameters)
    single.train()
    assert np.array_equal(Encoder.from_pretrained(str(folder)).encode(WORDS), single.encoder.encode(WORDS))


@pytest.mark.parametrize(
    "name, value, problem",
    [
        ("pooling", "cls", "pooling was 'mean' when the trainer was made and is now 'cls', which would have no effect"),
        ("max_length", 5, "max_length was None when the trainer was made and is now 5"),
        ("per_device_eval_batch_size", 5, "per_device_eval_batch_size was 8 when the trainer was made and is now 5"),
        ("per_device_train_batch_size", 1, "a batch of one row has no negatives"),
        ("learning_rate", -1.0, "learning_rate is -1.0; it must be at least 0"),
        ("bf16", True, "bf16 was False when the trainer was made and is now True"),
        ("optim_args", "momentum=0.5", "optim_args is 'momentum=0.5', but adamw_torch"),
    ],
)
def test_settings_that_are_changed_later_count_or_are_refused(tmp_path, name, value, problem):
    """BUG: a search over poolings trained each trial with the pooling of the trial before."""
    made = trainer(tmp_path, model_init=new_model, settings={"pooling": "mean"})
    assert problem in error_of(search, made, lambda trial: {name: trial.suggest_categorical(name, [value])})
    made = trainer(tmp_path)
    setattr(made.args, name, value)
    assert problem.replace("'mean'", "None") in error_of(made.train)


@pytest.mark.parametrize(
    "name, problem",
    [("gradient_caching", "gradient_caching is 'no'; it must be True, False"), ("lr_scheduler_type", "no is not a valid Sch")],
)
def test_a_wrong_value_that_is_set_later_is_refused(tmp_path, name, problem):
    """BUG: any text turned gradient caching on, and an unknown schedule ended in a traceback."""
    made = trainer(tmp_path)
    setattr(made.args, name, "no")
    assert problem in error_of(made.train)


@pytest.mark.parametrize("name", ["train_dataset", "data_collator", "main_objective", "model"])
def test_parts_that_are_replaced_later_are_refused(tmp_path, name):
    """BUG: another model or objective was not trained, and other rows ended in a KeyError."""
    made = trainer(tmp_path)
    setattr(made, name, {"train_dataset": PAIRS, "model": new_model(), "main_objective": SimCSE(0.5)}.get(name, list))
    assert f"{name} was changed after the trainer was made" in error_of(made.train)


def test_an_evaluate_of_a_subclass_may_choose_the_best_model(tmp_path):
    """BUG: a metric that it adds was refused as metric_for_best_model, because no evaluation set logs it."""

    class Steps(ContrastiveTrainer):
        def evaluate(self, *args, **named):
            return super().evaluate(*args, **named) | {"eval_steps_left": 2.0 - self.state.global_step}

    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
                "load_best_model_at_end": True, "metric_for_best_model": "steps_left", "greater_is_better": True}  # fmt: skip
    made = trainer(tmp_path, kind=Steps, settings=settings)
    made.train()
    assert made.state.best_metric == 1 and str(made.state.best_model_checkpoint).endswith("checkpoint-1")
    assert "no evaluation set logs" in error_of(trainer, tmp_path, settings=settings)


@pytest.mark.parametrize("name, value", [("max_length", 4), ("prompts", {"query": "ask: "})])
def test_settings_of_tokenized_rows_that_are_changed_later_are_refused(tmp_path, name, value):
    """BUG: the rows kept their tokens, and the saved folder stated the new setting."""
    made = trainer(tmp_path)
    setattr(made.encoder, name, value)
    assert f"encoder.{name} was changed after the trainer was made" in error_of(made.train)


def test_a_second_training_takes_the_present_settings_and_weights(tmp_path):
    """BUG: it had the learning rate of the first one, and left weights alone that were frozen then, as a plain Trainer does."""
    made = trainer(tmp_path, settings={"learning_rate": 1e-2, "lr_scheduler_type": "constant"})
    first, second = made.encoder.backbone.encoder.layer[:2]
    first.requires_grad_(False)
    made.train()
    made.train()
    assert {int(state["step"]) for state in made.optimizer.state.values()} == {4}  # nothing has changed, so it goes on
    first.requires_grad_(True)
    before = copy.deepcopy(first.state_dict())
    made.train()
    assert all(not torch.equal(before[name], tensor) for name, tensor in first.state_dict().items() if "key.bias" not in name)
    made.args.learning_rate, before = 1e-4, copy.deepcopy(second.state_dict())
    made.train()
    moved = max((before[name] - tensor).abs().max() for name, tensor in second.state_dict().items())
    assert 0 < moved < 1e-3
    given = torch.optim.SGD(made.model.parameters(), 0.1)
    made = trainer(tmp_path, model=made.step, optimizers=(given, None))
    made.train()
    made.args.weight_decay = 0.1
    made.train()
    assert getattr(made.optimizer, "optimizer", made.optimizer) is given


def test_a_second_training_begins_with_the_learning_rate_again(tmp_path):
    """BUG: after a schedule that reads the metric, it began with the rate to which the first training was lowered."""
    never = {"patience": 0, "threshold": 1e6, "threshold_mode": "abs"}
    settings = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": never, "eval_strategy": "steps",
                "eval_steps": 1, "logging_steps": 1, "learning_rate": 1e-3}  # fmt: skip
    made = trainer(tmp_path, settings=settings)
    for schedule in ("reduce_lr_on_plateau", "reduce_lr_on_plateau", "constant"):
        made.args.lr_scheduler_type = schedule
        made.args.lr_scheduler_kwargs = never if schedule != "constant" else None
        made.train()
        assert made.state.log_history[0]["learning_rate"] == 1e-3


def test_other_arguments_may_be_made_before_the_training(tmp_path):
    """BUG: this emptied accelerate's state, and the training ended in an AttributeError, as that of a plain Trainer does."""
    made = trainer(tmp_path)
    args = ContrastiveTrainingArguments(tmp_path / "other", use_cpu=True, bf16=True)
    assert made.train().global_step == 2
    ContrastiveTrainer(tiny_model(), args, processing_class=small_tokenizer())  # it sets the state to its own precision
    made.train()
    assert made.accelerator.state.mixed_precision == "no"


def test_a_metric_that_is_set_later_has_a_direction(tmp_path):
    """BUG: the smallest Spearman was the best one, and `load_best_model_at_end` without a metric did nothing."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 5e-2}
    made = trainer(tmp_path, settings=settings)
    made.args.load_best_model_at_end = True
    assert error_of(made.train).endswith("reads the evaluation metric, but there is none; set metric_for_best_model")
    made.args.metric_for_best_model = "spearman"
    made.train()
    scores = [entry["eval_spearman"] for entry in made.state.log_history if "eval_spearman" in entry]
    assert made.state.best_metric == max(scores) != min(scores)


def test_a_schedule_of_another_optimizer_that_is_set_later(tmp_path):
    made = trainer(tmp_path)
    other = torch.optim.SGD(made.model.parameters(), 0.3)
    made.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(other)
    assert error_of(made.train).startswith("the learning-rate schedule was made for another optimizer")


def test_evaluation_sets_and_metrics_may_be_replaced(tmp_path):
    """BUG: other sets in `eval_dataset` ended in an AttributeError."""
    made = trainer(tmp_path, settings={"eval_strategy": "steps", "eval_steps": 1})
    made.eval_dataset, made.compute_metrics = {"other": GRADED, "held": PAIRS}, pearson
    made.train()
    assert {"eval_other_pearson", "eval_other_spearman", "eval_held_loss"} <= made.state.log_history[-2].keys()
    assert made.evaluate("other")["eval_other_pearson"] == made.evaluate()["eval_pearson"]


@pytest.mark.parametrize(
    "settings, missing", [({"metric_for_best_model": "spearman"}, "eval_strategy"),
                          ({"eval_strategy": "epoch"}, "metric_for_best_model")]
)  # fmt: skip
def test_early_stopping_without_a_metric(tmp_path, settings, missing):
    """BUG: this was an AssertionError."""
    made = trainer(tmp_path, callbacks=[EarlyStoppingCallback()], settings=settings)
    expected = f"EarlyStoppingCallback reads the evaluation metric, but there is none; set {missing}"
    assert error_of(made.train) == expected


# ---- compute_metrics ----


def pearson(prediction) -> dict[str, float]:
    return {"pearson": 100 * pearsonr(prediction.predictions, prediction.label_ids).statistic}


def test_compute_metrics_gets_cosines_and_scores(tmp_path):
    made = trainer(tmp_path, compute_metrics=pearson)
    metrics = made.evaluate()
    first, second = (made.encoder.encode(GRADED[side][:], normalize=True) for side in ("sentence1", "sentence2"))
    expected = 100 * pearsonr((first * second).sum(1), GRADED["score"][:]).statistic
    assert metrics["eval_dev_pearson"] == metrics["eval_pearson"] == pytest.approx(expected, abs=1e-3)
    # BUG: it was not called for sets that were given to `evaluate`.
    assert made.evaluate({"later": GRADED})["eval_later_pearson"] == metrics["eval_pearson"]
    assert made.evaluate({"held": PAIRS}).keys() >= {"eval_held_loss"}


def test_a_metric_of_compute_metrics_chooses_the_model(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1,
                "load_best_model_at_end": True, "metric_for_best_model": "pearson"}  # fmt: skip
    made = trainer(tmp_path, compute_metrics=pearson, settings=settings)
    made.train()
    best = max(entry["eval_pearson"] for entry in made.state.log_history if "eval_pearson" in entry and entry["step"])
    assert made.state.best_metric == best


@pytest.mark.parametrize("metric", [None, "pearson", "dev_pearson", "eval_spearman"])
def test_compute_metrics_sees_real_cosines_only(tmp_path, metric):
    """BUG: it was called each time that names of metrics were needed, with the scores in place of the cosines."""
    seen = []

    def correlation(prediction):
        seen.append(pearson(prediction)["pearson"])
        return {"pearson": seen[-1]}

    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": metric}
    made = trainer(tmp_path, compute_metrics=correlation, settings=settings)
    assert not seen
    made.train()
    assert seen == [entry["eval_dev_pearson"] for entry in made.state.log_history if "eval_dev_pearson" in entry]
    assert len(seen) == 2 and max(seen) < 99


def test_a_metric_that_compute_metrics_does_not_return(tmp_path):
    """The names are known after the first evaluation."""
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "person"}
    made = trainer(tmp_path, compute_metrics=pearson, settings=settings)
    for evaluate in (made.evaluate, made.train):
        assert error_of(evaluate) == (
            "metric_for_best_model is 'person', which no evaluation set logs; set it to one of alignment, dev_alignment, "
            "dev_pearson, dev_spearman, dev_uniformity, pearson, spearman, uniformity"
        )
    assert "which no evaluation set logs" in error_of(trainer, tmp_path, settings=settings)  # without compute_metrics, at once


def test_compute_metrics_that_cannot_be(tmp_path):
    for name, problem in (("spearman", "compute_metrics returns 'spearman', which is already a metric"),
                          ("dev_spearman", "dev_spearman is also the name of another metric")):  # fmt: skip
        made = trainer(tmp_path, compute_metrics=lambda _, name=name: {name: 1.0})
        assert problem in error_of(made.evaluate)
    assert "compute_metrics is a str; give a function" in error_of(trainer, tmp_path, compute_metrics="pearson")
    assert "eval_dataset has none" in error_of(trainer, tmp_path, compute_metrics=pearson, eval_dataset=None)


# ---- attributes of the model and of the trainer ----


def test_what_scripts_ask_of_the_model(tmp_path):
    """BUG: trainer.model had none of these, and the model of a plain Trainer has them."""
    made = trainer(tmp_path, settings={"pooling": "cls_mlp_train"})
    assert (made.model.device, made.model.dtype) == (torch.device("cpu"), torch.float32)
    made.train()
    made.model.save_pretrained(str(tmp_path / "saved"))
    assert np.abs(Encoder.from_pretrained(str(tmp_path / "saved")).encode(WORDS) - made.encoder.encode(WORDS)).max() < 1e-5


@pytest.mark.parametrize("name", ["get_eval_dataloader", "get_test_dataloader"])
@pytest.mark.parametrize("sets", [(), (GRADED,)])
def test_evaluation_sets_have_no_dataloader(tmp_path, name, sets):
    """BUG: the error was about columns and the signature of `forward`."""
    expected = "an evaluation set has no dataloader; trainer.evaluate scores sets, trainer.predict embeds texts"
    assert error_of(getattr(trainer(tmp_path), name), *sets) == expected


@pytest.mark.parametrize("name", ["_get_train_sampler", "evaluation_loop", "create_optimizer_and_scheduler"])
def test_methods_that_are_never_called_are_refused(tmp_path, name):
    """BUG: a subclass with its own order of the rows, or its own evaluation loop, was ignored."""

    def define(self, *args):
        return None

    args = ContrastiveTrainingArguments(tmp_path, report_to=[], use_cpu=True)
    kind = type("Mine", (ContrastiveTrainer,), {name: define})
    message = error_of(kind, tiny_model(), args, processing_class=small_tokenizer())
    assert message.startswith(f"Mine defines {name}, which ContrastiveTrainer never calls; define ")
    kind = type("Mine", (ContrastiveTrainer,), {"evaluate": define, "get_train_dataloader": define})
    kind(tiny_model(), args, processing_class=small_tokenizer())


@pytest.mark.parametrize("pooling, part", [("mean", "learned temperature"), ("cls_mlp_train", "training head")])
def test_an_optimizer_of_a_subclass_must_train_what_the_trainer_created(tmp_path, pooling, part):
    """BUG: an optimizer for the backbone alone left them as they were."""

    class Mine(ContrastiveTrainer):
        def create_optimizer(self, model=None):
            self.optimizer = torch.optim.SGD(self.encoder.backbone.parameters(), 0.1)
            return self.optimizer

    args = ContrastiveTrainingArguments(tmp_path, report_to=[], use_cpu=True, max_steps=1, pooling=pooling)
    objective = ImprovedContrastive(learn_temperature=pooling == "mean")
    made = Mine(tiny_model(), args, objective, PAIRS, processing_class=small_tokenizer())
    assert error_of(made.train).startswith(f"create_optimizer leaves out the {part}, which would not be trained; ")


# ---- predict ----


def test_predict_embeds(tmp_path):
    told = []
    made = trainer(tmp_path)
    made.add_callback(type("Told", (TrainerCallback,), {"on_predict": lambda *_, metrics, **kwargs: told.append(metrics)})())
    texts = Dataset.from_dict({"text": WORDS})
    found = made.predict(texts)
    assert told == [found.metrics]  # BUG: callbacks were not called
    assert np.abs(found.predictions - made.encoder.encode(WORDS)).max() < 1e-5 and found.label_ids is None
    pairs = made.predict(PAIRS).predictions
    assert pairs.shape == (len(WORDS), 2, 32)
    assert np.abs(pairs[:, 1] - made.encoder.encode(PAIRS["positive"][:])).max() < 1e-5
    assert found.metrics["test_samples"] == len(WORDS) and found.metrics["test_runtime"] > 0


def test_predict_embeds_pairs_with_scores(tmp_path):
    """BUG: an STS set was refused, because "training would treat every pair as a positive"."""
    made = trainer(tmp_path)
    found = made.predict(GRADED).predictions
    expected = np.stack([made.encoder.encode(GRADED[name]) for name in ("sentence1", "sentence2")], axis=1)
    assert np.abs(found - expected).max() < 1e-5


def test_predict_uses_prompts_and_refuses_bad_rows(tmp_path):
    prompts = {"query": "find: ", "document": "text: "}
    made = trainer(tmp_path, settings={"prompts": prompts})
    pairs = made.predict(PAIRS).predictions
    assert np.abs(pairs[:, 0] - made.encoder.encode_query(PAIRS["anchor"][:])).max() < 1e-5
    assert np.abs(pairs[:, 1] - made.encoder.encode_document(PAIRS["positive"][:])).max() < 1e-5
    assert "the text is empty" in error_of(made.predict, Dataset.from_dict({"text": ["a", " "]}))
    ragged = Dataset.from_list([{"query": "a", "positive": "b", "negatives": ["c"]}, {"query": "a", "positive": "b"}])
    assert "rows have different numbers of texts" in error_of(made.predict, ragged)


class During(TrainerCallback):
    """Call a function at the beginning of the second step."""

    def __init__(self, function):
        self.function, self.trainer = function, None

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.function(self.trainer)


def during(tmp_path, function, **given) -> ContrastiveTrainer:
    callback = During(function)
    callback.trainer = trainer(tmp_path, callbacks=[callback], **given)
    return callback.trainer


def without_first_layer():
    model = new_model()
    model.encoder.layer[0].requires_grad_(False)
    return model


def unfreeze(made):
    made.encoder.backbone.encoder.layer[0].requires_grad_(True)


@pytest.mark.parametrize(
    "function, problem",
    [
        (lambda made: setattr(made, "train_dataset", PAIRS), "train_dataset was changed after the trainer was made"),
        (lambda made: setattr(made.encoder, "max_length", 4), "encoder.max_length was changed after the trainer was made"),
        (lambda made: setattr(made.args, "pooling", "cls"), "pooling was None when the trainer was made and is now 'cls'"),
        (
            lambda made: setattr(made.args, "per_device_train_batch_size", 8),
            "per_device_train_batch_size was changed from 4 to 8",
        ),
        (unfreeze, "and 13 more: the weights were frozen when the training began"),
    ],
)
def test_a_callback_that_changes_what_is_read_at_the_beginning_is_refused(tmp_path, function, problem):
    """BUG: new rows, lengths and batch sizes had no effect, and layers that a callback unfroze were not trained."""
    assert problem in error_of(during(tmp_path, function, model=without_first_layer()).train)


def test_a_callback_may_unfreeze_weights_that_the_optimizer_has(tmp_path):
    model = without_first_layer()
    start = copy.deepcopy(model.encoder.layer[0].state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    during(tmp_path, unfreeze, model=model, optimizers=(optimizer, None)).train()
    moved = [name for name, tensor in model.encoder.layer[0].state_dict().items() if not torch.equal(tensor, start[name])]
    assert len(moved) >= 15 and "attention.self.query.weight" in moved


def test_a_subclass_may_give_a_plain_loader(tmp_path):
    """BUG: AttributeError, because a DataLoader of PyTorch has no set_epoch. Trainer calls it only where there is one."""
    seen = []

    class InOrder(ContrastiveTrainer):
        def get_train_dataloader(self):
            return torch.utils.data.DataLoader(self.train_dataset, 5, collate_fn=self.data_collator)

        def compute_loss(self, model, inputs, *args, **named):
            seen.append(inputs["text_ids"].tolist())
            return super().compute_loss(model, inputs, *args, **named)

    made = trainer(tmp_path, kind=InOrder)
    made.train()
    assert [ids for batch in seen for ids in batch] == made.train_dataset["text_ids"][:]
