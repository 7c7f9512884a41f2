"""The flags and the training loop of recipes/pretrain_encoder.py, which trains an encoder on plain text.

Both objectives share them: `distill` (hf_embed/kit/distill.py) learns from a teacher, `masked_lm` (hf_embed/kit/masked_lm.py)
learns from the text alone.

The state of an unfinished run is kept beside the output. If the run is interrupted, the same command resumes it:

    OUTPUT.work/identity          the settings of the run
    OUTPUT.work/checkpoint.pt     the weights, the optimizer state and the step; written to a temporary file, then renamed
"""

import dataclasses
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import BertConfig, BertTokenizer, PreTrainedModel

from hf_embed.data.sources import read_texts
from hf_embed.distributed import get_rank, get_world_size, is_main_process, mean_over_ranks, take_weights_of_main
from hf_embed.errors import InputError, in_short
from hf_embed.files.disk import check_folder
from hf_embed.files.safe_files import new_folder, write_json, writing
from hf_embed.files.work_files import digest
from hf_embed.kit.overwrite import check_replaceable
from hf_embed.progress import progress_bar, quiet_libraries
from hf_embed.ranges import ABOVE_ZERO, COUNT, REQUIRED, SEED, Range, check_ranges, setting

FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"]  # of a saved encoder
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]  # the first pieces of every vocabulary that is made here
SHORT = 64  # tokens: the minimum of `--max_length`, and the length of short sequences in masked language modeling
LOG_STEPS, SAVE_STEPS = 100, 500
Rows = TypeVar("Rows", list, Tensor)


@dataclass
class PretrainArguments:
    """Flags of `pretrain_encoder.py`."""

    train_file: str = setting(
        REQUIRED, "Sentences: a txt file with one per line, or a table with a column text, gzipped or not."
    )
    output_dir: str = setting(REQUIRED, "Folder for the encoder.")
    objective: Literal["distill", "mlm"] = setting(
        "distill", "distill: predict a teacher's hidden states. mlm: fill in masked tokens, without a teacher."
    )
    teacher: str | None = setting(None, "For distill: Hub name or folder of a BERT to learn from.")
    trust_remote_code: bool = setting(False, "Run the teacher's own Python code, if it has any; read this code first.")
    teacher_layer: int = setting(4, "For distill: layer of the teacher whose hidden states are predicted.")
    vocab_size: int = setting(12000, "Number of pieces in the encoder's vocabulary.")
    hidden_size: int = setting(192, "Width of the encoder's layers.")
    num_layers: int = setting(4, "Number of the encoder's layers.")
    num_heads: int = setting(6, "Number of attention heads in a layer.")
    max_length: int = setting(512, "Maximum length of a text, in tokens.")
    sentence_tokens: int = setting(14_000_000, "Number of tokens to train on in short texts.")
    long_tokens: int = setting(
        4_000_000, "Number of tokens to train on in longer texts. distill may add those of up to 50,000 more sentences."
    )
    batch_tokens: int = setting(5120, "Number of tokens in a batch.")
    learning_rate: float = setting(2e-3, "Highest learning rate of the schedule.")
    seed: int = setting(1, "Seed of the order of the texts and of the masked tokens.")

    def __post_init__(self) -> None:
        numbers = [field.name for field in dataclasses.fields(self) if type(field.default) is int]
        others = {"seed": SEED, "learning_rate": ABOVE_ZERO, "max_length": Range(least=SHORT, whole=True)}
        check_ranges(self, dict.fromkeys(numbers, COUNT) | others)
        if self.hidden_size % self.num_heads:
            raise InputError(f"--num_heads is {self.num_heads}, which does not divide --hidden_size {self.hidden_size}")
        if self.objective == "distill" and self.teacher is None:
            raise InputError("--objective distill needs a teacher; give --teacher MODEL, or --objective mlm")
        for name in ("teacher", "teacher_layer", "trust_remote_code") if self.objective == "mlm" else ():
            if getattr(self, name) != type(self).__dataclass_fields__[name].default:
                raise InputError(f"--objective mlm uses no teacher; remove --{name}, or give --objective distill")

    def bert_config(self, vocab_size: int) -> BertConfig:
        """Return the configuration of the encoder. Its padding token is the first of `SPECIAL`."""
        return BertConfig(
            vocab_size=vocab_size, hidden_size=self.hidden_size, num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads, intermediate_size=4 * self.hidden_size,
            max_position_embeddings=self.max_length, pad_token_id=0,
        )  # fmt: skip

    def identity(self, sentences: list[str]) -> str:
        """Return what a resumed run must share: all settings and a hash of the sentences, but no input and output paths."""
        return str(dataclasses.asdict(self) | {"train_file": digest(sentences), "output_dir": None})


