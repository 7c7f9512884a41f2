"""Dropout on a CPU: the masks have the right probability, are independent, and follow PyTorch's generator."""

import contextlib
import copy

import pytest
import torch
from conftest import tiny_model
from test_trainer import trainer
from torch import nn
from transformers import TrainerCallback

from hf_embed.forward.dropout import FastDropout, dropout, use_fast_dropout, use_plain_dropout


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.2, 0.5, 0.9])
def test_probability_and_scale(p, dtype):
    torch.manual_seed(0)
    out = dropout(torch.ones(500, 1000, dtype=dtype), p)
    kept = out != 0
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / out.numel()) ** 0.5  # five standard deviations
    assert out[kept].unique().tolist() == pytest.approx([1 / (1 - p)], rel=1e-2 if dtype == torch.bfloat16 else 1e-3)


def test_bfloat16_is_not_biased():
    """The factor 1 / 0.9 itself is not rounded to bfloat16, which would make all values smaller by a sixth of a percent."""
    torch.manual_seed(0)
    values = 1 + torch.rand(1_000_000)
    out = dropout(values.bfloat16(), 0.1).double()
    ratio = out[out != 0] / values.bfloat16().double()[out != 0]
    assert abs(ratio.mean().item() * 0.9 - 1) < 1e-4


def test_each_place_and_each_pair_of_places_is_drawn_alike():
    """One random number gives four elements of the mask. Each of them, and each pair of neighbours, has the right frequency."""
    torch.manual_seed(0)
    kept = (dropout(torch.ones(200_000, 4), 0.3) != 0).double()
    assert (kept.mean(0) - 0.7).abs().max() < 0.006
    together = kept.T @ kept / len(kept)
    assert (together - 0.49)[~torch.eye(4, dtype=torch.bool)].abs().max() < 0.006
    following = (kept[:-1].flatten() * kept[1:].flatten()).mean()
    assert abs(following - 0.49) < 0.006


@pytest.mark.parametrize("shape", [(), (1,), (3,), (5, 7), (2, 3, 5), (0, 4)])
def test_any_shape(shape):
    values = torch.randn(shape)
    out = dropout(values, 0.5)
    assert out.shape == values.shape
    assert ((out == 0) | torch.isclose(out, 2 * values)).all()


def test_not_contiguous():
    values = torch.randn(6, 8).t()
    out = dropout(values, 0.5)
    assert ((out == 0) | torch.isclose(out, 2 * values)).all() and 0 < (out == 0).sum() < 48


def test_gradient_has_the_same_mask():
    values = torch.randn(50, 3, dtype=torch.float64, requires_grad=True)
    out = dropout(values, 0.4)
    out.sum().backward()
    assert torch.equal(values.grad * values, out)
    assert 0 < (values.grad == 0).sum() < 150


def test_masks_follow_the_generator():
    values = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(values, 0.1), dropout(values, 0.1)
    torch.manual_seed(3)
    assert torch.equal(dropout(values, 0.1), first)
    assert torch.equal(dropout(values, 0.1), second) and not torch.equal(first, second)


@pytest.mark.parametrize("p", [0.0, 1e-7, 1.0])
def test_limits(p):
    """A probability that 16 bits cannot express is left to PyTorch."""
    torch.testing.assert_close(dropout(torch.ones(100), p), torch.full((100,), float(p < 1)))


def test_modules_are_replaced_in_place():
    model = tiny_model()
    odd = nn.AlphaDropout(0.1)
    model.odd = odd
    copied = copy.deepcopy(model)
    use_fast_dropout(model)
    kinds = {type(module) for module in model.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {FastDropout} and type(model.odd) is nn.AlphaDropout
    ids = torch.arange(5, 25).unsqueeze(0)
    model.eval(), copied.eval()
    assert torch.equal(model(input_ids=ids)[0], copied(input_ids=ids)[0])
    model.train()
    assert not torch.equal(model(input_ids=ids)[0], copied(input_ids=ids)[0])
    assert copy.deepcopy(model).state_dict().keys() == copied.state_dict().keys()
    use_plain_dropout(model)
    assert {type(module) for module in model.modules() if isinstance(module, nn.Dropout)} == {nn.Dropout}


@pytest.mark.parametrize("fails", [False, True])
def test_a_training_leaves_plain_dropout(tmp_path, fails):
    """BUG: the model kept the class of this package, so it could not be unpickled, vmapped or scripted elsewhere."""
    during = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            during.append({type(module) for module in model.modules() if isinstance(module, nn.Dropout)})
            assert not fails, "the end"

    model = tiny_model()
    made = trainer(tmp_path, model, max_steps=1, callbacks=[Look()])
    for _ in range(2):
        with pytest.raises(AssertionError, match="the end") if fails else contextlib.nullcontext():
            made.train()
        assert {type(module) for module in model.modules() if isinstance(module, nn.Dropout)} == {nn.Dropout}
    assert during == [{FastDropout}] * 2
