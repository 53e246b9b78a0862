"""Training the kept values of sparse layers: what counts as sparse, and the layers that stand in meanwhile."""

import copy

import pytest
import torch
from helpers import sparse_layer
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from optimum_slim.sparse import SparseLinear
from optimum_slim.sparse_training import (
    SPARSE,
    TrainedSparseLinear,
    as_sparse,
    is_sparse,
    set_weight,
    sparse_stand_ins,
    trained_values,
)


@pytest.mark.parametrize("sparsity", ["2:4", "1:4", "4:8", 0.5])
def test_values_train_where_they_are(sparsity):
    base = sparse_layer(sparsity, bias=True)
    model = nn.Sequential(base)
    values = base.weight_values.requires_grad_()
    x = torch.randn(5, 38)
    with trained_values(model):
        assert type(base) is TrainedSparseLinear
        y = model(x)
        y.square().sum().backward()
    assert type(base) is SparseLinear
    dense = base.dense().requires_grad_()
    expected = linear(x, dense, base.bias)
    expected.square().sum().backward()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    stepped = base.dense().sub_(dense.grad)
    values.data -= values.grad
    torch.testing.assert_close(base.dense(), stepped * base.mask(), rtol=1e-4, atol=1e-4)


def test_what_counts_as_sparse():
    def with_zeros(share):
        layer = nn.Linear(40, 25)
        layer.weight.data.view(-1)[: int(share * 1000)] = 0
        return layer

    assert not is_sparse(nn.Linear(40, 25)) and not is_sparse(with_zeros(SPARSE - 0.01))
    assert is_sparse(with_zeros(SPARSE)) and is_sparse(with_zeros(1.0))
    assert not is_sparse(nn.Embedding.from_pretrained(torch.zeros(4, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_stand_ins_take_the_place_of_ordinary_sparse_layers(dtype):
    torch.manual_seed(0)
    conv = Conv1D(12, 20)
    model = nn.Sequential(nn.Linear(9, 20), conv, nn.Linear(12, 5, bias=False)).to(dtype).eval()
    for linear_layer in (model[1], model[2]):
        linear_layer.weight.data[torch.rand(linear_layer.weight.shape) < 0.4] = 0
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(3, 9, dtype=dtype)
    expected = model(x)
    with sparse_stand_ins(model) as originals:
        assert set(originals) == {"1", "2"} and type(model[1]) is SparseLinear
        torch.testing.assert_close(model(x), expected)
        model.set_submodule("2", originals.pop("2"))
        set_weight(model[1], model[1].dense() + 1)
    assert type(model[1]) is Conv1D and torch.equal(model[2].weight, before["2.weight"])
    zero = before["1.weight"] == 0
    assert torch.equal(model[1].weight == 0, zero)
    assert torch.equal(model[1].weight, torch.where(zero, 0, before["1.weight"].float() + 1).to(dtype))
    with pytest.raises(RuntimeError, match="stop"), sparse_stand_ins(model):
        raise RuntimeError("stop")
    assert type(model[1]) is Conv1D and type(as_sparse(model[2])) is SparseLinear
