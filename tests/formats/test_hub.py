"""fd.load("org/name"): folders laid out as the Hugging Face cache is, its library as the judge, a hub of our own."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import fastdiff as fd
from fastdiff.formats import hub
from fastdiff.formats.diffusers.read import WEIGHTS, read_unet
from tests.process import python

diffusers = pytest.importorskip("diffusers")
huggingface_hub = pytest.importorskip("huggingface_hub")

pytestmark = pytest.mark.usefixtures("one_thread")

COMMIT, OLD = "0123456789abcdef0123456789abcdef01234567", "89abcdef0123456789abcdef0123456789abcdef"
ENVIRONMENT = ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HF_HUB_OFFLINE")
NET = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D",) * 2,
    "up_block_types": ("UpBlock2D",) * 2,
    "add_attention": False,
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 8,
}


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**NET).eval()


@pytest.fixture(scope="module")
def pipeline(net: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a network and a scheduler, both as diffusers writes them, and much that is not ours to read."""
    folder = tmp_path_factory.mktemp("pipeline")
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction")
    diffusers.DDPMPipeline(unet=net, scheduler=scheduler).save_pretrained(folder)
    for other in ("README.md", "whole.safetensors", "unet/diffusion_pytorch_model.bin", "vae/config.json"):
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def store(cache: Path, source: Path, name: str, commit: str = COMMIT, *, repo: str = "org/name") -> Path:
    """One file of `source` into the cache, as a blob and a link to it."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    blob = folder / "blobs" / hashlib.sha256((source / name).read_bytes()).hexdigest()
    link = folder / "snapshots" / commit / name
    for p in (blob, link):
        p.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / name, blob)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return link


def refer(cache: Path, revision: str, commit: str, *, repo: str = "org/name") -> None:
    ref = cache / f"models--{repo.replace('/', '--')}" / "refs" / revision
    ref.parent.mkdir(parents=True, exist_ok=True)
    ref.write_text(commit)


def put(cache: Path, source: Path, commit: str = COMMIT, revision: str | None = "main", repo: str = "org/name") -> None:
    """All of `source`."""
    for name in files(source):
        store(cache, source, name, commit, repo=repo)
    if revision is not None:
        refer(cache, revision, commit, repo=repo)


def same(den: fd.Denoiser, net: torch.nn.Module, *, atol: float = 1e-6) -> bool:
    x, t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([3, 700])
    with torch.no_grad():
        return bool(torch.allclose(den.net(x, t), net(x, t).sample, atol=atol))


def saved(folder: Path, value: float) -> fd.Denoiser:
    """A tiny Denoiser of ours in a folder."""
    tiny = fd.UNet(in_channels=1, channels=8, mults=(1,), blocks=1, attention=(), middle=False)
    torch.nn.init.constant_(tiny.out.bias, value)
    den = fd.Denoiser(tiny, fd.cosine(), "v", meta={"shape": [1, 8, 8]})
    fd.save(den, folder)
    return den


# ---- the cache


def test_a_pipeline_in_the_cache(cache: Path, pipeline: Path, net: torch.nn.Module) -> None:
    put(cache, pipeline)
    den = fd.load("org/name")
    assert same(den, net)
    assert (den.predicts, den.defaults["solver"]) == ("v", "ddim")
    assert den.meta == {"name": "name", "shape": [3, 8, 8], "vae_scaling_factor": 0.18215}


def test_one_of_ours_in_the_cache(cache: Path, tmp_path: Path) -> None:
    den = saved(tmp_path / "tiny", 0.5)
    put(cache, tmp_path / "tiny", repo="some.one/my_net-1.0")
    back = fd.load("some.one/my_net-1.0")
    assert all(torch.equal(a, b) for a, b in zip(den.net.parameters(), back.net.parameters(), strict=True))
    assert back.meta["name"] == "my_net-1.0"


def test_a_folder_of_that_name_wins(cache: Path, pipeline: Path, tmp_path: Path) -> None:
    put(cache, pipeline)
    saved(tmp_path / "org" / "name", 0.5)
    assert fd.load("org/name").meta == {"shape": [1, 8, 8], "name": "name"}


def test_the_layout_is_the_librarys(cache: Path, pipeline: Path) -> None:
    """What we look up, huggingface_hub finds at the same place in the same fabricated cache, which it thinks sound."""
    put(cache, pipeline)
    put(cache, pipeline, OLD, "refs/pr/1")
    refer(cache, "v1.0", OLD)
    for revision in ("main", "v1.0", "refs/pr/1", COMMIT, OLD):
        ours = hub.resolve(hub.Repo("org/name", revision))
        for name in files(pipeline):
            theirs = huggingface_hub.try_to_load_from_cache("org/name", name, cache_dir=cache, revision=revision)
            assert str(ours / name) == theirs
    assert huggingface_hub.try_to_load_from_cache("org/name", "README.md", cache_dir=cache, revision="v2") is None
    info = huggingface_hub.scan_cache_dir(cache)
    assert not info.warnings
    (repo,) = info.repos
    assert (repo.repo_id, {r.commit_hash for r in repo.revisions}) == ("org/name", {COMMIT, OLD})
    assert repo.refs.keys() == {"main", "v1.0", "refs/pr/1"}


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"HF_HOME": "$ROOT/home"},
        {"XDG_CACHE_HOME": "~/xdg"},
        {"XDG_CACHE_HOME": "/xdg", "HF_HOME": "/home"},
        {"HF_HOME": "/home", "HUGGINGFACE_HUB_CACHE": "/legacy"},
        {"HF_HOME": "/home", "HUGGINGFACE_HUB_CACHE": "/legacy", "HF_HUB_CACHE": "~/hub"},
    ],
    ids=" ".join,
)
def test_where_the_cache_is(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    code = "from huggingface_hub.constants import HF_HUB_CACHE as c; print(c)"
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ROOT", "/root-of-all")
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    wanted = python("-c", code)
    assert str(hub.cache()) == wanted.stdout.strip(), wanted.stderr


def test_revisions(cache: Path, tmp_path: Path) -> None:
    for commit, value in ((OLD, 1.0), (COMMIT, 2.0)):
        saved(tmp_path / commit, value)
        put(cache, tmp_path / commit, commit, None)

    def bias(name: str) -> float:
        return float(fd.load(name).net.out.bias.detach()[0])

    # no branch is known: which of the two would be main?
    with pytest.raises(
        FileNotFoundError, match=rf"does not know 'main' of org/name, only org/name@{COMMIT}, org/name@"
    ):
        fd.load("org/name")
    assert bias(f"org/name@{OLD}") == 1.0
    refer(cache, "main", OLD)
    assert (bias("org/name"), bias(f"org/name@{COMMIT}")) == (1.0, 2.0)
    refer(cache, "main", COMMIT + "\n")
    refer(cache, "v1/rc", OLD)
    assert (bias("org/name"), bias("org/name@v1/rc")) == (2.0, 1.0)
    with pytest.raises(FileNotFoundError, match="does not know 'v3' of org/name, only"):
        fd.load("org/name@v3")
    # a ref to what was deleted, and an empty one
    for commit in ("f" * 40, ""):
        refer(cache, "main", commit)
        with pytest.raises(FileNotFoundError, match="does not know 'main'"):
            fd.load("org/name")


def test_a_half_download_names_what_is_not_there(cache: Path, pipeline: Path, net: torch.nn.Module) -> None:
    put(cache, pipeline)
    snapshot = hub.resolve(hub.Repo("org/name"))
    blobs = cache / "models--org--name" / "blobs"
    for name in ("unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json"):
        blob = (snapshot / name).resolve()
        blob.rename(blobs / f"{blob.name}.incomplete")
        with pytest.raises(
            FileNotFoundError, match=rf"has org/name without {name} \(its download was cut off\), and HF"
        ):
            fd.load("org/name")
        (blobs / f"{blob.name}.incomplete").rename(blob)
        # neither link nor blob
        link = os.readlink(snapshot / name)
        (snapshot / name).unlink()
        with pytest.raises(FileNotFoundError, match=rf"has org/name without {name}, and HF_HUB_OFFLINE"):
            fd.load("org/name")
        (snapshot / name).symlink_to(link)
    # a narrower variant does not stand for weights that are known of
    store(cache, pipeline, f"unet/{WEIGHTS}").rename(snapshot / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (snapshot / "unet" / WEIGHTS).symlink_to("../../../blobs/gone")
    with pytest.raises(FileNotFoundError, match=f"without unet/{WEIGHTS}"):
        fd.load("org/name")
    (snapshot / "unet" / WEIGHTS).unlink()
    assert same(fd.load("org/name"), net)


def test_a_network_cached_without_its_scheduler_is_told(cache: Path, pipeline: Path, net: torch.nn.Module) -> None:
    for name in ("unet/config.json", f"unet/{WEIGHTS}"):
        store(cache, pipeline, name)
    refer(cache, "main", COMMIT)
    with pytest.warns(UserWarning, match=r"no scheduler_config\.json of org/name, so that DDPM's defaults"):
        den = fd.load("org/name")
    assert same(den, net)
    # the library notes what a repository does not have
    for name in ("scheduler/scheduler_config.json", "scheduler_config.json"):
        none = cache / "models--org--name" / ".no_exist" / COMMIT / name
        none.parent.mkdir(parents=True, exist_ok=True)
        none.touch()
        known = huggingface_hub.try_to_load_from_cache("org/name", name, cache_dir=cache)
        assert known is huggingface_hub._CACHED_NO_EXIST
    assert same(fd.load("org/name"), net)


@pytest.mark.parametrize(
    "name",
    ["nowhere", "a/b/c", "./org/name", "/org/name", "org/..", "../name", "org--x/name", "org/name@../../x", "o n/x"],
)
def test_what_is_no_name_of_a_model(name: str, pipeline: Path, cache: Path) -> None:
    assert hub.parse(name) is None
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        fd.load(name)


def test_nothing_there_is_one_sentence(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"no folder 'org/name', and the .*cache .*does not have it, and HF_HUB_O"
    ):
        fd.load("org/name")
    assert hub.parse(Path("org/name")) is None
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"needs huggingface_hub: run `pip install 'fastdiff-engine\[hub\]'`"):
        fd.load("org/name")


def test_neither_library_nor_network_for_what_is_cached(
    cache: Path, pipeline: Path, net: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(cache, pipeline)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert same(fd.load("org/name"), net)


# ---- shards and variants


def test_sharded_weights(net: torch.nn.Module, tmp_path: Path, cache: Path, pipeline: Path) -> None:
    net.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    shards = sorted((tmp_path / "parts").glob("*-of-*.safetensors"))
    assert len(shards) > 2
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 700])
    with torch.no_grad():
        assert torch.allclose(read_unet(tmp_path / "parts")[0](x, t), net(x, t).sample, atol=1e-6)
    put(cache, tmp_path / "parts")
    with pytest.warns(UserWarning, match="no scheduler_config"):
        assert same(fd.load("org/name"), net)
    hub.Repo("org/name").snapshot.joinpath(shards[1].name).resolve().unlink()
    with pytest.raises(FileNotFoundError, match=f"has org/name without {shards[1].name}"):
        fd.load("org/name")
    shards[1].unlink()
    with pytest.raises(
        ValueError, match=rf"lacks {shards[1].name} \(1 of the {len(shards)} parts that {WEIGHTS}\.index"
    ):
        read_unet(tmp_path / "parts")
    index = tmp_path / "parts" / f"{WEIGHTS}.index.json"
    index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../elsewhere.safetensors"}}))
    with pytest.raises(ValueError, match="has no weight_map of files beside it"):
        read_unet(tmp_path / "parts")


@pytest.mark.parametrize("size", ["10GB", "10KB"])
@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_variants(net: torch.nn.Module, tmp_path: Path, variant: str, size: str) -> None:
    narrow = diffusers.UNet2DModel(**NET)
    narrow.load_state_dict(net.state_dict())
    narrow.to({"fp16": torch.float16, "bf16": torch.bfloat16}[variant])
    narrow.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    assert not (tmp_path / WEIGHTS).exists()
    den = fd.load(tmp_path)
    assert same(den, narrow.float())
    assert den.dtype == torch.float32
    # the whole weights are the better ones
    net.save_pretrained(tmp_path)
    assert same(fd.load(tmp_path), net)


def test_other_weights_are_named(net: torch.nn.Module, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path, variant="non_ema")
    with pytest.raises(ValueError, match=r"nor its fp16 or bf16 variant \(but diffusion_pytorch_model\.non_ema\."):
        read_unet(tmp_path)


# ---- the download

Hub = Callable[..., list[str]]


def refusal(kind: type[Exception]) -> Exception:
    """One of the library's errors, whatever its constructor wants."""
    error = kind.__new__(kind)
    error.args = ("a long\nstory",)
    return error


