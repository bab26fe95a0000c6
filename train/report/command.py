"""`nexus-gen report RUN`: one self-contained HTML page of a run.

Stages with durations and throughput, loss curves, held-out prompts painted before and after training, edits, answers.
"""

import dataclasses
import io
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.mixture.order import read_dataset
from nexus_gen.artifacts.artifact import MANIFEST, Manifest, write_text_atomic
from nexus_gen.artifacts.content import Contents
from nexus_gen.artifacts.results import check_result
from nexus_gen.parts.lineage import Evaluation, evaluations_of, flux_of_all, parts_of
from nexus_gen.parts.models import DECODER_KINDS, ModelPaths, default_run, memory_of, results_of
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError
from nexus_gen.tensors.weight_files import FLUX_WEIGHTS, flux_places
from train.evaluate.score_lines import tables_of
from train.pages.pages import template
from train.preflight.inputs import inputs_of
from train.preflight.rows import left_out_of
from train.runs.directory import load_config, timing_of
from train.schemas.decoders import DecoderConfig
from train.schemas.pretrain import PretrainConfig
from train.schemas.stage import StageConfig
from train.schemas.table import SCHEMAS
from train.scores.gain import Gain, gains_of, summary
from train.scores.limits import limits
from train.steps.convergence import findings
from train.steps.metrics import read_metrics

log = logging.getLogger(__name__)

LOSSES = {
    "pretrain": {"train/text_loss": "text loss", "train/image_loss": "image loss"},
    "generation_decoder": {"train/loss": "flow-matching loss"},
    "editing_decoder": {"train/loss": "flow-matching loss"},
}
SMOOTHING = 0.8  # weight of the past in the bold curve


@dataclasses.dataclass
class StageRow:
    """One line of the table of stages; seconds add up over interruptions."""

    name: str
    made: str
    seconds: float
    processes: int
    steps: int
    samples_per_s: float
    commit: str
    config: str


def stage_rows(run: Path) -> list[StageRow]:
    """The stages of a run that finished, in order."""
    rows = []
    for name in SCHEMAS:
        directory = run / name
        if not (directory / "artifact" / MANIFEST).is_file():
            continue
        manifest = Manifest.load(directory / "artifact")
        seconds, processes = timing_of(directory)
        metrics = read_metrics(directory)
        rows.append(
            StageRow(
                name=name,
                made=manifest.kind,
                seconds=seconds,
                processes=processes,
                steps=int(metrics[-1]["step"]) if metrics else 0,
                samples_per_s=mean_rate(metrics),
                commit=manifest.code["commit"],
                config=(directory / "config.yaml").read_text(encoding="utf-8"),
            )
        )
    return rows


def mean_rate(metrics: Sequence[dict[str, float]]) -> float:
    """Samples per second of training as a whole: all samples over all seconds. 0 where no rate was logged.

    Every step has as many samples, so that of a rate r over n steps the seconds are proportional to n / r.
    """
    steps = seconds = 0.0
    before = 0.0
    for row in metrics:
        if rate := row.get("perf/samples_per_s"):
            interval = row["step"] - before or 1  # an embedding stage logs one rate, at step 0
            steps, seconds, before = steps + interval, seconds + interval / rate, row["step"]
    return steps / seconds if seconds else 0.0


def smoothed(values: Sequence[float]) -> list[float]:
    """Their exponential moving average, unbiased: the first values weigh no more than others."""
    averages, past = [], 0.0
    for number, value in enumerate(values, start=1):
        past = SMOOTHING * past + (1 - SMOOTHING) * value
        averages.append(past / (1 - SMOOTHING**number))
    return averages


def loss_curves(run: Path) -> list[dict[str, Any]]:
    """One SVG per loss, with the first and the last value that was logged: the smoothed curve lags behind them."""
    curves = []
    for stage, losses in LOSSES.items():
        metrics = read_metrics(run / stage)
        for metric, label in losses.items():
            points = [(row["step"], row[metric]) for row in metrics if metric in row]
            if points:
                steps, values = zip(*points, strict=True)
                svg = draw_curve(steps, values, f"{stage}: {label}")
                curves.append({"svg": svg, "first": values[0], "last": values[-1]})
    return curves


