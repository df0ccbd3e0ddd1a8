"""Calibration: the file, its ranges against hooks on `transformers`' model, and what is refused."""

import json
import shutil
import zipfile

import numpy as np
import pytest
import torch
from outlier_models import CONFIG, NEWS, SAMPLES, calibrated, outlier_weights, write_model
from transformers import AutoModelForCausalLM, DynamicCache

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.quantization.calibration import calibrate, read_calibration
from trtbuild.quantization.layer import PRODUCTS
from trtbuild.quantization.samples import calibration_samples

# By product, how many channels go in and out: 4 query heads and 2 x 2 KV heads of 16.
WIDTHS = {
    "self_attn.qkv_proj": (64, 128),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_up_proj": (64, 256),
    "mlp.down_proj": (128, 64),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """With biases and a tied head."""
    options = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    return write_model(tmp_path_factory.mktemp("calibration") / "checkpoint", **options)


@pytest.fixture(scope="module")
def file(checkpoint):
    return calibrated(checkpoint)


@pytest.fixture
def threads():
    """Sets how many threads torch has."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def absmax(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(0, -2).abs().amax(0)


def observed(checkpoint, samples: list[list[int]]) -> dict[str, torch.Tensor]:
    """Ranges by projection from hooks on `transformers`' model, one sample at a time."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    largest: dict[str, torch.Tensor] = {}

    def see(name: str, x: torch.Tensor) -> None:
        largest[name] = torch.maximum(absmax(x), largest.get(name, torch.zeros(x.shape[-1])))

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs, name=f"{name}.input": see(name, inputs[0]))
            module.register_forward_hook(lambda _, inputs, output, name=f"{name}.output": see(name, output))
    with torch.inference_mode():
        for sample in samples:
            cache = DynamicCache()
            model(torch.tensor([sample]), past_key_values=cache)
            for i, layer in enumerate(cache.layers):
                for kind, states in (("key", layer.keys), ("value", layer.values)):
                    see(f"model.layers.{i}.self_attn.{kind}", states.transpose(1, 2).flatten(2))
    return largest


def test_ranges_are_those_of_transformers(checkpoint, file):
    """Inputs, outputs with their biases, keys after rotation and values."""
    ranges = read_calibration(file, Checkpoint(checkpoint)).ranges
    seen = observed(checkpoint, calibration_samples(checkpoint, **SAMPLES).tokens)
    for i in range(2):
        for product, parts in PRODUCTS.items():
            layer = f"model.layers.{i}"
            seen[f"{layer}.{product}.input"] = seen[f"{layer}.{parts[0]}.input"]
            seen[f"{layer}.{product}.output"] = torch.cat([seen[f"{layer}.{part}.output"] for part in parts])
    for name, value in ranges.items():
        assert (value / seen[name] - 1).abs().max() < 1e-4, name


def test_the_file(checkpoint, file):
    """Names, shapes and dtypes, and where they come from; readable without pickle."""
    with np.load(file, allow_pickle=False) as content:
        arrays = {name: content[name] for name in content.files}
    origin = json.loads(str(arrays.pop("origin")))
    expected = {"lm_head.input": 64, "lm_head.output": 320}
    for i in range(2):
        layer = f"model.layers.{i}"
        for product, widths in WIDTHS.items():
            expected |= zip((f"{layer}.{product}.input", f"{layer}.{product}.output"), widths, strict=True)
        expected |= {f"{layer}.self_attn.key": 32, f"{layer}.self_attn.value": 32}
    assert {name: x.shape for name, x in arrays.items()} == {name: (width,) for name, width in expected.items()}
    assert all(x.dtype == np.float32 and (x > 0).all() for x in arrays.values())
    samples = calibration_samples(checkpoint, **SAMPLES)
    assert origin == {
        "samples": 8,
        "smoothed": None,
        "tokens": 8 * 48,
        "dataset": NEWS | {"seed": 0, "length": 48, "sha256": samples.sha256},
        "model": {
            key: CONFIG[key]
            for key in (
                "hidden_size",
                "intermediate_size",
                "num_hidden_layers",
                "num_attention_heads",
                "num_key_value_heads",
                "vocab_size",
            )
        },
    }


