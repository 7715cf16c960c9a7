"""What the loop asks of an objective."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor

from prunet.denoisers.architecture import Net
from prunet.training.session import Session


class Objective(Protocol):
    """What a stage minimises. It finds the student's modules before the session wraps the student."""

    @property
    def names(self) -> Sequence[str]:
        """Of its terms, as the log has them."""

    @property
    def nets(self) -> Sequence[Net]:
        """Other models that it calls, from `start` on."""

    def start(self, session: Session) -> None:
        """Puts what it needs on the session's device."""

    def running(self) -> AbstractContextManager[None]:
        """What lasts as long as the loop: hooks."""

    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The loss () of a micro-batch, and its terms (up to len(names),) in the order of `names`.

        Args:
            model: the student, wrapped.
            batch: what the samples of the stage hold (`prunet.training.samples`).
        """

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What a row of the log begins with, of the means of the terms: `loss` first."""

    def blame(self) -> str | None:
        """Where the loss is not finite: why, if it is not the student's fault."""
