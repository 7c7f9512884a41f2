"""recipes/pretrain_encoder.py on a few sentences: both objectives, the saved files, and a stopped run that is resumed."""

import contextlib
import json
import random
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import error_of, tiny_encoder
from safetensors.torch import load_file
from test_distributed import launch
from test_recipes import load_recipe
from torch.nn import functional as F
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForMaskedLM
from worker import WORDS

from hf_embed import Encoder
from hf_embed.files.disk import DiskError
from hf_embed.kit import masked_lm, pretraining
from hf_embed.kit.distill import two_stages
from hf_embed.kit.plan import LANGUAGE_MODEL, QUICKSTART
from hf_embed.kit.pretraining import PretrainArguments
from hf_embed.training.mlm import mask_tokens

SMALL = ["--vocab_size", 500, "--hidden_size", 24, "--num_layers", 1, "--num_heads", 2, "--max_length", 64,
         "--sentence_tokens", 600, "--long_tokens", 300, "--batch_tokens", 256]  # fmt: skip
TEACHER = ["--teacher", QUICKSTART / "encoder", "--teacher_layer", 1]
BOTH = pytest.mark.parametrize("objective", [["--objective", "mlm"], TEACHER], ids=["mlm", "distill"])


@pytest.fixture
def train(tmp_path, monkeypatch):
    things = ["cat", "dog", "old man", "train", "small bird"]
    lines = [f"the {things[i % 5]} number {i} sleeps on a warm stone, and so does number {i}" for i in range(120)]
    (tmp_path / "sentences.txt").write_text("\n".join(lines))
    recipe = load_recipe("pretrain_encoder")

    def run(folder: Path, *more) -> None:
        words = ["--train_file", tmp_path / "sentences.txt", "--output_dir", folder]
        monkeypatch.setattr("sys.argv", ["pretrain_encoder.py", *map(str, [*words, *SMALL, *more])])
        recipe.main()

    return run


@BOTH
def test_an_encoder_is_saved_as_a_whole(train, objective, tmp_path):
    folder = tmp_path / "new" / "encoder"
    train(folder, *objective)
    about = json.loads((folder / "training.json").read_text())
    assert about["hidden_size"] == 24 and about["loss"] > 0 and about["tokens"] > 0
    assert Encoder.from_pretrained(str(folder)).encode(["a cat"]).shape == (1, 24)
    train(folder, *objective, "--hidden_size", 12)  # replaces the earlier encoder
    assert Encoder.from_pretrained(str(folder)).encode(["a cat"]).shape == (1, 12)
    (folder / "notes.txt").touch()
    assert "holds notes.txt" in error_of(train, folder, *objective)
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]


def test_a_full_disk_keeps_the_earlier_encoder(train, small_disk):
    folder = small_disk("size=900k") / "encoder"
    train(folder, *TEACHER)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(DiskError, match=r"the disk is full \(at "):
        train(folder, *TEACHER, "--hidden_size", 120)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    small_disk("size=16m")
    train(folder, *TEACHER, "--hidden_size", 120)
    assert json.loads((folder / "training.json").read_text())["hidden_size"] == 120


@BOTH
def test_a_stopped_run_goes_on_exactly(train, objective, tmp_path, monkeypatch, capsys):
    train(tmp_path / "calm", *objective)
    monkeypatch.setattr(pretraining, "SAVE_STEPS", 1)
    clip, steps = torch.nn.utils.clip_grad_norm_, []

    def stop_in_third_step(*args):
        steps.append(clip(*args))
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop_in_third_step)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", *objective)
    assert not (tmp_path / "stopped").exists()
    other = error_of(train, tmp_path / "stopped", *objective, "--learning_rate", 0.001)
    assert "stopped.work belongs to a run with another model or other texts or settings" in other
    text = (tmp_path / "sentences.txt").read_text()
    (tmp_path / "sentences.txt").write_text(text.replace("number 7 ", "number 8 "))  # other sentences in the same file
    assert "belongs to a run with another model or other texts" in error_of(train, tmp_path / "stopped", *objective)
    (tmp_path / "sentences.txt").write_text(text)
    capsys.readouterr()
    train(tmp_path / "stopped", *objective)
    assert "resuming at step 2 of " in capsys.readouterr().out
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("calm", "stopped")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not list(tmp_path.glob("*.work"))


