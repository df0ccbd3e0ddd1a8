"""Files are complete or not there: atomic writes, full disks, checksums."""

import errno
import hashlib
import os
import re
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import read_portable, write_portable
from trtbuild.errors import UserError
from trtbuild.files import (
    MARKER,
    atomic,
    check_output,
    output_path,
    read_json,
    refuse_output_over_input,
    scratch_beside,
    sha256,
    user_path,
    write_json,
)
from trtbuild.limits import TEXT_BYTES
from trtbuild.processes import start_of


def make_file(path, text="new"):
    path.write_text(text)


def make_folder(path, text="new"):
    path.mkdir()
    (path / "config.json").write_text(text)
    (path / MARKER).touch()


def make_and_fail(target, make, error):
    with atomic(target) as temporary:
        make(temporary)
        raise error


def content(path):
    return (path / "config.json").read_text() if path.is_dir() else path.read_text()


@pytest.fixture
def full_disk(tmp_path):
    """Mounts a memory file system of a given size at a folder; skips where that is not allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = []

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        try:
            result = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if result.returncode:
            pytest.skip(f"cannot mount a tmpfs: {result.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:
        subprocess.run(["umount", str(path)], check=True)


def test_a_folder_that_cannot_be_replaced_comes_back(tmp_path, monkeypatch):
    """The old one has made way when the new one's rename fails."""
    target, rename = tmp_path / "target", Path.replace
    make_folder(target, "old")

    def replace(self, new):
        if new == target and content(self) == "new":
            raise OSError(errno.EIO, "Input/output error", str(self))
        return rename(self, new)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(UserError, match=f"cannot write {target}: Input/output error"), atomic(target) as temporary:
        make_folder(temporary, "new")
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize("existing", ["nothing", "same kind", "link"])
def test_atomic_makes_or_replaces(tmp_path, make, existing):
    target = tmp_path / "missing" / "parent" / "target"
    if existing != "nothing":
        target.parent.mkdir(parents=True)
        old = target if existing == "same kind" else tmp_path / "elsewhere"
        make(old, "old")
        if old != target:
            target.symlink_to(old)
    with atomic(target) as temporary:
        assert temporary.parent == target.parent  # a rename must not cross file systems
        make(temporary)
        assert existing == "nothing" or content(target) == "old"
    assert content(target) == "new"
    assert not target.is_symlink()
    assert list(target.parent.iterdir()) == [target]
    if existing == "link":
        assert content(old) == "old"


@pytest.mark.parametrize("error", [None, RuntimeError("x"), KeyboardInterrupt()])
def test_scratch_folder_is_removed(tmp_path, error):
    """Its own target can be made in the meantime."""
    target = tmp_path / "missing" / "target"
    try:
        with scratch_beside(target) as scratch:
            assert scratch.parent == target.parent
            make_file(scratch / "large")
            with atomic(target) as temporary:
                make_folder(temporary)
                assert (scratch / "large").exists()
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error
    assert list(target.parent.iterdir()) == [target]


def test_scratch_folder_of_a_killed_process_is_removed(tmp_path):
    target = tmp_path / "target"
    with scratch_beside(target) as scratch:
        pid = subprocess.Popen(["true"])
        pid.wait()
        killed = scratch.with_name(scratch.name.replace(str(os.getpid()), str(pid.pid)))
        make_folder(killed)
        with atomic(target) as temporary:
            make_file(temporary)
        assert not killed.exists()
        assert scratch.exists()


