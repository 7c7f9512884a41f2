"""The metrics as `evaluate.Metric` objects, for scripts that use the library `evaluate`.

They load offline, in contrast to `evaluate.load`. The package itself calls the metric functions directly, and never imports
this module. The reason: a recipe runs with its own folder first on the import path, so `import evaluate` would import
recipes/evaluate.py.
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

from hf_embed.evaluation.geometry import alignment, uniformity
from hf_embed.evaluation.sts import spearman

NUMBER, VECTOR = datasets.Value("float64"), datasets.Sequence(datasets.Value("float32"))


class _Metric(evaluate.Metric):
    """The base class of the metrics: `columns` are the arguments of `compute`."""

    columns: dict[str, Any]

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(description=__doc__, citation="", features=datasets.Features(self.columns))


class SpearmanCosine(_Metric):
    """Spearman x 100: `SpearmanCosine().compute(predictions=cosines, references=scores)` -> {"spearman": ...}."""

    columns = {"predictions": NUMBER, "references": NUMBER}

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        return {"spearman": 100 * spearman(np.array(predictions), np.array(references))}


class Alignment(_Metric):
    """Alignment: `Alignment().compute(predictions=f_x, references=f_x_plus)` -> {"alignment": ...}."""

    columns = {"predictions": VECTOR, "references": VECTOR}

    def _compute(self, predictions: Sequence, references: Sequence) -> dict[str, float]:
        return {"alignment": alignment(np.array(predictions), np.array(references))}


class Uniformity(_Metric):
    """Uniformity: `Uniformity().compute(predictions=vectors)` -> {"uniformity": ...}."""

    columns = {"predictions": VECTOR}

    def _compute(self, predictions: Sequence) -> dict[str, float]:
        return {"uniformity": uniformity(np.array(predictions))}
