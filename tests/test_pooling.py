"""Every pooling against a loop over texts and tokens."""

import itertools

import pytest
import torch
from conftest import quickstart_tokenizer, tiny_model
from torch.testing import assert_close

from hf_embed import Encoder, InputError
from hf_embed.pooling import POOLINGS, check_pooling, pool
from hf_embed.step import TrainingStep, new_head

LENGTHS = [1, 4, 7, 2]
CLS = {"cls", "cls_mlp", "cls_mlp_train"}  # the heads are the encoder's


def layers_and_mask(width=9, layers=4, dim=5):
    generator = torch.Generator().manual_seed(0)
    shape = (layers, len(LENGTHS), width, dim)
    states = tuple(torch.randn(shape, generator=generator, dtype=torch.float64))
    return states, torch.tensor([[int(t < n) for t in range(width)] for n in LENGTHS])


def by_loop(pooling, layers):
    rows = []
    for i, n in enumerate(LENGTHS):
        last = layers[-1][i]
        second = {"first_last": layers[1][i], "top2": layers[-2][i]}.get(pooling, last)
        if pooling in CLS:
            rows.append(last[0])
        elif pooling == "last":
            rows.append(last[n - 1])
        else:
            total, weights = 0, 0
            for t in range(n):
                weight = t + 1 if pooling == "weighted_mean" else 1
                total = total + weight * (last[t] + second[t]) / 2
                weights += weight
            rows.append(total / weights)
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_equals_loop(pooling):
    layers, mask = layers_and_mask()
    assert_close(pool(pooling, layers, mask), by_loop(pooling, layers), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("one", "other"), itertools.combinations(["cls", *(p for p in POOLINGS if p not in CLS)], 2))
def test_control_no_two_poolings_pass_for_each_other(one, other):
    layers, mask = layers_and_mask()
    assert not torch.allclose(pool(one, layers, mask), by_loop(other, layers), rtol=1e-3)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_states_at_padding_are_not_read(pooling):
    layers, mask = layers_and_mask()
    other = tuple(states + 1e3 * (1 - mask).unsqueeze(-1) for states in layers)
    assert torch.equal(pool(pooling, layers, mask), pool(pooling, other, mask))


@pytest.mark.parametrize(
    ("model", "pooling"), [*(("bert", p) for p in POOLINGS), ("qwen3", "last"), ("qwen3", "weighted_mean")]
)
def test_embedding_does_not_depend_on_padding(model, pooling):
    encoder = Encoder(tiny_model(model), quickstart_tokenizer(), pooling).double().eval()
    ids = torch.randint(5, 200, (len(LENGTHS), 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[int(t < n) for t in range(9)] for n in LENGTHS])
    padded = encoder.embed(ids.masked_fill(mask == 0, 0), mask)
    alone = [encoder.embed(ids[i : i + 1, :n], mask[i : i + 1, :n])[0] for i, n in enumerate(LENGTHS)]
    assert_close(padded, torch.stack(alone), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("pooling", "training"), itertools.product(sorted(CLS), [True, False]))
def test_heads(pooling, training):
    """cls_mlp always goes through the pooler, cls_mlp_train through its head in training, cls through none."""
    model = tiny_model("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    encoder = Encoder(model, quickstart_tokenizer(), pooling)
    head = new_head(encoder.width, encoder.config) if pooling == "cls_mlp_train" else None
    step = TrainingStep(encoder, head).train(training)
    ids = torch.tensor([[2, 90, 91, 3]])
    first = model(ids)[0][:, 0]
    expected = first
    if pooling == "cls_mlp":
        expected = torch.tanh(first @ model.pooler.dense.weight.T + model.pooler.dense.bias)
    elif pooling == "cls_mlp_train" and training:
        expected = torch.tanh(first @ head[0].weight.T + head[0].bias)
    assert_close(step.embed(ids, torch.ones_like(ids)), expected)


def test_unknown_pooling_names_the_known():
    with pytest.raises(InputError) as error:
        check_pooling("max")
    assert all(name in str(error.value) for name in ["'max'", *POOLINGS]) and "\n" not in str(error.value)
