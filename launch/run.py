"""`nexus-gen run`: one stage, or a pipeline of stages in order.

nexus-gen run stage=pretrain trainer.max_steps=100
nexus-gen run pipeline=tiny from=embed_generation
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from launch.compose import compose_stage, refuse_misspelt_stage
from launch.gpus import require_gpus
from launch.lock import locked
from launch.longer import directory_of, forget_fulfilled, is_more, read_more, record_request, recorded_stage
from launch.overrides import CONFIGS, Override, choice, choices, unquoted
from launch.processes import Crew, slurm_script, worker_command, worker_environment
from launch.python_path import python_variables
from launch.scheduled import idle_stages, recorded_schedule, schedule_of, with_schedule
from nexus_gen.specs.arguments import Parser
from nexus_gen.specs.errors import UserError, nearest
from train.preflight.inputs import inputs_of
from train.preflight.stage import preflight, preflight_pipeline
from train.runs.directory import (
    TIMING,
    beginning,
    created_at,
    forget_request,
    identity,
    made_by,
    prepare,
    read_request,
    request_another,
    require_artifact,
    steps_done,
)
from train.runs.failures import STOPPED
from train.schemas.common import LaunchConfig
from train.schemas.fields import as_yaml, keys
from train.schemas.listing import listing
from train.schemas.schedule import ScheduleStageConfig
from train.schemas.stage import StageConfig
from train.schemas.table import SCHEMAS

GROUPS_OF_ALL = ("model", "data", "launch", "logger", "experiment")


def parser() -> Parser:
    stages, pipelines = ", ".join(SCHEMAS), ", ".join(choices("pipeline"))
    result = Parser(
        prog="nexus-gen run",
        description="Run one stage or a pipeline of stages.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"stages: {stages}\npipelines: {pipelines}\n\n"
        "Overrides are key=value (trainer.max_steps=100) or group=file (launch=slurm). In a pipeline a key goes to\n"
        "every stage that reads it; STAGE.key=value (pretrain.trainer.max_steps=100) goes to one. Results are in\n"
        "runs_dir/name/STAGE, by default runs/tiny/STAGE: a log, checkpoints and, once it is whole, an artifact.\n\n"
        "Names and paths are taken as they are typed (name=1.50, data.train=a=b,c.jsonl), ${...} in them too, and\n"
        "quotes are for the shell ('name=my run'). A list is [A,B]: 'data.quarantine=[a.jsonl,b.jsonl]', with\n"
        "quotes around a path that has a comma. Relative paths begin where the command is started.\n\n"
        "A stage whose config and inputs are those of its artifact is skipped. from=STAGE makes that stage's artifact\n"
        "again and goes on with the stages behind it. After an interruption the same command goes on where it was,\n"
        "with from=... and without it; resume=false starts over.\n\n"
        "more=2x trains a run's stages twice as long as it has recorded, on from where they are and with the configs\n"
        "that it has recorded: nexus-gen run pipeline=finetune name=mine more=2x. STAGE.more=2x is for one of them.\n"
        "A larger trainer.max_steps, data.num_epochs or data.token_budget trains on, too. The learning rate\n"
        "then follows the longer schedule.\n\n"
        "pipeline=finetune and pipeline=tiny_messages set steps and learning rates by your rows and pictures, within\n"
        "budget_minutes=11 on this machine; keys that you give stay as you give them.\n\n"
        "--keys says what each key means, with its type, value and unit: nexus-gen run stage=pretrain --keys optim.\n\n"
        "Exit status: 0 done, 1 failed, 2 a mistake told in one sentence, 3 stopped by a signal after saving.",
    )
    result.add_argument("overrides", nargs="*", metavar="key=value", help="stage=..., pipeline=..., and values")
    result.add_argument("--cfg", action="store_true", help="print the resolved config and stop")
    result.add_argument("--dry-run", action="store_true", help="print what would start and stop")
    result.add_argument(
        "--keys",
        nargs="?",
        const="",
        metavar="PATTERN",
        help="explain the keys of the resolved config, or those that match (optim, 'trainer.*_steps'), and stop",
    )
    return result


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv[1:])
    if arguments.keys is not None and (arguments.cfg or arguments.dry_run):
        raise UserError("--keys explains the config that --cfg and --dry-run print; give one of them")
    if "=" in (arguments.keys or ""):  # the next override, which argparse takes for the pattern
        arguments.overrides.append(arguments.keys)
        arguments.keys = ""
    chosen: dict[str, str] = {}
    rest, more = [], []
    for text in arguments.overrides:
        key, equals, value = text.partition("=")
        if equals and key in ("stage", "pipeline", "from"):
            chosen[key] = unquoted(value)
        elif is_more(text):
            more.append(text)
        else:
            rest.append(Override.parse(text))
    if ("stage" in chosen) == ("pipeline" in chosen):
        raise UserError(f"give one of stage=... and pipeline=...; stages: {', '.join(SCHEMAS)}")
    stages = [choice("stage", chosen["stage"])] if "stage" in chosen else read_plan(chosen["pipeline"])["stages"]
    if "from" in chosen and "stage" in chosen:
        raise UserError("from=... goes with pipeline=...; stage=... runs one stage")
    if "from" in chosen and more:
        raise UserError("from=... makes an artifact again, and more=... trains on from it; give one of them")
    factors = read_more(more, stages)
    compose = partial(recorded_stage, given=rest, factors=factors) if more else compose_stage
    if "stage" in chosen:
        configs = [compose([Override.parse(f"stage={stages[0]}"), *rest])]
    else:
        idle, absence = idle_stages(stages, recorded_schedule(directory_of(rest)) if more else None)
        configs = compose_pipeline(chosen["pipeline"], rest, compose, idle)
        if not more:
            idle, absence = idle_stages(stages, schedule_of(configs))
        configs = [config for config in configs if config.stage not in idle]
        if absence:
            print(absence, flush=True)
    replan = partial(with_schedule, given=rest) if not more else list
    configs = replan(configs)
    if arguments.cfg:
        print("---\n".join(as_yaml(config) for config in configs), end="")
        return 0
    if arguments.keys is not None:
        print(listing(configs, arguments.keys, shutil.get_terminal_size().columns))
        return 0
    if arguments.dry_run:
        for config in configs:
            print(describe(config))
        return 0
    wanted = chosen.get("from")
    names = [config.stage for config in configs]
    if wanted is not None and wanted not in names:
        raise UserError(f"from={wanted} is not a stage of pipeline={chosen['pipeline']}{nearest(wanted, names)}")
    run = configs[0].run_dir.parent
    goes_on = wanted is not None and read_request(run).get("stage") == wanted and configs[0].resume
    if goes_on:
        print(f"from={wanted} was interrupted before: it goes on; resume=false starts it over", flush=True)
    record_request(configs, factors)
    begun = configs[names.index(wanted) if wanted else 0 :]
    status = run_stages(begun, None if goes_on else wanted, factors, replan)
    if status:
        return status
    forget_fulfilled(run)
    if "pipeline" in chosen:
        forget_request(run)
        return evaluate(run, read_plan(chosen["pipeline"]).get("evaluate", []), configs[0].launch)
    return 0


def evaluate(run: Path, options: list[str], launch: LaunchConfig) -> int:
    """Score a run that is trained, as a pipeline's file asks; nothing where it does not, or other machines trained."""
    if not options or launch.kind != "local":
        return 0
    device = [] if launch.device == "auto" else ["--device", launch.device]
    command = [sys.executable, "-m", "launch.cli", "evaluate", str(run), *options, *device]
    return subprocess.run(command, env={**os.environ, **python_variables()}, check=False).returncode


