"""The files of a model, in a folder or on the Hub, whose tensors are read one by one."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, is_offline_mode, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, SafetensorsParsingError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import GenerationConfig
from transformers.modeling_utils import str_to_torch_dtype
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)
from transformers.utils.hub import cached_files, extract_commit_hash

from memlm.errors import UserError
from memlm.models.downloads import check_downloads

# What else belongs to a model that talks: its tokenizer and its template.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
)


class Checkpoint:
    """A model's config.json and weights. Nothing is read of a tensor before it is asked for.

    Attributes:
        source: folder or Hub id.
        config: its config.json.
        tensors: every tensor by its name on disk, without numbers (on the meta device).

    Args:
        source: a folder or a Hub id.
        allow_pickle: read weights that are pickled, by torch's reader that runs no code.
        headers_only: for shapes alone; weights on the Hub are not downloaded (offline, they have
            to be in the cache).
        hub: revision, token, cache_dir, local_files_only, force_download, subfolder.

    Raises:
        UserError: for files that are missing or damaged.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        allow_pickle: bool = False,
        headers_only: bool = False,
        **hub: Any,
    ):
        self.source = str(source)
        self.allow_pickle = allow_pickle
        self.hub = hub
        self._fetched: set[str] = set()
        self.is_folder = Path(source).is_dir()
        path = self.file(CONFIG_NAME, needed=True)
        if path is None:  # the Hub has such a repository, without one
            raise UserError(f"{source}: {CONFIG_NAME} is missing")
        if not self.is_folder:  # all files of one commit
            commit = extract_commit_hash(str(path), None)
            self.hub = {**hub, "revision": commit or hub.get("revision")}
        self.config = self._json(path)
        if not isinstance(self.config.get("model_type"), str):
            raise UserError(f"{source}: {CONFIG_NAME} names no model_type")
        self._opened: dict[str, Any] = {}
        self._offline = is_offline_mode() or bool(hub.get("local_files_only"))
        self.tensors, self._file_of = self._headers(headers_only and not self._offline)

    def read(self, name: str) -> Tensor:
        """The tensor of that name, on the CPU.

        Raises:
            UserError: when it cannot be read.
        """
        file = self._file_of[name]
        try:
            opened = self._open(file)
            return opened[name] if isinstance(opened, dict) else opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.source}: {name} of {file} cannot be read ({error})") from error

    def file(self, name: str, needed: bool = False) -> Path | None:
        """A file of the model; None where it has none of that name.

        Args:
            name: of the file.
            needed: raise instead of returning None, also where the Hub cannot be reached.

        Raises:
            UserError: when there is no such folder or repository, or no way to it.
        """
        if self.is_folder:
            path = Path(self.source, self.hub.get("subfolder") or "", name)
            if needed and not path.is_file():
                raise UserError(f"{self.source}: {name} is missing")
            return path if path.is_file() else None
        try:
            found = cached_file(
                self.source,
                name,
                _raise_exceptions_for_missing_entries=needed,
                **self._options(name),
            )
        except (OSError, HFValidationError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.source}: no folder, and not on the Hub ({reason})") from error
        return None if found is None else Path(found)

    def tokenizer_files(self) -> list[Path]:
        """The files of its tokenizer; offline, those of the cache.

        Raises:
            UserError: when they cannot be downloaded.
        """
        if self.is_folder:
            folder = Path(self.source)
        else:
            options = {key: self.hub.get(key) for key in ("revision", "token", "cache_dir")}
            patterns = list(TOKENIZER_FILES)
            try:
                found = snapshot_download(
                    self.source, allow_patterns=patterns, local_files_only=self._offline, **options
                )
            except (OSError, HfHubHTTPError) as error:
                reason = " ".join(str(error).split())
                raise UserError(
                    f"{self.source}: the tokenizer was not downloaded ({reason})"
                ) from error
            folder = Path(found)
        folder = folder / (self.hub.get("subfolder") or "")
        paths = {path for pattern in TOKENIZER_FILES for path in folder.glob(pattern)}
        return sorted(path for path in paths if path.is_file())

    def generation(self) -> GenerationConfig | None:
        """Its generation_config.json; None where it has none.

        As transformers reads it: what is unchanged since then is saved again, valid or not.

        Raises:
            UserError: when it is damaged.
        """
        path = self.file(GENERATION_CONFIG_NAME)
        if path is None:
            return None
        self._json(path)
        try:
            return GenerationConfig.from_pretrained(path.parent, path.name)
        except (AttributeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.source}: {path.name} is not valid ({reason})") from error

    # --- headers ---

    def _headers(self, headers_only: bool) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Every tensor on the meta device, and the file that it is in."""
        files, listed = self._weight_files(headers_only)
        if not (self.is_folder or headers_only):
            self._download(files)
        tensors: dict[str, Tensor] = {}
        file_of: dict[str, str] = {}
        for file in files:
            for name, (shape, dtype) in self._header(file, headers_only).items():
                if name in file_of:
                    raise UserError(f"{self.source}: {name} is in {file_of[name]} and in {file}")
                tensors[name] = torch.empty(shape, dtype=dtype, device="meta")
                file_of[name] = file
        for name, file in listed.items():
            if file_of.get(name) != file:
                raise UserError(
                    f"{self.source}: the index says that {name} is in {file}, but it is not there"
                )
        return tensors, file_of

    def _weight_files(self, headers_only: bool) -> tuple[list[str], dict[str, str]]:
        """The files with weights, and what their index says of each tensor."""
        name = SAFE_WEIGHTS_NAME
        if self._exists(name) if headers_only else self.file(name) is not None:
            return [name], {}
        index = self.file(SAFE_WEIGHTS_INDEX_NAME)
        if index is None:
            pickled = [name for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME) if self._exists(name)]
            if not pickled:
                if not self.is_folder:
                    self.file(SAFE_WEIGHTS_NAME, needed=True)  # says why: it may be the connection
                raise UserError(
                    f"{self.source}: no weights there ({SAFE_WEIGHTS_NAME} or "
                    f"{SAFE_WEIGHTS_INDEX_NAME})"
                )
            if not self.allow_pickle:
                raise UserError(
                    f"{self.source}: its weights are pickled ({pickled[0]}), and a pickle may hold "
                    "code; to read them without running any: use_safetensors=False in "
                    "from_pretrained, --allow_pickle for convert"
                )
            if pickled[0] == WEIGHTS_NAME:
                return pickled, {}
            index = self.file(WEIGHTS_INDEX_NAME)
        listed = self._json(index).get("weight_map")
        if not isinstance(listed, dict) or not all(isinstance(f, str) for f in listed.values()):
            raise UserError(f"{self.source}: {index.name} has no weight_map")
        return sorted(set(listed.values())), listed

    def _exists(self, file: str) -> bool:
        """Whether the model has a file of that name; one on the Hub is not downloaded for that."""
        if self.is_folder or self._offline:
            return self.file(file) is not None
        path = "/".join(filter(None, (self.hub.get("subfolder"), file)))
        cache = {key: self.hub.get(key) for key in ("revision", "cache_dir")}
        if isinstance(try_to_load_from_cache(self.source, path, **cache), str):
            return True
        try:
            return HfApi().file_exists(self.source, path, **self._remote())
        except (HfHubHTTPError, OSError) as error:
            raise UserError(f"{self.source}: the Hub does not answer ({error})") from error

    def _header(self, file: str, headers_only: bool) -> dict[str, tuple[list[int], torch.dtype]]:
        """Shapes and dtypes of a file's tensors."""
        if headers_only and not self.is_folder and file.endswith(".safetensors"):
            try:
                header = HfApi().parse_safetensors_file_metadata(
                    self.source, file, **self._remote()
                )
            except (HfHubHTTPError, OSError, SafetensorsParsingError) as error:
                raise UserError(f"{self.source}: {file} cannot be read ({error})") from error
            return {
                name: (info.shape, self._dtype(name, info.dtype))
                for name, info in header.tensors.items()
            }
        opened = self._open(file)
        if isinstance(opened, dict):
            return {name: (list(t.shape), t.dtype) for name, t in opened.items()}
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: (part.get_shape(), self._dtype(name, part.get_dtype()))
            for name, part in slices.items()
        }

    def _dtype(self, name: str, code: str) -> torch.dtype:
        if code not in str_to_torch_dtype:
            raise UserError(f"{self.source}: {name} has numbers of {code}, which are not known")
        return str_to_torch_dtype[code]

    def _download(self, files: list[str]) -> None:
        """Fetch files, several at once; those that are missing are told of when they are read.

        Raises:
            UserError: when that fails, or for files that came down damaged.
        """
        try:
            cached_files(
                self.source,
                files,
                _raise_exceptions_for_missing_entries=False,
                **self._options(*files),
            )
        except OSError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.source}: the weights were not downloaded ({reason})") from error
        check_downloads(self.source, self.hub)

    def _options(self, *names: str) -> dict[str, Any]:
        """For a download of these files, which `force_download` asks for once."""
        fetched = self._fetched.issuperset(names)
        self._fetched.update(names)
        return {**self.hub, "force_download": bool(self.hub.get("force_download")) and not fetched}

    def _remote(self) -> dict[str, Any]:
        return {key: self.hub.get(key) for key in ("revision", "token")}

    def _open(self, file: str) -> Any:
        """An open safetensors file, or the dictionary of a pickled one."""
        if file in self._opened:
            return self._opened[file]
        path = self.file(file, needed=True)
        try:
            if file.endswith(".safetensors"):
                opened = safe_open(path, framework="pt")
            else:
                opened = _load_pickle(path)
        except (OSError, SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "it ends early"
            raise UserError(f"{self.source}: {file} is damaged or cut off ({reason})") from error
        if isinstance(opened, dict):
            for name, value in opened.items():
                if not isinstance(value, Tensor):
                    raise UserError(f"{self.source}: {name!r} of {file} is no tensor")
        self._opened[file] = opened
        return opened

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.source}: {path.name} is damaged (not valid JSON)") from error
        if not isinstance(found, dict):
            raise UserError(f"{self.source}: {path.name} is damaged (no mapping)")
        return found


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:  # the format before torch 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True)
