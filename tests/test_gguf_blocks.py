"""Ternary blocks of GGUF files, bit for bit against the gguf package."""

import pytest
import torch

from optimum_slim import TernaryLinear
from optimum_slim._kernels import pack_ternary
from optimum_slim.gguf_blocks import BLOCKS, layer_blocks, misfit, pack_blocks, unpack_blocks


gguf = pytest.importorskip("gguf")
TERNARY = ["TQ2_0", "TQ1_0"]


def codes(rows=6, columns=512, seed=0):
    return torch.randint(-1, 2, (rows, columns), generator=torch.Generator().manual_seed(seed), dtype=torch.int8)


def scales(kind, rows=6, columns=512):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(rows, columns // BLOCKS[kind].columns, generator=generator) + 0.1).half()


def dense(codes, kind, scale):
    return (codes.unflatten(1, (-1, BLOCKS[kind].columns)).float() * scale.float()[..., None]).flatten(1)


def read(data, kind):
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_stand_for_the_same_weights_to_others(kind):
    data = pack_blocks(codes(), kind, scales(kind))
    assert data.shape == (6, 512 // BLOCKS[kind].columns * BLOCKS[kind].bytes)
    assert torch.equal(read(data, kind), dense(codes(), kind, scales(kind)))


@pytest.mark.parametrize("kind", TERNARY)
def test_blocks_are_the_bytes_that_others_write(kind):
    weight = dense(codes(), kind, scales(kind))
    theirs = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))
    assert torch.equal(pack_blocks(codes(), kind, scales(kind)), theirs)


@pytest.mark.parametrize("kind", TERNARY)
def test_round_trip(kind):
    found, scale = unpack_blocks(pack_blocks(codes(), kind, scales(kind)), kind)
    assert torch.equal(found, codes()) and torch.equal(scale, scales(kind))


def test_an_offset_by_hand():
    data = pack_blocks(torch.tensor([[-1, 0, 1] + [0] * 29]), "Q4_1", torch.tensor([[0.5]]), torch.tensor([[0.25]]))
    assert read(data, "Q4_1")[0, :4].tolist() == [-0.25, 0.25, 0.75, 0.25]


@pytest.mark.parametrize("kind", TERNARY)
def test_damaged_blocks_are_refused(kind):
    data = pack_blocks(codes(), kind, scales(kind))
    data[2, -2:] = torch.tensor([0, 0x7C], dtype=torch.uint8)  # an infinite scale
    with pytest.raises(ValueError, match="the file is damaged"):
        unpack_blocks(data, kind)


def test_a_code_of_three_is_refused():
    data = pack_blocks(codes(), "TQ2_0", scales("TQ2_0"))
    data[0, 0] |= 3
    with pytest.raises(ValueError, match="no ternary weight packs to"):
        unpack_blocks(data, "TQ2_0")


def layer(columns=512, scale=None, **settings):
    made = TernaryLinear(columns, 6, bias=False, scale_dtype=torch.float16, **settings)
    state = {"weight": pack_ternary(codes(6, columns))}
    for name, (shape, dtype) in made.packed_tensors().items():
        if name != "weight":
            generator = torch.Generator().manual_seed(len(name))
            state[name] = (torch.rand(shape, generator=generator) + 0.1).to(dtype) if scale is None else scale
    made.load_packed(state)
    return made


FITTING = {
    "per tensor": ({}, BLOCKS),
    "per row": ({"group_size": 512}, BLOCKS),
    "groups of 256": ({"group_size": 256}, BLOCKS),
    "groups of 512 in 768": ({"columns": 768, "group_size": 512}, BLOCKS),
    "groups of 128": ({"group_size": 128}, ["Q4_0", "Q4_1"]),
    "groups of 64 in 96": ({"columns": 96, "group_size": 64}, ["Q4_0", "Q4_1"]),
    "per tensor of 576": ({"columns": 576}, ["Q4_0", "Q4_1"]),
    "an offset": ({"group_size": 256, "offset": True}, ["Q4_1"]),
    "groups of 48": ({"columns": 480, "group_size": 48}, []),
    "width 100": ({"columns": 100}, []),
}


@pytest.mark.parametrize("name", FITTING)
def test_what_fits_is_exact(name):
    settings, fitting = FITTING[name]
    made = layer(**settings)
    assert [kind for kind in BLOCKS if misfit(made, kind) is None] == list(fitting)
    for kind in fitting:
        found = read(layer_blocks(made, kind), kind)
        if made.has_offset:  # offset - scale is rounded to fp16
            torch.testing.assert_close(found, made.dense(), rtol=0, atol=2.0**-11)
        else:
            assert torch.equal(found, made.dense())


def test_rows_in_another_order():
    made, order = layer(group_size=256), torch.tensor([3, 1, 0, 2, 5, 4])
    assert torch.equal(read(layer_blocks(made, "TQ2_0", order), "TQ2_0"), made.dense()[order])


def test_scales_out_of_fp16_do_not_fit():
    made = TernaryLinear(256, 6, bias=False)
    for scale in (1e6, 1e-7):
        made.load_packed({"weight": pack_ternary(codes(6, 256)), "weight_scale": torch.tensor([scale])})
        assert "too large or too small for fp16" in misfit(made, "TQ2_0")