def draw_curve(steps: Sequence[float], values: Sequence[float], title: str) -> str:
    """An SVG element: the values, and their smoothed curve in bold."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(4.2, 2.6), layout="constrained")
    axes.plot(steps, values, color="#9db7d5", linewidth=0.8)
    axes.plot(steps, smoothed(values), color="#1f5a99", linewidth=1.8)
    axes.set(title=title, xlabel="optimizer step", ylim=(0, 1.05 * max(values)))
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    pyplot.close(figure)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def missing_start(configs: Sequence[StageConfig]) -> list[Path]:
    """What training began with and is not there any more, as in a run that ships: nothing shows what was before."""
    starts = []
    for config in configs:
        inputs = inputs_of(config)
        init = [where for role, where in inputs.items() if role in ("model.qwen", "init.decoder", "init.transformer")]
        if isinstance(config, DecoderConfig) and not (config.init.decoder or config.init.transformer):
            flux = inputs["model.flux"]
            init.append(next(iter(flux_places(flux, "transformer")), flux / FLUX_WEIGHTS["transformer"][0]))
        starts += init
    return [where for where in starts if not where.exists()]


def evaluations(run: Path) -> tuple[list[Evaluation], list[Path]]:
    """The evaluations of a run's own weights, and the directories of those that are of other weights by now."""
    paths: dict[str | None, ModelPaths] = {kind: ModelPaths.find(run, decoder=kind) for kind in DECODER_KINDS}
    contents = Contents.at(memory_of(run))
    found = evaluations_of(run, parts_of(paths), flux_of_all(paths), contents)
    contents.save()
    return found


def render(
    run: Path, samples: Any, with_start: bool, evaluated: list[Evaluation], gains: list[Gain], output: Path
) -> None:
    """Fill the template and write the page in one piece. evaluated: whose scores it shows."""
    stages = stage_rows(run)
    page = template("report.html.j2").render(
        run=run.name,
        stages=stages,
        total=sum(stage.seconds for stage in stages),
        curves=loss_curves(run),
        lengths={stage: found for stage in LOSSES if (found := findings(run / stage))},
        samples=samples,
        with_start=with_start,
        scored=[
            (one.split, tables_of(one.scores), [limit.sentence for limit in limits(one.scores)]) for one in evaluated
        ],
        gains=gains,
    )
    write_text_atomic(output, page)


def main(argv: list[str]) -> int:
    parser = Parser(prog="nexus-gen report", description="Write one HTML page about a run.")
    parser.add_argument("run", type=Path, nargs="?", default=default_run(), help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="the page (default: RUN/report.html; of what ships, under runs/)")
    parser.add_argument(
        "--against", type=Path, metavar="EVALUATION", help="of other models on the same rows, to show what was gained"
    )
    parser.add_argument("--num-samples", type=int, default=8, help="held-out rows per task (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args(argv[1:])
    run = arguments.run
    if arguments.num_samples < 0:
        raise UserError(f"--num-samples is {arguments.num_samples}; it must be 0 or more")
    output = arguments.output or results_of(run) / "report.html"
    check_result(output, "--output")
    if not run.is_dir():
        raise UserError(f"{run} is not a run directory; finished runs are under runs/")
    missing = [name for name in LOSSES if not (run / name / "artifact" / MANIFEST).is_file()]
    if missing:
        raise UserError(f"{run} has not finished {', '.join(missing)}; nexus-gen run pipeline=... goes on from there")
    configs = [load_config(run / stage) for stage in LOSSES]
    for config in configs:
        for role, where in inputs_of(config).items():
            if role in ("data.heldout", "model.flux") and not where.exists():
                raise UserError(f"{role} of {run / config.stage}, {where}, does not exist any more; put it back there")
    pretrain = configs[0]
    assert isinstance(pretrain, PretrainConfig)
    data = pretrain.data
    rows = list(read_dataset(data.heldout, left_out_of(data, "heldout"), data.picture_root))
    evaluated, stale = evaluations(run)
    for directory in stale:
        log.warning("%s is of other weights than %s holds now; its scores are left out", directory, run)
    gains = gains_of(run, arguments.against, stale) if arguments.against else []
    from train.report.samples import draw_samples  # loads torch: only once the arguments hold
    from train.report.try_next import commands_to_try

    with_start = not missing_start(configs)
    samples = draw_samples(run, rows, arguments.num_samples, arguments.device, with_start)
    render(run, samples, with_start, evaluated, gains, output)
    if gains:
        print(summary(gains))
    print(f"report: {output.absolute()}")
    print("try next:")
    # As it can be typed here: `make demo` runs it from a virtual environment that is not activated.
    command = "nexus-gen" if shutil.which("nexus-gen") else os.path.relpath(Path(sys.executable).parent / "nexus-gen")
    flag = [] if run == default_run() else ["--run", str(run)]
    for arguments_to_try in commands_to_try(rows, output):
        print(f"  {shlex.join([command, *arguments_to_try, *flag])}")
    return 0
