"""Train a small BERT from scratch on plain text, with or without a teacher model.

    python recipes/pretrain_encoder.py --objective mlm --train_file sentences.txt.gz --output_dir outputs/language_model
    python recipes/pretrain_encoder.py --teacher MODEL --train_file sentences.txt.gz --output_dir outputs/encoder

The first command trains the model to fill in masked tokens. The second one trains it to predict the hidden states of a teacher;
the encoder that comes with hf_embed was made in this way. OUTPUT_DIR has the encoder, which AutoModel loads, its tokenizer, and
training.json, a record of the training. An earlier encoder in OUTPUT_DIR is replaced at the end of the run. If a run is
interrupted, the same command resumes it. With `accelerate launch`, the processes share each batch; the result is the same, up
to rounding.
"""

import hf_embed  # noqa: F401 (imported first: it prints that loading takes a while)

# isort: split
import shutil
from pathlib import Path

from hf_embed.files.work_files import claimed
from hf_embed.kit import distill, masked_lm
from hf_embed.kit.cli import parse, run
from hf_embed.kit.inference import process_state
from hf_embed.kit.pretraining import PretrainArguments, check_output, read_sentences


def main() -> None:
    """Train the encoder, and resume from its last checkpoint if there is one."""
    (args,) = parse([PretrainArguments])
    state = process_state()
    output = Path(args.output_dir)
    check_output(output)
    work = output.with_name(output.name + ".work")
    sentences = read_sentences(args.train_file, args.seed)
    with claimed(work, args.identity(sentences)):
        objective = {"distill": distill, "mlm": masked_lm}[args.objective]
        objective.pretrain(args, sentences, work)
        if state.is_main_process:
            shutil.rmtree(work)


if __name__ == "__main__":
    run(main)