@pytest.fixture
def hosted(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """hosted(folder): huggingface_hub downloads "org/name" from there; gives the list of what it was asked for."""
    monkeypatch.delenv("HF_HUB_OFFLINE")

    def host(source: Path) -> list[str]:
        asked: list[str] = []

        def hf_hub_download(repo_id: str, filename: str, *, revision: str, cache_dir: Path) -> str:
            asked.append(filename)
            assert repo_id == "org/name"
            if not (source / filename).is_file():
                none = cache_dir / "models--org--name" / ".no_exist" / COMMIT / filename
                none.parent.mkdir(parents=True, exist_ok=True)
                none.touch()
                raise refusal(huggingface_hub.errors.EntryNotFoundError)
            if revision != COMMIT:
                if any((source / name).is_file() for name in asked[:-1]):
                    pytest.fail("the branch may have moved since the first file")
                refer(cache_dir, revision, COMMIT)
            return str(store(cache_dir, source, filename))

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
        return asked

    return host


def test_only_what_we_read_is_downloaded(hosted: Hub, pipeline: Path, net: torch.nn.Module) -> None:
    asked = hosted(pipeline)
    assert same(fd.load("org/name"), net)
    got = files(hub.Repo("org/name").snapshot)
    assert got == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        f"unet/{WEIGHTS}",
        "vae/config.json",
    ]
    # a cut-off download leaves no weights without what says how to read them
    assert asked[-1] == f"unet/{WEIGHTS}"
    asked.clear()
    assert same(fd.load("org/name"), net)
    assert asked == []


