"""Draw the picture of README.md: the scores before and after training, from the table "Does it work?" of docs/results.md.

The picture is docs/results/before_after.png:

    python benchmarks/front_picture.py
"""

import re
from pathlib import Path

from matplotlib.figure import Figure

DOCS = Path(__file__).parents[1] / "docs"
GREY, BLUE = "#9a9a9a", "#0072b2"


def read_table(text: str) -> list[tuple[str, float, float]]:
    """Return (what was measured, score before, score after) for each row of the table."""
    section = text.split("## Does it work?")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+) \| ([\d.]+) \| \*\*([\d.]+)\*\* \|", section, re.MULTILINE)
    return [(what, float(before), float(after)) for what, before, after in rows]


def draw(rows: list[tuple[str, float, float]], path: Path) -> None:
    """Draw one line per measurement, from the score before to the score after."""
    figure = Figure(figsize=(8, 0.62 * len(rows) + 1.1), layout="constrained")
    axes = figure.subplots()
    for line, (what, before, after) in enumerate(reversed(rows)):
        axes.annotate("", xy=(after, line), xytext=(before, line), arrowprops={"arrowstyle": "-|>", "color": BLUE, "lw": 2})
        axes.plot(before, line, "o", color=GREY, markersize=8, label="before" if not line else None)
        axes.plot(after, line, "o", color=BLUE, markersize=8, label="after" if not line else None)
        axes.text(before - 1.5, line, f"{before:.1f}", ha="right", va="center", color="#555555", fontsize=10)
        axes.text(after + 1.5, line, f"{after:.1f}", ha="left", va="center", color=BLUE, fontsize=10, weight="bold")
        axes.text(0, line + 0.3, what.replace("`", ""), ha="left", va="center", fontsize=10)
    axes.set_xlim(-1, 100)
    axes.set_ylim(-0.5, len(rows) - 0.3)
    axes.set_yticks([])
    axes.set_xlabel("score x 100: Spearman correlation on sentence pairs (STS), nDCG@10 on searches; higher is better")
    axes.set_title("What the recipes change, measured on data that they did not train on")
    axes.spines[["left", "right", "top"]].set_visible(False)
    axes.legend(loc="upper right", frameon=False, ncols=2)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    draw(read_table((DOCS / "results.md").read_text(encoding="utf-8")), DOCS / "results" / "before_after.png")
