"""Situations from public bug reports of similar projects: hf_embed handles each correctly or refuses it in one line.

The docstring of a test describes the reported bug and names the GitHub thread as "repository #number".
"""

import json
import math
from dataclasses import replace

import numpy as np
import pandas
import pytest
import torch
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model, tokenize_rows
from datasets import Dataset, IterableDataset, load_from_disk
from peft import LoraConfig, get_peft_model
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, TrainerCallback

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, Encoder, ImprovedContrastive, Retrieval, SimCSE, Source
from hf_embed.data.sources import read_file
from hf_embed.data.tokenization import RowTokenizer
from hf_embed.evaluation.sts import STS
from hf_embed.library_internals import CHECKPOINTING
from hf_embed.mining import MiningArguments, write_hard_negatives
from hf_embed.training.inputs import as_tasks
from hf_embed.training.rows import columns_of_texts

WORDS = ["cat", "dog", "rain", "house", "river", "bread", "table", "music", "winter", "garden"]
PAIRS = [{"anchor": f"the {a}", "positive": f"a {a} by the {b}"} for a, b in zip(WORDS, WORDS[1:] + WORDS[:1])]
TEXTS = ["cat", "the river and the garden in winter, and no bread on the table"]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def trainer(folder, model=None, rows=PAIRS, objective=None, tokenizer=None, callbacks=None, eval_dataset=None, **settings):
    defaults = {"per_device_train_batch_size": 4, "max_steps": 1, "report_to": [], "disable_tqdm": True, "use_cpu": True,
                "save_strategy": "no", "learning_rate": 1e-3}  # fmt: skip
    return ContrastiveTrainer(
        model=model or tiny_model(**NO_DROPOUT), processing_class=tokenizer or small_tokenizer(), objective=objective,
        args=ContrastiveTrainingArguments(str(folder), **(defaults | settings)), callbacks=callbacks,
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows, eval_dataset=eval_dataset,
    )  # fmt: skip


def first_batch(run) -> dict:
    return next(iter(run.get_train_dataloader()))


def loss_of(run) -> float:
    """Return the loss of the first batch in training mode."""
    run.model.train()
    return run.compute_loss(run.model, first_batch(run)).item()


def weights(run) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in run.encoder.named_parameters()}


class Gradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- tokens and pooling ----


@pytest.mark.parametrize("pooling", ["cls", "weighted_mean"])
def test_a_tokenizer_that_pads_on_the_left(tmp_path, pooling):
    """With a tokenizer that pads on the left, [CLS] pooling took a padding token (sentence-transformers #3208)."""
    tokenizer = small_tokenizer()
    tokenizer.padding_side = "left"
    encoder = Encoder(tiny_model(), tokenizer, pooling).eval()
    alone = np.stack([encoder.encode(text) for text in TEXTS])
    np.testing.assert_allclose(encoder.encode(TEXTS), alone, atol=1e-5)
    encoder.save_pretrained(tmp_path)
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), alone, atol=1e-5)


def test_padding_and_truncation_in_the_tokenizer_file(tmp_path):
    """A tokenizer.json that pads every text to 128 tokens made mean pooling include the padding (spiceai #13416)."""
    backend = Tokenizer.from_str(small_tokenizer().backend_tokenizer.to_str())
    backend.enable_padding(length=128)
    backend.enable_truncation(max_length=4)
    backend.save(str(tmp_path / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), model_max_length=64, **names)
    encoder = Encoder(tiny_model(), tokenizer, "mean").eval()
    np.testing.assert_allclose(encoder.encode(TEXTS), tiny_encoder().encode(TEXTS), atol=1e-5)
    rows = tokenize_rows(Dataset.from_list(PAIRS), tokenizer, 64)
    expected = tokenize_rows(Dataset.from_list(PAIRS), small_tokenizer(), 64)
    assert rows["input_ids"][:] == expected["input_ids"][:]


