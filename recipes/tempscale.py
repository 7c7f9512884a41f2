"""Find the attention temperature (TempScale) that suits a model and your data, and fold it into the saved weights.

    python recipes/tempscale.py BAAI/bge-base-en-v1.5 --eval_retrieval_dir mine=beir/mine:dev --output_dir bge-tempscale
    python recipes/tempscale.py BAAI/bge-base-en-v1.5 --pairs clicks.jsonl       # anchors search for their positives
    python recipes/tempscale.py BAAI/bge-base-en-v1.5 --texts articles.txt       # no labels: halves of texts are pairs
    python recipes/tempscale.py BAAI/bge-base-en-v1.5 --temperature 0.9          # no search
    python recipes/tempscale.py                              # the built-in encoder, on installed packages' docstrings

OUTPUT_DIR (default: outputs/tempscale) is an ordinary checkpoint with the speed of the original model. Its README.md,
results.json and tempscale.png show the scores of all temperatures, and the gain on queries that had no part in the choice.
"""

from dataclasses import dataclass
from pathlib import Path

from hf_embed.checkpoint.tables import sweep_table
from hf_embed.data.columns import named_columns
from hf_embed.data.labeled import read_pairs
from hf_embed.data.sources import leave_out, read_file, read_texts
from hf_embed.evaluation.retrieval import pairs_to_retrieval
from hf_embed.kit import calibrate
from hf_embed.kit.cli import parse, run, setting
from hf_embed.kit.docstrings import read_pages
from hf_embed.kit.eval_flags import EvalArguments, joined, read_tasks
from hf_embed.kit.inference import MODEL_HELP, EncodingArguments, load_for_encoding
from hf_embed.kit.models import embed_with
from hf_embed.kit.plan import QUICKSTART, refuse_unused
from hf_embed.kit.report import saved_to
from hf_embed.ranges import COUNT, Range, check_ranges


@dataclass
class Arguments(EncodingArguments):
    """Flags of this recipe."""

    model_name_or_path: str = setting(str(QUICKSTART / "encoder"), MODEL_HELP, positional=True, metavar="MODEL")
    temperature: float | None = setting(None, "Use this temperature, without a search.")
    grid: list[float] = setting([*calibrate.TEMPERATURES], "Temperatures to try; then two around the best.")
    folds: int = setting(calibrate.FOLDS, "Number of folds of the cross-validation.")
    pairs: str | None = setting(None, "File of pairs: each anchor is a query for its positive.")
    columns: list[str] = setting([], "Columns of --pairs under other names: anchor=question positive=answer.")
    ignore_columns: list[str] = setting([], "Columns of --pairs to ignore, e.g. a label.")
    texts: str | None = setting(None, "Texts without labels: a txt, or a file with a column text.")
    max_texts: int = setting(calibrate.MAX_TEXTS, "Number of texts to use from --texts.")
    output_dir: str = setting("outputs/tempscale", "Folder for the model.")
    overwrite_output_dir: bool = setting(False, "Replace the files in the output folder.")

    def __post_init__(self) -> None:
        check_ranges(self, {"max_texts": COUNT, "max_length": COUNT, "folds": Range(least=2, whole=True)})
        refuse_unused(self, ("columns", "ignore_columns"), "pairs", "give --pairs FILE")
        calibrate.check_temperatures(self.temperature, self.grid, self.folds)


def main() -> None:
    """Read the evaluation sets, find the best temperature, fold it into the weights, and save the model with its scores."""
    args, evaluation = parse([Arguments, EvalArguments])
    tasks = read_tasks(evaluation)
    if args.pairs:
        rows = named_columns(leave_out(read_file(args.pairs), args.ignore_columns, args.pairs), args.columns, args.pairs)
        tasks = joined(tasks, {"pairs": pairs_to_retrieval(read_pairs(rows, args.pairs))}, "--pairs")
    if args.texts:
        tasks = joined(tasks, {"halves": calibrate.halves(read_texts(args.texts)[: args.max_texts])}, "--texts")
    calibrate.check_max_texts(args.max_texts, args.texts, needed=not tasks and args.temperature is None)
    folder = Path(args.output_dir)
    calibrate.check_request(args.temperature, tasks, folder, Path(args.model_name_or_path), args.overwrite_output_dir)
    if not tasks and args.temperature is None:
        tasks["halves"] = calibrate.halves(read_pages()[: args.max_texts])
    encoder = load_for_encoding(args.model_name_or_path, args)
    calibrate.check_foldable_at(encoder, args.temperature or args.grid[0])
    if args.temperature is None:
        result = calibrate.sweep(encoder.backbone, embed_with(encoder), tasks, args.grid, args.folds)
        print("\n".join(["", *sweep_table(result)]))
        calibrate.save_folded(encoder, result["temperature"], folder, args.model_name_or_path, result)
    else:
        calibrate.save_folded(encoder, args.temperature, folder, args.model_name_or_path)
    print(saved_to(folder, encoder.remote_code))


if __name__ == "__main__":
    run(main)
