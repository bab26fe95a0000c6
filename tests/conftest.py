"""Set-up shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is a bug

from nexus_gen.compat import ensure_torchvision

ensure_torchvision()

from runs import SMALLEST, run_arguments, succeed  # noqa: E402


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipeline=tiny` of the smallest size, one process per stage. Tests read it, and write to copies only."""
    run = tmp_path_factory.mktemp("runs") / "base"
    succeed(*run_arguments(run, "pipeline=tiny", *SMALLEST))
    return run
