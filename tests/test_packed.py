import copy

import pytest
import torch
from helpers import tiny_llama, token_ids
from torch import nn
from transformers.pytorch_utils import Conv1D

from optimum_slim import BitNet, TernaryLinear, slim
from optimum_slim._kernels import pack_ternary


def random_ternary(in_features=24, out_features=10, seed=0, **layout) -> TernaryLinear:
    generator = torch.Generator().manual_seed(seed)
    layer = TernaryLinear(in_features, out_features, **layout)
    codes = torch.randint(-1, 2, (out_features, in_features), generator=generator, dtype=torch.int8)
    state = {"weight": pack_ternary(codes)}
    for name, (shape, dtype) in layer.packed_tensors().items():
        if name != "weight":
            state[name] = torch.rand(shape, generator=generator).add(0.1).to(dtype)
    layer.load_packed(state)
    return layer


LAYOUTS = {
    "per-tensor": {},
    "per-row": {"group_size": 24},
    "groups": {"group_size": 10},
    "groups-offset": {"group_size": 8, "offset": True, "scale_dtype": torch.float16},
    "reciprocal": {"reciprocal_scale": True},
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weight_only_forward_is_the_dense_product(layout):
    layer = random_ternary(activation_bits=None, **layout)
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1))
    expected = nn.functional.linear(x, layer.dense(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_the_drawn_layout_by_hand():
    codes = torch.tensor([[-1], [0], [1], [-1], [1]], dtype=torch.int8)
    # P = 2 packed rows: byte 0 holds rows 0, 2, 4 and padding, byte 1 rows 1 and 3; code c = T + 1
    assert pack_ternary(codes).flatten().tolist() == [0b01_10_10_00, 0b01_01_00_01]


def test_dense_is_scale_times_codes_plus_offset():
    layer = TernaryLinear(3, 1, bias=False, group_size=2, offset=True)
    layer.load_packed(
        {
            "weight": pack_ternary(torch.tensor([[1, -1, 1]], dtype=torch.int8)),
            "weight_scale": torch.tensor([[2.0, 8.0]]),
            "weight_offset": torch.tensor([[0.5, -1.0]]),
        }
    )
    assert layer.dense().tolist() == [[2.5, -1.5, 7.0]]


def test_stored_bits_count_scales_and_padding():
    layer = TernaryLinear(256, 4, bias=False, group_size=128, offset=True, scale_dtype=torch.float16)
    assert layer.stored_bits() == 256 * 4 * 2 + 2 * (4 * 2 * 16)
    assert TernaryLinear(256, 5, bias=False).stored_bits() == 8 * 2 * 256 + 32


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("weight", torch.zeros(2, 24, dtype=torch.uint8)),
        ("weight", torch.zeros(3, 24)),
        ("weight_scale", torch.ones(2)),
        ("weight_scale", torch.ones(1, dtype=torch.uint8)),
    ],
)
def test_state_that_does_not_fit_is_refused(name, tensor):
    layer = random_ternary()
    state = {"weight": layer.weight, "weight_scale": layer.weight_scale, name: tensor}
    with pytest.raises(ValueError, match=f"{name} has"):
        layer.load_packed(state)


def test_offset_without_groups_is_refused():
    with pytest.raises(ValueError, match="group_size"):
        TernaryLinear(8, 8, offset=True)


def test_gradient_reaches_the_input_and_nothing_else():
    layer = random_ternary(group_size=8, offset=True)
    x = torch.randn(2, 24, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense().sum(0).expand(2, -1), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None and layer.weight_scale.grad is None and not layer.weight.requires_grad


def test_deepcopy_and_dtype_casts_keep_the_bytes():
    layer = random_ternary(group_size=8, offset=True)
    clone = copy.deepcopy(layer).to(torch.bfloat16)
    assert torch.equal(clone.weight, layer.weight) and clone.weight.dtype == torch.uint8
    assert clone(torch.randn(2, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_to_linear_gives_back_the_kind_of_layer_it_replaced():
    conv = Conv1D(10, 24)
    packed = BitNet(force=True).empty(conv)
    packed.load_packed(BitNet(force=True).pack("conv", conv.weight.T))
    packed.bias = conv.bias
    dense = packed.to_linear(torch.float32)
    assert type(dense) is Conv1D and dense.weight.shape == conv.weight.shape
    x = torch.randn(2, 24)
    torch.testing.assert_close(dense(x), nn.functional.linear(x, packed.dense(), conv.bias))


def test_whole_model_compiles_without_graph_breaks():
    model = tiny_llama()
    slim(model, BitNet(force=True))
    ids = token_ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
