"""walk() must reproduce the model's own forward pass exactly and leave no trace."""

from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch import nn
from walk_models import MODELS, assert_untouched, linears, tiny_model

from optimum_slim.distance import boundaries
from optimum_slim.walk import decoder_layers, entering, skipping, walk


@pytest.fixture
def tokens():
    return torch.randint(1, 97, (5, 17), generator=torch.Generator().manual_seed(1))


def final_states(model, batch):
    """What leaves the last decoder layer in the model's own forward."""
    states = []
    last = decoder_layers(model)[1][-1]

    def keep(module, args, output):
        states.append(output[0] if isinstance(output, tuple) else output)

    handle = last.register_forward_hook(keep)
    with torch.no_grad():
        model(input_ids=batch, use_cache=False)
    handle.remove()
    return states[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("model_type", "attention"),
    [(kind, "sdpa") for kind in MODELS if kind != "gemma2"] + [(kind, "eager") for kind in MODELS],
)
def test_walk_equals_forward_bit_for_bit(model_type, attention, dtype, tokens):
    model = tiny_model(model_type, dtype)
    model.set_attn_implementation(attention)
    blocks = []
    for block in walk(model, tokens, batch_size=2):
        assert all(states.dtype == dtype and states.device.type == "cpu" for states in block.inputs)
        blocks.append(block.name)
        outputs = list(block.outputs()) if block.index == 2 else None
    assert len(blocks) == 3 and len(outputs) == 3
    for batch, output in zip(tokens.split(2), outputs, strict=True):
        assert not output.requires_grad
        assert torch.equal(output, final_states(model, batch))
    assert_untouched(model)


def test_the_layers_of_the_tiny_models_differ_in_their_masks(tokens):
    """Otherwise the test above would not notice arguments of one layer used for another."""
    model = tiny_model("gemma3_text")
    masks = [block.arguments[0][1]["attention_mask"] for block in walk(model, tokens)]
    assert masks[0] is not masks[1] and masks[0] is masks[2]


def test_batches_share_their_masks(tokens):
    model = tiny_model("mistral")
    block = next(iter(walk(model, tokens, batch_size=2)))
    first, second, rest = (kwargs["attention_mask"] for _, kwargs in block.arguments)
    assert first is second and rest.shape[0] == 1


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_later_layers_see_edits(model_type, tokens):
    model = tiny_model(model_type)
    for block in walk(model, tokens, batch_size=5):
        with torch.no_grad():
            for parameter in block.layer.parameters():
                parameter.mul_(0.5)
        (output,) = block.outputs()
    assert torch.equal(output, final_states(model, tokens))


def test_a_layer_replaced_in_the_stack_is_seen(tokens):
    model, other = tiny_model("llama"), tiny_model("llama", hidden_act="relu")
    for block in walk(model, tokens, batch_size=5):
        block.stack[block.index] = decoder_layers(other)[1][block.index]
        (output,) = block.outputs()
    assert torch.equal(output, final_states(other, tokens))


def test_training_mode_and_random_state_are_kept(tokens):
    model = tiny_model("gpt2").train()
    decoder_layers(model)[1][1].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    expected = final_states(tiny_model("gpt2"), tokens)
    for block in walk(model, tokens):
        assert [module.training for module in model.modules()] == modes
        torch.set_rng_state(state)
        (output,) = block.outputs()
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(output, expected)
    assert [module.training for module in model.modules()] == modes


def test_nothing_is_left_behind_on_early_stop_or_error(tokens):
    model = tiny_model("llama")
    for block in walk(model, tokens):
        for _ in block.gram_groups(linears(block.layer)):
            assert_untouched(model)
            break
        break
    assert_untouched(model)

    def fail(*args, **kwargs):
        raise RuntimeError("broken layer")

    decoder_layers(model)[1][0].mlp.act_fn.forward = fail
    with pytest.raises(RuntimeError, match="broken layer"):
        list(walk(model, tokens))
    del decoder_layers(model)[1][0].mlp.act_fn.forward
    assert_untouched(model)


