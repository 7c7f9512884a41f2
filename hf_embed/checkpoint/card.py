"""README.md of a saved folder: what the model is, how to load it, its training data and its scores.

All content comes from the encoder and from results.json beside it, so the card can be written again at any time. Names that
users choose (of data, evaluation sets, models) enter the metadata through a YAML writer and the text as code, so that they
cannot become Markdown or HTML.
"""

import hashlib
import json
import logging
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, ModelCardData

from hf_embed.checkpoint.layout import (
    DenseModule,
    NormalizeModule,
    PoolingModule,
    TransformerModule,
    modules_of,
    of_kind,
)
from hf_embed.checkpoint.tables import Results, comparison_table, duration, mteb_table, seeds_table, sweep_table
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.objectives import OBJECTIVES
from hf_embed.pooling import POOLINGS, Dense, find_pooling, saved_pooling
from hf_embed.read_files import first_line, read_json, read_text
from hf_embed.safe_files import write_text
from hf_embed.tempscale import TempScaleConfig
from hf_embed.tempscale.fold import is_foldable
from hf_embed.text_models import loading_class

logger = logging.getLogger(__name__)

TITLE = "Text embeddings"
EQUATIONS = {name: kind.equation for name, kind in OBJECTIVES.items()}
PAPERS = {name: kind.paper for name, kind in OBJECTIVES.items()} | {
    "TempScale": "Zhou et al.: Length-Induced Embedding Collapse in PLM-based Models, https://arxiv.org/abs/2410.24200",
}
# The names of some kinds of evaluation sets on the Hub, as in sentence-transformers: task type, task name and metrics.
AS_SENTENCE_TRANSFORMERS = {
    "triplet": ("triplet", "Triplet", {"triplet_accuracy": "cosine_accuracy"}),
    "pair_classification": (
        "binary-classification", "Binary Classification",
        {"pair_ap": "cosine_ap", "pair_accuracy": "cosine_accuracy", "pair_accuracy_threshold": "cosine_accuracy_threshold",
         "pair_f1": "cosine_f1", "pair_f1_threshold": "cosine_f1_threshold"},
    ),
    "reranking": (
        "reranking", "Reranking", {"rerank_map": "map", "rerank_mrr@10": "mrr_at_10", "rerank_ndcg@10": "ndcg_at_10"},
    ),
}  # fmt: skip
RESULT_KEYS = {"before", "after", "train", "mteb", "tempscale", "seed", "seeds", "card", "evaluated"}  # keys of results.json
# Facts of a card: their names in Trainer, and in results.json.
FACTS = {"model_name": "title", "language": "language", "license": "license", "tags": "tags", "finetuned_from": "base_model",
         "dataset": "data", "dataset_tags": "datasets"}  # fmt: skip
PROMPTS = (
    "Put before a text; sentence-transformers and hf_embed do so with `prompt_name`. Give other loaders, and servers that "
    "do not know the prompts, texts that begin with them."
)
FOLDER = "FOLDER"  # the name that snippets load until the model has one
CODE = (
    "This model has an architecture of its own: the Python files beside the weights are its code, which loaders run only with "
    "`trust_remote_code=True`. Read them first.\n\n"
)
MARK = "<!-- hf_embed made this card: {} -->"
TEXTS = ["a cat", "a dog sleeping by the fire"]  # the texts that the snippets encode


def write_card(
    encoder: Encoder,
    folder: str | Path,
    results: Results | None = None,
    overwrite: bool = False,
    title: str | None = None,
    language: str | list[str] | None = None,
    license: str | None = None,
) -> None:
    """Write the model card of `folder`, unless someone has written or changed a card there.

    results.json keeps the title, language and license.

    Args:
        encoder: the model in the folder.
        folder: the folder of README.md.
        results: the content of results.json. Default: read it from the folder.
        overwrite: also replace a card that someone has written or changed.
        title: the title. Default: the title of the earlier card, or "Text embeddings".
        language: the language of the texts, as the Hub writes it.
        license: the license, as the Hub writes it.
    """
    path = Path(folder, "README.md")
    if path.is_file() and not overwrite and not is_generated(card_text(path)):
        return
    if results is None:
        results = stored_results(folder)
    if named := {key: value for key, value in (("title", title), ("language", language), ("license", license)) if value}:
        results = keep_results(folder, results | {"card": results.get("card", {}) | named})
    write_text(path, model_card(encoder, results, picture=Path(folder, "geometry.png").is_file()))