def test_scratch_folder_of_what_cannot_be_replaced(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files that trtbuild did not make"), scratch_beside(tmp_path / "target"):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["target", "thesis.txt"]


@pytest.mark.parametrize(("old", "new"), [(make_file, make_folder), (make_folder, make_file)])
def test_atomic_replaces_no_folder_by_a_file(tmp_path, old, new):
    target = tmp_path / "target"
    old(target, "old")
    with pytest.raises(UserError, match=f"{target} is a (file|folder) and would be replaced"), atomic(target) as path:
        new(path)
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("make", [make_file, make_folder])
@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), PermissionError(errno.EACCES, "denied")])
def test_atomic_leaves_the_old_one_on_an_exception(tmp_path, make, error):
    target = tmp_path / "target"
    target.write_text("old")
    with pytest.raises(type(error)):
        make_and_fail(target, make, error)
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_names_the_real_path(tmp_path):
    with pytest.raises(UserError) as caught, atomic(tmp_path / "x") as temporary:
        raise UserError(f"{temporary}/config.json is wrong")
    assert str(caught.value) == f"{tmp_path}/x/config.json is wrong"
    with pytest.raises(UserError) as caught, scratch_beside(tmp_path / "x") as temporary:
        raise UserError(f"{temporary}/config.json is wrong")
    assert str(caught.value) == f"{tmp_path}/x/config.json is wrong"


def test_user_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MODELS", "/data")
    assert [str(user_path(path)) for path in ("~/a", "$HOME/a", "${MODELS}/a", "a/$NOTHING")] == [
        "/home/me/a",
        "/home/me/a",
        "/data/a",
        "a/$NOTHING",
    ]


def test_atomic_removes_what_an_interrupted_process_left(tmp_path):
    target = tmp_path / "target"
    with atomic(target) as left:
        make_file(left, "old")
    make_folder(left)  # the same name, as after a crash
    with atomic(target) as temporary:
        assert temporary == left
        assert not temporary.exists()
        make_file(temporary)
    assert content(target) == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_removes_what_a_killed_process_left_whose_number_has_been_given_again(tmp_path):
    target = tmp_path / "target"
    with atomic(target) as own:
        make_file(own)
    other = own.with_name(own.name.replace(f"-{start_of(os.getpid())}.", "-17."))  # this process, but another start
    make_folder(other)
    with atomic(target) as temporary:
        make_file(temporary)
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("hours", [23, 25])
def test_atomic_removes_what_another_host_has_not_written_to_for_a_day(tmp_path, hours):
    """The newest file within counts."""
    target = tmp_path / "target"
    with atomic(target) as own:
        make_file(own)
    other = own.with_name(own.name.replace(socket.gethostname(), "node17.cluster"))
    make_folder(other)
    written = time.time() - hours * 3600
    for path in (*other.rglob("*"), other):
        os.utime(path, (written - 1e6, written - 1e6) if path == other else (written, written))
    with atomic(target) as temporary:
        make_file(temporary)
    assert set(tmp_path.iterdir()) == ({target, other} if hours < 24 else {target})


@pytest.mark.parametrize("running", [True, False])
def test_atomic_removes_what_a_killed_process_left(tmp_path, running):
    """A process that still runs keeps its temporary."""
    process = subprocess.Popen(["sleep", "60"])
    target = tmp_path / "target"
    with atomic(target) as own:
        make_file(own)
    other = own.with_name(own.name.replace(f"{os.getpid()}-", f"{process.pid}-"))
    other = other.with_name(other.name.replace(f"-{start_of(os.getpid())}.", f"-{start_of(process.pid)}."))
    assert other != own
    make_folder(other)
    if not running:
        process.kill()
        process.wait()
    try:
        with atomic(target) as temporary:
            assert other.exists() == running
            make_file(temporary)
    finally:
        process.kill()
        process.wait()
    assert set(tmp_path.iterdir()) == ({target, other} if running else {target})


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        Exception("No space left on device (os error 28)"),  # tokenizers
    ],
    ids=["ENOSPC", "EDQUOT", "rust"],
)
def test_atomic_names_a_full_disk(tmp_path, error):
    target = tmp_path / "target"
    with pytest.raises(UserError, match=f"disk full while writing {re.escape(str(target))}"):
        make_and_fail(target, make_file, error)
    assert list(tmp_path.iterdir()) == []


