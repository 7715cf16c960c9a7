"""An exported student on the hub: a private repository, unless it is there already."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from prunet.disk.seals import SEAL
from prunet.errors import UserError


def check_push(repository: str) -> None:
    """Refuses a repository's name that is none, and to push without being logged in, before anything is exported.

    Raises:
        UserError: what is wrong and how to fix it.
    """
    if len(repository.split("/")) != 2 or not all(repository.split("/")):
        raise UserError(f"--push {repository}: give owner/name of a repository of the hub")
    _asked(repository, lambda: HfApi().whoami())


def push(written: Path, repository: str) -> str:
    """Uploads a pipeline folder or a single file as one commit; returns the commit's address.

    A repository that is not there is made, and private; one that is there keeps its visibility and its other files.

    Raises:
        UserError: not logged in, not allowed, or not reachable.
    """
    api = HfApi()

    def upload() -> Any:
        api.create_repo(repository, private=True, exist_ok=True)
        if written.is_dir():
            message = "Upload a student by prunet"
            return api.upload_folder(
                repo_id=repository, folder_path=written, commit_message=message, ignore_patterns=[SEAL]
            )
        return api.upload_file(repo_id=repository, path_or_fileobj=written, path_in_repo=written.name)

    return str(_asked(repository, upload).commit_url)


def _asked(repository: str, ask: Any) -> Any:
    try:
        return ask()
    except HFValidationError as error:
        raise UserError(f"--push {repository}: {error}") from error
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push {repository}: the hub is switched off here (HF_HUB_OFFLINE): unset it") from error
    except HfHubHTTPError as error:
        raise UserError(
            f"--push {repository}: the hub refuses it ({error.response.status_code}): check the name, and "
            "`hf auth login` with a token that may write"
        ) from error
    except Exception as error:  # of the hub's client without a login, or of its HTTP library
        raise UserError(
            f"--push {repository}: {type(error).__name__}: `hf auth login` with a token that may write, and check the "
            "network"
        ) from error
