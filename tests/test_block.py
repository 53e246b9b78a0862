"""What is measured in one layer: second moments, and those with the inputs of the unslimmed model."""

import pytest
import torch
from torch import nn
from walk_models import assert_untouched, linears, tiny_model

from optimum_slim import block as block_file
from optimum_slim.walk import decoder_layers, walk


@pytest.fixture
def tokens():
    return torch.randint(1, 97, (5, 17), generator=torch.Generator().manual_seed(1))


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
    dense = [torch.cat(list(block.inputs)) for block in walk(tiny_model("llama"), tokens, batch_size=2)]
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


def halved_one_by_one(model, tokens, reference=False):
    """All groups, each measured behind the halved weights of those before it, and the last hidden states."""
    groups = []
    for block in walk(model, tokens, batch_size=2, reference=reference):
        modules = linears(block.layer)
        for group in block.gram_groups(modules):
            groups.append(group)
            for name in group.names:
                half = nn.Linear(modules[name].in_features, modules[name].out_features, modules[name].bias is not None)
                half.load_state_dict({key: value / 2 for key, value in modules[name].state_dict().items()})
                block.layer.set_submodule(name, half)
        last = list(block.outputs())
    return groups, last


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "phi3", "opt"])
def test_children_that_are_done_are_not_computed_again(model_type, reference, tokens, monkeypatch):
    fast, last = halved_one_by_one(tiny_model(model_type), tokens, reference)
    monkeypatch.setattr(block_file, "REPLAY_LIMIT", 0)
    slow, expected = halved_one_by_one(tiny_model(model_type), tokens, reference)
    for group, other in zip(fast, slow, strict=True):
        assert group.names == other.names and torch.equal(group.gram, other.gram)
        assert not reference or torch.equal(group.cross, other.cross)
    assert all(torch.equal(a, b) for a, b in zip(last, expected, strict=True))


def test_a_finished_child_that_is_edited_is_computed_again(tokens):
    model = tiny_model("llama")
    block = next(walk(model, tokens))
    for _ in block.gram_groups(linears(block.layer)):
        pass
    assert set(block.finished) == {"self_attn"}
    before = next(block.outputs())
    assert torch.equal(before, next(block.outputs()))
    with torch.no_grad():
        block.layer.self_attn.o_proj.weight.mul_(2)
    assert not torch.equal(before, next(block.outputs()))
    block.layer.self_attn.o_proj = nn.Linear(32, 32, bias=False)
    after = next(block.outputs())
    block.finished.clear()
    assert torch.equal(after, next(block.outputs()))
    assert_untouched(model)
