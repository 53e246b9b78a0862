import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import DynamicCache, StaticCache
from walk_models import tiny_model

from optimum_slim.kv_cache import check_cache, forget, record, rewind, view


def filled(tokens, window=None, batch=3):
    """A cache of one layer whose keys and values are the numbers of its columns, plus 100 for each row."""
    model = tiny_llama() if window is None else tiny_model("mistral", sliding_window=window)
    cache = DynamicCache(config=model.config)
    record(cache)
    numbers = torch.arange(tokens)[None] + 100 * torch.arange(batch)[:, None]
    for layer in cache.layers:
        for column in numbers.T.float():
            states = column[:, None, None, None].expand(-1, 1, 1, 2)
            layer.update(states, states)
    return cache


def columns(cache):
    layer = cache.layers[0]
    assert torch.equal(layer.keys, layer.values)
    return layer.keys[:, 0, :, 0].int().tolist()


def test_rewind_aligns_rows_at_their_right_ends():
    cache = filled(6)
    rewind(cache, torch.tensor([1, 3, 2]))
    found = columns(cache)
    assert found[0] == [0, 1, 2, 3, 4]
    assert found[1][2:] == [100, 101, 102]
    assert found[2][1:] == [200, 201, 202, 203]
    assert cache.get_seq_length() == 5


def test_rewind_drops_columns_that_pad_every_row():
    cache = filled(6)
    rewind(cache, torch.tensor([2, 2, 2]), padding=1)
    assert columns(cache) == [[1, 2, 3], [101, 102, 103], [201, 202, 203]]


def test_forget_drops_the_last_tokens_of_some_layers():
    cache = filled(6)
    forget(cache, [1], 2)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 4]
    forget(cache, [0, 1], 0)
    assert [layer.get_seq_length() for layer in cache.layers] == [6, 4]


@pytest.mark.parametrize("tokens", [3, 4, 5, 9])
@pytest.mark.parametrize("behind", [[0, 0, 0], [1, 1, 1], [0, 2, 1], [2, 1, 2]])
def test_rewound_window_is_that_of_a_cache_without_the_tokens(tokens, behind):
    cache, window = filled(tokens, window=4), 4
    rewind(cache, torch.tensor(behind))
    least = min(behind)
    assert cache.layers[0].get_seq_length() == tokens - least
    for row, drop in enumerate(behind):
        seen = [100 * row + i for i in range(tokens - drop)][-(window - 1) :]
        found = columns(cache)[row]
        assert len(found) == min(tokens - least, window - 1)
        assert found[len(found) - min(len(seen), len(found)) :] == seen[-len(found) :]


def test_view_shows_layers_that_run_for_those_that_do_not():
    cache = filled(6)
    forget(cache, [1], 2)
    assert view(cache, [0, 1], [0]).layers == [cache.layers[0], cache.layers[0]]
    assert view(cache, [0, 1], [1]).get_seq_length() == 4
    assert len(cache.layers) == 2 and cache.layers[0] is not cache.layers[1]


def test_view_prefers_a_layer_of_the_same_kind():
    model = tiny_model("gemma2", num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2)
    cache = DynamicCache(config=model.config)
    shown = view(cache, range(4), [2, 3])
    assert shown.layers == [cache.layers[2], cache.layers[3]] * 2


def test_caches_that_cannot_be_taken_back_are_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="use_cache=True"):
        check_cache(None)
    with pytest.raises(ValueError, match="StaticCache of StaticLayer"):
        check_cache(StaticCache(config=model.config, max_cache_len=8))
    cache = DynamicCache(config=model.config)
    with pytest.raises(ValueError, match="layer 0 keeps no keys and values of its own"):
        check_cache(cache)
    model(token_ids(), past_key_values=cache)
    check_cache(cache)
