"""The distance of students from their teacher if both start from the same picture.

The pictures are the teacher's own, of evaluation prompts, because these exist for any training data. Each is drawn
again by the next prompt, so that there is something to change.
"""

import math
from collections.abc import Mapping, Sequence

from PIL import Image

from prunet import processes
from prunet.console import say
from prunet.denoisers.architecture import Net
from prunet.evaluation.drawing import BATCH
from prunet.evaluation.results import ImageToImage, PictureDistance
from prunet.intervals import mean_of
from prunet.recipe.values import Drawing
from prunet.sampling.draw import draw
from prunet.sampling.pictures import picture_rmse
from prunet.sampling.start import STRENGTH, start_from
from prunet.teacher.teacher import Teacher

Pictures = dict[str, list[Image.Image]]


def image_to_image(
    teacher: Teacher,
    nets: Mapping[str, Net],
    hows: Mapping[str, Drawing],
    prompts: Sequence[str],
    pictures: Sequence[Image.Image],
    *,
    size: int,
    seed: int,
) -> tuple[ImageToImage, Pictures] | None:
    """Draws from each of the teacher's `pictures` with each net, and compares the students' results with the teacher's.

    `nets`: `teacher` and students by name; `hows`: how each draws. `prompts`: those of the evaluation; the first belong
    to `pictures`. `seed`: that of the evaluation; its noise is not used again. Returns None if a net draws in so few
    steps that none would be left, or if there are no pictures.
    """
    fewest = min(how.steps for how in hows.values())
    if not pictures:
        return None
    if not int(fewest * STRENGTH):
        say(f"  image to image is not measured: strength {STRENGTH} of {fewest} step leaves none")
        return None
    wanted = [prompts[(i + 1) % len(prompts)] for i in range(len(pictures))]
    first = seed + len(prompts)

    def drawn(name: str) -> list[Image.Image]:
        seeds = [first + i for i in range(len(wanted))]
        pipe = teacher.pipeline(unet=nets[name])
        return list(draw(pipe, wanted, seeds, hows[name], batch_size=BATCH, start=start))

    # The stock pipelines round the strength down to whole steps, so all nets begin where the one with fewest steps can.
    strength = math.ceil(1e6 * int(fewest * STRENGTH) / fewest) / 1e6  # up, so that rounding leaves as many steps
    start = start_from(teacher, pictures, size=size, steps=fewest, strength=strength)
    out = processes.from_main(lambda: {name: drawn(name) for name in nets})
    distance = {name: _distance(out[name], out["teacher"]) for name in nets if name != "teacher"}
    return ImageToImage(strength=strength, seed=first, prompts=wanted, distance=distance), out


def _distance(ours: Sequence[Image.Image], theirs: Sequence[Image.Image]) -> PictureDistance:
    by_picture = [picture_rmse(a, b) for a, b in zip(ours, theirs, strict=True)]
    mean = mean_of(by_picture)
    return PictureDistance(picture=mean.value, by_picture=by_picture, interval=(mean.low, mean.high))
