"""Score triplets, labeled pairs and reranking candidates on all ranks, and record which texts each rank encodes.

python tests/worker_evaluators.py FOLDER     each rank writes FOLDER/RANKS-RANK.json
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from hf_embed import PairClassification, Reranking, Triplets
from hf_embed.distributed import get_rank, get_world_size
from hf_embed.evaluation.tasks import score_tasks

TEXTS = [f"text {i}" for i in range(23)]
TASKS = {
    "t": Triplets(TEXTS[:7], TEXTS[7:14], TEXTS[14:21]),
    "p": PairClassification(TEXTS, TEXTS[::-1], [i % 3 == 0 for i in range(23)]),
    "r": Reranking([{"query": TEXTS[i], "positive": TEXTS[i + 1 : i + 3], "negative": TEXTS[i + 3 : i + 9]} for i in range(9)]),
}


def vectors(texts: list[str]) -> torch.Tensor:
    """Return random vectors, always the same one for the same text."""
    return torch.tensor(np.stack([np.random.default_rng(zlib.crc32(text.encode())).normal(size=8) for text in texts]))


def main(folder: str) -> None:
    encoded: list[tuple[str | None, str]] = []

    def embed(texts: list[str], prompt_name: str | None = None) -> torch.Tensor:
        encoded.extend((prompt_name, text) for text in texts)
        return vectors(texts)

    found = {"scores": score_tasks(TASKS, embed), "encoded": encoded}
    Path(folder, f"{get_world_size()}-{get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    PartialState()  # initializes the process group
    main(sys.argv[1])
    PartialState().destroy_process_group()
