"""One process of one stage: where it stands among the others, and how its artifact comes to be."""

import json
import logging
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
import torch.distributed

from nexus_gen.artifacts.artifact import Manifest, building, remember_sealed, seal
from nexus_gen.artifacts.content import Contents
from train.runs.directory import checkpoints_identity
from train.schemas.stage import StageConfig

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=StageConfig)
T = TypeVar("T")


class Stage(ABC, Generic[Config]):
    """Base of the stages: `run` reads typed artifacts and writes one."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.run_dir = config.run_dir
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device_type = device_type(config.launch.device)
        self.device = torch.device("cuda", 0) if self.device_type == "cuda" else torch.device("cpu")  # the only one

    @abstractmethod
    def run(self) -> bool:
        """Do the work; False when it was interrupted after a checkpoint and no artifact was written."""

    def start_process_group(self) -> None:
        """NCCL on GPUs, gloo on CPUs; for stages whose engine does not do it."""
        if not torch.distributed.is_initialized():
            if self.device_type == "cuda":
                torch.cuda.set_device(self.device)
            backend = "nccl" if self.device_type == "cuda" else "gloo"
            # Ranks wait for the slowest one, which may take hours; one that dies is seen by torchrun.
            torch.distributed.init_process_group(backend, timeout=timedelta(days=1))

    def from_rank_zero(self, make: Callable[[], T]) -> T:
        """What `make` returns on rank zero, on every rank; it runs nowhere else."""
        made = [make() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(made, device=self.device)
        return cast(T, made[0])

    def barrier(self) -> None:
        if torch.distributed.is_initialized():
            torch.distributed.barrier(device_ids=[self.device.index] if self.device_type == "cuda" else None)

    def write_artifact(
        self,
        fill: Callable[[Path], dict[str, Any]],
        keep_partial: bool = False,
        known: Mapping[str, str] | None = None,
    ) -> None:
        """Rank zero builds artifact/ with `fill` (directory -> details), seals and renames it; the others wait.

        known: see `seal`.
        """
        if self.rank == 0:
            with building(self.config.artifact_dir, keep_partial) as directory:
                details = fill(directory)
                manifest = Manifest(
                    kind=self.config.kind,
                    stage=self.config.stage,
                    **checkpoints_identity(self.config),
                    code=json.loads((self.run_dir / "environment.json").read_text(encoding="utf-8")),
                    details=details,
                )
                seal(directory, manifest, known)
            remember_sealed(self.config.artifact_dir, Contents.at(self.config.contents))
        self.barrier()


def device_type(wanted: str) -> str:
    """cuda or cpu; `auto` takes CUDA where there is one."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch alike on every rank; what must differ per sample derives from the sample's index."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
