"""What an ablation is (configs/ablation/NAME.yaml), and the name of what `nexus-gen ablate` leaves beside its arms."""

from dataclasses import dataclass

PLAN = "ablation.json"  # the arms that are finished, for `nexus-gen ablate plot`


@dataclass
class Ablation:
    """stages: what each arm runs, in order. experiments: stage -> file of configs/experiment/. overrides: of all arms.

    arms: name -> the overrides in which it differs. metrics: what the last stage logs and the arms are compared by, or
    `STAGE.name` of an earlier one -> what that is. run: the directory of the run that overrides mean by ${run}.
    """

    question: str
    stages: list[str]
    experiments: dict[str, str]
    overrides: list[str]
    arms: dict[str, list[str]]
    metrics: dict[str, str]
    run: str
