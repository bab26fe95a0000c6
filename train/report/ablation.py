"""`nexus-gen ablate plot`: what the arms of an ablation logged, as one JSON file, a plot and a table.

nexus-gen ablate plot runs/ablations/reference      # from the arms' own records
nexus-gen ablate plot docs/ablations/*.json         # from results, without the arms

`nexus-gen ablate` (launch.ablate) trains the arms and calls this.
"""

import json
import sys
from itertools import cycle
from pathlib import Path
from typing import Any

from nexus_gen.artifacts.artifact import Manifest, write_text_atomic
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.numbers import not_finite
from train.report.command import stage_rows
from train.schemas.ablation import PLAN
from train.steps.metrics import read_metrics

Points = list[list[float]]  # [step, value] in order
MARKERS = "os^Dvp"  # of arms, for eyes to which some colours look alike
LOG_SCALE_FROM = 5.0  # largest over smallest value of a plot
PLANNED = {"ablation", "question", "metrics", "arms"}  # keys of a plan and of a result
FACTS = {"seconds", "steps", "final", "heldout"}  # of an arm under a seed, in a result


def collect(directory: Path) -> dict[str, Any]:
    """The result of an ablation: its plan with, for each arm and seed, what the arm's run recorded.

    seconds of all starts of all stages; steps of the last stage; per-step held-out metrics, those of earlier stages
    under `STAGE.name`; of every stage's artifact its fingerprint, its inputs' and the commit.
    """
    plan = read_planned(directory / PLAN)
    for arm in plan["arms"].values():
        arm["seeds"] = {seed: run_facts(directory / place, plan["stages"]) for seed, place in arm["seeds"].items()}
    return plan


