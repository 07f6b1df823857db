"""Checkpoints: a folder of `config.json` and safetensors files, replaced as a whole and verified when read.

    config.json           the caller's config; then "format", "files": {name: {"sha256", "size"}} and its own "sha256"
    <stem>.safetensors    one for each entry of `tensors`

The folder is written beside its place, fsynced and exchanged with the old one, as `atomic.py` says: a crash at any
point leaves the old or the new checkpoint, whole. The user's own files in the folder (a log, a grid) are hard-linked
into the new one.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.files.atomic import find_folder, replace_folder, sync

FORMAT = 1
RESERVED = ("format", "files", "sha256")
"""Keys of config.json that the checkpoint keeps for itself."""
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*\.safetensors")
_REPAIR = "re-download the checkpoint or restore it from a copy"


def write_folder(path: str | os.PathLike[str], config: dict[str, Any], tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write a checkpoint folder; after a crash at any instant `path` reads as the old or the new one, whole.

    config: anything JSON can carry (no NaN or infinity), without the keys "format", "files", "sha256".
    tensors: file stem -> name -> tensor; views and shared storage are written out one by one, from any device.
    Missing parents are made. ValueError: a config or tensor that cannot be stored, or `path` is there and is neither
    empty nor one of our checkpoints. OSError: the disk refused; the old checkpoint, if any, is still there.
    """
    path = Path(os.path.realpath(path))
    _check_config(config)
    plain = {f"{stem}.safetensors": _plain(stem, named) for stem, named in tensors.items()}
    _check_target(path)
    try:
        with replace_folder(path) as new:
            _fill(new, config, plain)
            if path.exists():
                shutil.copymode(path, new)
                _carry(path, new)
    except OSError as error:
        raise OSError(error.errno, f"{path}: checkpoint not written: {error.strerror or error}") from error


def read_folder(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Read a checkpoint folder as (config, tensors by file stem and name), size and SHA-256 of every file checked.

    Tensors are on the CPU, mapped from the file; changing them does not change the file.
    FileNotFoundError: no such folder. ValueError: one sentence that names the file and what is wrong with it.
    A config.json edited on purpose is accepted once its "sha256" is set to "edited".
    """
    path = Path(os.path.realpath(path))
    while True:
        found = find_folder(path)
        # a writer may move this checkpoint while we read it: then neither the result nor the error counts
        try:
            result = _read(found[0])
        # RuntimeError is torch's for a file that is gone when it maps it
        except (ValueError, RuntimeError, OSError):
            if find_folder(path) == found:
                raise
        else:
            if find_folder(path) == found:
                return result


def _check_config(config: dict[str, Any]) -> None:
    taken = [key for key in RESERVED if key in config]
    if taken:
        raise ValueError(f"config: the key {taken[0]!r} is the checkpoint's own; give it another name")
    try:
        text = _encode(config)
        if _encode(json.loads(text)) != text:
            raise ValueError("a key is there as a number and as a string")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"config: JSON cannot carry it ({error}); use dicts, lists, strings, finite numbers"
        ) from error


def _plain(stem: str, named: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors dense, contiguous, on the CPU, no two in one storage (safetensors refuses shared ones)."""
    if not _NAME.fullmatch(f"{stem}.safetensors"):
        raise ValueError(f"tensors: {stem!r} cannot be a file name; use letters, digits, '_', '-' and '.'")
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, given in named.items():
        if not isinstance(given, Tensor):
            raise TypeError(f"tensors[{stem!r}][{name!r}]: expected a torch.Tensor, got {type(given).__name__}")
        if given.layout != torch.strided or given.is_meta or given.is_quantized:
            raise ValueError(f"tensors[{stem!r}][{name!r}]: expected a dense tensor with data; pass a dense copy")
        tensor = given.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return plain


def _check_target(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()):
        try:
            _config(path / "config.json")
        except ValueError as error:
            raise ValueError(
                f"{path} is not one of our checkpoints ({error}); choose another path or move it"
            ) from error
    elif path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a checkpoint folder; choose another path")


def _fill(folder: Path, config: dict[str, Any], plain: dict[str, dict[str, Tensor]]) -> None:
    save_file, _, failed = _safetensors()
    mode = folder.stat().st_mode & 0o666
    files = {}
    for name, named in plain.items():
        file = folder / name
        try:
            save_file(named, file)
        except KeyError as error:
            raise ValueError(f"{name}: safetensors cannot store the dtype {error}; convert it") from error
        except failed as error:
            raise OSError(errno.EIO, str(error)) from error
        os.chmod(file, mode)  # safetensors makes its files private, whatever the umask says
        sync(file)
        files[name] = {"sha256": _digest(file), "size": file.stat().st_size}
    document = {**config, "format": FORMAT, "files": files}
    document["sha256"] = hashlib.sha256(_encode(document)).hexdigest()
    (folder / "config.json").write_bytes(_encode(document))
    sync(folder / "config.json")


def _carry(old: Path, new: Path) -> None:
    """Link what the user keeps in the old folder into the new one."""
    entries = list(old.iterdir())
    ours = {"config.json", *(entry.name for entry in new.iterdir())}
    if entries:
        ours |= set(_config(old / "config.json")["files"])
    for entry in entries:
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, new / entry.name, symlinks=True, copy_function=_link)
        elif entry.name not in ours:
            _link(entry, new / entry.name)


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    _, load_file, failed = _safetensors()
    if not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a checkpoint folder; pass the folder that holds config.json")
    document = _config(folder / "config.json")
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, entry in document["files"].items():
        file = folder / name
        try:
            size = file.stat().st_size
            if size != entry["size"]:
                raise ValueError(f"{file} has {size} bytes where config.json says {entry['size']}; {_REPAIR}")
            if _digest(file) != entry["sha256"]:
                raise ValueError(f"{file} is damaged: its SHA-256 is not the one in config.json; {_REPAIR}")
            tensors[name.removesuffix(".safetensors")] = load_file(file)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise ValueError(f"{file} is missing; {_REPAIR}") from error
        except failed as error:
            raise ValueError(f"{file} is not a safetensors file ({error}); {_REPAIR}") from error
    return {key: value for key, value in document.items() if key not in RESERVED}, tensors


