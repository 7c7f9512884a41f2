"""Fine-tune an encoder on a BEIR dataset with mined negatives, and compare the improved loss with the usual in-batch loss.

    python benchmarks/retrieval.py --model MODEL --beir beir/scifact --split train --output_dir outputs/scifact

The score is nDCG@10 of held-out queries. A third of the judged queries is held out: new queries to the same corpus. With
`--disjoint`, queries that share a relevant document stay on one side, so that no training pair contains the answer of a
held-out query. Negatives are mined for the training queries only, with the model before the training. Then there is one run for
each loss and seed. Finished runs are not repeated.
"""

import argparse
import random
import statistics
from pathlib import Path

from recipe import QUIETLY, run_recipe, write_jsonl

from hf_embed import Encoder
from hf_embed.evaluation.retrieval import read_retrieval
from hf_embed.kit.models import embed_with
from hf_embed.mining import MiningArguments, write_hard_negatives

LOSSES = {
    "improved": ["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"],
    "vanilla": ["query_to_doc"],
}


def related(qrels: dict[str, dict[str, int]]) -> list[list[str]]:
    """Return groups of queries that share judged documents, directly or through other queries."""
    group_of_document, members = {}, {}
    for query, documents in qrels.items():
        merged = [query]
        for group in {group_of_document[d] for d in documents if d in group_of_document}:
            merged += members.pop(group)
        members[query] = merged
        for q in merged:
            group_of_document |= dict.fromkeys(qrels[q], query)
    return list(members.values())


def write_split(task, folder: Path, disjoint: bool) -> None:
    """Write `task` as a BEIR folder whose qrels are train.tsv and test.tsv."""
    write_jsonl(folder / "corpus.jsonl", [{"_id": i, "text": text} for i, text in task.corpus.items()])
    write_jsonl(folder / "queries.jsonl", [{"_id": i, "text": text} for i, text in task.queries.items()])
    shuffled = related(task.qrels) if disjoint else [[query] for query in task.qrels]
    random.Random(0).shuffle(shuffled)
    parts, test_queries = {"train": [], "test": []}, 0
    for group in shuffled:
        part = "test" if test_queries < len(task.qrels) / 3 else "train"
        test_queries += len(group) if part == "test" else 0
        parts[part] += [f"{q}\t{d}\t{grade}" for q in group for d, grade in task.qrels[q].items()]
    (folder / "qrels").mkdir(exist_ok=True)
    for part, lines in parts.items():
        (folder / "qrels" / f"{part}.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--beir", required=True, help="a BEIR folder")
    parser.add_argument("--split", default="train", help="split whose judgments are used")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--losses", nargs="+", choices=list(LOSSES), default=list(LOSSES))
    parser.add_argument("--num_negatives", type=int, default=1)
    parser.add_argument("--disjoint", action="store_true", help="the parts have no relevant document in common")
    parser.add_argument("--eval_max_length", type=int, default=256)
    args, training = parser.parse_known_args()  # other flags go to the recipe

    folder, mined = args.output_dir / "beir", args.output_dir / "mined.jsonl"
    if not folder.is_dir():
        write_split(read_retrieval(f"{args.beir}:{args.split}"), folder, args.disjoint)
    train = read_retrieval(f"{folder}:train")
    print(f"{len(train.qrels)} queries to train on, {len(read_retrieval(f'{folder}:test').qrels)} held out")
    if not mined.is_file():
        pairs = [(train.queries[q], train.corpus[d]) for q, documents in train.qrels.items() for d in documents]
        settings = MiningArguments(num_negatives=args.num_negatives)
        print(
            write_hard_negatives(pairs, train.corpus.values(), embed_with(Encoder.from_pretrained(args.model)), mined, settings)
        )

    def score(model, output: Path) -> float:
        flags = [
            "--model_name_or_path",
            model,
            "--max_length",
            args.eval_max_length,
            "--eval_retrieval_dir",
            f"test={folder}:test",
        ]
        return run_recipe("evaluate.py", output, *flags)["retrieval"]["test"]["ndcg@10"]

    before = score(args.model, args.output_dir / "before")
    print(f"{'':10} {'seed':>4}  {'before':>7}  {'after':>7}  {'change':>7}")
    for loss in args.losses:
        changes = []
        for seed in args.seeds:
            output = args.output_dir / f"{loss}_{seed}"
            run_recipe(
                "gte_finetune.py", output, "--model_name_or_path", args.model, "--train_file", mined,
                "--directions", *LOSSES[loss], "--seed", seed, *QUIETLY, *training,
            )  # fmt: skip
            after = score(output, output / "score")
            changes.append(after - before)
            print(f"{loss:10} {seed:4}  {before:7.2f}  {after:7.2f}  {after - before:+7.2f}", flush=True)
        print(f"{loss:10} mean of {len(changes)}: {statistics.mean(changes):+.2f}, {min(changes):+.2f} to {max(changes):+.2f}")


if __name__ == "__main__":
    main()
