r"""Find hard negatives for pairs of queries and documents with any encoder, and write them to a jsonl file.

    python recipes/mine_hard_negatives.py outputs/gte_pretrain --train_file pairs.jsonl --output_file mined.jsonl
    python recipes/mine_hard_negatives.py BAAI/bge-base-en-v1.5 --retrieval_dir beir/scifact:train \
        --output_file mined.jsonl --num_negatives 7 --range_min 10 --sampling_strategy random

Pairs come from columns of a training file, for example anchor and positive (docs/guides/own_data.md lists the others), or from
the judged pairs of a BEIR folder, whose corpus is searched too. OUTPUT_FILE has query, positive and negatives, and can be the
--train_file of all recipes that train on pairs. If a run is interrupted, its finished part stays in OUTPUT_FILE.work, and the
same command resumes it. `accelerate launch` shares the work among processes.
"""

import hf_embed  # noqa: F401 (imported first: it prints that loading takes a while)

# isort: split
from dataclasses import dataclass

from hf_embed.data.columns import named_columns
from hf_embed.data.labeled import read_pairs as positive_pairs
from hf_embed.data.sources import leave_out, read_file, read_texts
from hf_embed.errors import InputError
from hf_embed.evaluation.retrieval import judged_pairs, read_retrieval
from hf_embed.files.disk import check_output_file
from hf_embed.fingerprint import fingerprint
from hf_embed.kit.cli import REQUIRED, parse, run, setting
from hf_embed.kit.inference import FastEncodingArguments, load_for_encoding, process_state
from hf_embed.kit.models import embed_with
from hf_embed.mining import MiningArguments, describe, write_hard_negatives


@dataclass
class Arguments(FastEncodingArguments):
    """Flags of this recipe, in addition to those of `MiningArguments`."""

    model_name_or_path: str = setting(REQUIRED, "Model folder or Hub name.", positional=True, metavar="MODEL")
    output_file: str = setting(REQUIRED, "File for the rows, a jsonl.")
    train_file: str | None = setting(None, "File of pairs: csv, tsv, jsonl or parquet.")
    columns: list[str] = setting([], "Role of each column: anchor=question positive=answer.")
    ignore_columns: list[str] = setting([], "Columns of the file to ignore, e.g. a label.")
    retrieval_dir: str | None = setting(None, "A BEIR folder, DIR or DIR:SPLIT, instead of a file.")
    corpus_file: str | None = setting(None, "More candidates: a txt, or a file with a column text.")


def read_pairs(args: Arguments) -> tuple[list[tuple[str, str]], list[str]]:
    """Read (query, document) pairs, and further texts to choose negatives from."""
    if (args.train_file is None) == (args.retrieval_dir is None):
        raise InputError("exactly one source of pairs is needed; give either --train_file FILE or --retrieval_dir DIR")
    pairs, corpus = [], []
    if args.retrieval_dir is not None:
        if args.columns or args.ignore_columns:
            raise InputError("--columns and --ignore_columns apply to --train_file only; remove them with --retrieval_dir")
        task = read_retrieval(args.retrieval_dir)
        pairs, corpus = judged_pairs(task, args.retrieval_dir), list(task.corpus.values())
    elif args.train_file is not None:
        rows = leave_out(read_file(args.train_file), args.ignore_columns, args.train_file)
        pairs = positive_pairs(named_columns(rows, args.columns, args.train_file), args.train_file)
    if args.corpus_file:
        corpus += read_texts(args.corpus_file)
    return pairs, corpus


def main() -> None:
    """Read the pairs, load the model, mine negatives, and print how many were found and left out."""
    args, mining = parse([Arguments, MiningArguments])
    check_output_file(args.output_file, "--output_file")
    state = process_state()
    pairs, corpus = read_pairs(args)
    encoder = load_for_encoding(args.model_name_or_path, args, state.device)
    counts = write_hard_negatives(pairs, corpus, embed_with(encoder), args.output_file, mining, fingerprint(encoder))
    if state.is_main_process:
        print("\n".join([*describe(counts), f"wrote {args.output_file}"]))


if __name__ == "__main__":
    run(main)