def test_outliers_are_seen(file):
    """Every 16th channel of the norms is 12 times larger than the others."""
    with np.load(file) as content:
        x = content["model.layers.1.mlp.gate_up_proj.input"]
    assert 8 < np.median(x[3::16]) / np.median(np.delete(x, np.s_[3::16])) < 16


def test_bit_identical_with_any_number_of_threads(checkpoint, file, tmp_path, threads):
    for run, count in enumerate((1, 2, 2)):
        threads(count)
        calibrate(checkpoint, tmp_path / f"{run}.npz", **SAMPLES, device="cpu")
        assert (tmp_path / f"{run}.npz").read_bytes() == file.read_bytes()
        assert torch.get_num_threads() == count


def test_more_text_gives_larger_ranges(checkpoint, file, tmp_path):
    """Twice the samples, of which the first eight are the same: no range is smaller."""
    calibrate(checkpoint, tmp_path / "more.npz", **SAMPLES | {"samples": 16}, device="cpu")
    ranges, more = (read_calibration(path, Checkpoint(checkpoint)).ranges for path in (file, tmp_path / "more.npz"))
    assert all((more[name] >= ranges[name]).all() for name in ranges)
    assert any((more[name] > ranges[name]).any() for name in ranges)


def test_seed_chooses_the_samples(checkpoint):
    first, again, other = (calibration_samples(checkpoint, **SAMPLES | {"seed": seed}) for seed in (0, 0, 1))
    assert first == again
    assert first.sha256 != other.sha256
    assert [len(tokens) for tokens in first.tokens] == [48] * 8


# What is refused


@pytest.mark.parametrize(
    "changes", [{"num_hidden_layers": 1}, {"intermediate_size": 96}, {"num_key_value_heads": 4}, {"vocab_size": 512}]
)
def test_another_models_file(file, tmp_path, changes):
    other = Checkpoint(write_model(tmp_path / "other", **changes))
    key, value = next(iter(changes.items()))
    with pytest.raises(UserError, match=rf"was measured on another model.*'{key}': {value}.*calibrate this one"):
        read_calibration(file, other)


def write_text(path):
    path.write_text("no numbers")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-500])


def pickled(path):
    with open(path, "wb") as file:
        np.savez(file, origin=np.array({"model": None}, dtype=object))


def without_origin(path):
    with open(path, "wb") as file:
        np.savez(file, x=np.ones(3))


@pytest.mark.parametrize("damage", [write_text, truncate, pickled, without_origin])
def test_no_calibration_file(checkpoint, file, tmp_path, damage):
    copy = shutil.copyfile(file, tmp_path / "copy.npz")
    damage(copy)
    with pytest.raises(UserError, match=r"copy\.npz is no calibration file.*make it with 'trtbuild calibrate'"):
        read_calibration(copy, Checkpoint(checkpoint))


def test_a_missing_file(checkpoint, tmp_path):
    with pytest.raises(UserError, match=r"no\.npz does not exist; make it with 'trtbuild calibrate'"):
        read_calibration(tmp_path / "no.npz", Checkpoint(checkpoint))


def test_a_file_that_is_no_archive_of_arrays(checkpoint, tmp_path):
    """`np.load` also reads a single array."""
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(UserError, match=r"one\.npy is no calibration file"):
        read_calibration(tmp_path / "one.npy", Checkpoint(checkpoint))


KEY = "model.layers.1.self_attn.key"