def card_text(path: Path) -> str:
    """Return the text of a card, or "" if the file is not text. Such a file does not come from this package."""
    with suppress(InputError):
        return read_text(path)
    return ""


def is_generated(text: str) -> bool:
    """Return whether a card is unchanged since `model_card` made it."""
    body, mark, rest = text.rpartition(MARK.partition("{")[0])
    return bool(mark) and rest == f"{digest(body)} -->\n"


def with_repository(text: str, repository: str) -> str:
    """Return a generated card with snippets that load `repository`, OWNER/NAME. An edited card is returned unchanged."""
    if not is_generated(text):
        return text
    body = text.rpartition(MARK.partition("{")[0])[0]
    return with_mark(body.replace(json.dumps(FOLDER), json.dumps(repository)))


def with_mark(body: str) -> str:
    """Append the mark by which `is_generated` recognizes a card."""
    return body + MARK.format(digest(body)) + "\n"


def digest(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stored_results(folder: str | Path) -> Results:
    """Return the content of results.json in `folder`, or {} if there is no such file or it is not from this package."""
    return own_results(Path(folder, "results.json")) or {}


def own_results(path: Path) -> Results | None:
    """Return the content of a results.json, {} if there is none, or None if it is damaged or not from this package."""
    if not path.is_file():
        return {}
    try:
        found = read_json(path, with_nan=True)
        if not found.keys() <= RESULT_KEYS:
            return None
        metadata(found), results_section(found, False), training_section(found.get("train")), mteb_table(found.get("mteb", []))
    except Exception as error:  # a user may have edited it, and any value may have another type
        logger.warning(f"{path} is damaged ({first_line(error)}); it stays as it is, and the card does not show it")
        return None
    return found


def keep_results(folder: str | Path, results: Results) -> Results:
    """Write results.json in `folder`, unless a file of that name is not from this package. Return the results.

    The title, language and license of an earlier card stay.
    """
    path = Path(folder, "results.json")
    before = own_results(path)
    if card := (before or {}).get("card", {}) | results.get("card", {}):
        results = results | {"card": card}
    if before is not None:
        store_results(folder, results)
    else:
        logger.warning(f"{path} is not a file of this package and stays as it is; the card says what the training has to say")
    return results


def store_results(folder: str | Path, results: Results) -> None:
    """Write results.json in `folder`."""
    write_text(Path(folder, "results.json"), json.dumps(results, indent=2, default=str) + "\n")


def model_card(encoder: Encoder, results: Results | None = None, picture: bool = False, name: str = FOLDER) -> str:
    """Return the text of the model card of an encoder.

    Args:
        encoder: the model to describe.
        results: the content of results.json.
        picture: whether geometry.png is beside the card.
        name: the model name that the snippets load.
    """
    results = results or {}
    sections = [
        results_section(results, picture),
        sweep_section(encoder, results.get("tempscale")),
        code_section("MTEB", mteb_table(results.get("mteb", []))),
        training_section(facts(results) if results.get("train") else None),
        prompts_section(encoder),
        limits_section(encoder, results),
        papers_section(encoder, results),
    ]
    fields = {
        "metadata": metadata(results),
        "title": plain(facts(results).get("title") or TITLE),
        "architecture": type(encoder.base).__name__,
        "parameters": f"{sum(parameter.numel() for parameter in encoder.base.parameters()):,}",
        "dimension": encoder.dimension,
        "max_length": encoder.max_length,
        "pooling": f"`{saved_pooling(encoder.pooling)}` ({POOLINGS[saved_pooling(encoder.pooling)].description})",
        "normalize": normalize_note(encoder),
        "servers": f"\n**{note}**\n" if (note := served_otherwise(encoder)) else "",
        "tempscale": tempscale_note(encoder),
        "sections": "\n".join(f"\n{section}" for section in sections if section),
    }
    template = read_text(Path(__file__).with_name("model_card.md"))
    return with_mark(template.format(**fields, **snippet_fields(encoder, name)).rstrip() + "\n\n")


# ---- the code that loads it ----


def snippet_fields(encoder: Encoder, name: str) -> dict[str, str]:
    """Return the values for the placeholders in the template's snippets."""
    loader = loading_class(encoder.config)
    return {
        "name": json.dumps(name),
        "trust": ", trust_remote_code=True" if encoder.remote_code else "",
        "code": CODE if encoder.remote_code else "",
        "loader": loader,
        "imports": ", ".join(sorted([loader, "AutoTokenizer"])),
        "texts": json.dumps(TEXTS),
        "prompted": json.dumps([encoder.prompt() + text for text in TEXTS]).replace("`", "\\u0060"),
        "vectors": "\n".join(vector_lines(encoder, json.dumps(name))),
    }


def vector_lines(encoder: Encoder, name: str) -> list[str]:
    """Return code that turns the model's `output` into `vectors`, as `Encoder.encode` gives them."""
    lines = [*POOLINGS[saved_pooling(encoder.pooling)].card, *dense_lines(encoder, name)]
    if encoder.normalize:
        lines.append("vectors = torch.nn.functional.normalize(vectors, dim=-1)")
    if encoder.truncate_dim:
        lines.append(f"vectors = vectors[:, :{encoder.truncate_dim}]")
    return lines


def dense_lines(encoder: Encoder, name: str) -> list[str]:
    """Return code for the dense layers after the pooling, which AutoModel does not load."""
    if not encoder.dense:
        return []
    lines = ["from safetensors.torch import load_file", "from transformers.utils import cached_file"]
    layers = cast("list[Dense]", list(encoder.dense))
    modules = of_kind(modules_of(encoder, {}), DenseModule)[-len(layers) :]  # the model's own pooler may come first
    for layer, module in zip(layers, modules):
        lines.append(f'dense = load_file(cached_file({name}, "{module.path}/model.safetensors"))')
        lines.append('out = torch.nn.functional.linear(vectors, dense["linear.weight"], dense.get("linear.bias"))')
        out = f"torch.nn.{type(layer.activation).__name__}()(out)"
        if isinstance(layer.residual, torch.nn.Linear):
            out += ' + torch.nn.functional.linear(vectors, dense["residual.weight"])'
        elif layer.residual is not None:
            out += " + vectors"
        lines.append(f"vectors = {out}")
    return lines


def normalize_note(encoder: Encoder) -> str:
    """Return the card's note on the norm of the vectors and on how to compare them."""
    note = "unit vectors" if encoder.normalize else "not normalised"
    if encoder.truncate_dim:
        note += f", of which the first {encoder.dimension} numbers are kept (`truncate_dim`)"
    if encoder.similarity_fn_name != "cosine":
        return f"{note}; its similarity function is `{encoder.similarity_fn_name}`"
    return note if encoder.normalize and not encoder.truncate_dim else f"{note}; compare them with the cosine"


# ---- metadata that the Hub reads ----


def facts(results: Results) -> dict[str, Any]:
    """Return the facts about the training. Facts that a user has set for the card take precedence."""
    return results.get("train", {}) | results.get("card", {})


def card_facts(named: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Trainer.create_model_card` under their names in results.json.

    Raises:
        InputError: if an argument is unknown.
    """
    if unknown := sorted(named.keys() - FACTS.keys()):
        raise InputError(f"create_model_card has no argument {unknown[0]}; the card takes {', '.join(FACTS)}")
    return {FACTS[key]: value for key, value in named.items() if value is not None}


def rename_card(encoder: Encoder, folder: str, named: dict[str, Any]) -> None:
    """Write the card in `folder` again with these facts, if there is a card."""
    if Path(folder, "README.md").is_file():
        write_card(encoder, folder, keep_results(folder, stored_results(folder) | {"card": named}))


def metadata(results: Results) -> str:
    """Return the metadata at the top of the card, in YAML."""
    train = facts(results)
    tags = [train["tags"]] if isinstance(train.get("tags"), str) else train.get("tags") or []
    about = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "hf_embed", *tags],
        base_model=train.get("base_model"),
        datasets=train.get("datasets") or None,
        language=train.get("language") or None,
        license=train.get("license") or None,
        model_name=train.get("title") or TITLE,
        eval_results=eval_results(results) or None,
    )
    return f"---\n{about.to_yaml()}\n---"


def eval_results(results: Results) -> list[EvalResult]:
    """Return the scores of results.json in the form of the Hub's model-index."""
    after = results.get("after", {})
    found = [
        eval_result("semantic-similarity", "Semantic Similarity", name, "spearman_cosine", score)
        for name, score in after.get("sts", {}).items()
    ]
    for name, scores in after.get("retrieval", {}).items():
        for metric in ("ndcg@10", "mrr@10", "recall@100"):
            label = metric.replace("@", "_at_")
            found.append(eval_result("information-retrieval", "Information Retrieval", name, label, scores.get(metric)))
    for name, scores in after.get("zero_shot", {}).items():
        found.append(eval_result("zero-shot-classification", "Zero-Shot Classification", name, "accuracy", scores["accuracy"]))
    for kind, (task_type, task, metrics) in AS_SENTENCE_TRANSFORMERS.items():
        for name, scores in after.get(kind, {}).items():
            found += [eval_result(task_type, task, name, label, scores.get(metric)) for metric, label in metrics.items()]
    for row in results.get("mteb", []):
        task, name = row["type"], f"MTEB {row['task']}"
        found.append(eval_result(task, task, name, row["metric"], row["score"], row["split"]))
    return [result for result in found if result.metric_value is not None and math.isfinite(result.metric_value)]


def eval_result(kind: str, task: str, dataset: str, metric: str, value: float | None, split: str | None = None) -> EvalResult:
    """Return one score in the form of the Hub's model-index. `kind` is the Hub's name of the task."""
    return EvalResult(
        task_type=kind,
        task_name=task,
        dataset_type=slug(dataset),
        dataset_name=dataset,
        dataset_split=split,
        metric_type=metric,
        metric_name=metric,
        metric_value=value,
    )


def slug(name: str) -> str:
    """Return a name with only letters, digits and _-./ in it."""
    return re.sub(r"[^\w./-]+", "-", name).strip("-") or "unnamed"


def plain(text: str) -> str:
    """Return a user's text as one line without active Markdown or HTML."""
    return re.sub(r"([\\`*_{}\[\]<>#|~&!])", r"\\\1", one_line(text)).strip()


# ---- vectors on servers ----


def served_otherwise(encoder: Encoder) -> str:
    """Say how vectors differ on servers that read no module except 1_Pooling. Return "" if they do not differ.

    Such a server ignores all modules before and after the pooling. The last normalization does not count, because it changes no
    cosine similarity.
    """
    known = (TransformerModule, PoolingModule, NormalizeModule)
    unread = [module.path for module in modules_of(encoder, {}) if not isinstance(module, known)]
    if not unread:
        return ""
    pooling = POOLINGS[saved_pooling(encoder.pooling)]
    simple = find_pooling(pooling.flag)
    mend = "" if simple == pooling.name else f", or train with the pooling {simple}"
    return (
        "Servers that read only 1_Pooling/config.json, such as text-embeddings-inference, pool this model by "
        f"{pooling.mode} and leave out {' and '.join(unread)}, so their vectors differ from its own (pooling {pooling.name}): "
        f"load it as the card shows{mend}."
    )


# ---- sections; each is "" if it has no content ----


def code_section(title: str, lines: list[str], before: str = "") -> str:
    """Return a section with literal lines. They are indented as code, so that Markdown and HTML in them stay text."""
    if not lines:
        return ""
    code = [f"    {one_line(line)}".rstrip() for line in lines]
    return "\n".join([f"## {title}", "", *([before, ""] if before else []), *code])


def one_line(text: str) -> str:
    """Return `text` as one line. Characters that are not printable become spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def results_section(results: Results, picture: bool) -> str:
    """Return the scores before and after the training, and those of the seeds."""
    lines = comparison_table(results) if results.get("after") else []
    lines += ["", *seeds_table(results)] if results.get("seeds") else []
    section = code_section("Results", lines)
    if section and picture:
        section += "\n\n![Alignment against uniformity along the training](geometry.png)"
    return section


def inner_name(objective: dict[str, Any]) -> str:
    """Return the name of the objective inside another one, such as Matryoshka, or "" if there is none.

    Results of versions before 0.1.0 do not have the name, because the recipes had only one such objective.
    """
    return objective["objective"].get("name", "ImprovedContrastive") if objective.get("objective") else ""


def training_section(train: dict[str, Any] | None) -> str:
    """Return the section on the training data and settings, or "" if too little is known."""
    if not train or not train.keys() >= {"model", "data", "rows", "objective", "steps", "batch_size", "seed", "versions"}:
        return ""
    objective = dict(train["objective"])
    name = objective.pop("name")
    inner = inner_name(objective)
    lines = [
        f"base model  {train['model']}",
        f"trained on  {train['data']}, {train['rows']:,} rows",
        f"objective   {name}: {', '.join(f'{key} {value}' for key, value in objective.items())}".removesuffix(": "),
    ]
    equation = EQUATIONS.get(name) or EQUATIONS.get(inner, "")
    lines += [f"            {equation}"] if equation else []
    lines += [f"steps       {train['steps']:,}, of {train['batch_size']:,} rows each"]
    resumed = train.get("resumed_at_step")
    since = f", from step {resumed + 1:,} on" if resumed and train.get("seconds") is not None else ""
    if train.get("loss") is not None:
        lines.append(f"mean loss   {train['loss']:.4g}{since}")
    settings = train.get("settings", {})
    if train.get("learning_rate") is not None and "learning_rate" not in settings:
        lines.append(f"setting     learning_rate {train['learning_rate']:g}")
    lines += [f"setting     {key} {value}" for key, value in settings.items()]
    lines.append(f"seed        {train['seed']}")
    if train.get("hardware"):
        lines.append(f"time        {duration(train['seconds'])} on {train['hardware']}{since}")
    lines.append("software    " + ", ".join(f"{package} {version}" for package, version in train["versions"].items()))
    return code_section("Training", lines)


def prompts_section(encoder: Encoder) -> str:
    """Return the section with the prompts by name."""
    default = encoder.default_prompt_name
    lines = [f"{name:9} {text!r}{' (the default)' * (name == default)}" for name, text in encoder.prompts.items()]
    return code_section("Prompts", lines, PROMPTS)


def limits_section(encoder: Encoder, results: Results) -> str:
    """Return the section on what the model cannot do and what its scores do not show."""
    lines = [f"Texts are cut after {encoder.max_length} tokens."]
    if results.get("after") or results.get("mteb"):
        lines.append("The scores above are of the sets named there, and of no others: measure on texts of your own first.")
        if (step := results.get("train", {}).get("scored_step")) is not None:
            lines.append(f"They were measured at step {step:,} of the training, before its end.")
    else:
        lines.append("It was not evaluated: measure on texts of your own first.")
    if (results.get("train", {}).get("chosen_by") or {}).get("metric"):
        lines.append("Sets that chose the checkpoint or the seed flatter it a little.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])


def papers_section(encoder: Encoder, results: Results) -> str:
    """Return the section with the papers of the objective and of TempScale."""
    objective = results.get("train", {}).get("objective", {})
    names = [objective.get("name"), inner_name(objective)]
    names += ["TempScale"] if getattr(encoder.base.config, "temp_scale", None) else []
    found = [PAPERS[name] for name in names if PAPERS.get(name)]
    return "\n".join(["## Papers", "", *(f"- {paper}" for paper in found)]) if found else ""


def tempscale_note(encoder: Encoder) -> str:
    """Return the card's note on the temperature of the attention."""
    entry = getattr(encoder.base.config, "temp_scale", None)
    if not entry:
        return ""
    config = TempScaleConfig.from_dict({key: value for key, value in entry.items() if key != "folded"})
    title = "[TempScale](https://arxiv.org/abs/2410.24200)"
    if entry.get("folded") or is_foldable(encoder.backbone):
        return f"\n\n{title} at temperature {config.temperature} is folded into the attention weights."
    return (
        f"\n\n**{title} is part of this model, but not of its weights.** `hf_embed.Encoder` applies it; after any other loader "
        f"call `hf_embed.apply_tempscale(model, hf_embed.{config})`."
    )


def sweep_section(encoder: Encoder, sweep: dict[str, Any] | None) -> str:
    """Return the section on the temperature search, or "" if the model has another temperature than the search chose."""
    entry = getattr(encoder.base.config, "temp_scale", None) or {"temperature": 1}
    if not sweep or entry["temperature"] != sweep["temperature"]:
        return ""
    return code_section("The temperature", sweep_table(sweep))
