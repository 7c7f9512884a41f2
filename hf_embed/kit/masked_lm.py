"""Make a small BERT from nothing but a text file, by masked language modelling (Devlin et al., 2019, section 3.1).

On a small machine such a model stays long at the loss of guessing frequent words. It gets past that sooner when its word table
starts from co-occurrence statistics: the leading directions of the shifted positive pointwise mutual information of words at
most `WINDOW` apart (Levy and Goldberg, 2014). The sentences are packed, without padding, as RoBERTa's (Liu et al., 2019):

    [CLS] a man plays a guitar . [SEP] it rained . [SEP] the train to     a sequence; the next one goes on with the sentence
    [CLS] london was late . [SEP] ...

Two stages, as BERT's: most tokens in short sequences, the others in sequences of `--max_length`, so that every position is
trained. Dropout is off while training; the saved config has BERT's 0.1, for fine-tuning.

Shapes: B sequences of T tokens, M masked tokens of a batch, V pieces of the vocabulary, D width.
"""

import math
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM, BertTokenizer, get_linear_schedule_with_warmup

from hf_embed.distributed import get_world_size
from hf_embed.errors import InputError
from hf_embed.kit.pretraining import SHORT, SPECIAL, PretrainArguments, check_shares, own_rows, save, say, train
from hf_embed.mlm import mask_tokens

MASKED = 0.2  # of the tokens: more than BERT's 0.15 trains faster where the model is small
WINDOW = 5  # how far apart two tokens may be to count as neighbours; a pair counts one over their distance
SMOOTHING = 0.75  # the exponent of the neighbours' counts (Levy, Goldberg and Dagan, 2015)
SHIFT = math.log(2)  # what is taken off the mutual information
VOCABULARY_SENTENCES = 200_000  # that the vocabulary is made from
MOST_LETTERS = 500  # of the vocabulary; words with others are unknown


def pretrain(args: PretrainArguments, sentences: list[str], work: Path) -> None:
    """Make the vocabulary, the word table and the model, and save it.

    Args:
        args: the flags.
        sentences: what to read, in random order.
        work: the folder for the checkpoint.

    Raises:
        InputError: the text is too short for a single batch.
    """
    device = PartialState().device
    tokenizer = train_tokenizer(sentences[:VOCABULARY_SENTENCES], args.vocab_size, args.max_length)
    stream = token_stream(tokenizer, sentences)
    torch.manual_seed(args.seed)
    model = new_model(args, tokenizer)
    checkpoint = work / "checkpoint.pt"
    if not checkpoint.is_file():
        start_words(model, stream, tokenizer.sep_token_id)
    model.to(device).eval()  # type: ignore[arg-type]  # eval: no dropout; the decorator of `to` hides its type
    batches = all_batches(args, stream)
    check_shares(min(len(rows) for _, rows in batches))
    say(f"{len(sentences):,} sentences, {len(stream):,} tokens, vocabulary {len(tokenizer):,}, {len(batches)} steps")

    def loss_of(step: int) -> tuple[Tensor, int]:
        length, rows = batches[step]
        input_ids = sequences(stream, length, rows, tokenizer.cls_token_id).to(device)
        return masked_lm_loss(model, tokenizer, input_ids), input_ids.numel()

    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.learning_rate, betas=(0.9, 0.98), fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, min(200, len(batches) // 10), len(batches))
    loss, seen = train(model, optimizer, schedule, len(batches), loss_of, args.seed, checkpoint)
    save(args, model, tokenizer, loss, seen)


def train_tokenizer(sentences: list[str], size: int, max_length: int) -> BertTokenizer:
    """Make an uncased WordPiece tokenizer from sentences; the same ones give the same pieces in the same order.

    Raises:
        InputError: so few pieces cannot even be the letters.
    """
    tokenizer = uncased(models.WordPiece(unk_token="[UNK]"))
    counts = Counter(letter for text in sentences for letter in tokenizer.normalizer.normalize_str(text) if letter > " ")
    letters = sorted(letter for letter, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_LETTERS])
    # The trainer numbers letters within words as it meets them, in an order that changes from run to run, and takes of two
    # pairs that are equally frequent the one with the lower numbers. Pieces that are given come first, in their order.
    given = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    if size < len(given):
        raise InputError(f"--vocab_size is {size}; the letters of this text alone are {len(given)} pieces, so give more")
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=given, limit_alphabet=len(letters), show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    pieces = tokenizer.get_vocab()
    made = uncased(models.WordPiece(pieces, unk_token="[UNK]"))  # anew: given letters would be special tokens in the first one
    made.post_processor = processors.BertProcessing(("[SEP]", pieces["[SEP]"]), ("[CLS]", pieces["[CLS]"]))
    return BertTokenizer(tokenizer_object=made, model_max_length=max_length)


