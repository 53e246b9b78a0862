"""A streamed run gives what slimming in memory and saving gives, in the memory of two decoder layers."""

import json
import logging
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers import tiny_mixtral
from safetensors.torch import load_file, save_file
from test_walk import MODELS, tiny_model
from transformers import AutoModelForCausalLM

from optimum_slim import PT2LLM, BitNet, Calibration, Depth, Magnitude, SlimConfig, SparseGPT, Wanda, save, slim
from optimum_slim.checkpoint import run_folder
from optimum_slim.layer_packing import LayerPacking
from optimum_slim.skeleton import CannotStream, check_layers, load_skeleton
from optimum_slim.states import HiddenStates
from optimum_slim.stream import slim_files
from optimum_slim.walk import decoder_layers, walk
from optimum_slim.weights import WeightFiles


TERNARY = PT2LLM(rounds=0, group_size=16)
TOKENS = torch.randint(1, 97, (11, 17), generator=torch.Generator().manual_seed(1))
STEPS = {
    "ternary": TERNARY,
    "no data": BitNet(force=True),
    "sparse": SparseGPT(),
    "owl": SparseGPT(allocation="owl", sparsity=0.6),
    "owl, then no data": Magnitude(allocation="owl", sparsity=0.6),
    "asymmetric": SparseGPT(sparsity="2:4", asymmetric=0.25),
    "bits": SparseGPT(sparsity="2:4", bits=4),
    "zeros in dense layers": Wanda(packed=False),
    "some layers": SparseGPT(layers=(1, 2)),
}


def dense(folder: Path, model_type: str = "llama", **changes) -> Path:
    tiny_model(model_type, torch.bfloat16, **changes).save_pretrained(folder / "dense", max_shard_size=20_000)
    return folder / "dense"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}


def timeless(folder: Path) -> dict:
    report = json.loads((folder / "slim_report.json").read_text())
    for step in report["steps"]:
        step["seconds"] = 0
    return report


def assert_same_result(one: Path, other: Path) -> None:
    """The same tensors, config, generation config and report, sharded as it may be."""
    a, b = tensors(one), tensors(other)
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)
    for name in ("config.json", "generation_config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert timeless(one) == timeless(other)


def run_both(source: Path, step, **streaming) -> tuple[Path, Path]:
    data = Calibration(source=TOKENS) if step.needs_data else None
    model = AutoModelForCausalLM.from_pretrained(source, dtype=streaming.get("dtype", "auto"))
    slim(model, step, data=data)
    in_memory = save(model, source.parent / "in_memory")
    report = slim(source, step, data=data, out=source.parent / "streamed", **streaming)
    assert report.notes == model.slim_report.notes
    return in_memory, source.parent / "streamed"


@pytest.mark.parametrize("model_type", MODELS)
def test_every_architecture_gives_what_memory_gives(tmp_path, model_type):
    in_memory, streamed = run_both(dense(tmp_path, model_type), TERNARY)
    assert_same_result(in_memory, streamed)
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "in_memory", "streamed"}
    ids = TOKENS[:2]
    one, other = (AutoModelForCausalLM.from_pretrained(folder)(ids).logits for folder in (in_memory, streamed))
    assert torch.equal(one, other)


@pytest.mark.parametrize("name", STEPS)
def test_every_kind_of_step_gives_what_memory_gives(tmp_path, name):
    in_memory, streamed = run_both(dense(tmp_path), STEPS[name])
    assert_same_result(in_memory, streamed)


def test_linear_layers_outside_the_decoder_layers(tmp_path):
    source = dense(tmp_path, "opt", word_embed_proj_dim=16)
    in_memory, streamed = run_both(source, BitNet(force=True))
    assert_same_result(in_memory, streamed)
    assert tensors(streamed)["model.decoder.project_in.weight"].dtype == torch.uint8
    with pytest.raises(ValueError, match=r"lie outside model.decoder.layers: \['model.decoder.project_out'"):
        slim(source, TERNARY, data=TOKENS, out=tmp_path / "out")
    assert not run_folder(tmp_path / "out").exists()


