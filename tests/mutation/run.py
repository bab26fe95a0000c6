"""`make mutants`: change one line at a time and see whether the tests that cover its module notice.

    python tests/mutation/run.py [train/scores/scoring.py ...] [--sample 60]

Works in a temporary copy. modules.toml says which tests cover which module; survivors.toml lists what may survive, each
with its reason. Fails when another one survives, or when fewer than `caught_at_least` of a module's are caught.
"""

import argparse
import ast
import compileall
import hashlib
import importlib
import os
import py_compile
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmic_ray.ast import get_ast
from cosmic_ray.mutating import MutationVisitor, mutate_code
from cosmic_ray.operators.operator import Operator
from operators import operators

ROOT = Path(__file__).parents[2]
MODULES, SURVIVORS = (Path(__file__).with_name(name) for name in ("modules.toml", "survivors.toml"))
SLOWER = 6  # times as long as the tests take by themselves, and the change is caught: it does not end
GRACE_S = 20
PACKAGES = ("nexus_gen", "data", "train", "launch", "tests")
BASETEMP = ".basetemp"


@dataclass(frozen=True)
class Mutant:
    """A module with one line changed. line: counted from 1; before, after: the lines without their indentation."""

    line: int
    before: str
    after: str
    source: str

    def __str__(self) -> str:
        return f"{self.line}\n    - {self.before}\n    + {self.after}"


class Positions(MutationVisitor):
    """Where an operator can change a source, in the order of its occurrences; it changes nothing."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(-1, operator)
        self.found: list[tuple[int, int]] = []  # line and column

    def visit(self, node: Any) -> Any:
        self.found += [start for start, _ in self.operator.mutation_positions(node)]
        return node


def mutants(source: str, only: Sequence[str], number: int) -> list[Mutant]:
    """So many changes of a module, all if there are fewer, in the order of their lines.

    Annotations stay, and what has no effect on the syntax tree is no change. Which ones are chosen depends on their
    lines alone, so that they are the same after a change elsewhere. only: see `lines_of`.
    """
    lines, inside = source.splitlines(), lines_of(source, only)
    places: list[tuple[str, Operator, int]] = []
    for operator in operators():
        positions = Positions(operator)
        positions.walk(get_ast(source))
        for occurrence, (line, column) in enumerate(positions.found):
            if line in inside:
                key = f"{type(operator).__name__} {lines[line - 1]} {column} {occurrence}"
                places.append((hashlib.sha256(key.encode()).hexdigest(), operator, occurrence))
    found: dict[str, Mutant] = {}
    unchanged = essence(source)
    for _, operator, occurrence in sorted(places, key=lambda place: place[0]):
        changed = mutate_code(source, operator, occurrence)
        with suppress(SyntaxError):
            if changed is not None and essence(changed) != unchanged:
                found.setdefault(changed, mutant(source, changed))
        if len(found) == number:
            break
    return sorted(found.values(), key=lambda one: one.line)


def lines_of(source: str, names: Sequence[str]) -> set[int]:
    """The lines of functions and classes, and of methods as Class.method; all of the module if no names are given.

    Those of assertions are left out: they say what cannot be otherwise, to readers and to the type checker.
    """
    tree = ast.parse(source)
    asserted = {
        line
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    if not names:
        return set(range(1, source.count("\n") + 2)) - asserted
    found: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{own.name}": own for own in node.body if isinstance(own, ast.FunctionDef)}
    if unknown := set(names) - found.keys():
        sys.exit(f"{', '.join(sorted(unknown))}: no such names in the module; correct {MODULES.name}")
    of_names = {line for name in names for line in range(found[name].lineno, found[name].end_lineno + 1)}  # type: ignore[attr-defined]
    return of_names - asserted


def mutant(source: str, changed: str) -> Mutant:
    before, after = source.splitlines(), changed.splitlines()
    line = next(number for number, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1])
    return Mutant(line + 1, before[line].strip(), after[line].strip(), changed)


def essence(source: str) -> str:
    """The syntax tree without what changes no figure: annotations, options of class decorators, `strict` of `zip`."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            node.keywords = [keyword for keyword in node.keywords if keyword.arg != "strict"]
        if isinstance(node, ast.arguments):  # their names and defaults, not how they may be given
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.defaults = [*node.defaults, *filter(None, node.kw_defaults)]
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
        elif isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, ast.ClassDef):  # whether a dataclass is frozen changes no figure
            node.decorator_list = [getattr(decorator, "func", decorator) for decorator in node.decorator_list]
    return ast.dump(tree)