def test_a_half_download_is_completed(hosted: Hub, cache: Path, pipeline: Path, net: torch.nn.Module) -> None:
    store(cache, pipeline, "unet/config.json")
    refer(cache, "main", COMMIT)
    hosted(pipeline)
    den = fd.load("org/name")
    assert same(den, net)
    assert den.predicts == "v"


def test_shards_and_variants_are_downloaded(hosted: Hub, net: torch.nn.Module, tmp_path: Path) -> None:
    net.save_pretrained(tmp_path / "parts", max_shard_size="20KB", variant="fp16")
    (tmp_path / "parts" / "config.json.bak").touch()
    hosted(tmp_path / "parts")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(fd.load("org/name@main"), net)
    assert files(hub.Repo("org/name").snapshot) == [n for n in files(tmp_path / "parts") if not n.endswith(".bak")]


def test_one_of_ours_is_downloaded(hosted: Hub, tmp_path: Path) -> None:
    saved(tmp_path / "tiny", 0.25)
    (tmp_path / "tiny" / "log.jsonl").write_text("{}")
    hosted(tmp_path / "tiny")
    assert float(fd.load("org/name").net.out.bias.detach()[0]) == 0.25
    assert files(hub.Repo("org/name").snapshot) == ["config.json", "model.safetensors"]


