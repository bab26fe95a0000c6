"""What a training stage records: metrics.jsonl always, TensorBoard and wandb when configured.

Names: `train/loss`, `heldout/loss`, `perf/samples_per_s`; steps are optimizer steps. A resumed stage first drops the
lines past its checkpoint, so the file reads as if nothing had been interrupted. In wandb it goes on in the same run.
"""

import json
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import yaml
from PIL import Image

from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.specs.errors import UserError
from train.schemas.common import LoggerConfig

METRICS = "metrics.jsonl"


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl; a line cut short by a crash ends the list."""
    rows = []
    path = run_dir / METRICS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def latest(run_dir: Path, prefix: str) -> dict[str, float]:
    """The last value of each name that begins with `prefix`."""
    return {name: value for row in read_metrics(run_dir) for name, value in row.items() if name.startswith(prefix)}


class MetricsLogger:
    """Writes on rank zero; on other ranks every call does nothing.

    Raises UserError when wandb does not start: no account, no connection.
    """

    def __init__(self, run_dir: Path, config: LoggerConfig, rank: int, start_step: int = 0) -> None:
        self._file: Any = None
        self._tensorboard: Any = None
        self._wandb: Any = None
        if rank != 0:
            return
        kept = [row for row in read_metrics(run_dir) if row["step"] <= start_step]
        write_text_atomic(run_dir / METRICS, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = open(run_dir / METRICS, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(run_dir / "log" / "tensorboard"), purge_step=start_step + 1)
        if config.wandb_mode != "disabled":
            self._wandb = start_wandb(run_dir, config, resumed=start_step > 0)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record values at an optimizer step, with the wall-clock time."""
        if self._file is None:
            return
        self._file.write(json.dumps({"step": step, "time": time.time(), **metrics}) + "\n")
        self._file.flush()
        if self._tensorboard is not None:
            for name, value in metrics.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})

    def log_picture(self, step: int, name: str, picture: Image.Image) -> None:
        """Show a picture in TensorBoard and wandb; the caller keeps the file."""
        if self._tensorboard is not None:
            self._tensorboard.add_image(name, np.asarray(picture), step, dataformats="HWC")
        if self._wandb is not None:
            import wandb

            self._wandb.log({"step": step, name: wandb.Image(picture)})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def start_wandb(run_dir: Path, config: LoggerConfig, resumed: bool) -> Any:
    """A run in wandb with the stage's config; a resumed stage goes on with the one that log/wandb_id names."""
    import wandb

    id_file = run_dir / "log" / "wandb_id"
    try:
        run = wandb.init(
            project=config.wandb_project,
            mode=cast(Any, config.wandb_mode),
            dir=str(run_dir / "log"),
            id=id_file.read_text(encoding="utf-8") if resumed and id_file.is_file() else None,
            resume="allow" if config.wandb_mode == "online" else None,  # offline, `wandb sync` joins what has one id
            name=f"{run_dir.parent.name}-{run_dir.name}",
            group=run_dir.parent.name,
            job_type=run_dir.name,
            config=yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8")),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb does not start ({error}); log in with `wandb login`, or give logger.wandb_mode=offline"
        ) from error
    write_text_atomic(id_file, run.id)
    # wandb's own step only grows: steps that are trained again after an interruption would be dropped.
    run.define_metric("*", step_metric="step")
    return run
