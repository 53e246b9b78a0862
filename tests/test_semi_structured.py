"""Handing 2:4 layers to PyTorch's semi-structured tensors; a stand-in backend where there is no such GPU."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

from optimum_slim import semi_structured
from optimum_slim.semi_structured import to_semi_structured
from optimum_slim.sparse import SparseLinear


def sparse_layer(out_features, in_features, kept=2, dtype=torch.bfloat16, **options) -> SparseLinear:
    torch.manual_seed(0)
    layer = SparseLinear(
        in_features, out_features, layout="positions", kept=kept, value_dtype=dtype, dtype=dtype, **options
    )
    noise = torch.rand(out_features, in_features // 4, 4)
    dropped = torch.ones_like(noise, dtype=torch.bool).scatter_(2, noise.topk(kept).indices, False).flatten(1)
    layer.load_packed(layer.packed_state(torch.randn(out_features, in_features), dropped))
    layer.bias.data.normal_()
    return layer


class StandIn:
    """A backend that keeps the weight dense."""

    limits = SimpleNamespace(sparse_min_rows=32, sparse_min_cols=64)
    _DTYPE_SHAPE_CONSTRAINTS = dict.fromkeys((torch.float16, torch.bfloat16), limits)

    @staticmethod
    def from_dense(dense):
        return dense.clone()


class Refusing(StandIn):
    @staticmethod
    def from_dense(dense):
        raise RuntimeError("Supported only on GPUs with compute capability 8.x")


@pytest.fixture
def stand_in_gpu():
    """Tensors that say they are on a GPU of compute capability 9.0, where only the second backend works."""
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "get_device_capability", lambda: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_name", lambda: "stand-in"),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.dict(semi_structured.BACKENDS, {"cuSPARSELt": Refusing, "CUTLASS": StandIn}),
    ):
        yield


def model_of(*layers) -> nn.Sequential:
    return nn.Sequential(nn.Linear(128, 128), nn.Sequential(*layers))


def test_the_2_4_layers_become_linear_and_the_others_stay(stand_in_gpu):
    pairs, single, wide = sparse_layer(128, 128), sparse_layer(64, 128, kept=1), sparse_layer(64, 128, bias=True)
    model = model_of(pairs, single, wide)
    x = torch.randn(3, 128).bfloat16()
    expected = nn.functional.linear(x, pairs.dense(torch.bfloat16), pairs.bias)
    assert to_semi_structured(model) == 2
    converted = model[1][0]
    assert type(converted) is nn.Linear and type(model[1][2]) is nn.Linear and model[1][1] is single
    assert (converted.out_features, converted.in_features) == (128, 128)
    assert torch.equal(converted(x), expected)
    assert not converted.weight.requires_grad


def test_a_model_without_2_4_layers_is_refused():
    with pytest.raises(ValueError, match=r"no 2:4 layer with float values.*'2:4'"):
        to_semi_structured(model_of(sparse_layer(64, 128, kept=1)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu():
    model = model_of(sparse_layer(64, 128))
    with pytest.raises(RuntimeError, match=r"compute capability 8\.0"):
        to_semi_structured(model)
    assert isinstance(model[1][0], SparseLinear)


def test_an_old_gpu_is_refused(stand_in_gpu):
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda: (7, 5)),
        pytest.raises(RuntimeError, match=r"compute capability 8\.0"),
    ):
        to_semi_structured(model_of(sparse_layer(64, 128)))


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((64, 128), torch.float32, r"1\.1 has torch\.float32"),
        ((40, 128), torch.bfloat16, r"1\.1 has shape \(40, 128\); CUTLASS takes multiples of \(32, 64\)"),
        ((64, 132), torch.bfloat16, r"1\.1 has shape \(64, 132\); CUTLASS takes multiples of \(32, 64\)"),
    ],
    ids=["fp32", "rows", "columns"],
)
def test_a_layer_that_cannot_be_turned_is_named_and_nothing_changes(stand_in_gpu, shape, dtype, message):
    model = model_of(sparse_layer(64, 128), sparse_layer(*shape, dtype=dtype))
    with pytest.raises(ValueError, match=message):
        to_semi_structured(model)
    assert all(isinstance(module, SparseLinear) for module in model[1])


def test_no_backend_that_works(stand_in_gpu):
    with (
        mock.patch.dict(semi_structured.BACKENDS, {"CUTLASS": Refusing}),
        pytest.raises(RuntimeError, match=r"stand-in: cuSPARSELt: Supported only.*; CUTLASS: Supported only"),
    ):
        to_semi_structured(model_of(sparse_layer(64, 128)))


def test_a_layer_elsewhere_is_named(stand_in_gpu):
    with (
        mock.patch.object(torch.Tensor, "is_cuda", False),
        pytest.raises(ValueError, match=r"1\.0 is on cpu; move the model"),
    ):
        to_semi_structured(model_of(sparse_layer(64, 128)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    model = model_of(sparse_layer(128, 128)).cuda()
    layer, x = model[1][0], torch.randn(128, 128, device="cuda", dtype=torch.bfloat16)
    expected = nn.functional.linear(x, layer.dense(torch.bfloat16), layer.bias)
    assert to_semi_structured(model) == 1
    torch.testing.assert_close(model[1][0](x), expected, rtol=2e-2, atol=2e-2)
