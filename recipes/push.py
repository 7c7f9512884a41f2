"""Upload a trained model to the Hugging Face Hub.

    python recipes/push.py outputs/sup_simcse_bert_base my-embeddings
    python recipes/push.py outputs/mine my-company/embeddings --private --revision v2 --commit_message "Trained on May's clicks"
    python recipes/push.py outputs/mine my-company/embeddings --create_pr

Run `hf auth login` once before the first upload. The recipe uploads the weights, the tokenizer, the model card and results.json
and prints the address of the commit. If an upload fails, the same command completes it.
"""

from dataclasses import dataclass

from hf_embed import Encoder
from hf_embed.checkpoint.card import write_card
from hf_embed.checkpoint.hub import push_folder
from hf_embed.kit.cli import REQUIRED, parse, run, setting
from hf_embed.kit.plan import TRUST


@dataclass
class Arguments:
    """Flags of this recipe."""

    folder: str = setting(REQUIRED, "Folder of the finished model.", positional=True, metavar="FOLDER")
    repo: str = setting(
        REQUIRED, "NAME or OWNER/NAME of the repository; it is created if it does not exist.", positional=True, metavar="REPO"
    )
    private: bool = setting(False, "Make the repository private if it is new.")
    revision: str | None = setting(None, "Branch to upload to; it is created if it does not exist. Default: the main branch.")
    create_pr: bool = setting(False, "Open a pull request.")
    commit_message: str = setting("Upload the model", "Message of the commit.")
    new_card: bool = setting(False, "Rewrite README.md, even if someone has edited it.")
    trust_remote_code: bool = setting(False, f"With --new_card: {TRUST[0].lower()}{TRUST[1:]}")
    everything: bool = setting(False, "Also upload checkpoints, optimizer state and logs.")


def main() -> None:
    """Rewrite the card if --new_card is given, upload the folder, and print the address."""
    (args,) = parse([Arguments])
    if args.new_card:
        write_card(Encoder.from_pretrained(args.folder, trust_remote_code=args.trust_remote_code), args.folder, overwrite=True)
    address = push_folder(
        args.folder, args.repo, private=args.private, revision=args.revision, create_pr=args.create_pr,
        commit_message=args.commit_message, everything=args.everything,
    )  # fmt: skip
    print(address)


if __name__ == "__main__":
    run(main)
