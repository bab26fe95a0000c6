"""The doctor of message datasets: everything that would break or bend a training run, found before one starts.

nexus-gen data check train.jsonl --heldout heldout.jsonl --report check.html --quarantine quarantine.jsonl
nexus-gen data check --config runs/mine/pretrain/config.yaml

Arguments and their checks; `data.doctor.examine` does the work. No torch here.
"""

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from data.doctor.checks import KINDS, LEVELS, WARNING, RowChecker
from data.doctor.examine import examine, open_datasets
from data.doctor.report import QuarantineFile, print_table, write_page
from data.doctor.wording import wording_of_datasets, wording_warnings
from data.messages.token_lengths import TokenLengths
from data.mixture.order import asked_in_vain, load_mixture
from data.mixture.rehearsal import SHIPPED_ROWS
from data.records.converters import AUTO, CONVERTERS
from nexus_gen.artifacts.results import check_result
from nexus_gen.parts.models import target_tokens_of
from nexus_gen.specs.arguments import Parser, list_to_paste
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import RELEASED_TARGET_TOKENS

DATA_KEYS = (
    *("max_pixels", "max_length", "dynamic_targets", "consistent_edit_scale"),
    *("train", "heldout", "picture_root", "rehearsal", "rehearsal_rows"),
)


def parser() -> Parser:
    result = Parser(
        prog="nexus-gen data check",
        description="Find what would break or bend a training run in message datasets, before one starts.",
        epilog="Exit status: 0 when no row has an error, 1 when --strict is given and there are warnings, 2 when rows "
        "have errors or the command could not run. Rows with errors are what --quarantine lists.",
    )
    result.add_argument(
        "dataset",
        nargs="*",
        type=Path,
        help="files, folders, patterns or mixtures of training rows (default: --config's)",
    )
    result.add_argument(
        "--heldout", nargs="+", type=Path, default=[], help="held-out rows: checked too, and leaks into training found"
    )
    result.add_argument(
        "--format",
        choices=(AUTO, *CONVERTERS),
        default=AUTO,
        help="of rows that no mixture names (default: %(default)s)",
    )
    result.add_argument(
        "--picture-root",
        type=Path,
        help="what picture paths of rows are relative to (default: data.picture_root, or the file that names them)",
    )
    result.add_argument(
        "--images",
        choices=LEVELS,
        default="decode",
        help="how closely pictures are looked at: not at all, whether the file exists, its size, all of it. Contents "
        "are compared with decode, or with header and --heldout; paths otherwise (default: %(default)s)",
    )
    lengths = result.add_argument_group("token lengths after resizing, as the stage will count them")
    lengths.add_argument("--config", type=Path, help="config.yaml of a stage, or what `nexus-gen run ... --cfg` prints")
    lengths.add_argument("--model", type=Path, help="Qwen2.5-VL directory (default: model.qwen of --config)")
    lengths.add_argument("--max-pixels", type=int, help="bound of context pictures (default: data.max_pixels)")
    lengths.add_argument("--max-length", type=int, help="tokens a row may have (default: data.max_length)")
    output = result.add_argument_group("output")
    output.add_argument("--report", type=Path, help="an HTML page with histograms and thumbnails of the offenders")
    output.add_argument("--quarantine", type=Path, help="JSON lines naming each row with an error, and the reason")
    output.add_argument("--strict", action="store_true", help="warnings give exit status 1; notices do not")
    output.add_argument(
        "--as-error",
        nargs="+",
        default=[],
        metavar="KIND",
        choices=[kind for kind, (severity, _) in KINDS.items() if severity == WARNING],
        help="warnings that are to count as errors: %(choices)s",
    )
    output.add_argument("--max-errors", type=int, help="stop after about so many broken rows")
    output.add_argument("--num-workers", type=int, help="processes (default: one for each core)")
    return result


