"""Pictures drawn in a separate process for each model, so that the memory is only that of the model."""

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import torch
from PIL import Image

from prunet.errors import UserError
from prunet.recipe.values import Drawing
from prunet.sampling.draw import Model, generate
from prunet.speed.clock import reset_peak, resident_kb


def draw_alone(model: Model, prompt: str, how: Drawing, size: int) -> tuple[Image.Image, float | None]:
    """Opens a model in a separate process and draws a picture from seed 0, with as many threads as here.

    Returns the picture, and the peak growth of the process in MiB (None if the system does not report it).

    Raises:
        UserError: the model cannot be opened, or the system ended the process.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(_draw, model, prompt, how, size, torch.get_num_threads()).result()
        except BrokenProcessPool as error:
            raise UserError(
                f"{model.source}: the process that drew with it was killed (out of memory?): give a smaller --size"
            ) from error


def _draw(model: Model, prompt: str, how: Drawing, size: int, threads: int) -> tuple[Image.Image, float | None]:
    torch.set_num_threads(threads)
    before = resident_kb("VmRSS") if reset_peak() else None
    [picture] = generate(model, prompt, drawing=type(how)(**dict(how)), size=size)
    return picture, None if before is None else ((resident_kb("VmHWM") or before) - before) / 1024
