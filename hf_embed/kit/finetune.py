"""From a `Plan` to a finished folder: score, train, save, score again; what the fine-tuning recipes share."""

import dataclasses
import gc
import json
import logging
import math
import os
import platform
import shutil
import sys
import tempfile
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, TaskType, get_peft_model
from torch import nn
from transformers import AutoConfig, set_seed
from transformers.trainer_utils import get_last_checkpoint

import hf_embed
from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint import card, tables
from hf_embed.checkpoint.load import MOST_TOKENS, find_transformer, listed, load_encoder, load_tokenizer, unreachable
from hf_embed.checkpoint.load import load_model as load_backbone
from hf_embed.checkpoint.save import put_in_place
from hf_embed.checkpoint.settings import has_mlp_head, read_settings
from hf_embed.checkpoint.verify import quiet
from hf_embed.data.mixture import Mixture
from hf_embed.distributed import get_rank
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError, masked
from hf_embed.evaluation.geometry import plot_trajectory
from hf_embed.evaluation.retrieval import Retrieval
from hf_embed.evaluation.tasks import Task, main_metric, score_tasks
from hf_embed.kit import cli
from hf_embed.kit.overwrite import EarlierRun, clear_results, earlier_files
from hf_embed.kit.plan import QUICKSTART, ModelArguments, Plan, on_the_hub, plan_gte, plan_simcse
from hf_embed.ranges import SEED
from hf_embed.step import reset_dense
from hf_embed.text_models import loading_class
from hf_embed.trainer import ContrastiveTrainer
from hf_embed.trainer_settings import IGNORED

logger = logging.getLogger(__name__)

DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "embedding_dropout",
            "mlp_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop")  # fmt: skip


def run_simcse(name: str, paired: bool, quickstart_config: Path, quickstart_file: str, argv: list[str] | None = None) -> dict:
    """Fine-tune with SimCSE: read and check, score, train, export, score again. Returns what `results.json` holds."""
    return run_seeds(partial(plan_simcse, name, paired, quickstart_config, quickstart_file), argv)


def run_gte(name: str, offline_config: Path, offline_data: Callable, offline_model: str | None = None, argv=None) -> dict:
    """Fine-tune with the improved contrastive loss. Returns what `results.json` holds."""
    return run_seeds(partial(plan_gte, name, offline_config, offline_data, offline_model), argv)


def check_adapter(trainer: ContrastiveTrainer) -> None:
    """Raises InputError where the adapters would not be all that is trained, or cannot be gathered."""
    for wrong, what in (
        (trainer.encoder.backbone is trainer.encoder.base, "without --lora_r there is no adapter"),
        (trainer.sharded, "FSDP and ZeRO shard the adapters; the merged model is saved"),
        (trainer.args.temp_scale is not None, "an adapter knows no TempScale; the merged model has it folded in"),
        (len(trainer.encoder.dense) > 0, "this model has layers behind the pooling, which an adapter does not hold"),
    ):
        if wrong:
            raise InputError(f"--save_adapter: {what}")


def save_adapter(encoder: Encoder, folder: Path) -> None:
    """The adapters by themselves, as PEFT saves them, without the place where the base model lies here."""
    base = encoder.config._name_or_path
    for config in encoder.backbone.peft_config.values():
        config.base_model_name_or_path = shown(base)
    encoder.backbone.save_pretrained(str(folder))
    card = folder / "README.md"
    card.write_text(card.read_text(encoding="utf-8").replace(base, shown(base)), encoding="utf-8")


