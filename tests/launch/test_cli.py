"""The console script as a user meets it: in its own process, with its exit status and its one sentence."""

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from nexus_gen.parts.models import SHIPPED_RUN

NEXUS_GEN = str(Path(sys.executable).parent / "nexus-gen")
FULL_SIZE = {
    "pretrain": ["experiment=nexus_gen_7b_pretrain", "data.train=t.jsonl", "data.heldout=h.jsonl"],
    "generation_decoder": ["experiment=flux_generation_decoder", "shards=s"],
    "editing_decoder": ["experiment=flux_editing_decoder", "shards=s"],
}


def nexus_gen(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [NEXUS_GEN, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **environment},
        timeout=60,
    )


def test_help_lists_every_command() -> None:
    shown = nexus_gen("--help")
    assert shown.returncode == 0
    for command in ("run", "data shapes", "data check", "understand", "generate", "edit", "evaluate", "report"):
        assert f"  {command} " in shown.stdout
    for arguments in (["shards"], ["shards", "--help"]):
        lines = nexus_gen(*arguments).stdout.splitlines()
        assert [line.split()[1] for line in lines[2:]] == ["verify", "repair", "stats", "show"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["data", "check", "--help"],
        ["generate", "--help"],
        ["ui", "--help"],
        ["evaluate", "--help"],
        ["evaluate", "choices", "--help"],
        ["ablate", "--help"],
        ["ablate", "plot", "--help"],
        ["run", "stage=pretrain", "trainer.max_step=1"],
    ],
)
def test_help_and_config_errors_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from launch.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'transformers', 'safetensors', 'gradio'} & set(sys.modules), 'heavy import'"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["rum"], "no command 'rum'; did you mean 'run'?"),
        (["run"], "give one of stage=... and pipeline=..."),
        (["run", "stage=prtrain"], "there is no stage=prtrain; did you mean 'pretrain'?"),
        (["run", "pipeline=tinny"], "there is no pipeline=tinny; did you mean 'tiny'?"),
        (["run", "stage=pretrain", "trainer.max_step=3"], "'trainer.max_step'; did you mean 'trainer.max_steps'?"),
        (["run", "stage=pretrain", "+trainer.foo=3"], "stage=pretrain has no key 'trainer.foo'"),
        (["run", "stage=pretrain", "trainer.max_steps=many"], "trainer.max_steps: Value 'many'"),
        (["run", "stage=pretrain", "model.image_size=96"], "model.image_size has no effect on stage=pretrain"),
        (["run", "stage=pretrain", "optim=adamm"], "there is no optim=adamm; did you mean 'adamw'?"),
        (["run", "stage=pretrain", "trainer.global_batch_size=7"], "global_batch_size 7 is not a multiple"),
        (["run", "stage=pretrain", "trainer.max_steps"], "'trainer.max_steps' is not key=value"),
        (
            ["run", "stage=pretrain", "data.num_epochs=2"],
            "data.num_epochs is 2, data.token_budget 0 and trainer.max_steps 800; one of them",
        ),
        (
            ["run", "stage=pretrain", "data.token_budget=90000", "data.num_epochs=1", "trainer.max_steps=0"],
            "data.num_epochs is 1, data.token_budget 90000 and trainer.max_steps 0; one of them",
        ),
        (["run", "stage=pretrain", "trainer.max_steps=0"], "trainer.max_steps 0; one of them says how long to train"),
        (["run", "stage=pretrain", "data=messages"], "needs data.train=..."),
        (["run", "stage=pretrain", "data.quarantine=a.jsonl"], "data.quarantine takes a list: data.quarantine=[A,B]"),
        (
            ["run", "stage=pretrain", "model.num_target_tokens=80"],
            "model.num_target_tokens: a target image of 80 tokens is no square of them; 64 and 81 would do",
        ),
        (
            ["run", "stage=embed_generation", "model.num_target_tokens=49"],
            "model.num_target_tokens has no effect on stage=embed_generation",
        ),
        (["run", "stage=pretrain", "from=embed_generation"], "from=... goes with pipeline=..."),
        (["run", "pipeline=tiny", "from=embed"], "from=embed is not a stage of pipeline=tiny"),
        (["run", "pipeline=tiny", "trainer.max_step=3"], "no stage of pipeline=tiny has the key 'trainer.max_step'"),
        (["run", "stage=pretrain", "launch.kind=lokal"], "launch.kind is 'lokal'"),
        (["run", "stage=shapes", "name="], "name is empty; a run is called something"),
        (["run", "~stage"], "'~stage' takes a key away, and every stage needs its keys"),
        (["run", "stage=pretrain", "data=1"], "'data=1' names no file of configs/data/; valid: messages, shapes"),
        (["run", "stage=shapes", "runs_dir=/dev/null"], "/dev/null/tiny/shapes/log: Not a directory; fix that"),
        (["generate", "--prompt", "x", "--seed", f"{1 << 70}"], "it must be 9223372036854775807 at most"),
        (["data", "check", "x.jsonl", "--report", "."], "--report . is a directory; give the file to write"),
        (["run", "stage=pretrain", "launch.partition=gpu"], "launch.partition has no effect with launch.kind local"),
        (["run", "stage=shapes", "shapes.num_colours=2"], "shapes.num_colours is 2; it must be from 3 to 8"),
        (["ablate", "target_inputs", "--run", str(SHIPPED_RUN)], "what ships lacks what training reads: give --run"),
        (["generate", "--prompt", "x", "--run", "nowhere"], "nowhere is not a run directory"),
        (["understand", "--prompt", "x", "--input-image", "no.png"], "--input-image no.png does not exist"),
        (["report", "nowhere"], "nowhere is not a run directory"),
        (["report", ".", "--num-samples", "-1"], "--num-samples is -1; it must be 0 or more"),
        (["evaluate", "nowhere"], "nowhere is not a run directory"),
        (["ablate", "refrence"], "there is no ablation 'refrence'; did you mean 'reference'?"),
        (["ablate", "trainer.max_steps=3"], "name an ablation: conditioning, "),
        (["ablate", "reference", "--run", "nowhere"], "nowhere is not a run directory"),
        (["ablate", "reference", "--run", ".", "objective.reference=true"], "differ in objective.reference; leave it"),
        (["ablate", "reference", "--run", ".", "seed=3"], "arms have seed from --seeds"),
        (["ablate", "reference", "--run", ".", "trainer.max_step=3"], "no stage of ablation reference has the key"),
        (["ablate", "all", "--run", ".", "trainer.max_steps=3"], "does not exist; finish stage=embed_generation of"),
        (["ablate", "plot", "x.json"], "x.json is neither a result"),
        (["run", "stage=pretrain", "seed=-1"], "seed is -1; it must be 0 or more"),
        (["run", "stage=pretrain", "trainer.num_workers=-1"], "trainer.num_workers is -1; it must be 0 or more"),
        (["run", "stage=pretrain", "objective.cosine_fraction=2"], "objective.cosine_fraction is 2.0; it is a share"),
        (["run", "stage=standins", "standins.vae_steps=0"], "standins.vae_steps is 0; it must be above 0"),
        (
            ["run", "stage=generation_decoder", "sampling.num_inference_steps=0"],
            "sampling.num_inference_steps is 0; it must be above 0",
        ),
        (["evaluate", "geneval", ".", "--prompts", "no.txt", "--output", "o"], "no.txt cannot be read"),
    ],
)
def test_mistakes_give_one_sentence(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    ran = nexus_gen(*arguments, cwd=tmp_path)
    assert ran.returncode == 2
    assert sentence in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1, ran.stderr


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("nexus-gen ge", ["generate "]),
        ("nexus-gen data ", ["check ", "shapes "]),
        ("nexus-gen ablate ref", ["reference "]),
        ("nexus-gen run sta", ["stage="]),
        ("nexus-gen run abla", []),
        ("nexus-gen run stage=edi", ["stage=editing_decoder "]),
        ("nexus-gen run stage=pretrain trainer.max", ["trainer.max_steps="]),
        ("nexus-gen run stage=pretrain launch=s", ["launch=slurm "]),
        ("nexus-gen run stage=shapes trainer.max", []),
        ("nexus-gen run --dry-run 'name=my run' stage=pretrain optim.l", ["optim.learning_rate="]),
        ("nexus-gen run stage=pretrain pretrain.optim=tiny_p", ["pretrain.optim=tiny_pretrain "]),
        ("nexus-gen run pipeline=fine", ["pipeline=finetune "]),
        ("nexus-gen run pipeline=finetune from=embed", ["from=embed_generation ", "from=embed_editing "]),
        ("nexus-gen run pipeline=finetune embed_editing.data.tr", ["embed_editing.data.train="]),
    ],
)
def test_tab_completion(line: str, completions: list[str]) -> None:
    assert nexus_gen("completion", "--for", line).stdout.split("\n")[:-1] == (completions or [""])
    shell = f"source <({NEXUS_GEN} completion); PATH={Path(NEXUS_GEN).parent}:$PATH; complete -p nexus-gen"
    assert subprocess.run(["bash", "-c", shell], capture_output=True).returncode == 0


