"""What an ablation is (configs/ablation/NAME.yaml), and the name of what `nexus-gen ablate` leaves beside its arms."""

from nexus_gen.specs.keys import described, key

PLAN = "ablation.json"  # the arms that are finished, for `nexus-gen ablate plot`


@described
class Ablation:
    """One question, and the arms that answer it."""

    question: str = key("What the arms are compared for")
    stages: list[str] = key("Stages that each arm runs, in order")
    experiments: dict[str, str] = key("Stage -> its file of configs/experiment/")
    overrides: list[str] = key("Overrides of all arms")
    arms: dict[str, list[str]] = key("Arm -> the overrides in which it differs")
    metrics: dict[str, str] = key(
        "What the last stage logs and arms are compared by, or STAGE.name of an earlier one -> what that is"
    )
    run: str = key("Directory of the run that overrides mean by ${run}")