def test_portable_engine_on_a_full_disk(full_disk, tiny_checkpoint):
    folder = full_disk("256k")  # the weights take 401 KiB
    checkpoint = Checkpoint(tiny_checkpoint)
    network = decoder(checkpoint.config, checkpoint.__getitem__, torch.float32, 48)
    target = folder / "rank0.safetensors"
    with pytest.raises(UserError, match=f"disk full while writing {re.escape(str(target))}"):
        write_portable(target, network, BuildLimits(4, 32, 16))
    assert list(folder.iterdir()) == []


# Full within the configuration, the weights, the tokenizer (whose writer is not Python's), the tokenizer's settings.
@pytest.mark.parametrize("size", ["4k", "64k", "408k", "412k"])
def test_checkpoint_on_a_full_disk(full_disk, tiny_config, size):
    folder = full_disk(size)
    with pytest.raises(UserError, match=f"disk full while writing {re.escape(str(folder))}/") as caught:
        make_checkpoint({"dummy": {"config": tiny_config}}, folder / "checkpoint")
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == []


def test_portable_engine_when_a_write_fails(tmp_path, tiny_engine, monkeypatch):
    """The same without a mount: the third weight hits the end of the disk; the old engine stays."""
    network, limits = read_portable(tiny_engine / "rank0.safetensors")
    target = tmp_path / "rank0.safetensors"
    target.write_bytes(b"old")
    written = []

    def progress(nbytes):
        written.append(nbytes)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="disk full"):
        write_portable(target, network, limits, progress)
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_sha256_of_a_file_larger_than_a_buffer(tmp_path):
    data = np.random.default_rng(0).bytes(3_000_001)
    (tmp_path / "data").write_bytes(data)
    assert sha256(tmp_path / "data") == hashlib.sha256(data).hexdigest()


def test_json_round_trip(tmp_path):
    value = {"a": [1, 2.5, None], "text": "zwölf 🚀"}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "zwölf 🚀" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("data", "message"),
    [(None, "does not exist"), (b'{"a": 1', "is not valid JSON"), (b'"\xff"', "is not UTF-8 text")],
    ids=["missing", "truncated", "not-utf8"],
)
def test_read_json_names_the_file(tmp_path, data, message):
    path = tmp_path / "x.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=f"{re.escape(str(path))} {message}"):
        read_json(path)


def test_a_folder_with_foreign_files_is_not_replaced(tmp_path):
    (tmp_path / "precious.txt").write_text("kept")
    with pytest.raises(UserError, match="would be lost"):
        make_and_fail(tmp_path, make_folder, AssertionError("reached"))
    assert (tmp_path / "precious.txt").read_text() == "kept"


def test_a_place_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/output"):
        make_and_fail(tmp_path / "file" / "output", make_file, AssertionError("reached"))


def test_a_folder_of_a_model_is_not_taken_for_an_output(tmp_path):
    """A `config.json` alone is what every published model has."""
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="would be lost"):
        make_and_fail(tmp_path, make_folder, AssertionError("reached"))


@pytest.mark.parametrize("output", [".", "..", "../.."])
def test_an_output_never_replaces_its_own_input(tmp_path, output):
    source = tmp_path / "a" / "b" / "model"
    source.mkdir(parents=True)
    with pytest.raises(UserError, match="would replace its own input"):
        refuse_output_over_input(source / output, source)
    refuse_output_over_input(source / "inside", source)
    refuse_output_over_input(tmp_path / "beside", source)


# Outputs


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize(("make", "kind"), [(os.mkfifo, "pipe"), (make_socket, "socket")])
def test_what_is_no_file_is_not_replaced(tmp_path, monkeypatch, make, kind, linked):
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make("special")
    if linked:
        Path("output").symlink_to("special")
    output = Path("output" if linked else "special")
    before = output.stat()
    for call in (output_path, check_output, lambda path: write_json(path, {})):
        with pytest.raises(UserError, match=f"{output} is a {kind}; an output is a file or a folder, choose another"):
            call(output)
    assert output.stat() == before
    assert len(list(tmp_path.iterdir())) == 1 + linked


