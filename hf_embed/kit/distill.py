"""Make a small BERT from plain text and a teacher (recipes/pretrain_encoder.py, `--objective distill`).

The student has a small vocabulary of its own: the pieces of the teacher's vocabulary that occur most often in the text. For
every token, the student learns to predict the teacher's layer-normalized hidden state through one linear map (mean squared
error). The teacher reads exactly the same pieces. The training has two stages: single sentences, then sentences joined into
texts of up to `--max_length` tokens, so that every position is trained. The result is a language encoder. Fine-tuning makes it
a sentence encoder.

Shapes: B texts of T tokens, D width of the student, E width of the teacher, S tokens of a batch without padding.
"""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertModel, BertTokenizer

from hf_embed.checkpoint.load import find_transformer, load_model, load_tokenizer
from hf_embed.distributed import get_world_size
from hf_embed.errors import InputError
from hf_embed.hub_access import find_model
from hf_embed.kit.pretraining import SPECIAL, PretrainArguments, own_rows, save, say, train


def pretrain(args: PretrainArguments, sentences: list[str], work: Path) -> None:
    """Distill the teacher into a student with a small vocabulary of its own, and save the student.

    Args:
        args: the flags.
        sentences: the training text, in random order.
        work: the folder for the checkpoint.

    Raises:
        InputError: if --hidden_size is larger than the teacher's width or than the student's vocabulary, if --max_length or
            --teacher_layer is larger than the teacher's, if --vocab_size is too small for the letters of the text, or if there
            is too little text.
    """
    torch.manual_seed(args.seed)
    teacher, teacher_tokenizer = load_teacher(str(args.teacher), args.teacher_layer, args.trust_remote_code)
    tokenizer, teacher_ids = smaller_vocabulary(teacher_tokenizer, sentences[:200_000], args.vocab_size)
    student = new_student(args, teacher, torch.tensor(teacher_ids))

    texts = tokenize(args, tokenizer, sentences)
    batches = two_stages(args, texts, random.Random(args.seed))
    if not batches:
        raise InputError(
            f"--train_file {args.train_file} has {len(sentences)} sentence(s), too few to train on; give more text"
        )
    say(f"{len(batches)} steps, {sum(map(len, texts)):,} tokens, vocabulary {tokenizer.get_vocab_size():,}")
    loss, seen = distill(args, teacher, student, torch.tensor(teacher_ids), batches, work / "checkpoint.pt")
    save(args, student, BertTokenizer(tokenizer_object=tokenizer, model_max_length=args.max_length), loss, seen)


def load_teacher(name: str, layers: int, trust_remote_code: bool) -> tuple[BertModel, Tokenizer]:
    """Load a BERT in float32, with its first layers only, and its tokenizer.

    Raises:
        InputError: if the model cannot be loaded, is not a BERT with WordPiece, or has fewer layers.
    """
    found = find_model(name)
    where: dict[str, Any] = find_transformer(name, **found) | found
    loaded, _ = load_model(name, trust_remote_code=trust_remote_code, dtype=torch.float32, **where)
    teacher = cast(BertModel, loaded)
    tokenizer = load_tokenizer(name, trust_remote_code, **where).backend_tokenizer
    try:
        stack = teacher.encoder.layer
    except AttributeError:
        stack = None
    if stack is None or not isinstance(tokenizer.model, WordPiece):
        raise InputError(f"--teacher {name}: the teacher must be a BERT with a WordPiece tokenizer; give another model")
    if layers > len(stack):
        raise InputError(f"--teacher_layer is {layers}, but the teacher has {len(stack)} layers; give a smaller value")
    teacher.encoder.layer = stack[:layers]
    return teacher.eval(), tokenizer


def smaller_vocabulary(teacher: Tokenizer, sentences: list[str], size: int) -> tuple[Tokenizer, list[int]]:
    """Reduce the teacher's WordPiece tokenizer to the `size` pieces that occur most often in the sentences.

    Returns:
        The new tokenizer, and for each of its pieces, in order, the id that the teacher has for the piece.
    """
    teacher.no_truncation()
    teacher.no_padding()
    encodings = teacher.encode_batch(sentences, add_special_tokens=False)
    counts = Counter(piece for encoding in encodings for piece in encoding.tokens)
    vocabulary = teacher.get_vocab()
    # All letters that occur are kept, so that few words are unknown.
    letters = [p for p in vocabulary if len(p.removeprefix("##")) == 1 and counts[p] > 0]
    if size < len(SPECIAL) + len(letters):
        raise InputError(f"--vocab_size is {size}, but the letters of this text alone need {len(letters)} pieces; give more")
    ranked = [p for p, _ in counts.most_common() if p not in SPECIAL and p not in letters]
    pieces = SPECIAL + sorted(letters) + ranked[: size - len(SPECIAL) - len(letters)]
    ids = {piece: i for i, piece in enumerate(pieces)}

    spec = json.loads(teacher.to_str())
    spec["model"]["vocab"] = ids
    spec["added_tokens"] = [token | {"id": ids[token["content"]]} for token in spec["added_tokens"]]
    for token in spec["post_processor"]["special_tokens"].values():
        token["ids"] = [ids[piece] for piece in token["tokens"]]
    return Tokenizer.from_str(json.dumps(spec)), [vocabulary[piece] for piece in pieces]