def uncased(pieces: models.WordPiece) -> Tokenizer:
    """Make a tokenizer that lowers case and splits words as BERT's."""
    tokenizer = Tokenizer(pieces)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def token_stream(tokenizer: BertTokenizer, sentences: list[str]) -> np.ndarray:
    """Return the token ids of all sentences, one after another, each with [SEP] at its end; (N,) int32."""
    parts = []
    for start in range(0, len(sentences), 20_000):
        encoded = tokenizer.backend_tokenizer.encode_batch(sentences[start : start + 20_000], add_special_tokens=False)
        parts.append(np.array([id for text in encoded for id in (*text.ids, tokenizer.sep_token_id)], dtype=np.int32))
    return np.concatenate(parts)


def new_model(args: PretrainArguments, tokenizer: BertTokenizer) -> BertForMaskedLM:
    """Make a BERT with random weights."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer), hidden_size=args.hidden_size, num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_heads, intermediate_size=4 * args.hidden_size,
            max_position_embeddings=args.max_length, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def start_words(model: BertForMaskedLM, stream: np.ndarray, sep: int) -> None:
    """Let the word table start from co-occurrence statistics; a piece without neighbours keeps its random vector."""
    table = model.bert.embeddings.word_embeddings.weight
    vectors = word_vectors(stream, sep, *table.shape)
    known = vectors.any(1)
    with torch.no_grad():
        table[known] = vectors[known] / vectors[known].std() * 0.04  # about the spread that training ends with


def word_vectors(stream: np.ndarray, sep: int, vocab_size: int, width: int) -> Tensor:
    """Return the vectors whose inner products come nearest to the mutual information of neighbours, (V, D).

    Neighbours are at most `WINDOW` apart and in one sentence.
    """
    sentence = np.cumsum(stream == sep) - (stream == sep)  # its [SEP] is in it
    counts = np.zeros(vocab_size * vocab_size, dtype=np.float32)
    for distance in range(1, WINDOW + 1):
        together = sentence[:-distance] == sentence[distance:]
        left, right = stream[:-distance][together].astype(np.int64), stream[distance:][together]
        counts += np.bincount(left * vocab_size + right, minlength=counts.size).astype(np.float32) / distance
    pairs = torch.from_numpy(counts.reshape(vocab_size, vocab_size))
    pairs = pairs + pairs.T
    context = pairs.sum(0) ** SMOOTHING
    chance = pairs.sum(1, keepdim=True) * (context / context.sum())
    information = (pairs / chance.clamp_min(1e-9)).clamp_min_(1e-12).log_().sub_(SHIFT).clamp_min_(0)  # (V, V)
    u, s, _ = torch.svd_lowrank(information, q=min(width + 32, vocab_size), niter=4)
    vectors = torch.zeros(vocab_size, width)
    kept = min(width, len(s))
    vectors[:, :kept] = (u * s.sqrt())[:, :kept]
    return vectors


def all_batches(args: PretrainArguments, stream: np.ndarray) -> list[tuple[int, np.ndarray]]:
    """Return, for each step, the length of its sequences and their numbers; a text that is too short is read again.

    Raises:
        InputError: the text has fewer tokens than a batch.
    """
    rng = np.random.default_rng(args.seed)
    batches = []
    for length, tokens in ((SHORT, args.sentence_tokens), (args.max_length, args.long_tokens)):
        size, there = max(1, args.batch_tokens // length), len(stream) // (length - 1)
        if there < size:
            raise InputError(
                f"--train_file has {len(stream):,} tokens, and --batch_tokens asks for {args.batch_tokens:,}; give more text, "
                "or less to a batch"
            )
        steps = max(1, round(tokens / (size * length)))
        passes = [rng.permutation(there)[: there // size * size] for _ in range(math.ceil(steps / (there // size)))]
        batches += [(length, rows) for rows in np.concatenate(passes).reshape(-1, size)[:steps]]
    return batches


def sequences(stream: np.ndarray, length: int, rows: np.ndarray, cls: int) -> Tensor:
    """Return the sequences with these numbers, [CLS] and then T - 1 tokens of the stream; (B, T)."""
    there = len(stream) // (length - 1)
    tokens = stream[: there * (length - 1)].reshape(there, length - 1)[rows]
    return torch.from_numpy(np.pad(tokens, ((0, 0), (1, 0)), constant_values=cls).astype(np.int64))


def masked_lm_loss(model: BertForMaskedLM, tokenizer: BertTokenizer, input_ids: Tensor) -> Tensor:
    """Return this rank's part of the mean cross-entropy of the masked tokens of a whole batch, (B, T) ids.

    Every rank masks the whole batch and encodes its own rows, so the draws do not depend on the number of ranks. The mean of
    the parts over the ranks is the loss. Only masked tokens get logits, (M, V).
    """
    masked, labels = (ids.view_as(input_ids) for ids in mask_tokens(input_ids.flatten(), tokenizer, MASKED))
    share = get_world_size() / labels.ne(-100).sum()
    masked, labels = own_rows(masked), own_rows(labels)
    chosen = labels.ne(-100)
    with torch.autocast(input_ids.device.type, torch.bfloat16):
        states = model.bert(input_ids=masked).last_hidden_state[chosen]  # (M, D)
        logits = model.cls(states)
    return F.cross_entropy(logits.float(), labels[chosen], reduction="sum") * share
