"""Scores are shown of exactly the models that are served."""

from pathlib import Path

from nexus_gen.specs.artifact import Manifest, fingerprint_inside, seal
from nexus_gen.specs.lineage import Part, evaluations_of

SCORES = {"understanding/overall": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 10}}


def artifact(directory: Path, kind: str, inputs: dict[str, str], **details: object) -> Path:
    directory.mkdir(parents=True)
    (directory / "weights").write_text(str(details))
    seal(directory, Manifest(kind, kind, {"split": directory.name}, inputs, {"commit": "c"}, dict(details)))
    return directory


def test_scores_of_other_weights_are_told_apart(tmp_path: Path) -> None:
    model = artifact(tmp_path / "pretrain" / "artifact", "ar_checkpoint", {}, steps=1)
    decoder = artifact(tmp_path / "generation_decoder" / "artifact", "generation_decoder", {}, steps=1) / "weights"
    inputs = {"rows": "r", "autoregressive": str(fingerprint_inside(model))}
    both = {**inputs, "generation_decoder": str(fingerprint_inside(decoder))}
    artifact(tmp_path / "evaluation" / "answers", "evaluation", inputs, scores=SCORES)
    artifact(tmp_path / "evaluation" / "both", "evaluation", both, scores=SCORES)
    artifact(tmp_path / "evaluation" / "earlier", "evaluation", {**both, "autoregressive": "before"}, scores=SCORES)
    artifact(tmp_path / "evaluation" / "foreign", "messages", {})

    parts = [Part("autoregressive", model, None), Part("generation_decoder", decoder, None)]
    current, stale = evaluations_of(tmp_path, parts)
    assert [evaluation.split for evaluation in current] == ["answers", "both"]
    assert current[0].scores == SCORES
    assert [path.name for path in stale] == ["earlier"]

    # A server without the decoder cannot vouch for scores that it took part in.
    current, stale = evaluations_of(tmp_path, parts[:1])
    assert [evaluation.split for evaluation in current] == ["answers"]
    assert [path.name for path in stale] == ["both", "earlier"]
