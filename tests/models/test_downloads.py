"""Files in the cache of the Hub are called by their hash, and are compared with it."""

import hashlib
import os

import pytest
import torch

from memlm import MemLMConfig, MemLMForCausalLM, UserError
from memlm.models.downloads import check_downloads

COMMIT = "1" * 40
NAME = "someone/tiny"


@pytest.fixture
def cache(tmp_path):
    """A cache with one model, laid out as huggingface_hub does."""
    torch.manual_seed(0)
    layers = [{"mixer": "attention", "ffn": "swiglu"}]
    MemLMForCausalLM(MemLMConfig(hidden_size=32, layers=layers)).save_pretrained(tmp_path / "saved")
    folder = tmp_path / "cache" / "models--someone--tiny"
    for name in ("blobs", "refs", f"snapshots/{COMMIT}"):
        (folder / name).mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    (tmp_path / "saved" / "pytorch_model.bin").write_bytes(b"pickled weights")
    for path in (tmp_path / "saved").iterdir():
        content = path.read_bytes()
        blob = hashlib.sha256(content).hexdigest()
        if path.suffix != ".safetensors":
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        (folder / "blobs" / blob).write_bytes(content)
        os.symlink(f"../../blobs/{blob}", folder / "snapshots" / COMMIT / path.name)
    return tmp_path / "cache"


def blob_of(cache, name):
    return next(cache.glob(f"*/snapshots/*/{name}")).resolve()


def load(cache):
    return MemLMForCausalLM.from_pretrained(NAME, cache_dir=cache, local_files_only=True)


def change(path):
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "pytorch_model.bin"])
def test_a_changed_file_is_refused_and_deleted(cache, name):
    load(cache)
    blob = blob_of(cache, name)
    change(blob)
    with pytest.raises(UserError, match=f"{NAME}: {name} was damaged") as refusal:
        check_downloads(NAME, {"cache_dir": cache})
    assert "\n" not in str(refusal.value)
    assert not blob.exists() and not list(cache.glob(f"*/snapshots/*/{name}"))


def test_what_a_load_stumbles_over_is_said(cache):
    blob_of(cache, "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="model.safetensors was damaged on its way"):
        load(cache)


def test_a_file_is_read_once(cache):
    load(cache)
    blob = blob_of(cache, "model.safetensors")
    times = blob.stat()
    change(blob)
    # Only a file that was written since is looked at.
    os.utime(blob, ns=(times.st_atime_ns, times.st_mtime_ns))
    check_downloads(NAME, {"cache_dir": cache})


def test_a_cache_that_cannot_be_written_is_compared_every_time(cache):
    next(cache.glob("models--*")).joinpath(".memlm_checked").write_text("in the way")
    load(cache)
    change(blob_of(cache, "model.safetensors"))
    with pytest.raises(UserError, match="model.safetensors was damaged"):
        check_downloads(NAME, {"cache_dir": cache})


def test_files_under_other_names_are_left_alone(cache):
    snapshot = next(cache.glob("*/snapshots/*"))
    content = blob_of(cache, "config.json").read_bytes()
    # A mirror's own hash, no hash at all, a store behind the cache, a file without a link.
    blobs = snapshot.parents[1] / "blobs"
    for name, blob in (
        ("mirror.json", hashlib.sha1(content).hexdigest()),
        ("other.json", "any-etag"),
    ):
        (blobs / blob).write_bytes(content)
        os.symlink(f"../../blobs/{blob}", snapshot / name)
    stored = blobs / hashlib.sha256(content).hexdigest()
    (cache / "store").write_bytes(content)
    os.symlink("../../store", stored)
    os.symlink(f"../../blobs/{stored.name}", snapshot / "stored.json")
    (snapshot / "copied.json").write_bytes(b"{}")
    check_downloads(NAME, {"cache_dir": cache})
    check_downloads(str(snapshot), {})
    check_downloads("someone/absent", {"cache_dir": cache})


def test_pushing_without_a_token_or_a_connection(monkeypatch):
    torch.manual_seed(0)
    model = MemLMForCausalLM(MemLMConfig(hidden_size=32))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(UserError, match="someone/x: there is no token for the Hub"):
        model.push_to_hub("someone/x")
    with pytest.raises(UserError, match="someone/x: the Hub did not take it .*offline"):
        model.push_to_hub("someone/x", token="hf_any")
