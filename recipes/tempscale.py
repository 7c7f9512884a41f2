"""Find the temperature of attention that suits a model and your data, and save the model with it in its weights.

    python recipes/tempscale.py BAAI/bge-base-en-v1.5 --eval_retrieval_dir mine=beir/mine:dev --output_dir bge-tempscale
    python recipes/tempscale.py BAAI/bge-base-en-v1.5 --texts articles.txt       # without labels: halves of texts
    python recipes/tempscale.py BAAI/bge-base-en-v1.5 --temperature 0.9          # no search
    python recipes/tempscale.py                              # the built-in encoder, on the documentation of installed packages

OUTPUT_DIR is an ordinary checkpoint: AutoModel and sentence-transformers load it, at the speed of the original. Beside it stand
tempscale.json and tempscale.png, the curve; what the table says was gained on the queries that chose the temperature, the
line below it on queries that did not.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hf_embed import Encoder
from hf_embed.cli import model_first, parse, run
from hf_embed.data.docstrings import read_pages
from hf_embed.data.sources import read_texts
from hf_embed.errors import InputError
from hf_embed.evaluation.flags import EvalArguments, read_tasks
from hf_embed.finetune import QUICKSTART, embed_with
from hf_embed.tempscale import TempScaleConfig, fold_tempscale
from hf_embed.tempscale.calibrate import GRID, halves, lines, plot_sweep, sweep


@dataclass
class Arguments:
    model_name_or_path: str = field(
        default=str(QUICKSTART / "encoder"), metadata={"help": "May stand first, without its flag."}
    )
    temperature: float | None = field(default=None, metadata={"help": "Take this one, without a search."})
    grid: list[float] = field(default_factory=lambda: list(GRID), metadata={"help": "To search; then around the best."})
    folds: int = field(default=5, metadata={"help": "Of the cross-validation."})
    texts: str | None = field(default=None, metadata={"help": "Texts without labels: a txt with one a line, or a column text."})
    max_texts: int = field(default=1000, metadata={"help": "Take the first so many."})
    pooling: str | None = field(default=None, metadata={"help": "Default: the folder's own, else mean."})
    max_length: int | None = field(default=None, metadata={"help": "Default: the folder's own."})
    output_dir: str = field(default="outputs/tempscale")
    overwrite_output_dir: bool = False


def check(args: Arguments) -> None:
    for temperature in args.grid if args.temperature is None else [args.temperature]:
        TempScaleConfig(temperature)
    if args.folds < 2:
        raise InputError(f"--folds {args.folds}: cross-validation needs at least 2")
    folder = Path(args.output_dir)
    if folder.is_dir() and any(folder.iterdir()) and not args.overwrite_output_dir:
        raise InputError(f"--output_dir {folder} holds files; name another folder, or replace them by --overwrite_output_dir")


def main() -> None:
    args, evaluation = parse([Arguments, EvalArguments], argv=model_first(sys.argv[1:]))
    check(args)
    tasks = read_tasks(evaluation)
    if args.texts or (not tasks and args.temperature is None):
        texts = read_texts(args.texts) if args.texts else read_pages()
        tasks["halves"] = halves(texts[: args.max_texts])
    encoder = Encoder.from_pretrained(args.model_name_or_path, args.pooling, args.max_length)
    encoder.to("cuda" if torch.cuda.is_available() else "cpu")
    result = {"temperature": args.temperature}
    if args.temperature is None:
        result = sweep(encoder.backbone, embed_with(encoder), tasks, args.grid, args.folds)
        print("\n".join(["", *lines(result)]))
        print(
            f"\nbest: {result['temperature']:g}, {result['gain']:+.2f} against 1 on the queries that chose it, "
            f"{result['cross_validated_gain']:+.2f} on queries that did not ({args.folds} folds)"
        )
    folder = Path(args.output_dir)
    if result["temperature"] != 1:
        fold_tempscale(encoder.backbone, result["temperature"])
    encoder.save_pretrained(str(folder))
    (folder / "tempscale.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if "curve" in result:
        plot_sweep(result, folder / "tempscale.png")
    print(f"\nsaved to {folder}: AutoModel.from_pretrained({str(folder)!r}) loads it; README.md says how to pool")


if __name__ == "__main__":
    run(main)
