"""GTE, stage 1: pairs from many sources, a very large batch, the improved contrastive loss.

    python recipes/gte_pretrain.py                    # offline, on a laptop CPU, in a few minutes
    accelerate launch --config_file recipes/accelerate/ddp_8gpu.yaml recipes/gte_pretrain.py \
        --config recipes/configs/gte_pretrain_base.yaml --sources sources.yaml
    python recipes/gte_pretrain.py --sources sources.yaml --eval_retrieval_dir scifact=beir/scifact \
        --directions query_to_doc                                # the same with the vanilla in-batch loss

hf_embed/data/mixture.py shows a file of sources. Without arguments the sources are the docstrings of the Python packages that
are installed on this machine, and the built-in encoder learns to search them: outputs/docstrings has the files.
"""

from pathlib import Path

from accelerate import PartialState

from hf_embed.kit.cli import run
from hf_embed.kit.docstrings import write_sources
from hf_embed.kit.finetune import run_gte

DATA = Path("outputs/docstrings")


def docstrings(_: str | None) -> tuple[str, list[str]]:
    """Collect pairs from the installed packages; -> the file of sources and the evaluation sets."""
    state = PartialState()
    if state.is_main_process:
        found = write_sources(DATA)
        print(", ".join(f"{count:,} {what}" for what, count in found.items()), f"from docstrings, in {DATA}")
    state.wait_for_everyone()
    return str(DATA / "sources.yaml"), [f"doc_search={DATA}/doc_search", f"code_search={DATA}/code_search"]


def main() -> None:
    run_gte("gte_pretrain", Path(__file__).with_name("configs") / "gte_pretrain_quickstart.yaml", docstrings)


if __name__ == "__main__":
    run(main)
