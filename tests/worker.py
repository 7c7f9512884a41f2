"""Trains a tiny model on however many ranks it is launched on; rank 0 leaves what it saw in FOLDER/RANKS.pt.

accelerate launch --config_file recipes/accelerate/cpu_2.yaml tests/worker.py FOLDER
"""

import os
import sys

sys.path.insert(0, os.path.dirname(__file__))
import torch
import torch.distributed as dist
from accelerate import PartialState
from conftest import quickstart_tokenizer, tiny_model
from datasets import Dataset
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from transformers import BertForMaskedLM, TrainerCallback

import hf_embed.trainer
from hf_embed import ContrastiveTrainer, ContrastiveTrainingArguments, SimCSE
from hf_embed.distributed import world

WORDS = ["cat", "dog", "rain", "house", "river", "bread", "table", "music", "winter", "garden", "train", "letter"]
ROWS = [
    {"anchor": f"the {a} and the {b}", "positive": f"a {a} near some {b} " * (1 + i % 3), "negative": f"no {b} at all {a}"}
    for i, (a, b) in enumerate(zip(WORDS, WORDS[1:] + WORDS[:1]))
] * 2  # every text twice: false negatives, on whichever rank they fall
PAIRS = [(a, b) for a, b in zip(WORDS * 3, WORDS[::-1] * 3)]
STS = [{"sentence1": f"the {a}", "sentence2": f"a {b}", "score": i % 6} for i, (a, b) in enumerate(PAIRS)]
STS.append({"sentence1": "one more", "sentence2": "to be odd", "score": 3})  # 37 rows do not divide among 2 ranks


class Watch(TrainerCallback):
    """Keeps the first step's gradients and counts collectives."""

    def __init__(self):
        self.gradients, self.reductions, self.trainer = {}, 0, None

    def on_train_begin(self, args, state, control, **kwargs):
        if world()[1] > 1:
            self.trainer.model_wrapped.register_comm_hook(None, self.reduce)

    def reduce(self, group, bucket):
        self.reductions += 1
        return allreduce_hook(dist.group.WORLD, bucket)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == 0:
            parameters = self.trainer.encoder.named_parameters()
            self.gradients = {name: p.grad.clone() for name, p in parameters if p.grad is not None}


def train(folder: str, mlm_weight: float = 0.0, **settings) -> dict:
    """Gradients of the first of two steps on 16 rows a step, and what was counted."""
    ranks = world()[1]
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = tiny_model(**no_dropout).double()
    if mlm_weight:
        torch.manual_seed(1)
        masked_lm = BertForMaskedLM(model.config).double()
        masked_lm.bert = model
        masked_lm.tie_weights()
        model = masked_lm.eval()
    watch = Watch()
    args = ContrastiveTrainingArguments(
        folder, per_device_train_batch_size=16 // ranks, max_steps=2, optim="sgd", learning_rate=0.1, max_grad_norm=0,
        report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True, chunk_tokens=64, **settings,
    )  # fmt: skip
    trainer = watch.trainer = ContrastiveTrainer(
        model=model, processing_class=quickstart_tokenizer(), args=args, objective=SimCSE(mlm_weight=mlm_weight),
        train_dataset=Dataset.from_list(ROWS), eval_dataset={"s": Dataset.from_list(STS)}, callbacks=[watch],
    )  # fmt: skip
    scores = trainer.evaluate()
    gathers = []
    plain_gather = dist.all_gather if ranks > 1 else None
    if ranks > 1:

        def counted(parts, rows, *a, **k):
            # Embeddings are (B, V, D); text ids are integers, and Trainer gathers the loss it logs.
            gathers.append(rows.dim() == 3 and rows.is_floating_point())
            return plain_gather(parts, rows, *a, **k)

        dist.all_gather = counted
    trainer.train()
    if ranks > 1:
        dist.all_gather = plain_gather
    weights = {name: p.detach().clone() for name, p in trainer.encoder.named_parameters()}
    return {
        "gradients": watch.gradients, "weights": weights, "scores": scores, "reductions": watch.reductions,
        "embedding_gathers": sum(gathers), "ranks": ranks,
    }  # fmt: skip


def mask_some(input_ids, tokenizer):
    """A mask that depends on the token alone, so that it is the same however rows are shared out."""
    chosen = input_ids % 3 == 0
    return input_ids.masked_fill(chosen, tokenizer.mask_token_id), input_ids.masked_fill(~chosen, -100)


def main(folder: str) -> None:
    PartialState()  # joins the ranks
    hf_embed.trainer.mask_tokens = mask_some
    result = {
        "plain": train(folder),
        "cached": train(folder, gradient_caching=True),
        "mlm": train(folder, mlm_weight=0.5),
    }
    gather = hf_embed.trainer.gather_rows
    hf_embed.trainer.gather_rows = lambda rows: gather(rows.detach())  # the mistake of many: no gradient through it
    result["no_gradient_through_gather"] = train(folder)
    if world()[0] == 0:
        torch.save(result, os.path.join(folder, f"{world()[1]}.pt"))


if __name__ == "__main__":
    main(sys.argv[1])
