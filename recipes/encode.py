"""Encode the texts of a file, and write a .npy file with one vector for each row.

    python recipes/encode.py outputs/mine texts.jsonl vectors.npy
    python recipes/encode.py BAAI/bge-base-en-v1.5 docs.parquet docs.npy --column body --prompt_name document --precision int8
    accelerate launch --quiet recipes/encode.py outputs/mine texts.txt vectors.npy      # on all GPUs

FILE is a txt file (one text per line), or a csv, tsv, jsonl or parquet file, gzipped or not. Its texts are in the column text,
or in the column that --column names. Row i of `numpy.load("vectors.npy", mmap_mode="r")` is the vector of row i of the file.
vectors.npy.json records the model, the file and the settings. If a run is interrupted, its finished part stays in
vectors.npy.work, and the same command resumes it.
"""

import hf_embed  # noqa: F401 (imported first: it prints that loading takes a while)

# isort: split
from dataclasses import dataclass

import torch

from hf_embed import write_vectors
from hf_embed.files.disk import check_output_file
from hf_embed.kit.cli import REQUIRED, parse, run, setting
from hf_embed.kit.inference import FastEncodingArguments, load_for_encoding, process_state, read_column
from hf_embed.ranges import COUNT, check_ranges
from hf_embed.vectors import PRECISIONS


@dataclass(kw_only=True)
class Arguments(FastEncodingArguments):
    """Flags of this recipe."""

    model_name_or_path: str = setting(REQUIRED, "Model folder or Hub name.", positional=True, metavar="MODEL")
    file: str = setting(REQUIRED, "File of the texts.", positional=True, metavar="FILE")
    output: str = setting(REQUIRED, "File for the vectors, a .npy.", positional=True, metavar="OUT")
    column: str | None = setting(None, "Column of the texts. Default: text, sentence, or the only column.")
    prompt_name: str | None = setting(
        None, "Prompt of the model to put before the texts: document, query ... Default: its own."
    )
    precision: str = setting(
        "float32",
        "Format of the numbers. int8 needs 1/4 of the bytes of float32, binary and ubinary (signs) 1/32.",
        choices=list(PRECISIONS),
    )
    truncate_dim: int | None = setting(None, "Width to truncate the vectors to. Default: the model's.")
    normalize: bool | None = setting(None, "True: write unit vectors. False: do not. Default: the model's setting.")
    batch_size: int = setting(512, "Number of texts to tokenize at a time.")
    chunk_tokens: int | None = setting(None, "Padded tokens that go through the model at once. Default: 16384, on a CPU 2048.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"truncate_dim": COUNT, "batch_size": COUNT, "chunk_tokens": COUNT})


def main() -> None:
    """Read the texts, load the model, encode."""
    (args,) = parse([Arguments])
    check_output_file(args.output, "OUT")
    state = process_state()
    column, texts = read_column(args.file, args.column)
    encoder = load_for_encoding(args.model_name_or_path, args, state.device)
    options = ("prompt_name", "precision", "truncate_dim", "normalize", "batch_size", "chunk_tokens")
    of = {"model": args.model_name_or_path, "bf16": encoder.dtype == torch.bfloat16, "file": args.file, "column": column}
    about = write_vectors(encoder, texts, args.output, of, **{name: getattr(args, name) for name in options})
    if state.is_main_process:
        print(f"wrote {args.output}: {about['rows']:,} vectors of {about['width']} numbers, {about['dtype']}")


if __name__ == "__main__":
    run(main)