def read_seeds(given: str) -> list[int]:
    """ "1,2,3" -> [1, 2, 3]."""
    words = [word.strip() for word in given.split(",") if word.strip()]
    seeds = [int(word) if word.isdecimal() else -1 for word in words]
    if not seeds or not all(seed in SEED for seed in seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds '{given}': give different whole numbers below 2^32, 1,2,3 for example")
    return seeds


def run_seeds(read: Callable[[list[str] | None], Plan], argv: list[str] | None) -> dict:
    """Train what the flags say, once or with each of `--seeds`; of several, the best by the evaluation sets is what OUTPUT_DIR
    is then, with all seeds' scores in its card. Returns what its `results.json` holds.

    `read` makes a plan of flags. A seed's run is OUTPUT_DIR/seed-N; with `--resume_from_checkpoint` finished ones stay.
    """
    plan = read(argv)
    if not plan.run.seeds:
        return fine_tune(plan)
    seeds, folder, resume = read_seeds(plan.run.seeds), Path(plan.args.output_dir), plan.args.resume_from_checkpoint
    if not plan.tasks:
        raise InputError("--seeds keeps the best by an evaluation set; give one, --eval_sts_file NAME=PATH for example")
    if plan.args.push_to_hub:
        raise InputError("--seeds and --push_to_hub: leave the push away, and push the folder when it is finished")
    earlier = EarlierRun([] if resume else earlier_files(folder))
    runs = {}
    for seed in seeds:
        own = folder / f"seed-{seed}"
        if resume and (own / "results.json").is_file():
            runs[seed] = json.loads((own / "results.json").read_text(encoding="utf-8"))
            now = json.loads(json.dumps(changed(plan)))
            if runs[seed]["train"]["settings"] != now:
                raise InputError(f"{own} holds a run with other settings; replace all by --overwrite_output_dir")
            continue
        if get_rank() == 0:
            print(f"\nseed {seed}")
        last = get_last_checkpoint(str(own)) if resume and own.is_dir() else None
        flags = {"seeds": "", "seed": seed, "output_dir": str(own), "overwrite_output_dir": True,
                 "resume_from_checkpoint": last or ""}  # fmt: skip
        runs[seed] = fine_tune(read([*(sys.argv[1:] if argv is None else argv), *cli.as_flags(flags)]), earlier)
        gc.collect()  # a trainer and its model hold each other
    with plan.args.main_process_first():
        return keep_best(folder, runs, plan.model_args.trust_remote_code)


def keep_best(folder: Path, runs: dict[int, dict], trust_remote_code: bool = False) -> dict:
    """The best seed's files to `folder`, with all seeds' scores in results.json and README.md."""
    scores = {seed: run["train"].get("score") or run["train"]["chosen_by"] for seed, run in runs.items()}
    sign = 1 if next(iter(scores.values()))["greater_is_better"] else -1
    best = max(scores, key=lambda seed: -math.inf if scores[seed]["score"] is None else sign * scores[seed]["score"])
    results = runs[best] | {"seed": best, "seeds": {str(seed): run["after"] for seed, run in runs.items()}}
    results["train"] = results["train"] | {"chosen_by": scores[best]}
    if get_rank() == 0:
        ours = shutil.ignore_patterns("checkpoint-*", "runs", "README.md")
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as new:
            copied = shutil.copytree(folder / f"seed-{best}", Path(new, "best"), ignore=ours)
            names = os.listdir(copied)
            put_in_place(str(copied), str(folder))
        clear_results(folder, keep=names)
        card.store_results(folder, results)
        with quiet():
            encoder = Encoder.from_pretrained(str(folder), trust_remote_code=trust_remote_code)
        card.write_card(encoder, folder, results)
        print("\n" + "\n".join(tables.seeds_table(results)))
        print(saved_to(folder, encoder.remote_code))
    return results


def make_trainer(plan: Plan) -> ContrastiveTrainer:
    if not plan.tasks:
        no_evaluation(plan.args)
    model, tokenizer = load_model(plan.model_args, plan.args, getattr(plan.objective, "mlm_weight", 0) > 0)
    return ContrastiveTrainer(
        model=model, processing_class=tokenizer, args=plan.args, objective=plan.objective,
        train_dataset=plan.rows, eval_dataset=plan.tasks, train_name=plan.source, paired=plan.paired,
    )  # fmt: skip


def fine_tune(plan: Plan, earlier: EarlierRun | None = None) -> dict:
    """Score, train, export, score again. Returns what `results.json` holds.

    `earlier`, if it is of more than the plan's output folder, is what the run replaces.
    """
    run, args, tasks = plan.run, plan.args, plan.tasks
    replaces = run.overwrite_output_dir and not args.resume_from_checkpoint
    earlier = earlier or EarlierRun(earlier_files(Path(args.output_dir)) if replaces else [])
    trainer = make_trainer(plan)
    if plan.model_args.save_adapter:
        check_adapter(trainer)
    if isinstance(trainer.train_dataset, Mixture) and trainer.is_world_process_zero():
        print(trainer.train_dataset)

    before = trainer.evaluate() if tasks else {}
    trainer.add_callback(earlier)
    trained = trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model(_internal_call=True)  # pushed below, with its results
    if replaces and trainer.is_world_process_zero():
        clear_results(Path(args.output_dir))
        card.write_card(trainer.encoder, args.output_dir)
    if plan.model_args.save_adapter and trainer.is_world_process_zero():
        save_adapter(trainer.encoder, Path(args.output_dir, "adapter"))
    trainer.accelerator.wait_for_everyone()
    after = {}
    if tasks:  # of the saved folder, loaded anew, as a user will
        with quiet():
            trusted = plan.model_args.trust_remote_code
            saved = Encoder.from_pretrained(args.output_dir, trust_remote_code=trusted, dtype=torch.float32).to(args.device)
        after = score_encoder(saved, tasks)
    metric = (args.metric_for_best_model or main_metric(tasks)).removeprefix("eval_") if tasks else None
    score = {"metric": metric, "score": number(after.get(f"eval_{metric}", math.nan), 4),
             "greater_is_better": args.greater_is_better is not False}  # fmt: skip
    about = {
        "model": shown(plan.model_args.model_name_or_path or "quickstart"), "data": shown(plan.source),
        "base_model": on_the_hub(plan.model_args.model_name_or_path), "datasets": plan.datasets,
        "rows": len(trainer.train_dataset),
        "language": run.language, "license": run.license,
        "pooling": trainer.encoder.pooling, "max_length": trainer.encoder.max_length,
        "objective": {"name": type(plan.objective).__name__} | dataclasses.asdict(plan.objective),
        "batch_size": args.train_batch_size * args.world_size * args.gradient_accumulation_steps,
        "learning_rate": args.learning_rate, "steps": trained.global_step, "loss": trained.training_loss,
        "score": score, "chosen_by": score if chose_a_step(trainer) else None,
        "seconds": trained.metrics.get("train_runtime"), "seed": args.seed, "processes": args.world_size,
        "hardware": hardware(args), "settings": changed(plan),
        "versions": {"hf_embed": hf_embed.__version__, "transformers": transformers.__version__,
                     "torch": torch.__version__, "python": platform.python_version()},
    }  # fmt: skip
    results = finish(trainer, before, after, about, tasks)
    if run.show_searches and tasks:
        for name, task in tasks.items():
            show_searches(name, task, saved, run.show_searches)
    if args.push_to_hub:
        trainer.push_to_hub()
    return results


def chose_a_step(trainer: ContrastiveTrainer) -> bool:
    """Whether the evaluation sets chose the model among several steps; warns where they should have and could not."""
    state = trainer.state
    if not trainer.args.load_best_model_at_end:
        return False
    if state.best_model_checkpoint is None:
        logger.warning(
            f"no evaluation gave {trainer.args.metric_for_best_model} as a number: the last step is kept, not the best"
        )
    evaluated = [entry for entry in state.log_history if any(key.startswith("eval_") for key in entry)]
    return state.best_model_checkpoint is not None and len(evaluated) > 1


def shown(name: str) -> str:
    """Of a file or folder named by its full path, its own name: where it lies here is nobody's business. Secrets are masked."""
    return Path(name).name if Path(name).is_absolute() else masked(name)


def hardware(args: ContrastiveTrainingArguments) -> str:
    if args.device.type == "cuda":
        return f"{args.world_size} x {torch.cuda.get_device_name(args.device)}"
    return f"{psutil.cpu_count(logical=False) or os.cpu_count()} {args.device.type.upper()} cores"


NOT_SCIENCE = ("output_dir", "run_name", "log", "report_to", "eval_", "do_", "save_", "push_", "hub_", "disable_tqdm",
               "dataloader_", "use_cpu", "seed", "resume_", "per_device_", "metric_", "greater_", "load_best_", "ddp_",
               "model_name_or_path", "deepspeed", "fsdp", "accelerator_config", "chunk_tokens", "local_rank", "project",
               "trackio")  # fmt: skip


def changed(plan: Plan) -> dict:
    """Of a plan's settings, those that are not at their default and that a result depends on."""
    found, defaults, groups = {}, {}, [plan.model_args, plan.args, *plan.more]
    unused = {*IGNORED, *(() if plan.args.max_steps < 0 else ("num_train_epochs",))}
    if isinstance(plan.rows, Dataset):
        unused |= {"source_alpha", "small_sources", "shuffle_buffer_size"}
    for group in groups:  # after __post_init__, which fills some in
        kind = type(group)
        defaults[kind] = kind("unused") if isinstance(group, ContrastiveTrainingArguments) else kind()
    for settings, field_ in ((group, field_) for group in groups for field_ in dataclasses.fields(group)):
        default = getattr(defaults[type(settings)], field_.name, None)
        value = getattr(settings, field_.name, default)
        if value != default and field_.name not in unused and not field_.name.startswith((*NOT_SCIENCE, "_")):
            found[field_.name] = value if isinstance(value, int | float | str | bool | list | dict) else str(value)
    return found


def no_evaluation(args: ContrastiveTrainingArguments) -> None:
    if args.eval_strategy != "no" or args.load_best_model_at_end:
        logger.warning("no --eval_... NAME=PATH: nothing is evaluated, and the last step is kept, not the best")
    args.eval_strategy = transformers.trainer_utils.IntervalStrategy.NO
    args.load_best_model_at_end = False


def check_lora_targets(model, names: list[str]) -> None:
    """Raises InputError for a name that is the end of no module's: PEFT is content if one of several is found."""
    modules = [name for name, module in model.named_modules() if not list(module.children())]
    for target in names:
        if target != "all-linear" and not any(name == target or name.endswith(f".{target}") for name in modules):
            ends = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
            raise InputError(
                f"--lora_target_modules {target}: no such module in the model; its linear layers are {', '.join(ends)}"
            )


def load_model(model_args: ModelArguments, args: ContrastiveTrainingArguments, masked_lm: bool):
    """(model, tokenizer), in float32, with dropout, LoRA and a new MLP head as asked. The model is an Encoder where the
    folder says how it pools, so that its settings stay."""
    name = model_args.model_name_or_path or str(QUICKSTART / "encoder")
    set_seed(args.seed)
    kwargs = {"dtype": torch.float32, "trust_remote_code": model_args.trust_remote_code}
    if model_args.attn_implementation:
        kwargs["attn_implementation"] = model_args.attn_implementation
    if model_args.dropout is not None:
        kwargs["config"] = with_dropout(name, model_args.dropout, model_args.trust_remote_code)
    settings = {key: getattr(args, key) for key in ("pooling", "max_length", "normalize")}
    if masked_lm and model_args.lora_r:
        raise InputError("--lora_r and --mlm_weight: the auxiliary trains the whole model; leave one of them out")
    if masked_lm:
        folder = find_transformer(name)
        tokenizer = load_tokenizer(name, model_args.trust_remote_code, **folder)
        model, missing = load_backbone(name, "AutoModelForMaskedLM", **folder, **kwargs)
        if missing := [k for k in missing if k.startswith(f"{model.base_model_prefix}.") and ".pooler." not in k]:
            raise InputError(f"model '{name}': its weights file lacks {listed(missing)}, which would be random")
        own = read_settings(name, model.base_model, tokenizer, args.pooling)
        if own.get("max_length", 0) > MOST_TOKENS:
            del own["max_length"]
        kept = (*settings, "prompts")
        if lost := [key for key, value in own.items() if key not in kept and value not in (None, [], "cosine")]:
            raise InputError(f"--mlm_weight: what '{name}' says of {', '.join(lost)} would be lost; take another model")
        for key in kept:  # as the folder says, unless told
            if getattr(args, key) is None and own.get(key) not in (None, {}):
                setattr(args, key, own[key])
        if args.pooling == "cls_mlp":  # masked-LM models come without a pooler
            model.base_model.pooler = type(model.base_model)(model.config).pooler
        return model, tokenizer
    new_pooler = settings["pooling"] == "cls_mlp"  # a new head, as in the paper's code, unless the folder has a trained one
    encoder = load_encoder(Encoder, name, **settings, new_pooler=new_pooler, **kwargs)
    if encoder.pooling == "cls_mlp" and not has_mlp_head(name, encoder.backbone):
        reset_dense(encoder.backbone.pooler.dense, encoder.config)
    if model_args.lora_r:
        targets = model_args.lora_target_modules or ["all-linear"]
        check_lora_targets(encoder.backbone, targets)
        config = LoraConfig(
            task_type=TaskType.FEATURE_EXTRACTION, r=model_args.lora_r, lora_alpha=model_args.lora_alpha,
            lora_dropout=model_args.lora_dropout, target_modules="all-linear" if targets == ["all-linear"] else targets,
            modules_to_save=["pooler"] if encoder.pooling == "cls_mlp" else None,
        )  # fmt: skip
        try:
            encoder.backbone = get_peft_model(encoder.backbone, config)
        except (ValueError, TypeError) as error:  # a module of a kind that PEFT does not adapt, for one
            raise InputError(f"--lora_target_modules {' '.join(targets)}: {' '.join(str(error).split())}") from error
    return encoder, encoder.tokenizer


def with_dropout(name: str, rate: float, trust_remote_code: bool = False):
    if not 0 <= rate < 1:
        raise InputError(f"--dropout {rate}: a rate is at least 0 and below 1")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, **find_transformer(name))
    except InputError:
        raise
    except (OSError, ValueError) as error:
        raise unreachable(name, error) from error
    known = [key for key in DROPOUTS if isinstance(getattr(config, key, None), float | int)]
    if not known:
        raise InputError(f"--dropout: {type(config).__name__} has no dropout rate to set")
    for key in known:
        setattr(config, key, rate)
    return config