def read_plan(pipeline: str) -> dict[str, Any]:
    """The file of a pipeline: stages, experiments, overrides."""
    plan: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / "pipeline" / f"{choice('pipeline', pipeline)}.yaml"))
    return plan


def compose_pipeline(
    pipeline: str,
    given: list[Override],
    compose: Callable[[list[Override]], StageConfig] = compose_stage,
    left_out: Collection[str] = (),
) -> list[StageConfig]:
    """One config per stage: each override goes to the stages that read it, and must reach at least one.

    left_out: stages of the pipeline that are not run.
    """
    plan = read_plan(pipeline)
    plan["stages"] = [stage for stage in plan["stages"] if stage not in left_out]
    own = [Override.of_config(text) for text in plan["overrides"]]
    return compose_plan(plan, [*own, *given], f"pipeline={unquoted(pipeline)}", compose, own if left_out else ())


def compose_plan(
    plan: dict[str, Any],
    overrides: list[Override],
    what: str,
    compose: Callable[[list[Override]], StageConfig] = compose_stage,
    may_miss: Collection[Override] = (),
) -> list[StageConfig]:
    """One config for each of plan["stages"], by its file of plan["experiments"]; `what` names the plan in errors.

    may_miss: overrides that need no stage to read them.
    """
    stages: list[str] = plan["stages"]
    reached = {override: False for override in overrides}
    configs = []
    for stage in stages:
        own = [Override.parse(f"stage={stage}")]
        if stage in plan.get("experiments", {}):
            own.append(Override.parse(f"experiment={plan['experiments'][stage]}"))
        for override in overrides:
            is_read = override.key in keys(stage) or (override.is_group and override.key in GROUPS_OF_ALL)
            if override.stage == stage or (not override.stage and is_read):
                own.append(override)
                reached[override] = True
        configs.append(compose(own))
    for override, has_effect in reached.items():
        if not has_effect and override not in may_miss:
            refuse_misspelt_stage(override, stages)
            valid = {key for stage in stages for key in keys(stage)} | set(GROUPS_OF_ALL)
            raise UserError(f"no stage of {what} has the key '{override.key}'{nearest(override.key, valid)}")
    return configs


