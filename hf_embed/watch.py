"""Is a run learning, or collapsing? Numbers of the batch in every log, one warning, and an end to what cannot be mended.

In every log, of the first rows of the last batch on the main process (B rows, V texts each, D wide):

    alignment      mean squared distance of anchors and positives, on the unit sphere; lower is better
    uniformity     log of the mean Gaussian potential of the anchors; lower is better
    norm_spread    standard deviation of the anchors' lengths, over their mean
    masked_share   share of the other rows' positives that are no negatives, being equal texts

A warning, once, where the loss falls but the embeddings get worse: by the evaluation sets if there are any, else by the
batches.

A loss, a gradient or a weight that is no number any more ends the run before anything of it is saved. With `nan_steps="skip"`
the update of such a gradient is left out instead, on all ranks alike; the log counts these steps as `skipped_steps`.
"""

import logging
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_embed.checkpoint.whole import damage, newest_first
from hf_embed.distributed import gather_objects
from hf_embed.errors import InputError
from hf_embed.objectives.masking import false_negatives

logger = logging.getLogger(__name__)

ROWS = 512  # of a batch that are looked at
RISE = 0.25  # of what uniformity had gained, given back
DRIFT = 1.5  # times the alignment of the start
MOST_SKIPPED = 20  # steps in a row


@torch.no_grad()
def batch_geometry(rows: Tensor, text_ids: Tensor) -> dict[str, float]:
    """Return the numbers above, of embeddings (B, V, D) and text hashes (B, V), of two rows at least."""
    rows, text_ids = rows[:ROWS].float(), text_ids[:ROWS]
    anchors, positives = F.normalize(rows[:, 0], dim=-1), F.normalize(rows[:, 1], dim=-1)
    norms = rows[:, 0].norm(dim=-1)
    others = ~torch.eye(len(rows), dtype=torch.bool, device=rows.device)
    return {
        "alignment": (anchors - positives).square().sum(-1).mean().item(),
        "uniformity": F.pdist(anchors).square().mul(-2).exp().mean().log().item(),
        "norm_spread": (norms.std() / norms.mean()).item(),
        "masked_share": false_negatives(text_ids, text_ids[:, 1])[others].float().mean().item(),
    }


def warning_of(history: list[dict], batches_alike: bool = True) -> str | None:
    """Say what is wrong with a run that has logged `history`, from before its first step on; None if nothing is.

    Two signs, which count only while the loss falls: uniformity gives back a quarter of what it had gained (or half of what the
    model came with, if it never gained); or alignment, of evaluation pairs, is worse than at the start by half.
    """
    evaluated = any("eval_uniformity" in entry for entry in history)
    if not evaluated and not batches_alike:
        return None
    prefix, points, loss = "eval_" if evaluated else "", [], math.inf
    for entry in history:
        loss = entry.get("loss", loss)
        alignment, uniformity = (entry.get(f"{prefix}{key}", math.nan) for key in ("alignment", "uniformity"))
        if math.isfinite(alignment + uniformity):
            points.append((alignment, uniformity, loss, entry["step"]))
    if len(points) < 2:
        return None
    start, now, best = points[0], points[-1], min(points, key=lambda point: point[1])
    if now[2] > min(start[2], best[2]):
        return None  # the loss itself says that something is wrong
    gained = start[1] - best[1]
    if now[1] - best[1] > (max(0.1, RISE * gained) if gained > 0.1 else -start[1] / 2):
        return f"uniformity has risen again, from {best[1]:.2f} at step {best[3]} to {now[1]:.2f}: embeddings draw together"
    if evaluated and now[0] > DRIFT * start[0]:
        return (
            f"alignment has risen from {start[0]:.2f} to {now[0]:.2f}: sentences that mean the same drift apart, though the "
            "loss falls; look at the STS score, and try fewer steps or a lower learning_rate"
        )
    return None


