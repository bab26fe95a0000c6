"""What the page says of the models that it serves: where they come from and what they score."""

from collections.abc import Sequence

from nexus_gen.artifacts.content import Contents
from nexus_gen.parts.lineage import Part, evaluations_of, flux_of_all, parts_of
from nexus_gen.parts.models import memory_of
from nexus_gen.parts.wording import RELEASED
from nexus_gen.specs.prompts import LANGUAGES
from nexus_gen.specs.scores import in_unit
from nexus_gen.ui.served import ServedModels, ServedPaths
from nexus_gen.ui.words import Words


def about(served: ServedPaths, models: ServedModels, words: Words) -> str:
    """Markdown: parts from their manifests, how prompts are worded, scores of exactly these parts, what is missing."""
    parts = parts_of(served.paths)
    sections = [
        table(
            (words.parts, words.parameters, words.trained, words.made, words.code, words.fingerprint),
            [(getattr(words, part.role), parameters(models, part.role), *facts(part)) for part in parts],
        )
    ]
    worded = {name: kind for name, kind in models.reader.wording.recorded().items() if kind != RELEASED}
    if worded:
        said = "; ".join(f"{name} `{kind}`" for name, kind in worded.items())
        sections.append(words.wording.format(wording=said))
    contents = Contents.at(memory_of(served.run))
    current, stale = evaluations_of(served.run, parts, flux_of_all(served.paths), contents)
    contents.save()
    for evaluation in current:
        rows = [
            (name, *in_unit(name, score), str(score["count"]))
            for name, score in evaluation.scores.items()
            if not set(name.split("/")) & set(LANGUAGES)
        ]
        sections.append(f"### {words.scores.format(split=evaluation.split)}")
        sections.append(table((words.score, "", words.interval, words.rows), rows))
    if not current:
        sections.append(words.no_scores.format(run=served.run))
    sections += [words.stale_scores.format(directory=directory) for directory in stale]
    sections += [words.not_served.format(reason=reason) for reason in served.lacking.values()]
    return "\n\n".join(sections)


def parameters(models: ServedModels, role: str) -> str:
    module = models.reader.autoregressive if role == "autoregressive" else models.models[role].decoder
    count = sum(parameter.numel() for parameter in module.parameters())
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def facts(part: Part) -> tuple[str, str, str, str]:
    """(steps, day, commit, fingerprint) of a part; a file without a manifest is told by its name."""
    if part.manifest is None:
        return "", "", "", f"`{part.path.name}`"
    manifest = part.manifest
    steps = str(manifest.details.get("steps", ""))
    return steps, manifest.created_at[:10], f"`{manifest.code['commit'][:9]}`", f"`{manifest.fingerprint}`"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
