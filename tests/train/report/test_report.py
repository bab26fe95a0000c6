"""What the report shows of held-out rows, and what it asks of the models for it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from data.messages.rows import Row, read_rows
from nexus_gen.inference import NexusGen
from nexus_gen.parts.models import SHIPPED_RUN
from train.report.command import evaluations, render
from train.report.samples import Samples, draw_samples, first_rows

HELDOUT = SHIPPED_RUN / "shapes" / "artifact" / "heldout.jsonl"


def row(task: str, num_images: int) -> Row:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    return Row(f"{task}{num_images}", "", [Path("a.png")] * num_images, messages, task, "", [])


def test_rows_of_more_pictures_than_are_shown_are_passed_over() -> None:
    rows = [row(task, count) for count in (3, 2, 1) for task in ("understanding", "generation", "editing")]
    shown = {task: [r.id for r in first_rows(rows, task, 3)] for task in ("understanding", "generation", "editing")}
    assert shown == {
        "understanding": ["understanding3", "understanding2", "understanding1"],
        "generation": ["generation1"],
        "editing": ["editing2"],
    }


def test_the_scores_of_a_runs_own_weights_are_on_its_page(tmp_path: Path) -> None:
    current, stale = evaluations(SHIPPED_RUN)
    assert ([one.split for one in current], stale) == (["compositional", "heldout"], [])
    current[1].scores.update(
        {"generation/class_top1": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 9, "chance": 0.125}}
    )
    render(SHIPPED_RUN, Samples([], [], []), False, current, [], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert text.index("Scores, compositional rows") < text.index("Scores, heldout rows") < text.index("12.5%")
    assert text.count('<th class="number">chance</th>') == 1


@pytest.mark.slow
def test_a_decoder_that_learned_without_the_source_is_not_shown_it(tmp_path: Path, monkeypatch: Any) -> None:
    run = Path(shutil.copytree(SHIPPED_RUN, tmp_path / "run"))
    manifest = run / "editing_decoder" / "artifact" / "manifest.json"
    values = json.loads(manifest.read_text(encoding="utf-8"))
    values["details"]["reference"] = False
    values["details"]["sampling"]["num_inference_steps"] = 1
    manifest.write_text(json.dumps(values), encoding="utf-8")
    monkeypatch.setattr(NexusGen, "source_embeds", lambda *_: pytest.fail("it sees the source"))
    edits = [row for row in read_rows(HELDOUT) if row.task == "editing"]
    samples = draw_samples(run, edits, 1, "cpu", with_start=False)
    assert len(samples.editing) == 1 and samples.editing[0].editing_decoder.size == (72, 72)
