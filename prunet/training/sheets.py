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


def grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], captions: Sequence[str], columns: int | None = None
) -> Image.Image:
    """Makes one picture from `rows` of equal length, with a label left of each row and a caption under each column.

    All labels may be empty. After `columns` pictures (by default after all) the rows continue below.
    """
    cell = rows[0][0].width
    cell *= max(1, 96 // cell)
    columns, left = columns or len(rows[0]), LABEL if any(labels) else GAP
    height = len(rows) * (cell + GAP) + GAP + CAPTION
    size = left + columns * (cell + GAP), -(-len(rows[0]) // columns) * height
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=12)
    for i in range(len(rows[0])):
        x, y = left + i % columns * (cell + GAP), i // columns * height + GAP
        for row, label in zip(rows, labels, strict=True):
            if i % columns == 0:
                pen.multiline_text((8, y + cell // 2 - 14), "\n".join(textwrap.wrap(label, 12)), fill=INK, font=font)
            sheet.paste(row[i].resize((cell, cell), Image.Resampling.LANCZOS), (x, y))
            y += cell + GAP
        lines = textwrap.wrap(captions[i], max(8, cell // 7))[:2]
        pen.multiline_text((x, y), "\n".join(lines), fill=INK, font=font, spacing=2)
    return sheet


@dataclass
class Sheets:
    """Sheets of teacher above student, with the same prompts and noise, every `every` steps, in `folder`.

    `idle`: parts of the teacher that only sheets need; each sheet loads them and frees their memory again.
    """

    teacher: Teacher
    folder: Path
    prompts: Sequence[str]
    every: int
    seed: int
    size: int
    drawing: Drawing = field(default_factory=Drawing)
    students: Drawing | None = None  # how the student draws, if not like the teacher
    labels: tuple[str, str] = ("teacher", "student")
    idle: Sequence[str] = ()
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
        self.teacher.release(*self.idle)
        if not processes.is_main():
            return
        sheet = grid([self._teacher_row, row], [self.labels[0], f"{self.labels[1]}, step {step}"], self.prompts)
        with new_file(self.folder / f"step-{step:07d}.png") as part:
            sheet.save(part, format="PNG")

    @torch.no_grad()
    def _row(self, unet: Any, how: Drawing) -> list[Image.Image]:
        seeds = [self.seed + i for i in range(len(self.prompts))]
        return list(draw(self.teacher.pipeline(unet=unet), self.prompts, seeds, how, size=self.size, batch_size=8))
