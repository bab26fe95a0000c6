"""The argument parser of all commands: what argparse does, with one sentence for a mistake."""

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from nexus_gen.specs.errors import UserError
from nexus_gen.specs.numbers import read_number, read_whole

Read = TypeVar("Read")


class Parser(argparse.ArgumentParser):
    """Options may stand before, between and after positional arguments, and mistakes are UserErrors.

    `type=float` and `type=int` take finite numbers only; `type=Path` expands `~`, which shells leave as it is in
    `--run=~/x`.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.register("type", float, reader(read_number))
        self.register("type", int, reader(read_whole))
        self.register("type", Path, lambda text: Path(os.path.expanduser(text)))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        # Commands inside have options of their own; argparse shows no help while it takes positional arguments apart,
        # and forgets that what stands behind `--` is no option.
        if self._subparsers is not None or {"-h", "--help", "--"} & set(sys.argv[1:] if args is None else args):
            return super().parse_args(args, namespace)
        return self.parse_intermixed_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        option, _, what = message.partition(": ")
        if what == "expected one argument":  # the next word, if any, is taken for an option
            message += f", and a value that begins with a dash is given as {option.split('/')[-1]}=-value"
        raise UserError(f"{message}; `{self.prog} --help` says more")


def reader(read: Callable[[Any], Read]) -> Callable[[str], Read]:
    """As argparse takes it: it puts the option's name in front of the error's text."""

    def of_text(text: str) -> Read:
        try:
            return read(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"is {error}") from error

    return of_text


def list_to_paste(key: str, value: str) -> str:
    """`key=[value]`, a list of one path for `nexus-gen run`, as it can be pasted into a shell."""
    if set(value) & set(",'\"[]") or value != value.strip():
        from hydra.core.override_parser.types import Quote, QuotedString  # most commands do without

        value = QuotedString(value, Quote.single).with_quotes()
    return shlex.quote(f"{key}=[{value}]")
