"""Bandwidth between GPUs where each process sees its own alone, beside that where each sees all.

    python tests/bench/bench_devices.py

Needs two GPUs or more in one machine.
"""

import os
import subprocess
import sys
import time

import torch
import torch.distributed

NUM_BYTES = 1 << 30
REPEATS = 20


def worker() -> None:
    """One rank: sums a gibibyte over all ranks; rank zero prints the rate."""
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl")
    values = torch.randn(NUM_BYTES // 4, device="cuda")
    for _ in range(5):
        torch.distributed.all_reduce(values)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(REPEATS):
        torch.distributed.all_reduce(values)
    torch.cuda.synchronize()
    if torch.distributed.get_rank() == 0:
        print(NUM_BYTES * REPEATS / (time.perf_counter() - began) / 1e9)
    torch.distributed.destroy_process_group()


def rate(*flags: str) -> float:
    """GB/s of the all-reduce over all GPUs."""
    processes = f"--nproc-per-node={torch.cuda.device_count()}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", processes, *flags, __file__, "worker"]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])


def main() -> None:
    for _ in range(2):
        seeing_all, seeing_own = rate(), rate("--virtual-local-rank")
        print(f"all_reduce of 1 GiB: all seen {seeing_all:.0f} GB/s, own alone {seeing_own:.0f} GB/s", end="; ")
        print(f"ratio {seeing_own / seeing_all:.2f}")


if __name__ == "__main__":
    worker() if "worker" in sys.argv else main()
