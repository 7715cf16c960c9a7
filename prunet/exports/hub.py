"""Uploads an exported student to the hub; a new repository is private."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

from prunet.disk.seals import SEAL
from prunet.errors import UserError


def check_push(repository: str) -> None:
    """Refuses a wrong repository name, and a push without a login that may write, before anything is exported.

    What a fine-grained token may write only the upload shows.

    Raises:
        UserError: the name is not owner/name, the hub does not accept the login, or its token may only read.
    """
    if len(repository.split("/")) != 2 or not all(repository.split("/")):
        raise UserError(f"--push {repository}: not a name of a repository on the hub: give owner/name")
    login = _asked(repository, lambda: HfApi().whoami())
    if login.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise UserError(
            f"--push {repository}: this login's token may only read: `hf auth login` with one that may write"
        )


def push(written: Path, repository: str, card: Path | None = None) -> str:
    """Uploads a pipeline folder, or a single file with its configs and its model `card`, as one commit.

    Returns the commit's address. A new repository is private; an existing one keeps its visibility and its other files.

    Raises:
        UserError: the user is not logged in or not allowed to write, or the hub is not reachable.
    """
    api = HfApi()

    def upload() -> Any:
        api.create_repo(repository, private=True, exist_ok=True)
        message = "Upload a student by prunet"
        if written.is_dir():
            return api.upload_folder(
                repo_id=repository, folder_path=written, commit_message=message, ignore_patterns=[SEAL]
            )
        configs = written.with_suffix(
            ".config"
        )  # without them only programs that know the layout's sizes open the file
        files = {written.name: written} | ({"README.md": card} if card else {})
        files |= {str(path.relative_to(written.parent)): path for path in configs.rglob("*") if path.is_file()}
        added = [CommitOperationAdd(name, path) for name, path in files.items() if path.name != SEAL]
        return api.create_commit(repository, added, commit_message=message)

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
    except Exception as error:  # from the hub's client without a login, or from its HTTP library
        raise UserError(
            f"--push {repository}: {type(error).__name__}: `hf auth login` with a token that may write, and check the "
            "network"
        ) from error
