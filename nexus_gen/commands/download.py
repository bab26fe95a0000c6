"""Fetching models through the hubs' own clients, which resume, check and show progress."""

import os
from pathlib import Path

from nexus_gen.commands.downloads import Model, Part
from nexus_gen.specs.errors import UserError


def fetch(model: Model, parts: tuple[Part, ...], source: str, directory: Path) -> None:
    """Fetch the parts of a model that are not in `directory` yet.

    Raises UserError without network, without access, and when the repository is not there.
    """
    patterns = [pattern for part in parts for pattern in part.patterns]
    repository = model.repository(source)
    (fetch_modelscope if source == "modelscope" else fetch_huggingface)(repository, patterns, directory)
    for part in parts:
        for pattern in part.patterns:
            if "*" not in pattern and not (directory / pattern).is_file():
                raise UserError(f"{source} holds no {pattern} in {repository}; try the other --source")


def fetch_huggingface(repository: str, patterns: list[str], directory: Path) -> None:
    import httpx
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or copy the files by hand")
    try:
        snapshot_download(repository, local_dir=directory, allow_patterns=patterns)
    except GatedRepoError as error:
        raise UserError(
            f"{repository} is gated on Hugging Face: accept its licence at https://huggingface.co/{repository} and log "
            "in with `hf auth login`, or take --source modelscope"
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(f"Hugging Face has no {repository}, or hides it; take --source modelscope") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise no_network("Hugging Face", constants.ENDPOINT, "modelscope", error) from error


def fetch_modelscope(repository: str, patterns: list[str], directory: Path) -> None:
    from modelscope.hub.snapshot_download import snapshot_download

    try:
        snapshot_download(repository, local_dir=str(directory), allow_file_pattern=patterns)
    except Exception as error:  # its client raises a class of its own per release, and urllib3's, and requests'
        address = os.environ.get("MODELSCOPE_DOMAIN", "www.modelscope.cn")
        raise no_network("ModelScope", address, "huggingface", error) from error


def no_network(hub: str, address: str, other: str, error: Exception) -> UserError:
    first_line = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(
        f"{hub} ({address}) does not answer as it should: {first_line}; check the network, or take --source {other}; "
        "what was fetched is kept"
    )
