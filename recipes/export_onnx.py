"""Export a model to ONNX, with pooling and normalization inside the graph, and check it with onnxruntime.

    python recipes/export_onnx.py outputs/mine                          # into the model's folder
    python recipes/export_onnx.py outputs/mine --output_dir served --int8
    python recipes/export_onnx.py BAAI/bge-base-en-v1.5 --output_dir bge-onnx

OUTPUT_DIR/onnx/model.onnx computes `sentence_embedding`, the vectors of `Encoder.encode`, from the outputs of the tokenizer.
With --int8, onnx/model_quantized.onnx does the same with int8 weights. transformers.js and sentence-transformers look for these
names. OUTPUT_DIR also has the other files of the model, and `hf-embed push` uploads all of them. No ONNX file is written if the
vectors of the graph differ from the model's by more than 1e-5 of their norm. The recipe needs `pip install "hf_embed[onnx]"`.
"""

from dataclasses import dataclass
from pathlib import Path

from hf_embed.checkpoint.card import read_results
from hf_embed.checkpoint.onnx import check_output, export_onnx
from hf_embed.errors import InputError
from hf_embed.kit.cli import REQUIRED, parse, run, setting
from hf_embed.kit.inference import EncodingArguments, load_for_encoding


@dataclass(kw_only=True)
class Arguments(EncodingArguments):
    """Flags of this recipe."""

    model_name_or_path: str = setting(REQUIRED, "Model folder or Hub name.", positional=True, metavar="FOLDER")
    output_dir: str | None = setting(None, "Folder for the model and its ONNX files. Default: the model's own folder.")
    int8: bool = setting(False, "Also write a graph with int8 weights, which is smaller and less exact, and print how exact.")
    overwrite_output_dir: bool = setting(False, "Replace ONNX files, or another model, in the output folder.")


def main() -> None:
    """Load the model, write the graphs beside it, and print how exact they are."""
    (args,) = parse([Arguments])
    if args.output_dir is None and not Path(args.model_name_or_path).is_dir():
        raise InputError(f"{args.model_name_or_path} is not a folder here; give a folder for the export with --output_dir")
    folder = Path(args.output_dir or args.model_name_or_path)
    if args.output_dir is None and not any((folder / name).exists() for name in ("config.json", "modules.json")):
        raise InputError(f"{folder} holds no model (config.json); give the folder of a finished run")
    check_output(folder, args.overwrite_output_dir)
    encoder = load_for_encoding(args.model_name_or_path, args)
    results = read_results(args.model_name_or_path)
    if args.pooling or args.max_length:  # the scores belong to other vectors
        results = {key: value for key, value in results.items() if key == "train"}
    done = export_onnx(encoder, folder, args.int8, args.overwrite_output_dir, results or None)
    print(f"wrote {done.path}: its vectors differ from the model's by at most {done.difference:.0e} of their norm")
    if done.int8_path is not None:
        print(f"wrote {done.int8_path}: the smallest cosine of its vectors with the model's is {done.cosine:.4f}")


if __name__ == "__main__":
    run(main)
