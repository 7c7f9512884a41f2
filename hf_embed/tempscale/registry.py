"""Register which numbers of an attention class, if divided by t, divide all its scores by t.

In most models that is the output of one submodule: the query projection, or the norm that follows it. The scores are the
products of this output with the keys. Everything else that enters the scores has to be divided too: a table of position biases
(T5, MPNet), the queries of positions (DeBERTa), the cap c that tanh puts on scores (Gemma 2):

    c tanh(s / c) / t = (c / t) tanh((s / t) / (c / t))

A class is one line here. A user registers another class by one line in a script:

    register_tempscale("MyAttention", query="q_proj")

A class without a line can still be scaled, but not folded, if it leaves its scores to transformers' attention interface. Then
the `scaling` that it passes to the interface is divided, on any backend.

Shapes: `width` is the size of the last dimension of a submodule's output.
"""

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_embed.errors import InputError

# Words in the name of a submodule that mark it as cross-attention.
CROSS = ("crossattention", "cross_attn", "encoder_attn", "encdecattention")


# (attention, width, device) -> mask (width,), True where the last dimension of an output is divided.
Part = Callable[[nn.Module, int, torch.device], Tensor]


@dataclass(frozen=True)
class Handler:
    """What the temperature divides in an attention module; see `register_tempscale`."""

    query: tuple[str, ...]
    part: Part | None = None
    norm_offset: float = 0.0
    bias_table: str | None = None
    attribute: str | None = None


Attentions = dict[str, tuple[nn.Module, Handler]]  # the attention modules of a model and their handlers, by name
HANDLERS: dict[str, Handler] = {}


def register_tempscale(
    attention: type | str,
    *,
    query: str | tuple[str, ...],
    part: Part | None = None,
    norm_offset: float = 0.0,
    bias_table: str | None = None,
    attribute: str | None = None,
) -> None:
    """Register an attention class for TempScale, for example `register_tempscale("MyAttention", query="q_proj")`.

    Args:
        attention: the class, or its name; "modeling_deberta.Name" if several models have a class of this name.
        query: submodules whose outputs are divided: the query projection, or the norm that follows it.
        part: for a fused projection, which outputs queries, keys and values: `part(attention, width, device)` returns a mask
            (width,), True where the output is divided.
        norm_offset: the norm multiplies by norm_offset + weight; it is 1 for the norms of Gemma.
        bias_table: the name of an embedding of position biases that are added to the scores. It may belong to each attention,
            or exist once for all layers.
        attribute: a number of the attention module that is divided too; it has the same name in the model's config.
    """
    name = attention if isinstance(attention, str) else f"{attention.__module__.rpartition('.')[2]}.{attention.__name__}"
    HANDLERS[name] = Handler((query,) if isinstance(query, str) else tuple(query), part, norm_offset, bias_table, attribute)


# The handler of attention classes that are not registered; see `hands_over_scaling`.
INTERFACE = Handler(query=(), attribute="scaling")


# The arguments that such a class may pass to the attention interface. None of them adds to the scores or caps them.
HANDED_OVER = {"attention_mask", "scaling", "dropout", "is_causal", "sliding_window", "position_ids", "output_attentions", None}


@functools.cache
def hands_over_scaling(kind: type[nn.Module]) -> bool:
    """Return whether the scores of an attention class are queries times keys times its `scaling`, and nothing else.

    This holds if the class calls transformers' attention interface exactly once, with `scaling=self.scaling`; uses
    `self.scaling` nowhere else; passes only arguments in `HANDED_OVER`; mentions no position bias, cap or sink; and passes its
    mask on unchanged. A mask that the attention computes itself may contain a bias, as in Doge, which would have to be divided
    by the temperature too.
    """
    try:
        forward = inspect.getsource(inspect.unwrap(kind.forward))
        function = ast.parse(textwrap.dedent(forward)).body[0]
    except (OSError, TypeError, SyntaxError):  # the source is not available
        return False
    if not isinstance(function, ast.FunctionDef):
        return False
    calls = [n for n in ast.walk(function) if isinstance(n, ast.Call) and any(k.arg == "scaling" for k in n.keywords)]
    once = forward.count("self.scaling") == forward.count("scaling=self.scaling") == len(calls) == 1
    if not once or "ALL_ATTENTION_FUNCTIONS" not in forward or re.search("position_bias|softcap|sinks|s_aux", forward):
        return False
    call = calls[0]
    masks = [*call.args[4:], *(k.value for k in call.keywords if k.arg == "attention_mask")]  # after self, q, k and v
    return {k.arg for k in call.keywords} <= HANDED_OVER and all(is_given(mask, function) for mask in masks)


