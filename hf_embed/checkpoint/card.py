"""README.md of a saved folder: what the model is, how to load it, its training data and its scores.

All content comes from the encoder and from results.json beside it, so the card can be written again at any time. Names that
users choose (of data, evaluation sets, models) enter the metadata through a YAML writer. In the text they are escaped or in
code, so that they cannot become Markdown or HTML.
"""

import hashlib
import json
import logging
import math
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import EvalResult, ModelCardData

from hf_embed.adapters import count_parameters
from hf_embed.checkpoint.layout import (
    DenseModule,
    NormalizeModule,
    PoolingModule,
    TransformerModule,
    modules_of,
    of_kind,
)
from hf_embed.checkpoint.tables import (
    Results,
    averaged_section,
    code_section,
    escaped,
    inner_name,
    markdown_table,
    results_section,
    slug,
    sweep_table,
    task_lines,
    training_rows,
)
from hf_embed.encoder import Encoder
from hf_embed.encoding import check_encoder
from hf_embed.errors import InputError, first_line
from hf_embed.files.read_files import read_json, read_text
from hf_embed.files.safe_files import SAVING, write_text
from hf_embed.objectives import OBJECTIVES
from hf_embed.pooling import POOLINGS, Dense, find_pooling, saved_pooling
from hf_embed.tempscale import TempScaleConfig
from hf_embed.tempscale.fold import why_not_foldable
from hf_embed.text_models import loading_class

logger = logging.getLogger(__name__)

