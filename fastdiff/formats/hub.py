"""`org/name` of the Hugging Face hub: found in its cache without network and library, else downloaded through these.

    <cache>/models--org--name/refs/<revision>           the commit of a branch or a tag
                              snapshots/<commit>/...    the files of the repository, as links into blobs
                              blobs/<hash>[.incomplete]

<cache> is $HF_HUB_CACHE, else $HUGGINGFACE_HUB_CACHE, else `hub` in $HF_HOME, in $XDG_CACHE_HOME/huggingface or in
~/.cache/huggingface. What is cached whole is read from there, also where the hub has a newer commit by now.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from fastdiff.formats.diffusers.read import FORMS, VAE, WEIGHTS, form, parts

_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
_SCHEDULERS = ("scheduler/scheduler_config.json", "scheduler_config.json")


class Repo(NamedTuple):
    """A model on the hub."""

    name: str
    revision: str = "main"

    @property
    def folder(self) -> Path:
        """Where the cache has it, if it has."""
        return cache() / f"models--{self.name.replace('/', '--')}"

    @property
    def commit(self) -> str:
        """What the revision was when the cache last heard of it; itself where that is not known."""
        ref = self.folder / "refs" / self.revision
        commit = ref.read_text().strip() if ref.is_file() else ""
        return commit if re.fullmatch(r"\w+", commit) else self.revision

    @property
    def snapshot(self) -> Path:
        """The folder of its files."""
        return self.folder / "snapshots" / self.commit


def parse(name: object) -> Repo | None:
    """The model that "org/name" or "org/name@revision" can mean; None for what can only be a path."""
    found = _NAME.fullmatch(name) if isinstance(name, str) else None
    if found is None or "--" in found["name"] or ".." in found[0]:
        return None
    return Repo(found["name"], found["revision"] or "main")


def cache() -> Path:
    """The folder that huggingface_hub keeps models in, from the environment as it is now."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    asked = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expandvars(os.path.expanduser(asked)))


def offline() -> bool:
    """Whether the user forbids the network, as huggingface_hub understands it."""
    asked = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return asked.upper() in ("1", "ON", "YES", "TRUE")


def resolve(repo: Repo) -> Path:
    """The folder with the files of `repo` that `load` reads: from the cache where it has them all, else downloaded.

    Raises FileNotFoundError where there is no such thing, or offline none in the cache; PermissionError for a gated
    one, ConnectionError without network, ImportError without the extra [hub], ValueError for one without a U-Net.
    """
    snapshot = repo.snapshot
    lack = _lacking(snapshot)
    if lack is not None:
        _download(repo, _state(repo, lack))
        snapshot = repo.snapshot
    _tell(repo, snapshot)
    return snapshot


def _read(file: Path) -> dict[str, Any]:
    """A config; {} for one that is not there or that `load` will complain of."""
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _lacking(snapshot: Path) -> str | None:
    """The first of the files that `load` would read and that is not there, or is a link to nothing."""
    # os.listdir gives the dangling links too: where the better weights are known of, no other ones stand for them
    top = "unet/" if (snapshot / "unet").is_dir() else ""
    names = set(os.listdir(snapshot / top)) if (snapshot / top).is_dir() else set()
    config, chosen = _read(snapshot / top / "config.json"), form(names) or WEIGHTS
    wanted = [f"{top}config.json"]
    if _is_ours(config):
        wanted += list(config["files"])
    else:
        wanted.append(top + chosen)
        if chosen.endswith(".json") and (snapshot / top / chosen).is_file():
            wanted += [top + part for part in parts(snapshot / top / chosen)]
        index = _read(snapshot / "model_index.json")
        if index.get("scheduler") and not _scheduler(snapshot):
            wanted.append(_SCHEDULERS[0])
        wanted += [VAE] * bool(index.get("vae"))
    return next((name for name in wanted if not (snapshot / name).is_file()), None)


def _is_ours(config: dict[str, Any]) -> bool:
    return "fastdiff" in config and isinstance(config.get("files"), dict)


def _scheduler(snapshot: Path) -> bool:
    return any((snapshot / name).is_file() for name in _SCHEDULERS)


def _tell(repo: Repo, snapshot: Path) -> None:
    """Say so where others cached a network without the scheduler that its repository may have."""
    known = all((repo.folder / ".no_exist" / snapshot.name / name).is_file() for name in _SCHEDULERS)
    if not (_scheduler(snapshot) or known or _is_ours(_read(snapshot / "config.json"))):
        warnings.warn(
            f"load: the cache has no scheduler_config.json of {repo.name}, so that DDPM's defaults are taken; where "
            f"that is wrong, delete {snapshot} and load again",
            stacklevel=4,
        )


