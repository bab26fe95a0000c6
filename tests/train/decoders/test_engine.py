"""What the engine adds to a plain training loop: nothing to the numbers; agreement, checkpoints, an artifact."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import lightning.pytorch as pl
import pytest
import tiny_qwen
import torch
from heldout_by_hand import heldout_by_hand
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data.shards.files import ShardSpec, write_shard
from data.shards.loader import ShardLoader
from launch.processes import worker_command, worker_environment
from nexus_gen.artifacts.artifact import Manifest, seal, verify
from nexus_gen.decoders.checkpoint import load_decoder, save_decoder, save_flux, save_vae
from nexus_gen.decoders.decoders import build_generation_decoder
from nexus_gen.flux.text_encoders import encode_pooled
from nexus_gen.flux.transformer import FluxTransformer
from nexus_gen.flux.vae import FluxVae
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import FluxGeometry, VaeGeometry
from train.decoders import stage as decoder_stages
from train.decoders.engine import Averaging, FitResult, StepGuard, StopRequest, deepspeed_config
from train.decoders.module import DecoderModule
from train.decoders.stage import build_initial_decoder
from train.preflight.stage import preflight
from train.runs.checkpoints import checkpoint_step, complete_checkpoints
from train.runs.directory import identity, prepare
from train.schemas.common import AverageConfig, HeldoutConfig, SamplesConfig
from train.schemas.decoders import DecoderConfig
from train.schemas.fields import typed
from train.steps.average import WeightAverage
from train.steps.metrics import latest, read_metrics

FLUX = FluxGeometry(32, 2, 1, 2, 24, 16, [4, 6, 6], 16, 2)
VAE = VaeGeometry([8, 16], 1, 4, 16)
EMBED_DIM = 20
LATENTS = (16, 8, 8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1-dev/, qwen/ and shards/ of the smallest kind."""
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    save_flux(FluxTransformer(FLUX), root / "FLUX.1-dev" / "flux1-dev.safetensors")
    vocabulary = {"a": 0, "a</w>": 1, "<|startoftext|>": 2, "<|endoftext|>": 3}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77).save_pretrained(root / "FLUX.1-dev" / "tokenizer")
    clip = CLIPTextConfig(
        vocab_size=4, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=2
    )
    CLIPTextModel(clip).save_pretrained(root / "FLUX.1-dev" / "text_encoder")
    tiny_qwen.write_checkpoint(root / "qwen")
    write_shards(root / "shards")
    save_vae(FluxVae(VAE), root / "FLUX.1-dev" / "ae.safetensors")
    return root


def write_shards(directory: Path) -> None:
    """Ten samples to train on, and four others."""
    samples = [
        (
            f"{index:09d}",
            {"target_embeds": torch.randn(81, EMBED_DIM), "latents": torch.randn(LATENTS)},
            {"index": index},
        )
        for index in range(14)
    ]
    for split, own in (("train", samples[:10]), ("heldout", samples[10:])):
        (directory / split).mkdir(parents=True)
        write_shard(directory / split / "000000.tar", own)
    details = {
        "spec": dataclasses.asdict(ShardSpec(81, 0, EMBED_DIM, list(LATENTS), "float32", "encoder")),
        "splits": {
            "train": [{"file": "train/000000.tar", "samples": 10}],
            "heldout": [{"file": "heldout/000000.tar", "samples": 4}],
        },
    }
    seal(directory, Manifest("embedding_shards", "embed_generation", {}, {}, {}, details))