def test_the_last_token_of_a_cut_text_is_the_closing_one():
    """Truncation of a long text also removed its end-of-text token, which is the token that is pooled (mteb #3217)."""
    encoder = tiny_encoder("qwen3", "last", max_length=8)
    closing = encoder.tokenizer.sep_token_id
    trained = RowTokenizer(encoder.tokenizer, 8)([[TEXTS[1], TEXTS[1]]])["input_ids"][0][0]
    assert len(trained) == 8 and trained[-1] == closing and trained[-2] != closing
    with torch.no_grad():
        expected = encoder.backbone(torch.tensor([trained])).last_hidden_state[0, -1]
    np.testing.assert_allclose(encoder.encode(TEXTS)[1], expected, atol=1e-5)


def test_an_end_token_that_transformers_no_longer_adds(tmp_path):
    """Since transformers 5, `add_eos_token` in tokenizer_config.json has no effect, so a word was pooled (mteb #5237)."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3} | {letter: 4 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    encoder = Encoder(tiny_model("qwen3"), LlamaTokenizer(vocab=vocab, merges=[], add_bos_token=True), "last").eval()
    encoder.save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).tokenizer("cat")["input_ids"] == [1, 3, 6, 4, 23]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"add_eos_token": True}))
    assert "tokenizer_config.json asks for add_eos_token" in error_of(Encoder.from_pretrained, tmp_path)
    mended = AutoTokenizer.from_pretrained(tmp_path, add_bos_token=True, add_eos_token=True)  # as the message advises
    mended.save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).tokenizer("cat")["input_ids"] == [1, 3, 6, 4, 23, 2]


def test_an_empty_text_has_a_vector_or_is_refused():
    """The embedding of an empty text was NaN, and so was the score of the whole evaluation set (mteb #1043)."""
    encoder = tiny_encoder()
    vector = encoder.encode(["", TEXTS[1]])[0]
    with torch.no_grad():
        ids = torch.tensor([[encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id]])
        expected = encoder.backbone(ids).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(vector, expected, atol=1e-5)
    encoder.tokenizer.backend_tokenizer.post_processor = None  # now the tokenizer adds no special tokens
    assert "no token" in error_of(encoder.encode, [TEXTS[0], ""])


def test_a_text_that_is_no_text_is_named():
    """A missing cell of a table is a float, which caused a TypeError deep inside (sentence-transformers #429, #1350)."""
    encoder = tiny_encoder()
    for cell, kind in ((float("nan"), "nan"), (None, "None"), (7, "7"), (["a", "b"], "['a', 'b']")):
        message = error_of(encoder.encode, [*TEXTS, cell])
        assert "text 3" in message and kind in message


def test_texts_come_in_any_sequence():
    """NumPy arrays and dataset columns of texts were not recognized as texts (sentence-transformers #3721)."""
    encoder = tiny_encoder()
    expected = encoder.encode(TEXTS)
    for texts in (np.array(TEXTS), pandas.Series(TEXTS, index=[9, 1]), Dataset.from_dict({"t": TEXTS})["t"], tuple(TEXTS)):
        np.testing.assert_array_equal(encoder.encode(texts), expected)


def test_bfloat16_vectors_reach_numpy():
    """A bfloat16 model failed in the evaluation, because NumPy has no such type (mteb #1297)."""
    encoder = Encoder(tiny_model().bfloat16(), small_tokenizer(), "mean").eval()
    vectors = encoder.encode(TEXTS)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, tiny_encoder().encode(TEXTS), atol=0.05 * np.abs(vectors).max())
    search = Retrieval({"q": "the cat"}, {"a": "a cat", "b": "bread", "c": "rain"}, {"q": {"a": 1}})
    assert 0 < search.score(lambda texts, prompt=None: encoder.encode(texts, convert_to_tensor=True))["ndcg@10"] <= 100


