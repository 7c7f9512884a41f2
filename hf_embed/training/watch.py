"""Watch a training: log statistics of the embeddings, warn once if they collapse, and end the run at NaN or infinity.

Every training log has four statistics of the first rows of the last batch on the main process:

    alignment      mean squared distance between anchors and positives, normalized to unit length; lower is better
    uniformity     logarithm of the mean Gaussian potential of the anchors; lower is better
    norm_spread    standard deviation of the norms of the anchors, divided by their mean
    masked_share   share of the positives of other rows that are masked as false negatives, because their texts are equal

One warning is logged if the loss falls but the embeddings get worse, judged by the evaluation sets or, without evaluation sets,
by the batches.

The run ends if a loss, a gradient or a weight is NaN or infinite, before such a model is saved. With `nan_steps="skip"`, the
update by such a gradient is skipped instead, on all ranks. The log counts these steps as `skipped_steps`.

Shapes: B rows, V texts per row, D width of an embedding.
"""

import logging
import math
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_embed.arguments import ContrastiveTrainingArguments
from hf_embed.checkpoint.whole import last_good
from hf_embed.distributed import gather_objects
from hf_embed.errors import InputError
from hf_embed.evaluation.geometry import alignment, uniformity
from hf_embed.objectives.masking import false_negatives

logger = logging.getLogger(__name__)

ROWS = 512  # rows of the last batch that the statistics use
RISE = 0.25  # warn if uniformity loses more than this share of its earlier improvement
DRIFT = 1.5  # warn if alignment is worse than at the start by more than this factor
ALL_EQUAL = -1e-4  # uniformity above which all embeddings are equal, up to rounding
MOST_SKIPPED = 20  # end the run after this many skipped steps in a row


@torch.no_grad()
def batch_geometry(rows: Tensor, text_ids: Tensor) -> dict[str, float]:
    """Compute the four statistics of the module docstring.

    Args:
        rows: embeddings (B, V, D), at least two rows.
        text_ids: hashes of the texts (B, V).
    """
    anchors, positives = (rows[:ROWS, view].float() for view in (0, 1))
    text_ids, norms = text_ids[:ROWS], anchors.norm(dim=-1)
    others = ~torch.eye(len(anchors), dtype=torch.bool, device=rows.device)
    return {
        "alignment": alignment(anchors.cpu().numpy(), positives.cpu().numpy()),
        "uniformity": uniformity(anchors.cpu().numpy()),
        "norm_spread": (norms.std() / norms.mean()).item(),
        "masked_share": false_negatives(text_ids, text_ids[:, 1])[others].float().mean().item(),
    }


class Point(NamedTuple):
    """The geometry of the embeddings at a step, and the last loss before it."""

    alignment: float
    uniformity: float
    loss: float  # infinite before the first step
    step: int
    score: float  # the STS score of the same evaluation; NaN if there is none


def warning_of(history: list[dict], batches_alike: bool = True) -> str | None:
    """Return a warning if the embeddings of a run are all equal, or get worse, else None.

    Two signs show that they get worse. These count only if the loss falls and the STS score, if there is one, has not risen:

    - uniformity loses more than a quarter of its earlier improvement, and more than 0.1. If it never improved by more than 0.1,
      the limit is half of its initial value;
    - alignment on the evaluation sets is more than 1.5 times its value at the start. The vectors of a language model all point
      in nearly the same direction, so its alignment starts near 0 and has to rise.

    Args:
        history: all log entries of the run, including those from before the first step.
        batches_alike: whether all batches come from the same source, so that statistics of batches are comparable.
    """
    if history and any(history[-1].get(key, -math.inf) > ALL_EQUAL for key in ("uniformity", "eval_uniformity")):
        return (
            "uniformity is 0: all embeddings are equal, so nothing can be learned from them; check the pooling (the first "
            "token of a causal model sees no other token), the prompts and max_length"
        )
    evaluated = any("eval_uniformity" in entry for entry in history)
    if not evaluated and not batches_alike:
        return None
    prefix, points, loss = "eval_" if evaluated else "", list[Point](), math.inf
    for entry in history:
        loss = entry.get("loss", loss)
        geometry = [entry.get(f"{prefix}{key}", math.nan) for key in ("alignment", "uniformity")]
        if math.isfinite(sum(geometry)):
            points.append(Point(geometry[0], geometry[1], loss, entry["step"], entry.get("eval_spearman", math.nan)))
    if len(points) < 2:
        return None
    start, now, best = points[0], points[-1], min(points, key=lambda point: point.uniformity)
    if now.loss > min(start.loss, best.loss):
        return None  # the loss does not fall, so the loss already shows that something is wrong
    gained = start.uniformity - best.uniformity
    allowed = max(0.1, RISE * gained) if gained > 0.1 else -start.uniformity / 2
    if now.uniformity - best.uniformity > allowed and not now.score > best.score:
        return (
            f"uniformity has risen again, from {best.uniformity:.2f} at step {best.step} to {now.uniformity:.2f}: the "
            "embeddings move closer together"
        )
    if evaluated and now.alignment > DRIFT * start.alignment and not now.score > start.score:
        return (
            f"alignment has risen from {start.alignment:.2f} to {now.alignment:.2f}: sentences with the same meaning move "
            "apart, although the loss falls; check the STS score, and try fewer steps or a lower learning_rate"
        )
    return None


