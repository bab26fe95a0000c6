"""Set-up shared by all tests.

`make test` runs them in two processes: tests of one file in one of them, in order, because they share what its fixtures
made; tests on the shared run wherever there is room.
"""

import os
from pathlib import Path

import pytest
from filelock import FileLock

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that reaches for a hub is a bug
WORKER = "PYTEST_XDIST_WORKER"  # set in each of several test processes
if WORKER in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of several processes would wait for each other

import torch  # noqa: E402 - reads the number of threads

from nexus_gen.tensors.compat import ensure_torchvision  # noqa: E402

ensure_torchvision()

from browsers import browser  # noqa: E402
from runs import SMALLEST, run_arguments, succeed  # noqa: E402


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Say which tests belong together, and begin the shared run first, so that others have work until it is there.

    What is marked `gpu` or `browser` is deselected where there is none.
    """
    for mark, is_there in (("gpu", torch.cuda.is_available()), ("browser", browser() is not None)):
        if not is_there:
            config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker(mark)])
            items[:] = [item for item in items if not item.get_closest_marker(mark)]

    def on_shared_run(item: pytest.Item) -> bool:
        return "tiny_run" in getattr(item, "fixturenames", ())

    shared = [item for item in items if on_shared_run(item)]
    items[:] = [*shared[:1], *(item for item in items if not on_shared_run(item)), *shared[1:]]
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(group(item) if on_shared_run(item) else item.path.stem))


def group(item: pytest.Item) -> str:
    """Tests that compare with the same training belong together; the others are alone."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("two_processes", item.name)) if callspec else item.name


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pipeline=tiny` of the smallest size, one process per stage. Tests read it, and write to copies only."""
    # The processes of one session have their directories under one parent.
    root = tmp_path_factory.getbasetemp().parent if WORKER in os.environ else tmp_path_factory.getbasetemp()
    run, done = root / "runs" / "base", root / "tiny_run.done"
    with FileLock(root / "tiny_run.lock"):
        if not done.exists():
            succeed(*run_arguments(run, "pipeline=tiny", *SMALLEST))
            done.touch()
    return run
