"""Make a small BERT encoder from nothing but plain text and a teacher. The quickstart encoder was made by this command:

    python recipes/pretrain_encoder.py --teacher MODEL --train_file sentences.txt.gz --output_dir outputs/encoder

The student has its own small vocabulary: the pieces of the teacher's that the text uses most. For every token it learns
to predict the teacher's layer-normalised hidden state through one linear map (mean squared error), where the teacher reads
the very same pieces. That signal is dense: masked language modelling on the same two cores had not left the plateau of
word frequencies after 5M tokens. Two stages: single sentences, then sentences joined up to `--max_length` tokens, so that
every position is trained. The result is a language encoder, not yet a sentence encoder: that is what fine-tuning is for.

Shapes: B texts of T tokens, D student width, E teacher width.
"""

import argparse
import gzip
import json
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, BertTokenizer

from hf_embed import InputError
from hf_embed.kit.cli import run
from hf_embed.ranges import COUNT, POSITIVE, SEED

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def read_lines(path: str) -> list[str]:
    opener = gzip.open if path.endswith(".gz") else open
    with opener(path, "rt", encoding="utf-8") as lines:
        return [line.strip() for line in lines if line.strip()]


def cut_vocabulary(teacher: Tokenizer, sentences: list[str], size: int) -> tuple[Tokenizer, list[int]]:
    """The teacher's WordPiece tokenizer with the `size` pieces the sentences use most; and each piece's teacher id."""
    teacher.no_truncation()
    teacher.no_padding()
    counts = Counter(piece for e in teacher.encode_batch(sentences, add_special_tokens=False) for piece in e.tokens)
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


def new_student(args, teacher: BertModel, teacher_ids: torch.Tensor) -> BertModel:
    """A BERT whose word and position tables start as the leading directions of the teacher's."""
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


def batches(texts: list[list[int]], batch_tokens: int, rng: random.Random):
    """Batches of about `batch_tokens` tokens, texts of nearly one length together, in random order."""
    texts = sorted(texts, key=lambda ids: (len(ids), rng.random()))
    start, cut = 0, []
    while start < len(texts):
        stop = start + max(1, batch_tokens // (len(texts[start]) + 2))
        cut.append(texts[start:stop])
        start = stop
    rng.shuffle(cut)
    return cut


def join(texts: list[list[int]], max_length: int, rng: random.Random) -> list[list[int]]:
    """Sentences strung together; the lengths of the results are spread evenly between 32 and `max_length`."""
    joined, current, wanted = [], [], rng.randint(32, max_length)
    for ids in texts:
        current = current + ids
        if len(current) >= wanted:
            joined.append(current[:wanted])
            current, wanted = [], rng.randint(32, max_length)
    return joined


def check(args) -> None:
    for name, value in vars(args).items():
        if isinstance(value, int) and not isinstance(value, bool) and value not in (SEED if name == "seed" else COUNT):
            raise InputError(f"--{name} is {value}; it must be {SEED if name == 'seed' else COUNT}")
    if args.learning_rate not in POSITIVE:
        raise InputError(f"--learning_rate is {args.learning_rate}; it must be {POSITIVE}")
    if args.hidden_size % args.num_heads:
        raise InputError(f"--num_heads is {args.num_heads}, which does not divide the {args.hidden_size} of --hidden_size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="a BERT to learn from: a Hub name or a folder")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the teacher's own code, if it has any")
    parser.add_argument("--teacher_layer", type=int, default=4, help="which of its layers' hidden states to predict")
    parser.add_argument("--train_file", required=True, help="plain text, one sentence a line; .gz is fine")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--vocab_size", type=int, default=12000)
    parser.add_argument("--hidden_size", type=int, default=192)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--num_heads", type=int, default=6)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--sentence_tokens", type=int, default=14_000_000, help="tokens of the first stage")
    parser.add_argument("--long_tokens", type=int, default=4_000_000, help="tokens of the second stage")
    parser.add_argument("--batch_tokens", type=int, default=5120)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    check(args)
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    sentences = read_lines(args.train_file)
    rng.shuffle(sentences)
    trusted = {"trust_remote_code": args.trust_remote_code}
    teacher = AutoModel.from_pretrained(args.teacher, dtype=torch.float32, **trusted).eval()
    teacher.encoder.layer = teacher.encoder.layer[: args.teacher_layer]
    teacher_tokenizer = AutoTokenizer.from_pretrained(args.teacher, **trusted).backend_tokenizer
    tokenizer, teacher_ids = cut_vocabulary(teacher_tokenizer, sentences[:200_000], args.vocab_size)
    teacher_ids = torch.tensor(teacher_ids)
    student = new_student(args, teacher, teacher_ids)
    to_teacher = torch.nn.Linear(args.hidden_size, teacher.config.hidden_size)

    texts, needed = [], args.sentence_tokens + args.long_tokens
    while needed > 0 and len(texts) < len(sentences):
        new = tokenizer.encode_batch(sentences[len(texts) : len(texts) + 50_000], add_special_tokens=False)
        texts += [e.ids[: args.max_length - 2] for e in new]
        needed -= sum(len(e.ids) for e in new)
    total, first_long = 0, len(texts)
    for i, ids in enumerate(texts):
        total += len(ids)
        if total >= args.sentence_tokens:
            first_long = i
            break
    steps = batches([t for t in texts[:first_long] if t], args.batch_tokens, rng)
    steps += batches(join(texts[first_long:], args.max_length - 2, rng), args.batch_tokens, rng)
    print(f"{len(steps)} steps, {sum(map(len, texts)):,} tokens, vocabulary {tokenizer.get_vocab_size():,}", flush=True)

    cls, sep, pad = (tokenizer.token_to_id(t) for t in ("[CLS]", "[SEP]", "[PAD]"))
    teacher.to(device, torch.bfloat16)
    student.to(device).eval()  # eval: no dropout while distilling
    to_teacher.to(device)
    parameters = [*student.parameters(), *to_teacher.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=len(steps) + 1, pct_start=0.05)
    started, seen, shown = time.time(), 0, []
    for step, batch in enumerate(steps, 1):
        rows = [torch.tensor([cls, *ids, sep]) for ids in batch]
        input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad).to(device)  # (B, T)
        mask = input_ids != pad
        with torch.no_grad():
            target = teacher(teacher_ids.to(device)[input_ids], attention_mask=mask).last_hidden_state[mask].float()
            target = F.layer_norm(target, target.shape[-1:])  # (tokens, E)
        with torch.autocast(device, torch.bfloat16):
            states = student(input_ids, attention_mask=mask).last_hidden_state[mask]  # (tokens, D)
            predicted = to_teacher(states).float()
        loss = F.mse_loss(predicted, target)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        seen += len(target)
        shown.append(loss.item())
        if step % 100 == 0 or step == len(steps):
            rate = seen / (time.time() - started)
            mean = sum(shown) / len(shown)
            print(f"step {step}/{len(steps)}  loss {mean:.4f}  {rate:,.0f} tokens/s", flush=True)
            shown = []
        if step % 1000 == 0 or step == len(steps):
            student.save_pretrained(args.output_dir)
            saved = BertTokenizer(tokenizer_object=tokenizer, model_max_length=args.max_length)
            saved.save_pretrained(args.output_dir)
    Path(args.output_dir, "training.json").write_text(json.dumps(vars(args) | {"loss": mean, "tokens": seen}, indent=2))


if __name__ == "__main__":
    run(main)