def config(inputs: Path, runs_dir: Path, stage: str = "generation_decoder", decoder: str = "") -> DecoderConfig:
    model: dict[str, Any] = {
        "transformer": dataclasses.asdict(FLUX),
        "vae": dataclasses.asdict(VAE),
        "image_size": 16,
        "flux": str(inputs / "FLUX.1-dev"),
    }
    own: dict[str, dict[str, Any]] = {"init": {}, "objective": {"predicted_fraction": 0.0}}
    if stage == "editing_decoder":
        model["qwen"] = str(inputs / "qwen")
        own = {"init": {"projector": "qwen"}, "objective": {"reference": True, "round_positions": False}}
    values = {
        "stage": stage,
        "name": "test",
        "runs_dir": str(runs_dir),
        "seed": 3,
        "resume": True,
        "shards": str(inputs / "shards"),
        "init": {"decoder": decoder, "transformer": "", **own["init"]},
        "average": {"decay": 0.0, "export": "raw", "initial": 0.0},
        "heldout": {"every_steps": 2, "num_samples": 3},
        "samples": {"every_steps": 0, "num_pictures": 2},
        "model": model,
        "objective": {
            "timesteps": "per_sample",
            "density": "uniform",
            "shift": 3.0,
            "weighting": "published",
            "condition_dropout": 0.0,
            "guidance": 3.5,
            **own["objective"],
        },
        "sampling": {"num_inference_steps": 2, "cfg_scale": 1.0, "embedded_guidance": 3.5},
        "optim": {
            "name": "adamw",
            "learning_rate": 1e-2,
            "weight_decay": 0.01,
            "betas": [0.9, 0.95],
            "warmup_steps": 2,
            "schedule": "cosine",
            "max_grad_norm": 0.1,
        },
        "trainer": {
            "precision": "float32",
            "zero_stage": 0,  # where DeepSpeed needs mends; the other stages are compared in tests/test_distributed.py
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "max_steps": 5,
            "gradient_checkpointing": False,
            "checkpoint_every_steps": 2,
            "keep_checkpoints": 2,
            "log_every_steps": 1,
            "num_workers": 0,
        },
        "launch": {
            "kind": "local",
            "num_nodes": 1,
            "processes_per_node": 1,
            "device": "cpu",
            "threads_per_process": 1,
            "rendezvous": "",
            "timeout_minutes": 0,
            "partition": "",
        },
        "logger": {"tensorboard": False, "wandb_mode": "disabled", "wandb_project": ""},
    }
    made = typed(stage, values)
    assert isinstance(made, DecoderConfig)
    return made


def train_plainly(config: DecoderConfig, longer: int = 0) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """Ordinary PyTorch on the stage's model and batches: the weights, and every step's loss and gradient norm.

    longer: steps to go on to behind the last one, under a cosine that is as long.
    """
    trainer = config.trainer
    module = DecoderModule(
        build_initial_decoder(config, EMBED_DIM),
        encode_pooled(config.model.flux, "", torch.float32),
        config.objective,
        config.optim,
        seed=config.seed,
        max_steps=trainer.max_steps,
        gradient_checkpointing=False,
    )
    loader = ShardLoader(
        config.shards,
        "train",
        micro_batch_size=trainer.global_batch_size,
        accumulation=1,
        rank=0,
        world_size=1,
        seed=config.seed,
        num_workers=0,
    )
    configured = module.configure_optimizers()
    losses, norms = [], []
    for step, batch in enumerate(islice(loader, longer or trainer.max_steps)):
        if step >= trainer.max_steps:
            done = (step - config.optim.warmup_steps) / (longer - config.optim.warmup_steps)
            rate = config.optim.learning_rate * math.cos(math.pi / 2 * done) ** 2
            configured["optimizer"].param_groups[0]["lr"] = rate
        loss = module.training_step(module.draws(batch), 0)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.max_grad_norm).item())
        configured["optimizer"].step()
        configured["optimizer"].zero_grad()
        configured["lr_scheduler"]["scheduler"].step()
        losses.append(loss.item())
    return dict(module.decoder.state_dict()), losses, norms


