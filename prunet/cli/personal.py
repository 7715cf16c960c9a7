"""The verb that personalises a model."""

from pathlib import Path
from typing import Annotated, Any

import typer

from prunet.cli.options import LOOP, ConfigOption, Json, app, say, with_runtime
from prunet.words import duration, many

#: Options of the loop with no meaning here: personalisation has no teacher, no average and only one process.
IDLE = ("offload_ema", "teacher_8bit", "teacher_fp8", "fsdp")


@app.command()
@with_runtime(*(name for name in LOOP if name not in IDLE))
def personalize(
    runtime: Any,
    model: Annotated[str, typer.Argument(help="Pipeline folder, .safetensors file, hub id, or run folder.")],
    pictures: Annotated[Path, typer.Option(help="Folder with pictures of the subject; 3 to 5 are enough.")],
    prompt: Annotated[str, typer.Option(help="What they show, with a rare word for the subject.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")],
    class_prompt: Annotated[
        str | None, typer.Option(help="The prompt without the rare word, so that the class does not change.")
    ] = None,
    class_pictures: Annotated[
        int | None, typer.Option(min=1, help="Pictures of the class that the model draws first: 200.")
    ] = None,
    prior_weight: Annotated[float | None, typer.Option(min=0, help="Weight of the class in the loss: 1.")] = None,
    lora: Annotated[
        int | None, typer.Option(min=1, metavar="RANK", help="Train a LoRA of this rank (such as 4), not all weights.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Training steps: 400; 800 with a class; 500 for a LoRA.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures of the subject at each step: 1.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Learning rate: 5e-6; for a LoRA 1e-4.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option("--guidance-scale", "-g", min=0, help="For the class and the sheets: 7.5.")
    ] = None,
    size: Annotated[int | None, typer.Option(min=8, max=4096, help="Pixels; the model's own by default.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**62, help="Seed of training and of drawn pictures.")] = None,
    sheet_every: Annotated[int | None, typer.Option(min=0, help="Steps between two sheets: 200; 0: none.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(min=1, help="Steps between two checkpoints: 200.")] = None,
    only_estimate: Annotated[
        bool, typer.Option("--estimate", help="Only print the memory and time that it takes; nothing is written.")
    ] = False,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Teach a model (teacher or student) a subject from a few pictures (DreamBooth), in all weights or as a LoRA.

    After that, the rare word of the prompt stands for the subject. The text encoder is not trained. The same command
    resumes.

    Example: prunet personalize runs/demo --pictures my-dog --prompt "a photo of sks dog" --class-prompt "a photo of a
    dog" --lora 4 -o runs/my-dog
    """
    from prunet.recipe.personalization import personalization
    from prunet.runs.personalization import Personal

    given = {
        "model": model,
        "pictures": str(pictures),
        "output": str(output),
        "prompt": prompt,
        "class_prompt": class_prompt,
        "class_pictures": class_pictures,
        "prior_weight": prior_weight,
        "lora": lora,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "guidance_scale": guidance_scale,
        "size": size,
        "seed": seed,
        "sheet_every": sheet_every,
        "checkpoint_every": checkpoint_every,
        "config": config,
    }
    this = Personal(personalization(**given), runtime)
    this.check()
    if only_estimate:
        cost = this.estimate()
        say(as_json, cost, _cost(cost))
        return
    result = this.finish()
    weights = sum(file.stat().st_size for file in result.rglob("*.safetensors"))
    facts = {"output": str(result), "bytes": weights, "steps": this.spec.steps}
    say(as_json, facts, f"{result}: {many(weights)}B of weights")


def _cost(cost: dict[str, Any]) -> str:
    parts = ", ".join(f"{name} {many(size)}B" for name, size in cost["memory_bytes"].items() if size)
    drawn = (
        f"; before that {cost['class_pictures']:,} pictures of the class are drawn" if cost["class_pictures"] else ""
    )
    return f"{cost['steps']:,} steps take about {duration(3600 * cost['hours'])} on this device{drawn}\nMemory: {parts}"
