"""Embedding stages on tiny real models, each rank a process forked from one that has imported everything already.

A start costs a second where torchrun takes ten, so that tests can kill many.
"""

import json
import multiprocessing
import os
import signal
import tempfile
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import tiny_qwen
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from nexus_gen.artifacts.artifact import verify
from nexus_gen.decoders.checkpoint import save_vae
from nexus_gen.flux.vae import FluxVae
from nexus_gen.specs.geometry import VaeGeometry
from train.preflight.stage import preflight
from train.runs.directory import identity, made_by, prepare
from train.schemas.embed import EmbedStageConfig
from train.schemas.fields import typed
from train.stage import seed_everything

VAE = VaeGeometry([8, 16], 1, 4, 16)
FAILED = 17  # the exit status of a rank that raised


def write_inputs(directory: Path) -> Path:
    """qwen/ and FLUX.1-dev/ of the smallest kind."""
    torch.manual_seed(0)
    tiny_qwen.write_checkpoint(directory / "qwen")
    save_vae(FluxVae(VAE), directory / "FLUX.1-dev" / "ae.safetensors")
    vocabulary = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(
        directory / "FLUX.1-dev" / "tokenizer"
    )
    clip = CLIPTextConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    )
    CLIPTextModel(clip).save_pretrained(directory / "FLUX.1-dev" / "text_encoder")
    return directory


def write_rows(directory: Path, split: str, num_rows: int, editing: bool = False) -> Path:
    """`<split>.jsonl`: generation or editing rows of noise pictures in several sizes."""
    generator = np.random.default_rng(num_rows)
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_rows):
        images = [f"{split}{index}{kind}.png" for kind in (("source", "") if editing else ("",))]
        for name in images:
            write_picture(directory / name, int(generator.integers(1 << 30)), (40 + index % 5, 48))
        words = f"{'<image> ' if editing else ''}{'a picture ' * (1 + index % 7)}"
        messages = [{"role": "user", "content": words}, {"role": "assistant", "content": "Here is it: <image>"}]
        rows.append({"id": f"{split}-{index}", "source": "noise", "images": images, "messages": messages})
    return write_jsonl(directory / f"{split}.jsonl", rows)


def write_picture(path: Path, seed: int, size: tuple[int, int] = (40, 48)) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size).save(path)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def config(inputs: Path, data: Path, runs_dir: Path, stage: str = "embed_generation", **embed: Any) -> EmbedStageConfig:
    values = {
        "stage": stage,
        "name": "test",
        "runs_dir": str(runs_dir),
        "seed": 0,
        "resume": embed.pop("resume", True),
        "model": {
            "transformer": {
                "hidden_size": 32, "num_heads": 2, "num_joint_blocks": 1, "num_single_blocks": 2, "context_dim": 24,
                "pooled_dim": 16, "rope_axes_dim": [4, 6, 6], "latent_channels": 16, "patch_size": 2,
            },
            "vae": {"channels": [8, 16], "num_res_blocks": 1, "norm_groups": 4, "latent_channels": 16},
            "image_size": embed.pop("image_size", 16),
            "flux": str(inputs / "FLUX.1-dev"),
        },
        "data": {
            "train": str(data / "train.jsonl"), "heldout": str(data / "heldout.jsonl"),
            "max_pixels": embed.pop("max_pixels", 4096), "max_bad_fraction": embed.pop("max_bad_fraction", 0.5),
            "quarantine": embed.pop("quarantine", []),
            **{key: embed.pop(key) for key in ("rehearsal", "rehearsal_rows") if key in embed},
        },
        "launch": {
            "kind": "local", "num_nodes": 1, "processes_per_node": 1, "device": "cpu", "threads_per_process": 1,
            "rendezvous": "", "timeout_minutes": 0, "partition": "",
        },
        "embed": {
            "autoregressive": str(inputs / "qwen"), "samples_per_shard": 3, "batch_size": 2, "dtype": "bfloat16",
            "latents": True, "null_context": False, "num_workers": 0, "compile": "never",
            **({"predicted": False} if stage == "embed_generation" else {"pixels": "squash"}),
            **embed,
        },
    }  # fmt: skip
    made = typed(stage, values)
    assert isinstance(made, EmbedStageConfig)
    return made