def test_devices_are_not_replaced():
    with pytest.raises(UserError, match="/dev/null is a device"):
        check_output("/dev/null")


@pytest.mark.parametrize("make", [make_file, make_folder])
def test_the_target_of_a_users_link_is_replaced(tmp_path, make):
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    target.parent.mkdir()
    make(target, "old")
    link.symlink_to(target)
    with atomic(output_path(link)) as temporary:
        make(temporary)
    assert link.is_symlink()
    assert content(target) == content(link) == "new"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("loop", "Too many levels of symbolic links"),
        ("a" * 300, "File name too long"),
        ("zero\0byte", "embedded null byte"),
        ("file/below", "Not a directory"),
        ("file/far/below", "Not a directory"),
    ],
)
def test_places_that_cannot_be(tmp_path, name, reason):
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=reason):
        output_path(tmp_path / name)


def test_asking_makes_nothing(tmp_path):
    check_output(tmp_path / "far" / "away" / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_grow_so_large(tmp_path):
    """RLIMIT_FSIZE, as a batch system sets it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*x\.json: File too large. Nothing was written\."):
            write_json(tmp_path / "x.json", ["x" * 2000])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


# Inputs


@pytest.mark.parametrize("make", [os.mkfifo, make_socket, os.mkdir])
def test_what_is_no_file_is_not_read(tmp_path, monkeypatch, make):
    """Opening a pipe would wait for ever."""
    monkeypatch.chdir(tmp_path)
    make("x.json")
    with pytest.raises(UserError, match=r"x\.json is a (pipe|socket|folder); a file is expected"):
        read_json("x.json")


def test_endless_and_large_files(tmp_path):
    with pytest.raises(UserError, match="/dev/zero is a device; a file is expected"):
        read_json("/dev/zero")
    with open(tmp_path / "large.json", "wb") as file:
        file.truncate(TEXT_BYTES + 1)
    with pytest.raises(UserError, match=r"large\.json has 64 MiB; at most 64 are expected"):
        read_json(tmp_path / "large.json")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ('{"a": ' + "1" * 5000 + "}", "4300 digits"),
        ('{"a": Infinity}', "Infinity is no number"),
        ('{"a": [NaN]}', "NaN is no number"),
        (r'{"a": "\ud800"}', "surrogates not allowed"),
        (r'{"\uDFFF": 1}', "surrogates not allowed"),
        ("", "Expecting value"),
    ],
)
def test_json_that_is_none(tmp_path, text, reason):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=rf"x\.json is not valid JSON: .*{reason}"):
        read_json(tmp_path / "x.json")


def test_a_whole_surrogate_pair(tmp_path):
    (tmp_path / "x.json").write_text(r'{"a": "\ud83d\ude00"}')
    assert read_json(tmp_path / "x.json") == {"a": "\U0001f600"}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": 1, "b": {"c": "x"}}, None),
        ({"a": 1.5, "b": {"c": "x", "d": 2}}, None),
        ({"a": True, "b": {"c": "x"}}, "a is a bool, a float is expected"),
        ({"a": None, "b": {"c": "x"}}, "a is a NoneType, a float is expected"),
        ({"a": 1}, "the key b is missing"),
        ({"a": 1, "b": [1]}, "b is a list, a dict is expected"),
        ({"a": 1, "b": {}}, "b: the key c is missing"),
        ({"a": 1, "b": {"c": 1}}, "b: c is a int, a str is expected"),
    ],
)
def test_read_json_compares_with_a_shape(tmp_path, value, message):
    write_json(tmp_path / "x.json", value)
    if message is None:
        assert read_json(tmp_path / "x.json", {"a": float, "b": {"c": str}}) == value
        return
    with pytest.raises(UserError, match=f"x.json: {message}; make the file again"):
        read_json(tmp_path / "x.json", {"a": float, "b": {"c": str}})
