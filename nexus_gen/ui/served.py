"""The models of a server: found before anything loads, loaded once before the first request, shared by the tasks."""

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nexus_gen.parts.models import DECODER_KINDS, ModelPaths, flag_of
from nexus_gen.parts.preflight import require_loadable
from nexus_gen.parts.wording import TRAINED
from nexus_gen.specs.errors import UserError

if TYPE_CHECKING:
    from nexus_gen.inference import NexusGen

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedPaths:
    """What a run can serve. paths: of each decoder kind that is there, or of None where none is, for answers alone.

    lacking: decoder kind -> the sentence that says what would make it.
    """

    run: Path
    paths: dict[str | None, ModelPaths]
    lacking: dict[str, str]

    @staticmethod
    def find(
        run: Path, autoregressive: Path | None, flux: Path | None, decoders: Mapping[str, Path | None]
    ) -> "ServedPaths":
        """decoders: for each kind a file or an artifact, or None for the run's.

        Raises UserError without a language model, and when something that was given is not there.
        """
        alone = ModelPaths.find(run, decoder=None, autoregressive=autoregressive)
        require_loadable(alone)
        paths: dict[str | None, ModelPaths] = {}
        lacking: dict[str, str] = {}
        for kind in DECODER_KINDS:
            try:
                found = ModelPaths.find(
                    run,
                    decoder=kind,
                    autoregressive=autoregressive,
                    decoder_path=decoders[kind],
                    flux=flux,
                    decoder_flag=flag_of(kind),
                )
                require_loadable(found)
                paths[kind] = found
            except UserError as error:
                if decoders[kind] is not None or flux is not None:
                    raise
                lacking[kind] = str(error)
        return ServedPaths(run, paths or {None: alone}, lacking)


class ServedModels:
    """One language model, and decoders that share it and, where they paint in the same latents, the autoencoder.

    lock: hold it while a model works; they keep caches, and two at a time would need the memory of two.
    template: how prompts are worded, as of `Wording.under`.
    """

    def __init__(self, served: ServedPaths, device: str, template: str = TRAINED) -> None:
        from nexus_gen.inference import NexusGen  # loads torch

        self.lock = threading.Lock()
        self.models: dict[str | None, NexusGen] = {}
        for kind, paths in served.paths.items():
            model = NexusGen(paths, device)
            model.wording = model.wording.under(template)
            for other in self.models.values():
                model.processor, model.autoregressive = other.processor, other.autoregressive
                if (paths.flux, model.details["vae"]) == (other.paths.flux, other.details["vae"]):
                    model.vae, model.pooled = other.vae, other.pooled
                    model.text_conditions = other.text_conditions
            self.models[kind] = model
            load(model)

    @property
    def reader(self) -> "NexusGen":
        """Any of the models: what answers questions."""
        return next(iter(self.models.values()))


def load(model: "NexusGen") -> None:
    """Touch every part, so that the first request finds it in memory."""
    parts = [model.processor, model.autoregressive]
    if model.paths.decoder is not None:
        parts += [model.decoder, model.vae, model.pooled]
        if guided(model.paths):
            parts += model.text_condition("")
    log.info("%s: %d parts in memory", model.paths.decoder_kind or "autoregressive", len(parts))


def guided(paths: ModelPaths) -> bool:
    """Whether classifier-free guidance is possible: its other side is painted from T5's output for a prompt."""
    return paths.flux is not None and (paths.flux / "text_encoder_2").is_dir()
