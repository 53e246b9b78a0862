"""walk() must reproduce the model's own forward pass exactly and leave no trace."""

from contextlib import contextmanager

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from optimum_slim.walk import decoder_layers, skipping, walk


SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 5}
MIXED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **WINDOW}
MODELS = {
    "llama": SHAPE,
    "mistral": SHAPE | WINDOW,
    "qwen2": SHAPE | MIXED | {"use_sliding_window": True},
    "qwen3": SHAPE,
    "gemma2": SHAPE | MIXED,
    "gemma3_text": SHAPE | MIXED,
    "phi3": SHAPE,
    "opt": {
        "vocab_size": 97,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
    },
    "gpt2": {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
}


def tiny_model(model_type, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(MODELS[model_type] | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


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


def assert_untouched(model):
    for module in model.modules():
        assert "forward" not in module.__dict__
        assert not module._forward_pre_hooks and not module._forward_hooks


def linears(layer):
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


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


LLAMA_GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.gate_proj", "mlp.up_proj"],
    ["mlp.down_proj"],
]


@pytest.mark.parametrize("sequential", [True, False])
def test_groups_of_llama(sequential, tokens):
    for block in walk(tiny_model("llama"), tokens, batch_size=2):
        groups = [group.names for group in block.gram_groups(linears(block.layer), sequential=sequential)]
        assert groups == LLAMA_GROUPS


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "phi3"])
def test_gram_equals_brute_force(model_type, dtype, sequential, tokens):
    model = tiny_model(model_type, dtype)
    inputs = {}

    def keep(name):
        return lambda module, args: inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

    kinds = (nn.Linear,) if model_type != "gpt2" else tuple({type(decoder_layers(model)[1][0].attn.c_attn)})
    _, stack = decoder_layers(model)
    handles = [
        module.register_forward_pre_hook(keep(f"{index}.{name}"))
        for index, layer in enumerate(stack)
        for name, module in layer.named_modules()
        if isinstance(module, kinds)
    ]
    with torch.no_grad():
        for batch in tokens.split(2):
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    measured = set()
    for block in walk(model, tokens, batch_size=2):
        modules = {name: module for name, module in block.layer.named_modules() if isinstance(module, kinds)}
        for group in block.gram_groups(modules, sequential=sequential):
            names, gram = group.names, group.gram
            assert gram.dtype == torch.float32
            for name in names:
                x = torch.cat(inputs[f"{block.index}.{name}"]).double()
                torch.testing.assert_close(gram.double(), x.T @ x / len(x), rtol=1e-5, atol=1e-5 * gram.max().item())
                measured.add(f"{block.index}.{name}")
    assert measured == inputs.keys()


def test_sequential_groups_see_modules_replaced_before(tokens):
    model = tiny_model("llama")
    block = next(iter(walk(model, tokens)))
    dense = dict(
        zip(map(tuple, LLAMA_GROUPS), (group.gram for group in block.gram_groups(linears(block.layer))), strict=True)
    )
    for group in block.gram_groups(linears(block.layer)):
        names, gram = group.names, group.gram
        changed = not torch.equal(gram, dense[tuple(names)])
        assert changed == ("self_attn.q_proj" not in names)
        for name in names:
            old = block.layer.get_submodule(name)
            new = nn.Linear(old.in_features, old.out_features, bias=False)
            block.layer.set_submodule(name, new)


def test_a_module_no_token_reaches_is_named(tokens):
    model = tiny_model("llama")
    block = next(iter(walk(model, tokens)))
    with pytest.raises(ValueError, match=r"No calibration token reached spare in model\.layers\.0"):
        list(block.gram_groups({"spare": nn.Linear(4, 4)}))


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


def edit(layer, factor=0.5):
    """Replace the linear layers by scaled ones, leaving the parameters that a reference shares alone."""
    for name, module in linears(layer).items():
        new = nn.Linear(module.in_features, module.out_features, bias=False)
        new.weight = nn.Parameter(factor * module.weight.detach())
        layer.set_submodule(name, new)


def inputs_of(model, tokens, suffix):
    """What enters the modules whose name ends in `suffix`, for each decoder layer: float64 (tokens, in)."""
    found, handles = [], []
    for layer in decoder_layers(model)[1]:
        module = layer.get_submodule(suffix)
        hook = module.register_forward_pre_hook(lambda module, args: found.append(args[0].flatten(0, 1).double()))
        handles.append(hook)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("limit", [None, 0])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "opt"])
def test_without_edits_both_streams_are_the_same(model_type, limit, tokens, monkeypatch):
    if limit is not None:  # what enters the original layer is then computed again for each group
        monkeypatch.setattr("optimum_slim.block.AHEAD_LIMIT", limit)
    kinds = (nn.Linear, type(decoder_layers(tiny_model("gpt2"))[1][0].attn.c_attn))
    for block in walk(tiny_model(model_type), tokens, batch_size=2, reference=True):
        assert all(torch.equal(a, b) for a, b in zip(block.inputs, block.references, strict=True))
        modules = {name: module for name, module in block.layer.named_modules() if isinstance(module, kinds)}
        for group in block.gram_groups(modules):
            torch.testing.assert_close(group.cross, group.gram)


