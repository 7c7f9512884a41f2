"""Check training files before a run: duplicates, empty and garbled texts, lengths, false negatives, leaked evaluation texts.

    python recipes/preflight.py nli.csv
    python recipes/preflight.py web.jsonl clicks.csv --model_name_or_path BAAI/bge-base-en-v1.5 --batch_size 64 1024
    python recipes/preflight.py --sources sources.yaml --eval_sts_file stsb=stsb-dev.tsv --output_file report.json
    python recipes/preflight.py nli.csv --picture lengths.png --strict       # exit status 1 if anything was found

The recipe prints tables and a list of what it found; docs/use.md lists what it looks for. It reads all
rows, and tokenizes a random sample of each source (with --sample 0 all of it). A FILE with the columns sentence1, sentence2 and
score is an STS dataset, and becomes an evaluation set. Every fine-tuning recipe has the flag --preflight: the recipe then makes
the same checks on the rows that it would train on, and ends.
"""

import hf_embed  # noqa: F401 (imported first: it prints that loading takes a while)

# isort: split
from dataclasses import dataclass
from typing import Any

from hf_embed.kit.cli import parse, run, setting
from hf_embed.kit.eval_flags import EvalArguments, read_tasks
from hf_embed.kit.inference import MODEL_HELP, EncodingArguments, load_for_encoding
from hf_embed.kit.plan import QUICKSTART, DataArguments
from hf_embed.kit.preflight import check_outputs, finish, read_files
from hf_embed.kit.preflight_report import preflight
from hf_embed.kit.preflight_source import Settings
from hf_embed.objectives import ImprovedContrastive, Objective, SimCSE
from hf_embed.ranges import Range, check_ranges


@dataclass(kw_only=True)
class Arguments(EncodingArguments):
    """Flags of this recipe."""

    files: list[str] = setting([], "Training files; each file is a separate source.", positional=True, metavar="FILE")
    model_name_or_path: str = setting(str(QUICKSTART / "encoder"), MODEL_HELP)
    batch_size: list[int] = setting([64], "Number of rows in a batch on all ranks together; give several to compare them.")
    sample: int | None = setting(
        None, "Number of rows of each source to tokenize. 0: all. Default: 20,000, or fewer if texts are long."
    )
    output_file: str | None = setting(None, "File for the whole report, as JSON.")
    picture: str | None = setting(None, "File for a picture of the lengths of the texts, a .png.", metavar="FILE")
    strict: bool = setting(False, "Exit with status 1 if there are findings.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"batch_size": Range(least=2, whole=True), "sample": Range(least=0, whole=True)})
        check_outputs(self.output_file, self.picture)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Read the files and the evaluation sets, check them, and print and store the report."""
    args, data, evaluation = parse([Arguments, DataArguments, EvalArguments], argv=argv)
    sources, tasks = read_files(args.files, data, read_tasks(evaluation))
    objectives: dict[str, Objective] = {"SimCSE": SimCSE(), "GTE": ImprovedContrastive()}
    encoder = load_for_encoding(args.model_name_or_path, args)
    report = preflight(sources, encoder, Settings(objectives, tuple(args.batch_size), args.sample), tasks)
    finish(report, args.output_file, args.picture, args.strict)
    return report


if __name__ == "__main__":
    run(main)
