"""Make a small BERT encoder from nothing but plain text and a teacher.

The quickstart encoder was made by this command:

    python recipes/pretrain_encoder.py --teacher MODEL --train_file sentences.txt.gz --output_dir outputs/encoder

The student has its own small vocabulary: the pieces of the teacher's that the text uses most. For every token it learns
to predict the teacher's layer-normalised hidden state through one linear map (mean squared error), where the teacher reads
the very same pieces. That signal is dense: masked language modelling on the same two cores had not left the plateau of
word frequencies after 5M tokens. Two stages: single sentences, then sentences joined up to `--max_length` tokens, so that
every position is trained. The result is a language encoder, not yet a sentence encoder: that is what fine-tuning is for.

Shapes: B texts of T tokens, D student width, E teacher width, S tokens in a batch without its padding.
"""

import hf_embed  # noqa: F401 (first, for it says that the imports take a while)

# isort: split
import dataclasses
import gzip
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from hf_embed import InputError
from hf_embed.disk import check_folder
from hf_embed.kit.cli import parse, run
from hf_embed.ranges import COUNT, POSITIVE, SEED
from hf_embed.ranks import claim_folder
from hf_embed.safe_files import can_be_replaced, new_folder, write_json

FILES = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "training.json"]  # of an encoder
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass
class Arguments:
    """Flags of this recipe."""

    teacher: str = field(metadata={"help": "a BERT to learn from: a Hub name or a folder"})
    train_file: str = field(metadata={"help": "plain text, one sentence a line; .gz is fine"})
    output_dir: str = field(metadata={"help": "where the encoder goes"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run the teacher's own code, if it has any"})
    teacher_layer: int = field(default=4, metadata={"help": "which of its layers' hidden states to predict"})
    vocab_size: int = field(default=12000, metadata={"help": "pieces of its vocabulary"})
    hidden_size: int = field(default=192, metadata={"help": "width of its layers"})
    num_layers: int = field(default=4, metadata={"help": "how many layers it has"})
    num_heads: int = field(default=6, metadata={"help": "attention heads of a layer"})
    max_length: int = field(default=512, metadata={"help": "tokens that it has positions for"})
    sentence_tokens: int = field(default=14_000_000, metadata={"help": "tokens of the first stage"})
    long_tokens: int = field(default=4_000_000, metadata={"help": "tokens of the second stage"})
    batch_tokens: int = field(default=5120, metadata={"help": "tokens of a batch"})
    learning_rate: float = field(default=2e-3, metadata={"help": "the highest of the schedule"})
    seed: int = field(default=1, metadata={"help": "of the order of the texts and of what is drawn"})

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            allowed = SEED if name == "seed" else COUNT
            if isinstance(value, int) and not isinstance(value, bool) and value not in allowed:
                raise InputError(f"--{name} is {value}; it must be {allowed}")
        if self.learning_rate not in POSITIVE:
            raise InputError(f"--learning_rate is {self.learning_rate}; it must be {POSITIVE}")
        if self.hidden_size % self.num_heads:
            raise InputError(f"--num_heads is {self.num_heads}, which does not divide the {self.hidden_size} of --hidden_size")


def main() -> None:
    """Distill the teacher into a student with a small vocabulary of its own."""
    (args,) = parse([Arguments])
    check_output(Path(args.output_dir))
    claim_folder(Path(args.output_dir))
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    sentences = read_lines(args.train_file)
    rng.shuffle(sentences)
    trusted = {"trust_remote_code": args.trust_remote_code}
    teacher = AutoModel.from_pretrained(args.teacher, dtype=torch.float32, **trusted).eval()
    teacher.encoder.layer = teacher.encoder.layer[: args.teacher_layer]
    teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher, **trusted).backend_tokenizer
    tokenizer, teacher_ids = smaller_vocabulary(teacher_tokenizer, sentences[:200_000], args.vocab_size)
    student = new_student(args, teacher, torch.tensor(teacher_ids))

    texts = tokenize(args, tokenizer, sentences)
    steps = two_stages(args, texts, rng)
    print(f"{len(steps)} steps, {sum(map(len, texts)):,} tokens, vocabulary {tokenizer.get_vocab_size():,}", flush=True)
    distill(args, teacher, student, tokenizer, torch.tensor(teacher_ids), steps)


def check_output(folder: Path) -> None:
    """Raise InputError for a folder that cannot be written, or that holds files which this recipe does not write."""
    check_folder(folder, "--output_dir")
    if folder.exists() and not can_be_replaced(folder):
        raise InputError(
            f"--output_dir {folder}: no new folder can take its place, for it is the current folder, a mount point, or in a "
            "folder that cannot be written to; name a folder within it, or another one"
        )
    if others := sorted({path.name for path in folder.glob("*")} - set(FILES)):
        raise InputError(f"--output_dir {folder} holds {others[0]}, which is no file of an encoder; name another folder")


def save(args: Arguments, student: BertModel, tokenizer: Tokenizer, loss: float, seen: int) -> None:
    """Write the student, with what is known of its training, in the place of an earlier one."""
    folder = Path(args.output_dir)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(folder) as new:
        student.save_pretrained(new)
        BertTokenizer(tokenizer_object=tokenizer, model_max_length=args.max_length).save_pretrained(new)
        write_json(new / "training.json", dataclasses.asdict(args) | {"loss": loss, "tokens": seen})


def read_lines(path: str) -> list[str]:
    """Read the lines of a file that are not empty."""
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]


