"""Two starts on the same directory of a run."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.lock import locked
from nexus_gen.specs.errors import UserError


def refused(stage_dir: Path, holder: str, among_others: bool = False) -> None:
    with pytest.raises(UserError, match=rf"{stage_dir} is in use by {holder}"), locked(stage_dir, among_others):
        pass


def test_the_second_start_names_the_process_of_the_first(tmp_path: Path) -> None:
    with locked(tmp_path, among_others=False):
        refused(tmp_path, f"process {os.getpid()} on ")
    with locked(tmp_path, among_others=False):
        pass


def test_a_directory_stays_in_use_while_a_child_has_the_lock_open(tmp_path: Path) -> None:
    with locked(tmp_path, among_others=False) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.file])
        lock.name_holders(child.pid)
    refused(tmp_path, f"process {child.pid} on ")
    child.communicate(b"\n")
    with locked(tmp_path, among_others=False):
        pass


def test_only_machines_of_one_launch_share_a_directory(tmp_path: Path) -> None:
    code = (
        "import sys, launch.lock as lock; lock.gethostname = lambda: 'node7'\n"
        f"with lock.locked(lock.Path({str(tmp_path)!r}), False): print(flush=True); input()"
    )
    elsewhere = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert elsewhere.stdout is not None and elsewhere.stdout.readline()
    refused(tmp_path, f"process {elsewhere.pid} on node7")
    with locked(tmp_path, among_others=True):
        refused(tmp_path, f"process {os.getpid()} on ", among_others=True)
    elsewhere.communicate(b"\n")


def test_a_killed_start_leaves_no_lock(tmp_path: Path) -> None:
    code = f"import launch.lock as l, time\nwith l.locked(l.Path({str(tmp_path)!r}), False): time.sleep(60)"
    start = subprocess.Popen([sys.executable, "-c", code])
    while not list(tmp_path.glob("log/*.lock")):
        time.sleep(0.01)
    start.send_signal(signal.SIGKILL)
    start.wait()
    with locked(tmp_path, among_others=False):
        pass
