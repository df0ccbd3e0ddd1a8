"""Which changes of a source's files are seen, without reading large ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trtbuild.checkpoint.source_files import source_state
from trtbuild.datasets import articles_state
from trtbuild.files import HASHED, state_of

LAYOUTS = {
    "one file": ("model.safetensors",),
    "shards": ("model.safetensors.index.json", "model-1-of-2.safetensors", "parts/model-2-of-2.safetensors"),
    "old": ("pytorch_model.bin",),
    "Meta": ("params.json", "consolidated.00.pth", "consolidated.01.pth", "../tokenizer.model"),
}  # fmt: skip
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "added_tokens.json", "qwen.tiktoken", "chat_template.jinja")
TOKENIZER += ("vocab.json", "merges.txt", "special_tokens_map.json", "generation_config.json")
IGNORED = ("README.md", "training_args.bin", "optimizer.pt", "other.safetensors", ".git/config", "notes.json")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(params=LAYOUTS)
def folder(request, tmp_path) -> tuple[Path, tuple[str, ...]]:
    """A model's folder, and the names of what is read of it."""
    names = (*LAYOUTS[request.param], *TOKENIZER, *(() if request.param == "Meta" else ("config.json",)))
    for name in (*names, *IGNORED):
        write(tmp_path / "model" / name, name)
    if request.param == "shards":
        shards = {name: name for name in names if "-of-" in name}
        write(tmp_path / "model" / "model.safetensors.index.json", json.dumps({"weight_map": shards}))
    return tmp_path / "model", names


def test_what_is_read_counts_and_nothing_else(folder):
    path, names = folder
    source = {"local": {"path": str(path)}}
    seen = [source_state(source)]
    for name in IGNORED:
        write(path / name, "changed")
        assert source_state(source) == seen[0]
    for name in names:
        if not name.endswith("index.json"):
            write(path / name, "changed")
            seen.append(source_state(source))
    (path / names[1]).unlink()
    seen.append(source_state(source))
    assert len(set(seen)) == len(seen)


def test_an_index_counts_where_it_is_read(tmp_path):
    source = {"local": {"path": str(tmp_path)}}
    write(tmp_path / "config.json", "{}")
    write(tmp_path / "model.safetensors.index.json", '{"weight_map": {"a": "b.safetensors"}}')
    write(tmp_path / "b.safetensors", "b")
    before = source_state(source)
    write(tmp_path / "b.safetensors", "c")
    assert source_state(source) != before
    write(tmp_path / "model.safetensors", "all")
    before = source_state(source)
    write(tmp_path / "b.safetensors", "d")
    write(tmp_path / "model.safetensors.index.json", "{}")
    assert source_state(source) == before


@pytest.mark.parametrize("index", ["{", '{"weight_map": {"a": "../../x"}}', "[]"])
def test_what_is_wrong_with_a_source_is_said_later(tmp_path, index):
    write(tmp_path / "config.json", "{}")
    write(tmp_path / "model.safetensors.index.json", index)
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "config.json"):
        assert source_state({"local": {"path": str(path)}})
        assert source_state({"gguf": {"path": str(path)}})


def test_all_parts_of_a_gguf_file_count(tmp_path):
    parts = [tmp_path / f"m[1]-0000{i}-of-00002.gguf" for i in (1, 2)]
    for part in (*parts, tmp_path / "m[1]-00001-of-00003.gguf"):
        part.write_text(part.name)
    source = {"gguf": {"path": str(parts[0])}}
    before = source_state(source)
    (tmp_path / "m[1]-00001-of-00003.gguf").write_text("changed")
    assert source_state(source) == before
    parts[1].write_text("changed")
    assert source_state(source) != before


def test_the_configuration_of_dummy_weights_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "config.json", "{}")
    source = {"dummy": {"config": "~/config.json"}}
    before = source_state(source)
    write(tmp_path / "config.json", '{"a": 1}')
    assert source_state(source) != before
    assert source_state({"dummy": {"config": {}}}) is None


def test_what_is_named_by_its_content_has_no_state():
    assert source_state({"hub": {"repo": "a/b", "revision": "c"}}) is None
    assert source_state({"pypi": {"package": "a", "version": "1", "file": "b", "sha256": "c"}}) is None


def test_small_files_by_content_and_large_ones_by_time(tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"a" * HASHED)
    large.write_bytes(b"a" * (HASHED + 1))
    before = state_of([small, large])
    os.utime(small, (0, 0))
    assert state_of([large, small, small]) == before
    os.utime(large, (0, 0))
    assert state_of([small, large]) != before


def test_articles_of_a_folder_count(tmp_path):
    write(tmp_path / "set" / "train.jsonl", "{}")
    before = articles_state(str(tmp_path / "set"), "train", samples=3)
    write(tmp_path / "set" / "train.jsonl", "{} ")
    assert articles_state(str(tmp_path / "set"), "train") != before
    assert articles_state("cnn_dailymail", "test", config="3.0.0") is None
    assert articles_state("trtbuild-news", "evaluation") != articles_state("trtbuild-news", "calibration")


def test_the_workflow_asks_without_torch():
    """Importing it takes seconds, and `snakemake -n` would take them too."""
    code = "import sys, trtbuild.checkpoint.source_files, trtbuild.datasets; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
