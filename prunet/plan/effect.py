"""What a plan does to a model, as `prunet inspect` shows it: a value that needs no torch."""

from dataclasses import dataclass
from importlib import resources

from prunet.diagram import Diagram
from prunet.disk.reading import parse_json
from prunet.disk.values import Value


@dataclass(frozen=True)
class Size:
    """Parameters of a denoiser, and multiply-adds (MACs) of one call at its native size (batch 1, all text tokens)."""

    parameters: int
    macs: int  # without the matmuls inside attention, as the papers count
    attention_macs: int


class Effect(Value):
    """The teacher without what a plan removes, the sizes of both, and where the student works."""

    diagram: Diagram
    teacher: Size
    student: Size
    loads_in: dict[str, str]  # program -> "yes", or why not
    works_with: dict[str, str]  # addition to the teacher, such as a ControlNet -> "yes", or why not


def shipped_effect(layout: str, preset: str) -> Effect | None:
    """The effect of a preset, or of `none`, on a known layout; None where the package has none.

    They come with the package because importing torch and diffusers takes seconds.
    `python tests/effects.py` writes them.
    """
    name = f"{layout}.{preset}.json"
    found = next((file for file in (resources.files("prunet.plan") / "effects").iterdir() if file.name == name), None)
    return Effect.model_validate(parse_json(found.read_text(encoding="utf-8"))) if found else None
