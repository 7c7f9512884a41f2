"""The metrics as `evaluate.Metric` objects, for scripts that use the library `evaluate`.

They load offline, in contrast to `evaluate.load`. The package itself calls the metric functions directly, and never imports
this module. The reason: a recipe runs with its own folder first on the import path, so `import evaluate` would import
recipes/evaluate.py.
"""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

from hf_embed.evaluation.geometry import alignment, uniformity
from hf_embed.evaluation.sts import spearman

VECTORS = datasets.Features(
    {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Sequence(datasets.Value("float32"))}
)  # fmt: skip


class SpearmanCosine(evaluate.Metric):
    """Spearman x 100: `SpearmanCosine().compute(predictions=cosines, references=scores)` -> {"spearman": ...}."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        return {"spearman": 100 * spearman(np.array(predictions), np.array(references))}


class Alignment(evaluate.Metric):
    """Alignment: `Alignment().compute(predictions=f_x, references=f_x_plus)` -> {"alignment": ...}."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=VECTORS)

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        return {"alignment": alignment(np.array(predictions), np.array(references))}


class Uniformity(evaluate.Metric):
    """Uniformity: `Uniformity().compute(predictions=vectors)` -> {"uniformity": ...}."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=datasets.Features({"predictions": VECTORS["predictions"]})
        )

    def _compute(self, predictions: Sequence) -> dict[str, float]:
        return {"uniformity": uniformity(np.array(predictions))}
