"""The inputs of every stage, in the order in which missing ones are reported."""

from pathlib import Path

import pytest

from launch.compose import compose_stage
from launch.overrides import Override
from nexus_gen.specs.errors import UserError
from train.preflight.inputs import inputs_of
from train.preflight.stage import preflight
from train.schemas.stage import StageConfig

ROWS = ["data.train", "data.heldout"]
MODELS = ["model.qwen", "model.flux"]
OF_EMBEDDING = ["embed.autoregressive", *ROWS, "model.flux"]


def config(directory: Path, *overrides: str) -> StageConfig:
    return compose_stage([Override.parse(text) for text in (f"runs_dir={directory}", "name=mine", *overrides)])


@pytest.mark.parametrize(
    ("overrides", "roles"),
    [
        (["stage=shapes"], []),
        (["stage=standins"], ["data.train"]),
        (["stage=schedule"], [*MODELS, *ROWS]),
        (["stage=schedule", "schedule.editing_decoder=d"], [*MODELS, "schedule.editing_decoder", *ROWS]),
        (["stage=pretrain", "data.quarantine=[q]"], ["model.qwen", *ROWS, "data.quarantine[0]"]),
        (
            ["stage=pretrain", "data.rehearsal=0.1", "data.rehearsal_rows=r"],
            ["model.qwen", *ROWS, "data.rehearsal_rows"],
        ),
        (["stage=embed_generation"], OF_EMBEDDING),
        (["stage=embed_editing", "embed.latents=false"], OF_EMBEDDING[:-1]),
        (["stage=generation_decoder", "init.transformer=t"], ["shards", "model.flux", "init.transformer"]),
        (["stage=editing_decoder"], ["shards", "model.flux", "model.qwen"]),
        (["stage=editing_decoder", "init.decoder=d"], ["shards", "model.flux", "init.decoder"]),
    ],
)
def test_roles_in_order_and_the_first_missing_one_is_reported(
    overrides: list[str], roles: list[str], tmp_path: Path
) -> None:
    made = config(tmp_path, *overrides)
    assert list(inputs_of(made)) == roles
    if not roles:
        preflight(made)
        return
    with pytest.raises(UserError, match=rf"^{roles[0]}: .* does not exist; run stage=\w+ first, or give another path"):
        preflight(made)


def test_how_a_missing_input_comes_into_being(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, remedy in (
        (f"{tmp_path}/mine/standins/artifact/qwen", "run stage=standins first, or give another path"),
        ("somewhere", "check the path, which begins where the command was started unless it is absolute"),
        ("/somewhere", "check the path"),
    ):
        with pytest.raises(UserError) as error:
            preflight(config(tmp_path, "stage=pretrain", f"model.qwen={given}"))
        assert str(error.value).endswith(f"does not exist; {remedy}")