def test_a_damaged_checkpoint_is_refused(train, tmp_path, monkeypatch):
    monkeypatch.setattr(masked_lm, "save", lambda *args: 1 / 0)  # fails after the last step
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "out", "--objective", "mlm")
    checkpoint = tmp_path / "out.work" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert "checkpoint.pt cannot be read" in error_of(train, tmp_path / "out", "--objective", "mlm")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--objective distill needs a teacher"),
        ([*TEACHER, "--hidden_size", 500, "--num_heads", 1], "--hidden_size is 500, but it can be at most 1"),
        ([*TEACHER, "--vocab_size", 10], "--vocab_size is 10, but the letters of this text alone need"),
        ([*TEACHER, "--max_length", 600], "--max_length is 600, but the teacher has 512 positions; give a smaller"),
        ([*TEACHER[:2], "--teacher_layer", 40], "--teacher_layer is 40, but the teacher has 4 layers"),
        ([*TEACHER, "--train_file", "{one}", "--hidden_size", 2], "one.txt has 1 sentence(s), too few to train on"),
        (["--teacher", "{none}/model"], "none/model' cannot be loaded: this folder does not exist"),
        (["--teacher", "{qwen}"], "the teacher must be a BERT with a WordPiece tokenizer; give another model"),
        (["--objective", "mlm", *TEACHER], "--objective mlm uses no teacher"),
        (["--objective", "mlm", "--teacher_layer", 3], "--objective mlm uses no teacher; remove --teacher_layer"),
        (["--objective", "mlm", "--vocab_size", 10], "--vocab_size is 10, but the letters of this text alone need"),
        (["--objective", "mlm", "--batch_tokens", 10**6], "give more text, or a smaller --batch_tokens"),
        (["--objective", "mlm", "--max_length", 2], "max_length is 2; it must be at least 64 and whole"),
    ],
)
def test_flags_that_do_not_fit(train, tmp_path, words, message):
    (tmp_path / "one.txt").write_text("a single sentence\n")
    if "{qwen}" in words:
        tiny_encoder("qwen3").save_pretrained(tmp_path / "qwen", verify=False)
    words = [str(word).format(one=tmp_path / "one.txt", none=tmp_path / "none", qwen=tmp_path / "qwen") for word in words]
    assert message in error_of(train, tmp_path / "out", *words)
    assert not list(tmp_path.glob("out*"))  # so the corrected command can run


@pytest.mark.parametrize("sentences", [40, 4000])
def test_a_short_file_has_both_stages(sentences):
    """Of a file with fewer tokens than the two stages ask for, each stage gets its share."""
    args = PretrainArguments("in", "out", teacher="t", sentence_tokens=6000, long_tokens=3000, max_length=64)
    batches = two_stages(args, [[7] * 10] * sentences, random.Random(0))
    short, long = (sum(len(ids) for batch in batches for ids in batch if (len(ids) > 10) == is_long) for is_long in (0, 1))
    assert short == pytest.approx(min(6000, sentences * 10 * 2 / 3), abs=20) and long > short / 4


@pytest.mark.slow
def test_a_language_model_is_better_than_word_frequencies(train, tmp_path):
    """The loss falls below the loss of a model that knows only the frequencies of the word pieces and ignores the context."""
    folder = tmp_path / "out"
    train(folder, "--objective", "mlm", "--sentence_tokens", 120_000, "--hidden_size", 48, "--learning_rate", 0.01)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pieces = tokenizer((tmp_path / "sentences.txt").read_text().splitlines(), add_special_tokens=False)["input_ids"]
    shares = np.unique(sum(pieces, []), return_counts=True)[1] / len(sum(pieces, []))
    frequencies = -(shares * np.log(shares)).sum()
    assert json.loads((folder / "training.json").read_text())["loss"] < 0.8 * frequencies
    assert BertForMaskedLM.from_pretrained(folder).config.hidden_dropout_prob == 0.1  # for the fine-tuning that follows


