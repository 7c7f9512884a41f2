"""Upload a trained model to the Hugging Face Hub.

    python recipes/push.py outputs/sup_simcse_bert_base my-embeddings
    python recipes/push.py outputs/mine my-company/embeddings --private --revision v2 --commit_message "Trained on May's clicks"
    python recipes/push.py outputs/mine my-company/embeddings --create_pr

Run `hf auth login` once before the first upload. The recipe uploads the weights, the tokenizer, the model card and results.json
and prints the address of the commit. If an upload fails, the same command completes it.
"""

from dataclasses import dataclass, field

from hf_embed import Encoder
from hf_embed.checkpoint.card import write_card
from hf_embed.checkpoint.hub import push_folder
from hf_embed.kit.cli import parse, run
from hf_embed.kit.plan import TRUST


@dataclass
class Arguments:
    """Flags of this recipe."""

    folder: str = field(metadata={"help": "The finished model.", "positional": True, "metavar": "FOLDER"})
    repo: str = field(metadata={"help": "NAME, or OWNER/NAME; made if it is not there.", "positional": True, "metavar": "REPO"})
    private: bool = field(default=False, metadata={"help": "Of a repository that is made."})
    revision: str | None = field(default=None, metadata={"help": "A branch; made if it is not there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})
    commit_message: str = field(default="Upload the model", metadata={"help": "What the commit is called."})
    new_card: bool = field(default=False, metadata={"help": "Make README.md anew, even if someone has edited it."})
    trust_remote_code: bool = field(default=False, metadata={"help": f"Of --new_card. {TRUST}"})
    everything: bool = field(default=False, metadata={"help": "Checkpoints, optimizer state and logs too."})


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