def is_given(mask: ast.expr, function: ast.FunctionDef) -> bool:
    """Return whether a mask is given to the function, and not computed there.

        attention_mask                                       given, if it is an argument of the function
        None                                                 given
        mask = attention_mask if self.causal else None       `mask` is given
        mask = attention_mask + bias                         `mask` is computed

    The source of the function decides, and nothing is run.
    """
    arguments = {argument.arg for argument in (*function.args.args, *function.args.kwonlyargs)}

    def is_choice(value: ast.expr) -> bool:
        if isinstance(value, ast.IfExp):
            return is_choice(value.body) and is_choice(value.orelse)
        return value.id in arguments if isinstance(value, ast.Name) else isinstance(value, ast.Constant) and value.value is None

    names = {node.id for node in ast.walk(mask) if isinstance(node, ast.Name)}
    stores = [n for n in ast.walk(function) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store) and n.id in names]
    chosen = [t for n in ast.walk(function) if isinstance(n, ast.Assign) and is_choice(n.value) for t in n.targets]
    return is_choice(mask) and all(store in chosen for store in stores)


def is_cross(name: str) -> bool:
    """Return whether the name of a submodule marks it as cross-attention, that is, attention to another text."""
    return any(word in name.lower() for word in CROSS)


def handler_of(module: nn.Module) -> Handler | None:
    """Return the handler of an attention module; None for a module that is not a known attention."""
    name = type(module).__name__
    known = HANDLERS.get(f"{type(module).__module__.rpartition('.')[2]}.{name}") or HANDLERS.get(name)
    if known is None and "attention" in name.lower() and hands_over_scaling(type(module)):  # type: ignore[arg-type]
        return INTERFACE
    return known


def attentions(model: nn.Module) -> Attentions:
    """Return the self-attention modules of a model by name, in the order of its layers. A shared module counts once.

    Raises:
        InputError: if an attention class is unknown (the message names it). To scale only part of a model would be a silent
            error.
    """
    found: Attentions = {}
    others: dict[str, str] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if is_cross(name) or "cross" in kind.lower():
            continue
        if handler := handler_of(module):
            found[name] = module, handler
        elif "attention" in kind.lower() and any(True for _ in module.parameters()):
            others[name] = kind
    for name, kind in others.items():  # a frame around an attention, or a part of a known one, is fine
        inner = any(other.startswith(f"{name}.") for other in [*found, *others])
        if not inner and not any(name.startswith(f"{known}.") for known in found):
            raise InputError(unsupported(model, kind))
    if not found:
        raise InputError(unsupported(model, None))
    return found


def unsupported(model: nn.Module, kind: str | None) -> str:
    """Return the error message for a model with an attention of this class, or without attention, and how to solve it."""
    what = f"its attention is a {kind}" if kind else "no attention was found in it"
    return (
        f"TempScale does not support {type(model).__name__}: {what}; if its scores are queries times keys, with nothing added "
        "except a mask, and a submodule outputs the queries, register it: "
        f"register_tempscale('{kind or 'ITS_ATTENTION_CLASS'}', query='q_proj')"
    )


def first_third(attention: nn.Module, width: int, device: torch.device) -> Tensor:
    """Return a mask of the query columns in a fused QKV projection with the order queries | keys | values."""
    return torch.arange(width, device=device) < width // 3


def keys_of_heads(attention: nn.Module, width: int, device: torch.device) -> Tensor:
    """Return a mask of the key columns in a projection that is fused head by head, with queries | keys | values of each head.

    If the projection is only as wide as all heads together, it outputs only keys, and the mask is True everywhere.
    """
    sizes: Any = attention
    if width == sizes.all_head_size:
        return torch.ones(width, dtype=torch.bool, device=device)
    return torch.arange(width, device=device) // sizes.attention_head_size % 3 == 1


for name in ("Bert", "Roberta", "RobertaPreLayerNorm", "XLMRoberta", "XLMRobertaXL", "Camembert", "Electra"):
    register_tempscale(f"{name}SelfAttention", query="query")
register_tempscale("AlbertAttention", query="query")
register_tempscale("DistilBertSelfAttention", query="q_lin")
for name in ("NomicBert", "Gte", "EuroBert", "JinaEmbeddingsV3", "Llama", "Mistral", "Qwen2", "Gemma"):
    register_tempscale(f"{name}Attention", query="q_proj")
register_tempscale("Gemma2Attention", query="q_proj", attribute="attn_logit_softcapping")
# The norm after the projection would cancel a division before it, so the output of the norm is divided.
register_tempscale("Qwen3Attention", query="q_norm")
register_tempscale("EmbeddingGemma2Attention", query="q_norm")
register_tempscale("Gemma3Attention", query="q_norm", norm_offset=1.0, attribute="attn_logit_softcapping")
register_tempscale("ModernBertAttention", query="Wqkv", part=first_third)
for name in ("T5", "MT5", "UMT5"):
    register_tempscale(f"{name}Attention", query="q", bias_table="relative_attention_bias")
register_tempscale("MPNetSelfAttention", query="q", bias_table="relative_attention_bias")
register_tempscale("modeling_deberta_v2.DisentangledSelfAttention", query=("query_proj", "pos_query_proj"))
# DeBERTa adds a bias to the queries after the projection, so the keys are divided instead.
register_tempscale("modeling_deberta.DisentangledSelfAttention", query=("in_proj", "pos_proj"), part=keys_of_heads)