def score_encoder(encoder: Encoder, tasks: dict[str, Task]) -> dict[str, float]:
    return {f"eval_{key}": value for key, value in score_tasks(tasks, embed_with(encoder)).items()}


def embed_with(encoder: Encoder) -> Callable:
    """The encoder as evaluation tasks call it."""
    return lambda texts, prompt_name=None: encoder.encode(texts, prompt_name, convert_to_tensor=True)


def summary(metrics: dict[str, float], tasks: dict[str, Task]) -> dict:
    """{"sts": {NAME: Spearman}, "alignment": x, "uniformity": y, "retrieval": {NAME: {METRIC: value}}, "zero_shot": ...}, of
    the kinds that there are."""
    if not metrics:
        return {}
    scores = {}
    for name, task in tasks.items():
        reported = {key: number(metrics[f"eval_{name}_{key}"], 2) for key in task.reported}
        scores.setdefault(task.kind, {})[name] = reported["spearman"] if task.kind == "sts" else reported
    if "sts" in scores:
        scores |= {key: number(metrics[f"eval_{key}"], 4) for key in ("alignment", "uniformity")}
    return scores


def number(value: float, digits: int) -> float | None:
    """Rounded for results.json, which knows no NaN."""
    return round(value, digits) if math.isfinite(value) else None


