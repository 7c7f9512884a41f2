"""A Trainer that comes through what happens to runs: signals, lost ranks, gradients that are no numbers, full memory."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer_jit_checkpoint import JITCheckpointCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from hf_embed.ranks import PeerWatch, peers_in_one_line
from hf_embed.stop import Stopped, StopRequests, how_to_go_on
from hf_embed.watch import Watch

logger = logging.getLogger(__name__)


class GuardedTrainer(Trainer):
    """What `ContrastiveTrainer` does when something happens to a training."""

    watch: Watch

    def __init__(self, *args: Any, **kwargs: Any):
        self.stop_requests = StopRequests()
        super().__init__(*args, **kwargs)
        self.add_callback(self.stop_requests)
        if jit := self.pop_callback(JITCheckpointCallback):  # of `enable_jit_checkpoint`, which would end with status 0
            jit.on_train_end(self.args, self.state, self.control)  # gives the signal back

    # ---- signals and ranks ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; SIGTERM, SIGUSR1 and SIGINT end it with a checkpoint, as `hf_embed.stop` says.

        Raises:
            Stopped: a `SystemExit` after such a signal.
            InputError: another rank has ended, or does not answer; what else `ContrastiveTrainer` says.
        """
        with self.stop_requests, PeerWatch(), peers_in_one_line(self.args.ddp_timeout):
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _maybe_log_save_evaluate(
        self,
        tr_loss: Tensor,
        grad_norm: Tensor | float | None,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """Do what is due, and then stop if a signal says so."""
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=learning_rate
        )
        if number := self.stop_requests.due(self.state, self.control):
            self._stop(number, model, trial)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """Return the batches of a step; none after the last step, with which a run may have been stopped and resumed."""
        if self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _stop(self, number: int, model: nn.Module, trial: Any) -> None:
        """Save a checkpoint, if this step has none, and raise Stopped."""
        requests, step, folder = self.stop_requests, self.state.global_step, None
        requests.stopping = True
        if requests.saves:
            folder = Path(str(self.args.output_dir), f"{PREFIX_CHECKPOINT_DIR}-{step}")
            if requests.saved_step != step:
                self.watch.check(self.args, self.state, self.model, of_weights=True)
                self._save_checkpoint(model, trial)
                self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            logger.warning(how_to_go_on(number, step, folder and str(folder)))
        raise Stopped(number)

    # ---- gradients that are no numbers ----

    def _get_grad_norm(self, model: nn.Module, grad_norm: Tensor | float | None = None) -> Tensor | float | None:
        """Return the norm of the gradient of a step, which is the same on every rank, and let the watch see it."""
        norm = super()._get_grad_norm(model, grad_norm)
        scaled = self.accelerator.mixed_precision == "fp16"  # whose scaler leaves such steps out by itself
        self.watch.norm = None if scaled else whole_norm(norm)
        return norm


def whole_norm(norm: Tensor | float | None) -> Tensor | float | None:
    """Return a norm that FSDP has left in parts as a whole."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