def read_config(path: Path) -> dict[str, Any]:
    """What the doctor takes from a stage's config: `model`, `num_target_tokens` and DATA_KEYS; absent ones None."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
        data = values["data"]
        model = values["model"].get("qwen") or values.get("embed", {}).get("autoregressive")
        tokens = values["model"].get("num_target_tokens")
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"--config {path} is not the config of a stage that reads messages ({error}); give the config.yaml of its "
            "run directory, or what `nexus-gen run stage=pretrain ... --cfg` prints"
        ) from error
    return {"model": model, "num_target_tokens": tokens, **{key: data.get(key) for key in DATA_KEYS}}


def token_lengths(given: argparse.Namespace, config: dict[str, Any]) -> TokenLengths | None:
    """How rows are measured, or None when neither --model nor --config asks for it."""
    model = given.model or config.get("model")
    if given.images in ("none", "exists"):
        for name in ("model", "max_pixels", "max_length"):
            if getattr(given, name):
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with --images {given.images}, which does not learn the "
                    "sizes of pictures; use --images header or decode"
                )
        return None
    if model is None:
        for name in ("max_pixels", "max_length"):
            if getattr(given, name):
                raise UserError(f"--{name.replace('_', '-')} needs --model, whose tokenizer counts")
        return None
    max_pixels = given.max_pixels or config.get("max_pixels")
    if max_pixels is None:
        raise UserError("--model needs --max-pixels, the bound of context pictures; or give --config")
    return TokenLengths(
        model,
        max_pixels,
        bool(config.get("dynamic_targets")),
        bool(config.get("consistent_edit_scale")),
        config.get("num_target_tokens") or target_tokens_of(Path(model)) or RELEASED_TARGET_TOKENS,
    )


def main(argv: list[str]) -> int:
    """`nexus-gen data check`; argv[0] is the command word."""
    given = parser().parse_args(argv[1:])
    config = read_config(given.config) if given.config else {}
    for name in ("max_pixels", "max_length", "max_errors", "num_workers"):
        if getattr(given, name) is not None and getattr(given, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(given, name)}; it must be above 0")
    for name in ("report", "quarantine"):
        if getattr(given, name) is not None:
            check_result(getattr(given, name), f"--{name}")
    train = given.dataset or [Path(config[key]) for key in ("train",) if config.get(key)]
    if config.get("rehearsal") and not given.dataset:  # trained on too: held-out rows must not be among them
        train.append(Path(config["rehearsal_rows"] or SHIPPED_ROWS))
    heldout = given.heldout or [Path(config[key]) for key in ("heldout",) if config.get(key) and not given.dataset]
    if not train:
        raise UserError("no dataset is given; name one, or a --config whose data.train is to be checked")
    lengths = token_lengths(given, config)
    max_length = given.max_length or config.get("max_length")
    by_content = given.images == "decode" or (given.images == "header" and bool(heldout))
    checker = RowChecker(given.images, by_content, lengths, max_length if lengths else None)
    roles = [*(("heldout", path) for path in heldout), *(("train", path) for path in train)]
    picture_root = given.picture_root or (Path(config["picture_root"]) if config.get("picture_root") else None)
    datasets = open_datasets(roles, given.format, picture_root)
    with ExitStack() as stack:
        quarantine = stack.enter_context(QuarantineFile(given.quarantine)) if given.quarantine else None
        report = examine(
            datasets,
            checker,
            errors=frozenset(given.as_error),
            quarantine=quarantine,
            max_errors=given.max_errors,
            num_workers=given.num_workers,
            progress=True,
        )
        if quarantine and not report.stopped:
            quarantine.keep()
    report.settings = settings_line(given.images, lengths, checker.max_length)
    if not report.stopped:
        specs = [load_mixture(path) for _, path in roles]
        report.mistakes = [line for spec in specs for line in asked_in_vain(spec, report.datasets)]
        if any(dataset.good for dataset in report.datasets if dataset.role == "train"):
            try:
                own = given.dataset or [Path(config["train"])]
                report.wording = wording_of_datasets(own, given.format, picture_root)
            except UserError as error:  # training would refuse the mixture
                report.mistakes = report.mistakes or [str(error)]
    print_table(report)
    if given.report:
        write_page(report, given.report)
        print(f"page: {given.report}")
    if given.quarantine:
        option = list_to_paste("data.quarantine", str(given.quarantine))
        print(
            f"quarantine: not written, because reading stopped after {given.max_errors} broken rows"
            if report.stopped
            else f"quarantine: {given.quarantine} ({option} leaves its rows out of a run)"
        )
    if report.num_quarantined or report.mistakes:
        return 2
    return int(given.strict and bool(report.rows_with or any(wording_warnings(report.wording))))


def settings_line(level: str, lengths: TokenLengths | None, max_length: int | None) -> str:
    looked = {"none": "not looked at", "exists": "looked for", "header": "measured", "decode": "decoded"}[level]
    if lengths is None:
        return f"pictures {looked}; token lengths not measured (--model or --config, with --images header or decode)"
    bound = f"{max_length} tokens allowed" if max_length else "any length allowed"
    return f"pictures {looked}; context pictures bounded by {lengths.max_pixels} pixels, {bound}"