def _state(repo: Repo, lack: str) -> str:
    """What the cache has of a model that is not there whole."""
    commits = sorted(p.name for p in (repo.folder / "snapshots").glob("*"))
    if repo.commit in commits:
        cut = any((repo.folder / "blobs").glob("*.incomplete"))
        why = " (its download was cut off)" if cut else ""
        return f"the Hugging Face cache has {repo.name} without {lack}{why}"
    if commits:
        others = ", ".join(f"{repo.name}@{commit}" for commit in commits[:3])
        return f"the Hugging Face cache does not know {repo.revision!r} of {repo.name}, only {others}"
    return f"there is no folder {repo.name!r}, and the Hugging Face cache {cache()} does not have it"


def _download(repo: Repo, state: str) -> None:
    """Fetch what `load` reads of `repo` and nothing else, the weights last."""
    if offline():
        raise FileNotFoundError(f"load: {state}, and HF_HUB_OFFLINE forbids a download; unset it, or pass a folder")
    try:
        import huggingface_hub  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"load: {state}; a download needs huggingface_hub: run `pip install 'fastdiff-engine[hub]'`, "
            "or pass a folder"
        ) from error
    first = _get(repo, "unet/config.json", state)
    top = "" if first is None else "unet/"
    first = first or _get(repo, "config.json", state)
    if first is None:
        raise ValueError(f"load: {repo.name} holds neither unet/config.json nor config.json; name a model with a U-Net")
    # what comes next is of the same commit, whatever happens to the branch meanwhile
    at, config = repo._replace(revision=first.parents[bool(top)].name), _read(first)
    if _is_ours(config):
        found = [_get(at, name, state) for name in config["files"]]
    elif not str(config.get("_class_name", "")).startswith("UNet"):
        kind = config.get("_class_name") or config.get("model_type")
        raise ValueError(
            f"load: {repo.name} is a {kind or 'model of no known kind'}, not a U-Net; accepted: repositories of "
            "fastdiff, and of diffusers' pipelines and U-Nets"
        )
    else:
        for name in ("model_index.json", *_SCHEDULERS, VAE):
            _get(at, name, state)
        found = _weights(at, top, state)
    if None in found or not found:
        raise ValueError(
            f"load: {repo.name} has a config.json{' in unet' * bool(top)} without its whole weights as safetensors; "
            "convert them with diffusers' save_pretrained(folder, safe_serialization=True)"
        )


def _weights(repo: Repo, top: str, state: str) -> list[Path | None]:
    """The weights of a diffusers U-Net: the first of its forms that the hub has."""
    for name in FORMS:
        file = _get(repo, top + name, state)
        if file is not None:
            more = parts(file) if name.endswith(".json") else []
            return [file, *(_get(repo, top + part, state) for part in more)]
    return []


def _get(repo: Repo, file: str, state: str) -> Path | None:
    """One file into the cache; None where the repository has none of that name."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo.name, file, revision=repo.revision, cache_dir=cache()))
    except Exception as error:
        # by name: where the classes are, and which ones a broken connection raises, depends on the library's version
        kinds = [kind.__name__ for kind in type(error).__mro__]
        if "EntryNotFoundError" in kinds and "LocalEntryNotFoundError" not in kinds:
            return None
        raise _refusal(repo, file, state, error, kinds) from error


def _refusal(repo: Repo, file: str, state: str, error: Exception, kinds: list[str]) -> OSError:
    """The sentence for what the library raised; `kinds` are the names of its classes, the narrowest first."""
    if "GatedRepoError" in kinds:
        return PermissionError(
            f"load: {repo.name} is gated; accept its terms on the hub and set HF_TOKEN, or run `hf auth login`"
        )
    if "RepositoryNotFoundError" in kinds:
        return FileNotFoundError(
            f"load: {state}, and the hub shows no such model; check the name, set HF_TOKEN if it is private, "
            "or pass a folder"
        )
    if "RevisionNotFoundError" in kinds:
        return FileNotFoundError(
            f"load: {repo.name} has no revision {repo.revision!r}; pass {repo.name}@BRANCH, TAG or COMMIT that is there"
        )
    cause = error.__cause__ or error
    said = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
    return ConnectionError(
        f"load: {state}, and {file} cannot be downloaded ({said}); check the network, or pass a folder"
    )
