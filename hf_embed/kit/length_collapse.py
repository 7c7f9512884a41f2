"""Measures of length collapse: do embeddings become more similar to each other when the texts are longer?

The paper is https://arxiv.org/abs/2410.24200. The measures are computed for two kinds of groups of texts: the same texts
truncated to 16, 32, 64 ... tokens, so that only the length differs, and the texts as they are, in bins of similar length. For
each group of N texts:

    mean_cosine      mean cosine similarity of all pairs; higher if the embeddings are closer together
    uniformity       log E exp(-2 ||x - y||^2) over all pairs; higher if the embeddings are closer together
    effective_rank   exp of the entropy of the singular values' shares (Roy and Vetterli, 2007): how many directions are used
    to_mean          mean cosine similarity to the mean direction
    high_frequency   after each layer: the energy of the tokens' hidden states outside their mean over the text, as a share of
                     the whole energy. A low-pass filter removes this part. The first number is for the word embeddings

Shapes: N texts, T tokens, D width of the model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_embed.encoder import Encoder, tokenize_texts
from hf_embed.encoding import Tokens
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import uniformity, unit
from hf_embed.files.safe_files import writing
from hf_embed.progress import progress_bar

Report = dict[str, list[dict[str, Any]]]
LENGTHS = (16, 32, 64, 128, 256, 512)
LAYER_SAMPLE = 64  # texts whose hidden states are measured, layer by layer
# The explanation of the columns, which is printed below the tables.
COLUMNS = """columns:
  mean cosine  mean cosine similarity of all pairs of texts. Higher: the embeddings are more alike
  uniformity   log of the mean of exp(-2 squared distance) over all pairs of texts. Higher: the embeddings are more alike
  rank         effective rank, the number of directions that the embeddings use. Lower: the embeddings are more alike
  to mean      mean cosine similarity of the embeddings to their mean direction. Higher: the embeddings are more alike
  high freq.   share of the energy of the last layer's token states that lies outside their mean over the text. Lower: the
               tokens of a text are more alike"""


def length_report(encoder: Encoder, texts: list[str], wanted: Sequence[int] = LENGTHS) -> Report:
    """Measure texts truncated to the `wanted` lengths, and the texts as they are.

    Returns:
        {"cut": [...], "natural": [...]}. Each list has a dict for each group: "tokens", "texts", and the measures of the module
        docstring. A length is used in "cut" if at least half of the texts, or 100 texts, have at least that many tokens. All
        groups of "cut" hold the same texts: those with at least as many tokens as the largest of these lengths. "tokens" is the
        length in "cut", and the upper end of the bin in "natural".

    Raises:
        InputError: if there are fewer than two texts, or if too few texts have the shortest length.
    """
    lengths = sorted({min(length, encoder.max_length) for length in wanted})
    if len(texts) < 2:
        raise InputError(f"{len(texts)} text(s) are given, and at least 2 are needed; give more texts")
    tokens = np.array(list(map(len, token_ids(encoder, texts))))
    enough = min(100, max(2, len(texts) // 2))
    filled = [length for length in lengths if (tokens >= length).sum() >= enough]
    if not filled:
        raise InputError(
            f"only {(tokens >= lengths[0]).sum()} of {len(texts)} texts have {lengths[0]} tokens or more; give longer texts"
        )
    long = [text for text, count in zip(texts, tokens) if count >= filled[-1]]
    bar = progress_bar(filled, desc="Truncated texts", unit="length")
    report: Report = {"cut": [{"tokens": length} | measure(encoder, long, length) for length in bar], "natural": []}
    for lower, upper in progress_bar(list(zip([0, *lengths], lengths)), desc="Full texts", unit="length"):
        last = upper == lengths[-1]  # the last bin also takes longer texts, truncated
        inside = [text for text, count in zip(texts, tokens) if lower < count and (count <= upper or last)]
        if len(inside) > 1:
            report["natural"].append({"tokens": upper} | measure(encoder, inside, upper))
    return report


def measure(encoder: Encoder, texts: list[str], max_length: int) -> dict[str, Any]:
    """Return the measures of one group, with its texts truncated to `max_length` tokens."""
    before = encoder.max_length
    encoder.max_length = max_length
    try:
        vectors = unit(np.asarray(encoder.encode(texts)))
        layers = high_frequency(encoder, texts[:LAYER_SAMPLE])
    finally:
        encoder.max_length = before
    return {"texts": len(texts)} | geometry(vectors) | {"high_frequency": layers}


def geometry(vectors: np.ndarray) -> dict[str, float]:
    """Return the first four measures of the module docstring for unit vectors (N, D)."""
    count, total = len(vectors), vectors.sum(0)
    values = np.linalg.svd(vectors, compute_uv=False)
    shares = values[values > 1e-12] / values.sum()
    return {
        "mean_cosine": float((total @ total - count) / (count * (count - 1))),
        "uniformity": uniformity(vectors),
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "to_mean": float((vectors @ total).mean() / max(np.linalg.norm(total), 1e-12)),
    }


@torch.inference_mode()
def high_frequency(encoder: Encoder, texts: list[str]) -> list[float]:
    """Return the mean over the texts of "high_frequency", as the module docstring defines it.

    The list has one number for the word embeddings, and one for each layer.
    """
    shares = []
    for ids in progress_bar(token_ids(encoder, texts), desc="Layers", unit="text"):  # one at a time, so without padding
        row = torch.tensor([ids], device=encoder.device)
        states = encoder.backbone(row, attention_mask=torch.ones_like(row), output_hidden_states=True).hidden_states
        of_layers = (state[0].float() for state in states)  # (T, D)
        shares.append([float((state - state.mean(0)).square().sum() / state.square().sum()) for state in of_layers])
    return np.mean(shares, axis=0).tolist()


def token_ids(encoder: Encoder, texts: list[str]) -> Tokens:
    """Return the token ids of texts as `encode` passes them to the model: with the default prompt, and truncated."""
    return tokenize_texts(encoder, [encoder.prompt() + text for text in texts])


def collapse(report: Report) -> float:
    """Return the increase of the same texts' mean cosine similarity from the shortest length to the longest."""
    return report["cut"][-1]["mean_cosine"] - report["cut"][0]["mean_cosine"]


