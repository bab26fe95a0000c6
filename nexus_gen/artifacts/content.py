"""What files hold, by SHA-256, remembered by their size, times and inode: an unchanged file is read only once.

The memory is a file of JSON lines, one for all stages of a run and the commands on it:

    [name, [size, mtime, ctime, inode], sha256, when its content was last seen to change]

Names are relative to the memory's directory where they can be, so a moved run keeps what it knows; of a part of a file
(a picture in a tar) they end in its place. Whoever writes takes up what others wrote since and replaces the file as a
whole. Of two that write in the same moment one is forgotten, which costs a second reading and no more. Where nothing
can be written, nothing is remembered. Lines that make no sense are passed over.
"""

import contextlib
import hashlib
import json
import logging
import os
import time
import weakref
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from nexus_gen.artifacts.results import aside

log = logging.getLogger(__name__)

CONTENTS = "contents.jsonl"  # in a run
SETTLED_NS = 2_000_000_000  # a file changed so shortly before it was read may change again without a new time
THREADS = 8  # hashing releases the interpreter's lock; looking and reading wait for disks
SMALL = 1 << 20  # bytes that are read in one piece, which takes a tenth of the calls
MUCH = 10_000_000_000  # bytes; reading so many takes long enough to say so
AT_ONCE = 64  # files of a thread's turn

Facts = list[int]  # of a file: size, times of the last changes of its content and of its record, in nanoseconds, inode


