"""Train a tiny model on any number of ranks. Rank 0 saves the results in FOLDER/RANKS-PART.pt (RANKS is the number of ranks).

PART is `quick` (the cases in QUICK) or `slow` (the other cases).

accelerate launch --config_file recipes/accelerate/cpu_2.yaml tests/worker.py FOLDER PART
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, os.path.dirname(__file__))
import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from conftest import small_tokenizer, tiny_encoder, tiny_model
from datasets import Dataset
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import BertForMaskedLM, TrainerCallback

import hf_embed.data.collator
import hf_embed.trainer
import hf_embed.training.teacher
from hf_embed import (
    ContrastiveTrainer,
    ContrastiveTrainingArguments,
    CoSENT,
    ImprovedContrastive,
    MarginMSE,
    Retrieval,
    SimCSE,
    TeacherKL,
    VectorDistillation,
)
from hf_embed.distributed import gather_objects, gather_rows, get_rank, get_world_size
from hf_embed.training.teacher import load_teacher, vectors_of

WORDS = ["cat", "dog", "rain", "house", "river", "bread", "table", "music", "winter", "garden", "train", "letter"]
ROWS = [
    {"anchor": f"the {a} and the {b}", "positive": f"a {a} near some {b} " * (1 + i % 3), "negative": f"no {b} at all {a}"}
    for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1]))
] * 2  # every text occurs twice, which makes false negatives, on the same rank or on another one
PAIRS = [(a, b) for a, b in zip(WORDS * 3, WORDS[::-1] * 3)]
STS = [{"sentence1": f"the {a}", "sentence2": f"a {b}", "score": i % 6} for i, (a, b) in enumerate(PAIRS)]
STS.append({"sentence1": "one more", "sentence2": "to be odd", "score": 3})  # 37: not divisible by 2 or 3 ranks
SEARCH = Retrieval(
    queries={f"q{i}": f"the {a}" for i, a in enumerate(WORDS[:7])},
    corpus={f"d{i}": f"{a} {b}" for i, (a, b) in enumerate((a, b) for a in WORDS for b in WORDS[:5])},
    qrels={f"q{i}": {f"d{5 * i + j}": 1 + j for j in range(3)} for i in range(7)},
)
BATCH = 12  # rows of a global batch
GTE = [  # number of negatives, tile_rows, gradient_caching
    ("gte", negatives, tile_rows, caching) for negatives in (0, 1, 3) for tile_rows, caching in ((None, False), (2, True))
]
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
SETTINGS = {"optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0, "report_to": [], "save_strategy": "no",
            "disable_tqdm": True, "use_cpu": True, "chunk_tokens": 64}  # fmt: skip


def rows_with(negatives: int) -> list[dict]:
    """Return the rows with this number of negatives each. If the number is above 1, every third row has one fewer."""
    rows = []
    for i, row in enumerate(ROWS):
        texts = [f"{row['negative']} {k}" for k in range(negatives - (i % 3 == 2 and negatives > 1))]
        rows.append({"anchor": row["anchor"], "positive": row["positive"]} | ({"negatives": texts} if negatives else {}))
    return rows


HELD_OUT_BATCH = 6
NEW = [{"anchor": f"some {a}", "positive": f"{a} and {b}"} for a, b in zip(WORDS, WORDS[::-1])]
HELD_OUT = {
    "even": rows_with(1)[:12],
    "ragged": rows_with(3)[:11],  # the last batch has five rows, which two ranks cannot share evenly
    "single": rows_with(1)[:7],  # one row more than a batch
    "few": NEW[:2],
    # Each row has two positives. The second one is also a hard negative of the next row.
    "lists": [{"anchor": f"some {word}", "positive": [f"{word} here", f"{word} there"], "negatives": [f"{before} there"]}
              for word, before in zip(WORDS, WORDS[-1:] + WORDS[:-1])],
}  # fmt: skip
HELD_OUT_OBJECTIVES = {
    "simcse": lambda: SimCSE(0.2),
    "gte": lambda: ImprovedContrastive(0.2),
    "learned": lambda: ImprovedContrastive(0.2, learn_temperature=True),
}


def rows_of_several_positives() -> list[dict]:
    """Return rows of up to three positives, which are also hard negatives and positives of other rows.

    They are 24 pairs, which make two full batches.
    """
    texts = [row["positive"] for row in ROWS[:14]]
    return [
        {"query": row["anchor"], "pos": texts[i : i + 1 + i % 3], "neg": [texts[i + 2], row["negative"]]}
        for i, row in enumerate(ROWS[:12])
    ]


def rows_with_scores(negatives: int) -> list[dict]:
    """Return the rows with a score for each text after the anchor."""
    rows = rows_with(negatives)
    return [
        row | {"scores": [(3 * i + 5 * k) % 7 / 7 for k in range(1 + len(row.get("negatives", [])))]}
        for i, row in enumerate(rows)
    ]


def replaced(owner, name: str, substitute, run: Callable):
    """Return what `run` returns while a function of hf_embed is replaced."""
    original = getattr(owner, name)
    setattr(owner, name, substitute)
    try:
        return run()
    finally:
        setattr(owner, name, original)


def teacher_folder(folder: str) -> str:
    """Return the folder of the teacher. The first rank saves it."""
    teacher = os.path.join(folder, f"teacher-{get_world_size()}")
    if get_rank() == 0 and not os.path.exists(teacher):
        tiny_encoder(seed=5).save_pretrained(teacher, verify=False)
    PartialState().wait_for_everyone()
    return teacher


def vectors_of_a_teacher(folder: str) -> np.ndarray:
    """Let the ranks encode texts with a teacher into an empty cache, and return the vectors that this rank reads."""
    cache = Path(folder, f"cache-{get_world_size()}")
    teacher = load_teacher(teacher_folder(folder), torch.device("cpu"))
    texts = [row["positive"] for row in ROWS[:12]]
    file = replaced(hf_embed.training.teacher, "cache_folder", lambda: cache, lambda: vectors_of(teacher, texts))
    assert len(list(cache.rglob("*.npy"))) == 1
    return np.load(file)


class Watch(TrainerCallback):
    """A callback that keeps the gradients of the first step and counts the all-reduces of gradients."""

    def __init__(self):
        self.gradients, self.reductions, self.trainer = {}, 0, None

    def on_train_begin(self, args, state, control, **kwargs):
        if get_world_size() > 1:
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)

    def reduce(self, group, bucket):
        self.reductions += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            parameters = self.trainer.step.named_parameters()
            self.gradients = {name.removeprefix("encoder."): p.grad.clone() for name, p in parameters if p.grad is not None}


def train(folder: str, objective=None, rows: list[dict] = ROWS, evaluated: bool = False, **settings) -> dict:
    """Train two steps of 12 rows. Return the gradients of the first step, the final weights, the counts and any scores."""
    objective = objective or SimCSE()
    ranks = get_world_size()
    model = tiny_model(**NO_DROPOUT).double()
    if getattr(objective, "mlm_weight", 0):
        torch.manual_seed(1)
        masked_lm = BertForMaskedLM(model.config).double()
        masked_lm.bert = model
        masked_lm.tie_weights()
        model = masked_lm.eval()
    watch = Watch()
    args = ContrastiveTrainingArguments(
        folder, per_device_train_batch_size=BATCH // ranks, max_steps=2, **(SETTINGS | settings)
    )  # fmt: skip
    trainer = watch.trainer = ContrastiveTrainer(
        model=model, processing_class=small_tokenizer(), args=args, objective=objective,
        train_dataset=Dataset.from_list(rows), eval_dataset={"s": Dataset.from_list(STS), "r": SEARCH}, callbacks=[watch],
    )  # fmt: skip
    scores = trainer.evaluate() if evaluated else {}
    gathers = []
    plain_gather = dist.all_gather if ranks > 1 else None
    if ranks > 1:

        def counted(parts, rows, *a, **k):
            # Count only embeddings (B, V, D). Text ids, which are integers, and the loss for the log are gathered too.
            gathers.append(rows.dim() == 3 and rows.is_floating_point())
            return plain_gather(parts, rows, *a, **k)

        dist.all_gather = counted
    loss = trainer.train().training_loss
    if ranks > 1:
        dist.all_gather = plain_gather
    weights = {name.removeprefix("encoder."): p.detach().clone() for name, p in trainer.step.named_parameters()}
    return {
        "gradients": watch.gradients, "weights": weights, "scores": scores, "reductions": watch.reductions,
        "embedding_gathers": sum(gathers), "ranks": ranks, "loss": loss,
    }  # fmt: skip


def held_out_losses(folder: str) -> dict[str, dict[str, float]]:
    """Return for each objective the loss of each evaluation set before and after two training steps."""
    found = {}
    for name, objective in HELD_OUT_OBJECTIVES.items():
        args = ContrastiveTrainingArguments(
            folder, per_device_train_batch_size=12 // get_world_size(), max_steps=2,
            per_device_eval_batch_size=HELD_OUT_BATCH // get_world_size(), **SETTINGS,
        )  # fmt: skip
        trainer = ContrastiveTrainer(
            model=tiny_model(**NO_DROPOUT).double(), processing_class=small_tokenizer(), args=args, objective=objective(),
            train_dataset=Dataset.from_list(rows_with(1)[12:]), eval_dataset=HELD_OUT,
        )  # fmt: skip
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
        found[name] = {f"{when} {key}": value for when, scores in (("before", before), ("after", after))
                       for key, value in scores.items() if key.endswith("loss")}  # fmt: skip
    assert all(other == found for other in gather_objects(found))  # the same on every rank, to the last bit
    return found


class NoteSources(ContrastiveTrainer):
    """A trainer that keeps the source and the text ids of the anchors of every batch of this rank."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.__dict__.setdefault("noted", []).append((inputs["source"], inputs["text_ids"][:, 0].tolist()))
        return super().compute_loss(model, inputs, *args, **kwargs)


