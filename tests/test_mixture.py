"""Test many sources: how often each is drawn, which rows a batch has, streams, the YAML file, and what is refused."""

import json
import logging
import re
from collections import Counter

import pytest
import torch
import yaml
from conftest import error_of, small_tokenizer, tiny_encoder, tiny_model
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    SplitDict,
    SplitInfo,
    interleave_datasets,
    load_dataset,
)
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader

from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, ImprovedContrastive, InputError, SimCSE, Source
from hf_embed.data.collator import RaggedCollator
from hf_embed.data.columns import FIRST_ROWS
from hf_embed.data.mixture import Mixture, make_mixture
from hf_embed.data.sampling import SourceBatchSampler
from hf_embed.data.source_files import read_sources
from hf_embed.data.stream import Stream
from hf_embed.data.tokenization import RowTokenizer, text_id
from hf_embed.step import MIN_TEMPERATURE, TrainingStep


def pairs(name, count, negatives=0):
    rows = [{"query": f"{name} question {i}", "positive": f"{name} answer {i}"} for i in range(count)]
    return [row | {"negatives": [f"{name} wrong {i} {k}" for k in range(i % (negatives + 1))]} if negatives else row
            for i, row in enumerate(rows)]  # fmt: skip


def arguments(folder, **settings):
    defaults = {"per_device_train_batch_size": 4, "report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no",
                "learning_rate": 1e-3}  # fmt: skip
    return ContrastiveTrainingArguments(str(folder), **(defaults | settings))


def trainer(folder, rows, model=None, **settings):
    return ContrastiveTrainer(
        model=model or tiny_model(), processing_class=small_tokenizer(), args=arguments(folder, **settings),
        objective=ImprovedContrastive(0.1), train_dataset=rows,
    )  # fmt: skip


# ---- how sources are drawn ----


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("scale", [1.0, 5e307])  # BUG: such weights had an infinite sum
def test_sources_are_drawn_by_the_formula(alpha, scale):
    """Over 100,000 steps, the shares follow p_i = w_i n_i^alpha / sum_j w_j n_j^alpha."""
    sizes, weights = [400_000, 10_000, 100], [scale, scale, 3 * scale]
    tables = [SizeOnly(size) for size in sizes]
    sources = [Source(f"s{i}", Dataset.from_list(pairs("x", 2)), weight=w) for i, w in enumerate(weights)]
    mixture = Mixture(sources, tables, alpha)
    sampler = SourceBatchSampler(mixture.sizes, mixture.probabilities, batch_size=1, rank=0, ranks=1, seed=5)
    sampler.steps = 100_000
    drawn = Counter(sampler.draws(0))
    shares = [w / scale * n**alpha for w, n in zip(weights, sizes)]
    for i, share in enumerate(shares):
        p = share / sum(shares)
        assert mixture.probabilities[i] == pytest.approx(p)
        assert abs(drawn[i] - 100_000 * p) < 4.5 * (100_000 * p * (1 - p)) ** 0.5
    if alpha == 0.5:  # control: another alpha would be noticed
        other = [w / scale * n for w, n in zip(weights, sizes)]
        assert abs(drawn[2] - 100_000 * other[2] / sum(other)) > 1000


class SizeOnly(Stream):
    """A replacement for a table that has a size but no rows."""

    def __init__(self, size):
        self.size, self.texts_per_row = size, 2


