"""How one process of a stage ends."""

import subprocess
import sys

ENDING = """
import atexit, os
from train import worker

class Native:  # stands for a library that aborts while the interpreter is taken down
    def __del__(self):
        os.abort()

native = Native()
atexit.register(print, "exit handlers ran")
worker.run = lambda stage_dir, rank: print("the work is done")
worker.main(["run/pretrain/config.yaml"])
"""


def test_what_breaks_after_the_work_is_done_does_not_fail_it() -> None:
    ended = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["the work is done", "exit handlers ran"]