def start(stage: EmbedStageConfig, world_size: int = 1) -> list[BaseProcess]:
    """What `nexus-gen run` does before its processes, and these processes."""
    preflight(stage)
    prepare(stage, identity(stage))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nexus_gen.language.checkpoint", "train.embed.stage"])
    # Ranks meet at a file: a free port may be taken before they come to it.
    meeting = Path(tempfile.mkdtemp(dir=stage.runs_dir)) / "meeting"
    ranks = [context.Process(target=run_rank, args=(stage, rank, world_size, meeting)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    return ranks


def run_rank(stage: EmbedStageConfig, rank: int, world_size: int, meeting: Path) -> None:
    """What `train.worker` does, in a process that has imported what it needs."""
    log = os.open(stage.run_dir / "log" / f"rank_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    import logging

    from train.embed.stage import EmbedEditingStage, EmbedGenerationStage

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    multiprocessing.set_start_method("fork", force=True)  # for decoding workers, as outside of tests
    torch.set_num_threads(1)
    seed_everything(stage.seed)
    torch.distributed.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=world_size)
    kind = EmbedEditingStage if stage.stage == "embed_editing" else EmbedGenerationStage
    finished = kind(stage).run()
    os._exit(0 if finished else 3)


def run(stage: EmbedStageConfig, world_size: int = 1) -> str:
    """The stage to its end; what rank zero logged. Says `skipped` where `nexus-gen run` would."""
    if made_by(stage, identity(stage)):
        return "skipped"
    log = stage.run_dir / "log" / "rank_0"
    before = log.stat().st_size if log.is_file() else 0
    ranks = start(stage, world_size)
    for process in ranks:
        process.join(120)
    said = log.read_bytes()[before:].decode()
    assert [process.exitcode for process in ranks] == [0] * world_size, said
    return said


def kill(stage: EmbedStageConfig, world_size: int, num_shards: int, delay_s: float) -> bool:
    """Start the stage and SIGKILL all its ranks a moment after they finished so many shards, as a power cut would.

    False when they had ended by then.
    """
    partial = stage.artifact_dir.with_name("artifact.partial")
    enough = len(list(partial.glob("*/[!.]*.json"))) + num_shards
    ranks = start(stage, world_size)
    while any(process.is_alive() for process in ranks) and len(list(partial.glob("*/[!.]*.json"))) < enough:
        time.sleep(0.002)
    time.sleep(delay_s)
    alive = any(process.is_alive() for process in ranks)
    for process in ranks:
        if process.is_alive():
            os.kill(process.pid or 0, signal.SIGKILL)
    for process in ranks:
        process.join(60)
    said = (stage.run_dir / "log" / "rank_0").read_text(encoding="utf-8") if alive else ""
    assert alive or all(process.exitcode == 0 for process in ranks), said
    return alive


def contents(stage: EmbedStageConfig) -> dict[str, dict[str, Any]]:
    """Name -> size and checksum of every file of the artifact, checked, and of its manifest's details."""
    leftovers = {path.name for path in stage.run_dir.glob("artifact*")} - {"artifact"}
    assert not leftovers
    assert not [path for path in stage.run_dir.rglob("*") if path.name.endswith(".tmp")]
    manifest = verify(stage.artifact_dir)
    assert {str(path.relative_to(stage.artifact_dir)) for path in stage.artifact_dir.rglob("*") if path.is_file()} == {
        *manifest.files,
        "manifest.json",
    }
    return {**manifest.files, "details": manifest.details, "inputs": manifest.inputs}