def test_paths_complete_as_they_are_typed(tmp_path: Path) -> None:
    for name in ("my rows", "it's", "a=b,c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "$x 数据.jsonl").touch()
    script = f"""source <({NEXUS_GEN} completion); PATH={Path(NEXUS_GEN).parent}:$PATH; compopt() {{ :; }}
    for typed in 'data.train=my' 'data.train=my\\ rows/' "data.train=it\\\\'s/" pretrain.data.train=a=b,c/ name=my; do
      COMP_LINE="nexus-gen run stage=pretrain $typed"; COMP_POINT=${{#COMP_LINE}}; _nexus_gen
      printf '%s\\n' "${{COMPREPLY[0]}}"
    done"""
    ran = subprocess.run(["bash", "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert ran.stdout.splitlines() == [
        "data.train=my\\ rows/",
        "data.train=my\\ rows/\\$x\\ 数据.jsonl ",
        "data.train=it\\'s/\\$x\\ 数据.jsonl ",
        "pretrain.data.train=a=b,c/\\$x\\ 数据.jsonl ",
        "",
    ], ran.stderr
    assert ran.returncode == 0


def test_a_misspelt_variable_is_an_error(tmp_path: Path) -> None:
    ran = nexus_gen("report", "x", cwd=tmp_path, NEXUS_GEN_RUN="elsewhere")
    assert ran.returncode == 2
    assert "NEXUS_GEN_RUN is not one that nexus-gen reads; did you mean 'NEXUS_GEN_RUNS'?" in ran.stderr


def test_runs_are_written_where_the_variable_says(tmp_path: Path) -> None:
    ran = nexus_gen("run", "stage=shapes", "--dry-run", cwd=tmp_path, NEXUS_GEN_RUNS=str(tmp_path / "there"))
    assert f"stage shapes -> {tmp_path / 'there' / 'tiny' / 'shapes'}" in ran.stdout


def test_a_missing_input_names_the_stage_that_makes_it(tmp_path: Path) -> None:
    ran = nexus_gen("run", "stage=generation_decoder", cwd=tmp_path)
    assert ran.returncode == 2
    assert "embed_generation/artifact does not exist; run stage=embed_generation first" in ran.stderr
    assert not (tmp_path / "runs" / "tiny" / "generation_decoder").exists()


def test_a_checkpoint_that_makes_pictures_of_another_number_of_tokens_is_refused(tmp_path: Path) -> None:
    data = [f"data.{split}={SHIPPED_RUN}/shapes/artifact/heldout.jsonl" for split in ("train", "heldout")]
    start = ["run", "stage=pretrain", f"model.qwen={SHIPPED_RUN}/pretrain/artifact", "model.num_target_tokens=49"]
    ran = nexus_gen(*start, *data, cwd=tmp_path)
    assert ran.returncode == 2 and len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    assert "model.num_target_tokens is 49 and model.qwen" in ran.stderr
    assert "makes pictures of 81 tokens; give model.num_target_tokens=81, or begin with a plain" in ran.stderr


def test_a_dataset_row_with_too_few_images_is_refused_before_anything_starts(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    messages = [{"role": "user", "content": "<image> what?"}, {"role": "assistant", "content": "a circle"}]
    rows.write_text(json.dumps({"id": "1", "images": [], "messages": messages}) + "\n")
    (tmp_path / "qwen").mkdir()
    (tmp_path / "qwen" / "config.json").write_text('{"model_type": "qwen2_5_vl"}')
    data = ["data=messages", f"data.train={rows}", f"data.heldout={rows}"]
    ran = nexus_gen("run", "stage=pretrain", *data, f"model.qwen={tmp_path}/qwen", cwd=tmp_path)
    assert ran.returncode == 2
    assert "rows.jsonl:1" in ran.stderr
    assert len(ran.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("plan", "num_editing", "sentence"),
    [
        ("demo", 0, "rows.jsonl holds no editing rows (it has {'generation': 8}); stage=embed_editing needs some"),
        (
            "finetune",
            1,
            "rows.jsonl (editing rows and rehearsal) holds 2 train samples, fewer than one global batch of 8;",
        ),
    ],
)
def test_rows_that_a_later_stage_cannot_use_are_refused_before_the_first_one_starts(
    plan: str, num_editing: int, sentence: str, tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    painted = {"role": "assistant", "content": "<image>"}
    drawn = {"images": ["a.png"], "messages": [{"role": "user", "content": "a circle"}, painted]}
    edited = {"images": ["a.png"] * 2, "messages": [{"role": "user", "content": "<image> make it red"}, painted]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in [drawn] * 8 + [edited] * num_editing))
    data = [f"data.train={rows}", f"data.heldout={rows}", "trainer.micro_batch_size=4", "trainer.global_batch_size=8"]
    place = ["name=mine", f"runs_dir={tmp_path}/runs"]
    ran = nexus_gen("run", f"pipeline={plan}", *place, *data, cwd=SHIPPED_RUN.parents[1])
    assert ran.returncode == 2 and len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    assert sentence in ran.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("text", "sentence"), [("{", "is not readable"), ("[]", "holds no JSON object")])
def test_a_damaged_checkpoint_config_is_named_before_anything_starts(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    data = [f"data.{split}={SHIPPED_RUN}/shapes/artifact/heldout.jsonl" for split in ("train", "heldout")]
    ran = nexus_gen("run", "stage=pretrain", f"model.qwen={tmp_path}", *data, cwd=tmp_path)
    assert ran.returncode == 2 and len(ran.stderr.strip().splitlines()) == 1, ran.stderr
    assert f"{tmp_path}/config.json {sentence}" in ran.stderr


@pytest.mark.parametrize("stage", FULL_SIZE)
@pytest.mark.parametrize(
    ("launch", "world_size"),
    [
        (["launch.device=cuda"], 1),
        (["launch.processes_per_node=8"], 8),
        (["launch=torchrun", "launch.rendezvous=node0:29500"], 64),
        (["launch=slurm"], 64),
    ],
)
def test_full_size_stages_say_what_would_start(stage: str, launch: list[str], world_size: int, tmp_path: Path) -> None:
    ran = nexus_gen("run", f"stage={stage}", *FULL_SIZE[stage], *launch, "--dry-run", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert f"= {world_size}\n" in ran.stdout
    assert f"128 = 1 per process x {world_size} processes x {128 // world_size} accumulated" in ran.stdout
    assert "train.worker" in ran.stdout
    assert ("#SBATCH --nodes=8" in ran.stdout) == (launch == ["launch=slurm"])
    assert not (tmp_path / "runs").exists()


def test_a_job_starts_in_a_directory_with_a_space(tmp_path: Path) -> None:
    ran = nexus_gen("run", "stage=shapes", "launch=slurm", f"runs_dir={tmp_path}/my runs", "--dry-run", cwd=tmp_path)
    (line,) = [line for line in ran.stdout.splitlines() if "srun" in line]
    assert shlex.split(line)[-1] == f"{tmp_path}/my runs/tiny/shapes/config.yaml" and '"$head":29500' in line


def test_who_reads_may_stop_reading(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ran = subprocess.run([NEXUS_GEN, "--help"], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (128 + signal.SIGPIPE, "")


def test_cfg_prints_the_resolved_config(tmp_path: Path) -> None:
    ran = nexus_gen("run", "stage=pretrain", "trainer.max_steps=7", "--cfg", cwd=tmp_path)
    assert "max_steps: 7" in ran.stdout
    assert f"qwen: {tmp_path}/runs/tiny/standins/artifact/Qwen2.5-VL-Instruct" in ran.stdout
    assert "${" not in ran.stdout