def test_repositories_that_we_do_not_read(hosted: Hub, pipeline: Path, tmp_path: Path) -> None:
    source = tmp_path / "other"
    source.mkdir()
    asked = hosted(source)
    with pytest.raises(ValueError, match=r"holds neither unet/config\.json nor config\.json"):
        fd.load("org/name")
    (source / "config.json").write_text('{"model_type": "bert"}')
    (source / "model.safetensors").write_text("400 GB")
    asked.clear()
    with pytest.raises(ValueError, match="org/name is a bert, not a U-Net"):
        fd.load("org/name")
    assert asked == ["unet/config.json", "config.json"]
    shutil.copytree(pipeline, source, dirs_exist_ok=True)
    (source / "unet" / WEIGHTS).unlink()
    asked.clear()
    with pytest.raises(ValueError, match=r"has a config\.json in unet without its whole weights as safetensors"):
        fd.load("org/name")


def test_refusals_of_the_hub_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    errors = huggingface_hub.errors

    for kind, raised, said in (
        (errors.GatedRepoError, PermissionError, "org/name is gated; accept its terms"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "and the hub shows no such model; check the name"),
        (errors.RevisionNotFoundError, FileNotFoundError, "org/name has no revision 'main'; pass"),
        (errors.LocalEntryNotFoundError, ConnectionError, r"unet/config.json cannot be downloaded \(LocalEntryNotF"),
        (TimeoutError, ConnectionError, r"cannot be downloaded \(TimeoutError: a long story\); check the network"),
    ):

        def fails(*_: object, kind: type[Exception] = kind, **__: object) -> str:
            raise refusal(kind)

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fails)
        with pytest.raises(raised, match=said) as caught:
            fd.load("org/name")
        assert type(caught.value) is raised
        assert "\n" not in str(caught.value)