def test_a_checkpoint_in_the_cache_of_the_hub(tmp_path, monkeypatch):
    """Offline, sharded, and asked for by its id."""
    source = dense(tmp_path)
    repository = tmp_path / "hub" / "models--someone--something"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    files = WeightFiles.find("someone/something")
    assert {file.parent for file in files.files} == {snapshot}
    model = tiny_model("llama", torch.bfloat16)
    assert all(torch.equal(files.read(name), parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_files_of_the_base_model_alone_and_in_one_piece(tmp_path, model_type):
    tiny_model(model_type, torch.bfloat16).save_pretrained(tmp_path / "dense")
    (file,) = (tmp_path / "dense").glob("*.safetensors")
    prefix = "model." if model_type == "llama" else "transformer."
    save_file({name.removeprefix(prefix): t for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert_same_result(*run_both(tmp_path / "dense", TERNARY))


def test_another_dtype_than_the_stored_one(tmp_path):
    in_memory, streamed = run_both(dense(tmp_path), TERNARY, dtype="float32")
    assert_same_result(in_memory, streamed)
    assert tensors(streamed)["model.norm.weight"].dtype == torch.float32


def test_layout_of_the_result(tmp_path):
    _, out = run_both(dense(tmp_path), TERNARY)
    assert {file.name for file in out.glob("*.safetensors")} == {
        f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        number = int(name.split(".")[2]) + 2 if ".layers." in name else 1
        assert file == f"model-0000{number}-of-00004.safetensors"
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors(out).values())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert index["metadata"]["total_parameters"] == model.num_parameters()
    assert len({file.stat().st_mode for file in out.iterdir()}) == 1


def test_no_more_than_two_layers_are_in_memory(tmp_path, monkeypatch):
    """Counts the decoder layers with a parameter in memory, dense weights kept by anyone included."""
    source = dense(tmp_path, num_hidden_layers=5)
    seen, alive = [], []
    visit, read = LayerPacking.__call__, WeightFiles.read

    def counted_read(files, name, dtype=None):
        tensor = read(files, name, dtype)
        alive.append((name, torch.multiprocessing.reductions.StorageWeakRef(tensor.untyped_storage())))
        return tensor

    class Counted(LayerPacking):
        def __call__(self, index):
            return visit(self, index)

        def _tensors(self, index):
            real = [i for i, layer in enumerate(self.stack) if any(not p.is_meta for p in layer.parameters())]
            held = {name.split(".")[2] for name, storage in alive if not storage.expired()}
            seen.append((real, held))
            return super()._tensors(index)

    monkeypatch.setattr(WeightFiles, "read", counted_read)
    monkeypatch.setattr("optimum_slim.stream.LayerPacking", Counted)
    slim(source, SparseGPT(asymmetric=0.25), data=TOKENS, out=tmp_path / "out")
    assert [real for real, _ in seen] == [[0], [1], [2], [3], [4]]
    assert all(len(held) <= 2 for _, held in seen)


def test_the_model_that_is_left_is_on_the_meta_device_and_packed(tmp_path):
    config = SlimConfig(TERNARY, calibration=Calibration(source=TOKENS))
    model = slim_files(dense(tmp_path), config, tmp_path / "out")
    _, stack = decoder_layers(model)
    assert all(parameter.is_meta for parameter in stack.parameters())
    assert not any(p.is_meta for n, p in model.named_parameters() if ".layers." not in n)
    assert all(not buffer.is_meta for buffer in model.buffers())
    assert model.slim_report.sizes["after"] < model.slim_report.sizes["before"]


@pytest.mark.parametrize("model_type", MODELS)
def test_a_skeleton_is_the_model_without_its_layers(tmp_path, model_type):
    source = dense(tmp_path, model_type)
    whole = AutoModelForCausalLM.from_pretrained(source)
    skeleton = load_skeleton(source, WeightFiles.find(source))
    prefix, _ = decoder_layers(whole)
    expected, found = dict(whole.named_parameters()), dict(skeleton.named_parameters())
    assert list(expected) == list(found)
    for name, parameter in found.items():
        assert parameter.is_meta == name.startswith(f"{prefix}.")
        assert parameter.dtype == expected[name].dtype and parameter.shape == expected[name].shape
        assert parameter.is_meta or torch.equal(parameter, expected[name])
    buffers = dict(skeleton.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in whole.named_buffers())
    assert skeleton.config.to_dict() == whole.config.to_dict()
    assert skeleton.generation_config.to_dict() == whole.generation_config.to_dict()
    assert getattr(skeleton, "hf_quantizer", None) is None


def test_hidden_states_beyond_the_limit_lie_in_a_file(tmp_path):
    states = [torch.randn(3, 5, 8, dtype=torch.bfloat16) for _ in range(4)] + [torch.randn(1, 5, 8).bfloat16()]
    kept = HiddenStates(tmp_path, 2 * states[0].nbytes, states)
    assert [isinstance(item, torch.Tensor) for item in kept.kept] == [True, True, False, False, False]
    assert all(torch.equal(one, other) for one, other in zip(kept, states, strict=True))
    for index in range(len(states)):
        states[index] = states[index] * 2
        kept[index] = states[index]
    assert all(torch.equal(one, other) for one, other in zip(kept, states, strict=True))
    assert kept.end == sum(tensor.nbytes for tensor in states[2:])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="cannot replace"):
        kept[4] = states[0]


def test_hidden_states_in_a_file_change_nothing(tmp_path):
    source = dense(tmp_path)
    for name, limit in {"memory": 2**30, "file": 0}.items():
        slim(source, SparseGPT(asymmetric=0.25), data=TOKENS, out=tmp_path / name, states_limit=limit)
    assert_same_result(tmp_path / "memory", tmp_path / "file")


def test_a_walk_asks_its_visitor_for_the_hidden_states(tmp_path):
    class Visiting:
        made = 0

        def __call__(self, index):
            return nullcontext()

        def states(self):
            Visiting.made += 1
            return HiddenStates(tmp_path, 0)

    model = tiny_model("llama")
    for block, other in zip(
        walk(model, TOKENS, reference=True, visiting=Visiting()), walk(model, TOKENS), strict=True
    ):
        assert all(torch.equal(a, b) for a, b in zip(block.inputs, other.inputs, strict=True))
        assert isinstance(block.references, HiddenStates)
    assert Visiting.made == 2


@pytest.mark.parametrize("steps", [[Depth(drop=1, metric="deepest"), TERNARY], [Depth(drop=1, metric="deepest")]])
def test_other_recipes_need_the_whole_model_and_say_so(tmp_path, steps):
    source = dense(tmp_path)
    report = slim(source, steps, data=TOKENS, out=tmp_path / "out")
    (note,) = [note for note in report.notes if "whole model in memory" in note]
    assert "only one step that packs linear layers without training can be streamed, not depth" in note
    assert note in json.loads((tmp_path / "out" / "slim_report.json").read_text())["notes"]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.num_hidden_layers == 2


def test_checkpoints_that_are_not_the_models_modules_need_the_whole_model(tmp_path):
    tiny_mixtral().save_pretrained(tmp_path / "dense")
    step = BitNet(force=True, modules_to_not_convert=("experts",))
    report = slim(tmp_path / "dense", step, out=tmp_path / "out")
    assert [
        note for note in report.notes if "whole model in memory" in note and "hold no tensor model.layers.0" in note
    ]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_weights_in_another_kind_of_file_need_the_whole_model(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path / "dense")
    torch.save(model.state_dict(), tmp_path / "dense" / "pytorch_model.bin")
    report = slim(tmp_path / "dense", BitNet(force=True), out=tmp_path / "out")
    assert any("holds neither model.safetensors nor" in note for note in report.notes)


def test_what_cannot_be_read_layer_by_layer_is_told_by_name(tmp_path):
    files = WeightFiles.find(dense(tmp_path))
    name = "model.layers.1.mlp.up_proj.weight"
    model = tiny_model("llama", torch.bfloat16)
    check_layers(model, files)
    place = files.tensors.pop(name)
    with pytest.raises(CannotStream, match=r"hold no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        check_layers(model, files)
    files.tensors[name] = type(place)(place.file, place.start, place.size, (1, 2), place.dtype)
    with pytest.raises(CannotStream, match=r"up_proj.weight is \(1, 2\) in its files"):
        check_layers(model, files)
    files.tensors[name] = type(place)(place.file, place.start, place.size, place.shape, "F8_E4M3")
    with pytest.raises(CannotStream, match="stored as F8_E4M3"):
        check_layers(model, files)
    files.tensors[name] = place
    model._keep_in_fp32_modules_strict = {"up_proj"}
    with pytest.raises(CannotStream, match="another dtype"):
        check_layers(model, files)
    model._keep_in_fp32_modules_strict = set()
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(CannotStream, match="share parameters"):
        check_layers(model, files)


def test_the_models_own_samples_are_drawn_once(tmp_path, monkeypatch):
    source = dense(tmp_path)
    settings = Calibration(samples=3, length=12)
    whole = AutoModelForCausalLM.from_pretrained(source)
    slim(whole, TERNARY, data=settings)
    slim(source, TERNARY, data=settings, out=tmp_path / "out")
    assert_same_result(save(whole, tmp_path / "in_memory"), tmp_path / "out")


def test_wrong_use(tmp_path):
    source = dense(tmp_path)
    with pytest.raises(ValueError, match="pass out="):
        slim(source, TERNARY)
    with pytest.raises(TypeError, match=r"\['out', 'restart'\] are for a model given by its folder or id"):
        slim(tiny_model("llama"), TERNARY, out=tmp_path / "out", restart=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        slim(source, TERNARY, data=TOKENS, out=tmp_path / "out")
    slim(source, TERNARY, data=TOKENS, out=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "mine.txt").exists()
    with pytest.raises(ValueError, match="is a slimmed model already"):
        slim(tmp_path / "out", TERNARY, data=TOKENS, out=tmp_path / "again")
    with pytest.raises(ValueError, match="vocabulary"):
        slim(source, TERNARY, data=TOKENS + 97, out=tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "out"}


def test_damaged_weights_are_named_and_nothing_is_left(tmp_path):
    model = tiny_model("llama", torch.bfloat16)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match=r"layers.0.mlp.up_proj.weight holds NaN"):
        slim(tmp_path / "dense", BitNet(force=True), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_a_truncated_file_is_named(tmp_path):
    source = dense(tmp_path)
    file = sorted(source.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{file.name} is truncated"):
        slim(source, TERNARY, data=TOKENS, out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_streaming_is_said_in_the_log(tmp_path, caplog):
    with caplog.at_level(logging.INFO, "optimum_slim.stream"):
        slim(dense(tmp_path), TERNARY, data=TOKENS, out=tmp_path / "out")
    assert "one decoder layer at a time" in caplog.text