def test_dropout_is_off_in_encode():
    """Loading an adapter left the model in training mode, so each call gave other embeddings (transformers #34469)."""
    encoder = Encoder(tiny_model().train(), small_tokenizer(), "mean")
    encoder.train()
    vectors = encoder.encode(TEXTS)
    np.testing.assert_array_equal(vectors, encoder.encode(TEXTS))
    np.testing.assert_allclose(vectors, tiny_encoder().encode(TEXTS), atol=1e-5)
    assert encoder.training  # the mode is still that from before the call


# ---- data ----


def test_columns_count_by_name(tmp_path):
    """Columns were identified by their order, so (positive, anchor) was trained in reverse (sentence-transformers #2791)."""
    swapped = [{"positive": row["positive"], "anchor": row["anchor"]} for row in PAIRS]
    batches = [first_batch(trainer(tmp_path, rows=rows)) for rows in (PAIRS, swapped)]
    assert torch.equal(batches[0]["text_ids"], batches[1]["text_ids"])
    assert torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert not (batches[0]["text_ids"][:, 0] == batches[0]["text_ids"][:, 1]).any()  # otherwise a swap would go unnoticed


@pytest.mark.parametrize("form", ["numpy", "pandas", "arrow", "torch"])
def test_a_format_is_a_view_of_the_rows(form):
    """The trainer lost or misread what `set_format` and `set_transform` change in a dataset (transformers #10178)."""
    rows = Dataset.from_list([row | {"negative": ["no rain", "no music"]} for row in PAIRS])

    def tokens(rows):
        return tokenize_rows(rows, small_tokenizer(), 64)["input_ids"][:]

    whole = tokens(rows)
    assert tokens(rows.with_format(form)) == whole
    assert tokens(rows.with_format(form, columns=["anchor", "positive"])) == [row[:2] for row in whole]
    stream = Source("stream", rows.to_iterable_dataset().with_format(form), negatives=2, size=10)
    assert next(iter(stream.rows)) == rows[0]
    # A transform is not only a view: it computes the rows that are trained on.
    swapped = rows.with_transform(lambda batch: {"anchor": batch["positive"], "positive": batch["anchor"]})
    assert tokens(swapped) == [[row[1], row[0]] for row in whole]
    # BUG: without the positives, an anchor became its own positive.
    assert tokens(rows.with_format(form, columns=["anchor"], output_all_columns=True)) == whole
    upper = rows.with_transform(lambda batch: {"anchor": list(map(str.upper, batch["anchor"]))}, ["anchor"], True)
    assert tokens(upper) == whole
    # BUG: evaluation sets, and rows to embed, kept their format.
    graded = Dataset.from_dict({"sentence1": rows["anchor"][:], "sentence2": rows["positive"][:], "score": range(len(rows))})
    assert columns_of_texts(rows.with_format(form, columns=["anchor", "positive"]), "rows")[0] == rows["anchor"][:]
    assert columns_of_texts(swapped, "rows")[1] == rows["anchor"][:]
    assert as_tasks(graded.with_format(form))["sts"].rows[:] == graded[:]


def test_rows_that_are_no_dataset_are_refused(tmp_path):
    """A list, a table or another kind of dataset ended in "no attribute 'column_names'" (sentence-transformers #3082)."""
    for rows in (tuple(PAIRS), torch.utils.data.ConcatDataset([PAIRS])):  # test_trainer_inputs.py has what is accepted
        assert f"a {type(rows).__name__} cannot be used as rows" in error_of(Source, "mine", rows)
        assert f"a {type(rows).__name__} cannot be used as rows" in error_of(trainer, tmp_path, rows=rows)
    assert Source("mine", pandas.DataFrame(PAIRS)).rows.to_list() == PAIRS


