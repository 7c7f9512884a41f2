"""Masked language modeling (MLM) as an auxiliary loss of SimCSE, loss + mlm_weight * loss_MLM.

It is described in appendix A of SimCSE (https://arxiv.org/abs/2104.08821), with results in table D.2. The masking is that of
BERT (Devlin et al., 2019). `hf_embed.step` computes the loss, and the trainer adds it. It is the mean over the masked tokens of
all ranks, where the released code of SimCSE takes the mean on each rank.

Shapes: S tokens of a flat batch; D numbers per hidden state.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_embed.adapters import has_adapters
from hf_embed.encoder import Encoder
from hf_embed.errors import InputError
from hf_embed.forward.packing import copy_to


def split_masked_lm(model: PreTrainedModel | Encoder | None) -> tuple[PreTrainedModel, nn.Module]:
    """Return the backbone of an `AutoModelForMaskedLM` and its head: hidden states (M, D) of M tokens to logits (M, words).

    Raises:
        InputError: if the model has no such head, or has PEFT adapters, because the auxiliary loss trains the whole model.
    """
    if model is not None and has_adapters(model.backbone if isinstance(model, Encoder) else model):
        raise InputError("mlm_weight trains all weights and cannot be combined with PEFT adapters; remove one of them")
    head = getattr(model, "cls", None) or getattr(model, "lm_head", None)
    judges_pairs = hasattr(head, "seq_relationship")  # as in BertForPreTraining; such a head needs pooled vectors too
    if not isinstance(head, nn.Module) or isinstance(head, nn.Linear) or judges_pairs or not hasattr(model, "base_model"):
        raise InputError(
            f"mlm_weight needs a model with a masked-language-modeling head of the BERT or RoBERTa kind; "
            f"{type(model).__name__} has none: load AutoModelForMaskedLM, or set mlm_weight to 0"
        )
    return model.base_model, head  # type: ignore[union-attr,return-value]  # a model with a head is not None


def check_mask_token(tokenizer: PreTrainedTokenizerBase, user: str) -> None:
    """Raise InputError if a tokenizer has no mask token; `user` is what needs it."""
    if tokenizer.mask_token_id is None:
        raise InputError(f"{user} masks tokens, but the tokenizer has no mask token; set tokenizer.mask_token and save it")


def mask_tokens(input_ids: Tensor, tokenizer: PreTrainedTokenizerBase, share: float = 0.15) -> tuple[Tensor, Tensor]:
    """Return masked ids and labels, both (S,), of token ids (S,), by the rule of BERT.

    A token is chosen with probability `share`. Of the chosen tokens, 80% become [MASK], 10% become a random token, and 10%
    stay. The label of a chosen token is its id; all other labels are -100. Special tokens are never chosen.
    """
    special = torch.isin(input_ids, copy_to(torch.tensor(tokenizer.all_special_ids), input_ids.device))
    chosen = (torch.rand(input_ids.shape, device=input_ids.device) < share) & ~special
    labels = input_ids.masked_fill(~chosen, -100)
    # Devlin et al. (2019), section 3.1: fate below 0.8 is [MASK], 0.8 to 0.9 stays, from 0.9 on is a random token.
    fate = torch.rand(input_ids.shape, device=input_ids.device)
    masked = input_ids.masked_fill(chosen & (fate < 0.8), tokenizer.mask_token_id)
    replaced = chosen & (fate >= 0.9)
    random_ids = torch.randint_like(input_ids, len(tokenizer))
    return torch.where(replaced, random_ids, masked), labels
