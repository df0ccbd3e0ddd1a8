"""Which engine opens where, on a machine without a GPU."""

import json
import shutil

import pytest
import torch

from trtbuild.errors import UserError
from trtbuild.runtime.open import open_engine, pick_device


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def copy(tiny_engine, tmp_path):
    return shutil.copytree(tiny_engine, tmp_path / "engine")


@pytest.mark.parametrize(
    ("runtime", "kind"), [("auto", "portable"), ("portable", "portable"), ("interpreted", "interpreted")]
)
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_opens_on_the_cpu(tiny_engine, runtime, kind, device):
    if runtime == "interpreted":
        pytest.importorskip("tensorrt_rtx")
    opened = open_engine(tiny_engine, runtime, device)
    assert opened.session.kind == kind
    assert opened.session.device == torch.device("cpu")
    assert (opened.file, opened.dtype) == ("rank0.safetensors", "float32")
    assert opened.sha256 == json.loads((tiny_engine / "config.json").read_text())["outputs"][opened.file]["sha256"]
    limits = opened.session.limits
    assert (limits.max_batch_size, limits.max_input_len, limits.max_output_len) == (4, 32, 16)


@pytest.mark.parametrize(
    ("runtime", "device", "message"),
    [
        ("auto", "cuda", "device cuda was asked for but torch finds no GPU; use --device cpu"),
        ("portable", "cuda", "device cuda was asked for but torch finds no GPU; use --device cpu"),
        ("portable", "tpu", "unknown device 'tpu'; choose auto, cpu or cuda"),
        ("onnx", "auto", "unknown runtime 'onnx'; choose one of auto, portable, tensorrt, interpreted"),
        ("tensorrt", "auto", "has no rank0.engine; build it with '--engine tensorrt'"),
    ],
)
def test_refused(tiny_engine, runtime, device, message):
    with pytest.raises(UserError, match=message):
        open_engine(tiny_engine, runtime, device)


def edit_config(folder, edit):
    config = json.loads((folder / "config.json").read_text())
    edit(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_tensorrt_needs_a_gpu(copy):
    (copy / "rank0.engine").write_bytes(b"")
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    edit_config(copy, lambda config: config["outputs"].update({"rank0.engine": {"bytes": 0, "sha256": empty}}))
    builder = {"distribution": "tensorrt_rtx", "compute_capabilities": ["8.9"]}
    edit_config(copy, lambda config: config["builders"].update({"tensorrt": builder}))
    with pytest.raises(UserError, match="runtime tensorrt needs a GPU and there is none"):
        open_engine(copy, "tensorrt")
    assert open_engine(copy, "auto").session.kind == "portable"


def test_folder_without_the_portable_engine(copy):
    (copy / "rank0.safetensors").unlink()
    edit_config(copy, lambda config: config["outputs"].clear())
    with pytest.raises(UserError, match=f"{copy} has no rank0.safetensors; build it with '--engine portable'"):
        open_engine(copy)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def flip_a_byte_of_the_header(path):
    data = bytearray(path.read_bytes())
    data[data.index(b'"eps')] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("change", "check", "what"),
    [
        (cut, False, "size"),
        (flip_a_byte_of_the_header, False, "header"),
        (cut, True, "size"),
        (flip_a_byte, True, "sha256"),
    ],
)
def test_changed_file(copy, change, check, what):
    change(copy / "rank0.safetensors")
    message = rf"{copy}/rank0.safetensors is not the file that was built \(its {what} differs\)"
    with pytest.raises(UserError, match=message):
        open_engine(copy, check=check)


def test_opening_reads_no_weights_to_check_them(tiny_engine, monkeypatch):
    """Of 13 GB that would take minutes."""
    hashed = []
    monkeypatch.setattr("trtbuild.engine.config.sha256", lambda path: hashed.append(path) or "")
    open_engine(tiny_engine, "portable", "cpu")
    assert hashed == []
    with pytest.raises(UserError, match="its sha256 differs"):
        open_engine(tiny_engine, "portable", "cpu", check=True)
    assert hashed == [tiny_engine / "rank0.safetensors"]


def test_missing_file(copy):
    (copy / "rank0.safetensors").unlink()
    with pytest.raises(UserError, match=f"{copy} is incomplete: rank0.safetensors is missing"):
        open_engine(copy)


def test_an_engine_from_before_headers_were_recorded(copy):
    config = json.loads((copy / "config.json").read_text())
    del config["outputs"]["rank0.safetensors"]["header_sha256"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"{copy} was built by an earlier version of trtbuild; build the engine again"):
        open_engine(copy)


def test_no_engine_folder(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is not an engine folder: it has no config.json"):
        open_engine(tmp_path)
    with pytest.raises(UserError, match=f"{tiny_checkpoint} is not an engine folder: its config.json lists no engine"):
        open_engine(tiny_checkpoint)


@pytest.mark.parametrize(
    ("has_gpu", "device", "expected"), [(False, "auto", "cpu"), (True, "auto", "cuda"), (True, "cpu", "cpu")]
)
def test_pick_device(monkeypatch, has_gpu, device, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert pick_device(device) == torch.device(expected)
