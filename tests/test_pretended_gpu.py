"""Test that a training step on a GPU has all tensors there, and where the host waits for the GPU. Any machine can run this."""

import pytest
import torch
from conftest import SINCE_5_15, small_tokenizer, tiny_model
from pretended_gpu import GPU, pretended_gpu
from test_trainer import trainer
from transformers import BertForMaskedLM

from hf_embed import Encoder, ImprovedContrastive, SimCSE
from hf_embed.forward import packed_attention

PADDED = "masking_utils.py: _local_scalar_dense"  # where transformers asks whether a chunk has padding
ONE = {"num_hidden_layers": 1}
MASKED = "step.py: nonzero"


@pytest.fixture
def attention(monkeypatch):
    """Let the GPU have attention within texts. Its kernels do not read the bounds of the texts on the host."""

    def attend(query, key, value, bounds, longest, dropout, scale):
        assert bounds.device == query.device == GPU and isinstance(longest, int)
        return value + 0 * (query + key)

    monkeypatch.setattr(packed_attention, "gpu_kernel", lambda *_: attend)


def test_what_is_noted():
    with pretended_gpu() as waits:
        there, here = torch.arange(3, device="cuda"), torch.arange(3)
        assert (there + 1).device == here.pin_memory().to("cuda", non_blocking=True).device == GPU and not waits
        with pytest.raises(RuntimeError, match="on the CPU"):
            there + here
        there.tolist(), there[there > 0], there.max().item(), here.to("cuda"), there.cpu(), there[here]
    names = ["tolist", "index", "_local_scalar_dense", "to", "to", "index"]
    assert waits.total() == 6 and set(waits) == {f"test_pretended_gpu.py: {name}" for name in names}


@pytest.mark.parametrize(
    ("given", "settings", "expected"),
    [
        ({}, {}, {}),
        ({"objective": ImprovedContrastive(tile_rows=3, learn_temperature=True)}, {"pooling": "last"}, {}),
        ({}, {"gradient_caching": True, "chunk_tokens": 20}, {}),
        pytest.param({"model": tiny_model(**ONE, attn_implementation="eager")}, {}, {PADDED: 1}, marks=SINCE_5_15),
        ({"objective": SimCSE(mlm_weight=0.1), "model": BertForMaskedLM(tiny_model(**ONE).config)}, {}, {PADDED: 1, MASKED: 1}),
    ],
    ids=["packed", "in tiles", "caching", "padded", "masked words"],
)  # fmt: skip
def test_a_step_waits_only_where_it_must(given, settings, expected, attention, tmp_path, monkeypatch):
    """BUG: in each chunk, the host waited four times to find the masked words."""
    made = trainer(tmp_path, **({"model": tiny_model(**ONE)} | given), **settings)
    batch, made.current_gradient_accumulation_steps = next(iter(made.get_train_dataloader())), 1
    with pretended_gpu() as waits:
        monkeypatch.setattr(type(made.args), "device", GPU)
        made.step.to(GPU)
        waits.clear()  # those for the copy of the model
        loss = made.training_step(made.step, batch)
        assert loss.device == GPU and all(p.grad.device == GPU for p in made.step.parameters() if p.requires_grad)
        assert waits == expected


@pytest.mark.parametrize(("convert_to_tensor", "at_once", "waits"), [(False, 4096, 1), (False, 2, 2), (True, 2, 0)])
def test_encoding_waits_for_many_vectors_at_once(convert_to_tensor, at_once, waits, attention, monkeypatch):
    """BUG: for each batch, the host waited for the copies of the token ids and of the places of the vectors, and for these."""
    texts = ["a text", "another, longer text", "rain"]
    encoder = Encoder(tiny_model(**ONE), small_tokenizer())
    monkeypatch.setattr("hf_embed.encoding.FETCHED", at_once)
    monkeypatch.setattr(Encoder, "check_changed", lambda encoder: None)
    with pretended_gpu() as noted:
        encoder.to(GPU)
        noted.clear()
        vectors = torch.as_tensor(encoder.encode(texts, convert_to_tensor=convert_to_tensor, batch_size=1))
        assert noted == ({"encoding.py: to": waits} if waits else {})
        assert vectors.device.type == ("cuda" if convert_to_tensor else "cpu")
        alone = [encoder.encode(text, convert_to_tensor=True).cpu() for text in texts]
        torch.testing.assert_close(vectors.cpu(), torch.stack(alone))