TITLE = "Text embeddings"  # the title of a card that is not in a folder
# Folders that belong to the model of the folder around them: checkpoints, runs of single seeds, and the copy that a push reads.
PART = re.compile(r"(checkpoint|seed)-\d+|_pushing")
# The names of folders that are not yet in place, from `hf_embed.files.safe_files` and from recipes that replace an earlier run.
UNFINISHED = re.compile(rf"{re.escape(SAVING)}(.+?)(-\d+-\d+)?|\.(.+)\.new")
EQUATIONS = {name: kind.equation for name, kind in OBJECTIVES.items()}
PAPERS = {name: kind.paper for name, kind in OBJECTIVES.items()} | {
    "TempScale": "Zhou et al.: Length-Induced Embedding Collapse in PLM-based Models, https://arxiv.org/abs/2410.24200",
}
# The names of kinds of evaluation sets on the Hub, as in sentence-transformers: task type, task name and metrics.
AS_SENTENCE_TRANSFORMERS = {
    "retrieval": (
        "information-retrieval", "Information Retrieval",
        {"ndcg@10": "ndcg_at_10", "mrr@10": "mrr_at_10", "recall@100": "recall_at_100"},
    ),
    "zero_shot": ("zero-shot-classification", "Zero-Shot Classification", {"accuracy": "accuracy"}),
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
# The keys of results.json.
RESULT_KEYS = {"before", "after", "train", "mteb", "tempscale", "seed", "seeds", "card", "evaluated", "averaged"}
# Facts of a card: their names in Trainer, and in results.json.
FACTS = {"model_name": "title", "language": "language", "license": "license", "tags": "tags", "finetuned_from": "base_model",
         "dataset": "data", "dataset_tags": "datasets"}  # fmt: skip
PROMPTS = (
    "A prompt is a text that is put before each input text. sentence-transformers and hf_embed do this if you pass "
    "`prompt_name`. For other loaders and servers, put the prompt before your texts yourself."
)
FOLDER = "FOLDER"  # the name that snippets load until the model has one
FOLDER_NOTE = "In the code below, replace `FOLDER` with the path of this folder.\n\n"
CODE = (
    "This model needs its own Python code, which is in the files beside the weights. Loaders run this code only with "
    "`trust_remote_code=True`. Read the code before you run it.\n\n"
)
# The title in the metadata of a card without scores, and with scores. A long title takes several lines.
MODEL_NAME = re.compile(r"^(?:(model_name: ).*(?:\n  .*)*|(model-index:\n- name: ).*(?:\n    .*)*)", re.MULTILINE)
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
        title: the title. Default: the title of the earlier card, or the name of the folder.
        language: the language of the texts, as the Hub writes it.
        license: the license, as the Hub writes it.
    """
    check_encoder(encoder)
    path = Path(folder, "README.md")
    if not overwrite and is_edited(path):
        return
    if results is None:
        results = read_results(folder)
    if named := {key: value for key, value in (("title", title), ("language", language), ("license", license)) if value}:
        results = replace_results(folder, results | {"card": results.get("card", {}) | named})
    write_text(path, model_card(encoder, results, Path(folder, "geometry.png").is_file(), title=title_of(folder)))


def title_of(folder: str | Path) -> str:
    """Return the default title of a card: the name of the model's folder, also while that folder is not yet in place.

    >>> title_of("outputs/my-model"), title_of("outputs/my-model/checkpoint-500")
    ('my-model', 'my-model')
    """
    path = Path(os.path.realpath(folder))
    for place in (path, *path.parents):
        name = place.name
        while match := UNFINISHED.fullmatch(name):
            name = match[1] or match[3]
        if not PART.fullmatch(name):
            return name[:100] or TITLE
    return TITLE


def is_edited(path: Path) -> bool:
    """Return whether `path` is a card that someone has written or changed."""
    with suppress(InputError):  # a file that is not text does not come from this package
        return path.is_file() and not is_generated(read_text(path))
    return True


def is_generated(text: str) -> bool:
    """Return whether a card is unchanged since `model_card` made it."""
    body, mark, rest = text.rpartition(MARK.partition("{")[0])
    return bool(mark) and rest == f"{digest(body)} -->\n"


def with_repository(text: str, repository: str, title: str | None = None) -> str:
    """Return a generated card as it is uploaded to `repository`, OWNER/NAME. An edited card is returned unchanged.

    The snippets load the repository. If the card has the given `title`, the name of the repository replaces it.
    """
    if not is_generated(text):
        return text
    body = text.rpartition(MARK.partition("{")[0])[0]
    body = body.replace(FOLDER_NOTE, "").replace(json.dumps(FOLDER), json.dumps(repository))
    name = repository.rpartition("/")[2]
    heading = f"\n# {escaped(title or '')}\n"
    if title and heading in body:
        body = body.replace(heading, f"\n# {escaped(name)}\n", 1)
        body = MODEL_NAME.sub(lambda match: (match[1] or match[2]) + json.dumps(name), body, count=1)
    return with_mark(body)


def with_mark(body: str) -> str:
    """Append the mark by which `is_generated` recognizes a card."""
    return body + MARK.format(digest(body)) + "\n"


def digest(text: str) -> str:
    """Return a short hash of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_results(folder: str | Path) -> Results:
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
        metadata(found)  # this and the next line raise an error if the card could not be made from it
        sections(found, temp_scale=found.get("tempscale"))
    except Exception as error:  # a user may have edited it, and any value may have another type
        logger.warning(f"{path} is damaged ({first_line(error)}); it is left unchanged, and the card does not show its content")
        return None
    return found


def replace_results(folder: str | Path, results: Results) -> Results:
    """Write results.json in `folder`, unless a file of that name is not from this package. Return the results.

    The title, language and license of an earlier card stay.
    """
    path = Path(folder, "results.json")
    before = own_results(path)
    if card := (before or {}).get("card", {}) | results.get("card", {}):
        results = results | {"card": card}
    if before is not None:
        write_results(folder, results)
    else:
        logger.warning(
            f"{path} was not written by hf_embed and is left unchanged; the results of this training appear only in README.md"
        )
    return results


def write_results(folder: str | Path, results: Results) -> None:
    """Write results.json in `folder`."""
    write_text(Path(folder, "results.json"), json.dumps(results, indent=2, default=str) + "\n")


def model_card(encoder: Encoder, results: Results | None = None, picture: bool = False, title: str = TITLE) -> str:
    """Return the text of the model card of an encoder. Its snippets load `FOLDER`; see `with_repository`.

    Args:
        encoder: the model to describe.
        results: the content of results.json.
        picture: whether geometry.png is beside the card.
        title: the title if `results` has none.
    """
    results = results or {}
    named = results.get("card", {})
    results = results | {"card": named | {"title": named.get("title") or title}}
    temp_scale = getattr(encoder.base.config, "temp_scale", None)
    shown = sections(results, temp_scale, picture, prompts_section(encoder), encoder.max_length)
    fields = {
        "metadata": metadata(results),
        "title": escaped(str(facts(results)["title"])),
        "architecture": type(encoder.base).__name__,
        "parameters": f"{count_parameters(encoder):,}",
        "dimension": encoder.dimension,
        "max_length": encoder.max_length,
        "pooling": f"`{saved_pooling(encoder.pooling)}` ({POOLINGS[saved_pooling(encoder.pooling)].description})",
        "normalize": normalize_note(encoder),
        "similarity": escaped(encoder.similarity_fn_name),
        "servers": f"\n**{note}**\n" if (note := served_otherwise(encoder)) else "",
        "tempscale": tempscale_note(encoder),
        "sections": "\n".join(f"\n{section}" for section in shown if section),
    }
    template = read_text(Path(__file__).with_name("model_card.md"))
    return with_mark(template.format(**fields, **snippet_fields(encoder)).rstrip() + "\n\n")


# ---- the code that loads it ----


def snippet_fields(encoder: Encoder) -> dict[str, str]:
    """Return the values for the placeholders in the template's snippets."""
    loader = loading_class(encoder.config)
    return {
        "name": json.dumps(FOLDER),
        "folder": FOLDER_NOTE,
        "trust": ", trust_remote_code=True" if encoder.remote_code else "",
        "code": CODE if encoder.remote_code else "",
        "loader": loader,
        "imports": ", ".join(sorted([loader, "AutoTokenizer"])),
        "texts": json.dumps(TEXTS),
        "prompted": json.dumps([encoder.prompt() + text for text in TEXTS], ensure_ascii=False).replace("`", "\\u0060"),
        "vectors": "\n".join(vector_lines(encoder)),
    }


def vector_lines(encoder: Encoder) -> list[str]:
    """Return code that turns the model's `output` into `vectors`, as `Encoder.encode` gives them."""
    lines = [*POOLINGS[saved_pooling(encoder.pooling)].card, *dense_lines(encoder)]
    if encoder.normalize:
        lines.append("vectors = torch.nn.functional.normalize(vectors, dim=-1)")
    if encoder.truncate_dim:
        lines.append(f"vectors = vectors[:, :{encoder.truncate_dim}]")
    return lines


def dense_lines(encoder: Encoder) -> list[str]:
    """Return code for the dense layers after the pooling, which AutoModel does not load."""
    if not encoder.dense:
        return []
    lines = ["from safetensors.torch import load_file", "from transformers.utils import cached_file"]
    layers = cast("list[Dense]", list(encoder.dense))
    modules = of_kind(modules_of(encoder, {}), DenseModule)[-len(layers) :]  # the model's own pooler may come first
    for layer, module in zip(layers, modules):
        lines.append(f'dense = load_file(cached_file("{FOLDER}", "{module.path}/model.safetensors"))')
        lines.append('out = torch.nn.functional.linear(vectors, dense["linear.weight"], dense.get("linear.bias"))')
        out = f"torch.nn.{type(layer.activation).__name__}()(out)"
        if isinstance(layer.residual, torch.nn.Linear):
            out += ' + torch.nn.functional.linear(vectors, dense["residual.weight"])'
        elif layer.residual is not None:
            out += " + vectors"
        lines.append(f"vectors = {out}")
    return lines


def normalize_note(encoder: Encoder) -> str:
    """Return the card's note on the length of the vectors."""
    note = "normalized to length 1" if encoder.normalize else "not normalized"
    return f"{note}, then truncated to the first {encoder.dimension} numbers (`truncate_dim`)" if encoder.truncate_dim else note


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
        raise InputError(f"create_model_card has no argument {unknown[0]}; use {', '.join(FACTS)}")
    return {FACTS[key]: value for key, value in named.items() if value is not None}


def rename_card(encoder: Encoder, folder: str, named: dict[str, Any]) -> None:
    """Write the card in `folder` again with these facts, if there is a card."""
    if Path(folder, "README.md").is_file():
        write_card(encoder, folder, replace_results(folder, read_results(folder) | {"card": named}))


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
        f"Servers that read only 1_Pooling/config.json use the pooling {pooling.mode} and ignore {' and '.join(unread)}, so "
        f"their vectors differ from those of this model (pooling {pooling.name}); load the model as its card shows{mend}."
    )


