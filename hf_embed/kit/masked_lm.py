"""Make a small BERT from a text file alone, by masked language modeling (Devlin et al., 2019, section 3.1).

On a small machine, the loss of such a model stays for a long time at the value for guessing frequent words. It falls sooner if
the word embeddings start from co-occurrence statistics: the leading directions of the shifted positive pointwise mutual
information of words at most `WINDOW` apart (Levy and Goldberg, 2014). The sentences are packed without padding, as in RoBERTa
(Liu et al., 2019):

    [CLS] a man plays a guitar . [SEP] it rained . [SEP] the train to     a sequence; the next one continues the sentence
    [CLS] london was late . [SEP] ...

Most tokens are in short sequences, and the others are in sequences of `--max_length` tokens, so that every position is trained.
Batches of both lengths are mixed. BERT reads the long sequences last; in a short training the learning rate is then too low for
the positions that only they have. Dropout is off during this training. The saved config has BERT's rate of 0.1 for fine-tuning.

Shapes: N tokens of the text, B sequences of T tokens, M masked tokens of a batch, V pieces of the vocabulary, D width of the
model.
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
from transformers import BertForMaskedLM, BertTokenizer, get_linear_schedule_with_warmup

from hf_embed.distributed import get_world_size
from hf_embed.errors import InputError
from hf_embed.kit.pretraining import SHORT, SPECIAL, PretrainArguments, check_shares, own_rows, save, say, train
from hf_embed.training.mlm import mask_tokens

MASKED = 0.2  # share of the tokens; for a small model this trains faster than BERT's 0.15
WINDOW = 5  # largest distance of two tokens that count as neighbors; a pair has the weight 1 / distance
SMOOTHING = 0.75  # exponent of the neighbors' counts (Levy, Goldberg and Dagan, 2015)
SHIFT = math.log(2)  # subtracted from the mutual information
VOCABULARY_SENTENCES = 200_000  # the vocabulary is made from this many sentences
MOST_LETTERS = 500  # in the vocabulary; a word with any other letter is unknown


def pretrain(args: PretrainArguments, sentences: list[str], work: Path) -> None:
    """Make the vocabulary and the word embeddings, train the model, and save it.

    Args:
        args: the flags.
        sentences: the training text, in random order.
        work: the folder for the checkpoint.

    Raises:
        InputError: if the text is too short for a single batch, or if `--vocab_size` is too small for its letters.
    """
    device = PartialState().device
    tokenizer = train_tokenizer(sentences[:VOCABULARY_SENTENCES], args.vocab_size, args.max_length)
    stream = token_stream(tokenizer, sentences)
    torch.manual_seed(args.seed)
    model = BertForMaskedLM(args.bert_config(len(tokenizer)))
    checkpoint = work / "checkpoint.pt"
    if not checkpoint.is_file():
        start_words(model, stream, tokenizer.sep_token_id)
    model.to(device).eval()  # eval: no dropout
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
    """Make an uncased WordPiece tokenizer from sentences. The same sentences always give the same pieces in the same order.

    Raises:
        InputError: if `size` is too small for the letters of the sentences.
    """
    tokenizer = uncased(models.WordPiece(unk_token="[UNK]"))
    counts = Counter(letter for text in sentences for letter in tokenizer.normalizer.normalize_str(text) if letter > " ")
    letters = sorted(letter for letter, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:MOST_LETTERS])
    # The trainer numbers the letters inside words in the order in which it meets them, which changes from run to run. Of two
    # equally frequent pairs, it merges the one with the lower numbers. As special tokens, the letters have a fixed order.
    given = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    if size < len(given):
        raise InputError(f"--vocab_size is {size}, but the letters of this text alone need {len(given)} pieces; give more")
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=given, limit_alphabet=len(letters), show_progress=False)
    tokenizer.train_from_iterator(sentences, trainer)
    pieces = tokenizer.get_vocab()
    made = uncased(models.WordPiece(pieces, unk_token="[UNK]"))  # in `tokenizer`, letters are special tokens
    made.post_processor = processors.BertProcessing(("[SEP]", pieces["[SEP]"]), ("[CLS]", pieces["[CLS]"]))
    return BertTokenizer(tokenizer_object=made, model_max_length=max_length)


def uncased(pieces: models.WordPiece) -> Tokenizer:
    """Make a tokenizer that lowercases the text and splits it into words as BERT does."""
    tokenizer = Tokenizer(pieces)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def token_stream(tokenizer: BertTokenizer, sentences: list[str]) -> np.ndarray:
    """Return the token ids of all sentences, one after another, with [SEP] after each sentence: (N,) int32."""
    parts = []
    for start in range(0, len(sentences), 20_000):
        encoded = tokenizer.backend_tokenizer.encode_batch(sentences[start : start + 20_000], add_special_tokens=False)
        parts.append(np.array([id for text in encoded for id in (*text.ids, tokenizer.sep_token_id)], dtype=np.int32))
    return np.concatenate(parts)


def start_words(model: BertForMaskedLM, stream: np.ndarray, sep: int) -> None:
    """Initialize the word embeddings from co-occurrence statistics. A piece without neighbors keeps its random vector."""
    table = model.bert.embeddings.word_embeddings.weight
    vectors = word_vectors(stream, sep, *table.shape)
    known = vectors.any(1)
    with torch.no_grad():
        table[known] = vectors[known] / vectors[known].std() * 0.04  # about the standard deviation after training


def word_vectors(stream: np.ndarray, sep: int, vocab_size: int, width: int) -> Tensor:
    """Return the vectors (V, D) whose inner products best approximate the mutual information of neighbors.

    Neighbors are tokens of the same sentence, at most `WINDOW` apart.
    """
    sentence = np.cumsum(stream == sep) - (stream == sep)  # (N,); a [SEP] belongs to the sentence before it
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
    """Return, for each step, the length of its sequences and their indices, in random order.

    A text that is too short is read several times.

    Raises:
        InputError: if the text has fewer tokens than one batch.
    """
    rng = np.random.default_rng(args.seed)
    batches = []
    for length, tokens in ((SHORT, args.sentence_tokens), (args.max_length, args.long_tokens)):
        size, there = max(1, args.batch_tokens // length), len(stream) // (length - 1)
        if there < size:
            raise InputError(
                f"--train_file has {len(stream):,} tokens, fewer than one batch of --batch_tokens {args.batch_tokens:,}; give "
                "more text, or a smaller --batch_tokens"
            )
        steps = max(1, round(tokens / (size * length)))
        passes = [rng.permutation(there)[: there // size * size] for _ in range(math.ceil(steps / (there // size)))]
        batches += [(length, rows) for rows in np.concatenate(passes).reshape(-1, size)[:steps]]
    return [batches[i] for i in rng.permutation(len(batches))]


def sequences(stream: np.ndarray, length: int, rows: np.ndarray, cls: int) -> Tensor:
    """Return the sequences with the indices `rows`: [CLS], and then T - 1 tokens of the stream, (B, T)."""
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