def report_lines(reports: dict[str, Report]) -> list[str]:
    """Return the lines of a readable text: a table for each report, the meaning of the columns, and each `collapse`."""
    out = []
    for name, report in reports.items():
        out += ["", name, "", *lines(report)]
    out += ["", COLUMNS, "", "mean cosine of the same texts, truncated to the shortest and to the longest length:"]
    for name, report in reports.items():
        cut = report["cut"]
        out.append(f"  {name:16} {cut[0]['mean_cosine']:.3f} -> {cut[-1]['mean_cosine']:.3f}, {collapse(report):+.3f}")
    return out


def lines(report: Report) -> list[str]:
    """Return the lines of a readable table of a report."""
    out = []
    for kind, title in (("cut", "the same texts, truncated to"), ("natural", "full texts, with up to")):
        if not report[kind]:
            continue
        columns = f"{'mean cosine':>11}  {'uniformity':>10}  {'rank':>6}  {'to mean':>7}  {'high freq.':>10}"
        out.append(f"{title:>28}  {'texts':>6}  {columns}")
        for row in report[kind]:
            out.append(
                f"{row['tokens']:>21} tokens  {row['texts']:>6,}  {row['mean_cosine']:>11.3f}  {row['uniformity']:>10.3f}  "
                f"{row['effective_rank']:>6.1f}  {row['to_mean']:>7.3f}  {row['high_frequency'][-1]:>10.3f}"
            )
        out.append("")
    return out[:-1]


def plot_collapse(reports: dict[str, Report], path: str | Path) -> None:
    """Plot the truncated texts: mean cosine and uniformity against length, and the high-frequency share against the layer.

    The plots have a line for each report, labeled with its name. The third plot shows the shortest and the longest length. The
    picture is 800 pixels wide.
    """
    from matplotlib.figure import Figure

    places: list[Any] = [["cosine", "uniformity"], ["layers", "layers"]]
    figure = Figure(figsize=(8, 7.5), layout="constrained")
    panels = figure.subplot_mosaic(places)
    left, middle, below = panels["cosine"], panels["uniformity"], panels["layers"]
    colors, styles = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"], ["-", "--", ":", "-."]  # readable without color
    for number, (name, report) in enumerate(reports.items()):
        color, style = colors[number % 4], styles[(number + number // 4) % 4]  # 16 different looks
        cut = report["cut"]
        tokens = [row["tokens"] for row in cut]
        look: dict[str, Any] = {"color": color, "linestyle": style, "marker": "o", "label": name}
        left.plot(tokens, [row["mean_cosine"] for row in cut], **look)
        middle.plot(tokens, [row["uniformity"] for row in cut], **look)
        for row, width in ((cut[0], 1), (cut[-1], 2.5)) if len(cut) > 1 else ((cut[0], 2.5),):
            label = f"{name}, {row['tokens']} tokens"
            below.plot(row["high_frequency"], color=color, linestyle=style, linewidth=width, label=label)
    for axes, measure, title in (
        (left, "mean cosine similarity of all pairs", "Mean cosine similarity of texts"),
        (middle, "log mean exp(-2 squared distance)", "Uniformity of texts"),
    ):
        axes.set_xscale("log", base=2)
        axes.set_xticks(tokens, list(map(str, tokens)))
        axes.set_xlabel("length of the same texts, in tokens")
        axes.set_ylabel(measure)
        axes.set_title(f"{title}\n(higher: embeddings are more alike)", fontsize=11)
        axes.legend()
    below.locator_params(axis="x", integer=True)
    below.set_xlabel("layer (0: word embeddings)")
    below.set_ylabel("share of energy outside the mean of the text")
    below.set_title("Differences between the tokens of a text (lower: tokens are more alike)", fontsize=11)
    below.legend(fontsize=9)
    with writing(path) as aside:
        figure.savefig(aside, dpi=100)
