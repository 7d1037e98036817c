from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
import transformers.utils.hub
from huggingface_hub import constants

from tests.hub.server import TOKEN, HubServer


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


class Client:
    """This process as a client of the local Hub, with a cache of its own."""

    def __init__(self, hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch):
        self.cache, self._set = cache, monkeypatch.setattr
        self._env = monkeypatch
        # What huggingface_hub reads from the environment when it is imported.
        self._set(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        self._set(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        self._set(constants, "HF_HUB_DISABLE_XET", True)
        self._set(huggingface_hub.hf_api.api, "endpoint", hub.url)
        self._set(transformers.utils.hub, "_hf_api", None)
        self._env.setenv("NO_PROXY", "127.0.0.1,localhost")
        self.use_cache(cache)
        self.offline(False)
        self.log_in(TOKEN)

    def use_cache(self, cache: Path) -> None:
        """As HF_HUB_CACHE does."""
        self._set(constants, "HF_HUB_CACHE", str(cache))

    def offline(self, switch: bool) -> None:
        """As HF_HUB_OFFLINE does."""
        self._set(constants, "HF_HUB_OFFLINE", switch)

    def log_in(self, token: str | None) -> None:
        """As HF_TOKEN does; None = log out."""
        if token is None:
            self._env.delenv("HF_TOKEN", raising=False)
        else:
            self._env.setenv("HF_TOKEN", token)


@pytest.fixture
def client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    huggingface_hub.close_session()  # it knows whether it is offline, and proxies
    hub.requests.clear()
    yield Client(hub, tmp_path / "cache", monkeypatch)
    hub.break_off, hub.damaged = None, False
    huggingface_hub.close_session()