def test_words_that_look_like_missing_values_are_texts(tmp_path):
    """The texts "null", "NA" and "None" in a CSV file were read as missing values (datasets #4467)."""
    words = ["null", "NA", "None", "nan", "N/A", "-inf", "007", "1e5"]
    (tmp_path / "words.csv").write_text("anchor,positive\n" + "".join(f"{word},the {word}\n" for word in words))
    (tmp_path / "words.tsv").write_text("anchor\tpositive\n" + "".join(f"{word}\tthe {word}\n" for word in words))
    for name in ("words.csv", "words.tsv"):
        rows = read_file(str(tmp_path / name))
        assert rows["anchor"][:] == words and rows["positive"][:] == [f"the {word}" for word in words]


def test_tokens_are_not_taken_from_another_tokenizer(tmp_path):
    """The cached token ids of one tokenizer were used for another tokenizer (axolotl #885)."""
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "rows")
    tokenizer, other = small_tokenizer(), small_tokenizer()
    other.add_tokens(["the cat"], special_tokens=True)
    first = tokenize_rows(load_from_disk(tmp_path / "rows"), tokenizer, 16)
    second = tokenize_rows(load_from_disk(tmp_path / "rows"), other, 16)
    shorter = tokenize_rows(load_from_disk(tmp_path / "rows"), tokenizer, 4)
    new = other.convert_tokens_to_ids("the cat")
    assert any(new in text for row in second["input_ids"][:] for text in row)
    assert not any(new in text for row in first["input_ids"][:] for text in row)
    assert max(len(text) for row in shorter["input_ids"][:] for text in row) == 4


def test_every_negative_counts_once(tmp_path):
    """In rows with few negatives, negatives were repeated. In rows with many, some were not used (FlagEmbedding #970, #958)."""
    negatives = [["no rain", "no bread", "no music"], ["no table"]]
    rows = [PAIRS[i] | {"negative": negatives[i]} for i in range(2)]
    run = trainer(tmp_path, tiny_model(**NO_DROPOUT).double(), rows, SimCSE(0.1), per_device_train_batch_size=2)
    texts = [row["positive"] for row in rows] + [text for some in negatives for text in some]
    unit = {text: F.normalize(torch.tensor(run.encoder.encode(text)), dim=0) for text in texts + [r["anchor"] for r in rows]}
    logits = torch.stack([torch.stack([unit[row["anchor"]] @ unit[text] for text in texts]) for row in rows]) / 0.1
    assert loss_of(run) == pytest.approx(F.cross_entropy(logits, torch.arange(2)).item(), rel=1e-5)


@pytest.mark.parametrize("batch", [1, 4])
def test_a_row_without_another_row_is_not_trained_on(tmp_path, batch):
    """One row per device has no negatives, so the loss was 0.0 and nothing was trained (sentence-transformers #3242)."""
    if batch == 1:
        message = error_of(trainer, tmp_path, per_device_train_batch_size=1)
        assert "per_device_train_batch_size is 1" in message
    else:  # 5 rows: the last batch would have one row
        loader = trainer(tmp_path, rows=PAIRS[:5]).get_train_dataloader()
        assert [len(batch["text_ids"]) for batch in loader] == [4] and len(loader) == 1