@pytest.mark.slow
def test_a_stage_trains_as_a_plain_loop_does_and_writes_its_artifact(inputs: Path, tmp_path: Path) -> None:
    made = config(inputs, tmp_path)
    slurm = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "5", "SLURM_JOB_NAME": "job"}  # to be ignored
    subprocess.run(
        worker_command(made.launch, prepare(made, identity(made))),
        env={**os.environ, **slurm, **worker_environment(made.launch)},
        check=True,
        timeout=300,
    )
    manifest = verify(made.artifact_dir)
    assert manifest.kind == "generation_decoder"
    assert manifest.details["embed_dim"] == EMBED_DIM
    assert FluxGeometry(**manifest.details["transformer"]) == FLUX
    weights, losses, norms = train_plainly(made)
    rows = [row for row in read_metrics(made.run_dir) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    assert [row["train/grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-4)
    assert rows[0]["train/lr"] == pytest.approx(5e-3)
    assert manifest.details["metrics"]["train/loss"] == rows[-1]["train/loss"]
    trained = build_generation_decoder(FLUX, EMBED_DIM)
    load_decoder(trained, made.artifact_dir / "generation_decoder.safetensors")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5, msg=name)
    checkpoints = complete_checkpoints(made.run_dir / "checkpoints")
    assert [checkpoint_step(path) for path in checkpoints] == [4, 5]
    # With the newest checkpoint damaged, the stage trains on from the one before it and makes the same weights.
    shutil.rmtree(made.artifact_dir)
    largest = max((path for path in checkpoints[-1].rglob("*.pt")), key=lambda path: path.stat().st_size)
    os.truncate(largest, 100)
    again = subprocess.run(
        worker_command(made.launch, prepare(made, identity(made))),
        env={**os.environ, **worker_environment(made.launch)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert again.returncode == 0 and "Traceback" not in again.stderr, again.stderr
    assert f"{checkpoints[-1]} is damaged" in again.stderr and "repeats 1 step\n" in again.stderr
    load_decoder(trained, made.artifact_dir / "generation_decoder.safetensors")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5, msg=name)
    assert sorted(path.name for path in (made.run_dir / "checkpoints").glob("*step_*")) == [
        path.name for path in checkpoints
    ]
    # With more steps, it trains on from its end.
    made = dataclasses.replace(made, trainer=dataclasses.replace(made.trainer, max_steps=8))
    subprocess.run(
        worker_command(made.launch, prepare(made, identity(made))),
        env={**os.environ, **worker_environment(made.launch)},
        check=True,
        timeout=300,
    )
    weights, losses, _ = train_plainly(config(inputs, tmp_path), longer=8)
    rows = [row for row in read_metrics(made.run_dir) if "train/loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["train/loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    load_decoder(trained, made.artifact_dir / "generation_decoder.safetensors")
    for name, tensor in trained.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("export", ["average", "raw"])
def test_a_stage_exports_the_weights_of_its_choice_and_measures_those(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, process_group: None, export: str
) -> None:
    """Training is a step that adds 0.01 to every weight; of the average, a tenth is the start then."""
    own = {
        "average": AverageConfig(0.9, export, 0.0),
        "samples": SamplesConfig(0, 0),
        "heldout": HeldoutConfig(every_steps=0, num_samples=2),
    }
    made = dataclasses.replace(config(inputs, tmp_path), **own)
    made.objective.predicted_fraction = 0.25
    prepare(made, identity(made))

    def fit(module: Any, loader: Any, trainer: Any, optim: Any, metrics: Any, *others: Any) -> FitResult:
        *_, (monitor,), _, average = others
        assert (loader.dataset.paths[0].parent.name, loader.dataset.predicted_fraction) == ("train", 0.25)
        assert (loader.micro_batch_size, loader.accumulation, loader.seed, loader.rank) == (2, 2, 3, 0)
        assert (module.draws, module.max_steps, module.objective) == (loader.prepare, 5, made.objective)
        assert (module.draws.seed, module.optim) == (3, made.optim)
        if average is not None:
            average.start()
        with torch.no_grad():
            for parameter in module.decoder.parameters():
                parameter.add_(0.01)
        if average is not None:
            average.update()
        step = SimpleNamespace(accumulate_grad_batches=1, global_step=trainer.max_steps)
        monitor.on_train_batch_end(step, module, None, None, 0)
        metrics.close()
        return FitResult(True, {"train/loss": 2.0, "perf/samples_per_s": 7.0})

    monkeypatch.setattr(decoder_stages, "fit", fit)
    assert decoder_stages.GenerationDecoderStage(made).run()
    moved = 0.009 if export == "average" else 0.01
    exported = build_generation_decoder(FLUX, EMBED_DIM)
    load_decoder(exported, made.artifact_dir / "generation_decoder.safetensors")
    start = build_initial_decoder(made, EMBED_DIM).state_dict()
    for name, tensor in exported.state_dict().items():
        torch.testing.assert_close(tensor - start[name], torch.full_like(tensor, moved), rtol=0, atol=1e-6, msg=name)
    details = verify(made.artifact_dir).details
    heldout = {name: value for name, value in details["metrics"].items() if name.startswith("heldout/")}
    assert heldout == latest(made.run_dir, "heldout/")
    assert heldout["heldout/loss"] == pytest.approx(heldout_by_hand(exported, made), rel=1e-5)
    assert {name: details["metrics"][name] for name in details["metrics"].keys() - heldout} == {"train/loss": 2.0}
    assert details["steps"] == 5 and details["sampling"] == dataclasses.asdict(made.sampling)


def test_half_written_checkpoints_are_not_resumed(tmp_path: Path) -> None:
    assert complete_checkpoints(tmp_path) == []
    for name in ("step_00000100", "step_00000020", "step_00000200.partial", "step_00000100.bak", "step_copy"):
        (tmp_path / name).mkdir()
    assert [checkpoint_step(path) for path in complete_checkpoints(tmp_path)] == [20, 100]


@pytest.fixture
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def guard():
    before = signal.getsignal(signal.SIGTERM)
    yield StepGuard(StopRequest())
    signal.signal(signal.SIGTERM, before)


class Summing(pl.LightningModule):
    loss_sum: Tensor | float = 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_optimizer(
    process_group: None, guard: StepGuard, bad: float
) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, accumulate_grad_batches=2)
    module = Summing()
    module.loss_sum = torch.tensor(bad)
    guard.on_before_optimizer_step(trainer, module, None)  # not yet: one micro batch of two
    with pytest.raises(UserError, match=rf"the loss of step 1 is {bad}; .* before the optimizer"):
        guard.on_before_optimizer_step(trainer, module, None)


def test_the_guard_averages_micro_batches_and_passes_a_sigterm_on(process_group: None, guard: StepGuard) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, accumulate_grad_batches=2)
    module = Summing()
    for stop in (False, True):
        if stop:
            os.kill(os.getpid(), signal.SIGTERM)
        module.loss_sum = torch.tensor(3.0)
        guard.on_before_optimizer_step(trainer, module, None)
        guard.on_before_optimizer_step(trainer, module, None)
        assert guard.loss == 1.5
        assert module.loss_sum == 0
        assert guard.stopping is stop


def test_the_loss_of_a_step_is_the_mean_over_micro_batches_and_processes(
    process_group: None, guard: StepGuard, monkeypatch: pytest.MonkeyPatch
) -> None:
    other: Any = torch.tensor([8.0, 1.0])  # the sum of another process, which was told to stop
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda facts: facts.add_(other))
    trainer: Any = SimpleNamespace(accumulate_grad_batches=2, world_size=2, global_step=0)
    module = Summing()
    module.loss_sum = torch.tensor(3.0)
    guard.on_before_optimizer_step(trainer, module, None)
    assert math.isnan(guard.loss)
    guard.on_before_optimizer_step(trainer, module, None)
    assert guard.loss == (3 + 8) / 4 and guard.stopping
    other.fill_(math.inf)
    with pytest.raises(UserError, match="the loss of step 1 is inf"):
        for _ in range(2):
            module.loss_sum = torch.tensor(3.0)
            guard.on_before_optimizer_step(trainer, module, None)


def test_the_average_follows_steps_and_not_micro_batches(process_group: None, tmp_path: Path) -> None:
    """By hand: decays of 1/10 and 2/11; from the checkpoint's average, where there is one."""
    module = torch.nn.Linear(1, 1, bias=False)
    trainer: Any = SimpleNamespace(accumulate_grad_batches=2)
    module.weight.data.fill_(1.0)
    average = WeightAverage(module, 0.9, 0, 1)
    averaging: Any = Averaging(average, None)
    averaging.on_train_start(trainer, None)
    for number, weight in enumerate((5.0, 2.0)):
        module.weight.data.fill_(weight)
        averaging.on_train_batch_end(trainer, None, None, None, number)
    average.save(tmp_path)
    assert float(average.gather()["weight"]) == pytest.approx(0.1 * 1 + 0.9 * 2)
    resumed = WeightAverage(module, 0.9, 0, 1)
    averaging = Averaging(resumed, tmp_path)
    averaging.on_train_start(trainer, None)
    for number, weight in enumerate((7.0, 4.0), start=2):
        module.weight.data.fill_(weight)
        averaging.on_train_batch_end(trainer, None, None, None, number)
    assert float(resumed.gather()["weight"]) == pytest.approx(1.9 * 2 / 11 + 4 * 9 / 11)


def test_bfloat16_at_stage_0_starts_without_a_step(
    process_group: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    assert not any(tmp_path.iterdir())  # nothing was compiled
    model = torch.nn.Linear(4, 4)
    before = model.weight.detach().bfloat16().float()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, weight_decay=0.5)
    config = {"train_micro_batch_size_per_gpu": 1, "bf16": {"enabled": True}, "zero_optimization": {"stage": 0}}
    engine, wrapped, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    masters = [tensor for group in wrapped.optimizer.param_groups for tensor in group["params"]]
    assert not any("step" in state for state in wrapped.optimizer.state.values())
    assert torch.equal(engine.module.weight.float(), before)
    assert sum(float(tensor.detach().square().sum()) for tensor in masters) == pytest.approx(
        float(before.square().sum() + engine.module.bias.detach().float().square().sum()), rel=1e-5
    )


def test_buckets_are_no_larger_than_the_model(inputs: Path, tmp_path: Path) -> None:
    trainer = dataclasses.replace(config(inputs, tmp_path).trainer, zero_stage=3)
    zero = deepspeed_config(trainer, num_parameters=1000, device_type="cpu")["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["reduce_bucket_size"] == 1000
    assert deepspeed_config(trainer, 12_000_000_000, "cuda")["zero_optimization"]["reduce_bucket_size"] < 10**9


def test_initial_decoder_is_flux_and_a_seeded_conditioner(inputs: Path, tmp_path: Path) -> None:
    made = config(inputs, tmp_path)
    random_state = torch.get_rng_state()
    first, second = (build_initial_decoder(made, EMBED_DIM).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    flux = load_file(inputs / "FLUX.1-dev" / "flux1-dev.safetensors")
    assert torch.equal(first["transformer.x_embedder.weight"], flux["img_in.weight"])
    other = build_initial_decoder(dataclasses.replace(made, seed=4), EMBED_DIM).state_dict()
    assert not torch.equal(first["adapter.0.weight"], other["adapter.0.weight"])
    assert torch.equal(first["transformer.x_embedder.weight"], other["transformer.x_embedder.weight"])


def test_editing_decoder_starts_from_the_first_layer_of_qwen(inputs: Path, tmp_path: Path) -> None:
    made = config(inputs, tmp_path, "editing_decoder")
    width = json.loads((inputs / "qwen" / "config.json").read_text())["hidden_size"]
    decoder = build_initial_decoder(made, width)
    qwen = load_file(inputs / "qwen" / "model.safetensors")
    layer = decoder.embedding_merger.layers[0].state_dict()
    assert all(torch.equal(tensor, qwen[f"model.layers.0.{name}"]) for name, tensor in layer.items())
    with pytest.raises(UserError, match=f"width {width + 1} and model.qwen .* is {width} wide"):
        build_initial_decoder(made, width + 1)


@pytest.mark.parametrize("where", ["decoder.bin", "artifact/generation_decoder.safetensors"])
def test_initial_decoder_goes_on_from_a_decoder_file_or_directory(inputs: Path, tmp_path: Path, where: str) -> None:
    torch.manual_seed(1)
    earlier = build_generation_decoder(FLUX, EMBED_DIM)
    save_decoder(earlier, tmp_path / where)
    given = tmp_path / where if where.endswith(".bin") else tmp_path / "artifact"
    decoder = build_initial_decoder(config(inputs, tmp_path, decoder=str(given)), EMBED_DIM)
    for name, tensor in earlier.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], tensor), name


def test_a_directory_without_a_decoder_is_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"init.decoder: .* holds no generation_decoder.safetensors"):
        build_initial_decoder(config(inputs, tmp_path, decoder=str(tmp_path)), EMBED_DIM)


