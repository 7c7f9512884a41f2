"""Upload a finished model to the Hub.

    python recipes/push.py outputs/sup_simcse_bert_base my-embeddings
    python recipes/push.py outputs/mine my-company/embeddings --private --revision v2 --commit_message "Trained on May's clicks"
    python recipes/push.py outputs/mine my-company/embeddings --create_pr

Run `hf auth login` once before. Uploaded are the weights, the tokenizer, the card and results.json; a broken push is finished
by the same command.
"""

import sys
from dataclasses import dataclass, field

from hf_embed import Encoder
from hf_embed.checkpoint.card import write_card
from hf_embed.checkpoint.hub import push_folder
from hf_embed.entry import recipe_command
from hf_embed.errors import InputError
from hf_embed.kit.cli import parse, run
from hf_embed.kit.plan import TRUST


@dataclass
class Arguments:
    """All flags; the folder and the repository stand before them."""

    private: bool = field(default=False, metadata={"help": "Of a repository that is made."})
    revision: str | None = field(default=None, metadata={"help": "A branch; made if it is not there."})
    create_pr: bool = field(default=False, metadata={"help": "Open a pull request."})
    commit_message: str = field(default="Upload the model")
    new_card: bool = field(default=False, metadata={"help": "Make README.md anew, even if someone has edited it."})
    trust_remote_code: bool = field(default=False, metadata={"help": f"Of --new_card. {TRUST}"})
    everything: bool = field(default=False, metadata={"help": "Checkpoints, optimizer state and logs too."})


def main() -> None:
    """Upload a folder."""
    words = sys.argv[1:]
    if len(words) < 2 or words[0].startswith("-") or words[1].startswith("-"):
        if "--help" not in words:
            raise InputError(f"say what goes where: {recipe_command('push')} FOLDER REPO")
        words = ["", "", *words]
    folder, repo, *words = words
    (args,) = parse([Arguments], argv=words)
    if args.new_card:
        write_card(Encoder.from_pretrained(folder, trust_remote_code=args.trust_remote_code), folder, overwrite=True)
    address = push_folder(
        folder, repo, private=args.private, revision=args.revision, create_pr=args.create_pr,
        commit_message=args.commit_message, everything=args.everything,
    )  # fmt: skip
    print(address)


if __name__ == "__main__":
    run(main)
