"""Find parameters that no embedding depends on, and freeze them.

Examples are BERT's pooler under mean pooling, Longformer's global attention and LUKE's entities. DDP waits for a gradient of
every trainable parameter, and these parameters never get one. To find them, a few texts are embedded once, without dropout. The
autograd graph of this computation contains the parameters that took part. With two texts:

    parameter           in the graph of
    embeddings.weight   both texts        it is trained
    experts.0.weight    the first text    another batch may not use it: DDP has to look for unused parameters in every step
    experts.3.weight    no text           another batch may use it, because another module of its list took part: the same
    pooler.weight       no text           it is frozen

DDP looks for unused parameters (`ddp_find_unused_parameters`) also if whole layers are dropped at random in training
(`layerdrop`).
"""

import logging
from collections.abc import Iterable
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PretrainedConfig, TrainingArguments

from hf_embed.distributed import gather_objects
from hf_embed.encoder import Encoder
from hf_embed.errors import listed
from hf_embed.forward.check import touched

logger = logging.getLogger(__name__)

# The parameters that were frozen here, by name. Another training of the same model may use them.
FROZEN: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def freeze_unused(encoder: Encoder, args: TrainingArguments) -> None:
    """Freeze the backbone's parameters that no embedding depends on, or let DDP find those that a batch does not use.

    This sets `requires_grad` of parameters and `args.ddp_find_unused_parameters`. Gradients, random states and training modes
    do not change. Weights that are not in memory yet, or only in part (FSDP with `cpu_ram_efficient_loading`, ZeRO-3), are not
    examined, because sharded training does not wait for missing gradients.
    """
    frozen = FROZEN.pop(encoder.backbone, [])
    for name, parameter in encoder.backbone.named_parameters():
        if name in frozen:
            parameter.requires_grad_(True)
    trainable = {name: p for name, p in encoder.backbone.named_parameters() if p.requires_grad}
    sharded = any(p.is_meta or hasattr(p, "ds_id") for p in encoder.backbone.parameters())
    if any(gather_objects(sharded)) or not trainable:
        return
    by_text = [{name for name, p in trainable.items() if p in reached} for reached in touched(encoder)]
    # Random weights may differ between ranks until DDP makes them equal, so the ranks' results are joined: all freeze the same.
    by_text = [names for of_rank in gather_objects(by_text) for names in of_rank]
    used: set[str] = set().union(*by_text)
    unused = [name for name in trainable if name not in used]
    others = used_by_others(unused, used, encoder.backbone)
    never = [name for name in unused if name not in others]
    sometimes = others + [name for name in trainable if 0 < sum(name in names for names in by_text) < len(by_text)]
    for name in never:
        trainable[name].requires_grad_(False)
    FROZEN[encoder.backbone] = never
    if never:
        numbers = sum(trainable[name].numel() for name in never)
        logger.info(
            f"{len(never)} parameters ({numbers:,} numbers) do not affect the embedding and are frozen: {listed(never)}"
        )
    if sometimes or drops_layers(encoder.config):
        args.ddp_find_unused_parameters = True
        reason = f"not every batch uses all parameters ({listed(sometimes)})" if sometimes else "layers are dropped at random"
        logger.info(f"{reason}: ddp_find_unused_parameters is set to True")


def used_by_others(unused: Iterable[str], used: Iterable[str], model: nn.Module) -> list[str]:
    """Return the unused parameters that have the same place as a used one in another module of a list of modules.

    For example, "experts.3.weight" is returned if "experts.0.weight" is used.
    """
    lists = {name for name, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)}

    def places(name: str) -> set[tuple[str, str]]:
        words = name.split(".")
        cuts = [(".".join(words[:i]), ".".join(words[i + 1 :])) for i in range(1, len(words))]
        return {(before, after) for before, after in cuts if before in lists}

    taken = set().union(*map(places, used))
    return [name for name in unused if places(name) & taken]


def drops_layers(config: PretrainedConfig) -> bool:
    """Return whether whole layers are left out at random in training (layerdrop, encoder_layerdrop and so on)."""
    return any("layerdrop" in key and value for key, value in config.to_dict().items())
