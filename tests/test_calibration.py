"""Calibration tokens from every kind of source, and one clear error for each wrong one."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_slim import sampling
from optimum_slim.calibration import Calibration


WORDS = [f"w{number}" for number in range(90)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OPTIMUM_SLIM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=[2, 3],
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    """One token a word; ids 0 to 4 are special, 95 and 96 of the model stand for nothing."""
    special = ["<unk>", "<s>", "</s>", "<end>", "<x>"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>", additional_special_tokens=["<x>"]
    )


def text(count, start=0):
    return " ".join(WORDS[(start + number) % 90] for number in range(count))


def is_run(row):
    """Whether the ids follow one another as they do in `text`."""
    return all((b - a) % 90 == 1 for a, b in zip(row[:-1].tolist(), row[1:].tolist(), strict=True))


# --- the model's own samples


def test_samples_of_the_model(model, tokenizer):
    state = torch.get_rng_state()
    tokens = Calibration(samples=40, length=9).tokens(model, tokenizer)
    assert tokens.shape == (40, 9) and tokens.dtype == torch.int64 and tokens.device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), state)
    assert (tokens[:, 0] == 1).all()
    assert not torch.isin(tokens[:, 1:], torch.tensor([0, 1, 2, 3, 4, 95, 96])).any()
    assert tokens[:, 1].unique().numel() > 10


def test_samples_need_no_tokenizer(model):
    tokens = Calibration(samples=3, length=40).tokens(model)
    assert not torch.isin(tokens[:, 1:], torch.tensor([1, 2, 3])).any()


def test_the_first_tokens_are_the_most_likely_ones(model):
    tokens = Calibration(samples=2, length=12).tokens(model)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    logits[:, :, [1, 2, 3]] = -torch.inf
    likeliest = logits.argmax(-1) == tokens[:, 1:]
    assert likeliest[:, 1 : 1 + sampling.LIKELIEST].all()
    assert not likeliest[:, 1 + sampling.LIKELIEST :].all()


def test_a_low_temperature_is_nearly_greedy(model):
    tokens = Calibration(samples=2, length=12, temperature=1e-4).tokens(model)
    with torch.no_grad():
        logits = model(tokens).logits[:, :-1]
    logits[:, :, [1, 2, 3]] = -torch.inf
    assert (logits.argmax(-1) == tokens[:, 1:])[:, 1:].all()


def test_same_seed_same_samples(model, monkeypatch, tmp_path):
    first = Calibration(samples=2, length=16).tokens(model)
    monkeypatch.setenv("OPTIMUM_SLIM_CACHE", str(tmp_path / "other"))
    torch.manual_seed(123)
    assert torch.equal(Calibration(samples=2, length=16).tokens(model), first)
    assert not torch.equal(Calibration(samples=2, length=16, seed=1).tokens(model), first)


def test_sampling_keeps_the_training_mode(model):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    Calibration(samples=1, length=4).tokens(model)
    assert [module.training for module in model.modules()] == modes
    model.eval()


def refuse(*args, **kwargs):
    raise AssertionError("sampled although the samples were cached")


def test_cached_samples_are_used(model, cache, monkeypatch):
    first = Calibration(samples=2, length=8).tokens(model)
    (file,) = cache.iterdir()
    assert file.suffix == ".safetensors"
    monkeypatch.setattr(sampling, "_sample", refuse)
    assert torch.equal(Calibration(samples=2, length=8).tokens(model), first)


@pytest.mark.parametrize("change", [{"samples": 3}, {"length": 9}, {"seed": 1}, {"temperature": 0.5}], ids=str)
def test_other_settings_are_sampled_anew(model, change, cache):
    Calibration(samples=2, length=8).tokens(model)
    Calibration(**({"samples": 2, "length": 8} | change)).tokens(model)
    assert len(list(cache.iterdir())) == 2


def test_other_weights_are_sampled_anew(model, cache):
    Calibration(samples=2, length=8).tokens(model)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    try:
        Calibration(samples=2, length=8).tokens(model)
    finally:
        with torch.no_grad():
            model.model.norm.weight.div_(1.5)
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-9], lambda b: b"", lambda b: b[:-8] + b"\xff" * 8],
    ids=["cut", "empty", "overwritten"],
)
def test_a_damaged_cache_file_is_redone(model, cache, damage, caplog):
    first = Calibration(samples=2, length=8).tokens(model)
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert torch.equal(Calibration(samples=2, length=8).tokens(model), first)
    assert "Sampling again" in caplog.text
    assert file.read_bytes() == whole and list(cache.iterdir()) == [file]


def test_a_cache_that_cannot_be_written_is_only_reported(model, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPTIMUM_SLIM_CACHE", str(tmp_path / "file"))
    assert Calibration(samples=1, length=4).tokens(model).shape == (1, 4)
    assert "not cached" in caplog.text


def test_an_interrupted_write_leaves_no_file(model, cache, monkeypatch, caplog):
    def fail(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(sampling.os, "replace", fail)
    assert Calibration(samples=1, length=4).tokens(model).shape == (1, 4)
    assert not list(cache.iterdir())
    assert "No space left" in caplog.text


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.delenv("OPTIMUM_SLIM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert sampling.cache_dir() == tmp_path / "optimum_slim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sampling.cache_dir() == tmp_path / ".cache" / "optimum_slim"


# --- text


def write_parquet(path, rows):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("name", ["a.txt", "a.tokens", "a.jsonl", "a.json", "a.parquet"])
def test_windows_of_a_file(name, tmp_path, model, tokenizer):
    path = tmp_path / name
    rows = [{"body": text(90)}, {"body": ""}, {"body": text(90)}]
    match path.suffix:
        case ".jsonl":
            path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
        case ".json":
            path.write_text(json.dumps(rows))
        case ".parquet":
            write_parquet(path, rows)
        case _:
            path.write_text("\n".join(row["body"] for row in rows))
    calibration = Calibration(source=path, samples=6, length=20, text_column="body")
    tokens = calibration.tokens(model, tokenizer)
    assert tokens.shape == (6, 20) and tokens.dtype == torch.int64
    assert all(is_run(row) for row in tokens)
    assert len({tuple(row) for row in tokens.tolist()}) > 3
    assert torch.equal(Calibration.from_dict(calibration.to_dict()).tokens(model, tokenizer), tokens)


def test_windows_of_texts(model, tokenizer):
    tokens = Calibration(source=[text(50), text(50, start=50)], samples=3, length=30).tokens(model, tokenizer)
    assert all(is_run(row) for row in tokens)
    whole = Calibration(source=[text(50), text(50, start=50)], samples=1, length=50 + 14).tokens(model, tokenizer)
    assert is_run(whole[0])


def test_windows_start_as_the_tokenizer_does(model, tokenizer):
    from tokenizers.processors import TemplateProcessing

    adding = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    adding.bos_token = "<s>"
    adding.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokens = Calibration(source=[text(80)], samples=4, length=20).tokens(model, adding)
    assert tokens.shape == (4, 20) and (tokens[:, 0] == 1).all()
    assert all(is_run(row[1:]) for row in tokens)


def test_a_long_file_is_not_read_to_the_end(tmp_path, model, tokenizer):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join([json.dumps({"text": text(90)})] * 9 + ["broken"]))
    assert Calibration(source=str(path), samples=2, length=20).tokens(model, tokenizer).shape == (2, 20)


def test_a_dataset_is_streamed(model, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(source, *, name, split, streaming):
        assert (source, name, split, streaming) == ("owner/name", "part", "validation", True)
        return [{"text": text(90)}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = Calibration(source="owner/name", subset="part", split="validation", samples=2, length=20)
    assert all(is_run(row) for row in source.tokens(model, tokenizer))


# --- token ids


@pytest.mark.parametrize("source", [torch.arange(12).view(2, 6), torch.arange(12).view(2, 6).int().tolist()], ids=type)
def test_token_ids_are_used_as_they_are(source, model):
    calibration = Calibration(source=source)
    assert (calibration.samples, calibration.length) == (2, 6)
    tokens = calibration.tokens(model)
    assert tokens.dtype == torch.int64 and torch.equal(tokens, torch.arange(12).view(2, 6))


# --- settings


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration(),
        Calibration(source="owner/name", subset="x", split="test", samples=3, length=7, seed=5),
        Calibration(source=["a", "b"]),
        Calibration(source=torch.ones(2, 3, dtype=torch.int32)),
    ],
    ids=["model", "dataset", "texts", "ids"],
)
def test_settings_survive_json(calibration):
    settings = json.loads(json.dumps(calibration.to_dict()))
    again = Calibration.from_dict(settings)
    assert again.to_dict() == settings and again == calibration


def test_texts_are_recorded_but_not_kept(model):
    record = Calibration(source=["a secret"], length=8).to_dict()
    assert record["source"].keys() == {"kind", "count", "sha256"}
    assert Calibration(source=["another"], length=8) != Calibration(source=["a secret"], length=8)
    with pytest.raises(ValueError, match="Pass the data again"):
        Calibration.from_dict(record).tokens(model)


# --- errors


def test_too_little_text(model, tokenizer):
    with pytest.raises(ValueError, match="found 30 tokens, needed 64 for 2 samples of 32"):
        Calibration(source=[text(30)], samples=2, length=32).tokens(model, tokenizer)


FILES = {
    "empty.txt": ("", ValueError, "is empty"),
    "column.jsonl": ('{"body": "w1"}', ValueError, "no column 'text'; it has body"),
    "broken.jsonl": ('{"text": "w1"}\n{oops', ValueError, "Line 2 of .* is not JSON"),
    "object.json": ('{"text": "w1"}', ValueError, "JSON dict, expected a list"),
    "broken.json": ("[", ValueError, "is not JSON"),
    "number.json": ("[1]", ValueError, "Row 0 of .* holds int, expected text"),
    "broken.parquet": ("nonsense", ValueError, "is not a parquet file"),
    "latin.txt": (b"caf\xe9", ValueError, "is not UTF-8"),
    "latin.jsonl": (b'{"text": "caf\xe9"}', ValueError, "is not UTF-8"),
}


@pytest.mark.parametrize("name", FILES)
def test_bad_files(name, tmp_path, model, tokenizer):
    content, error, message = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(error, match=message):
        Calibration(source=str(tmp_path / name), samples=1, length=4).tokens(model, tokenizer)


def test_missing_file(model, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        Calibration(source="nowhere.txt", length=8).tokens(model, tokenizer)


def test_missing_column_of_a_parquet_file(tmp_path, model, tokenizer):
    write_parquet(tmp_path / "a.parquet", [{"body": "w1", "title": "w2"}])
    with pytest.raises(ValueError, match="no column 'text'; it has body, title"):
        Calibration(source=str(tmp_path / "a.parquet"), length=8).tokens(model, tokenizer)


def test_dataset_that_cannot_be_loaded(model, tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(*args, **kwargs):
        raise datasets.exceptions.DatasetNotFoundError("no such dataset")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match="'no/such' is neither a file nor a dataset"):
        Calibration(source="no/such", length=8).tokens(model, tokenizer)


@pytest.mark.parametrize(("package", "source"), [("datasets", "owner/name"), ("pyarrow", "a.parquet")])
def test_missing_packages_come_with_their_pip_line(package, source, tmp_path, model, tokenizer, monkeypatch):
    (tmp_path / "a.parquet").write_text("x")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=r"pip install optimum-slim\[data\]"):
        Calibration(source=source, length=8).tokens(model, tokenizer)


def test_tokenizer_not_found(model, tmp_path, monkeypatch):
    monkeypatch.setattr(model.config, "_name_or_path", str(tmp_path))
    monkeypatch.setattr(model, "name_or_path", str(tmp_path), raising=False)
    with pytest.raises(ValueError, match="needs a tokenizer"):
        Calibration(source=[text(30)], length=8).tokens(model)


@pytest.mark.parametrize("ids", [[[0, 97]], [[-1, 5]]], ids=["high", "negative"])
def test_ids_outside_the_vocabulary(ids, model):
    with pytest.raises(ValueError, match="ids 0 to 96"):
        Calibration(source=ids).tokens(model)


def test_ids_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"must be integers, got a tensor of torch\.float32"):
        Calibration(source=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        Calibration(source=torch.ones(3, dtype=torch.long))
    with pytest.raises(ValueError, match="differ in length"):
        Calibration(source=[[1, 2], [3]])


@pytest.mark.parametrize("source", [None, 3, [], [1, 2], ["a", 1]], ids=repr)
def test_unknown_kinds_of_source(source):
    with pytest.raises(TypeError, match="Expected 'model', a dataset id, a file"):
        Calibration(source=source)


def test_too_long_for_the_model(model):
    with pytest.raises(ValueError, match=r"65 tokens are longer than the 64 positions .* Calibration\(length=64\)"):
        Calibration(length=65).tokens(model)


@pytest.mark.parametrize("field", [{"samples": 0}, {"length": 2.5}, {"samples": True}, {"temperature": 0}], ids=str)
def test_bad_settings(field):
    with pytest.raises(ValueError, match=f"{next(iter(field))} must be"):
        Calibration(**field)


def test_unknown_settings_are_named():
    with pytest.raises(ValueError, match=r"Unknown calibration settings: sample\..*samples"):
        Calibration.from_dict({"sample": 3})


def test_no_progress_bar_without_a_terminal(model, capfd):
    Calibration(samples=1, length=8).tokens(model)
    assert capfd.readouterr().err == ""
