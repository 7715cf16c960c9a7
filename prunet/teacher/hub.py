"""Downloads of files from a repository of the hub."""

from collections.abc import Sequence
from pathlib import Path

from prunet.errors import UserError

#: Advice for errors of the hub's client.
ADVICE = {
    "GatedRepoError": "it is gated: accept its terms on its page, then `hf auth login`",
    "RevisionNotFoundError": "it has no such revision: check teacher.revision",
    "LocalEntryNotFoundError": "it is not in the cache of the hub here: check the network, and HF_HUB_OFFLINE",
}


def download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """Downloads the files of a repository that match a pattern; returns their folder, which has the commit as its name.

    Raises:
        UserError: the files are not available.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except Exception as error:  # from the hub's client, its HTTP library or the disk
        name = type(error).__name__
        raise UserError(
            f"{repository}: neither a folder here nor available from the hub ({name}); "
            + ADVICE.get(name, "check the name, the network, and `hf auth login` if it is gated")
        ) from error
