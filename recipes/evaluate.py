"""Score any checkpoint on semantic textual similarity: ours, a Hub model, a sentence-transformers folder.

    python recipes/evaluate.py --model_name_or_path outputs/quickstart --eval_sts_file stsb=stsb-dev.tsv --output_dir out
    python recipes/evaluate.py --model_name_or_path princeton-nlp/sup-simcse-bert-base-uncased --pooling cls_mlp --seven_sts

Spearman x 100 over all pairs of a set, alignment and uniformity; printed, and in OUTPUT_DIR/results.json.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_embed import Encoder
from hf_embed.cli import parse, run
from hf_embed.errors import InputError
from hf_embed.evaluation import sts


@dataclass
class Arguments:
    model_name_or_path: str
    eval_sts_file: list[str] = field(
        default_factory=list, metadata={"help": "NAME=PATH of an STS set; may be repeated.", "action": "extend"}
    )
    seven_sts: bool = field(default=False, metadata={"help": "The paper's seven STS tasks, from the Hub."})
    pooling: str | None = field(default=None, metadata={"help": "Default: the folder's own, else mean."})
    max_length: int | None = field(default=None, metadata={"help": "Default: the folder's own."})
    output_dir: str | None = field(default=None, metadata={"help": "Write results.json there."})


def main() -> None:
    (args,) = parse([Arguments])
    if not args.eval_sts_file and not args.seven_sts:
        raise InputError("nothing to score on; give --eval_sts_file NAME=PATH or --seven_sts")
    sets = sts.read_named(args.eval_sts_file)
    if args.seven_sts:
        sets |= sts.seven_tasks()
    encoder = Encoder.from_pretrained(args.model_name_or_path, args.pooling, args.max_length)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    scores = sts.score_sets(sets, lambda texts: encoder.encode(texts, convert_to_tensor=True))

    print(f"{args.model_name_or_path}: pooling {encoder.pooling}, at most {encoder.max_length} tokens\n")
    width = max(map(len, [*sets, "average"]))
    print(f"{'':{width}}  spearman x 100  alignment  uniformity")
    for name in sets:
        row = (scores[f"{name}_{key}"] for key in ("spearman", "alignment", "uniformity"))
        print("{:{}}  {:14.2f}  {:9.3f}  {:10.3f}".format(name, width, *row))
    if len(sets) > 1:
        print(f"{'average':{width}}  {scores['spearman']:14.2f}")
    if args.output_dir:
        results = {
            "model": args.model_name_or_path,
            "pooling": encoder.pooling,
            "max_length": encoder.max_length,
            "sts": {name: scores[f"{name}_spearman"] for name in sets},
            "alignment": scores["alignment"],
            "uniformity": scores["uniformity"],
        }
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        path = Path(args.output_dir, "results.json")
        path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        print(f"\nwrote {path}")


if __name__ == "__main__":
    run(main)