def describe(config: StageConfig) -> str:
    """What would start: processes, batch, command."""
    launch = config.launch
    lines = [
        f"stage {config.stage} -> {config.run_dir}",
        f"  processes: {launch.num_nodes} x {launch.processes_per_node} = {launch.world_size}",
    ]
    if isinstance(config, ScheduleStageConfig):
        budget = f"{config.budget_minutes:g} minutes in all"
        lines.append(f"  sets steps and learning rates of the stages behind it: {budget}")
    if config.trains:
        trainer: Any = getattr(config, "trainer", None)
        accumulation = trainer.accumulation(launch.world_size)
        data: Any = getattr(config, "data", None)
        length = f"{trainer.max_steps} steps"
        if not trainer.max_steps:
            length = f"{data.token_budget} tokens" if data.token_budget else f"{data.num_epochs:g} epochs"
        if done := steps_done(config):
            length += f", of which the first {done} steps are done"
        lines += [
            f"  batch: {trainer.global_batch_size} = {trainer.micro_batch_size} per process"
            f" x {launch.world_size} processes x {accumulation} accumulated",
            f"  training: {length}, ZeRO-{trainer.zero_stage}, {trainer.precision}",
        ]
    lines += [f"  reads {role}: {where}" for role, where in inputs_of(config).items()]
    config_path = config.run_dir / "config.yaml"
    if launch.kind == "slurm":
        lines += ["  sbatch script:", *(f"    {line}" for line in slurm_script(launch, config_path).splitlines())]
    else:
        variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in worker_environment(launch).items())
        each = " (on every machine)" if launch.num_nodes > 1 else ""
        lines.append(f"  command{each}: {variables} {shlex.join(worker_command(launch, config_path))}")
    return "\n".join(lines)


def run_stages(
    configs: Sequence[StageConfig],
    again: str | None = None,
    more: Collection[str] = (),
    replan: Callable[[Sequence[StageConfig]], Sequence[StageConfig]] = list,
) -> int:
    """Run stages in order until one does not end well; its exit status.

    again: a stage to run where nothing changed. more: stages that are asked to train on. replan: the same configs with
    what stage=schedule has decided, once it has.
    """
    require_gpus([config.launch for config in configs])
    preflight_pipeline(configs)
    with Crew(configs) as crew:
        for number in range(len(configs)):
            config = configs[number]
            if status := run_stage(config, crew, config.stage == again, config.stage in more):
                return status
            if isinstance(config, ScheduleStageConfig):
                configs = replan(configs)
    return 0


def run_stage(config: StageConfig, crew: Crew, again: bool, more: bool = False) -> int:
    """Preflight, record the config, have the crew run it. again: also where nothing changed. more: see `beginning`."""
    preflight(config)
    wanted = identity(config)
    if not again and made_by(config, wanted):
        require_artifact(config)
        print(f"{config.stage}: unchanged, skipped ({config.artifact_dir})", flush=True)
        return 0
    with locked(config.run_dir, among_others=config.launch.kind == "torchrun") as lock:
        if again:
            request_another(config)
        if said := beginning(config, wanted, more).said:
            print(said, flush=True)
        config_path = prepare(config, wanted, more)
        print(f"{config.stage}: {config.launch.world_size} process(es), config {config_path}", flush=True)
        before = created_at(config)
        began = time.monotonic()
        status = crew.run(config, lock)
        took = time.monotonic() - began
        # On a full disk the stage has said why it ended; its duration is then not recorded.
        with contextlib.suppress(OSError), open(config.run_dir / TIMING, "a", encoding="utf-8") as file:
            facts = {"seconds": round(took, 1), "processes": config.launch.world_size, "status": status}
            file.write(json.dumps(facts) + "\n")
    if status == STOPPED or (status == 0 and created_at(config) == before):
        print(f"{config.stage}: stopped after {took:.0f} s; the same command goes on from there", file=sys.stderr)
        return 3
    if status == 2:  # a mistake that the user can mend, told in its one sentence
        return 2
    if status:
        print(f"error: stage={config.stage} failed after {took:.0f} s; see {config.run_dir / 'log'}", file=sys.stderr)
        return 1
    print(f"{config.stage}: done in {took:.0f} s -> {config.artifact_dir}", flush=True)
    return 0
