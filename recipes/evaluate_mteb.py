"""Score a model on tasks of MTEB, and store the scores.

    python recipes/evaluate_mteb.py outputs/sup_simcse_bert_base --tasks STSBenchmark SciFact
    python recipes/evaluate_mteb.py BAAI/bge-base-en-v1.5 --benchmark "MTEB(eng, v2)" --output_dir results/bge

Install mteb first: `pip install "hf_embed[mteb]"`. mteb downloads the data of the tasks. The recipe prints a table of the
scores, and writes these files. OUTPUT_DIR is by default the model's folder; it must be given if the model is not in a folder.

    OUTPUT_DIR/mteb/           mteb's own files; a second run computes only the tasks that are missing
    OUTPUT_DIR/results.json    the scores, together with those of earlier runs of the same model
    OUTPUT_DIR/README.md       only in a model's folder: the card with the new scores, unless someone has edited it
"""

from dataclasses import dataclass
from pathlib import Path

from hf_embed.checkpoint.card import read_results, write_card, write_results
from hf_embed.errors import InputError
from hf_embed.files.disk import check_folder
from hf_embed.files.safe_files import clear_leftovers
from hf_embed.fingerprint import fingerprint
from hf_embed.kit.cli import REQUIRED, parse, run, setting
from hf_embed.kit.inference import FastEncodingArguments, load_for_encoding
from hf_embed.kit.mteb_runs import find_tasks, lines, run_mteb
from hf_embed.kit.report import check_results
from hf_embed.ranges import COUNT, check_ranges


@dataclass
class Arguments(FastEncodingArguments):
    """Flags of this recipe."""

    model_name_or_path: str = setting(REQUIRED, "Model folder or Hub name.", positional=True, metavar="MODEL")
    tasks: list[str] = setting([], "Names of mteb tasks, e.g. STSBenchmark SciFact.")
    benchmark: list[str] = setting([], "Names of mteb benchmarks, e.g. 'MTEB(eng, v2)'.")
    batch_size: int = setting(512, "Number of texts to encode at a time.")
    output_dir: str | None = setting(
        None, "Folder for the scores. Default: the model's folder, if the model is a local folder."
    )

    def __post_init__(self) -> None:
        check_ranges(self, {"batch_size": COUNT, "max_length": COUNT})


def main() -> None:
    """Run the tasks, print the scores, and store them together with the scores of earlier runs."""
    (args,) = parse([Arguments])
    model = Path(args.model_name_or_path)
    if args.output_dir is None and not model.is_dir():
        raise InputError(f"{model} is not a folder; give a folder for the results with --output_dir FOLDER")
    folder = Path(args.output_dir or model)
    check_folder(folder, "--output_dir")
    check_results(folder)
    if (folder / "config.json").is_file() and folder.resolve() != model.resolve():
        raise InputError(f"--output_dir {folder} is the folder of another model; give another folder")
    if (args.pooling or args.max_length or args.bf16) and (folder / "config.json").is_file():
        raise InputError(
            "--pooling, --max_length and --bf16 change the vectors, so the results do not belong into the model's folder; give "
            "another folder with --output_dir FOLDER"
        )
    tasks = find_tasks(args.tasks, args.benchmark)
    encoder = load_for_encoding(args.model_name_or_path, args)
    identity = fingerprint(encoder)
    rows = [row | {"model": identity} for row in run_mteb(encoder, tasks, folder / "mteb", args.batch_size)]
    print("\n" + "\n".join(lines(rows)))
    clear_leftovers(folder)
    results = read_results(folder)
    earlier = [row for row in results.get("mteb", []) if row.get("model") == identity]
    results["mteb"] = list({(row["task"], row["split"]): row for row in [*earlier, *rows]}.values())
    write_results(folder, results)
    if (folder / "config.json").is_file():
        write_card(encoder, folder)
    print(f"\nwrote {folder}/results.json")


if __name__ == "__main__":
    run(main)