def smaller_vocabulary(teacher: Tokenizer, sentences: list[str], size: int) -> tuple[Tokenizer, list[int]]:
    """Make the teacher's WordPiece tokenizer with the `size` pieces the sentences use most; and each piece's teacher id."""
    teacher.no_truncation()
    teacher.no_padding()
    encodings = teacher.encode_batch(sentences, add_special_tokens=False)
    counts = Counter(piece for encoding in encodings for piece in encoding.tokens)
    vocabulary = teacher.get_vocab()
    letters = [p for p in vocabulary if len(p.removeprefix("##")) == 1 and counts[p] > 0]  # so that few words are unknown
    ranked = [p for p, _ in counts.most_common() if p not in SPECIAL and p not in letters]
    pieces = SPECIAL + sorted(letters) + ranked[: size - len(SPECIAL) - len(letters)]
    ids = {piece: i for i, piece in enumerate(pieces)}

    spec = json.loads(teacher.to_str())
    spec["model"]["vocab"] = ids
    spec["added_tokens"] = [token | {"id": ids[token["content"]]} for token in spec["added_tokens"]]
    for token in spec["post_processor"]["special_tokens"].values():
        token["ids"] = [ids[piece] for piece in token["tokens"]]
    return Tokenizer.from_str(json.dumps(spec)), [vocabulary[piece] for piece in pieces]


def new_student(args: Arguments, teacher: BertModel, teacher_ids: Tensor) -> BertModel:
    """Make a BERT whose word and position tables start as the leading directions of the teacher's."""
    student = BertModel(
        BertConfig(
            vocab_size=len(teacher_ids), hidden_size=args.hidden_size, num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_heads, intermediate_size=4 * args.hidden_size,
            max_position_embeddings=args.max_length,
        )
    )  # fmt: skip
    words = teacher.embeddings.word_embeddings.weight.detach()[teacher_ids]
    center = words.mean(0)
    directions = torch.linalg.svd(words - center, full_matrices=False).Vh[: args.hidden_size]  # (D, E)
    with torch.no_grad():
        table = (words - center) @ directions.T
        scale = 0.05 / table.std()
        student.embeddings.word_embeddings.weight.copy_(scale * table)
        positions = teacher.embeddings.position_embeddings.weight[: args.max_length]
        student.embeddings.position_embeddings.weight.copy_(scale * positions @ directions.T)
    return student


