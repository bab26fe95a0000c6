"""`models download`: what it says without network, and fetching from a server that speaks a hub's protocol."""

import hashlib
import json
import os
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from runs import NEXUS_GEN

from launch.cli import main
from nexus_gen.commands.downloads import models, select
from nexus_gen.specs.errors import UserError

QWEN = "Qwen/Qwen2.5-VL-7B-Instruct"
FILES = {
    "config.json": b'{"model_type": "qwen2_5_vl"}',
    "model-00001-of-00001.safetensors": bytes(range(256)) * 64,
    "README.md": b"not asked for",
    "original/weights.pth": b"not asked for either",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


SERVED: Counter[str] = Counter()


class Hub(BaseHTTPRequestHandler):
    """As much of huggingface.co as its client asks for; FLUX.1-dev is gated."""

    protocol_version = "HTTP/1.1"

    def answer(self, body: bytes, **headers: str) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        if "FLUX.1-dev" in path and not path.startswith("/api/"):
            self.refuse(401, "GatedRepo")
        elif "Nexus-GenV2" in path:
            self.refuse(404, "RepoNotFound")
        elif "/tree/" in path:
            entries = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in self.files().items()
            ]
            self.answer(json.dumps(entries).encode(), Content_Type="application/json")
        elif path.startswith("/api/models/"):
            siblings = [{"rfilename": name} for name in self.files()]
            info = {"_id": "1", "id": QWEN, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
            self.answer(json.dumps(info).encode(), Content_Type="application/json")
        else:
            name = path.split(f"/resolve/{COMMIT}/")[-1]
            if self.command == "GET":
                SERVED[name] += 1
            body = self.files()[name]
            self.answer(body, ETag=f'"{hashlib.sha256(body).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def files(self) -> dict[str, bytes]:
        return FILES if "Qwen" in self.path else {"flux1-dev.safetensors": b"", "ae.safetensors": b""}

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    SERVED.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def download(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: the clients read their variables when they are imported."""
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_TOKEN")}
    return subprocess.run(
        [NEXUS_GEN, "models", "download", *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**kept, "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **environment},
    )


def test_a_model_is_fetched_once_and_only_what_is_needed(hub: str, tmp_path: Path) -> None:
    arguments = ("pretrain", "--source", "huggingface", "--to", str(tmp_path))
    environment = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}
    first = download(*arguments, **environment)
    assert first.returncode == 0, first.stderr
    assert "Qwen2.5-VL-7B-Instruct/all" in first.stdout and "16.6 GB" in first.stdout
    fetched = tmp_path / "Qwen2.5-VL-7B-Instruct"
    for name in ("config.json", "model-00001-of-00001.safetensors"):
        assert (fetched / name).read_bytes() == FILES[name]
    assert not (fetched / "README.md").exists() and not (fetched / "original").exists()
    served = SERVED.copy()
    again = download(*arguments, **environment)
    assert again.returncode == 0, again.stderr
    assert served == SERVED, "what is there is not fetched again"


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (
            "FLUX.1-dev/autoencoder",
            "is gated on Hugging Face: accept its licence at https://huggingface.co/black-forest",
        ),
        ("Nexus-GenV2/generation_decoder", "Hugging Face has no modelscope/Nexus-GenV2, or hides it"),
    ],
)
def test_what_is_not_given_out_gets_one_sentence(hub: str, tmp_path: Path, what: str, says: str) -> None:
    done = download(what, "--source", "huggingface", "--to", str(tmp_path), HF_ENDPOINT=hub, HF_HOME=str(tmp_path))
    assert done.returncode == 2 and says in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in done.stderr


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_without_network_there_is_one_sentence(tmp_path: Path, source: str) -> None:
    nowhere = "127.0.0.1:9"
    done = download(
        "FLUX.1-dev/autoencoder",
        "--source",
        source,
        "--to",
        str(tmp_path),
        HF_ENDPOINT=f"http://{nowhere}",
        HF_HOME=str(tmp_path),
        MODELSCOPE_DOMAIN=nowhere,
        MODELSCOPE_ENDPOINT=f"http://{nowhere}",
        MODELSCOPE_CACHE=str(tmp_path),
    )
    assert done.returncode == 2, done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "check the network, or take --source" in sentence and nowhere in sentence
    assert "Traceback" not in done.stderr


def test_a_dry_run_says_what_where_and_how_much(tmp_path: Path, capsys) -> None:
    assert main(["models", "download", "generate", "--to", str(tmp_path / "models"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "Nexus-GenV2/generation_decoder   23.9 GB" in said and "FLUX.1-dev/text_encoders" in said
    assert "edit_decoder" not in said and "Qwen2.5" not in said
    assert f"50.6 GB in all, from modelscope to {tmp_path / 'models'}/" in said
    assert not (tmp_path / "models").exists()
    main(["models", "download", "FLUX.1-dev", "--source", "huggingface", "--dry-run"])
    assert "FLUX.1-dev is gated: accept its licence" in capsys.readouterr().out


def test_names_select_models_parts_and_users() -> None:
    assert [model.name for model, _ in select([])] == ["Nexus-GenV2", "Qwen2.5-VL-7B-Instruct", "FLUX.1-dev"]
    ((model, parts),) = select(["FLUX.1-dev/autoencoder"])
    assert (model.name, [part.name for part in parts]) == ("FLUX.1-dev", ["autoencoder"])
    with pytest.raises(UserError, match=r"nothing to download is called FLUX\.1-de; did you mean"):
        select(["FLUX.1-de"])
    assert {user for model in models() for part in model.parts for user in part.users} >= {"pretrain", "edit"}


def test_a_full_disk_is_told_before_anything_is_fetched(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 5_000_000_000}))
    assert main(["models", "download", "pretrain", "--to", str(tmp_path)]) == 2
    assert "needs 16.6 GB more and its disk has 5.0 GB free" in capsys.readouterr().err