def read_planned(path: Path) -> dict[str, Any]:
    """The JSON of a plan or a result; UserError when it is neither."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); `nexus-gen ablate` writes it again") from error
    if not isinstance(values, dict) or not values.keys() >= PLANNED:
        raise UserError(f"{path} lacks one of {', '.join(sorted(PLANNED))}; give a result of `nexus-gen ablate`")
    metrics, arms = values["metrics"], values["arms"]
    if not isinstance(metrics, dict) or not isinstance(arms, dict) or not arms:
        raise UserError(f"{path} has no arms to compare; give a result of `nexus-gen ablate`")
    for name, arm in arms.items():
        if not isinstance(arm, dict) or not isinstance(arm.get("seeds"), dict) or not arm["seeds"]:
            raise UserError(f"{path} says of no seed what arm {name} logged; give a result of `nexus-gen ablate`")
    return values


def read_result(path: Path) -> dict[str, Any]:
    """A result as `collect` returns it. Raises UserError as `read_planned` does."""
    result = read_planned(path)
    for name, arm in result["arms"].items():
        for seed, facts in arm["seeds"].items():
            if not isinstance(facts, dict) or not facts.keys() >= FACTS:
                raise UserError(f"{path} does not say what arm {name} logged under seed {seed}; plot its directory")
    for key, value in not_finite(result):
        raise UserError(f"{path}: {key} is {value}; it must be a finite number")
    return result


def run_facts(run: Path, stages: list[str]) -> dict[str, Any]:
    """Of one arm under one seed."""
    rows = {row.name: row for row in stage_rows(run)}
    curves: dict[str, Points] = {}
    for stage in stages:
        prefix = "" if stage == stages[-1] else f"{stage}."
        for line in read_metrics(run / stage):
            for name, value in line.items():
                if name.startswith("heldout/"):
                    curves.setdefault(prefix + name, []).append([line["step"], float(f"{value:.6g}")])
    manifests = {stage: Manifest.load(run / stage / "artifact") for stage in stages}
    return {
        "seconds": round(sum(rows[stage].seconds for stage in stages), 1),
        "steps": rows[stages[-1]].steps,
        "final": {name: points[-1][1] for name, points in curves.items()},
        "heldout": curves,
        "lineage": {
            stage: {"artifact": manifest.fingerprint, "inputs": manifest.inputs, "commit": manifest.code["commit"]}
            for stage, manifest in manifests.items()
        },
    }


def compared(result: dict[str, Any]) -> dict[str, str]:
    """The metrics of an ablation that every arm logged: held-out rows may be too few to hold some task."""
    seeds = [seed for arm in result["arms"].values() for seed in arm["seeds"].values()]
    metrics = {name: label for name, label in result["metrics"].items() if all(name in seed["final"] for seed in seeds)}
    if not metrics:
        raise UserError(
            f"no arm of {result['ablation']} logged {', '.join(result['metrics'])}; give heldout.num_samples above 0"
        )
    return metrics


def draw(result: dict[str, Any], path: Path) -> None:
    """One plot for each metric: held-out values over steps, a line for each arm, a band where it has several seeds."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    metrics = compared(result)
    size = (max(6.5, 3.8 * len(metrics)), 3.4)  # room for the question
    figure, row = pyplot.subplots(1, len(metrics), figsize=size, layout="constrained", squeeze=False)
    for axes, (metric, label) in zip(row[0], metrics.items(), strict=True):
        shown = []
        for marker, (name, arm) in zip(cycle(MARKERS), result["arms"].items(), strict=False):
            curves = [dict(map(tuple, seed["heldout"][metric])) for seed in arm["seeds"].values()]
            steps = sorted(set.intersection(*map(set, curves)))
            values = [[curve[step] for curve in curves] for step in steps]
            means = [sum(at_step) / len(at_step) for at_step in values]
            (line,) = axes.plot(steps, means, marker=marker, markersize=4, linewidth=1.5, label=name)
            if len(curves) > 1:
                band = list(map(min, values)), list(map(max, values))
                axes.fill_between(steps, *band, color=line.get_color(), alpha=0.2, linewidth=0)
            shown += means
        if shown and min(shown) > 0 and max(shown) > LOG_SCALE_FROM * min(shown):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.set_xlabel("optimizer step")
        axes.set_title(f"held-out {label}", fontsize=10)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
        axes.spines[["top", "right"]].set_visible(False)
    num_seeds = max(len(arm["seeds"]) for arm in result["arms"].values())
    row[0][0].legend(
        frameon=False,
        fontsize=9,
        title=f"mean, range of {num_seeds} seeds" if num_seeds > 1 else None,
        title_fontsize=8,
    )
    figure.suptitle(result["question"], fontsize=11)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def table(result: dict[str, Any]) -> str:
    """The arms' last held-out values, as `mean (smallest to largest)` over seeds; a table of Markdown."""
    metrics = compared(result)
    lines = [["arm", *metrics.values(), "steps", "seconds"]]
    for name, arm in result["arms"].items():
        seeds = list(arm["seeds"].values())
        cells = []
        for metric in metrics:
            values = [seed["final"][metric] for seed in seeds]
            spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
            cells.append(f"{sum(values) / len(values):.4g}{spread}")
        seconds = sum(seed["seconds"] for seed in seeds) / len(seeds)
        lines.append([name, *cells, str(seeds[0]["steps"]), f"{seconds:.0f}"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rows = ["| " + " | ".join(map(str.ljust, line, widths)) + " |" for line in lines]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])


def main(argv: list[str]) -> int:
    parser = Parser(prog="nexus-gen ablate plot", description="Draw ablations again, without training anything.")
    parser.add_argument("paths", nargs="+", type=Path, help="results (NAME.json), or directories of finished arms")
    for path in parser.parse_args(argv[1:]).paths:
        path = path.resolve()  # the name of `.` is needed
        if path.name == PLAN:
            path = path.parent
        if (path / PLAN).is_file():
            result = collect(path)
            path = path.with_name(f"{path.name}.json")
            write_text_atomic(path, json.dumps(result) + "\n")
        elif path.suffix == ".json" and path.is_file():
            result = read_result(path)
        else:
            raise UserError(f"{path} is neither a result of `nexus-gen ablate` nor a directory with {PLAN}")
        draw(result, path.with_suffix(".png"))
        for metric in result["metrics"].keys() - compared(result).keys():
            print(f"note: {metric} is left out: an arm did not log it", file=sys.stderr)
        print(f"\n{result['question']}\n\n{table(result)}\n\n{path}\n{path.with_suffix('.png')}", flush=True)
    return 0