def tokenize(args: Arguments, tokenizer: Tokenizer, sentences: list[str]) -> list[list[int]]:
    """Return the token ids of as many sentences as the two stages need."""
    texts: list[list[int]] = []
    needed = args.sentence_tokens + args.long_tokens
    while needed > 0 and len(texts) < len(sentences):
        new = tokenizer.encode_batch(sentences[len(texts) : len(texts) + 50_000], add_special_tokens=False)
        texts += [encoding.ids[: args.max_length - 2] for encoding in new]
        needed -= sum(len(encoding.ids) for encoding in new)
    return texts


def two_stages(args: Arguments, texts: list[list[int]], rng: random.Random) -> list[list[list[int]]]:
    """Make the batches of both stages: single sentences, then joined ones."""
    total, first_long = 0, len(texts)
    for i, ids in enumerate(texts):
        total += len(ids)
        if total >= args.sentence_tokens:
            first_long = i
            break
    steps = batches([ids for ids in texts[:first_long] if ids], args.batch_tokens, rng)
    return steps + batches(join(texts[first_long:], args.max_length - 2, rng), args.batch_tokens, rng)


def batches(texts: list[list[int]], batch_tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """Make batches of about `batch_tokens` tokens, texts of nearly one length together, in random order."""
    texts = sorted(texts, key=lambda ids: (len(ids), rng.random()))
    start, found = 0, []
    while start < len(texts):
        stop = start + max(1, batch_tokens // (len(texts[start]) + 2))
        found.append(texts[start:stop])
        start = stop
    rng.shuffle(found)
    return found


def join(texts: list[list[int]], max_length: int, rng: random.Random) -> list[list[int]]:
    """Join sentences; the lengths of the results are spread evenly between 32 and `max_length`."""
    joined: list[list[int]] = []
    current: list[int] = []
    wanted = rng.randint(32, max_length)
    for ids in texts:
        current = current + ids
        if len(current) >= wanted:
            joined.append(current[:wanted])
            current, wanted = [], rng.randint(32, max_length)
    return joined


def distill(
    args: Arguments, teacher: BertModel, student: BertModel, tokenizer: Tokenizer, teacher_ids: Tensor, steps: list
) -> None:
    """Train the student on the batches of `steps`, and save it now and then."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    to_teacher = nn.Linear(args.hidden_size, teacher.config.hidden_size)
    teacher.to(device, torch.bfloat16)  # type: ignore[arg-type]  # the decorator of `to` hides its type
    student.to(device).eval()  # type: ignore[arg-type]  # eval: no dropout while distilling
    to_teacher.to(device)
    parameters = [*student.parameters(), *to_teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=len(steps) + 1, pct_start=0.05)
    started, seen, mean, losses = time.time(), 0, 0.0, []
    for step, batch in enumerate(steps, 1):
        input_ids, mask = pad(batch, device)
        target = teacher_states(teacher, teacher_ids.to(device)[input_ids], mask)  # (S, E)
        with torch.autocast(device, torch.bfloat16):
            states = student(input_ids, attention_mask=mask).last_hidden_state[mask]  # (S, D)
            predicted = to_teacher(states).float()
        loss = F.mse_loss(predicted, target)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seen += len(target)
        losses.append(loss.item())
        if step % 100 == 0 or step == len(steps):
            rate, mean, losses = seen / (time.time() - started), sum(losses) / len(losses), []
            print(f"step {step}/{len(steps)}  loss {mean:.4f}  {rate:,.0f} tokens/s", flush=True)
        if step % 1000 == 0 or step == len(steps):
            save(args, student, tokenizer, mean, seen)


def pad(batch: list[list[int]], device: str) -> tuple[Tensor, Tensor]:
    """Return token ids with [CLS] and [SEP], (B, T), and where there are any, (B, T) bool."""
    cls, sep, padding = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]", "[PAD]"))  # which lead the vocabulary
    rows = [torch.tensor([cls, *text, sep]) for text in batch]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
    return input_ids, input_ids.ne(padding)


@torch.no_grad()
def teacher_states(teacher: BertModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the teacher's layer-normalised states, (S, E)."""
    states = teacher(input_ids, attention_mask=mask).last_hidden_state[mask].float()
    return F.layer_norm(states, states.shape[-1:])


if __name__ == "__main__":
    run(main)
