"""The finished steps of a run (`steps.json`)."""

from pathlib import Path

from pydantic import RootModel

from prunet.disk.values import Stored, Value

STEPS_FIX = "delete it and run again; stages resume from their checkpoints"


class Step(Value):
    """A finished step: the hash of its inputs, its time, and checksums of files without a seal."""

    inputs: str
    seconds: float
    log: str | None = None
    pairs: str | None = None
    page: str | None = None


class Steps(Stored, RootModel[dict[str, Step]]):
    """All finished steps by name."""


def read_steps(folder: Path) -> dict[str, Step]:
    """Reads the finished steps of the run in `folder`; without `steps.json` there are none.

    Raises:
        UserError: `steps.json` is damaged.
    """
    path = folder / "steps.json"
    return Steps.load(path, STEPS_FIX).root if path.is_file() else {}


def write_steps(folder: Path, steps: dict[str, Step]) -> None:
    """Writes the finished steps of the run in `folder`."""
    Steps(steps).save(folder / "steps.json")