def test_ranks_share_a_batch(monkeypatch):
    """The mean of the ranks' parts is the loss of the whole batch, even if the parts have different numbers of masked tokens.

    The same holds for the gradients.
    """
    monkeypatch.setattr(torch, "autocast", lambda *args: contextlib.nullcontext())  # bfloat16 would round each part by itself
    texts = [f"{word} is a word that someone may know" for word in WORDS]
    tokenizer = masked_lm.train_tokenizer(texts, 200, 64)
    args = pretraining.PretrainArguments("f", "o", "mlm", hidden_size=24, num_layers=1, num_heads=2, max_length=64)
    model = BertForMaskedLM(args.bert_config(len(tokenizer))).double().eval()
    input_ids = masked_lm.sequences(masked_lm.token_stream(tokenizer, texts), 16, np.arange(7), tokenizer.cls_token_id)

    def loss_and_gradient(rank: int, ranks: int) -> tuple[float, torch.Tensor]:
        monkeypatch.setattr(pretraining, "get_rank", lambda: rank)
        for module in (pretraining, masked_lm):
            monkeypatch.setattr(module, "get_world_size", lambda: ranks)
        torch.manual_seed(1)
        model.zero_grad()
        loss = masked_lm.masked_lm_loss(model, tokenizer, input_ids)
        loss.backward()
        return loss.item(), model.bert.embeddings.word_embeddings.weight.grad.clone()

    whole, gradient = loss_and_gradient(0, 1)
    for ranks in (2, 3):
        losses, gradients = zip(*(loss_and_gradient(rank, ranks) for rank in range(ranks)))
        assert np.mean(losses) == pytest.approx(whole, rel=1e-6)  # the loss is in float32
        assert (sum(gradients) / ranks - gradient).norm() < 1e-6 * gradient.norm()
    monkeypatch.setattr(masked_lm, "own_rows", lambda rows: rows[1:])  # negative control: one row is on no rank
    assert abs(loss_and_gradient(0, 1)[0] - whole) > 1e-3 * whole


