"""The heat map and the curve: planted identity layers are found, the model is left alone, pictures are drawn."""

import json
import math
import sys

import pytest
import torch
from helpers import tiny_llama, token_ids
from moe_models import sparse

from optimum_slim import Minitron, lens, perplexity, slim
from optimum_slim.figures import draw_importance, draw_shapes, shape_text
from optimum_slim.importance import Importance, importance
from optimum_slim.inspection import Inspection, inspect
from optimum_slim.layer_loss import loss_increase
from optimum_slim.methods.depth import Depth
from optimum_slim.methods.heal import Heal


LAYERS = 6
TEXT = token_ids(1, 300, seed=1).flatten()


def planted(**changes):
    """A tiny Llama whose layers 2 and 3 pass the residual stream on unchanged."""
    model = tiny_llama(num_hidden_layers=LAYERS, **changes)
    for layer in model.model.layers[2:4]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
        torch.nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def snapshot(model):
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors, {name: id(module) for name, module in model.named_modules()}, model.config.to_dict()


def assert_unchanged(model, before):
    tensors, modules, config = snapshot(model)
    assert tensors.keys() == before[0].keys()
    assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
    assert (modules, config) == before[1:]
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_planted_identity_layers_are_found():
    inspection = inspect(planted(), token_ids(4, 12))
    assert [len(row) for row in inspection.distances] == [6, 5, 4, 3, 2, 1]
    assert inspection.distances[1][2] == 0 and inspection.best[1] == 2
    assert inspection.best[0] in (2, 3)
    assert all(0 <= value <= 1 for row in inspection.distances for value in row)
    assert all(start + n <= LAYERS - 1 for n, start in enumerate(inspection.best, start=1))
    assert len(inspection.best) == LAYERS - 1
    assert inspection.curve == () and inspection.dense_perplexity is None
    assert inspection.tokens == "4 samples of 12 tokens"


def test_distances_are_those_of_the_definition():
    model, tokens = planted().requires_grad_(False), token_ids(3, 7)
    inspection = inspect(model, tokens)
    states = model(tokens, output_hidden_states=True).hidden_states[1][:, -1].double()
    before = model.model.embed_tokens(tokens)[:, -1].double()
    angles = torch.arccos(torch.nn.functional.cosine_similarity(before, states, dim=-1)) / math.pi
    assert inspection.distances[0][0] == pytest.approx(float(angles.mean()), abs=1e-5)


def test_the_curve_is_that_of_a_model_cut_apart():
    model, tokens = planted(), token_ids(4, 12)
    inspection = inspect(model, tokens, drops=(2, 3), text_ids=TEXT, window=64, max_windows=3)
    assert [row["dropped"] for row in inspection.curve] == [2, 3]
    assert inspection.curve[0]["layers"] == [2, 3]
    assert inspection.curve[0]["perplexity"] == inspection.dense_perplexity == perplexity(model, TEXT, 64, 3)
    apart = planted()
    Depth(layers=tuple(inspection.curve[1]["layers"])).apply(apart, None)
    assert inspection.curve[1]["perplexity"] == perplexity(apart, TEXT, 64, 3)
    assert all(row["perplexity_healed"] is None for row in inspection.curve)
    assert inspection.text == "3 windows of 64 tokens"


def test_other_metrics_choose_other_layers():
    model, tokens = planted(), token_ids(4, 12)
    deepest = inspect(model, tokens, drops=(2,), metric="deepest", text_ids=TEXT, window=64, max_windows=1)
    assert deepest.curve[0]["layers"] == [3, 4]
    influence = inspect(model, tokens, drops=(2,), metric="block_influence", text_ids=TEXT, window=64, max_windows=1)
    assert influence.curve[0]["layers"] == [2, 3] and influence.metric == "block_influence"
    greedy = inspect(model, tokens, drops=(3, 1), metric="perplexity", text_ids=TEXT, window=64, max_windows=1)
    for row, n in zip(greedy.curve, (3, 1), strict=True):
        report = Depth(drop=n, metric="perplexity").apply(planted(), tokens)
        assert row["layers"] == report.step["layers"] and row["dropped"] == n


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_model_is_left_as_it_was(training, tied):
    model = planted(tie_word_embeddings=tied).train(training)
    model.model.layers[1].eval()
    before, modes = snapshot(model), [module.training for module in model.modules()]
    inspect(model, token_ids(4, 12), drops=(1, 4), text_ids=TEXT, window=64)
    assert_unchanged(model, before)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full", "norms"])
