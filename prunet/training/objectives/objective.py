"""The interface of objectives."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from prunet.denoisers.architecture import Net
from prunet.training.session import Session


class Objective(ABC):
    """What a stage minimises. It finds the student's modules before the session wraps the student."""

    names: Sequence[str]  # of its terms in the log
    nets: Sequence[Net] = ()  # other models that it calls, available from `start` on

    @abstractmethod
    def start(self, session: Session) -> None:
        """Puts its models on the session's device."""

    def running(self) -> AbstractContextManager[None]:
        """Holds its hooks while the loop runs, if it has any."""
        return nullcontext()

    @abstractmethod
    def __call__(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Returns the loss () of a micro-batch, and its terms (up to len(names),) in the order of `names`.

        Args:
            model: the student, wrapped.
            batch: what the samples of the stage hold (`prunet.training.samples`).
        """

    @abstractmethod
    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """Returns the first values of a row of the log from the means of the terms; `loss` comes first."""

    def blame(self) -> str | None:
        """Explains a loss that is not finite, if it is not the student's fault."""
        return None