class Watch(TrainerCallback):
    """The callback that watches a training. Every `ContrastiveTrainer` has one."""

    def __init__(self, batches_alike: bool = True):
        # What the next training log needs. `see` adds to it in each step.
        self.last: tuple[Tensor, Tensor] | None = None  # embeddings and text hashes of the last batch
        self.temperature: Tensor | None = None  # the learned temperature at the last step
        self.source_losses: dict[int, list[Tensor]] = {}  # with many sources: the losses of each one since the last log
        self.skipped = 0  # skipped steps since the last log
        # What the warning depends on.
        self.history: list[dict] = []  # the log entries of a training, including those from before its first step
        self.batches_alike = batches_alike  # False with many sources, because each batch is from one of them
        self.warned = False  # whether the one warning was given. True from the start: no warning is given
        # What the checks for NaN and infinity depend on. `finite` is True while all losses since the last check were finite. It
        # is a tensor, because reading it makes the step wait for the GPU.
        self.finite: Tensor | None = None
        self.norm: Tensor | float | None = None  # gradient norm of this step, the same on every rank; None: do not check it
        self.skipped_in_a_row = 0
        self.first_step = 0  # the step from which this training was resumed; 0 if it was not resumed

    def see(self, loss: Tensor, rows: Tensor, text_ids: Tensor, source: int, temperature: Tensor | None) -> None:
        """Store what the next log needs of a batch.

        Args:
            loss: its loss, a scalar.
            rows: its embeddings (B, V, D).
            text_ids: hashes of its texts (B, V).
            source: the number of the source of its rows.
            temperature: the learned temperature, or None.
        """
        self.last = rows.detach()[:ROWS].clone(), text_ids[:ROWS]  # a slice alone would keep all rows in memory
        self.temperature = None if temperature is None else temperature.detach()
        if not self.batches_alike:
            self.source_losses.setdefault(source, []).append(loss.detach())
        finite = loss.detach().isfinite()
        self.finite = finite if self.finite is None else self.finite & finite

    def numbers(self) -> dict[str, float]:
        """Return the statistics of the last batch, rounded for a log, and the number of steps skipped since the last log.

        A batch with a single row has no statistics.
        """
        skipped: dict[str, float] = {"skipped_steps": self.skipped} if self.skipped else {}
        self.skipped = 0
        if self.last is None or len(self.last[0]) < 2:
            return skipped
        return {key: round(value, 4) for key, value in batch_geometry(*self.last).items()} | skipped

    def mean_losses(self, accelerator: Accelerator) -> dict[int, float]:
        """Return the mean loss of each source since the last call, over all ranks. Every rank must call this."""
        means = {}
        for source, losses in sorted(self.source_losses.items()):
            found = torch.stack(losses)  # those of skipped steps may be NaN or infinite
            means[source] = accelerator.reduce(found[found.isfinite()].mean(), "mean").item()
        self.source_losses = {}
        return means

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Keep the first step, and clear the values of an earlier training, which may have ended because of a NaN."""
        self.first_step = state.global_step
        if not state.global_step and any(entry["step"] for entry in self.history):
            self.history = []
        self.last = self.temperature = self.finite = self.norm = None
        self.source_losses = {}
        self.skipped = self.skipped_in_a_row = 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """If the gradient is NaN or infinite, end the run or skip the update, before the gradient changes any weight."""
        if self.norm is None or math.isfinite(self.norm):
            self.skipped_in_a_row = 0
            return
        step = state.global_step + 1
        if cast(ContrastiveTrainingArguments, args).nan_steps != "skip":
            raise self.error(args, f"the loss or its gradient is NaN or infinite at step {step} (its update was not applied)")
        # Sets gradients to None, so that the optimizer changes neither the weights nor its own averages.
        kwargs["model"].zero_grad()
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        self.last = self.finite = None
        if self.skipped_in_a_row == MOST_SKIPPED:
            raise self.error(args, f"the gradients of {MOST_SKIPPED} steps in a row were NaN or infinite, up to step {step}")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run on all ranks if a loss or a weight is NaN or infinite.

        This is checked before a log (losses only), before an evaluation or a checkpoint, and at the end of the training.
        """
        of_weights = control.should_save or control.should_evaluate or control.should_training_stop
        if control.should_log or of_weights:
            self.check(args, state, kwargs["model"], of_weights)

    def check(self, args: TrainingArguments, state: TrainerState, model: nn.Module, of_weights: bool) -> None:
        """Check the losses since the last check and, if `of_weights`, also the weights. Every rank must call this.

        Raises:
            InputError: on every rank, if one of them has found a value that is NaN or infinite.
        """
        finite = [] if self.finite is None else [self.finite]
        if of_weights:  # the update after a finite loss may have made them NaN or infinite
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            shards = [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in trained]  # FSDP
            finite += [shard.isfinite().all() for shard in shards]
        # All are read at once, because each reading would wait for the GPU.
        here = not finite or bool(torch.stack([value.to(finite[0].device) for value in finite]).all())
        if not all(gather_objects(here)):
            found = f"the loss or a weight is NaN or infinite at step {state.global_step} or shortly before"
            raise self.error(args, found)
        self.finite = None

    def error(self, args: TrainingArguments, found: str) -> InputError:
        """Return the error that ends the run. Its message names the last undamaged checkpoint."""
        last = last_good(Path(str(args.output_dir)))
        kept = f"the last good checkpoint is {last}; resume" if last else "no checkpoint was saved before; start again"
        mend = "a lower learning_rate, a higher temperature, or bf16 instead of fp16"
        return InputError(f"{found}; {kept} with {mend}")

    on_epoch_end = on_step_end  # with save_strategy "epoch", checkpoints are saved here

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict | None = None, **kwargs: Any
    ) -> None:
        """Add the entry to the history, and warn once if the embeddings collapse."""
        self.history.append({"step": state.global_step} | (logs or {}))
        if not self.warned and (message := warning_of(self.history, self.batches_alike)):
            self.warned = True
            logger.warning(f"step {state.global_step}: {message}")