def test_every_epoch_has_other_batches(tmp_path):
    """Every epoch had the same batches in the same order (sentence-transformers #3069)."""
    loader = trainer(tmp_path, rows=PAIRS[:8]).get_train_dataloader()
    epochs = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        epochs.append([sorted(batch["text_ids"][:, 0].tolist()) for batch in loader])
    assert all(sorted(sum(batches, [])) == sorted(sum(epochs[0], [])) for batches in epochs)  # each row occurs once
    assert all(len(set(sum(batches, []))) == 8 for batches in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_a_stream_is_not_repeated_by_every_worker(tmp_path):
    """Each dataloader worker read the whole stream, so every row was used several times (datasets #3423)."""

    def stream():
        yield from PAIRS[:8]

    seen = []
    for workers in (0, 2):
        run = trainer(tmp_path, rows=IterableDataset.from_generator(stream), max_steps=2, dataloader_num_workers=workers)
        seen.append([text for batch in run.get_train_dataloader() for text in batch["text_ids"][:, 0].tolist()])
    assert seen[0] == seen[1] and len(seen[0]) == len(set(seen[0])) == 8


# ---- the loss ----


def grid(rows: int, views: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(3)
    return torch.randn(rows, views, 8, dtype=torch.float64), torch.arange(1, rows * views + 1).view(rows, views)


@pytest.mark.parametrize("objective", [SimCSE(0.1), ImprovedContrastive(0.1)], ids=["simcse", "gte"])
def test_the_second_rank_finds_its_own_positives(objective):
    """With gathered hard negatives, the labels on other ranks pointed at hard negatives (sentence-transformers #3453)."""
    embeddings, ids = grid(6, 4)
    whole = objective(embeddings, ids)
    shares = [objective(embeddings[i : i + 2], ids[i : i + 2], embeddings, ids, i) for i in (0, 2, 4)]
    assert sum(shares).item() / 3 == pytest.approx(whole.item(), rel=1e-12)
    perfect = F.normalize(torch.eye(24, dtype=torch.float64), dim=-1).view(6, 4, 24)
    perfect[:, 1] = perfect[:, 0]  # every positive equals its anchor, and all other texts are orthogonal
    best = objective(perfect[4:], ids[4:], perfect, ids, 4).item()
    worst = objective(perfect[4:, [0, 2, 1, 3]], ids[4:], perfect[:, [0, 2, 1, 3]], ids, 4).item()
    assert best == pytest.approx(math.log(2) if isinstance(objective, ImprovedContrastive) else 0, abs=5e-3) and worst > 5


@pytest.mark.parametrize("objective", [SimCSE(0.1), ImprovedContrastive(0.1, directions=("query_to_doc",))])
def test_what_is_masked_on_the_second_rank_is_not_the_positive(objective):
    """The mask of false negatives had no offset on later ranks, so it masked their positives and the loss was infinite
    (sentence-transformers #3817)."""
    embeddings, ids = grid(4, 2)
    ids[0, 1] = ids[2, 1]  # row 0 on rank 0 has the same positive as row 2 on rank 1
    embeddings[0, 1] = embeddings[2, 1]
    loss = objective(embeddings[2:], ids[2:], embeddings, ids, 2)
    unit = F.normalize(embeddings, dim=-1)
    logits = unit[2:, 0] @ unit[:, 1].T / 0.1
    logits[0, 0] = -math.inf
    assert loss.item() == pytest.approx(F.cross_entropy(logits, torch.tensor([2, 3])).item(), rel=1e-12)


def test_a_learned_temperature_has_a_gradient_beside_absent_negatives():
    """Masking absent negatives with -inf made the gradient of a learned temperature NaN (NVIDIA-NeMo/Automodel #3850)."""
    embeddings, ids = grid(4, 4)
    ids[1:, 2:] = 0  # rows with fewer negatives
    objective = ImprovedContrastive(learn_temperature=True)
    temperature = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    objective(embeddings, ids, temperature=temperature).backward()

    def at(value):
        return objective(embeddings, ids, temperature=torch.tensor(value, dtype=torch.float64)).item()

    assert temperature.grad.item() == pytest.approx((at(0.1 + 1e-6) - at(0.1 - 1e-6)) / 2e-6, rel=1e-6)


def test_cached_gradients_are_of_the_same_dropout(tmp_path):
    """The second forward pass of gradient caching used other dropout masks than the first pass (luyug/GC-DPR #12)."""
    seen = []
    for caching, seed in ((False, 42), (True, 42), (True, 43)):
        watch = Gradients()
        trainer(tmp_path, tiny_model().double(), objective=SimCSE(0.1), callbacks=[watch], gradient_caching=caching, seed=seed,
                data_seed=1, chunk_tokens=16, max_grad_norm=0).train()  # fmt: skip
        seen.append(watch.seen)
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])
    assert not all(torch.equal(seen[0][name], seen[2][name]) for name in seen[0])  # control: dropout is on