def test_a_decoder_of_another_geometry_is_refused_before_anything_starts(inputs: Path, tmp_path: Path, caplog) -> None:
    """Heads and rotary axes leave no trace in the weights, so the manifest of the file's artifact has to be read."""
    artifact = tmp_path / "artifact"
    save_decoder(build_generation_decoder(FLUX, EMBED_DIM), artifact / "generation_decoder.safetensors")
    details = {"transformer": dataclasses.asdict(FLUX), "vae": dataclasses.asdict(VAE)}
    seal(artifact, Manifest("generation_decoder", "generation_decoder", {}, {}, {}, details))
    given = artifact / "generation_decoder.safetensors"
    made = config(inputs, tmp_path, decoder=str(given))
    preflight(made)
    made.model.transformer.rope_axes_dim = [6, 6, 4]
    with pytest.raises(UserError, match=r"init.decoder: .*rope_axes_dim \[4, 6, 6\] and this config gives \[6, 6, 4\]"):
        preflight(made)
    made.init.decoder, made.init.transformer = "", str(given)
    with pytest.raises(UserError, match=r"init.transformer: .*rope_axes_dim"):
        preflight(made)
    made = config(inputs, tmp_path, decoder=str(given))
    made.model.vae.norm_groups = 2
    with pytest.raises(UserError, match=r"the vae of .* was trained with norm_groups 4"):
        preflight(made)
    seal(artifact, Manifest("editing_decoder", "editing_decoder", {}, {}, {}, details))
    with pytest.raises(UserError, match="editing_decoder artifact where a generation_decoder artifact is needed"):
        preflight(made)