# ---- sections; each is "" if it has no content ----


def sections(
    results: Results, temp_scale: dict[str, Any] | None, picture: bool = False, prompts: str = "", max_length: int = 0
) -> list[str]:
    """Return the sections of a card. `temp_scale` is the entry of the model's config."""
    return [
        results_section(results, picture),
        sweep_section(results.get("tempscale"), temp_scale),
        code_section("MTEB", task_lines(results.get("mteb", []))),
        averaged_section(results.get("averaged", [])),
        training_section(facts(results) if results.get("train") else None),
        prompts,
        limits_section(results, max_length),
        papers_section(results, temp_scale),
    ]


def training_section(train: dict[str, Any] | None) -> str:
    """Return the section on the training data and settings, or "" if too little is known."""
    if not train or not train.keys() >= {"model", "data", "rows", "objective", "steps", "batch_size", "seed", "versions"}:
        return ""
    objective = train["objective"]
    lines = ["## Training", "", *markdown_table(("Setting", "Value"), training_rows(train))]
    if equation := EQUATIONS.get(objective["name"]) or EQUATIONS.get(inner_name(objective)):
        lines += ["", "The loss of a row i:", "", f"    {equation}"]
    return "\n".join(lines)


def prompts_section(encoder: Encoder) -> str:
    """Return the section with the prompts by name."""
    default = encoder.default_prompt_name
    lines = [f"{name:9} {text!r}{' (the default)' * (name == default)}" for name, text in encoder.prompts.items()]
    return code_section("Prompts", lines, PROMPTS)


