"""How long a training stage trains: the keys that say so, and what follows for it when they alone have changed.

A stage whose config says another length than its checkpoints' goes on from the last of these, finished or not: the
learning rate follows the new plan from that step on, and rows come as if training had never ended.
"""

import copy
import json
from pathlib import Path
from typing import Any

from nexus_gen.artifacts.artifact import Manifest, digest, write_text_atomic
from nexus_gen.specs.errors import UserError
from train.runs.checkpoints import complete_checkpoints, last_step, tokens_seen

LENGTHS = ("trainer.max_steps", "data.num_epochs", "data.token_budget")  # of which one is in force, the others 0
HISTORY = "history.json"  # among the checkpoints: what they went through that their identity does not say


def length(values: dict[str, Any]) -> tuple[str, float]:
    """The key that says how long a stage trains, and its value, out of the nested values of a config."""
    for key in LENGTHS:
        section, leaf = key.split(".")
        if number := values.get(section, {}).get(leaf):
            return key, number
    raise AssertionError("every training stage has a length")


def without_length(values: dict[str, Any]) -> dict[str, Any]:
    """Nested values of a config but for those keys."""
    kept = copy.deepcopy(values)
    for key in LENGTHS:
        section, leaf = key.split(".")
        kept.get(section, {}).pop(leaf, None)
    return kept


def in_words(values: dict[str, Any], unit: bool = False) -> str:
    """`700`, or `700 steps` with its unit; epochs and tokens are always named."""
    key, number = length(values)
    if key == "trainer.max_steps":
        return f"{number} steps" if unit else str(number)
    return f"{number:g} epochs" if key == "data.num_epochs" else f"{number} tokens"


def refuse_shorter(stage: str, checkpoints: Path, values: dict[str, Any], trained: dict[str, Any]) -> None:
    """UserError when more is done than `values` ask for.

    trained: the values of the finished try whose checkpoints are gone; empty where the checkpoints say what is done.
    Epochs are counted by the stage itself, which knows the rows.
    """
    key, wanted = length(values)
    done = 0.0
    if trained and length(trained)[0] == key:
        done = length(trained)[1]
    elif not trained and key == "trainer.max_steps":
        done = last_step(checkpoints)
    elif not trained and key == "data.token_budget":
        done = tokens_seen(complete_checkpoints(checkpoints)[-1])
    if done > wanted:
        raise UserError(shorter(stage, key, wanted, done))


def shorter(stage: str, key: str, wanted: float, done: float) -> str:
    unit = {"trainer.max_steps": "steps", "data.num_epochs": "epochs", "data.token_budget": "tokens"}[key]
    return (
        f"{stage}: {key} is {wanted:g} and {done:g} {unit} are done; give more to train on from there, "
        f"resume=false to start over with {wanted:g}, or another name=..."
    )


# ---- what checkpoints went through ----------------------------------------------------------------------------------


def read_history(checkpoints: Path) -> dict[str, Any]:
    """rows: a digest of the rows that a decoder was trained on, in their order. continued: a list of {"step", "was"},
    the values and inputs of the training before that step that were others than those of now.
    """
    try:
        found = json.loads((checkpoints / HISTORY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def continued(checkpoints: Path) -> dict[str, Any]:
    """What an artifact says of the parts that it was trained in; nothing where there is one part alone."""
    return {key: found for key, found in read_history(checkpoints).items() if key == "continued"}


def rows_of(shards: str) -> str:
    """A digest of the rows in an embedding stage's training shards, in their order, whichever model embedded them.

    A decoder that has seen half of them may see the other half in shards of the same digest.
    """
    manifest = Manifest.load(shards)
    datasets = {role: found for role, found in manifest.inputs.items() if role.startswith(("data.", "pictures."))}
    sizes = [shard["samples"] for shard in manifest.details["splits"]["train"]]
    return digest([datasets, sizes, manifest.config])


def write_history(checkpoints: Path, rows: str, continued: list[dict[str, Any]]) -> None:
    facts = {**({"rows": rows} if rows else {}), **({"continued": continued} if continued else {})}
    write_text_atomic(checkpoints / HISTORY, json.dumps(facts, indent=1))
