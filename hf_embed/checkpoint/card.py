"""README.md of a saved folder: what the model is, how to load it, what it was trained on, what it scores.

All of it comes from the encoder and from results.json beside it, so the card can be made anew at any time. What users have
named (data, sets, models) goes into the metadata through a YAML writer and into the text as code: it cannot become Markdown or
HTML.
"""

import hashlib
import json
import math
import re
from pathlib import Path

import torch
from huggingface_hub import EvalResult, ModelCardData

from hf_embed.objectives import OBJECTIVES
from hf_embed.pooling import saved_pooling
from hf_embed.tempscale import TempScaleConfig
from hf_embed.tempscale.fold import is_foldable
from hf_embed.text_models import loading_class

TAKE = {
    "cls": ["vectors = output.last_hidden_state[:, 0]"],
    "cls_mlp": ["vectors = output.pooler_output"],
    "mean": [
        'mask = batch["attention_mask"].unsqueeze(-1)',
        "vectors = (output.last_hidden_state * mask).sum(1) / mask.sum(1)",
    ],
    "last": [
        'last = batch["attention_mask"].sum(1) - 1  # padding is on the right',
        "vectors = output.last_hidden_state[torch.arange(len(last)), last]",
    ],
    "weighted_mean": [
        'weights = (batch["attention_mask"].cumsum(1) * batch["attention_mask"]).unsqueeze(-1)  # 1, 2, 3 ... along the tokens',
        "vectors = (output.last_hidden_state * weights).sum(1) / weights.sum(1)",
    ],
    "first_last": [
        'mask = batch["attention_mask"].unsqueeze(-1)',
        "states = (output.hidden_states[1] + output.hidden_states[-1]) / 2",
        "vectors = (states * mask).sum(1) / mask.sum(1)",
    ],
    "top2": [
        'mask = batch["attention_mask"].unsqueeze(-1)',
        "states = (output.hidden_states[-2] + output.hidden_states[-1]) / 2",
        "vectors = (states * mask).sum(1) / mask.sum(1)",
    ],
}
EQUATIONS = {name: kind.equation for name, kind in OBJECTIVES.items()}
PAPERS = {name: kind.paper for name, kind in OBJECTIVES.items()} | {
    "TempScale": "Zhou et al.: Length-Induced Embedding Collapse in PLM-based Models, https://arxiv.org/abs/2410.24200",
}
FOLDER = "FOLDER"  # what the snippets load, until the model has a name
CODE = (
    "This model has an architecture of its own: the Python files beside the weights are its code, which loaders run only with "
    "`trust_remote_code=True`. Read them first.\n\n"
)
MARK = "<!-- hf_embed made this card: {} -->"


def write_card(encoder, folder: str | Path, results: dict | None = None, overwrite: bool = False) -> None:
    """Make the card of `folder`, unless someone has written or changed one there (`overwrite`: even then).

    `results` as in results.json, which is read if they are not given.
    """
    path = Path(folder, "README.md")
    if path.is_file() and not overwrite and not is_ours(path.read_text(encoding="utf-8")):
        return
    if results is None:
        results = stored_results(folder)
    write_whole(path, model_card(encoder, results, picture=Path(folder, "geometry.png").is_file()))


def is_ours(card: str) -> bool:
    """Whether a card is as `model_card` made it."""
    text, mark, rest = card.rpartition(MARK.partition("{")[0])
    return bool(mark) and rest == f"{digest(text)} -->\n"


