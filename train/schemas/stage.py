"""What the configs of all stages have. A stage's config only describes it: train.preflight reads what it names."""

from pathlib import Path
from typing import Annotated, ClassVar

from nexus_gen.artifacts.content import CONTENTS
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.keys import described, key
from train.schemas.common import RUNTIME, LaunchConfig, PathStr


@described
class StageConfig:
    """The whole resolved config of one stage. A run lives in runs_dir/name, a stage in its own directory there."""

    stage: str = key("Name of the stage")
    seed: int = key("Seed of everything that the stage draws at random")
    launch: Annotated[LaunchConfig, RUNTIME] = key("Where the processes of the stage run")
    resume: Annotated[bool, RUNTIME] = key(
        "Whether to continue what an earlier try of the stage left; false starts over"
    )
    name: Annotated[str, RUNTIME] = key("Name of the run, a directory inside runs_dir")
    runs_dir: PathStr = key("Directory of all runs")

    kind: ClassVar[str]  # the artifact that the stage makes
    # Version of what the stage computes. Raise a stage's own, by hand, when a change of the code makes other results of
    # the same config and inputs, and only then: everybody's artifacts of that stage are made again. It was not raised
    # when embedded colour profiles came to be applied, which changes nothing for pictures in sRGB.
    numerics: ClassVar[int] = 1
    trains: ClassVar[bool] = False  # has steps, checkpoints and metrics
    reuses_by_content: ClassVar[bool] = False  # looks up by content what earlier tries made, whatever their config

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name / self.stage

    @property
    def artifact_dir(self) -> Path:
        return self.run_dir / "artifact"

    def check(self) -> None:
        """Values that contradict each other; no files are read."""
        self.launch.check()
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be 0 or more")
        if not self.name:
            raise UserError("name is empty; a run is called something, as in name=mine")
        if "/" in self.name or self.name in (".", "..") or any(ord(character) < 32 for character in self.name):
            raise UserError(
                f"name is {self.name!r}; a run is one directory inside runs_dir: give a name without / and line breaks "
                "that is not . or .., and runs_dir=... for the place"
            )
        if not self.runs_dir:
            raise UserError("runs_dir is empty; give a directory, as in runs_dir=runs")

    @property
    def contents(self) -> Path:
        """The memory of what files hold, which all stages of a run share."""
        return Path(self.runs_dir) / self.name / CONTENTS
