"""A Trainer that pushes only the model's own files, with the card of the output folder; see `hf_embed.checkpoint.hub`."""

from concurrent.futures import Future
from functools import partial
from typing import Any

from huggingface_hub import HfApi
from transformers import Trainer
from transformers.trainer_utils import HubStrategy

from hf_embed.checkpoint import hub
from hf_embed.checkpoint.card import card_facts, rename_card
from hf_embed.encoder import Encoder
from hf_embed.library_internals import PushInProgress, save_without_push


class HubTrainer(Trainer):
    """The part of `ContrastiveTrainer` that works with the Hub."""

    encoder: Encoder
    stopping = False  # True if a signal is ending the run: then nothing is pushed
    push_in_progress: PushInProgress | None = None  # type: ignore[assignment]  # Trainer sets it with the repository

    def __init__(self, *args: Any, **kwargs: Any):
        self.card_facts: dict[str, Any] = {}  # facts for the card, from create_model_card and push_to_hub
        super().__init__(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Create the repository before the first step, so that a name or token that the Hub refuses is known early."""
        wanted = {} if private is None else {"private": private}  # transformers has this parameter since version 5.23
        hub.init_repository(partial(super().init_hf_repo, token, **wanted), self.args)

    def push_to_hub(  # type: ignore[override]  # it takes nothing for Trainer's own card, and returns the commit's address
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **named: Any,
    ) -> str | Future[str] | None:
        """Save the model, and upload its own files to `args.hub_model_id`; see `hf_embed.checkpoint.hub`.

        Args:
            commit_message: the message of the commit.
            blocking: wait until the files are uploaded.
            token: a token of the Hub. Default: `args.hub_token`, or the one of the login.
            revision: the branch. Default: `args.hub_revision`, or the main branch.
            private: whether a new repository is private. Default: `args.hub_private_repo`.
            named: facts for the card, as in `create_model_card`.

        Returns:
            The address of the commit, a Future of it if `blocking` is False, or None on all ranks except the main process.
        """
        args = self.args
        self.card_facts |= card_facts(named)
        self.callback_handler.on_push_begin(args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token, private)
        save_without_push(self)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        private = args.hub_private_repo if private is None else private
        push = partial(
            hub.push_folder, str(args.output_dir), str(self.hub_model_id), bool(private),
            revision or args.hub_revision, commit_message=str(commit_message), token=token or args.hub_token,
        )  # fmt: skip
        return push() if blocking else HfApi().run_as_future(push)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint in the background, from a copy, because the checkpoint may be rotated away meanwhile."""
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END or self.stopping:
            return
        if self.push_in_progress is not None:
            if not self.push_in_progress.is_done() and not args.hub_always_push:
                return
            self._finish_current_push()
        self.callback_handler.on_push_begin(args, self.state, self.control)
        self.push_in_progress = hub.push_checkpoint(checkpoint_folder, str(self.hub_model_id), args, self.state.global_step)

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        hub.finish_push(self.push_in_progress, self.args)
        self.push_in_progress = None

    def create_model_card(self, **named: Any) -> None:  # type: ignore[override]  # by name alone, and not the trainer's own card
        """Add facts to the card that training does not know, and write README.md in `args.output_dir` again, if it exists.

        Args:
            named: language, license, tags, and further arguments of Trainer: model_name (the title), finetuned_from (the base
                model on the Hub), dataset (the name of the data) and dataset_tags (datasets on the Hub).

        Raises:
            InputError: if another argument is given.
        """
        self.card_facts |= card_facts(named)
        if self.is_world_process_zero():
            rename_card(self.encoder, str(self.args.output_dir), self.card_facts)
