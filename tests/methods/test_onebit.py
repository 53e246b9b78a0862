"""OneBit: the split of a matrix, and what it becomes without training."""

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from optimum_slim import OneBit, SignLinear, SlimConfig, merge_and_repack, slim
from optimum_slim._kernels import unpack_signs
from optimum_slim.methods.onebit import svid
from optimum_slim.packed import PackedLinear


pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = token_ids()


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def distance(found, expected) -> float:
    return float((found - expected).norm() / expected.norm())


def packed_state(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": getattr(module, key).clone()
        for name, module in model.named_modules()
        if isinstance(module, PackedLinear)
        for key in module.packed_tensors()
    }


def split(weight):
    """The matrix that SVID puts in the place of `weight`."""
    scale_out, scale_in = svid(weight)
    return torch.where(weight < 0, -1.0, 1.0) * torch.outer(scale_out, scale_in)


# --- SVID


def test_a_matrix_of_rank_1_magnitudes_is_split_exactly():
    a, b, signs = gaussian(30).abs(), gaussian(50, seed=1).abs(), gaussian(30, 50, seed=2).sign()
    weight = signs * torch.outer(a, b)
    torch.testing.assert_close(split(weight), weight, rtol=1e-5, atol=1e-6)
    scale_out, scale_in = svid(weight)
    assert scale_out.norm() == pytest.approx(scale_in.norm().item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (7, 300), (1, 9), (9, 1)])
@pytest.mark.parametrize("kind", ["gaussian", "heavy tails", "structured"])
def test_it_is_the_largest_singular_pair_of_the_magnitudes(shape, kind):
    """Non-negative vectors, the error identity ||W - S ∘ abᵀ||² = ||W||² - σ₁(|W|)², and the optimum itself."""
    weight = gaussian(*shape)
    if kind == "heavy tails":
        weight = weight**3
    if kind == "structured":
        weight = weight * torch.outer(gaussian(shape[0], seed=1).exp(), gaussian(shape[1], seed=2).exp())
    scale_out, scale_in = svid(weight)
    assert (scale_out >= 0).all() and (scale_in >= 0).all()
    weight = weight.double()
    u, sigma, v = torch.linalg.svd(weight.abs(), full_matrices=False)
    torch.testing.assert_close(
        torch.outer(scale_out, scale_in).double(), sigma[0] * torch.outer(u[:, 0], v[0]), **FP32
    )
    error = (weight - split(weight.float())).square().sum() / weight.square().sum()
    torch.testing.assert_close(error, 1 - sigma[0] ** 2 / weight.square().sum(), rtol=0, atol=2e-6)


FP32 = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("seed", range(5))
def test_it_loses_no_more_than_the_best_rank_1_matrix_for_the_weight_itself(seed):
    """Proposition 2, with the errors that the literature's example has: 46.65 and 76.4 for Gaussian 64 x 96."""
    weight = gaussian(64, 96, seed=seed)
    ours = (weight - split(weight)).norm()
    theirs = torch.linalg.svdvals(weight)[1:].norm()
    rows = (weight - weight.sign() * weight.abs().mean(1, keepdim=True)).norm()
    assert ours < rows < theirs
    assert ours.item() == pytest.approx(46.65, rel=0.02) and theirs.item() == pytest.approx(76.4, rel=0.02)


def test_it_is_the_same_every_time_and_follows_the_scale():
    weight = gaussian(40, 60)
    first = svid(weight)
    assert all(torch.equal(one, other) for one, other in zip(first, svid(weight.clone()), strict=True))
    for factor in (2.0**-80, 2.0**80):
        for scale, scaled in zip(first, svid(weight * factor), strict=True):
            torch.testing.assert_close(scaled / factor**0.5, scale)


def test_zeros_split_into_zeros():
    assert not split(torch.zeros(5, 6)).any()
    weight = gaussian(6, 8)
    weight[2], weight[:, 5] = 0, 0
    scale_out, scale_in = svid(weight)
    assert scale_out[2] == 0 and scale_in[5] == 0 and torch.isfinite(split(weight)).all()


def test_equal_blocks_have_no_single_best_pair():
    weight = torch.block_diag(torch.ones(3, 3), torch.ones(3, 3))
    assert (weight - split(weight)).square().sum().item() == pytest.approx(9, rel=1e-5)


# --- without training


def test_layers_hold_signs_and_vectors():
    model = tiny_llama()
    weight = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    report = slim(model, OneBit())
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer) is SignLinear and not layer.post_norm and layer.weight.shape == (96, 8)
    assert torch.equal(unpack_signs(layer.weight, 64), weight < 0)
    assert layer.weight_in.dtype == layer.weight_out.dtype == torch.float16
    torch.testing.assert_close(layer.dense(), split(weight), rtol=2e-3, atol=1e-6)
    row = next(row for row in report.steps[0].layers if row["name"] == "model.layers.1.mlp.up_proj")
    assert row["bits_per_weight"] == pytest.approx(1 + 16 * (1 / 64 + 1 / 96))
    assert row["relative_error"] == pytest.approx(0.36, abs=0.02)  # 1 - 2 / π for Gaussian weights
    assert not isinstance(model.lm_head, PackedLinear)


