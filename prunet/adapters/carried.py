"""What becomes of an adapter's file: which of its tensors stay, and under which names."""

from collections.abc import Mapping
from dataclasses import dataclass

from prunet.denoisers.adapter_forms import AdapterForms
from prunet.errors import UserError
from prunet.plan.derived import Derived


@dataclass(frozen=True)
class Carried:
    """A LoRA or an IP-Adapter for the student."""

    what: str
    names: Mapping[str, str]  # the file's key -> that of the new file, for what stays
    kept: list[str]  # the teacher's layers that it changes and the student has
    dropped: list[str]  # those that are gone
    metadata: Mapping[str, str]


def forms_of(derived: Derived) -> AdapterForms:
    """How the adapters of the teacher's class are made.

    Raises:
        UserError: prunet cannot carry those of its class over.
    """
    architecture = derived.architecture
    if architecture.adapters is None:
        raise UserError(f"The denoiser is a {architecture.class_name}, whose adapters prunet cannot carry over yet")
    return architecture.adapters