def test_healing_leaves_the_model_as_it_was_too(method):
    if method == "lora":
        pytest.importorskip("peft")
    model = planted()
    before = snapshot(model)
    heal = Heal(method=method, steps=12, batch_size=4, learning_rate=1e-3, held_out=0.0)
    inspection = inspect(model, token_ids(16, 16), drops=(3,), heal=heal, text_ids=TEXT, window=64)
    assert_unchanged(model, before)
    (row,) = inspection.curve
    assert row["perplexity_healed"] != row["perplexity"] and math.isfinite(row["perplexity_healed"])
    assert inspection.heal["method"] == method


def test_losses_without_layers_are_kept_with_the_scores(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    model, tokens = planted(), token_ids(4, 12)
    before = snapshot(model)
    inspection = inspect(model, tokens, widths=True, layer_losses=(2, 1))
    assert_unchanged(model, before)
    found = inspection.importance.loss_increase
    assert torch.equal(found[:2, :5], loss_increase(model, tokens, (1, 2))[:2, :5]) and found[1, 2] == 0
    plain = inspect(model, tokens, widths=True).save(tmp_path / "plain") / "importance.png"
    out = inspection.save(tmp_path / "losses")
    assert imread(out / "importance.png").shape[0] > imread(plain).shape[0]
    again = Importance.load(out / "importance.safetensors").loss_increase
    torch.testing.assert_close(again, found, equal_nan=True, rtol=0, atol=0)


def test_shapes_are_ranked_drawn_and_told(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    model, tokens = planted(), token_ids(8, 12)
    before, step = snapshot(model), Minitron(ratio=0.75)
    inspection = inspect(model, tokens, shapes=step, journal=tmp_path / "journal")
    assert_unchanged(model, before)
    assert inspection.shapes == tuple(step.ranking(model, tokens)) and len(inspection.shapes) > 1
    assert (tmp_path / "journal" / "shapes" / "fit.pt").is_file()
    out = inspection.save(tmp_path / "pictures")
    picture = imread(out / "shapes.png")
    assert min(picture.shape[:2]) > 300 and picture[..., :3].std() > 0.05
    data, best = json.loads((out / "inspection.json").read_text()), inspection.shapes[0]
    assert data["shapes"] == list(inspection.shapes) and data["search"]["ratio"] == 0.75
    text = (out / "inspection.md").read_text()
    assert f"| 1 | {best['hidden_size']} | {best['intermediate_size']} |" in text and "![](shapes.png)" in text
    words = text.split("--step minitron ")[1].split("`")[0].split()
    sizes = {name: int(value) for name, value in (word.split("=") for word in words)}
    slim(model, Minitron(**sizes), data=tokens)
    assert model.num_parameters() == best["parameters"]


def test_shapes_that_were_trained_are_drawn_with_both_perplexities(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"rank": 1, "hidden_size": 64, "num_attention_heads": 4, "parameters": 85_200_000}
    rows = [row | {"perplexity": 30.0, "perplexity_healed": 20.0}]
    rows.append(row | {"rank": 2, "hidden_size": 1024, "perplexity": math.inf, "perplexity_healed": 25.0})
    draw_shapes(rows, "tiny", tmp_path / "shapes.png")
    assert (tmp_path / "shapes.png").stat().st_size > 10_000
    assert shape_text(rows[1], rows) == "hidden 1,024, 85.2M" and shape_text(row, rows[:1]) == "85.2M"
    text = made(shapes=tuple(rows), search={"step": "minitron", "ratio": 0.5, "params": None}).to_markdown()
    assert "| 1 | 64 | 4 | 85,200,000 | 30 | 20 |" in text and '`{"step": "minitron", "ratio": 0.5}`' in text


WRONG = {
    "too many": ({"drops": (1, 6), "text_ids": TEXT}, r"cannot drop \[6\] of the 6 layers"),
    "none": ({"drops": (0,), "text_ids": TEXT}, r"cannot drop \[0\] of the 6 layers"),
    "heal without text": ({"heal": Heal(steps=1)}, "needs a text; pass text_ids"),
    "layer losses": ({"layer_losses": (1, 6), "widths": True}, r"cannot drop \[6\] of the 6 layers"),
    "layer losses without widths": ({"layer_losses": (1,)}, "pass widths=True"),
    "shapes": ({"shapes": Minitron(params=100)}, "no shape of this model"),
    "lens": ({"lens": True, "tokens": token_ids(4, 129)}, "longer than the 128 positions"),
    "metric": ({"metric": "angle", "text_ids": TEXT, "drops": (1,)}, "metric"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_use_is_said_and_changes_nothing(name):
    options, message = WRONG[name]
    model = planted()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inspect(model, **{"tokens": token_ids(4, 12), **options})
    assert_unchanged(model, before)


def made(**changes) -> Inspection:
    distances = tuple(tuple(0.01 * (n + start) for start in range(5 - n)) for n in range(1, 5))
    curve = tuple(
        {"dropped": n, "layers": [0], "perplexity": 10.0**n, "perplexity_healed": 11.0 * n} for n in (1, 2, 3)
    )
    settings = {"model": "tiny", "tokens": "4 samples", "distances": distances, "best": (0, 0, 0), "metric": "angular"}
    settings |= {"dense_perplexity": 9.5, "curve": curve, "text": "3 windows", "heal": {"step": "heal"}}
    return Inspection(**(settings | changes))


def test_saving_draws_and_writes_everything(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    out = made().save(tmp_path / "pictures")
    names = {"angular_distance.png", "perplexity.png", "inspection.json", "inspection.md"}
    assert {file.name for file in out.iterdir()} == names
    for file in out.glob("*.png"):
        picture = imread(file)
        assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.05
    data = json.loads((out / "inspection.json").read_text())
    assert data["curve"][1]["perplexity"] == 100 and data["distances"][3] == [0.04]
    text = (out / "inspection.md").read_text()
    assert "| 2 | 0 | 0 to 1 | 0.0200 |" in text and "| 3 | 0 | 1000 | 33 |" in text and '{"step": "heal"}' in text


def test_without_a_text_there_is_no_curve(tmp_path):
    pytest.importorskip("matplotlib")
    out = made(dense_perplexity=None, curve=(), text="", heal=None).save(tmp_path / "pictures")
    assert {file.name for file in out.iterdir()} == {"angular_distance.png", "inspection.json", "inspection.md"}
    assert "erplexity" not in (out / "inspection.md").read_text()


def test_infinite_perplexities_and_equal_distances_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    row = {"dropped": 1, "layers": [0], "perplexity": math.inf, "perplexity_healed": None}
    out = made(curve=(row,), distances=((0.1, 0.1), (0.2,)), best=(0,), heal=None).save(tmp_path / "pictures")
    assert (out / "perplexity.png").stat().st_size > 5000


def test_an_occupied_folder_is_kept_unless_asked(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="not empty"):
        made().save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "old.txt").write_text("old")
    made().save(tmp_path / "old", overwrite=True)
    assert not (tmp_path / "old" / "old.txt").exists() and (tmp_path / "old" / "inspection.md").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"mine.txt", "old"}


def test_missing_matplotlib_is_said_with_the_line_that_installs_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r'pip install "optimum-slim\[plot\]"'):
        made().save(tmp_path / "pictures")
    assert list(tmp_path.iterdir()) == []


def test_drawing_does_not_need_pyplot_and_its_global_state(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # importing it now raises
    assert (made().save(tmp_path / "pictures") / "perplexity.png").is_file()


def test_importance_is_measured_drawn_and_saved_where_asked_for(tmp_path):
    inspection = inspect(planted(), token_ids(4, 12), widths=True)
    assert abs(inspection.importance.layers[2]) < 1e-6 and "importance" not in inspection.to_dict()
    out = inspection.save(tmp_path / "pictures")
    assert (out / "importance.png").stat().st_size > 10_000
    assert "importance.png" in (out / "inspection.md").read_text()
    again = Importance.load(out / "importance.safetensors")
    assert torch.equal(again.neurons, inspection.importance.neurons)
    assert inspect(planted(), token_ids(4, 12)).importance is None


def test_the_lens_is_drawn_and_written_where_asked_for(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    model, tokens = planted(), token_ids(4, 12)
    before = snapshot(model)
    inspection = inspect(model, tokens, lens=True)
    assert_unchanged(model, before)
    assert inspection.lens == lens(model, tokens)
    out = inspection.save(tmp_path / "pictures")
    picture = imread(out / "lens.png")
    assert min(picture.shape[:2]) > 500 and picture[..., :3].std() > 0.05
    assert (out / "lens.csv").read_text() == inspection.lens.to_csv()
    text = (out / "inspection.md").read_text()
    assert inspection.lens.to_markdown() in text and f"On 4 samples of 12 tokens, {inspection.lens.summary()}." in text
    assert json.loads((out / "inspection.json").read_text())["lens"]["loss"] == list(inspection.lens.loss)
    assert inspect(model, tokens).lens is None


def test_experts_are_drawn_beside_the_rest(tmp_path):
    files = [tmp_path / "dense.png", tmp_path / "sparse.png"]
    for model, file in zip((tiny_llama(), sparse("qwen3_moe")), files, strict=True):
        draw_importance(importance(model, token_ids(4, 12)), "title", file)
    widths = [int.from_bytes(file.read_bytes()[16:20], "big") for file in files]  # in the header of a PNG
    assert widths == [1350, 2160]
