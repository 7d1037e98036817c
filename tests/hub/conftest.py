from collections.abc import Iterator

import pytest

from tests.hub.server import HubServer


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server
