"""A small decoder for the pictures of a run: distilled from its teacher's VAE on the run's cached latents."""

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from prunet.console import say
from prunet.data.cache import Cache
from prunet.denoisers.freeze import freeze
from prunet.disk.files import new_folder
from prunet.disk.ownership import check_place
from prunet.disk.seals import verify
from prunet.disk.values import Value
from prunet.errors import UserError
from prunet.exports.card import origin
from prunet.recipe.training import Training
from prunet.speed.clock import times_in_turn
from prunet.training.checkpoints import Saving
from prunet.training.loop import train
from prunet.training.objectives.decoding import Decoding, decoded, small_decoder
from prunet.training.samples import LatentSamples
from prunet.training.sheets import grid
from prunet.words import percent

if TYPE_CHECKING:
    from prunet.runs.run import Run

BATCH = 8
#: Latents' pixels at once: a picture of 512 px takes 2.8 GB in fp32, for the gradients behind the VAE's first level.
PIXELS = 64 * 64
#: One in this number of samples, at most `MOST` in all, is held out for measuring.
HELD_OUT, MOST = 8, 64
FACTS = "decoder.json"


class DecoderResult(Value):
    """The distance of the decoder's pictures from the VAE's on held-out samples, and the time of both.

    `psnr` (dB): the mean over the samples. `ms`: milliseconds of `vae` and `small`, medians of calls in turn with batch
    1; `share`: the small decoder's time, divided by the VAE's.
    """

    psnr: float
    psnr_worst: float
    held_out: int
    ms: dict[str, float]
    share: float
    parameters: int


def make_decoder(this: "Run", steps: int) -> DecoderResult:
    """Distils a small decoder into RUN/decoder, a stock `AutoencoderTiny`; the same call resumes one that was stopped.

    Checkpoints and log lie in RUN/decoder-training; the result is also in `decoder.json`.

    Raises:
        UserError: the cache was deleted, is of another VAE, or has too few samples to hold some out.
    """
    folder = this.folder / "decoder"
    check_place(folder, "decoder", "decoder")
    teacher, cache = this.exported_teacher(), Cache.open(this.cache_folder)
    cache.check(teacher)
    made_from = f"{teacher.fingerprint(['vae'])}, {steps} steps, seed {this.recipe.seed}"
    if (folder / FACTS).is_file():
        verify(folder, f"delete {folder} and {folder}-training and give the same command again", made_from)
        say(f"{folder} is done")
        return DecoderResult.load(folder / FACTS)
    held = list(range(0, len(cache), max(HELD_OUT, len(cache) // MOST)))
    groups = tuple([i for i in group if i not in set(held)] for group in cache.groups)
    kept = replace(cache, groups=tuple(group for group in groups if group))
    if not kept.groups:
        raise UserError(f"{cache.folder}: {len(cache)} samples are too few: give a run with more")
    training = Training(
        steps=steps,
        batch_size=BATCH,
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=min(100, steps // 10),
        weight_decay=0,
        ema_decay=0.99,
    )
    student = small_decoder(teacher, this.recipe.seed)
    samples = LatentSamples(kept, training, this.recipe.seed, teacher.process)
    trained: Any = train(
        Decoding(teacher, student),
        student,
        samples,
        micro_batch_for(*cache.latent_size),
        this.folder / "decoder-training",
        runtime=replace(this.runtime, precision="no"),  # many VAEs overflow in half precision
        saving=Saving(every=max(1, steps // 10)),
    )
    facts, sheet = _measure(teacher.vae.to("cpu"), freeze(trained), cache, held, teacher.scaling_factor)
    with new_folder(folder, "decoder", made_from) as part:
        trained.save_pretrained(part, safe_serialization=True)
        facts.save(part / FACTS)
        sheet.save(part / "sheet.png")
        (part / "README.md").write_text(_card(facts, origin(teacher)["teacher"]), encoding="utf-8")
    return facts


def micro_batch_for(height: int, width: int) -> int:
    """Returns how many latents of this size are decoded at once: a divisor of the batch."""
    return next(count for count in (8, 4, 2, 1) if count == 1 or count * height * width <= PIXELS)


@torch.no_grad()
def _measure(
    vae: Any, small: Any, cache: Cache, held: list[int], scaling_factor: float
) -> tuple[DecoderResult, Image.Image]:
    """Compares both decoders on held-out samples; returns the facts, and a sheet of the first pictures of both."""
    decibels, rows = [], ([], [])  # type: ignore[var-annotated]
    for index in held:
        latents = cache.sample(index).mean[None]
        both = decoded(vae, latents, scaling_factor), decoded(small, latents, 1)
        error = (both[0] - both[1]).square().mean() / 4  # of pixels from 0 to 1
        decibels.append(float(-10 * error.clamp(min=1e-10).log10()))
        for row, pixels in zip(rows, both, strict=True):
            row.append(Image.fromarray(((pixels[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()))
    latents = cache.sample(held[0]).mean[None]
    calls = {"vae": lambda: decoded(vae, latents, scaling_factor), "small": lambda: decoded(small, latents, 1)}
    times = {name: statistics.median(found) for name, found in times_in_turn(calls, 15, torch.device("cpu")).items()}
    facts = DecoderResult(
        psnr=statistics.mean(decibels),
        psnr_worst=min(decibels),
        held_out=len(held),
        ms=times,
        share=times["small"] / times["vae"],
        parameters=sum(parameter.numel() for parameter in small.decoder.parameters()),
    )
    chosen = [index for index in range(len(held)) if rows[0][index].size == rows[0][0].size][:8]
    shown = [[row[index] for index in chosen] for row in rows]
    return facts, grid(shown, ["VAE", "small decoder"], [f"{decibels[index]:.1f} dB" for index in chosen])


def _card(facts: DecoderResult, teacher: str) -> str:
    return f"""# A small decoder for the latents of {teacher}

A stock `AutoencoderTiny` of diffusers with {facts.parameters:,} parameters in its decoder, distilled from the VAE.
Its pictures have a PSNR of {facts.psnr:.1f} dB against the VAE's, mean over {facts.held_out} held-out samples; on
a CPU it takes {percent(facts.share)} of the VAE's time. Its encoder is empty (all zeros): it cannot encode pictures.

```python
from diffusers import AutoencoderTiny, DiffusionPipeline

vae = AutoencoderTiny.from_pretrained("PATH_OF_THIS_FOLDER")
pipe = DiffusionPipeline.from_pretrained("PATH_OF_A_STUDENT", vae=vae)
```

For OpenVINO: `prunet export RUN --openvino --decoder PATH_OF_THIS_FOLDER`
"""
