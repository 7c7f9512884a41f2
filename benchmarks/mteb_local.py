"""Run an STS file as an mteb task, and compare the scores of `Encoder`, sentence-transformers and our own evaluation.

python benchmarks/mteb_local.py --model MODEL --sts_file stsb-dev.tsv

The three scores should be equal.
"""

import argparse
import tempfile

import mteb
from datasets import DatasetDict
from mteb.abstasks import AbsTaskSTS
from sentence_transformers import SentenceTransformer

from hf_embed import Encoder
from hf_embed.evaluation.sts import STS, read_sts
from hf_embed.kit.models import embed_with
from hf_embed.kit.mteb_runs import run_mteb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--sts_file", required=True)
    args = parser.parse_args()
    rows = read_sts(args.sts_file)

    class Local(AbsTaskSTS):
        metadata = mteb.TaskMetadata(
            name="Local", description="a file", dataset={"path": "local/file", "revision": "1"}, type="STS", category="t2t",
            eval_splits=["test"], eval_langs=["eng-Latn"], main_score="cosine_spearman", modalities=["text"], prompt=None,
            reference=None, date=None, domains=None, task_subtypes=None, license=None, annotations_creators=None, dialect=None,
            sample_creation=None, bibtex_citation="",
        )  # fmt: skip

        def load_data(self, **kwargs):
            self.dataset, self.data_loaded = DatasetDict({"test": rows}), True

    encoder = Encoder.from_pretrained(args.model)
    for name, model in (("Encoder", encoder), ("SentenceTransformer", SentenceTransformer(args.model))):
        with tempfile.TemporaryDirectory() as folder:
            print(f"mteb, {name}: {run_mteb(model, [Local()], folder)[0]['score']:.2f}")
    print(f"recipes/evaluate.py: {STS(rows).score(embed_with(encoder))['spearman']:.2f}")


if __name__ == "__main__":
    main()