def test_checkpointed_layers_train_the_same_adapters(tmp_path):
    """With LoRA, gradient checkpointing left the adapters without gradients (transformers #26221)."""
    seen = []
    for checkpointing in (False, True):
        watch = Gradients()
        torch.manual_seed(0)
        model = get_peft_model(tiny_model(**NO_DROPOUT), LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
        trainer(tmp_path, model, callbacks=[watch], max_grad_norm=0, **{CHECKPOINTING: checkpointing}).train()
        seen.append(watch.seen)
    assert len(seen[0]) == 12 and all(gradient.abs().max() > 0 for gradient in seen[0].values())
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0])


def test_stored_prompts_are_trained_with(tmp_path):
    """Prompts stored in the model folder were used for encoding but not for training (sentence-transformers #3394)."""
    encoder = tiny_encoder(prompts={"query": "find: ", "document": "text: "})
    encoder.save_pretrained(tmp_path / "model")
    run = trainer(tmp_path / "out", Encoder.from_pretrained(tmp_path / "model"))
    batch = first_batch(run)
    texts = [run.encoder.tokenizer.decode(ids[1:-1]) for ids in batch["input_ids"].split(batch["lengths"])]
    assert all(text.startswith(("find", "text")) for text in texts)
    assert sum(text.startswith("find") for text in texts) == sum(text.startswith("text") for text in texts) == 4


# ---- checkpoints ----


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_goes_on_in_its_epoch(tmp_path, adapters):
    """A run that was resumed in a later epoch used the row order of the first epoch again (transformers #40691). A run with
    adapters did not resume at all (sentence-transformers #3402)."""
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}  # 2 steps per epoch: step 3 is in the second epoch

    def run(folder, checkpoint=None):
        model = tiny_model()
        if adapters:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(target_modules=["query"]))
        trained = trainer(folder, model, PAIRS[:8], **settings)
        trained.train(resume_from_checkpoint=checkpoint)
        return weights(trained)

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())


def test_two_sets_choose_the_best_model_without_a_name(tmp_path):
    """load_best_model_at_end with two evaluation sets ended in KeyError: 'eval_loss' (sentence-transformers #2749)."""
    pairs = [{"sentence1": f"the {a}", "sentence2": f"a {b}", "score": i} for i, (a, b) in enumerate(zip(WORDS, WORDS[::-1]))]
    sets = {"one": Dataset.from_list(pairs[:5]), "two": Dataset.from_list(pairs[5:])}
    run = trainer(tmp_path, eval_dataset=sets, max_steps=3, learning_rate=1e-2, load_best_model_at_end=True,
                  eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)  # fmt: skip
    run.train()
    means = [log["eval_spearman"] for log in run.state.log_history if "eval_spearman" in log]
    assert len(means) == 3 and run.state.best_metric == max(means)
    best = Encoder.from_pretrained(tmp_path / f"checkpoint-{1 + means.index(max(means))}")
    np.testing.assert_allclose(run.encoder.encode(TEXTS), best.encode(TEXTS), atol=1e-6)


def test_weights_that_are_not_contiguous_are_saved(tmp_path):
    """After the training, weights that are not contiguous in memory could not be saved (safetensors #469)."""
    model = tiny_model()
    for layer in model.encoder.layer:
        dense = layer.intermediate.dense
        dense.weight = torch.nn.Parameter(dense.weight.detach().t().contiguous().t())
    run = trainer(tmp_path, model, save_strategy="steps", save_steps=1)
    run.train()
    run.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        np.testing.assert_allclose(Encoder.from_pretrained(folder).encode(TEXTS), run.encoder.encode(TEXTS), atol=1e-6)