def test_the_two_variants_differ_by_the_norm_alone():
    plain, paper = tiny_llama(), tiny_llama()
    dense = logits(plain)
    slim(plain, OneBit())
    slim(paper, OneBit(variant="paper"))
    one, other = packed_state(plain), packed_state(paper)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert distance(logits(plain), dense) < 0.7 < distance(logits(paper), dense)


@pytest.mark.parametrize("variant", ["plain", "paper"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packing_while_loading_saving_and_reloading(dense_folder, tmp_path, variant, dtype):
    step = OneBit(variant=variant)
    model = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=SlimConfig(step), dtype=dtype)
    other = AutoModelForCausalLM.from_pretrained(dense_folder, dtype=dtype)
    slim(other, step)
    assert torch.equal(logits(model), logits(other))
    assert len(model.slim_report.steps[0].layers) == 14
    model.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=dtype)
    assert torch.equal(logits(again), logits(model)) and again.model.layers[0].mlp.up_proj.post_norm == (
        variant == "paper"
    )
    ours, theirs = packed_state(again), packed_state(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_streamed_run_gives_the_same_files(dense_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(dense_folder)
    slim(model, OneBit())
    slim(dense_folder, OneBit(), out=tmp_path / "streamed")
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed")
    ours, theirs = packed_state(streamed), packed_state(model)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(logits(streamed), logits(model))


def test_a_damaged_checkpoint_is_refused(dense_folder, tmp_path):
    model = tiny_llama(hidden_size=60, num_attention_heads=6)
    slim(model, OneBit())
    model.model.layers[0].mlp.up_proj.weight.data[0, -1] |= 1 << 7
    model.save_pretrained(tmp_path / "slim")
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.up_proj: .*past the last column"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "slim")


def test_transposed_layers_with_bias():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=128, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    weight = model.transformer.h[0].mlp.c_fc.weight.detach().T.clone()
    slim(model, OneBit())
    layer = model.transformer.h[0].mlp.c_fc
    assert layer.transposed and layer.bias is not None
    torch.testing.assert_close(layer.dense(), split(weight), rtol=2e-3, atol=1e-6)
    packed = logits(model)
    model.dequantize()
    torch.testing.assert_close(logits(model), packed, rtol=1e-4, atol=1e-5)


def test_weights_that_are_not_finite_are_refused_before_anything_changes():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        slim(model, OneBit())
    assert not packed_state(model)


# --- adapters on top


def adapted(model):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    return model.eval()


@pytest.mark.parametrize("variant", ["plain", "paper"])
def test_lora_learns_on_top_and_leaves_the_bits_alone(variant):
    model = tiny_llama()
    slim(model, OneBit(variant=variant))
    before, packed = logits(model), packed_state(model)
    model = adapted(model)
    assert all(
        torch.equal(value, packed[name.replace("base_model.model.", "").replace(".base_layer", "")])
        for name, value in packed_state(model).items()
    )
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert not torch.equal(logits(model), before)


def test_lora_merges_into_dense_layers_or_is_packed_again():
    model = tiny_llama()
    slim(model, OneBit())
    model = adapted(model)
    expected = logits(model)
    repacked = tiny_llama()
    slim(repacked, OneBit())
    repacked = merge_and_repack(adapted(repacked))
    assert type(repacked.model.layers[0].mlp.up_proj) is SignLinear
    merged = model.merge_and_unload()
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert distance(logits(merged), expected) < 1e-5


def test_a_layer_with_post_norm_is_neither_merged_nor_dequantized():
    model = tiny_llama()
    slim(model, OneBit(variant="paper"))
    before = logits(model)
    with pytest.raises(ValueError, match="normalizes its outputs"):
        model.dequantize()
    assert torch.equal(logits(model), before)
    model = adapted(model)
    before = logits(model)
    with pytest.raises(ValueError, match="normalizes its outputs"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"variant": "svd"}, "variant must be one of"),
        ({"start": "zeros"}, "start must be one of"),
        ({"activation_bits": 4}, "activation_bits must be one of"),
        ({"scale_dtype": "int8"}, "scale_dtype must be one of"),
        ({"steps": -1}, "steps must be an integer of at least 0"),
        ({"block_steps": 1.5}, "block_steps must be an integer of at least 0"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"hidden_weight": -1.0}, "hidden_weight must not be negative"),
    ],
)
def test_wrong_fields(fields, says):
    with pytest.raises(ValueError, match=says):
        OneBit(**fields)
