"""Measure whether embeddings of long texts become more alike (length collapse), and whether TempScale helps.

    python recipes/length_collapse.py                                        # the built-in encoder on installed packages' docs
    python recipes/length_collapse.py BAAI/bge-base-en-v1.5 --texts articles.txt --temperature 0.9 0.8

The recipe measures the same texts truncated to 16, 32, 64 ... tokens, and also the full texts in bins of length. It prints
tables with an explanation of their columns, and writes collapse.json and the picture collapse.png to OUTPUT_DIR (default:
outputs/length_collapse).
"""

from dataclasses import dataclass
from pathlib import Path

from hf_embed.data.sources import read_texts
from hf_embed.errors import masked
from hf_embed.files.disk import check_folder
from hf_embed.files.safe_files import clear_leftovers, write_json
from hf_embed.kit.cli import parse, run, setting
from hf_embed.kit.docstrings import read_pages
from hf_embed.kit.inference import MODEL_HELP, EncodingArguments, load_for_encoding
from hf_embed.kit.length_collapse import LENGTHS, length_report, plot_collapse, report_lines
from hf_embed.kit.plan import QUICKSTART
from hf_embed.ranges import COUNT, Range, check_ranges
from hf_embed.tempscale import TempScaleConfig, tempscale


@dataclass
class Arguments(EncodingArguments):
    """Flags of this recipe."""

    model_name_or_path: str = setting(str(QUICKSTART / "encoder"), MODEL_HELP, positional=True, metavar="MODEL")
    texts: str | None = setting(
        None, "A txt file with one text per line, or a file with a column text. Default: installed docstrings."
    )
    max_texts: int = setting(200, "Number of texts to use, from the first.")
    lengths: list[int] = setting(list(LENGTHS), "Lengths, in tokens, to which the texts are truncated.")
    temperature: list[float] = setting([0.9], "TempScale temperatures to compare the model with.")
    output_dir: str = setting("outputs/length_collapse", "Folder for collapse.json and collapse.png.")

    def __post_init__(self) -> None:
        check_ranges(self, {"max_texts": COUNT, "max_length": COUNT, "lengths": Range(least=4, whole=True)})


def main() -> None:
    """Measure the model without TempScale and at each temperature, and print, store and plot the reports."""
    (args,) = parse([Arguments])
    check_folder(args.output_dir, "--output_dir")
    configs = [TempScaleConfig(temperature) for temperature in args.temperature]
    texts = (read_texts(args.texts) if args.texts else read_pages())[: args.max_texts]
    encoder = load_for_encoding(args.model_name_or_path, args)
    reports = {"as it is": length_report(encoder, texts, tuple(args.lengths))}
    for config in configs:
        with tempscale(encoder.backbone, config):
            reports[f"TempScale {config.temperature:g}"] = length_report(encoder, texts, tuple(args.lengths))
    print("\n".join(report_lines(reports)))
    if left_out := sorted(set(args.lengths) - {row["tokens"] for row in reports["as it is"]["cut"]}):
        shown = ", ".join(map(str, left_out))
        print(f"\nnot measured: {shown} tokens; too few texts are that long, or the model reads fewer ({encoder.max_length})")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    clear_leftovers(folder)
    about = {"model": args.model_name_or_path, "texts": masked(args.texts or "docstrings"), "reports": reports}
    write_json(folder / "collapse.json", about)
    plot_collapse(reports, folder / "collapse.png")
    print(f"\nwrote {folder}/collapse.json and collapse.png")


if __name__ == "__main__":
    run(main)
