"""Scores are shown of exactly the models that are served."""

from pathlib import Path

from nexus_gen.artifacts.artifact import Manifest, fingerprint_inside, fingerprint_path, seal
from nexus_gen.parts.lineage import Part, evaluations_of

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


def test_scores_of_weights_that_were_changed_in_place_are_stale(tmp_path: Path) -> None:
    model = artifact(tmp_path / "pretrain" / "artifact", "ar_checkpoint", {}, steps=1)
    inputs = {"rows": "r", "autoregressive": str(fingerprint_inside(model))}
    artifact(tmp_path / "evaluation" / "answers", "evaluation", inputs, scores=SCORES)
    parts = [Part("autoregressive", model, None)]
    assert evaluations_of(tmp_path, parts)[1] == []
    (model / "weights").write_text("others")
    current, stale = evaluations_of(tmp_path, parts)
    assert (current, [path.name for path in stale]) == ([], ["answers"])


def test_files_without_a_manifest_and_the_autoencoder_count_by_content(tmp_path: Path) -> None:
    decoder, flux = tmp_path / "edit_decoder.safetensors", tmp_path / "FLUX.1-dev"
    flux.mkdir()
    (flux / "ae.safetensors").write_text("one")
    decoder.write_text("one")
    inputs = {"rows": "r", "editing_decoder": fingerprint_path(decoder), "flux": fingerprint_path(flux)}
    artifact(tmp_path / "evaluation" / "edits", "evaluation", inputs, scores=SCORES)
    parts = [Part("editing_decoder", decoder, None)]
    assert [evaluation.split for evaluation in evaluations_of(tmp_path, parts, flux)[0]] == ["edits"]
    (flux / "ae.safetensors").write_text("two")
    assert evaluations_of(tmp_path, parts, flux)[0] == [] and len(evaluations_of(tmp_path, parts)[0]) == 1
    (flux / "ae.safetensors").write_text("one")
    decoder.write_text("two")
    assert evaluations_of(tmp_path, parts, flux)[0] == []
