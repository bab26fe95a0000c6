"""How many GPUs this machine has, and whether stages ask for more of them. Torch is not imported here."""

import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from nexus_gen.specs.errors import UserError
from train.schemas.common import LaunchConfig

DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, of Windows for its Linux
COUNT = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)"


@lru_cache(maxsize=1)
def num_gpus() -> int:
    """The GPUs that torch sees on this machine, as CUDA_VISIBLE_DEVICES narrows them down.

    Torch itself counts, in a process of its own: it knows the drivers, their partitions and every form of that
    variable. Where there is no driver nobody waits for it.
    """
    if not any(Path(driver).exists() for driver in DRIVERS):
        return 0
    counted = subprocess.run([sys.executable, "-P", "-c", COUNT], capture_output=True, text=True, check=False)
    if counted.returncode:
        reason = "".join(counted.stderr.strip().splitlines()[-1:])
        raise UserError(
            f"torch could not count this machine's GPUs ({reason}); "
            "check the driver with nvidia-smi, or give launch.device=cpu"
        )
    return int(counted.stdout.split()[-1])


def uses_gpus(launch: LaunchConfig) -> bool:
    """Whether the processes of a stage run on GPUs. A Slurm job requests them, whatever this machine has."""
    return launch.device != "cpu" and (launch.kind == "slurm" or num_gpus() > 0)


def require_gpus(launches: Sequence[LaunchConfig]) -> None:
    """UserError when processes that start on this machine would not each have a GPU of their own."""
    for launch in launches:
        if launch.device == "cpu" or launch.kind == "slurm":
            continue
        available, wanted = num_gpus(), launch.processes_per_node
        if launch.device == "cuda" and not available:
            raise UserError("launch.device is cuda and torch sees no GPU on this machine; give launch.device=cpu")
        if available and wanted > available:
            gpus = "1 GPU" if available == 1 else f"{available} GPUs"
            raise UserError(
                f"launch.processes_per_node is {wanted} and torch sees {gpus} on this machine; each process needs one "
                f"of its own: give launch.processes_per_node={available} or less, or launch.device=cpu"
            )
