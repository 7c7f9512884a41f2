"""Score any checkpoint: ours, a Hub model, a sentence-transformers folder.

    python recipes/evaluate.py --model_name_or_path outputs/quickstart --eval_sts_file stsb=stsb-dev.tsv --output_dir out
    python recipes/evaluate.py --model_name_or_path princeton-nlp/sup-simcse-bert-base-uncased --pooling cls_mlp --seven_sts
    python recipes/evaluate.py --model_name_or_path outputs/gte_pretrain --eval_retrieval_dir scifact=beir/scifact:test \
        --eval_zero_shot intents=banking77.tsv --eval_code_search numpy=numpy

STS: Spearman x 100 over all pairs, alignment and uniformity. Retrieval and code search: nDCG, MAP, recall and MRR x 100.
Zero-shot classification: accuracy and F1 x 100. Printed, and in OUTPUT_DIR/results.json.
"""

from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_embed import Encoder
from hf_embed.checkpoint.card import store_results
from hf_embed.errors import InputError
from hf_embed.evaluation.sts import seven_tasks
from hf_embed.evaluation.tasks import score_tasks
from hf_embed.kit.cli import parse, run
from hf_embed.kit.eval_flags import EvalArguments, read_tasks
from hf_embed.kit.models import embed_with
from hf_embed.kit.plan import TRUST
from hf_embed.kit.report import summary
from hf_embed.ranges import COUNT, check_ranges


@dataclass
class Arguments:
    model_name_or_path: str
    seven_sts: bool = field(default=False, metadata={"help": "The paper's seven STS tasks, from the Hub."})
    pooling: str | None = field(default=None, metadata={"help": "Default: the folder's own, else mean."})
    max_length: int | None = field(default=None, metadata={"help": "Default: the folder's own."})
    trust_remote_code: bool = field(default=False, metadata={"help": TRUST})
    output_dir: str | None = field(default=None, metadata={"help": "Write results.json there."})

    def __post_init__(self):
        check_ranges(self, {"max_length": COUNT})


def main() -> None:
    args, evaluation = parse([Arguments, EvalArguments])
    tasks = read_tasks(evaluation)
    if args.seven_sts:
        tasks |= seven_tasks()
    if not tasks:
        raise InputError("nothing to score on; give --eval_sts_file NAME=PATH, another --eval_... flag, or --seven_sts")
    encoder = Encoder.from_pretrained(
        args.model_name_or_path, args.pooling, args.max_length, trust_remote_code=args.trust_remote_code
    )
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    scores = score_tasks(tasks, embed_with(encoder))

    print(f"{args.model_name_or_path}: pooling {encoder.pooling}, at most {encoder.max_length} tokens; scores x 100")
    kinds = {}
    for name, task in tasks.items():
        kinds.setdefault(task.reported, []).append(name)
    for metrics, names in kinds.items():
        width = max(map(len, [*names, "average"]))
        print(f"\n{'':{width}}" + "".join(f"  {metric:>10}" for metric in metrics))
        for name in names:
            print(f"{name:{width}}" + "".join(f"  {scores[f'{name}_{metric}']:10.3f}" for metric in metrics))
        if len(names) > 1:
            print(f"{'average':{width}}" + "".join(f"  {scores[metric]:10.3f}" for metric in metrics))
    if args.output_dir:
        about = {"model": args.model_name_or_path, "pooling": encoder.pooling, "max_length": encoder.max_length}
        results = about | summary({f"eval_{key}": value for key, value in scores.items()}, tasks)
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        store_results(args.output_dir, results)
        print(f"\nwrote {Path(args.output_dir, 'results.json')}")


if __name__ == "__main__":
    run(main)
