"""Check with a few short texts that a new encoder computes one function in training, in inference and for a text alone.

The contract: the vector of a text depends only on this text, and every code path computes the same vector. Some architectures
break the contract: FNet, Nystromformer, Funnel and others read padding; Reformer and YOSO draw random hashes. The loss does not
show it, because it falls all the same. Therefore an encoder computes three texts of different lengths, without dropout, in
four ways:

1. each text alone, with every output of the tokenizer: the reference;
2. all texts in one padded batch;
3. all texts in one row without padding (`hf_embed.forward.packing`). If these vectors differ, the model is padded everywhere;
4. as in training: a flat batch, with gradients, and with the word table read once for all chunks.

The same passes measure two numbers that configurations state under many names, or wrongly: the width of the vectors, and the
number of tokens that the model has positions for.

The check runs when an `Encoder` is created. It runs again in `ContrastiveTrainer` and in `encode` if the model has changed
since: if it is on another kind of device, for example, or has adapters or TempScale now. It is skipped while weights are not
available: on FSDP ranks that still wait for them (the meta device), under ZeRO-3, and with flash attention before the model is
on a GPU. Weights in half precision are checked in float32, if there is memory for it. Quantized weights are compared with the
tolerance of bfloat16.

Shapes: N texts of T tokens, D numbers per vector.
"""

import contextlib
import functools
import inspect
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from hf_embed.adapters import base_of
from hf_embed.encoding import evaluating, on_cpu_by_default
from hf_embed.errors import InputError, first_line
from hf_embed.forward.exact import exact_products, in_float32
from hf_embed.forward.packing import Packable, after_padding, precision, rounds_to_half, row_size, ways_to_pack
from hf_embed.forward.word_table import Replaced, word_table
from hf_embed.library_internals import attention_backend, plain_attention
from hf_embed.pooling import Dense

if TYPE_CHECKING:
    from hf_embed.encoder import Encoder

TEXTS = [
    "The committee, which had met twice that week without agreeing on anything, postponed the vote once more.",
    "A cat sleeps on the warm windowsill.",
    "Rain.",
]
MOST_POSITIONS = 1024  # a row of texts longer than this is not tried
MOST_TOKENS = 16  # largest number of tokens of a text; it keeps the check quick on large models
# Largest allowed distance from the reference, relative to its norm. Half precision rounds differently in each batch shape.
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}
ORIGINAL = "original_max_position_embeddings"
Row = dict[str, list[int]]  # the outputs of a tokenizer for one text, by name


class Unequal(InputError):
    """A model computes other vectors in one way than in another."""


def measure(encoder: "Encoder") -> tuple[int, int | None, Packable | None]:
    """Check the forward pass of `encoder`, if possible with float32 weights, and measure it.

    Returns:
        The width of the vectors; the number of tokens that have positions, or None if there is no limit; and how the model can
        be packed, or None if it cannot.

    Raises:
        InputError: if the model cannot encode plain text; if its vectors depend on the other texts of a batch, on chance, or on
            outputs of its tokenizer other than the token ids; or if training would compute other vectors.
    """
    use_one_thread_after_fork()
    if not is_measurable(encoder.backbone):
        return encoder.config.hidden_size, stated_positions(encoder.config), None
    check_vocabulary(encoder)
    with in_float32(encoder) as changed:
        try:
            return run_passes(encoder)
        except Unequal:
            raise
        except (InputError, torch.OutOfMemoryError):
            if not changed:
                raise
    return run_passes(encoder)  # as the weights are, because the code of a model may need their data type


@functools.cache  # once in each process
def use_one_thread_after_fork() -> None:
    """Let processes that are forked from now on compute in one thread, as workers of a DataLoader do.

    The threads with which PyTorch computes on a CPU are not copied into a forked process, which would wait for them forever.
    """
    if sys.platform != "win32":
        os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def run_passes(encoder: "Encoder") -> tuple[int, int | None, Packable | None]:
    """Compute and compare the vectors of the texts in every way, and return what `measure` does.

    Raises:
        InputError: if the model cannot encode a text from its token ids.
        Unequal: if the vectors differ.
    """
    with undisturbed(encoder):
        try:
            return compute_passes(encoder)
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a model that needs other inputs than text may raise any error
            kind = type(encoder.base).__name__
            reason = first_line(error)
            raise InputError(
                f"{kind} cannot encode a text from its token ids ({type(error).__name__}: {reason}); use a text encoder"
            ) from error