def test_merged_adapters_of_a_half_precision_model(tmp_path):
    """A bfloat16 model with a merged adapter gave other embeddings than with a separate one (McGill-NLP/llm2vec #128)."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(**NO_DROPOUT).bfloat16(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    run = trainer(tmp_path, model, learning_rate=1e-2)
    run.train()
    run.save_model()
    query = run.encoder.base.encoder.layer[0].attention.self.query
    exact = query.base_layer.weight.float() + query.get_delta_weight("default").float()
    saved = AutoModel.from_pretrained(tmp_path).encoder.layer[0].attention.self.query.weight
    assert torch.allclose(saved.float(), exact, rtol=2**-7)  # bfloat16 has 8 significant bits
    vectors, merged = run.encoder.encode(TEXTS), Encoder.from_pretrained(tmp_path).encode(TEXTS)
    assert np.linalg.norm(vectors - merged, axis=1).max() < 0.02 * np.linalg.norm(vectors, axis=1).min()


@pytest.mark.parametrize("how", ["modules_to_save", "trainable_token_indices"])
def test_new_tokens_trained_beside_adapters(tmp_path, how):
    """New tokens that were trained with LoRA and merged were missing from the saved model (transformers #45127)."""
    tokenizer, model = small_tokenizer(), tiny_model(**NO_DROPOUT)
    tokenizer.add_tokens(["zzqx"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer))
    new = (
        {"modules_to_save": ["word_embeddings"]}
        if how == "modules_to_save"
        else {how: {"word_embeddings": [len(tokenizer) - 1]}}
    )
    rows = [row | {"anchor": f"zzqx {row['anchor']}"} for row in PAIRS]
    run = trainer(tmp_path, get_peft_model(model, LoraConfig(target_modules=["query"], **new)), rows, tokenizer=tokenizer,
                  learning_rate=0.1)  # fmt: skip
    before = run.encoder.encode("zzqx")
    run.train()
    run.save_model()
    saved = Encoder.from_pretrained(tmp_path)
    assert saved.tokenizer("zzqx")["input_ids"][1:-1] == [len(tokenizer) - 1]
    assert saved.base.get_input_embeddings().num_embeddings == len(tokenizer)
    np.testing.assert_allclose(saved.encode("zzqx"), run.encoder.encode("zzqx"), atol=1e-5)
    assert np.abs(saved.encode("zzqx") - before).max() > 0.01


def test_a_head_for_training_only_is_in_no_loader(tmp_path):
    """A model lost twenty points because it was evaluated with its training-only head (princeton-nlp/SimCSE #264, #25)."""
    run = trainer(tmp_path, pooling="cls_mlp_train", max_steps=2, learning_rate=1e-2)
    run.train()
    run.save_model()
    model = AutoModel.from_pretrained(tmp_path).eval()
    tokens = small_tokenizer()(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        plain = model(**tokens).last_hidden_state[:, 0].numpy()
    for loaded in (run.encoder, Encoder.from_pretrained(tmp_path), SentenceTransformer(str(tmp_path), device="cpu")):
        np.testing.assert_allclose(loaded.encode(TEXTS), plain, atol=1e-5)


def test_pooling_without_the_prompt_is_refused(tmp_path):
    """Pooling without the prompt counted the prompt's tokens from the padding on (sentence-transformers #3598)."""
    tiny_encoder(prompts={"query": "find: "}).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(config | {"include_prompt": False}))
    assert "include_prompt" in error_of(Encoder.from_pretrained, tmp_path)


# ---- evaluation and mining ----


def embed_as(vectors: dict[str, list[float]]):
    return lambda texts, prompt_name=None: torch.tensor([vectors[text] for text in texts], dtype=torch.float32)


def test_documents_with_equal_scores(caplog):
    """If a scorer gave all documents the same score, the MRR was 1.0, because the answer came first (mteb #5092)."""
    same = embed_as({"query": [1.0, 1.0], "one": [1.0, 1.0], "two": [1.0, 1.0]})
    for corpus in ({"a": "one", "b": "two"}, {"b": "two", "a": "one"}):
        scores = Retrieval({"q": "query"}, corpus, {"q": {"a": 1}}).score(same)
        assert all(math.isnan(score) for score in scores.values())
    assert "all cosines are equal" in caplog.text
    # Two of three scores are equal. The order of the file does not matter: the larger id comes first, as in trec_eval.
    some = embed_as({"query": [1.0, 0.0], "one": [1.0, 1.0], "two": [1.0, 1.0], "far": [0.0, 1.0]})
    for corpus in ({"a": "one", "b": "two", "c": "far"}, {"c": "far", "b": "two", "a": "one"}):
        assert Retrieval({"q": "query"}, corpus, {"q": {"a": 1}}).score(some)["mrr@10"] == 50
        assert Retrieval({"q": "query"}, corpus, {"q": {"b": 1}}).score(some)["mrr@10"] == 100


@pytest.mark.parametrize("broken", ["query", "one", "all"])
def test_vectors_that_are_not_numbers_have_no_score(broken):
    """Embeddings with NaN values got an nDCG score, which was sometimes above 1 (mteb #3030)."""
    vectors = {"query": [1.0, 0.0], "one": [1.0, 1.0], "two": [1.0, 0.5], "far": [0.0, 1.0]}
    vectors |= {text: [math.nan, 1.0] for text in (vectors if broken == "all" else [broken])}
    search = Retrieval({"q": "query"}, {"a": "one", "b": "two", "c": "far"}, {"q": {"b": 1}})
    assert all(math.isnan(score) for score in search.score(embed_as(vectors)).values())
    pairs = [{"sentence1": "query", "sentence2": text, "score": i} for i, text in enumerate(("one", "two", "far"))]
    assert math.isnan(STS(Dataset.from_list(pairs)).score(embed_as(vectors))["spearman"])


def test_ndcg_counts_what_was_not_found():
    """The ideal ranking had only documents that were found, so a missing document cost nothing (OpenBMB/ToolBench #184)."""
    near = {f"d{i}": [1.0, i / 10] for i in range(6)}  # d0 is the nearest, d5 the farthest
    search = Retrieval({"q": "q"}, {name: name for name in near}, {"q": {"d0": 1, "d4": 1, "d5": 1}}, cutoffs=(2,))
    scores = search.score(embed_as(near | {"q": [1.0, 0.0]}))
    assert scores["ndcg@2"] == pytest.approx(100 / (1 + 1 / math.log2(3)))
    assert scores["recall@2"] == pytest.approx(100 / 3) and scores["map@2"] == pytest.approx(100 / 3)


def test_an_answer_is_not_mined_as_a_negative(tmp_path):
    """Other answers of a query were mined as its negatives (sentence-transformers #2848). Rows with fewer negatives than
    requested were counted once for each negative (#3504)."""
    pairs = [("q", "one"), ("q", "two"), ("r", "three")]
    vectors = {"q": [1.0, 0.0], "one": [1.0, 0.1], "two": [1.0, 0.2], "three": [1.0, 0.6], "r": [1.0, 0.6], "four": [1.0, 0.9]}
    settings = MiningArguments(num_negatives=2, relative_margin=None, range_max=10)
    counts = write_hard_negatives(pairs, ["four", "two"], embed_as(vectors), tmp_path / "mined.jsonl", settings)
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert [row["negatives"] for row in rows[:2]] == [["three", "four"]] * 2
    assert rows[2]["negatives"] == ["four", "two"] and counts["fewer"] == 0
    counts = write_hard_negatives(
        pairs, ["four"], embed_as(vectors), tmp_path / "more.jsonl", replace(settings, num_negatives=3)
    )
    assert (counts["rows"], counts["fewer"], counts["negatives"]) == (3, 2, 7)