def check_output(folder: Path) -> None:
    """Raise InputError if a folder cannot be written or replaced, or holds files that this recipe does not write."""
    check_folder(folder, "--output_dir")
    if folder.exists():
        check_replaceable(folder)
    if others := sorted({path.name for path in folder.glob("*")} - set(FILES)):
        raise InputError(f"--output_dir {folder} holds {others[0]}, which is not a file of an encoder; give another folder")


def save(args: PretrainArguments, model: PreTrainedModel, tokenizer: BertTokenizer, loss: float, seen: int) -> None:
    """Write the encoder and a record of its training, on the main process. They replace the files of an earlier encoder."""
    if not is_main_process():
        return
    folder = Path(args.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with quiet_libraries(), new_folder(folder) as new:
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
        write_json(new / "training.json", dataclasses.asdict(args) | {"loss": loss, "tokens": seen})
    print(f"saved to {folder}; load it with {type(model).__name__}.from_pretrained({str(folder)!r}), or with AutoModel")


def read_sentences(path: str, seed: int) -> list[str]:
    """Return the texts of a file in random order.

    Raises:
        InputError: if the file cannot be read.
    """
    sentences = read_texts(path)
    random.Random(seed).shuffle(sentences)
    return sentences


def train(
    module: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler, steps: int,
    loss_of: Callable[[int], tuple[Tensor, int]], seed: int, checkpoint: Path,
) -> tuple[float, int]:  # fmt: skip
    """Train, and write a checkpoint every `SAVE_STEPS` steps. If there is a checkpoint already, resume from it.

    Args:
        module: the module with all weights to train.
        optimizer: an optimizer of its parameters.
        schedule: the learning-rate schedule, which advances once per training step.
        steps: the number of training steps in total.
        loss_of: takes the number of a step, counted from 0, and returns this rank's part of its loss and the number of tokens
            that all ranks read. The mean of the parts over the ranks is the loss of the whole batch. The random choices may
            depend on the step and the seed alone, so that a resumed run makes the same choices.
        seed: seed of the random choices of the steps.
        checkpoint: path of the checkpoint file.

    Returns:
        The mean loss as in the last log line, and the number of tokens of all steps.

    Raises:
        InputError: if the checkpoint cannot be read.
    """
    first, seen, mean = 0, 0, float("nan")
    losses: list[float] = []
    if checkpoint.is_file():
        first, seen, losses, mean = load(checkpoint, module, optimizer, schedule)
        say(f"resuming at step {first} of {steps}")
    take_weights_of_main(module)
    started, before = time.perf_counter(), seen
    with progress_bar(total=steps, desc="Training", unit="step") as bar:
        bar.update(first)
        for step in range(first, steps):
            torch.manual_seed(seed + step)
            loss, tokens = loss_of(step)
            optimizer.zero_grad()
            backward(loss, module)
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            seen += tokens
            losses.append(mean_over_ranks(loss.detach()).item())
            done = step + 1
            if done % LOG_STEPS == 0 or done == steps:
                rate, mean, losses = (seen - before) / (time.perf_counter() - started), sum(losses) / len(losses), []
                bar.clear()
                say(f"step {done}/{steps}  loss {mean:.4f}  {rate:,.0f} tokens/s")
            if (done % SAVE_STEPS == 0 or done == steps) and is_main_process():
                with writing(checkpoint) as aside:
                    states = [part.state_dict() for part in (module, optimizer, schedule)]
                    torch.save([*states, (done, seen, losses, mean)], aside)
            bar.update()
    return mean, seen


def backward(loss: Tensor, module: nn.Module) -> None:
    """Compute the gradients, and average them over the ranks."""
    loss.backward()
    for parameter in module.parameters():
        if parameter.grad is not None:
            mean_over_ranks(parameter.grad)


def say(line: str) -> None:
    """Print a line, on the main process."""
    if is_main_process():
        print(line, flush=True)


def own_rows(rows: Rows) -> Rows:
    """Return this rank's share of the rows of a batch: a list or a tensor."""
    return rows[get_rank() :: get_world_size()]


def check_shares(fewest: int) -> None:
    """Raise InputError if a batch has so few rows that a rank would have none."""
    if fewest < get_world_size():
        raise InputError(
            f"{get_world_size()} processes cannot share a batch of {fewest} texts; give a larger --batch_tokens, or start "
            "fewer processes"
        )


def load(
    checkpoint: Path, module: nn.Module, optimizer: torch.optim.Optimizer, schedule: LRScheduler
) -> tuple[int, int, list[float], float]:
    """Load the checkpoint of `train`. Return the steps done, the tokens seen, the losses not yet logged and the last mean."""
    device = next(module.parameters()).device
    try:
        weights, moments, rates, progress = torch.load(checkpoint, map_location=device, weights_only=True)
        module.load_state_dict(weights)
        optimizer.load_state_dict(moments)
        schedule.load_state_dict(rates)
        return progress
    except Exception as error:
        raise InputError(
            f"{checkpoint} cannot be read ({in_short(error)}); remove {checkpoint.parent} to start again"
        ) from error