def limits_section(results: Results, max_length: int) -> str:
    """Return the section on what the model cannot do and what its scores do not show."""
    lines = [f"Texts are truncated to {max_length} tokens."]
    if results.get("after") or results.get("mteb"):
        lines.append("The scores above hold only for the evaluation sets named there. Evaluate the model on your own texts.")
        if (step := results.get("train", {}).get("scored_step")) is not None:
            lines.append(f"The scores were measured at step {step:,}, before the end of the training.")
    else:
        lines.append("This model was not evaluated. Evaluate it on your own texts before you use it.")
    if (results.get("train", {}).get("chosen_by") or {}).get("metric"):
        lines.append(
            "The best checkpoint or seed was chosen by its scores on an evaluation set, so the scores on that set are slightly "
            "too optimistic."
        )
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])


def papers_section(results: Results, temp_scale: dict[str, Any] | None) -> str:
    """Return the section with the papers of the objective and of TempScale."""
    objective = results.get("train", {}).get("objective", {})
    names = [objective.get("name"), inner_name(objective)]
    names += ["TempScale"] if temp_scale else []
    found = [PAPERS[name] for name in names if PAPERS.get(name)]
    return "\n".join(["## Papers", "", *(f"- {paper}" for paper in found)]) if found else ""


def tempscale_note(encoder: Encoder) -> str:
    """Return the card's note on the temperature of the attention."""
    entry = getattr(encoder.base.config, "temp_scale", None)
    if not entry:
        return ""
    config = TempScaleConfig.from_dict({key: value for key, value in entry.items() if key != "folded"})
    title = "[TempScale](https://arxiv.org/abs/2410.24200)"
    if entry.get("folded") or why_not_foldable(encoder.backbone) is None:
        return f"\n\n{title} with temperature {config.temperature} is folded into the attention weights."
    return (
        f"\n\n**This model uses {title}, which its weights do not contain.** `hf_embed.Encoder` applies it. After any other "
        f"loader, call `hf_embed.apply_tempscale(model, hf_embed.{config})`."
    )


def sweep_section(sweep: dict[str, Any] | None, temp_scale: dict[str, Any] | None) -> str:
    """Return the section on the temperature search, or "" if the model has another temperature than the search chose."""
    if not sweep or (temp_scale or {"temperature": 1})["temperature"] != sweep["temperature"]:
        return ""
    return code_section("Temperature search", sweep_table(sweep))
