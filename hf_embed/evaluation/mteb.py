"""MTEB (https://arxiv.org/abs/2210.07316) on an `Encoder`. `mteb.evaluate` of mteb 2 accepts the encoder directly.

`Encoder.encode` accepts the batches of mteb, and `prompt_type` selects the encoder's own prompt "query" or "document".
`mteb_model_meta` describes the model. Without it, mteb would drop the encoder and keep only an empty description.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_embed.adapters import count_parameters
from hf_embed.fingerprint import fingerprint

if TYPE_CHECKING:
    from mteb.abstasks.task_metadata import TaskMetadata
    from mteb.models.model_meta import ModelMeta
    from mteb.types import PromptType

    from hf_embed.encoder import Encoder


def texts_and_prompt(
    batches: Iterable[Any],
    prompt_type: "PromptType | None",
    prompts: dict[str, str],
    task_metadata: "TaskMetadata | None" = None,
) -> tuple[list[str], str | None]:
    """Return all texts of mteb's batches ({"text": [...]} each), and the name of the prompt to put before the texts.

    By the rules of mteb, a prompt named after the task or its type is preferred to "query" and "document".

    >>> texts_and_prompt([{"text": ["a cat", "a dog"]}, {"text": ["rain"]}], None, {})
    (['a cat', 'a dog', 'rain'], None)
    """
    texts = [text for batch in batches for text in batch["text"]]
    name = getattr(prompt_type, "value", prompt_type)
    if prompts and task_metadata is not None:
        from mteb.models.abs_encoder import get_prompt_name

        name = get_prompt_name(prompts, task_metadata, prompt_type) or name
    return texts, name


def model_meta(encoder: "Encoder") -> "ModelMeta":
    """Return mteb's ModelMeta of an encoder. mteb stores the results under its name and revision."""
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    name = encoder.config.name_or_path or type(encoder.base).__name__
    if Path(name).exists() or name.count("/") != 1:  # mteb requires the form OWNER/NAME
        name = f"local/{Path(name).resolve().name if Path(name).exists() else name.replace('/', '-')}"
    about = {
        "name": name,
        "revision": fingerprint(encoder),
        "n_parameters": count_parameters(encoder),
        "max_tokens": encoder.max_length,
        "embed_dim": encoder.dimension,
        "framework": ["PyTorch"],
        "similarity_fn_name": ScoringFunction(encoder.similarity_fn_name),
        "use_instructions": any(encoder.prompts.values()),
    }
    return ModelMeta.create_empty(about)
