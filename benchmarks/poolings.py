"""Score a model by each pooling on STS sets: as it is, and after its vectors are centered or whitened.

    python benchmarks/poolings.py hf_embed/quickstart/language_model --texts sentences.txt \
        --eval_sts_file stsb=stsb-dev.tsv sick=sickr-dev.tsv

Centering subtracts the mean vector of the texts. Whitening also makes all directions equally large, from the covariance of the
same vectors. Neither needs training, so both are a yardstick for unsupervised training: what does spreading the vectors alone
change? The columns are Spearman x 100 on each set and the uniformity of the first set's sentences.
"""

from dataclasses import dataclass, field

import numpy as np

from hf_embed import Encoder
from hf_embed.data.sources import read_texts
from hf_embed.evaluation.geometry import cosines_of, uniformity, unit
from hf_embed.evaluation.sts import read_sts, spearman
from hf_embed.kit.cli import parse, run

POOLINGS = ["mean", "cls", "first_last", "top2"]
MOST_TEXTS = 10_000


@dataclass
class Arguments:
    """Flags of this script."""

    model: str = field(metadata={"help": "Folder or Hub name of the model.", "positional": True})
    texts: str = field(metadata={"help": "File of texts, from which the mean and the covariance are estimated."})
    eval_sts_file: list[str] = field(metadata={"help": "NAME=PATH of each STS set."})


def changes(vectors: np.ndarray) -> dict:
    """Return the functions of the columns by name; each maps vectors (N, D) to vectors (N, D)."""
    mean, (values, directions) = vectors.mean(0), np.linalg.eigh(np.cov(vectors.T))
    whitening = directions * values.clip(1e-12) ** -0.5
    return {"as it is": lambda x: x, "centered": lambda x: x - mean, "whitened": lambda x: (x - mean) @ whitening}


def main() -> None:
    """Print a row for each pooling and change."""
    (args,) = parse([Arguments])
    tasks = {name: read_sts(path) for name, _, path in (given.partition("=") for given in args.eval_sts_file)}
    texts = read_texts(args.texts)[:MOST_TEXTS]
    print(f"{'pooling':12}{'vectors':12}" + "".join(f"{name:>10}" for name in tasks) + f"{'uniformity':>12}")
    for pooling in POOLINGS:
        encoder = Encoder.from_pretrained(args.model, pooling=pooling)
        pairs = {
            name: [encoder.encode(list(rows[side]), show_progress_bar=False) for side in ("sentence1", "sentence2")]
            for name, rows in tasks.items()
        }
        for name, change in changes(encoder.encode(texts, show_progress_bar=False)).items():
            scores = []
            for task, rows in tasks.items():
                first, second = map(change, pairs[task])
                scores.append(100 * spearman(cosines_of(unit(first), unit(second)), np.array(rows["score"])))
            spread = uniformity(change(pairs[next(iter(tasks))][0]))
            print(f"{pooling:12}{name:12}" + "".join(f"{score:10.2f}" for score in scores) + f"{spread:12.3f}")


if __name__ == "__main__":
    run(main)