def filled(value, dtype="<f4", shape=(32,)):
    return np.full(shape, value, dtype)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        (KEY, filled(np.nan), "holds numbers that are negative, infinite or NaN"),
        (KEY, filled(np.inf), "holds numbers that are negative, infinite or NaN"),
        (KEY, filled(-1.0), "holds numbers that are negative, infinite or NaN"),
        (KEY, filled(1.0, shape=()), r"is float32 \[\]; float32 \[32\] is expected"),
        (KEY, filled(1.0, shape=(31,)), r"is float32 \[31\]; float32 \[32\] is expected"),
        (KEY, filled(1.0, "<f8"), r"is float64 \[32\]; float32 \[32\] is expected"),
        (KEY, filled(1.0, ">f4"), r"is >f4 \[32\]; float32 \[32\] is expected"),
        ("model.layers.2.self_attn.key", filled(1.0), "is no part of this model"),
        ("origin", np.array("{"), "origin is not valid JSON"),
        ("origin", np.array("[1]"), "was measured on another model"),
        ("origin", np.array(7), "does not say what it was measured with"),
    ],
)
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_ranges_that_cannot_be(checkpoint, file, tmp_path, name, array, message, save):
    """Each would otherwise become a scale, or a traceback; compressed, a small file could fill the memory."""
    with np.load(file) as content:
        arrays = dict(content) | {name: array}
    with open(tmp_path / "own.npz", "wb") as own:
        save(own, **arrays)
    message = message if save is np.savez else "is no calibration file"
    with pytest.raises(UserError, match=rf"own\.npz.*{message}"):
        read_calibration(tmp_path / "own.npz", Checkpoint(checkpoint))


@pytest.mark.parametrize("name", ["origin", KEY])
def test_a_member_that_is_no_array(checkpoint, file, tmp_path, name):
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "own.npz", "w") as own:
        for member in archive.namelist():
            own.writestr(member, b"no array" if member == f"{name}.npy" else archive.read(member))
    with pytest.raises(UserError, match=r"own\.npz is no calibration file"):
        read_calibration(tmp_path / "own.npz", Checkpoint(checkpoint))


def test_ranges_that_are_missing(checkpoint, file, tmp_path):
    with np.load(file) as content:
        arrays = dict(content)
    del arrays[KEY]
    with open(tmp_path / "own.npz", "wb") as own:
        np.savez(own, **arrays)
    with pytest.raises(UserError, match=rf"own\.npz lacks the ranges {KEY}; calibrate again"):
        read_calibration(tmp_path / "own.npz", Checkpoint(checkpoint))


def test_a_flipped_bit(checkpoint, file, tmp_path):
    content = bytearray(file.read_bytes())
    content[content.index(b"NUMPY") + 130] ^= 1
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"flipped\.npz is no calibration file"):
        read_calibration(tmp_path / "flipped.npz", Checkpoint(checkpoint))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 65}, "trtbuild-news has 64 articles in its split 'calibration'; 65 were asked for"),
        ({"dataset": NEWS | {"split": "train"}}, "has the splits evaluation and calibration, not 'train'"),
    ],
    ids=["too many", "split"],
)
def test_samples_that_are_not_there(checkpoint, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        calibrate(checkpoint, tmp_path / "out.npz", **SAMPLES | changes)
    assert list(tmp_path.iterdir()) == []


def own_dataset(folder, *rows: dict) -> dict:
    folder.mkdir()
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {"name": str(folder), "split": "train"}


def test_other_columns(checkpoint, tmp_path):
    dataset = own_dataset(tmp_path / "own", {"text": "a", "id": "1"})
    with pytest.raises(UserError, match=r"lacks the columns \['article', 'highlights'\]; it has \['text', 'id'\]"):
        calibrate(checkpoint, tmp_path / "out.npz", **SAMPLES | {"dataset": dataset, "samples": 1})
    assert not (tmp_path / "out.npz").exists()


def test_an_empty_article(checkpoint, tmp_path):
    dataset = own_dataset(tmp_path / "own", {"article": "x", "highlights": "short", "id": "a7"})
    with pytest.raises(UserError, match=r"the article a7 of .* has fewer than two tokens; remove it"):
        calibrate(checkpoint, tmp_path / "out.npz", **SAMPLES | {"dataset": dataset, "samples": 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weights_are_named(tmp_path, value):
    """The first product whose result is not finite, not one that merely reads it."""
    weights = outlier_weights(CONFIG)
    weights["model.layers.1.mlp.down_proj.weight"][3, 5] = value
    checkpoint = write_model(tmp_path / "damaged", weights)
    message = r"calibration: model\.layers\.1\.mlp\.down_proj\.output holds NaN or infinite numbers"
    with pytest.raises(UserError, match=message):
        calibrate(checkpoint, tmp_path / "out.npz", **SAMPLES, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_the_output_is_not_the_input(checkpoint):
    with pytest.raises(UserError, match="would replace its own input"):
        calibrate(checkpoint, checkpoint, **SAMPLES)