# ---- the library itself, over HTTP, from a hub on this machine


@pytest.fixture
def server(pipeline: Path) -> Iterator[str]:
    """The address of a hub that has "org/name"."""

    class Hosted(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(b"")

        def do_GET(self) -> None:
            self.answer(None)

        def answer(self, body: bytes | None) -> None:
            repo, _, rest = self.path.lstrip("/").partition("/resolve/")
            revision, _, name = rest.partition("/")
            file = pipeline / name
            found = repo == "org/name" and revision in ("main", COMMIT)
            content = file.read_bytes() if found and name and file.is_file() else b""
            self.send_response(200 if content else 403 if repo == "org/gated" else 404)
            if found:
                self.send_header("X-Repo-Commit", COMMIT)
            if not content:
                other = {"org/name": "RevisionNotFound", "org/gated": "GatedRepo"}.get(repo, "RepoNotFound")
                self.send_header("X-Error-Code", "EntryNotFound" if found else other)
            self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content if body is None else body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hosted) as listening:
        thread = threading.Thread(target=listening.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


def test_over_http_and_then_offline(server: str, cache: Path, pipeline: Path) -> None:
    code = (
        "import sys, fastdiff as fd\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print(fd.load(name))\n"
        "    except OSError as error:\n        print(type(error).__name__, error)\n"
    )
    there = {"HF_HUB_CACHE": str(cache), "HF_ENDPOINT": server, "HF_HUB_DISABLE_TELEMETRY": "1", "no_proxy": "*"}
    names = ("org/name", "org/nothing", "org/name@v9", "org/gated")
    done = python("-c", code, *names, **there, HF_HUB_OFFLINE="0")
    first, *errors = done.stdout.strip().splitlines()
    assert first == "Denoiser(UNet, linear, predicts='v')", done.stderr
    for line, said in zip(
        errors,
        (
            "FileNotFoundError load: there is no folder 'org/nothing', and .* the hub shows no such model",
            "FileNotFoundError load: org/name has no revision 'v9'; pass",
            "PermissionError load: org/gated is gated; accept",
        ),
        strict=True,
    ):
        assert re.match(said, line), line
    snapshot = hub.Repo("org/name").snapshot
    assert snapshot.name == COMMIT
    assert (snapshot / "unet" / WEIGHTS).is_symlink()
    assert files(snapshot) == [n for n in files(pipeline) if n in files(snapshot)]
    assert len(files(snapshot)) == 5
    assert fd.load("org/name").predicts == "v"
