"""Picture sheets: rows of pictures with labels, drawn from fixed prompts and fixed noise."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont

from prunet import processes
from prunet.denoisers.architecture import Net
from prunet.disk.files import new_file
from prunet.recipe.values import Drawing
from prunet.sampling.draw import draw
from prunet.teacher.teacher import Teacher

GAP, CAPTION, LABEL = 6, 34, 92
INK, PAPER = (32, 32, 38), (255, 255, 255)


def grid(rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """Makes one picture from `rows` of equal length, with a label left of each row and a caption under each column."""
    cell = rows[0][0].width
    scale = max(1, 96 // cell)
    cell *= scale
    width = LABEL + len(rows[0]) * (cell + GAP)
    sheet = Image.new("RGB", (width, len(rows) * (cell + GAP) + GAP + CAPTION), PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for r, (row, label) in enumerate(zip(rows, labels, strict=True)):
        top = GAP + r * (cell + GAP)
        pen.multiline_text((8, top + cell // 2 - 14), "\n".join(textwrap.wrap(label, 12)), fill=INK, font=font)
        for c, picture in enumerate(row):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (LABEL + c * (cell + GAP), top))
    for c, caption in enumerate(captions):
        lines = textwrap.wrap(caption, max(8, cell // 7))[:2]
        place = (LABEL + c * (cell + GAP), len(rows) * (cell + GAP) + GAP)
        pen.multiline_text(place, "\n".join(lines), fill=INK, font=font, spacing=2)
    return sheet


@dataclass
class Sheets:
    """Sheets of teacher above student, with the same prompts and noise, every `every` steps, in `folder`."""

    teacher: Teacher
    folder: Path
    prompts: Sequence[str]
    every: int
    seed: int
    size: int
    drawing: Drawing = field(default_factory=Drawing)
    students: Drawing | None = None  # how the student draws, if not like the teacher
    labels: tuple[str, str] = ("teacher", "student")
    _teacher_row: list[Image.Image] = field(default_factory=list)

    def draw(self, step: int, student: Net) -> None:
        """Draws the sheet of this step.

        All processes draw, because a divided student needs them all; the main process writes.
        """
        if not self.prompts or not self.every:
            return
        if not self._teacher_row:
            self._teacher_row = self._row(self.teacher.unet, self.drawing)
        row = self._row(student, self.students or self.drawing)
        if not processes.is_main():
            return
        sheet = grid([self._teacher_row, row], [self.labels[0], f"{self.labels[1]}, step {step}"], self.prompts)
        with new_file(self.folder / f"step-{step:07d}.png") as part:
            sheet.save(part, format="PNG")

    @torch.no_grad()
    def _row(self, unet: Any, how: Drawing) -> list[Image.Image]:
        seeds = [self.seed + i for i in range(len(self.prompts))]
        return list(draw(self.teacher.pipeline(unet=unet), self.prompts, seeds, how, size=self.size, batch_size=8))
