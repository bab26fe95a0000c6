"""What tests of training share."""

import signal
from collections.abc import Iterator

import pytest


@pytest.fixture
def sigterm() -> Iterator[None]:
    """The handler of SIGTERM, which a stage takes over, is back afterwards."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)
