"""What a failing rank leaves: a sentence where the user can do something, on a full disk too."""

import errno
from pathlib import Path

import pytest

from nexus_gen.artifacts import artifact
from nexus_gen.specs.errors import UserError
from train.runs import failures
from train.runs.failures import first_failure, forget_failures, note_failure


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError(
            "[enforce fail at inline_container.cc:659] . PytorchStreamWriter failed writing file data/3: file write "
            "failed"
        ),
        RuntimeError(
            'Error while serializing: I/O error: Os { code: 28, kind: StorageFull, message: "No space left on device" }'
        ),
    ],
)
def test_a_full_disk_is_a_sentence_that_names_the_file(error: Exception, tmp_path: Path) -> None:
    written = tmp_path / "checkpoints" / "checkpoint-20" / "weights.pt"
    written.parent.mkdir(parents=True)
    written.write_bytes(b"half")
    note_failure(tmp_path / "log", 0, error)
    failure = first_failure(tmp_path / "log")
    assert failure is not None and failure.status == 2
    assert str(written) in failure.sentence and "make room" in failure.sentence and "MB free" in failure.sentence


def test_the_file_that_an_error_names_is_told(tmp_path: Path) -> None:
    note_failure(tmp_path / "log", 0, OSError(errno.ENOSPC, "No space left on device", "/data/x.tar"))
    failure = first_failure(tmp_path / "log")
    assert failure is not None and failure.sentence.startswith("/data/x.tar could not be written (No space left")


def test_notes_survive_a_disk_that_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, other = tmp_path / "run" / "log", tmp_path / "temporary"
    log.mkdir(parents=True)
    other.mkdir()
    monkeypatch.setattr(failures.tempfile, "gettempdir", lambda: str(other))
    full = [log]

    def write(path: Path, text: str) -> None:
        if any(path.is_relative_to(place) for place in full):
            raise OSError(errno.ENOSPC, "No space left on device")
        artifact.write_text_atomic(path, text)

    monkeypatch.setattr(failures, "write_text_atomic", write)
    note_failure(log, 3, UserError("shards are damaged"))
    failure = first_failure(log)
    assert failure is not None and str(failure) == "error: shards are damaged" and failure.rank == 3
    forget_failures(log)
    assert first_failure(log) is None
    full.append(other)
    note_failure(log, 3, UserError("shards are damaged"))
    assert first_failure(log) is None and capsys.readouterr().err == "error: shards are damaged\n"


@pytest.mark.parametrize(
    "words",
    [
        "DataLoader worker (pid 4711) is killed by signal: Killed. ",
        "DataLoader worker (pid(s) 4711) exited unexpectedly",
        "DataLoader worker (pid(s) 4711, 4712) exited unexpectedly",
    ],
)
def test_a_killed_loader_process_is_a_sentence(words: str, tmp_path: Path) -> None:
    note_failure(tmp_path / "log", 0, RuntimeError(words))
    failure = first_failure(tmp_path / "log")
    assert failure is not None and "4711" in failure.sentence and "num_workers" in failure.sentence


def test_a_crash_stays_a_traceback(tmp_path: Path) -> None:
    note_failure(tmp_path / "log", 1, RuntimeError("shapes do not match"))
    failure = first_failure(tmp_path / "log")
    assert failure is not None and failure.status == 1 and "RuntimeError: shapes do not match" in str(failure)