def _config(file: Path) -> dict[str, Any]:
    """The whole config.json, verified, with its `files` and `format`."""
    try:
        text = file.read_bytes()
        document = json.loads(text)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        raise ValueError(f"{file} is missing; pass a checkpoint folder, or restore the file") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON ({error}); {_REPAIR}") from error
    if not isinstance(document, dict) or any(key not in document for key in RESERVED):
        raise ValueError(f"{file} is not, or no longer, the config of a fastdiff checkpoint; {_REPAIR}")
    seal = document.pop("sha256")
    if seal != "edited" and not _sealed(document, seal, text):
        raise ValueError(
            f'{file} does not match its own SHA-256; {_REPAIR} (or, if you edited it, set its "sha256" to "edited")'
        )
    if document["format"] != FORMAT:
        raise ValueError(f"{file} has format {document['format']!r}, this fastdiff reads {FORMAT}; upgrade fastdiff")
    files = document["files"] if isinstance(document["files"], dict) else {"files": None}
    for name, entry in files.items():
        if not _NAME.fullmatch(name) or not isinstance(entry, dict) or not {"sha256", "size"} <= set(entry):
            raise ValueError(f'{file} has a bad entry {name!r} in "files"; {_REPAIR}')
    return document


def _sealed(document: dict[str, Any], seal: str, text: bytes) -> bool:
    try:
        # encoding again finds what a checksum of the parsed values cannot, such as 1e-05 turned into 1E-05
        return _encode({**document, "sha256": seal}) == text and hashlib.sha256(_encode(document)).hexdigest() == seal
    except ValueError:
        return False


def _safetensors() -> tuple[Callable[..., None], Callable[..., dict[str, Tensor]], type[Exception]]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file, save_file
    except ImportError as error:
        raise ImportError("checkpoints need the safetensors package: pip install safetensors") from error
    return save_file, load_file, SafetensorError


def _encode(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=2, allow_nan=False) + "\n").encode("ascii")


def _digest(file: Path) -> str:
    with open(file, "rb") as source:
        return hashlib.file_digest(source, "sha256").hexdigest()
