"""Write a package flash_attn whose two functions are PyTorch's own copy of the FlashAttention-2 kernels.

    python benchmarks/flash_of_torch.py /tmp/flash
    PYTHONPATH=/tmp/flash python benchmarks/gpu.py --output_dir outputs/gpu

The real package has to be compiled for the versions of CUDA and PyTorch, which takes long. With this one, transformers and
sentence-transformers run their `flash_attention_2`, with the kernels that they would call, but without anything that those do
besides (sliding windows, key-value caches).
"""

import sys
from pathlib import Path

CODE = '''"""The functions of flash_attn that training needs, from PyTorch's copy of the kernels."""
import torch

flash_attn_with_kvcache = None


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, deterministic=False):
    """Attend within texts. q, k and v are (S, H, d)."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, causal, False, scale=softmax_scale)[0]


def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):
    """Attend within texts of the same length. q, k and v are (b, T, H, d)."""
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, causal, False, scale=softmax_scale)[0]
'''

PADDING = '''"""Remove padding, and put it back."""
import torch


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """Return the tokens of (b, T, ...) without padding, their indices, the bounds, the longest length and the lengths."""
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    bounds = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return hidden_states.flatten(0, 1)[indices], indices, bounds, int(lengths.max()), lengths


def pad_input(hidden_states, indices, batch, seqlen):
    """Return tokens (S, ...) as padded texts (b, T, ...)."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_copy(0, indices, hidden_states).unflatten(0, (batch, seqlen))
'''


def write_package(folder: Path) -> None:
    """Write the package and what pip would record of it."""
    code, record = folder / "flash_attn", folder / "flash_attn-2.8.3.dist-info"
    code.mkdir(parents=True, exist_ok=True)
    record.mkdir(exist_ok=True)
    (code / "__init__.py").write_text(CODE, encoding="utf-8")
    (code / "bert_padding.py").write_text(PADDING, encoding="utf-8")
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.8.3\n", encoding="utf-8")
    (record / "top_level.txt").write_text("flash_attn\n", encoding="utf-8")


if __name__ == "__main__":
    write_package(Path(sys.argv[1]))