def with_name(card: str, name: str) -> str:
    """A card of ours with snippets that load `name`, OWNER/NAME; one that someone has edited as it is."""
    if not is_ours(card):
        return card
    text = card.rpartition(MARK.partition("{")[0])[0].replace(json.dumps(FOLDER), json.dumps(name))
    return text + MARK.format(digest(text)) + "\n"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def stored_results(folder: str | Path) -> dict:
    path = Path(folder, "results.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def store_results(folder: str | Path, results: dict) -> None:
    write_whole(Path(folder, "results.json"), json.dumps(results, indent=2) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file aside and move it to its place: whatever happens, the old one or the new one is there as a whole."""
    new = path.with_name(f".{path.name}.new")
    try:
        new.write_text(text, encoding="utf-8")
        new.replace(path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def model_card(encoder, results: dict | None = None, picture: bool = False, name: str = FOLDER) -> str:
    """The card of an encoder.

    `results` are as in results.json; `picture` says that geometry.png lies beside it; `name` is what its snippets load.
    """
    results, pooling = results or {}, saved_pooling(encoder.pooling)
    take = [*TAKE[pooling], *dense_lines(encoder, pooling, json.dumps(name))]
    take += ["vectors = torch.nn.functional.normalize(vectors, dim=-1)"] if encoder.normalize else []
    take += [f"vectors = vectors[:, :{encoder.truncate_dim}]"] if encoder.truncate_dim else []
    texts = ["a cat", "a dog sleeping by the fire"]
    sections = [results_section(results, picture), sweep_section(encoder, results.get("tempscale")), mteb_section(results)]
    sections += [training_section(results.get("train")), prompts_section(encoder), limits_section(encoder, results)]
    sections += [papers_section(encoder, results)]
    fill = {
        "metadata": metadata(encoder, results),
        "title": "Text embeddings",
        "architecture": type(encoder.base).__name__,
        "parameters": f"{sum(parameter.numel() for parameter in encoder.base.parameters()):,}",
        "dimension": encoder.dimension,
        "max_length": encoder.max_length,
        "pooling": pooling,
        "normalize": normalize_note(encoder),
        "tempscale": tempscale_note(encoder),
        "name": json.dumps(name),
        "trust": ", trust_remote_code=True" if encoder.remote_code else "",
        "code": CODE if encoder.remote_code else "",
        "loader": loading_class(encoder.config),
        "imports": ", ".join(sorted([loading_class(encoder.config), "AutoTokenizer"])),
        "texts": json.dumps(texts),
        "prompted": json.dumps([encoder.prompt() + text for text in texts]).replace("`", "\\u0060"),
        "take": "\n".join(take),
        "sections": "\n".join(f"\n{section}" for section in sections if section),
    }
    template = Path(__file__).with_name("model_card.md").read_text(encoding="utf-8")
    text = template.format(**fill).rstrip() + "\n\n"
    return text + MARK.format(digest(text)) + "\n"


def normalize_note(encoder) -> str:
    note = "unit vectors" if encoder.normalize else "not normalised"
    if encoder.truncate_dim:
        note += f", of which the first {encoder.dimension} numbers are kept (`truncate_dim`)"
    if encoder.similarity_fn_name != "cosine":
        return f"{note}; its similarity function is `{encoder.similarity_fn_name}`"
    return note if encoder.normalize and not encoder.truncate_dim else f"{note}; compare with the cosine"


def dense_lines(encoder, pooling: str, name: str) -> list[str]:
    """Code for the layers behind the pooling, which AutoModel does not know."""
    lines, first = [], 3 if pooling == "cls_mlp" else 2
    for i, layer in enumerate(encoder.dense):
        lines.append(f'dense = load_file(cached_file({name}, "{first + i}_Dense/model.safetensors"))')
        lines.append('out = torch.nn.functional.linear(vectors, dense["linear.weight"], dense.get("linear.bias"))')
        out = f"torch.nn.{type(layer.activation).__name__}()(out)"
        if isinstance(layer.residual, torch.nn.Linear):
            out += ' + torch.nn.functional.linear(vectors, dense["residual.weight"])'
        elif layer.residual is not None:
            out += " + vectors"
        lines.append(f"vectors = {out}")
    return ["from safetensors.torch import load_file", "from transformers.utils import cached_file", *lines] if lines else []


# ---- metadata that the Hub reads ----


def metadata(encoder, results: dict) -> str:
    train = results.get("train", {})
    about = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["sentence-transformers", "feature-extraction", "sentence-similarity", "hf_embed"],
        base_model=train.get("base_model"),
        datasets=train.get("datasets") or None,
        language=train.get("language") or None,
        license=train.get("license") or None,
        model_name="Text embeddings",
        eval_results=[EvalResult(**result) for result in eval_results(results)] or None,
    )
    return f"---\n{about.to_yaml()}\n---"


def eval_results(results: dict) -> list[dict]:
    """The scores of results.json as the Hub's model-index takes them."""
    found, after = [], results.get("after", {})

    def add(kind: str, task: str, dataset: str, metric: str, value: float | None, split: str | None = None) -> None:
        if value is not None and math.isfinite(value):
            names = {"task_type": kind, "task_name": task, "dataset_type": slug(dataset), "dataset_name": dataset}
            found.append(names | {"dataset_split": split, "metric_type": metric, "metric_name": metric, "metric_value": value})

    for name, score in after.get("sts", {}).items():
        add("semantic-similarity", "Semantic Similarity", name, "spearman_cosine", score)
    for name, scores in after.get("retrieval", {}).items():
        for metric in ("ndcg@10", "mrr@10", "recall@100"):
            if metric in scores:
                add("information-retrieval", "Information Retrieval", name, metric.replace("@", "_at_"), scores[metric])
    for name, scores in after.get("zero_shot", {}).items():
        add("zero-shot-classification", "Zero-Shot Classification", name, "accuracy", scores["accuracy"])
    for row in results.get("mteb", []):
        add(row["type"], row["type"], f"MTEB {row['task']}", row["metric"], row["score"], row["split"])
    return found


def slug(name: str) -> str:
    return re.sub(r"[^\w./-]+", "-", name).strip("-") or "unnamed"


# ---- sections; each "" where there is nothing to say ----


def block(title: str, lines: list[str], before: str = "") -> str:
    """A section with literal lines. Indented, they are code: Markdown and HTML in them stay text."""
    if not lines:
        return ""
    return "\n".join([f"## {title}", "", *([before, ""] if before else []), *(f"    {plain(line)}".rstrip() for line in lines)])


def plain(line: str) -> str:
    """One line, whatever a name contains."""
    return "".join(letter if letter.isprintable() else " " for letter in line)


def results_section(results: dict, picture: bool) -> str:
    lines = table(results) if results.get("after") else []
    lines += ["", *seeds_table(results)] if results.get("seeds") else []
    section = block("Results", lines)
    if section and picture:
        section += "\n\n![Alignment against uniformity along the training](geometry.png)"
    return section


def mteb_section(results: dict) -> str:
    rows = results.get("mteb", [])
    width = max((len(row["task"]) for row in rows), default=0)
    return block("MTEB", [f"{row['task']:{width}}  {row['split']:>10}  {row['score']:>6.2f}  {row['metric']}" for row in rows])


def training_section(train: dict | None) -> str:
    if not train:
        return ""
    objective = dict(train["objective"])
    name = objective.pop("name")
    inner = objective.get("objective")
    lines = [
        f"from        {train['model']}",
        f"on          {train['data']}, {train['rows']:,} rows",
        f"objective   {name}: " + ", ".join(f"{key} {value}" for key, value in objective.items()),
    ]
    equation = EQUATIONS.get(name) or EQUATIONS.get("ImprovedContrastive" if inner else "", "")
    lines += [f"            {equation}"] if equation else []
    lines += [f"steps       {train['steps']:,}, of {train['batch_size']:,} rows", f"seed        {train['seed']}"]
    lines += [f"set         {key} {value}" for key, value in train.get("settings", {}).items()]
    if train.get("hardware"):
        lines.append(f"took        {duration(train['seconds'])} on {train['hardware']}")
    lines.append("with        " + ", ".join(f"{package} {version}" for package, version in train["versions"].items()))
    return block("Training", lines)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "some time"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {seconds} s"


def prompts_section(encoder) -> str:
    default = encoder.default_prompt_name
    lines = [f"{name:9} {text!r}{' (the default)' * (name == default)}" for name, text in encoder.prompts.items()]
    return block("Prompts", lines, "Put before a text; sentence-transformers and hf_embed do so with `prompt_name`.")


def limits_section(encoder, results: dict) -> str:
    lines = [f"Texts are cut after {encoder.max_length} tokens."]
    if results.get("after") or results.get("mteb"):
        lines.append("The scores above are of the sets named there, and of no others: measure on texts of your own first.")
    else:
        lines.append("It was not evaluated: measure on texts of your own first.")
    if (results.get("train", {}).get("chosen_by") or {}).get("metric"):
        lines.append("Sets that chose the checkpoint or the seed flatter it a little.")
    return "\n".join(["## Limits", "", *(f"- {line}" for line in lines)])


def papers_section(encoder, results: dict) -> str:
    objective = results.get("train", {}).get("objective", {})
    names = [objective.get("name"), "ImprovedContrastive" if "objective" in objective else None]
    names += ["TempScale"] if getattr(encoder.base.config, "temp_scale", None) else []
    found = [PAPERS[name] for name in names if PAPERS.get(name)]
    return "\n".join(["## Papers", "", *(f"- {paper}" for paper in found)]) if found else ""


def tempscale_note(encoder) -> str:
    """What the card says of attention's temperature."""
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


def sweep_section(encoder, sweep: dict | None) -> str:
    """What the card says of the search for the temperature that this model has; nothing of a search for another."""
    entry = getattr(encoder.base.config, "temp_scale", None) or {"temperature": 1}
    if not sweep or entry["temperature"] != sweep["temperature"]:
        return ""
    return block("The temperature", sweep_table(sweep))


# ---- tables, for the console too ----


def swept_columns(sweep: dict) -> list[str]:
    """The tasks, and their mean if there are several."""
    names = [name for name in sweep["curve"][0] if name != "temperature"]
    return names if len(names) > 2 else names[:1]


def sweep_table(sweep: dict) -> list[str]:
    """A line for each temperature, the chosen one starred; then what it gained."""
    names = swept_columns(sweep)
    lines = ["temperature" + "".join(f"  {name:>12}" for name in names)]
    for row in sweep["curve"]:
        star = "*" if row["temperature"] == sweep["temperature"] else " "
        lines.append(f"{row['temperature']:>10g}{star}" + "".join(f"  {row[name]:>12.2f}" for name in names))
    return [
        *lines,
        "",
        f"best: {sweep['temperature']:g}, {sweep['gain']:+.2f} against 1 on the queries that chose it, "
        f"{sweep['cross_validated_gain']:+.2f} on queries that did not ({len(sweep['fold_temperatures'])} folds)",
    ]


def table(results: dict) -> list[str]:
    """before -> after, a line for each evaluation set, then alignment and uniformity."""
    before, after = labelled(results["before"]), labelled(results["after"])
    width = max(map(len, before))
    lines = [f"{'':{width}}  {'before':>8}  {'after':>8}  {'change':>8}"]
    for label, a in before.items():
        b, digits = after[label], digits_of(label)
        lines.append(f"{label:{width}}  {a:8.{digits}f}  {b:8.{digits}f}  {b - a:+8.{digits}f}")
    return lines


def seeds_table(results: dict) -> list[str]:
    """Mean, smallest and largest over the seeds of a run, a line for each measure, and the seed that this model is of."""
    seeds = {seed: labelled(scores) for seed, scores in results["seeds"].items()}
    kept = seeds[str(results["seed"])]
    width = max(map(len, kept))
    lines = [f"{f'{len(seeds)} seeds':{width}}  {'mean':>8}  {'min':>8}  {'max':>8}  {'seed ' + str(results['seed']):>8}"]
    for label, value in kept.items():
        values, digits = [scores[label] for scores in seeds.values()], digits_of(label)
        numbers = (sum(values) / len(values), min(values), max(values), value)
        lines.append(f"{label:{width}}  " + "  ".join(f"{n:8.{digits}f}" for n in numbers))
    return lines


def labelled(scores: dict) -> dict[str, float]:
    """A model's scores as results.json has them, each under the name that tables give it."""
    found = {f"STS {name} (Spearman x 100)": score for name, score in scores.get("sts", {}).items()}
    for kind, metric, label in (("retrieval", "ndcg@10", "nDCG@10"), ("zero_shot", "accuracy", "accuracy")):
        found |= {f"{name} ({label} x 100)": of[metric] for name, of in scores.get(kind, {}).items()}
    found |= {f"{key} (lower is better)": scores[key] for key in ("alignment", "uniformity") if key in scores}
    return {label: math.nan if value is None else value for label, value in found.items()}


def digits_of(label: str) -> int:
    return 3 if "lower is better" in label else 2