def file_facts(path: str | os.PathLike[str]) -> Facts:
    """What differs when a file was changed, or replaced by one of the same size and time. Raises OSError."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def ns_since_change(facts: Facts, now: int) -> int:
    """How long before `now` a file with these facts was changed; from SETTLED_NS on its next change has a new time."""
    return now - max(facts[1:3])


def hash_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb", buffering=0) as file:
        if os.fstat(file.fileno()).st_size <= SMALL:
            return hashlib.sha256(file.read()).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()


class Contents:
    """The memory at `path`; without one nothing outlives this object. Threads may ask at once.

    Errors of the file system are raised as they come, for the files that are asked about and for no other.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._root = f"{path.absolute().parent}{os.sep}" if path is not None else ""
        self._known: dict[str, tuple[Facts, str, int]] = {}
        self._new: set[str] = set()  # names of this object's own finding
        self._others: dict[Path, Contents] = {}
        self._bytes_read = 0
        self._read_at: Facts | None = None
        self._refresh()

    @staticmethod
    def at(path: Path | None) -> "Contents":
        """The memory at a path, as it is now; one object for all that have it in use at the same time."""
        if path is None:
            return Contents()
        path = path.absolute()
        memory = _open.get(path)
        if memory is None:
            memory = _open[path] = Contents(path)
        else:
            memory._refresh()
        return memory

    def sha256(self, file: str | os.PathLike[str], part: tuple[int, int] | None = None) -> str:
        """Of a file's bytes, or of a part of them: where it begins and how long it is. Raises OSError."""
        facts = file_facts(file)
        name = self._name(os.fspath(file), part)
        known = self._known.get(name)
        if known is not None and known[0] == facts:
            return known[1]
        if part is None and (sha256 := self._known_to_others(file, facts)):
            return sha256
        self._say_much(facts[0] if part is None else part[1])
        now = time.time_ns()
        sha256 = hash_file(file) if part is None else _hash_part(file, *part)
        changed = known[2] if known is not None and known[1] == sha256 else now if known is not None else 0
        settled = ns_since_change(facts, now) >= SETTLED_NS
        self._known[name] = (facts if settled else [], sha256, changed)
        self._new.add(name)
        return sha256

    def consult(self, path: Path) -> None:
        """Ask another memory, too, as of the run whose artifact is read; nothing is written there.

        Whoever remembers nothing wants everything read.
        """
        path = path.absolute()
        if self._path is not None and path != self._path and path not in self._others and path.is_file():
            self._others[path] = Contents.at(path)

    def sha256s(self, files: Sequence[str]) -> Generator[str, None, None]:
        """Of several files in their order, by threads. Raises OSError."""
        at_once = max(1, min(AT_ONCE, len(files) // (4 * THREADS)))
        groups = [files[first : first + at_once] for first in range(0, len(files), at_once)]
        pool = ThreadPoolExecutor(THREADS)
        try:
            for hashes in pool.map(lambda group: [self.sha256(file) for file in group], groups):
                yield from hashes
        finally:  # whoever has found one that differs need not wait for terabytes of others
            pool.shutdown(cancel_futures=True)

    def learn(self, hashes: Iterable[tuple[str, str]]) -> None:
        """Remember (file, SHA-256) of files that were hashed while they were written."""
        now = time.time_ns()
        for file, sha256 in hashes:
            facts = file_facts(file)
            if ns_since_change(facts, now) >= SETTLED_NS:
                name = self._name(file)
                self._known[name] = (facts, sha256, 0)
                self._new.add(name)

    def changed_since(self, files: Iterable[str], since: int) -> list[str]:
        """Those whose content was seen to change after a time in nanoseconds."""
        names = ((file, self._known.get(self._name(file))) for file in files)
        return [file for file, known in names if known is not None and known[2] > since]

    def save(self) -> None:
        """Write what is new, without what was known of directories that are gone.

        Only beside other files: asking about a run that is not there does not make one.
        """
        if self._path is None or not self._new or not self._path.parent.is_dir():
            return
        self._refresh()
        known_now, new = dict(self._known), set(self._new)  # threads may still be at work
        there: dict[str, bool] = {}
        for name in known_now:
            directory = os.path.dirname(name)
            if directory not in there:
                there[directory] = os.path.isdir(os.path.join(self._root, directory))
        lines = (json.dumps([name, *known]) + "\n" for name, known in known_now.items() if there[os.path.dirname(name)])
        try:
            with aside(self._path) as partial, open(partial, "w", encoding="ascii") as file:
                file.writelines(lines)
            self._read_at = file_facts(self._path)
        except OSError as error:  # a run on a read-only or full disk can still be asked about
            log.warning("%s cannot be written (%s); files are read again next time", self._path, error.strerror)
        self._new -= new

    def _refresh(self) -> None:
        """Take up what is in the memory's file, unless it is what was read or written last."""
        if self._path is None:
            return
        try:
            facts = file_facts(self._path)
            if facts == self._read_at:
                return
            with open(self._path, encoding="ascii", errors="replace") as lines:
                for line in lines:
                    with contextlib.suppress(ValueError, TypeError):
                        name, facts_of_file, sha256, changed = json.loads(line)
                        if name not in self._new and isinstance(name + sha256, str) and isinstance(changed, int):
                            self._known[name] = (facts_of_file, sha256, changed)
            self._read_at = facts
        except OSError:
            return

    def _known_to_others(self, file: str | os.PathLike[str], facts: Facts) -> str | None:
        for other in self._others.values():
            known = other._known.get(other._name(os.fspath(file)))
            if known is not None and known[0] == facts:
                return known[1]
        return None

    def _say_much(self, num_bytes: int) -> None:
        before, self._bytes_read = self._bytes_read, self._bytes_read + num_bytes
        if before < MUCH <= self._bytes_read:
            log.warning(
                "reading more than %d GB to know what files hold; from now on only those that change", MUCH / 1e9
            )

    def _name(self, file: str, part: tuple[int, int] | None = None) -> str:
        file = os.path.abspath(file)
        name = file.removeprefix(self._root) if self._root else file
        return name if part is None else f"{name}:{part[0]}:{part[1]}"


_open: "weakref.WeakValueDictionary[Path, Contents]" = weakref.WeakValueDictionary()


def _hash_part(path: str | os.PathLike[str], offset: int, size: int) -> str:
    with open(path, "rb") as file:
        file.seek(offset)
        return hashlib.sha256(file.read(size)).hexdigest()
