"""Average the weights of several finished models into one model.

    python recipes/merge.py outputs/seed-1 outputs/seed-2 outputs/seed-3 --output_dir outputs/average
    python recipes/merge.py outputs/qwen3-web outputs/qwen3-nli --weights 0.7 0.3 --output_dir outputs/qwen3
    python recipes/merge.py my-company/embeddings-a my-company/embeddings-b --output_dir outputs/average

The models must have one architecture, and the same tokenizer, pooling, prompts, normalization and layers after the pooling; any
difference is refused by name. They should come from the same start: trainings of one model with other data or other seeds. The
mean is computed and saved in float32. The card of OUTPUT_DIR tells what was averaged. Score the average with `evaluate.py`, as
it may be better or worse than its parts.
"""

from dataclasses import dataclass
from pathlib import Path

from hf_embed.averaging import average_models, save_average, shares_of
from hf_embed.kit.calibrate import check_folder_to_fill
from hf_embed.kit.cli import REQUIRED, parse, run, setting
from hf_embed.kit.plan import TRUST
from hf_embed.kit.report import saved_to
from hf_embed.ranges import COUNT, check_ranges


@dataclass
class Arguments:
    """Flags of this recipe."""

    models: list[str] = setting(
        REQUIRED, "Two or more folders, or Hub names, of finished models.", positional=True, metavar="FOLDER"
    )
    weights: list[float] | None = setting(
        None, "The weight of each model, in the same order; they are divided by their sum. Default: all equal."
    )
    max_length: int | None = setting(None, "Maximum length of a text, in tokens. Needed if the models have different lengths.")
    output_dir: str = setting("outputs/merge", "Folder for the average.")
    overwrite_output_dir: bool = setting(False, "Replace the files in the output folder.")
    trust_remote_code: bool = setting(False, TRUST)

    def __post_init__(self) -> None:
        check_ranges(self, {"max_length": COUNT})


def main(argv: list[str] | None = None) -> None:
    """Check the flags, average the models, and save the average with a card."""
    (args,) = parse([Arguments], argv=argv)
    shares = shares_of(args.models, args.weights)
    folder = Path(args.output_dir)
    check_folder_to_fill(folder, args.models, args.overwrite_output_dir)
    encoder = average_models(args.models, args.weights, args.max_length, args.trust_remote_code)
    save_average(encoder, folder, args.models, args.weights)
    for name, share in zip(args.models, shares):
        print(f"{share:8.4f}  {name}")
    print(saved_to(folder, encoder.remote_code))


if __name__ == "__main__":
    run(main)