def sources_of_each_rank(folder: str) -> list[list]:
    """Train on four sources of different size and shape. Return the source and queries of every batch of each rank."""
    sizes = {"large": 60, "middle": 20, "small": 5}
    rows = {
        name: Dataset.from_list([{"anchor": f"{name} {i}", "positive": f"a {name} {i}"} for i in range(size)])
        for name, size in sizes.items()
    }
    rows["negatives"] = Dataset.from_list(rows_with(3))
    args = ContrastiveTrainingArguments(folder, per_device_train_batch_size=BATCH // get_world_size(), max_steps=20, **SETTINGS)
    trainer = NoteSources(
        model=tiny_model(), processing_class=small_tokenizer(), args=args, train_dataset=rows,
        objective=ImprovedContrastive(0.2, learn_temperature=True),
    )  # fmt: skip
    trainer.train()
    return gather_objects(trainer.noted)


def views_of_each_rank(folder: str, **settings) -> list[list[bool]]:
    """Train with dropout. Return for each batch of each rank whether the two views of all texts were bit for bit equal."""
    noted = []

    class NoteViews(ContrastiveTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True)
            noted.append(torch.equal(outputs["embeddings"][:, 0], outputs["embeddings"][:, 1]))
            return loss

    args = ContrastiveTrainingArguments(
        folder, per_device_train_batch_size=BATCH // get_world_size(), max_steps=2, **(SETTINGS | settings)
    )  # fmt: skip
    rows = Dataset.from_list([{"text": row["anchor"]} for row in ROWS])
    NoteViews(model=tiny_model(), processing_class=small_tokenizer(), args=args, train_dataset=rows).train()
    return gather_objects(noted)


def mask_some(input_ids, tokenizer):
    """Mask tokens by their id alone, so that the mask does not depend on how rows are divided among ranks."""
    chosen = input_ids % 3 == 0
    return input_ids.masked_fill(chosen, tokenizer.mask_token_id), input_ids.masked_fill(~chosen, -100)


def own_gradient_only(rows):
    """Gather rows with another common mistake: only the rows of this rank keep their gradient."""
    first, everyone = get_rank() * len(rows), gather_rows(rows.detach())
    return torch.cat([everyone[:first], rows, everyone[first + len(rows) :]])


def cases(folder: str) -> dict[str | tuple, Callable[[], object]]:
    """Return what can be run, by name."""
    run = partial(train, folder)
    trainer, collator = hf_embed.trainer, hf_embed.data.collator
    gather, further, ranks = trainer.gather_rows, trainer.further_arguments, get_world_size()

    def with_teacher(objective, rows: list[dict]) -> dict:
        return run(objective, rows, teacher=teacher_folder(folder))

    several = rows_of_several_positives()
    gte = {
        ("gte", negatives, tile_rows, caching): partial(
            run, ImprovedContrastive(0.2, tile_rows=tile_rows), rows_with(negatives), gradient_caching=caching
        )
        for _, negatives, tile_rows, caching in GTE
    }
    right = gte | {
        "plain": partial(run, evaluated=True),
        "cached": partial(run, gradient_caching=True),
        "mlm": partial(replaced, trainer, "mask_tokens", mask_some, partial(run, SimCSE(mlm_weight=0.5))),
        "temp_scale": partial(run, temp_scale=0.5),
        "learned temperature": partial(run, ImprovedContrastive(0.2, learn_temperature=True), rows_with(1)),
        "several positives": partial(run, rows=several),
        "several positives, gte": partial(run, ImprovedContrastive(0.2), several),
        "CoSENT": partial(run, CoSENT(), rows_with_scores(0)),
        "CoSENT, cached": partial(run, CoSENT(), rows_with_scores(0), gradient_caching=True),
        "TeacherKL": partial(run, TeacherKL(), rows_with_scores(3)),
        "MarginMSE": partial(run, MarginMSE(), rows_with_scores(3)),
        "TeacherKL, batch": partial(with_teacher, TeacherKL(candidates="batch"), rows_with(1)),
        "SimCSE, guided": partial(with_teacher, SimCSE(guide_margin=0.0), rows_with(3)),
        "GTE, guided": partial(with_teacher, ImprovedContrastive(0.2, guide_margin=0.0), rows_with(3)),
        "VectorDistillation": partial(with_teacher, VectorDistillation(), rows_with(1)),
        "sources": partial(sources_of_each_rank, folder),
        "two masks": partial(views_of_each_rank, folder),
        "same mask": partial(views_of_each_rank, folder, same_dropout_mask=True),
        "same mask, cached": partial(views_of_each_rank, folder, same_dropout_mask=True, gradient_caching=True),
        "held out": partial(held_out_losses, folder),
        "vectors of each rank": lambda: gather_objects(vectors_of_a_teacher(folder)),
    }
    wrong = {  # common mistakes
        # No gradient flows through the gather.
        "no_gradient_through_gather": partial(replaced, trainer, "gather_rows", lambda rows: gather(rows.detach()), run),
        "own_gradient_only": partial(replaced, trainer, "gather_rows", own_gradient_only, gte["gte", 1, None, False]),
        "scores of own rows": partial(
            replaced, trainer, "further_arguments",
            lambda given, needs, _: further(given, needs, lambda rows: torch.cat([rows] * ranks)), right["CoSENT"],
        ),
        "other positives not masked": partial(
            replaced, collator, "used_columns", torch.zeros_like, right["several positives"]
        ),
        "other positives not masked, gte": partial(
            replaced, collator, "used_columns", torch.zeros_like, right["several positives, gte"]
        ),
    }  # fmt: skip
    return right | wrong


QUICK = {  # what runs without the slow tests
    "plain", "cached", "learned temperature", "several positives, gte", "CoSENT, cached", "TeacherKL, batch", "GTE, guided",
    "sources", "two masks", "same mask, cached", "held out", "no_gradient_through_gather", "own_gradient_only",
    "other positives not masked, gte", ("gte", 0, None, False), ("gte", 1, None, False), ("gte", 3, 2, True),
}  # fmt: skip


def results(folder: str, part: str) -> dict:
    return {name: run() for name, run in cases(folder).items() if (name in QUICK) == (part == "quick")}


def main(folder: str, part: str) -> None:
    PartialState()  # initializes the process group
    result = results(folder, part)
    if get_rank() == 0:
        torch.save(result, os.path.join(folder, f"{get_world_size()}-{part}.pt"))


if __name__ == "__main__":
    main(*sys.argv[1:])
    PartialState().destroy_process_group()
