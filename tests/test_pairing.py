import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM
from walk_models import assert_untouched, tiny_model

from optimum_slim import PT2LLM, BitNet, Depth, Magnitude, Minitron, SelfSpeculation, make_draft
from optimum_slim.pairing import Pairing, pair


def model_of(name):
    if name == "llama":
        model = tiny_llama(num_hidden_layers=6)
    elif name == "gemma2":
        model = tiny_model(name, num_hidden_layers=6, layer_types=["sliding_attention", "full_attention"] * 3)
    else:
        model = tiny_model(name, n_layer=6)
    for token in ("eos", "pad", "bos"):
        setattr(model.generation_config, f"{token}_token_id", None)
    return model


def greedy(model, ids, speculation=None):
    return model.generate(ids, custom_generate=speculation, max_new_tokens=16, do_sample=False)


DRAFTS = {
    "fewer layers": ([Depth(layers=(2, 3))], (0, 1, 4, 5), 2),
    "one layer less": ([Depth(layers=(4,))], (0, 1, 2, 3, 5), 4),
    "ternary": ([PT2LLM(group_size=32)], tuple(range(6)), 0),
    "sparse": ([Magnitude(sparsity=0.5)], tuple(range(6)), 0),
    "fewer ternary layers": ([Depth(layers=(3,)), BitNet(force=True)], (0, 1, 2, 4, 5), 0),
    "fewer neurons": ([Minitron(intermediate_size=32)], tuple(range(6)), 0),
}


@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_slimmed_copies_draft_for_their_model(name, kind):
    model, ids = model_of(name), token_ids(1, 8, 96)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = greedy(model, ids)
    steps, places, shared = DRAFTS[kind]
    draft = make_draft(model, steps, data=token_ids(4, 16, 96))
    assert pair(draft, model) == Pairing(places, shared)
    for exit_layer in (None, 2):
        speculation = SelfSpeculation(draft=draft, exit_layer=exit_layer, draft_tokens=3)
        assert torch.equal(greedy(model, ids, speculation), plain)
        assert speculation.report.drafted
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_untouched(model)
    assert_untouched(draft)


def test_rows_of_a_batch_with_a_draft():
    model, ids = model_of("llama").double(), token_ids(3, 8)
    draft = make_draft(model, Depth(layers=(2, 3)))
    speculation = SelfSpeculation(draft=draft, draft_tokens=4)
    assert torch.equal(greedy(model, ids, speculation), greedy(model, ids))
    assert 0 < speculation.report.acceptance < 1


def test_shared_layers_do_not_run_again():
    model, ids, calls = model_of("llama"), token_ids(1), []
    draft = make_draft(model, Depth(layers=(2, 3)))
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[1]))
    speculation = SelfSpeculation(draft=draft, draft_tokens=3)
    greedy(model, ids, speculation)
    handle.remove()
    assert calls == [9] + [1] * speculation.report.rounds  # the prompt, and the last token of each draft


def test_an_equal_draft_is_always_accepted():
    model, ids = model_of("llama"), token_ids(1)
    speculation = SelfSpeculation(draft=make_draft(model, Depth(layers=(5,))), draft_tokens=3)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        model.model.layers[5].get_submodule(name).weight.data.zero_()
    greedy(model, ids, speculation)
    assert speculation.report.acceptance == 1


def test_a_reloaded_draft_shares_the_tensors_that_are_equal(tmp_path):
    model, ids = model_of("llama"), token_ids(1)
    make_draft(model, Depth(layers=(2, 3))).save_pretrained(tmp_path)
    draft = AutoModelForCausalLM.from_pretrained(tmp_path)
    for layer in model.model.layers:  # told apart by their norms
        assert layer.input_layernorm.weight.eq(1).all()
    found = pair(draft, model)
    assert found.places == (0, 1, 4, 5) and found.shared == 2
    assert found.shared_bytes == sum(4 * p.numel() for p in draft.parameters())
    assert draft.model.embed_tokens.weight is model.model.embed_tokens.weight
    assert draft.model.layers[2].mlp.up_proj.weight is model.model.layers[4].mlp.up_proj.weight
    assert pair(draft, model).shared_bytes == 0
    assert torch.equal(greedy(model, ids, SelfSpeculation(draft=draft)), greedy(model, ids))


def test_drafts_that_do_not_fit_are_refused():
    model = model_of("llama")
    with pytest.raises(ValueError, match="hidden_size 32 and 64"):
        pair(tiny_llama(hidden_size=32), model)
    with pytest.raises(ValueError, match="num_key_value_heads 1 and 2"):
        pair(tiny_llama(num_key_value_heads=1), model)
    other = tiny_llama(seed=1, num_hidden_layers=4)
    with torch.no_grad():
        for layer in other.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight.add_(0.5)
    with pytest.raises(ValueError, match="cannot be told from its weights; pass draft_layers"):
        pair(other, model)
    assert pair(other, model, (0, 1, 2, 5)).places == (0, 1, 2, 5)
    for layers in ((0, 1, 2), (0, 2, 1, 5), (0, 1, 2, 6)):
        with pytest.raises(ValueError, match="draft_layers must name 4 of the model's layers 0 to 5"):
            pair(other, model, layers)
    with pytest.raises(ValueError, match="pass draft as well"):
        SelfSpeculation(exit_layer=2, draft_layers=(0, 1))


def test_equal_weights_under_other_positions_are_not_the_same_layers():
    model, ids = model_of("llama").double(), token_ids(1)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    other = tiny_llama(num_hidden_layers=6, rope_parameters=rope).double()
    other.load_state_dict(model.state_dict())
    assert pair(other, model).shared == 0
    speculation = SelfSpeculation(draft=other, draft_tokens=3)
    assert torch.equal(greedy(model, ids, speculation), greedy(model, ids))
    assert speculation.report.drafted


def test_a_model_that_changes_after_it_was_paired():
    model, ids = model_of("llama").double(), token_ids(1)
    speculation = SelfSpeculation(draft=make_draft(model, Depth(layers=(3,))))
    greedy(model, ids, speculation)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.down_proj.weight
        model.model.layers[0].mlp.down_proj.weight = torch.nn.Parameter(weight * 3)
    assert torch.equal(greedy(model, ids, speculation), greedy(model, ids))


def test_a_draft_of_another_dtype_is_refused():
    model = model_of("llama")
    with pytest.raises(ValueError, match=r"dtype torch\.float64 and torch\.float32"):
        pair(model_of("llama").double(), model)