def test_a_forward_set_by_someone_else_survives(tokens):
    model = tiny_model("llama")
    layer = decoder_layers(model)[1][0]
    original = layer.forward
    layer.forward = lambda *args, **kwargs: original(*args, **kwargs)
    mine = layer.forward
    list(walk(model, tokens))
    assert layer.forward is mine


def test_decoder_layers_of_each_kind():
    names = {kind: decoder_layers(tiny_model(kind))[0] for kind in MODELS}
    assert names["llama"] == "model.layers"
    assert names["opt"] == "model.decoder.layers"
    assert names["gpt2"] == "transformer.h"


def test_no_decoder_layers_found():
    with pytest.raises(ValueError, match="not a Transformers model"):
        decoder_layers(nn.Linear(2, 2))
    model = tiny_model("llama")
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"num_hidden_layers = 7"):
        walk(model, torch.ones(1, 4, dtype=torch.long))


def test_hidden_states_changed_between_layers_are_refused(tokens):
    model = tiny_model("llama")
    decoder = model.get_decoder()

    def between(input_ids, use_cache):
        states = decoder.embed_tokens(input_ids)
        positions = decoder.rotary_emb(states, position_ids=torch.arange(17)[None])
        for layer in decoder.layers:
            states = layer(states, position_embeddings=positions) * 2

    decoder.forward = between
    with pytest.raises(ValueError, match="straight from one decoder layer to the next"):
        next(iter(walk(model, tokens)))


def test_tokens_must_be_a_matrix():
    with pytest.raises(ValueError, match=r"shape \(samples, length\), got \(4,\)"):
        walk(tiny_model("llama"), torch.arange(4))


def test_skipped_layers_hand_the_hidden_states_through_and_come_back():
    model, ids = tiny_llama(num_hidden_layers=4), token_ids()
    whole = model(ids).logits
    with skipping([model.model.layers[1], model.model.layers[2]]):
        skipped = model(ids, use_cache=False).logits
    assert torch.equal(model(ids).logits, whole)
    model.model.layers = torch.nn.ModuleList([model.model.layers[0], model.model.layers[3]])
    assert torch.equal(model(ids, use_cache=False).logits, skipped)
    assert not torch.equal(skipped, whole)


@pytest.mark.parametrize("index", [1, 2, 3])
@pytest.mark.parametrize("model_type", MODELS)
def test_a_decoder_can_begin_with_any_layer(model_type, index, tokens):
    model = tiny_model(model_type)
    stack = decoder_layers(model)[1]
    with torch.no_grad():
        whole = model(tokens, use_cache=False).logits
        states = boundaries(model, tokens)[index]
        with entering(stack, index, states):
            again = model(torch.ones_like(tokens), use_cache=False).logits
        with entering(stack, index, states * 2):
            other = model(tokens, use_cache=False).logits
    assert torch.equal(again, whole) and not torch.equal(other, whole)
    assert_untouched(model)


def test_each_layer_is_visited_in_its_context(tokens):
    """The first for the embeddings as well; a context ends when the states have passed, also when the walk stops."""
    events, made = [], []

    class Visiting:
        def __call__(self, index):
            return contextmanager(self._visit)(index)

        def _visit(self, index):
            events.append(("in", index))
            try:
                yield
            finally:
                events.append(("out", index))

        def states(self):
            made.append([])
            return made[-1]

    expected = [block.inputs[0].clone() for block in walk(tiny_model("llama"), tokens)]
    for block in walk(tiny_model("llama"), tokens, reference=True, visiting=Visiting()):
        assert block.inputs is made[0] and block.references is made[1]
        assert torch.equal(block.inputs[0], expected[block.index])
        assert events[-1] == ("in", block.index)
    assert events == [(what, index) for index in (0, 0, 1, 2) for what in ("in", "out")]
    blocks = walk(tiny_model("llama"), tokens, visiting=Visiting())
    next(blocks)
    blocks.close()
    assert events[-1] == ("out", 0)
