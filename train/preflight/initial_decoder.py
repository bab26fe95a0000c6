"""Whether a decoder can begin with the weights that its config names, by manifests and headers: before any starts."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nexus_gen.parts.models import DECODER_KINDS, find_decoder
from nexus_gen.specs.errors import UserError
from nexus_gen.specs.geometry import ProjectorGeometry
from nexus_gen.tensors.tensor_shapes import autoregressive_geometry, read_config
from train.schemas.decoders import DecoderConfig

log = logging.getLogger(__name__)


def require_initial_decoder(config: DecoderConfig) -> None:
    """UserError when init.decoder or init.transformer was trained in another geometry than the config's.

    Weights do not show it all: heads and rotary axes leave no trace in them. An objective that
    holds positions, or sees the source, otherwise than the decoder that it starts from is reported and not refused.
    """
    if config.init.transformer:
        found = find_decoder(Path(config.init.transformer), DECODER_KINDS, "init.transformer")
        if found.manifest is not None:
            require_same("init.transformer", config.init.transformer, found.details, trained_parts(config))
    if not config.init.decoder:
        return
    found = find_decoder(Path(config.init.decoder), [config.kind], "init.decoder")
    if found.manifest is None:
        return
    parts = trained_parts(config)
    qwen = read_config(Path(getattr(config.model, "qwen", "")))
    if config.kind == "editing_decoder" and qwen is not None:
        parts["projector"] = asdict(ProjectorGeometry.of(autoregressive_geometry(qwen)[1]))
    require_same("init.decoder", config.init.decoder, found.details, parts)
    for name in ("round_positions", "reference"):
        before, now = found.details.get(name), getattr(config.objective, name, None)
        if before is not None and before != now:
            log.warning("objective.%s is %s and init.decoder %s was trained with %s", name, now, found.file, before)


def trained_parts(config: DecoderConfig) -> dict[str, dict[str, Any]]:
    return {"transformer": asdict(config.model.transformer), "vae": asdict(config.model.vae)}


def require_same(role: str, given: str, details: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]) -> None:
    """details: of the manifest. parts: of the config, by their names in the manifest."""
    for part, values in parts.items():
        for name, value in values.items():
            trained = details.get(part, {}).get(name, value)
            if trained != value:
                raise UserError(
                    f"{role}: the {part} of {given} was trained with {name} {trained} and this config gives {value}; "
                    "give the geometry of the decoder that you start from"
                )
