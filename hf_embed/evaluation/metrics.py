"""The metrics as `evaluate.Metric` objects, for scripts that use the library `evaluate`.

The package itself calls the functions. Nothing imports this module: a recipe runs with its own folder first on the path, and
there `import evaluate` would find recipes/evaluate.py.
"""

import datasets
import evaluate
import numpy as np

from hf_embed.evaluation.geometry import alignment, uniformity
from hf_embed.evaluation.sts import spearman

VECTORS = datasets.Features(
    {"predictions": datasets.Sequence(datasets.Value("float32")), "references": datasets.Sequence(datasets.Value("float32"))}
)  # fmt: skip


class SpearmanCosine(evaluate.Metric):
    """`SpearmanCosine().compute(predictions=cosines, references=scores)` -> {"spearman": x 100}; loads offline."""

    def _info(self):
        number = datasets.Value("float64")
        features = datasets.Features({"predictions": number, "references": number})
        return evaluate.MetricInfo(description=__doc__, citation="", features=features)

    def _compute(self, predictions, references):
        return {"spearman": 100 * spearman(predictions, references)}


class Alignment(evaluate.Metric):
    """`Alignment().compute(predictions=f_x, references=f_x_plus)` -> {"alignment": ...}; loads offline."""

    def _info(self):
        return evaluate.MetricInfo(description=__doc__, citation="", features=VECTORS)

    def _compute(self, predictions, references):
        return {"alignment": alignment(np.array(predictions), np.array(references))}


class Uniformity(evaluate.Metric):
    """`Uniformity().compute(predictions=vectors)` -> {"uniformity": ...}; loads offline."""

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__, citation="", features=datasets.Features({"predictions": VECTORS["predictions"]})
        )

    def _compute(self, predictions):
        return {"uniformity": uniformity(np.array(predictions))}