@pytest.mark.parametrize("limit", [2**20, 0])
@pytest.mark.parametrize("sequential", [True, False])
def test_cross_moments_are_those_of_the_two_models(sequential, limit, tokens, monkeypatch):
    """Of r xᵀ, where r is the input in the unslimmed model and x the one behind the edited layers."""
    monkeypatch.setattr("optimum_slim.block.AHEAD_LIMIT", limit)
    dense = [block.inputs[0] for block in walk(tiny_model("llama"), tokens)]
    reference = inputs_of(tiny_model("llama"), tokens, "mlp.down_proj")
    model, measured = tiny_model("llama"), []
    for block in walk(model, tokens, batch_size=2, reference=True):
        assert torch.equal(torch.cat(list(block.references)), dense[block.index])
        assert torch.equal(torch.cat(list(block.inputs)), dense[block.index]) == (block.index == 0)
        groups = list(block.gram_groups({"mlp.down_proj": block.layer.mlp.down_proj}, sequential=sequential))
        measured.append(groups[0])
        edit(block.layer)
    assert_untouched(model)
    assert measured[0].cross is not None and measured[0].tokens == tokens.numel()
    torch.testing.assert_close(measured[0].cross, measured[0].gram)
    seen = inputs_of(model, tokens, "mlp.down_proj")
    for index in (1, 2):
        # the block was measured before its own edit: its input is that of a model edited up to there
        other = tiny_model("llama")
        for layer in decoder_layers(other)[1][:index]:
            edit(layer)
        x, r = inputs_of(other, tokens, "mlp.down_proj")[index], reference[index]
        for found, expected in ((measured[index].gram, x.T @ x), (measured[index].cross, r.T @ x)):
            torch.testing.assert_close(found.double(), expected / len(x), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(seen[index], r)


def test_groups_measured_again_in_one_layer_keep_the_reference(tokens):
    """o_proj is measured after q, k and v were replaced: its reference is still that of the unslimmed layer."""
    reference = inputs_of(tiny_model("llama"), tokens, "self_attn.o_proj")[0]
    model = tiny_model("llama")
    block = next(iter(walk(model, tokens, batch_size=2, reference=True)))
    modules = {name: module for name, module in linears(block.layer).items() if "attn" in name}
    for group in block.gram_groups(modules):
        if group.names == ["self_attn.o_proj"]:
            x = inputs_of(model, tokens, "self_attn.o_proj")[0]
            expected = reference.T @ x / len(x)
            torch.testing.assert_close(group.cross.double(), expected, rtol=1e-4, atol=1e-5)
            assert not torch.allclose(group.cross, group.gram, rtol=1e-2)
        else:
            for name in group.names:
                old = block.layer.get_submodule(name)
                new = nn.Linear(old.in_features, old.out_features, bias=False)
                new.weight = nn.Parameter(0.5 * old.weight.detach())
                block.layer.set_submodule(name, new)


class Routed(nn.Module):
    """Three experts: the second sees tokens with a large first entry only, the third none."""

    def __init__(self, hidden=32):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, 1)
        output = torch.zeros_like(flat)
        chosen = (flat[:, 0] > 1).long()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                output[rows] = expert(flat[rows])
        return output.view_as(x)


@pytest.mark.parametrize("sequential", [True, False])
def test_modules_no_token_reaches_end_in_groups_of_zeros(sequential, tokens):
    model = tiny_model("llama")
    for layer in decoder_layers(model)[1]:
        layer.mlp = Routed()
    for block in walk(model, tokens, reference=True):
        modules = linears(block.layer)
        with pytest.raises(ValueError, match=r"No calibration token reached mlp\.experts\.2"):
            list(block.gram_groups(modules, sequential=sequential))
        groups = list(block.gram_groups(modules, sequential=sequential, accept_unseen=True))
        assert sorted(name for group in groups for name in group.names) == sorted(modules)
        first, few, none = (next(g for g in groups if g.names == [f"mlp.experts.{n}"]) for n in range(3))
        assert groups[-1] is none and none.tokens == 0 and not none.gram.any() and none.gram.shape == (32, 32)
        assert first.tokens + few.tokens == tokens.numel() and 0 < few.tokens < first.tokens
        torch.testing.assert_close(few.cross, few.gram)  # which tokens they were is not known: no reference
        means = block.square_means(modules)
        assert sorted(means) == sorted(modules.keys() - {"mlp.experts.2"})
        for group in groups[:-1]:
            for name in group.names:
                torch.testing.assert_close(means[name], group.gram.diagonal())
        edit(block.layer.self_attn)


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
