"""Distances between layer boundaries: the definition, its numerics, padding, and one pass for all blocks."""

import math
from itertools import pairwise

import pytest
import torch
from helpers import tiny_llama, token_ids

from optimum_slim.distance import angular_distances, block_influence, boundaries, last_token_states


def distance(u, v):
    """d of one sample with two boundaries."""
    return angular_distances(torch.stack([u, v])[None])[0, 1].item()


def brute_force(u, v):
    """The paper's formula in fp64."""
    u, v = u.double(), v.double()
    cosine = torch.dot(u, v) / (u.norm() * v.norm())
    return math.acos(max(-1.0, min(1.0, cosine.item()))) / math.pi


def test_special_angles():
    u, v = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))
    v -= u * (u @ v) / (u @ u)
    assert distance(u, u) == 0
    assert distance(u, -u) == pytest.approx(1)
    assert distance(u, v) == pytest.approx(0.5, abs=1e-6)
    assert distance(u, 1000 * u) == pytest.approx(0, abs=1e-7)
    assert 0 <= distance(u, u + 0.1 * v) <= 1


def test_scale_does_not_matter_and_the_table_is_symmetric():
    states = torch.randn(5, 4, 32, generator=torch.Generator().manual_seed(1))
    scales = torch.tensor([1e-3, 1.0, 7.0, 1e4])[None, :, None]
    table = angular_distances(states)
    assert torch.allclose(table, angular_distances(states * scales), atol=1e-6)
    assert torch.equal(table, table.T)


def test_small_angles_keep_their_digits_where_arccos_loses_them():
    u = torch.randn(64, generator=torch.Generator().manual_seed(2))
    v = u + 1e-3 * torch.randn(64, generator=torch.Generator().manual_seed(3))
    exact = brute_force(u, v)
    by_arccos = math.acos(min(1.0, torch.nn.functional.cosine_similarity(u, v, dim=0).item())) / math.pi
    assert distance(u, v) == pytest.approx(exact, rel=1e-4)
    assert abs(by_arccos / exact - 1) > 1e-2


def test_one_pass_equals_brute_force_for_every_block():
    model, ids = tiny_llama(num_hidden_layers=5), token_ids(6, 11)
    table = angular_distances(last_token_states(model, ids, batch_size=4))
    for start in range(5):
        for count in range(1, 6 - start):
            found = []
            for sample in ids:  # one sample and one block at a time, from its own pass
                states = boundaries(model, sample[None])
                found.append(brute_force(states[start][0, -1], states[start + count][0, -1]))
            assert table[start, start + count].item() == pytest.approx(sum(found) / len(found), rel=1e-4)


def test_boundaries_are_raw_layer_inputs_and_the_last_is_before_the_norm():
    model, ids = tiny_llama(num_hidden_layers=3), token_ids()
    states = boundaries(model, ids)
    with torch.no_grad():
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(states) == len(hidden) == 4
    assert all(torch.equal(a, b) for a, b in zip(states[:-1], hidden[:-1], strict=True))
    assert not torch.allclose(states[-1], hidden[-1])
    assert torch.equal(model.model.norm(states[-1]), hidden[-1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side):
    model = tiny_llama(num_hidden_layers=4)
    texts = [token_ids(1, length, seed=length) for length in (4, 9, 7)]
    alone = torch.cat([last_token_states(model, text) for text in texts])
    ids, mask = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, dtype=torch.int64)
    for row, text in enumerate(texts):
        where = slice(9 - text.shape[1], 9) if side == "left" else slice(0, text.shape[1])
        ids[row, where], mask[row, where] = text[0], 1
    together = last_token_states(model, ids, mask)
    assert torch.allclose(alone, together, atol=1e-5)
    assert torch.allclose(angular_distances(alone), angular_distances(together), atol=1e-5)


def test_batches_and_order_do_not_matter():
    model, ids = tiny_llama(num_hidden_layers=3), token_ids(7, 8)
    table = angular_distances(last_token_states(model, ids))
    for order, size in ((torch.arange(7), 3), (torch.randperm(7), 1)):
        other = angular_distances(last_token_states(model, ids[order], batch_size=size))
        assert torch.allclose(table, other, atol=1e-6)


def test_a_text_of_padding_only_is_refused():
    with pytest.raises(ValueError, match="leave such texts out"):
        last_token_states(tiny_llama(), token_ids(), torch.zeros(2, 9, dtype=torch.int64))


def test_block_influence_is_one_minus_the_mean_cosine_over_all_tokens():
    model, ids = tiny_llama(num_hidden_layers=3), token_ids(5, 8)
    states = boundaries(model, ids)
    expected = [1 - torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)]
    assert torch.allclose(block_influence(model, ids, batch_size=2), torch.stack(expected), atol=1e-6)


def test_nothing_stays_hooked_and_modes_come_back():
    model = tiny_llama().train()
    last_token_states(model, token_ids())
    assert model.training and model.model.layers[0].training
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