@contextmanager
def copy_of_the_tree() -> Iterator[Path]:
    """What git tracks, and what is new and not ignored, in a directory of its own."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.split(b"\0")
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        for name in (os.fsdecode(name) for name in listed if name):
            if (ROOT / name).is_file():
                copy = Path(directory, name)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((ROOT / name).read_bytes())
        # By their hash: a module may change twice in the tick of a clock.
        mode = py_compile.PycInvalidationMode.CHECKED_HASH
        for package in PACKAGES:
            compileall.compile_dir(Path(directory, package), quiet=2, invalidation_mode=mode)
        yield Path(directory)


def run_pytest(copy: Path, arguments: Sequence[str]) -> int:
    """In a child of the run: the exit status, with nothing printed."""
    import pytest

    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)
    os.chdir(copy)
    options = ["-x", "-q", "--assert=plain", "-m", "not slow", "-p", "no:cacheprovider", "-o", "addopts="]
    return int(pytest.main([*options, f"--basetemp={copy / BASETEMP}", *arguments]))


def import_libraries(copy: Path, tests: Sequence[str]) -> None:
    """Import here what tests import, but for the copy itself: each mutant's tests run in a fork of this process."""
    listed = copy / "imported"
    child = os.fork()
    if child == 0:
        try:
            run_pytest(copy, ["--collect-only", *tests])
            files = {name: getattr(module, "__file__", None) or "" for name, module in [*sys.modules.items()]}
            listed.write_text("\n".join(name for name, file in files.items() if not file.startswith(str(copy))))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    if not listed.exists():
        sys.exit(f"{', '.join(tests)} cannot be collected")
    for name in listed.read_text().split("\n"):
        with suppress(Exception):
            importlib.import_module(name)


def passes(copy: Path, tests: Sequence[str], timeout_s: float) -> bool:
    """Whether the tests pass in the copy, in a process of their own."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.setsid()
        status = 1
        try:
            status = run_pytest(copy, tests)
        finally:
            os._exit(status)
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)  # what its tests left running
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def survivors_of(copy: Path, module: str, settings: dict[str, Any], number: int) -> tuple[int, list[Mutant]]:
    """(How many changes were tried, those that no test noticed)."""
    path = copy / module
    source = path.read_text(encoding="utf-8")
    tests = settings["tests"]
    chosen = mutants(source, settings.get("only", ()), number)
    import_libraries(copy, tests)
    began = time.monotonic()
    if not passes(copy, tests, 600):
        sys.exit(f"{', '.join(tests)} fail without any change; they must pass first")
    timeout_s = GRACE_S + SLOWER * (time.monotonic() - began)
    survived = []
    try:
        for one in chosen:
            path.write_text(one.source, encoding="utf-8")
            if passes(copy, tests, timeout_s):
                survived.append(one)
                print(f"  survived {module}:{one}", flush=True)
    finally:
        path.write_text(source, encoding="utf-8")
    return len(chosen), survived


def is_accepted(one: Mutant, module: str, entries: Sequence[dict[str, Any]]) -> bool:
    """Whether a change may survive. Entries without `after` are of any change of their line."""
    return any(
        entry["module"] == module and entry["before"] == one.before and entry.get("after", one.after) == one.after
        for entry in entries
    )


def main() -> int:
    settings = tomllib.loads(MODULES.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", metavar="MODULE", help="of those in modules.toml (default: all)")
    parser.add_argument("--sample", type=int, help=f"changes of each module (default: {settings['sample']})")
    arguments = parser.parse_args()
    entries = tomllib.loads(SURVIVORS.read_text(encoding="utf-8"))["survivor"]
    modules: dict[str, dict[str, Any]] = settings["modules"]
    if unknown := [name for name in arguments.modules if name not in modules]:
        parser.error(f"{', '.join(unknown)} not in {MODULES.name}; it lists {', '.join(modules)}")
    os.environ["OMP_NUM_THREADS"] = "1"  # threads do not live on in a fork
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # whose imports take half of a mutant's time
    sys.dont_write_bytecode = True
    failed, lines = False, []
    with copy_of_the_tree() as copy:
        sys.path.insert(0, str(copy))
        from nexus_gen.tensors.compat import ensure_torchvision

        ensure_torchvision()
        for module in arguments.modules or modules:
            began = time.monotonic()
            number, survived = survivors_of(copy, module, modules[module], arguments.sample or settings["sample"])
            new = [one for one in survived if not is_accepted(one, module, entries)]
            caught = 1 - len(survived) / number
            failed |= bool(new) or caught < settings["caught_at_least"]
            lines.append(
                f"{module}: {caught:.1%} of {number} caught, {len(survived) - len(new)} accepted and {len(new)} new "
                f"survivors, {time.monotonic() - began:.0f} s"
            )
            print(lines[-1], flush=True)
    print("\n" + "\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
