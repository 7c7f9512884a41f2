"""Losses in tiles: the same losses and gradients as with all rows at once, with no more than one tile in memory."""

import pytest
import torch
from torch.testing import assert_close

from hf_embed import CoSENT, SimCSE
from hf_embed.objectives import tiles
from hf_embed.objectives.teacher import TeacherKL
from hf_embed.objectives.tiles import by_tiles

ROWS, OWN, FIRST = 12, 7, 3  # rows of all ranks, own rows, and the first own row


def batch(width=3):
    """Return the arguments of an objective: rows of which some have no negative, share texts, or list several positives."""
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(ROWS, width, 8, generator=generator, dtype=torch.double).requires_grad_()
    ids = torch.arange(1, ROWS * width + 1).view(ROWS, width)
    ids[4, 0] = ids[5, 0]  # the same anchor twice
    ids[6, 1] = ids[2, 1]  # the same positive twice
    if width > 2:
        ids[8, 2] = 0
    own = slice(FIRST, FIRST + OWN)
    arguments = {"all_embeddings": embeddings, "all_text_ids": ids, "first_row": FIRST,
                 "temperature": torch.tensor(0.2, dtype=torch.double, requires_grad=True)}  # fmt: skip
    return (embeddings[own], ids[own]), arguments, generator


def simcse():
    given, arguments, generator = batch()
    arguments["other_ids"] = torch.tensor([[0, 0]] * 5 + [[14, 0]] + [[0, 0]] * 6)
    arguments["teacher"] = torch.nn.functional.normalize(
        torch.randn(ROWS, 3, 5, generator=generator, dtype=torch.double), dim=-1
    )
    return SimCSE(hard_negative_weight=0.5, guide_margin=-0.1), given, arguments


def teacher_kl():
    given, arguments, generator = batch()
    arguments["teacher"] = torch.randn(ROWS, 3, 5, generator=generator, dtype=torch.double)
    return TeacherKL(candidates="batch"), given, arguments


def cosent():
    given, arguments, _ = batch(width=2)
    arguments["scores"] = torch.tensor([[0.1], [0.9], [0.9], [0.3]]).repeat(3, 1)
    return CoSENT(), given, arguments


@pytest.mark.parametrize("make", [simcse, teacher_kl, cosent])
@pytest.mark.parametrize("size", [1, 50, 75])
def test_tiles_change_nothing(make, size, monkeypatch):
    def loss_and_gradients():
        objective, given, arguments = make()
        loss = objective(*given, **arguments)
        loss.backward()
        return loss.detach(), arguments["all_embeddings"].grad, arguments["temperature"].grad

    expected = loss_and_gradients()
    calls, whole = [], tiles.checkpoint
    monkeypatch.setattr(tiles, "TILE_SIZE", size)
    monkeypatch.setattr(tiles, "checkpoint", lambda *args, **options: calls.append(1) or whole(*args, **options))
    assert_close(loss_and_gradients(), expected, rtol=1e-12, atol=1e-12)
    assert len(calls) > 1 and expected[1].abs().sum() > 0


def test_a_pair_that_no_pair_surpasses():
    """The rows of CoSENT without any term add nothing, and have no gradient that is not a number."""
    cosines = torch.randn(4, 2, 8, requires_grad=True)
    loss = CoSENT()(cosines, torch.arange(1, 9).view(4, 2), scores=torch.ones(4, 1))
    loss.backward()
    assert loss.item() == 0 and not cosines.grad.any()


def test_the_rows_of_a_tile():
    """Ten rows of three similarities in tiles of at most seven similarities."""
    seen = []

    def losses(rows):
        seen.append((rows.start, rows.stop))
        return torch.arange(10.0)[rows]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "TILE_SIZE", 7)
        assert by_tiles(losses, 10, 3).tolist() == list(range(10))
    assert seen == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10)]
    seen.clear()
    by_tiles(losses, 10, 3)
    assert seen == [(0, 10)]


def test_memory_is_that_of_a_tile():
    """Autograd keeps no matrix of similarities between the passes."""
    kept = []
    embeddings = torch.randn(64, 2, 8).requires_grad_()
    ids = torch.arange(1, 129).view(64, 2)
    for size in (2**23, 256):
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor: kept[-1].append(tensor.numel()) or tensor, lambda tensor: tensor
            ),
        ):
            patch.setattr(tiles, "TILE_SIZE", size)
            kept.append([])
            SimCSE()(embeddings, ids)
    assert max(kept[0]) == 64 * 64
    assert max(kept[1]) < 64 * 64
