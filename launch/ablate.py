"""`nexus-gen ablate`: stages of a run trained anew in arms that differ in one thing, and compared.

nexus-gen ablate reference --run runs/shapes
nexus-gen ablate all --run runs/shapes --jobs 4 --seeds 42,43 trainer.max_steps=300

An arm is an ordinary run; `nexus-gen ablate plot` (train.report.ablation) makes table and plot of what the arms logged.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launch import cli
from launch.gpus import require_gpus
from launch.overrides import CONFIGS, Override
from launch.run import compose_plan, describe, run_stages
from nexus_gen.artifacts.artifact import write_text_atomic
from nexus_gen.artifacts.results import check_result
from nexus_gen.parts.models import SHIPPED_RUN, runs_dir
from nexus_gen.specs.arguments import Parser, reader
from nexus_gen.specs.errors import UserError, nearest
from nexus_gen.specs.numbers import read_whole
from train.preflight.inputs import inputs_of
from train.preflight.stage import preflight
from train.runs.parents import end_with_parent
from train.schemas.ablation import PLAN, Ablation
from train.schemas.fields import escaped, fingerprint_values
from train.schemas.stage import StageConfig

FILES = {path.stem: path for path in sorted((CONFIGS / "ablation").glob("*.yaml"))}
OPTION_OF = {"name": "--output", "runs_dir": "--output", "seed": "--seeds"}  # keys that arms have from options
INTERRUPTED = 3  # as of `nexus-gen run`


@dataclass(frozen=True)
class Arm:
    """One arm of one ablation under one seed, in `directory`: a run of its own."""

    ablation: str
    name: str
    seed: int
    directory: Path
    configs: list[StageConfig]

    def __str__(self) -> str:
        return f"{self.ablation}/{self.name}/seed{self.seed}"


def parser() -> Parser:
    questions = (f"  {name:<15}{OmegaConf.load(path).question}" for name, path in FILES.items())
    result = Parser(
        prog="nexus-gen ablate",
        description="Train stages of a run anew in arms that differ in one thing, and compare them.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="ablations (configs/ablation/):\n" + "\n".join(questions) + "\n\n"
        "Arms are runs OUTPUT/NAME/ARM/seedN. Finished ones are skipped and interrupted ones go on, as stages do.\n"
        "What they logged is summed up in OUTPUT/NAME.json and drawn in OUTPUT/NAME.png.",
    )
    result.add_argument(
        "words", nargs="+", metavar="NAME | key=value", help="ablations, or `all`; overrides of all arms"
    )
    result.add_argument("--run", type=Path, default=runs_dir() / "shapes", help="what arms start from (%(default)s)")
    result.add_argument("--output", type=Path, help="directory to write (default: ablations, beside the run)")
    result.add_argument(
        "--seeds", type=seeds, default=[42], metavar="N,N", help="train and compare each arm with each (42)"
    )
    result.add_argument("--jobs", type=int, default=1, help="arms at a time, on the same device (%(default)s)")
    result.add_argument("--dry-run", action="store_true", help="print what would start and stop")
    return result


def seeds(text: str) -> list[int]:
    return list(dict.fromkeys(reader(read_whole)(number) for number in text.split(",")))


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv[1:])
    names = [word for word in arguments.words if "=" not in word]
    given = [Override.parse(word) for word in arguments.words if "=" in word]
    for name in names:
        if name not in FILES and name != "all":
            raise UserError(f"there is no ablation '{name}'{nearest(name, [*FILES, 'all'])}")
    if not names:
        raise UserError(f"name an ablation: {', '.join(FILES)}, or all")
    for override in given:
        if override.key in OPTION_OF:
            raise UserError(f"arms have {override.key} from {OPTION_OF[override.key]}; give that")
    if arguments.jobs < 1:
        raise UserError(f"--jobs is {arguments.jobs}; it must be 1 or more")
    if not arguments.run.is_dir():
        raise UserError(
            f"{arguments.run} is not a run directory; `nexus-gen run pipeline=shapes name=shapes` makes one"
        )
    run = arguments.run.absolute()
    output = (arguments.output or run.parent / "ablations").absolute()
    check_result(output, "--output", directory=True)
    ablations = list(FILES) if "all" in names else list(dict.fromkeys(names))
    arms = [arm for name in ablations for arm in compose_arms(name, run, output, arguments.seeds, given)]
    share_cores(arms, arguments.jobs)
    if arguments.dry_run:
        for arm in arms:
            print("\n".join([f"{arm}:", *map(describe, arm.configs)]))
        return 0
    require_gpus([config.launch for arm in arms for config in arm.configs])
    for arm in arms:
        if arm.seed == arguments.seeds[0]:  # before any arm starts
            require_stages(arm.configs[0], run)
            preflight(arm.configs[0])
    statuses = run_arms(arms, arguments.jobs)
    status = 0
    for name in ablations:
        finished = [arm for arm in arms if arm.ablation == name and statuses.get(arm.directory) == 0]
        if finished:
            write_plan(name, run, output / name, finished, given)
            status = cli.main(["ablate", "plot", str(output / name)]) or status
    failed = [arm for arm in arms if statuses.get(arm.directory) != 0]
    if failed:
        print(f"not finished: {', '.join(map(str, failed))}; the same command goes on from there", file=sys.stderr)
    return max((statuses.get(arm.directory, INTERRUPTED) for arm in failed), default=status)


def load(name: str, run: Path) -> Ablation:
    """A file of configs/ablation/ with ${run} resolved: its overrides are then as people would type them."""
    values = OmegaConf.merge(OmegaConf.structured(Ablation), OmegaConf.load(FILES[name]), escaped({"run": str(run)}))
    ablation: Any = OmegaConf.to_object(values)
    return ablation


def compose_arms(name: str, run: Path, output: Path, seeds: list[int], given: list[Override]) -> list[Arm]:
    """Every arm under every seed, seed by seed; UserError where overrides are wrong or leave two arms alike."""
    ablation = load(name, run)
    arms = []
    for seed in seeds:
        for arm, own in ablation.arms.items():
            directory = output / name / arm / f"seed{seed}"
            place = [f"runs_dir={directory.parent}", f"name={directory.name}", f"seed={seed}"]
            overrides = [*map(Override.parse, [*ablation.overrides, *own, *place]), *given]
            plan = {"stages": ablation.stages, "experiments": ablation.experiments}
            arms.append(Arm(name, arm, seed, directory, compose_plan(plan, overrides, f"ablation {name}")))
    for override in given:
        for one in (Override.parse(text) for texts in ablation.arms.values() for text in texts):
            if one.key == override.key and (one.stage == override.stage or not (one.stage and override.stage)):
                raise UserError(f"the arms of ablation {name} differ in {override.key}; leave it out")
    return arms


def require_stages(config: StageConfig, run: Path) -> None:
    """UserError naming the first stage of `run` that an arm needs and the run has not finished."""
    for role, where in inputs_of(config).items():
        if run in where.parents and not where.exists():
            remedy = f"finish stage={where.relative_to(run).parts[0]} of {run}"
            if run.resolve() == SHIPPED_RUN.resolve():
                remedy = "what ships lacks what training reads: give --run with a run of pipeline=shapes"
            raise UserError(f"{role}: {where} does not exist; {remedy}")


def share_cores(arms: list[Arm], jobs: int) -> None:
    """Threads of a process when `jobs` arms run side by side; one arm alone gets all cores."""
    for arm in arms:
        for config in arm.configs:
            launch = config.launch
            processes = launch.processes_per_node * min(jobs, len(arms))
            launch.threads_per_process = launch.threads_per_process or max(1, (os.cpu_count() or 1) // processes)


def run_arms(arms: list[Arm], jobs: int) -> dict[Path, int]:
    """Run arms, `jobs` at a time; directory -> exit status, as of `nexus-gen run`.

    A signal ends those under way as it ends `nexus-gen run`, and the others are not started.
    """
    context = multiprocessing.get_context("spawn")  # each handles signals of its own, so no threads
    waiting = list(arms)
    running: dict[Any, tuple[Any, Arm, float]] = {}  # by what becomes ready when the process ends
    statuses: dict[Path, int] = {}
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def stop(number: int, frame: object) -> None:
        waiting.clear()
        for process, _, _ in running.values():
            process.terminate()

    for number in before:
        signal.signal(number, stop)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                arm = waiting.pop(0)
                log = arm.directory.with_suffix(".log") if jobs > 1 else None
                process: Any = context.Process(target=run_arm, args=(arm.configs, log))
                process.start()
                running[process.sentinel] = process, arm, time.monotonic()
                print(f"{arm}: started" + (f", {log}" if log else ""), flush=True)
            for sentinel in wait(list(running)):
                process, arm, began = running.pop(sentinel)
                process.join()
                status = process.exitcode if process.exitcode >= 0 else INTERRUPTED
                statuses[arm.directory] = status
                print(f"{arm}: {'done' if status == 0 else 'ended'} after {time.monotonic() - began:.0f} s", flush=True)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return statuses


def run_arm(configs: list[StageConfig], log: Path | None) -> None:
    """The stages of one arm, in a process of its own; what they print goes into `log`, if any.

    It ends, as `nexus-gen run` does, when the command is killed that started it.
    """
    end_with_parent(signal.SIGTERM)
    command = multiprocessing.parent_process()
    if command is not None and not command.is_alive():  # killed before the kernel was asked to tell
        sys.exit(INTERRUPTED)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, sys.stdout.fileno())
        os.dup2(file, sys.stderr.fileno())
    try:
        if status := run_stages(configs):
            sys.exit(status)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def write_plan(name: str, run: Path, directory: Path, arms: list[Arm], given: list[Override]) -> None:
    """What `nexus-gen ablate plot` needs to know of the finished arms."""
    ablation: Any = OmegaConf.to_container(OmegaConf.load(FILES[name]))  # ${run} as it stands: no place of this machine
    values = {arm.directory: flat({config.stage: fingerprint_values(config) for config in arm.configs}) for arm in arms}
    of_first_seed = [values[arm.directory] for arm in arms if arm.seed == arms[0].seed]
    differ = sorted(key for key in of_first_seed[0] if len({json.dumps(one.get(key)) for one in of_first_seed}) > 1)
    plan: dict[str, Any] = {
        "ablation": name,
        "question": ablation["question"],
        "run": run.name,
        "stages": ablation["stages"],
        "given": [override.text for override in given],
        "metrics": ablation["metrics"],
        "arms": {},
    }
    for arm in arms:
        facts = plan["arms"].setdefault(
            arm.name,
            {
                "overrides": ablation["arms"][arm.name],
                "differs": {key: values[arm.directory].get(key) for key in differ},
                "seeds": {},
            },
        )
        facts["seeds"][str(arm.seed)] = arm.directory.relative_to(directory).as_posix()
    write_text_atomic(directory / PLAN, json.dumps(plan, indent=1) + "\n")


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under dotted names."""
    return {
        name: leaf
        for key, value in values.items()
        for name, leaf in (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        ).items()
    }