def finish(trainer: ContrastiveTrainer, before: dict, after: dict, about: dict, tasks: dict[str, Task]) -> dict:
    """Write results.json, the picture and the card's table; print the table."""
    results = {"before": summary(before, tasks), "after": summary(after, tasks), "train": about}
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        card.store_results(folder, results)
        if tasks:
            evaluations = [h for h in trainer.state.log_history if "eval_spearman" in h]
            plot_trajectory([before | {"step": 0}, *evaluations], folder / "geometry.png")
            print("\n" + "\n".join(tables.comparison_table(results)))
        card.write_card(trainer.encoder, folder, results)
        print(saved_to(folder, trainer.encoder.remote_code))
    return results


def saved_to(folder: Path, remote_code: bool = False) -> str:
    loader = loading_class(AutoConfig.from_pretrained(folder, trust_remote_code=remote_code))
    call = f"{loader}.from_pretrained({str(folder)!r}{', trust_remote_code=True' if remote_code else ''})"
    return f"\nsaved to {folder}: {call} loads it; README.md says how to pool"


def show_searches(name: str, task: Task, encoder: Encoder, count: int) -> None:
    """Print some queries of a retrieval set with the three nearest documents; the right ones are starred."""
    if not isinstance(task, Retrieval):
        return
    chosen = list(task.qrels)[:: max(1, len(task.qrels) // count)][:count]
    some = dataclasses.replace(task, qrels={query: task.qrels[query] for query in chosen})
    _, found = some.rank(embed_with(encoder), 3)
    if get_rank() == 0:
        print(f"\nsearches in {name} ({len(task.corpus):,} documents; * is the one looked for):")
        for query, documents in found.items():
            print(f"\n  {textwrap.shorten(task.queries[query], 100)}")
            for document in documents:
                star = "*" if document in task.qrels[query] else " "
                print(f"  {star} {textwrap.shorten(task.corpus[document], 90)}")