@pytest.mark.slow
@BOTH
def test_two_processes(train, objective, tmp_path):
    """A real run on two processes ends with the same loss as a run on one process, and saves one complete encoder."""
    words = ["--train_file", tmp_path / "sentences.txt", *SMALL, *objective, "--output_dir"]
    train(tmp_path / "alone", *objective)
    recipe = Path(__file__).parents[1] / "recipes" / "pretrain_encoder.py"
    done = subprocess.run(launch(2, recipe, *words, tmp_path / "both"), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("saved to ") == 1 and not list(tmp_path.glob("*.work"))
    alone, both = (json.loads((tmp_path / name / "training.json").read_text()) for name in ("alone", "both"))
    assert alone["tokens"] == both["tokens"] and both["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    assert Encoder.from_pretrained(str(tmp_path / "both")).encode(["a cat"]).shape == (1, 24)
    if objective == TEACHER:  # the last batch may have one text, so that the second process has none
        few = launch(2, recipe, *words, tmp_path / "few", "--batch_tokens", 20)
        assert subprocess.run(few, capture_output=True, timeout=300).returncode == 0
        return
    few = launch(2, recipe, *words, tmp_path / "few", "--batch_tokens", 64)
    done = subprocess.run(few, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "2 processes cannot share a batch of 1 texts; give a larger --batch_tokens" in done.stderr


def test_sequences_are_packed_and_begin_with_cls(monkeypatch):
    stream = np.array([5, 6, 3, 7, 3, 8, 9, 10, 3, 11], dtype=np.int32)  # 3 is [SEP]; the last sentence is cut off
    monkeypatch.setattr(masked_lm, "SHORT", 4)
    monkeypatch.setattr(pretraining, "SHORT", 4)
    assert masked_lm.sequences(stream, 4, np.array([2, 0]), cls=2).tolist() == [[2, 9, 10, 3], [2, 5, 6, 3]]
    args = pretraining.PretrainArguments("f", "o", "mlm", max_length=4, batch_tokens=8, sentence_tokens=40, long_tokens=8)
    batches = masked_lm.all_batches(args, stream)
    assert [(length, len(rows)) for length, rows in batches] == [(4, 2)] * 6  # 5 of these are short: the text is read again
    assert all(0 <= row < 3 for _, rows in batches for row in rows) and len({tuple(rows) for _, rows in batches}) > 1
    args.max_length = 8
    mixed = [length for length, _ in masked_lm.all_batches(args, np.tile(stream, 50))]
    assert sorted(mixed) == [4] * 5 + [8] and mixed[-1] == 4  # the last one is not a long one


def test_the_word_table_starts_from_mutual_information():
    """With as many dimensions as pieces, the vectors reproduce the shifted positive mutual information.

    The text is so small that plain loops can count the neighbors.
    """
    sep, words = 0, [[1, 1, 2], [3, 4], [3, 4, 3], [2, 1]] * 5 + [[1, 4]]
    stream = np.array([token for sentence in words for token in (*sentence, sep)], dtype=np.int32)
    counts = np.zeros((5, 5))
    for sentence in words:
        text = [*sentence, sep]
        for i, left in enumerate(text):
            for j in range(i + 1, min(i + 6, len(text))):
                counts[left, text[j]] += 1 / (j - i)
                counts[text[j], left] += 1 / (j - i)
    context = counts.sum(0) ** 0.75
    with np.errstate(divide="ignore"):
        information = np.log(counts / (counts.sum(1, keepdims=True) * context / context.sum())) - np.log(2)
    information = np.maximum(information, 0)
    u, s, _ = np.linalg.svd(information)
    vectors = masked_lm.word_vectors(stream, sep, vocab_size=5, width=5).numpy()
    np.testing.assert_allclose(vectors @ vectors.T, u @ np.diag(s) @ u.T, atol=1e-5)
    assert information.any()


def test_the_loss_is_that_of_bert(train, tmp_path):
    """Computing the logits of the masked tokens only gives the same loss as `BertForMaskedLM`, which computes all logits."""
    train(tmp_path / "out", "--objective", "mlm")
    model = BertForMaskedLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    input_ids = torch.randint(5, 40, (8, 16), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    loss = masked_lm.masked_lm_loss(model, tokenizer, input_ids)
    torch.manual_seed(3)
    masked, labels = masked_lm.mask_tokens(input_ids.flatten(), tokenizer, masked_lm.MASKED)
    plain = model(input_ids=masked.view(8, 16), labels=labels.view(8, 16)).loss
    assert loss.item() == pytest.approx(plain.item(), rel=2e-3)  # bfloat16 against float32
    unmasked = F.cross_entropy(model(input_ids=input_ids).logits.flatten(0, 1), input_ids.flatten())
    assert abs(unmasked.item() - plain.item()) > 0.01


# ---- the built-in language model ----


def test_the_built_in_language_model_fills_in_masked_words(caplog):
    """The model predicts masked words of everyday sentences far better than word frequencies do.

    It also loads as an encoder without its head, and without a warning.
    """
    tokenizer, model = AutoTokenizer.from_pretrained(LANGUAGE_MODEL), AutoModelForMaskedLM.from_pretrained(LANGUAGE_MODEL)
    texts = (QUICKSTART / "sentences.txt").read_text(encoding="utf-8").splitlines()[:64]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    ids, labels = mask_tokens(batch["input_ids"].flatten(), tokenizer)
    with torch.inference_mode():
        loss = model(input_ids=ids.view_as(batch["input_ids"]), attention_mask=batch["attention_mask"],
                     labels=labels.view_as(batch["input_ids"])).loss  # fmt: skip
    assert loss < 4.5  # the frequencies of the words alone give about 6.4
    assert model.config.hidden_dropout_prob == 0.1  # for the fine-tuning that follows
    caplog.clear()
    assert Encoder.from_pretrained(str(LANGUAGE_MODEL)).encode(["a cat"]).shape == (1, 192)
    assert not caplog.messages  # transformers does not warn of the head's weights, which an encoder does not use


def test_the_package_stays_small():
    files = [path for path in QUICKSTART.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 40 * 2**20