class Watch(TrainerCallback):
    """Added to every `ContrastiveTrainer`."""

    def __init__(self, batches_alike: bool = True, skips: bool = False):
        self.last: tuple[Tensor, Tensor] | None = None  # embeddings and text hashes of the last batch
        self.finite: Tensor | None = None  # of the losses since the last look: a tensor, so that no step waits for the device
        self.history: list[dict] = []  # everything logged, from before the first step on
        self.warned = False
        self.batches_alike = batches_alike  # not so with many sources: each batch is of another
        self.skips = skips  # the updates of gradients that are no numbers, instead of ending the run
        self.norm: Tensor | float | None = None  # of the gradient of this step, the same on every rank; None: not looked at
        self.skipped = 0  # steps since the last log
        self.skipped_in_a_row = 0

    def see(self, loss: Tensor, rows: Tensor, text_ids: Tensor) -> None:
        """Keep what the next log is made of: a loss, embeddings (B, V, D) and text hashes (B, V)."""
        self.last = rows.detach()[:ROWS], text_ids[:ROWS]
        finite = loss.detach().isfinite()
        self.finite = finite if self.finite is None else self.finite & finite

    def numbers(self) -> dict[str, float]:
        """Return the numbers of the last batch, rounded for a log, and how many steps were skipped since the last log.

        There are none of a batch with a single row.
        """
        skipped: dict[str, float] = {"skipped_steps": self.skipped} if self.skipped else {}
        self.skipped = 0
        if self.last is None or len(self.last[0]) < 2:
            return skipped
        return {key: round(value, 4) for key, value in batch_geometry(*self.last).items()} | skipped

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Forget the batches of an earlier training, which may have ended for their numbers."""
        self.last = self.finite = self.norm = None
        self.skipped = self.skipped_in_a_row = 0

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """End the run, or leave the update out, where the gradient is no number; before it reaches a weight."""
        assert model is not None
        if self.norm is None or math.isfinite(self.norm):
            self.skipped_in_a_row = 0
            return
        step = state.global_step + 1
        if not self.skips:
            raise self.error(args, f"the loss or its gradient is not a number any more, at step {step} (without its update)")
        model.zero_grad()  # to None: an optimizer leaves such weights alone, its own averages too
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.last = self.finite = None
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise self.error(args, f"the gradients of {MOST_SKIPPED} steps in a row were no numbers, up to step {step}")

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """End the run, on all ranks, where a loss or a weight is no number any more."""
        assert model is not None
        if not (control.should_log or control.should_save or control.should_evaluate or control.should_training_stop):
            return
        self.check(args, state, model, control.should_save or control.should_evaluate or control.should_training_stop)

    def check(self, args: TrainingArguments, state: TrainerState, model: nn.Module, of_weights: bool) -> None:
        """Look at the losses since the last look and, before a checkpoint, at the weights; every rank calls this.

        Raises:
            InputError: on every rank, where one of them has found what is no number.
        """
        finite = [self.finite is None or self.finite.item()]
        if of_weights:  # the step after a good loss may have spoilt them
            finite += [parameter.isfinite().all().item() for parameter in model.parameters() if parameter.requires_grad]
        if not all(gather_objects(all(finite))):
            found = f"the loss or a weight is not a number any more, at step {state.global_step} or shortly before"
            raise self.error(args, found)
        self.finite = None

    def error(self, args: TrainingArguments, found: str) -> InputError:
        """Return the error of a run that ends for what was found."""
        last = next((path for path in newest_first(Path(str(args.output_dir))) if damage(path) is None), None)
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was saved before"
        mend = "a lower learning_rate, a higher temperature, or bf16 in place of fp16"
        return InputError(f"{found}; {kept}; go on with {mend}")

    on_epoch_end = on_step_end  # with save_strategy "epoch" this is where a checkpoint is decided on

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Warn, once, where the run collapses."""
        self.history.append({"step": state.global_step} | (logs or {}))
        if not self.warned and state.is_world_process_zero and (message := warning_of(self.history, self.batches_alike)):
            self.warned = True
            logger.warning(f"step {state.global_step}: {message}")