def new_student(args: PretrainArguments, teacher: BertModel, teacher_ids: Tensor) -> BertModel:
    """Make a BERT whose word and position embeddings start as projections of the teacher's embeddings.

    Both tables are projected onto the D leading principal directions of the teacher's word embeddings.

    Raises:
        InputError: if there are fewer than D directions.
    """
    if args.max_length > teacher.config.max_position_embeddings:
        raise InputError(
            f"--max_length is {args.max_length}, but the teacher has {teacher.config.max_position_embeddings} positions; give "
            "a smaller value"
        )
    most = min(len(teacher_ids), teacher.config.hidden_size)
    if args.hidden_size > most:
        raise InputError(
            f"--hidden_size is {args.hidden_size}, but it can be at most {most}, the smaller of the teacher's width and the "
            "number of pieces in the student's vocabulary; give a smaller value"
        )
    student = BertModel(args.bert_config(len(teacher_ids)))
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


def tokenize(args: PretrainArguments, tokenizer: Tokenizer, sentences: list[str]) -> list[list[int]]:
    """Return the token ids of the first sentences, as many as the two stages need."""
    texts: list[list[int]] = []
    needed = args.sentence_tokens + args.long_tokens
    while needed > 0 and len(texts) < len(sentences):
        new = tokenizer.encode_batch(sentences[len(texts) : len(texts) + 50_000], add_special_tokens=False)
        texts += [encoding.ids[: args.max_length - 2] for encoding in new]
        needed -= sum(len(encoding.ids) for encoding in new)
    return texts


def two_stages(args: PretrainArguments, texts: list[list[int]], rng: random.Random) -> list[list[list[int]]]:
    """Make the batches of both stages: single sentences, then joined sentences."""
    total, first_long, needed = 0, len(texts), args.sentence_tokens + args.long_tokens
    short = args.sentence_tokens * min(1, sum(map(len, texts)) / needed)  # both stages have their share of a short file
    for i, ids in enumerate(texts):
        total += len(ids)
        if total >= short:
            first_long = i
            break
    steps = batches_of([ids for ids in texts[:first_long] if ids], args.batch_tokens, rng)
    return steps + batches_of(join(texts[first_long:], args.max_length - 2, rng), args.batch_tokens, rng)


def batches_of(texts: list[list[int]], batch_tokens: int, rng: random.Random) -> list[list[list[int]]]:
    """Make batches of about `batch_tokens` tokens from texts of similar length. The batches are in random order."""
    texts = sorted(texts, key=lambda ids: (len(ids), rng.random()))
    start, found = 0, []
    while start < len(texts):
        stop = start + max(1, batch_tokens // (len(texts[start]) + 2))
        found.append(texts[start:stop])
        start = stop
    rng.shuffle(found)
    return found


def join(texts: list[list[int]], max_length: int, rng: random.Random) -> list[list[int]]:
    """Join sentences into texts of random lengths, uniform between 32 and `max_length` tokens."""
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
    args: PretrainArguments, teacher: BertModel, student: BertModel, teacher_ids: Tensor, batches: list, checkpoint: Path
) -> tuple[float, int]:
    """Train the student on the batches. Return the mean loss of the last steps and the number of tokens read."""
    device = PartialState().device
    to_teacher = nn.Linear(args.hidden_size, teacher.config.hidden_size)
    teacher.to(device, torch.bfloat16)
    teacher_ids = teacher_ids.to(device)
    both = nn.ModuleList([student, to_teacher]).to(device).eval()  # eval: no dropout while distilling

    def loss_of(step: int) -> tuple[Tensor, int]:
        tokens = sum(len(text) + 2 for text in batches[step])
        own = own_rows(batches[step])
        input_ids, mask = pad(own or batches[step][:1], device)  # a rank without a text takes part all the same, with weight 0
        target = teacher_states(teacher, teacher_ids[input_ids], mask)  # (S, E)
        with torch.autocast(device.type, torch.bfloat16):
            states = student(input_ids, attention_mask=mask).last_hidden_state[mask]  # (S, D)
            predicted = to_teacher(states).float()
        share = len(target) * get_world_size() / tokens if own else 0
        return F.mse_loss(predicted, target) * share, tokens

    optimizer = torch.optim.AdamW(both.parameters(), lr=args.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=len(batches) + 1, pct_start=0.05)
    return train(both, optimizer, schedule, len(batches), loss_of, args.seed, checkpoint)


def pad(batch: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Add [CLS] and [SEP] to each text and pad the batch. Return token ids (B, T) and the attention mask (B, T), bool."""
    cls, sep, padding = (SPECIAL.index(token) for token in ("[CLS]", "[SEP]", "[PAD]"))  # the first pieces of the vocabulary
    rows = [torch.tensor([cls, *text, sep]) for text in batch]
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding).to(device)
    return input_ids, input_ids.ne(padding)


@torch.no_grad()
def teacher_states(teacher: BertModel, input_ids: Tensor, mask: Tensor) -> Tensor:
    """Return the teacher's layer-normalized hidden states, (S, E)."""
    states = teacher(input_ids, attention_mask=mask).last_hidden_state[mask].float()
    return F.layer_norm(states, states.shape[-1:])
