r"""Score a model on evaluation sets: a checkpoint of this package, a Hub model, or a sentence-transformers folder.

    python recipes/evaluate.py outputs/quickstart --eval_sts_file stsb=stsb-dev.tsv --output_dir out
    python recipes/evaluate.py princeton-nlp/sup-simcse-bert-base-uncased --pooling cls_mlp --seven_sts
    python recipes/evaluate.py outputs/gte_pretrain --eval_retrieval_dir scifact=beir/scifact:test \
        --eval_zero_shot intents=banking77.tsv --eval_code_search numpy=numpy
    python recipes/evaluate.py --model_name_or_path outputs/quickstart --eval_triplet_file nli=nli-dev.csv \
        --eval_pair_file quora=quora-dev.tsv --eval_reranking_file askubuntu=mteb/askubuntudupquestions-reranking:test

The scores are printed. With --output_dir they are also written to OUTPUT_DIR/results.json. If that is the folder of a trained
model, they are added to its results.json as `evaluated`. `accelerate launch` shares the texts among processes. The metrics:

    STS                        Spearman x 100 over all pairs; alignment and uniformity
    retrieval, code search     nDCG, MAP, recall and MRR x 100
    zero-shot classification   accuracy and F1 x 100
    triplets                   accuracy x 100
    pair classification        average precision, best accuracy and best F1 x 100, with their thresholds
    reranking                  MAP, MRR and nDCG x 100
"""

import hf_embed  # noqa: F401 (imported first: it prints that loading takes a while)

# isort: split
from dataclasses import dataclass
from pathlib import Path

import torch

from hf_embed.errors import InputError
from hf_embed.evaluation.sts import seven_tasks
from hf_embed.evaluation.tasks import score_table, score_tasks
from hf_embed.files.disk import check_folder
from hf_embed.kit.cli import REQUIRED, parse, run, setting
from hf_embed.kit.eval_flags import EvalArguments, joined, read_tasks
from hf_embed.kit.inference import FastEncodingArguments, load_for_encoding, process_state
from hf_embed.kit.models import embed_with
from hf_embed.kit.report import check_results, store_evaluation, summary


@dataclass
class Arguments(FastEncodingArguments):
    """Flags of this recipe."""

    model_name_or_path: str = setting(REQUIRED, "Model folder or Hub name.", positional=True, metavar="MODEL")
    seven_sts: bool = setting(False, "Score on the seven STS tasks of the SimCSE paper, from the Hub.")
    output_dir: str | None = setting(None, "Folder for results.json.")


def main() -> None:
    """Read the evaluation sets, score the model on them, and print and store the scores."""
    args, evaluation = parse([Arguments, EvalArguments])
    if args.output_dir:
        check_folder(args.output_dir, "--output_dir")
        check_results(args.output_dir, replaces=["model", "pooling", "max_length"])  # an earlier evaluation
    tasks = joined(read_tasks(evaluation), seven_tasks() if args.seven_sts else {}, "--seven_sts")
    if not tasks:
        raise InputError("there is no evaluation set; give --eval_sts_file NAME=PATH, another --eval_... flag, or --seven_sts")
    state = process_state()
    encoder = load_for_encoding(args.model_name_or_path, args, state.device)
    scores = score_tasks(tasks, embed_with(encoder))
    if not state.is_main_process:
        return
    print(
        f"{args.model_name_or_path}: pooling {encoder.pooling}, at most {encoder.max_length} tokens; scores x 100 "
        "(but not alignment, uniformity and thresholds)"
    )
    print("\n".join(score_table(scores, tasks)))
    if args.output_dir:
        about = {"model": args.model_name_or_path, "pooling": encoder.pooling, "max_length": encoder.max_length}
        about |= {"bf16": encoder.dtype == torch.bfloat16}
        results = about | summary({f"eval_{key}": value for key, value in scores.items()}, tasks)
        print(f"\nwrote {store_evaluation(Path(args.output_dir), results)}")


if __name__ == "__main__":
    run(main)