def batches(sizes, batch_size, ranks=1, epochs=1, seed=0, streams=frozenset(), first_epoch=0, probabilities=None):
    """Return all batches of the epochs, one list for each rank."""
    probabilities = probabilities or [1 / len(sizes)] * len(sizes)
    out = []
    for rank in range(ranks):
        sampler = SourceBatchSampler(sizes, probabilities, batch_size, rank, ranks, seed, streams)
        out.append([])
        for epoch in range(first_epoch, first_epoch + epochs):
            sampler.set_epoch(epoch)
            out[-1] += list(sampler)
    return out


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_each_batch_of_one_source(ranks):
    sizes = [30, 13, 50]
    (whole,) = batches(sizes, 6, epochs=3)
    shares = batches(sizes, 6 // ranks, ranks, epochs=3)
    for step, batch in enumerate(whole):
        together = [pair for share in shares for pair in share[step]]
        assert together == batch
        assert len({source for source, _ in batch}) == 1
    assert len({batch[0][0] for batch in whole}) == 3  # every source occurs


def test_a_source_is_used_up_then_starts_over_reshuffled():
    (rows,) = batches([10], 4, epochs=10)
    sequence = [row for batch in rows for _, row in batch]
    passes = [sequence[i : i + 10] for i in range(0, 80, 10)]
    assert all(sorted(part) == list(range(10)) for part in passes)
    assert len({tuple(part) for part in passes}) == 8


def test_batches_are_a_function_of_seed_epoch_and_step():
    sizes = [30, 13, 50]
    (straight,) = batches(sizes, 4, epochs=4)
    (later,) = batches(sizes, 4, epochs=2, first_epoch=2)
    assert straight[len(straight) // 2 :] == later
    assert batches(sizes, 4, seed=1)[0] != straight[: len(straight) // 4]
    assert straight[: len(straight) // 4] != straight[len(straight) // 4 : len(straight) // 2]


def test_an_epoch_sees_as_many_rows_as_there_are():
    assert len(SourceBatchSampler([30, 13, 57], [0.5, 0.3, 0.2], 5, 0, 2, 0)) == 10
    assert len(SourceBatchSampler([3], [1.0], 5, 0, 2, 0)) == 1


def test_a_small_source_repeats_within_its_batch():
    (rows,) = batches([3], 8)
    assert sorted(Counter(row for _, row in rows[0]).values()) == [2, 3, 3]


# ---- rows ----


def texts_of(batch, tokenizer):
    """Return the texts of a collated batch, row by row."""
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in batch["input_ids"].split(batch["lengths"])]
    rows, views = batch["text_ids"].shape
    grid = [[None] * views for _ in range(rows)]
    for slot, text in zip(batch["slots"].tolist(), texts):
        grid[slot // views][slot % views] = text
    return grid


def test_batches_have_their_own_sources_rows(tmp_path, tokenizer):
    """Each source has its own prompts, number of negatives and maximum length, and its own width of the grid."""
    sources = [
        Source("a", Dataset.from_list(pairs("a", 8)), query_prompt="find: ", document_prompt="doc: "),
        Source("b", Dataset.from_list(pairs("b", 8, negatives=3)), negatives=2),
        Source("c", Dataset.from_list([{"text": f"one long c sentence {i}"} for i in range(8)]), query_prompt="", max_length=4),
    ]
    run = trainer(tmp_path, sources, num_train_epochs=3, prompts={"query": "q: "})
    seen = {}
    loader = run.get_train_dataloader()
    for epoch in range(4):
        loader.set_epoch(epoch)
        for batch in loader:
            seen.setdefault(batch["source"], []).append(batch)
    assert set(seen) == {0, 1, 2}
    for batch in seen[0]:
        for query, document in texts_of(batch, tokenizer):
            assert query.startswith("find : a question") and document.startswith("doc : a answer")
            assert query.split()[-1] == document.split()[-1]
    for batch in seen[1]:
        assert batch["text_ids"].shape == (4, 4)
        for row in texts_of(batch, tokenizer):
            number = int(row[0].split()[-1])
            assert row[0] == f"q : b question {number}"  # the prompt of the run, because the source has none
            assert [text is not None for text in row[2:]] == [k < number % 4 for k in range(2)]
    assert all(length == 4 for batch in seen[2] for length in batch["lengths"])
    assert seen[2][0]["text_ids"].shape == (4, 2)
    ids = {number for batch in seen[0] for number in batch["text_ids"].flatten().tolist()}
    texts = [text for row in pairs("a", 8) for text in row.values()]
    assert ids == {text_id(tokens) for tokens in tokenizer(texts)["input_ids"]}  # the hashes ignore the prompts


def test_trainer_takes_a_dict_and_logs_each_source(tmp_path):
    rows = {"first": Dataset.from_list(pairs("a", 40)), "second": Dataset.from_list(pairs("b", 12))}
    run = trainer(tmp_path, rows, logging_steps=13, num_train_epochs=1)
    run.train()
    (log,) = (log for log in run.state.log_history if "loss" in log)
    assert log["step"] == 13
    drawn = Counter(SourceBatchSampler([40, 12], run.train_dataset.probabilities, 4, 0, 1, 42).draws(0))
    mean = sum(log[f"loss_{name}"] * drawn[i] for i, name in enumerate(rows)) / 13
    assert mean == pytest.approx(log["loss"], abs=1e-3)


def test_a_second_training_does_not_log_losses_of_the_first(tmp_path):
    """BUG: the losses after the last log of a training were part of the means of the next one."""
    run = trainer(tmp_path, {"only": Dataset.from_list(pairs("a", 40))}, logging_steps=2, max_steps=3)
    for _ in range(2):
        run.train()
        (log,) = (log for log in run.state.log_history if "loss" in log)
        assert log["loss_only"] == pytest.approx(log["loss"], abs=1e-4)


def test_resume_is_exact(tmp_path):
    rows = {"first": Dataset.from_list(pairs("a", 14)), "second": Dataset.from_list(pairs("b", 9, negatives=2))}

    def weights(folder, resume=None, seed=1):
        run = trainer(folder, rows, save_strategy="steps", save_steps=7, max_steps=11, seed=seed)
        run.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in run.step.named_parameters()}

    whole = weights(tmp_path / "whole")  # an epoch has 5 steps, so the checkpoint is within the second epoch
    resumed = weights(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-7"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    other = weights(tmp_path / "other", str(tmp_path / "whole" / "checkpoint-7"), seed=2)
    assert not all(torch.equal(whole[name], other[name]) for name in whole)  # control: the order matters


def test_learned_temperature_trains_and_resumes(tmp_path):
    def run(folder, resume=None):
        trained = ContrastiveTrainer(
            model=tiny_model(), processing_class=small_tokenizer(),
            args=arguments(folder, max_steps=6, save_strategy="steps", save_steps=3, logging_steps=1, weight_decay=0.1),
            objective=ImprovedContrastive(0.1, learn_temperature=True), train_dataset=Dataset.from_list(pairs("a", 12)),
        )  # fmt: skip
        trained.train(resume_from_checkpoint=resume)
        return trained

    whole = run(tmp_path / "whole")
    temperatures = [log["temperature"] for log in whole.state.log_history if "loss" in log]
    assert temperatures[0] == pytest.approx(0.1) and len(set(temperatures)) == 6
    assert "log_temperature" not in whole.get_decay_parameter_names(whole.step)
    resumed = run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.step.log_temperature.item() == whole.step.log_temperature.item()
    whole.save_model()  # a plain folder, verified, without the temperature
    # BUG: the next training of the same encoder continued with the learned temperature.
    again = ContrastiveTrainer(
        model=whole.encoder, args=arguments(tmp_path / "again", max_steps=1), objective=ImprovedContrastive(0.05),
        train_dataset=Dataset.from_list(pairs("a", 12)),
    )  # fmt: skip
    assert again.step.log_temperature is None
    again.train()


def test_learned_temperature_comes_back_from_its_floor():
    """BUG: below the floor the gradient was 0, so the temperature could never rise again."""
    step = TrainingStep(tiny_encoder(), temperature=1e-5)
    temperature = step(torch.tensor([5, 6]), [2])["temperature"]
    assert temperature.item() == pytest.approx(MIN_TEMPERATURE)
    assert torch.autograd.grad(temperature, step.log_temperature)[0].item() == pytest.approx(MIN_TEMPERATURE)


# ---- streams ----


def stream_files(folder, count=3, rows=7):
    for i in range(count):
        lines = [json.dumps(row) for row in pairs(f"f{i}", rows)]
        (folder / f"part-{i}.jsonl").write_text("\n".join(lines) + "\n")
    return [str(folder / f"part-{i}.jsonl") for i in range(count)]


def stream(files, rank=0, ranks=1, seed=0, buffer_size=5, drop=False, **settings):
    rows = load_dataset("json", data_files=files, split="train", streaming=True)
    source = Source("web", rows, size=21, origin="part-*.jsonl", **settings)
    return Stream(source, RowTokenizer(small_tokenizer(), 16), rank, ranks, seed, buffer_size, drop)


def ids_of(rows):
    return [row["text_ids"][0] for row in rows]


@pytest.mark.parametrize(("files", "ranks"), [(1, 1), (1, 2), (3, 3), (2, 2)])
def test_ranks_stream_disjoint_shares_that_cover_all(tmp_path, files, ranks):
    paths, count = stream_files(tmp_path, files), 7 * files
    shares = [ids_of(stream(paths, rank, ranks).__getitems__(list(range(count // ranks)))) for rank in range(ranks)]
    together = [i for share in shares for i in share]
    assert len(set(together)) == len(together) == count // ranks * ranks
    queries = [row["query"] for i in range(files) for row in pairs(f"f{i}", 7)]
    assert set(together) <= {text_id(tokens) for tokens in small_tokenizer()(queries)["input_ids"]}


@pytest.mark.parametrize("mixed", [False, True])
def test_ranks_read_what_take_and_skip_leave(mixed, tokenizer):
    """BUG: each rank skipped a part of the rows in its own files, so it trained on rows that `take` had held out."""
    rows = Dataset.from_list(pairs("s", 12)).to_iterable_dataset(num_shards=2)
    train = interleave_datasets([rows.skip(4)]) if mixed else rows.skip(4)
    found = []
    for rank in range(2):
        share = Stream(Source("s", train, size=8), RowTokenizer(tokenizer, 16), rank, 2, 0, 5, False)
        found += ids_of(share.__getitems__([0, 1, 2, 3]))
    queries = [row["query"] for row in pairs("s", 12)[4:]]
    assert sorted(found) == sorted(text_id(tokens) for tokens in tokenizer(queries)["input_ids"])


def test_a_stream_that_is_split_twice_is_refused(tokenizer):
    """BUG: of a stream that the script had split among two processes, half of the rows were not read."""
    rows = Dataset.from_list(pairs("s", 12)).to_iterable_dataset(num_shards=4)
    source = Source("s", split_dataset_by_node(rows, 0, 2), size=6)
    settings = (RowTokenizer(tokenizer, 16), 0)
    assert error_of(Stream, source, *settings, 2, 0, 5, False) == (
        "source 's': the stream is split among processes twice; give each process the whole stream"
    )
    assert len(set(ids_of(Stream(source, *settings, 1, 0, 5, False).__getitems__(list(range(6)))))) == 6  # one process may


def test_passes_are_reshuffled(tmp_path):
    rows = ids_of(stream(stream_files(tmp_path)).__getitems__(list(range(63))))
    passes = [rows[:21], rows[21:42], rows[42:]]
    assert all(sorted(part) == sorted(passes[0]) for part in passes)
    assert len({tuple(part) for part in passes}) == 3
    assert rows[:21] != ids_of(stream(stream_files(tmp_path), seed=1).__getitems__(list(range(21))))


def test_a_row_of_a_stream_depends_on_its_number_only(tmp_path):
    """The rows are the same when reading continues, skips ahead or goes back."""
    files = stream_files(tmp_path)
    every = ids_of(stream(files).__getitems__(list(range(40))))
    one = stream(files)
    assert ids_of(one.__getitems__([0, 1])) == every[:2]
    assert ids_of(one.__getitems__([30, 31, 32])) == every[30:33]
    assert ids_of(one.__getitems__([4, 5])) == every[4:6]


@pytest.mark.filterwarnings("ignore:This DataLoader")
def test_passes_do_not_depend_on_the_number_of_workers(tmp_path):
    """BUG: the `set_epoch` call of one worker changed the passes of the other workers."""
    (path,) = stream_files(tmp_path, count=1, rows=3)

    def batches(workers):
        rows = load_dataset("json", data_files=path, split="train", streaming=True)
        mixture = make_mixture([Source("web", rows, size=3)], tiny_encoder(), arguments(tmp_path), SimCSE())
        sampler = SourceBatchSampler([3], [1.0], 4, 0, 1, 0, streams=mixture.streams)
        sampler.steps = 150
        loader = DataLoader(
            mixture, batch_sampler=sampler, collate_fn=RaggedCollator(mixture.texts_per_row), num_workers=workers
        )
        return [batch["text_ids"].tolist() for batch in loader]

    assert batches(4) == batches(0)


def test_a_stream_may_swap_two_columns(tmp_path):
    (tmp_path / "a.csv").write_text("positive,query\nq,p\n" * 1 + "q2,p2\n")
    entry = {"name": "a", "file": "a.csv", "columns": {"query": "positive", "positive": "query"}}
    for more in ({}, {"streaming": True, "rows": 2}):
        (tmp_path / "sources.yaml").write_text(yaml.safe_dump([entry | more]))
        (source,) = read_sources(str(tmp_path / "sources.yaml"))
        assert next(iter(source.rows)) == {"anchor": "q", "positive": "p"}


def test_streams_and_tables_train_together_and_resume_exactly(tmp_path):
    files = stream_files(tmp_path)

    def weights(folder, resume=None, workers=0):
        rows = load_dataset("json", data_files=files, split="train", streaming=True)
        sources = [Source("web", rows, size=21, query_prompt="q: "), Source("table", Dataset.from_list(pairs("t", 9)))]
        run = trainer(folder, sources, save_strategy="steps", save_steps=5, max_steps=9, shuffle_buffer_size=4,
                      dataloader_num_workers=workers)  # fmt: skip
        run.train(resume_from_checkpoint=resume)
        return {name: p.detach().clone() for name, p in run.step.named_parameters()}

    whole = weights(tmp_path / "whole")
    resumed = weights(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-5"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    workers = weights(tmp_path / "workers", workers=2)
    assert all(torch.equal(whole[name], workers[name]) for name in whole)


def test_an_iterable_dataset_alone_trains(tmp_path):
    rows = load_dataset("json", data_files=stream_files(tmp_path), split="train", streaming=True)
    run = trainer(tmp_path / "out", rows, max_steps=3)
    run.train()
    assert run.state.global_step == 3
    with pytest.raises(InputError, match="the number of rows of a streaming dataset is unknown"):
        trainer(tmp_path / "out", rows)
    rows.info.splits = SplitDict(train=SplitInfo("train", num_examples=21))  # as the card of a dataset on the Hub says
    # BUG: a stream of 4 rows counted as 21.
    assert "the number of rows of a streaming dataset is unknown" in error_of(Source, "a", rows.take(4))


@pytest.mark.parametrize("late", [0, FIRST_ROWS])
def test_a_number_in_a_stream_is_not_dropped_as_an_empty_text(late, tmp_path):
    rows = [*pairs("f", late + 2), {"query": "q", "positive": ""}, {"query": "q", "positive": 5}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "sources.yaml").write_text(f"[{{name: a, file: a.jsonl, streaming: true, rows: {len(rows)}}}]")
    (source,) = read_sources(str(tmp_path / "sources.yaml"))

    def read():
        reader = Stream(source, RowTokenizer(small_tokenizer(), 16), 0, 1, 0, 1, True)
        reader.__getitems__(list(range(len(rows))))

    message = error_of(read)
    assert "the text is not a string (5)" in message and "--drop_empty_rows" not in message


def test_empty_rows_of_a_stream_are_dropped_on_request(tmp_path, caplog):
    """BUG: dropped rows counted twice in the total, and a stream of which all rows are dropped was read without end."""
    lines = [json.dumps(row) for row in [*pairs("a", 3), {"query": "b", "positive": " "}, *pairs("c", 3)]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    rows = stream([str(tmp_path / "a.jsonl")], drop=True).__getitems__(list(range(7)))
    assert len(set(ids_of(rows[:6]))) == 6
    assert "1 of 7 rows had an empty text and were dropped" in caplog.text
    message = error_of(stream, [str(tmp_path / "a.jsonl")])
    assert message.startswith("source 'web' (part-*.jsonl), row 4, ") and "column 'positive'" in message
    (tmp_path / "b.jsonl").write_text(2 * (lines[3] + "\n"))
    message = error_of(stream([str(tmp_path / "b.jsonl")], drop=True).__getitems__, [0])
    assert "there are no rows for this process" in message and "2 of 2 rows had an empty text" in caplog.text


# ---- rows without negatives ----


@pytest.mark.parametrize(
    ("change", "settings", "same"),
    [
        ({"positive": "one answer"}, {}, "positives"),
        ({"query": "one question"}, {}, "anchors"),
        ({"query": "one", "positive": "one answer"}, {}, "positives"),
        ({"positive": "one answer", "negative": "one answer"}, {}, "positives"),
        ({"positive": "one answer", "negative": None}, {}, "positives"),
        ({}, {"max_length": 3}, "positives"),  # all positives begin with the same token
        ({}, {}, None),
        ({"query": "one question"}, {"objective": SimCSE(mask_other_positives=False)}, None),
        ({"positive": "one answer", "negative": "another"}, {}, None),
    ],
)
@pytest.mark.parametrize("kind", ["table", "source", "stream"])
def test_rows_of_which_none_can_have_a_negative(change, settings, same, kind, tmp_path, caplog):
    """BUG: such data trained with the loss 0.00, without a word."""
    rows = [{"query": f"q {i}", "positive": f"p {i}"} | change for i in range(12)]
    settings = {"objective": SimCSE(), "max_length": 16} | settings
    given = Dataset.from_list(rows)
    if kind != "table":
        given = given if kind == "source" else given.to_iterable_dataset()
        given = [Source("mine", given, size=12, negatives=1 if "negative" in change else None)]
    args = arguments(tmp_path, max_length=settings["max_length"])
    ContrastiveTrainer(model=tiny_model(), processing_class=small_tokenizer(), args=args,
                       objective=settings["objective"], train_dataset=given)  # fmt: skip
    found = [message for message in caplog.messages if "nothing can be learned" in message]
    assert len(found) == (same is not None)
    if same:
        assert f"the {same} of all rows are the same text" in found[0]
        assert found[0].startswith("train_dataset: " if kind == "table" else "source 'mine': ")


# ---- the YAML file ----


@pytest.fixture
def files(tmp_path):
    stream_files(tmp_path)
    (tmp_path / "nli.csv").write_text("premise,entailed,contradicted\n" + "".join(f"p{i},e{i},c{i}\n" for i in range(5)))
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "one.txt").write_text("a\nb\n")
    return tmp_path


def listed(folder, *entries):
    path = folder / "sources.yaml"
    path.write_text(yaml.safe_dump(list(entries)))
    return str(path)


NLI = {"name": "nli", "file": "nli.csv", "columns": {"query": "premise", "positive": "entailed", "negative": "contradicted"}}


def test_yaml_sources(files):
    web = {"name": "web", "file": "part-*.jsonl", "streaming": True, "rows": 21, "weight": 2, "query_prompt": "q: "}
    nli, web, table = read_sources(listed(files, NLI, web, {"name": "table", "file": ["part-0.jsonl", "part-1.jsonl"]}))
    assert nli.rows[0] == {"anchor": "p0", "positive": "e0", "negative": "c0"}
    assert (web.size, web.weight, web.query_prompt) == (21, 2, "q: ") and len(list(web.rows)) == 21
    assert len(table.rows) == 14


@pytest.mark.parametrize(
    ("columns", "row"),
    [
        ({"anchor": "premise", "positive": "entailed"}, {"anchor": "p0", "positive": "e0"}),
        ({"text": "entailed"}, {"text": "e0"}),
        (
            {"query": "premise", "positive": "entailed", "negatives": ["contradicted", "entailed2"]},
            {"anchor": "p0", "positive": "e0", "negative_1": "c0", "negative_2": "x0"},
        ),
    ],
)
def test_columns_are_mapped(files, columns, row):
    lines = "".join(f"p{i},e{i},c{i},x{i}\n" for i in range(3))
    (files / "four.csv").write_text("premise,entailed,contradicted,entailed2\n" + lines)
    (source,) = read_sources(listed(files, {"name": "a", "file": "four.csv", "columns": columns}))
    assert source.rows[0] == row


BAD_YAML = {
    "not YAML": ("- name: [", "not YAML"),
    "no list": ("name: a", "expected a list of sources"),
    "list of words": ("- a\n- b", "expected a list of sources"),
    "empty": ("[]", "no source to train on"),
    "no name": ("- file: one.txt", "source 1 has no name"),
    "unknown key": ("- name: a\n  file: one.txt\n  wieght: 2", "source 'a': unknown key 'wieght' (did you mean 'weight'?)"),
    "neither file nor dataset": ("- name: a", "give either file: or dataset:"),
    "both": ("- name: a\n  file: one.txt\n  dataset: x/y", "give either file: or dataset:"),
    "missing file": ("- name: a\n  file: absent.jsonl", "source 'a': {folder}/absent.jsonl: this file does not exist"),
    "no rows": ("- name: a\n  file: empty.jsonl", "source 'a': {folder}/empty.jsonl: the file is empty"),
    "missing column": (
        "- name: a\n  file: nli.csv\n  columns: {query: question}",
        "source 'a': there is no column 'question'; found premise",
    ),
    "unknown role": ("- name: a\n  file: nli.csv\n  columns: {title: premise}", "columns: expected a mapping from text"),
    "one name twice": ("- name: a\n  file: one.txt\n- name: a\n  file: one.txt", "two sources are named 'a'"),
    "negative weight": ("- name: a\n  file: one.txt\n  weight: -1", "source 'a' ({folder}/one.txt): the weight is -1"),
    "weight NaN": ("- name: a\n  file: one.txt\n  weight: .nan", "the weight is nan"),
    "weight zero": ("- name: a\n  file: one.txt\n  weight: 0", "the weight is 0"),
    "weight a word": ("- name: a\n  file: one.txt\n  weight: much", "the weight is much"),
    "negatives": ("- name: a\n  file: one.txt\n  negatives: -2", "negatives is -2"),
    "max_length": ("- name: a\n  file: one.txt\n  max_length: long", "max_length is 'long'"),
    "stream without size": (
        "- name: a\n  file: one.txt\n  streaming: true",
        "the number of rows of a streaming dataset is unknown",
    ),
    "weight above all numbers": (f"- name: a\n  file: one.txt\n  weight: {10**400}", "it must be a number above 0"),
    "rows above all numbers": (f"- name: a\n  file: one.txt\n  streaming: true\n  rows: {10**25}", "at least 1 and whole"),
    "rows of a table": ("- name: a\n  file: one.txt\n  rows: 1", "source 'a': rows: has no effect without streaming:; remove"),
    "split of a file": ("- name: a\n  file: one.txt\n  split: test", "split: has no effect without dataset:; remove it"),
    "config of a file": ("- name: a\n  file: one.txt\n  config: en", "config: has no effect without dataset:; remove it"),
    "file left blank": ("- name: a\n  file:", "source 'a': file is None; give a path"),
    "column twice": ("- name: a\n  file: nli.csv\n  columns: {query: premise, positive: premise}", "'premise' is named twice"),
    "role twice": ("- name: a\n  file: nli.csv\n  columns: {query: premise, anchor: right}", "two roles mean the same"),
    "two kinds of file": ("- name: a\n  file: [one.txt, nli.csv]", "the files are of different kinds"),
}


@pytest.mark.parametrize("case", BAD_YAML)
def test_bad_yaml(files, case):
    content, expected = BAD_YAML[case]
    path = files / "sources.yaml"
    path.write_text(content)
    assert expected.format(folder=files) in error_of(read_sources, str(path))


def test_missing_yaml(tmp_path):
    assert "absent.yaml: this file does not exist" in error_of(read_sources, str(tmp_path / "absent.yaml"))


def mixture_of(tmp_path, sources, **settings):
    return make_mixture(sources, tiny_encoder(prompts=settings.pop("prompts", None)), arguments(tmp_path, **settings), SimCSE())


BAD_SOURCES = {
    "empty text": (lambda: [Source("a", Dataset.from_list([*pairs("a", 5), {"query": "", "positive": "p"}]), origin="a")], {},
                   "source 'a' (a), row 6, column 'query': the text is empty"),
    "wrong columns": (lambda: [Source("a", Dataset.from_list([{"x": "a", "y": "b"}] * 4))], {}, "'a': found the columns x, y"),
    "too few rows": (lambda: [Source("a", Dataset.from_list(pairs("a", 3)))], {"small_sources": "refuse"},
                     "source 'a': there are 3 rows, fewer than the 4 rows of a global batch; set small_sources to repeat"),
    "no negatives there": (lambda: [Source("a", Dataset.from_list(pairs("a", 8)), negatives=1)], {}, "no column of negatives"),
    "long prompt": (lambda: [Source("a", Dataset.from_list(pairs("a", 8)), query_prompt="word " * 20, max_length=16)], {},
                    "has 20 tokens, so max_length 16 leaves no room for a text; shorten the prompt"),
    "long prompt of the run": (lambda: [Source("a", Dataset.from_list(pairs("a", 8)))], {"prompts": {"document": "word " * 80}},
                               "has 80 tokens, so max_length 66 leaves no room for a text"),
    "longer than the run": (lambda: [Source("a", Dataset.from_list(pairs("a", 8)), max_length=67)], {},
                            "max_length 67 is larger than 66, the one of the run"),
    "no room": (lambda: [Source("a", Dataset.from_list(pairs("a", 8)), max_length=2)], {}, "max_length 2 leaves no room for a"),
    "one row": (lambda: [Source("a", Dataset.from_list(pairs("a", 1)))], {}, "at least 2"),
    "a stream of one row": (lambda: [Source("a", Dataset.from_list(pairs("a", 1)).to_iterable_dataset(), size=9)], {},
                            "source 'a': there are 1 row(s), but in-batch negatives need at least 2"),
    "two of one name": (lambda: [Source("a", Dataset.from_list(pairs("a", 8)))] * 2, {}, "two sources are named 'a'"),
    "none": (list, {}, "no source to train on"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources(tmp_path, case):
    make, settings, expected = BAD_SOURCES[case]
    assert expected in error_of(mixture_of, tmp_path, make(), **settings)


def test_empty_dataset_is_refused():
    assert "source 'a': there are no rows" in error_of(Source, "a", Dataset.from_list(pairs("a", 2)).select([]))


def test_small_source_is_said_and_repeated(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        mixture = mixture_of(
            tmp_path, [Source("a", Dataset.from_list(pairs("a", 3))), Source("b", Dataset.from_list(pairs("b", 9)))]
        )
    assert re.findall("source 'a': there are 3 rows, fewer than the 4", caplog.text) and "source 'b'" not in caplog.text
    loader = DataLoader(mixture, batch_sampler=SourceBatchSampler(mixture.sizes, [1.0, 0.0], 4, 0, 1, 0),
                        collate_fn=RaggedCollator(mixture.texts_per_row))  # fmt: skip
    ids = next(iter(loader))["text_ids"]
    assert len(ids) == 4 and len(set(ids[:, 0].tolist())) == 3


def test_splits_are_no_sources(tmp_path):
    splits = DatasetDict({"test": Dataset.from_list(pairs("a", 8))})
    for rows in (splits, IterableDatasetDict(splits)):
        assert "source 'a': a" in error_of(Source, "a", rows) and "choose one of its splits, test" in error_of(
            Source, "a", rows
        )
    rows = Dataset.from_list(pairs("a", 8))
    with pytest.raises(InputError, match="'test' looks like a split"):
        trainer(tmp_path, DatasetDict({"test": rows, "train": rows}))


def test_alpha_is_checked(tmp_path):
    with pytest.raises(InputError, match="source_alpha is -1"):
        arguments(tmp_path, source_alpha=-1)


def ragged(first_with, rows=64):
    """Yield rows of which only those from `first_with` on have a negative, as a generator of a user may."""
    for i in range(rows):
        yield {"anchor": f"text {i}", "positive": f"words {i}"} | ({"negative": f"other {i}"} if i >= first_with else {})


@pytest.mark.parametrize("negatives", [1, None])
@pytest.mark.parametrize("first_with", [0, 1, 60])
def test_a_stream_keeps_negatives_that_its_first_row_lacks(first_with, negatives, tokenizer):
    """BUG: the columns were those of the first row, and the negatives of all other rows were dropped in silence."""
    rows = IterableDataset.from_generator(ragged, gen_kwargs={"first_with": first_with})
    stream = Stream(Source("s", rows, size=64, negatives=negatives), RowTokenizer(tokenizer, 16), 0, 1, 0, 1, False)
    assert stream.columns == ["anchor", "positive", "negative"]
    lengths = [len(row["input_ids"]) for row in stream.__getitems__(list(range(64)))]
    assert sorted(lengths) == sorted([2] * first_with + [3] * (64 - first_with))


def test_a_stream_of_triplets_is_trained_as_it_is(tmp_path):
    """BUG: it was refused without `negatives`, which only a `Source` has, and a `Source` was refused without `size`."""
    rows = Dataset.from_list([{"anchor": f"q {i}", "positive": f"p {i}", "negative": f"n {i}"} for i in range(12)])
    made = ContrastiveTrainer(model=tiny_model(), processing_class=small_tokenizer(), args=arguments(tmp_path, max_steps=1),
                              train_dataset=rows.to_iterable_dataset())  # fmt: skip
    batch = next(iter(made.get_train_dataloader()))
    assert batch["text_ids"].shape[1] == 3 and batch["text_ids"].all()


def test_a_stream_with_lists_of_negatives_needs_their_number(tokenizer):
    rows = Dataset.from_list([{"anchor": f"q {i}", "positive": f"p {i}", "negatives": [f"n {i}", f"m {i}"]} for i in range(12)])
    given = Source("s", rows.to_iterable_dataset(), size=12), RowTokenizer(tokenizer, 16), 0, 1, 0, 1, False
    assert "with lists of negatives needs negatives:" in error_of(Stream, *given)


def test_a_stream_refuses_negatives_that_begin_late(tokenizer):
    rows = IterableDataset.from_generator(ragged, gen_kwargs={"first_with": 300, "rows": 600})
    stream = Stream(Source("s", rows, size=600), RowTokenizer(tokenizer, 16), 0, 1, 0, 1, False)
    assert len(stream.__getitems__(list(range(256)))) == 256
    message = "column negative begins after the first rows; give it in each row, maybe as null"
    assert message in error_of(stream.__getitems__, list(range(256, 600)))


def test_only_losses_that_need_negatives_warn_of_rows_without(tokenizer, tmp_path, caplog):
    """A function of the user may compare each anchor with its positive only."""
    rows = [{"anchor": f"text {i}", "positive": "the same"} for i in range(4)]
    args = ContrastiveTrainingArguments(tmp_path, use_cpu=True, report_to=[])
    for objective, warned in ((SimCSE(), True), (lambda embeddings, *others: embeddings.var(), False)):
        caplog.clear()
        ContrastiveTrainer(tiny_model(), args, objective, rows, processing_class=tokenizer)
        assert ("no row of a batch has a negative" in caplog.text) == warned
