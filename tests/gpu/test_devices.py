"""Every stage on each number of processes that the machine has GPUs for, with a GPU for each."""

from pathlib import Path

import pytest
import torch
from runs import SMALLEST, TRAINED, losses, nexus_gen, run_arguments, succeed

ON_GPUS = tuple(override for override in SMALLEST if not override.startswith("launch."))
# Sums of another order: pretraining in float32; decoders on embeddings that are computed in bfloat16 on a GPU, where
# batches of another size round otherwise (1.0e-3 on two H100).
TOLERANCES = {"pretrain": 1e-3, "generation_decoder": 1e-2, "editing_decoder": 1e-2}


@pytest.mark.gpu
@pytest.mark.slow
def test_every_stage_on_any_number_of_gpus(tmp_path: Path) -> None:
    """One process on a machine of several GPUs and as many as GPUs: the same losses."""
    found = {}
    for number in range(1, torch.cuda.device_count() + 1):
        if 4 % number:
            continue  # four micro batches of a step are shared out evenly
        run = tmp_path / f"on{number}"
        output = succeed(
            *run_arguments(run, "pipeline=tiny", *ON_GPUS, "launch.device=cuda", f"launch.processes_per_node={number}")
        )
        print(f"{number} of {torch.cuda.device_count()} GPUs:", output.splitlines()[-1])
        found[number] = {stage: losses(run / stage) for stage in TRAINED}
    for number in found:
        for stage in TRAINED:
            for key, value in found[1][stage].items():
                if "loss" in key[1]:
                    assert found[number][stage][key] == pytest.approx(value, rel=TOLERANCES[stage]), (
                        number,
                        stage,
                        key,
                    )


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused_before_anything_starts(tmp_path: Path) -> None:
    number = torch.cuda.device_count() + 1
    batch = ("trainer.micro_batch_size=1", f"trainer.global_batch_size={number}")
    ended = nexus_gen(*run_arguments(tmp_path / "run", "pipeline=tiny", *batch, f"launch.processes_per_node={number}"))
    assert ended.returncode == 2
    assert f"launch.processes_per_node is {number} and torch sees {number - 1} GPU" in ended.stderr
    assert not (tmp_path / "run").exists()
