"""Magnitude pruning: counts, packing while loading, and rounding."""

import pytest
import torch
from helpers import tiny_llama, token_ids
from transformers import AutoModelForCausalLM

from optimum_slim import Magnitude, SlimConfig, SparseLinear, slim
from optimum_slim.affine import AffineGrid


def weight(rows=12, columns=40, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) / 8


def test_the_smallest_go_and_the_others_stay():
    dense = weight()
    pruned, mask = Magnitude(sparsity=0.3).prune(dense)
    assert int(mask.sum()) == int(0.3 * 480) and (pruned[mask] == 0).all()
    assert torch.equal(pruned[~mask], dense[~mask])
    assert dense[mask].abs().max() <= dense[~mask].abs().min()


@pytest.mark.parametrize("kind", ["constant", "zero", "zero rows"])
def test_counts_with_ties(kind):
    dense = {"constant": torch.ones(12, 40), "zero": torch.zeros(12, 40), "zero rows": weight()}[kind]
    if kind == "zero rows":
        dense[:9] = 0
    assert int(Magnitude(sparsity=0.6).prune(dense)[1].sum()) == int(0.6 * 480)
    packed = Magnitude(sparsity=0.6).empty(torch.nn.Linear(40, 12, bias=False))
    packed.load_packed(Magnitude(sparsity=0.6).compress(dense))
    packed.validate()
    assert int(packed.mask().sum()) == 480 - int(0.6 * 480)


@pytest.mark.parametrize("sparsity", [0.5, "2:4", "4:8"])
def test_bits_round_what_is_kept(sparsity):
    step, dense = Magnitude(sparsity=sparsity, bits=4, group_size=16), weight()
    packed = step.empty(torch.nn.Linear(40, 12, bias=False))
    packed.load_packed(step.compress(dense))
    pruned, mask = step.prune(dense)
    grid = AffineGrid.fit(dense, 4, 16)
    assert torch.equal(packed.dense(), grid.values(grid.codes(pruned)).masked_fill(mask, 0))


FIELDS = [{}, {"sparsity": "2:4"}, {"sparsity": "1:4"}, {"sparsity": "4:8", "bits": 3}, {"sparsity": 0.7, "bits": 4}]
FIELDS += [{"shares": (0.4, 0.6)}, {"layers": (1, 2)}, {"packed": False}]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_while_loading_as_in_memory(dense_folder, tmp_path, fields, dtype):
    config = SlimConfig(Magnitude(**fields))
    loaded = AutoModelForCausalLM.from_pretrained(dense_folder, quantization_config=config, dtype=dtype)
    model = tiny_llama().to(dtype)
    slim(model, Magnitude(**fields))
    states = [found.state_dict() for found in (model, loaded)]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert any(isinstance(module, SparseLinear) for module in loaded.modules()) == fields.get("packed", True)
    logits = loaded(token_ids()).logits
    loaded.save_pretrained(tmp_path / "slim")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "slim", dtype=dtype)
    assert torch.equal(again(token_ids()).logits, logits)
    rows = [[row["relative_error"] for row in found.slim_report.steps[0].layers] for found in (model, loaded)]
    assert sorted(rows[0]) == pytest.approx(sorted(rows[1])) and 0 < min(rows[0]) < max(rows[0]) < 1