def compute_passes(encoder: "Encoder") -> tuple[int, int | None, Packable | None]:
    """Do what `run_passes` describes; the encoder has to be in evaluation mode."""
    rows = probe_rows(encoder)
    flat = torch.tensor([token for row in rows for token in row["input_ids"]], device=encoder.device)
    lengths = [len(row["input_ids"]) for row in rows]
    lookups: list[tuple[Tensor, Tensor]] = []

    def lookup(input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        lookups.append((input, weight))
        return F.embedding(input, weight, *args, **kwargs)

    with torch.no_grad():
        with Replaced(F.embedding, lookup):
            reference = torch.cat([alone(encoder, row, row.keys()) for row in rows])
        batch = encoder(flat, lengths, packed=False)["embeddings"]
        encoder.packable = find_packable(encoder, flat, lengths, reference)
        attends = tokens_see_each_other(encoder, rows[-1]["input_ids"], flat)
        encoder.train()  # Reformer in training mode raises an error for most lengths
        encoder(flat, lengths)
        encoder.eval()
    # Weights that were cast or moved under `torch.inference_mode` cannot have gradients.
    with torch.set_grad_enabled(not any(parameter.is_inference() for parameter in encoder.parameters())):
        training = encoder(flat, lengths)["embeddings"].detach()
    check_passes(encoder, rows, reference, batch, training, attends)
    first = next(iter(encoder.dense), None)  # the first layer after the pooling, if there is one
    width = first.linear.in_features if isinstance(first, Dense) else reference.shape[-1]
    positions = table_of_positions(lookups, rows, word_table(encoder.base))
    return width, positions or stated_positions(encoder.config), encoder.packable


def find_packable(encoder: "Encoder", flat: Tensor, lengths: list[int], reference: Tensor) -> Packable | None:
    """Return how the model can be packed so that its vectors equal `reference`, (N, D); None if it cannot.

    A model that takes other arguments, or that adds something to the scores, may raise any error. It is padded then. It is also
    padded if it attends over the whole row under a mask of its own: this may be right, but it is slow. In the first check of a
    model with few positions, the texts are repeated, so that the row has more tokens than there are positions.

    In half precision, several ways may be within the tolerance. A later one is taken if it is at least twice as near.
    """
    stated = stated_positions(encoder.config) or 0
    positions = 0 if encoder.packable else stated
    times = 1 + (positions // len(flat) if positions <= MOST_POSITIONS else 0)
    odd = odd_neighbors(encoder)
    row, sizes = torch.cat([flat.repeat(times), *odd]), [*(lengths * times), *map(len, odd)]
    found, nearest = None, 2 * tolerance_of(encoder.backbone)
    queries: set[int] = set()  # how many are passed to PyTorch's attention at a time

    def attend(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        queries.add(query.shape[-2])
        return F.scaled_dot_product_attention(query, *args, **kwargs)

    for way in ways_to_pack(encoder.base):
        if nearest <= TOLERANCES[torch.float32]:
            break
        if way.numbering is after_padding and 0 < stated <= encoder.tokenizer.pad_token_id + MOST_TOKENS:
            continue  # there are no such positions, and a GPU would not recover from reading one
        encoder.packable = way
        queries.clear()
        try:
            with Replaced(F.scaled_dot_product_attention, attend):
                packed = encoder(row, sizes, chunk_tokens=len(row), packed=True)["embeddings"][: times * len(lengths)]
        except torch.OutOfMemoryError:
            raise
        except Exception:
            break
        distance = distances(packed, reference.repeat(times, 1)).max().item()
        if packed.isfinite().all() and distance < nearest / 2:
            found, nearest = None if row_size(len(row), row.device.type) in queries else way, distance
    return found


def odd_neighbors(encoder: "Encoder") -> list[Tensor]:
    """Return texts, (16,), that consist of mask tokens alone, or of padding tokens.

    They are the larger part of a packed row. So they show, in half precision too, whether a model scales all texts of a row by
    what some of its tokens are.
    """
    ids = 4 * [encoder.tokenizer.mask_token_id] + [encoder.tokenizer.pad_token_id]
    return [torch.full((MOST_TOKENS,), token, device=encoder.device) for token in ids if token is not None]


def check_passes(
    encoder: "Encoder", rows: list[Row], reference: Tensor, batch: Tensor, training: Tensor, attends: bool
) -> None:
    """Compare the vectors of the texts, all (N, D).

    Args:
        encoder: the encoder.
        rows: the texts.
        reference: each text alone, with every output of its tokenizer.
        batch: all texts in one padded batch, from their token ids.
        training: as in training.
        attends: whether tokens see each other.

    Raises:
        Unequal: if they differ by more than the precision of the weights explains, or if the tokens do not see each other.
    """
    tolerance = tolerance_of(encoder.backbone)
    problem = ""
    if differ(batch, reference, tolerance):
        problem = problem_of_batch(encoder, rows, reference)
    elif differ(training, reference, tolerance):
        problem = "the forward pass of training differs from that of encode; use another architecture"
    elif not attends:
        problem = (
            f"on this device ({encoder.device.type}) attention has no effect, because tokens do not see each other; use "
            "another device or architecture"
        )
    if problem:
        raise Unequal(f"{type(encoder.base).__name__}: {problem}")


@torch.no_grad()
def problem_of_batch(encoder: "Encoder", rows: list[Row], reference: Tensor) -> str:
    """Say why the vectors of a batch differ from the reference, (N, D): for lack of the tokenizer's other outputs, or not."""
    further = sorted({key for row in rows for key in row} - {"input_ids"})
    plain = torch.cat([alone(encoder, row, ()) for row in rows])
    if further and differ(plain, reference, tolerance_of(encoder.backbone)):
        return (
            f"its embeddings depend on the tokenizer's {', '.join(further)}, but only token ids are passed to the model; if it "
            "was trained without, set tokenizer.model_input_names = ['input_ids', 'attention_mask']"
        )
    return (
        "the embedding of a text depends on the other texts of its batch, or on chance (it differs in a padded batch); use "
        "another architecture"
    )


def influences(encoder: "Encoder", names: list[str]) -> list[str]:
    """Return the names, out of `names`, of the backbone's tensors that its embeddings depend on.

    A pooler that is not used is left out. Buffers are always returned, because the autograd graph does not contain them. If the
    model cannot be run here, all names are returned except those of a pooler.
    """
    backbone = encoder.backbone
    if not names:
        return []
    if not is_measurable(backbone):
        return sorted(name for name in names if "pooler" not in name)
    parameters = dict(backbone.named_parameters())
    frozen = [parameters[name] for name in names if name in parameters and not parameters[name].requires_grad]
    for parameter in frozen:  # the graph contains only tensors that require gradients
        parameter.requires_grad_(True)
    used = set().union(*touched(encoder))
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sorted(name for name in names if name not in parameters or parameters[name] in used)  # the rest are buffers


def touched(encoder: "Encoder") -> list[set[Tensor]]:
    """Return, for each of a few texts, the trainable parameters that its vector depends on.

    They are the leaves of the autograd graph behind the vector. No gradient is computed, so no gradient needs memory or
    changes.
    """
    with undisturbed(encoder), torch.enable_grad(), without_flash(encoder.backbone):
        return [leaves_of(alone(encoder, row, ())) for row in probe_rows(encoder)]


def leaves_of(vector: Tensor) -> set[Tensor]:
    """Return the leaves of the autograd graph behind a tensor."""
    nodes, seen, leaves = [vector.grad_fn], set(), set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):  # AccumulateGrad
            leaves.add(node.variable)
        nodes += [function for function, _ in node.next_functions]
    return leaves


def is_measurable(backbone: PreTrainedModel) -> bool:
    """Return whether all weights are available, on a device that can compute the model's attention."""
    parameters = list(backbone.parameters())
    if any(parameter.is_meta or parameter.numel() == 0 for parameter in parameters):
        return False
    return not lacks_kernel(backbone, parameters[0].device)


def lacks_kernel(backbone: PreTrainedModel, device: torch.device) -> bool:
    """Return whether the model has flash attention of the package flash_attn, and the device is a CPU."""
    return device.type == "cpu" and str(attention_backend(backbone.config)).startswith("flash_attention")


def check_kernel(backbone: PreTrainedModel, device: torch.device) -> None:
    """Raise InputError if the model cannot compute its attention on the device."""
    if lacks_kernel(backbone, device):
        raise InputError(
            f"{attention_backend(backbone.config)} needs a GPU, but the model computes on the CPU; move it to a GPU with "
            '.to("cuda"), or load it with attn_implementation sdpa'
        )


def without_flash(backbone: PreTrainedModel) -> AbstractContextManager:
    """Return a context in which a model has no flash attention, which needs a GPU and rounds to half precision."""
    base = base_of(backbone)
    return plain_attention(base) if "flash" in str(attention_backend(base.config)) else nullcontext()


def probe_rows(encoder: "Encoder") -> list[Row]:
    """Tokenize the texts, truncated to few tokens. Keep the outputs of the tokenizer that the model's forward accepts by name.

    The first text contains the padding token, and the second the mask token, because users' texts may contain them too: RoBERTa
    gives padding no position, and ESM scales all tokens of a row by its share of mask tokens.
    """
    taken = inspect.signature(encoder.base.forward).parameters

    def takes(key: str) -> bool:  # a forward with only *args and **kwargs shows no names
        return key in taken or "input_ids" not in taken

    max_length = min(MOST_TOKENS, stated_positions(encoder.config) or MOST_TOKENS)
    rows = []
    for text in TEXTS:
        found = encoder.tokenizer(text, truncation=True, max_length=max_length)
        rows.append({key: list(value) for key, value in found.items() if takes(key) and key != "attention_mask"})
    ids = rows[0]["input_ids"]
    ids[len(ids) // 2] = encoder.tokenizer.pad_token_id
    if encoder.tokenizer.mask_token_id is not None and (ids := rows[1]["input_ids"]):
        ids[len(ids) // 2] = encoder.tokenizer.mask_token_id
    return [row for row in rows if row["input_ids"]]


def alone(encoder: "Encoder", row: Row, keys: Iterable[str]) -> Tensor:
    """Return the vector (1, D) of one text, from its token ids and the outputs of the tokenizer that `keys` names."""
    inputs = {key: torch.tensor([row[key]], device=encoder.device) for key in ("input_ids", *keys)}
    ids = inputs.pop("input_ids")
    return encoder.embed(ids, torch.ones_like(ids), None, **inputs)


def tokens_see_each_other(encoder: "Encoder", ids: list[int], others: Tensor) -> bool:
    """Return whether the hidden state of the last token changes with the first token.

    Without its CUDA kernel, the attention of MRA is zero, so tokens do not see each other.
    """
    another = others[others != ids[0]][:1].tolist()
    if len(ids) < 2 or not another:
        return True
    pair = torch.tensor([ids, [*another, *ids[1:]]], device=encoder.device)
    with precision(encoder.base):
        states = encoder.backbone(input_ids=pair, attention_mask=torch.ones_like(pair))[0]
    return not torch.equal(states[0, -1], states[1, -1])


def distances(vectors: Tensor, reference: Tensor) -> Tensor:
    """Return the distance (N,) of each vector from its reference, both (N, D), relative to the norm of the reference.

    It is NaN if one of them contains NaN, and 0 if both do. It is computed on the CPU, because Apple's GPU has no float64.
    """
    vectors, reference = vectors.cpu().double(), reference.cpu().double()
    distance = (vectors - reference).norm(dim=-1) / reference.norm(dim=-1).clamp(min=1e-12)
    return distance.masked_fill(vectors.isnan().any(-1) & reference.isnan().any(-1), 0)


def differ(vectors: Tensor, reference: Tensor, tolerance: float) -> bool:
    """Return whether any of the vectors (N, D) is farther from its reference than `tolerance`, or only one of them has NaN."""
    return not bool((distances(vectors, reference) <= tolerance).all())


def tolerance_of(backbone: PreTrainedModel) -> float:
    """Return the largest relative difference that the precision of the weights and of the attention explains."""
    dtypes = {parameter.dtype for parameter in backbone.parameters()}
    dtypes |= {torch.bfloat16} if rounds_to_half(base_of(backbone)) else set()
    return max(TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]) for dtype in dtypes)


@contextlib.contextmanager
def undisturbed(encoder: "Encoder") -> Iterator[None]:
    """Turn dropout off and compute float32 products exactly inside a `with` block, also under the caller's autocast.

    Afterwards the training modes, the random states and the precision of products are as before. Inside, gradients can be
    computed also if the caller is in inference mode.
    """
    kind = encoder.device.type
    devices = [encoder.device] if kind == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        exact_products(),
        torch.autocast(kind, enabled=False),
        torch.inference_mode(False),
        evaluating(encoder),
        on_cpu_by_default(),
    ):
        yield


def check_vocabulary(encoder: "Encoder") -> None:
    """Check that the tokenizer can belong to this model.

    Raises:
        InputError: if the tokenizer has no vocabulary, or has token ids for which the model's word table has no rows.
    """
    tokenizer, table = encoder.tokenizer, word_table(encoder.base)
    kind = type(tokenizer).__name__
    added = tokenizer.added_tokens_decoder
    if len(tokenizer) <= len(added):
        raise InputError(
            f"the tokenizer ({kind}) has no vocabulary except {len(tokenizer)} special tokens: its files (tokenizer.json, "
            "vocab.txt, spiece.model ...) are missing; save the model's tokenizer beside its weights"
        )
    if table is None:
        return
    rows = table.weight.shape[0]
    if max(len(tokenizer) - 1, *added, 0) >= rows:
        largest = max(tokenizer.get_vocab().values())
        if largest >= rows:
            raise InputError(
                f"the tokenizer has token ids up to {largest}, but the model's embedding table has {rows} rows; use the "
                "model's own tokenizer, or call model.resize_token_embeddings(len(tokenizer)) and train"
            )


def stated_positions(config: PretrainedConfig) -> int | None:
    """Return the number of positions that a configuration states, or None if it states none.

    A model with "longrope" takes other frequencies for all texts of a batch if one of them has more tokens than the model was
    first trained on. So it is used up to this number of tokens only.
    """
    stated = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}  # for all layers, or a table for each type of layers
    for table in (rope, *(entry for entry in rope.values() if isinstance(entry, dict))):
        if table.get("rope_type") == "longrope":
            stated += [table.get(ORIGINAL), getattr(config, ORIGINAL, None)]
    return min((number for number in stated if isinstance(number, int) and number > 0), default=None)


def table_of_positions(lookups: list[tuple[Tensor, Tensor]], rows: list[Row], words: nn.Embedding | None) -> int | None:
    """Return the number of tokens that the table of positions has rows for; None if no such table was read.

    The indices show which table holds positions: a text of T tokens reads its rows i, i + 1, ..., i + T - 1. The first i rows
    are reserved. For example, RoBERTa's table has 514 rows and i = 2, so a text may have 512 tokens.

    Args:
        lookups: the indices and the table of each lookup of the reference pass.
        rows: the texts.
        words: the table of token embeddings.
    """
    tokens = sorted(len(row["input_ids"]) for row in rows)[-2]  # the longest text has a padding token: maybe no position
    found = []
    for indices, table in lookups:
        if words is not None and table is words.weight or indices.dim() > 2 or indices.dim() == 2 and len(indices) > 1:
            continue
        first, *following = indices.flatten()[:tokens].tolist()
        if 1 + len(following) == tokens > 3 and following == list(range(first + 1, first + tokens)):
            found.append(len(table) - first)
    return min(found, default=None)
