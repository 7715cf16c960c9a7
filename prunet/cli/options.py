"""Shared by the verbs: options, opening a recipe, printing results."""

import functools
import importlib.util
import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from prunet import processes
from prunet.errors import UserError, printable

app = typer.Typer(
    name="prunet",
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Make a Stable Diffusion model smaller and faster: remove blocks of its U-Net, then distil the rest.\n\n"
    "Start with [bold]prunet new --teacher MODEL --data PICTURES > mine.yaml[/], then [bold]prunet run mine.yaml[/].",
)

Json = Annotated[bool, typer.Option("--json", help="Print the facts as one JSON object on the last line of stdout.")]
PlanOption = Annotated[str, typer.Option("--plan", "-p", help="A preset's name or a YAML file with patterns.")]
TeacherArgument = Annotated[str, typer.Argument(help="diffusers folder, .safetensors file or hub id.")]
ConfigOption = Annotated[
    str | None,
    typer.Option("--config", help="For a single file: folder or hub id with configs and tokenizers."),
]
PromptsOption = Annotated[
    Path | None, typer.Option(help="Prompts that the teacher draws, to score removals on: .txt, .csv or .tsv.")
]
CacheOption = Annotated[
    Path | None, typer.Option(help="Score removals on these samples instead: a run, or a cache that prunet made.")
]
CompareOption = Annotated[
    float,
    typer.Option(
        "--guidance-scale", min=1, help="Guidance scale of the outputs that are compared: that with which you draw."
    ),
]
RecipeArgument = Annotated[Path, typer.Argument(help="A YAML recipe, the name of a shipped one, or a run folder.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Override a value of the recipe: stages.0.steps=100.")
]

#: Fields of `Runtime` that are on or off, and their help texts.
SWITCHES = {
    "gradient_checkpointing": "Compute activations twice to need less memory.",
    "offload_ema": "Keep the average of the weights on the CPU.",
    "use_8bit_adam": "Keep Adam's state in 8 bits (GPU, bitsandbytes).",
    "teacher_8bit": "Keep the teacher's linear layers in 8 bits (torchao).",
    "teacher_fp8": "Run the teacher's linear layers in fp8 (Hopper GPUs, torchao).",
    "fsdp": "Divide the student among the processes (FSDP2), without a copy in each.",
    "compile": "torch.compile both models; the first step takes minutes.",
    "compile_blocks": "torch.compile only the transformer blocks, in seconds.",
    "channels_last": "Store convolutions in the GPU's own order; usually a little faster.",
}
#: Fields of `Runtime` as options: type and default.
RUNTIME: dict[str, tuple[Any, Any]] = {
    "device": (Annotated[str | None, typer.Option(help="cuda, cpu or mps; by default the best available.")], None),
    "precision": (
        Annotated[str, typer.Option(help="no (fp32), bf16, fp16, or auto: bf16 where the hardware has it.")],
        "auto",
    ),
    "micro_batch": (
        Annotated[int | None, typer.Option(min=1, help="Samples at once on a device; by default as many as fit.")],
        None,
    ),
    **{
        name: (Annotated[bool, typer.Option(f"--{name.replace('_', '-')}", help=text)], False)
        for name, text in SWITCHES.items()
    },
    "tracker": (
        Annotated[str | None, typer.Option(help="Also log to an accelerate tracker, such as tensorboard.")],
        None,
    ),
}
#: Options that change the speed of a distillation but not its memory, or that need several processes.
FAST = ("fsdp", "compile", "compile_blocks", "channels_last", "tracker")
#: Options of a distillation.
LOOP = tuple(RUNTIME)
#: Options that an estimate can take into account.
COUNTED = tuple(name for name in LOOP if name not in FAST)


def with_runtime(*names: str, later: bool = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb these options of `RUNTIME`; the verb receives them as a checked `Runtime` in `runtime`.

    `later`: the verb receives a function that makes the `Runtime`, and can work without importing torch.
    """

    def wrap(verb: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(verb)
        def call(**given: Any) -> None:
            make = functools.partial(make_runtime, **{name: given.pop(name) for name in names})
            verb(runtime=make if later else make(), **given)

        own = [p for p in inspect.signature(verb).parameters.values() if p.name != "runtime"]
        kind = inspect.Parameter.KEYWORD_ONLY
        ours = [
            inspect.Parameter(name, kind, default=default, annotation=annotation)
            for name, (annotation, default) in ((name, RUNTIME[name]) for name in names)
        ]
        last = own.pop()  # --json, the last option in every verb's help
        shown = [*own, *ours, last.replace(kind=kind)]
        call.__signature__ = inspect.Signature(shown)  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in shown}
        return call

    return wrap


def make_runtime(device: str | None = None, precision: str = "auto", tracker: str | None = None, **options: Any) -> Any:
    """Makes a `Runtime` from options (its fields) after checking them.

    Raises:
        UserError: an option is not available here, or two options exclude each other.
    """
    from prunet.torchvision_ops import declare_torchvision_ops

    declare_torchvision_ops()
    from prunet.runtime import Runtime
    from prunet.training.gpu import has_fp8

    if precision not in ("auto", "no", "bf16", "fp16"):
        raise UserError(f"--precision {precision}: choose auto, no, bf16 or fp16")
    if device is not None:
        _check_device(device)
    if tracker is not None:
        _check_tracker(tracker)
    chosen: Any = precision
    runtime = Runtime(device=device, precision=chosen, tracker=tracker, **options)
    for flag, on, package in (
        ("--use-8bit-adam", runtime.use_8bit_adam, "bitsandbytes"),
        ("--teacher-8bit", runtime.teacher_8bit, "torchao"),
        ("--teacher-fp8", runtime.teacher_fp8, "torchao"),
    ):
        if on and importlib.util.find_spec(package) is None:
            raise UserError(f"{flag}: needs {package}, which is not installed: pip install 'prunet[memory]'")
    if runtime.use_8bit_adam and runtime.torch_device.type != "cuda":
        raise UserError("--use-8bit-adam: for CUDA devices only")
    if runtime.teacher_fp8 and not has_fp8(runtime.torch_device):
        raise UserError("--teacher-fp8: for CUDA devices of compute capability 9.0 on (Hopper); try --teacher-8bit")
    if runtime.teacher_fp8 and (runtime.teacher_8bit or runtime.mixed_precision != "bf16"):
        raise UserError("--teacher-fp8: works only with --precision bf16, and without --teacher-8bit")
    if runtime.compile and runtime.compile_blocks:
        raise UserError("--compile compiles the blocks as well: leave out --compile-blocks, or --compile")
    if runtime.fsdp and processes.count() == 1:
        raise UserError("--fsdp: divides the student among several processes: start them with accelerate launch")
    if runtime.fsdp and (runtime.mixed_precision == "fp16" or runtime.use_8bit_adam):
        raise UserError("--fsdp: works only with --precision bf16 or no, and without --use-8bit-adam")
    if runtime.compile or runtime.compile_blocks:
        from prunet.speed.bench import check_compiler

        check_compiler(runtime.torch_device)
    if precision == "fp16" and runtime.torch_device.type == "cpu":
        raise UserError("--precision fp16: CPUs train in bf16 or no; fp16 is for GPUs")
    runtime.use_device()
    return runtime


def _check_device(device: str) -> None:
    import torch

    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"--device {device}: give cpu, cuda, cuda:N or mps")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0][:120]
        raise UserError(f"--device {device}: not available here ({first}); try cpu") from error


def _check_tracker(tracker: str) -> None:
    from accelerate.tracking import get_available_trackers

    available = [str(t.value if hasattr(t, "value") else t) for t in get_available_trackers()]
    if tracker not in available:
        raise UserError(f"--tracker {tracker}: not installed; available: {', '.join(available) or 'none'}")


def drawing_asked(steps: int | None, guidance_scale: float | None, sampler: str | None) -> Any:
    """Returns a `Drawing` with the settings that the user gave.

    Raises:
        UserError: the guidance is not a finite number.
    """
    from prunet.recipe.values import Drawing

    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UserError(f"--guidance-scale {guidance_scale}: give a number, such as 7.5")
    return Drawing.given(steps=steps, guidance_scale=guidance_scale, sampler=sampler)


def named_files(given: list[str] | None, examples: str) -> dict[str, Path]:
    """Parses texts of the form NAME=PATH.

    Raises:
        UserError: a text has another form; the message shows `examples`.
    """
    files = {}
    for text in given or []:
        name, sign, path = text.partition("=")
        if not sign or not path:
            raise UserError(f"--weights {text}: write {examples}")
        files[name] = Path(path).expanduser()
    return files


def open_recipe(path: Path, overrides: list[str] | None) -> Any:
    """Reads a recipe, or the recipe of a run folder; its output is then that folder, even if it was moved or copied."""
    from prunet.recipe.recipe import load_recipe

    if path.is_dir():
        return load_recipe(path / "recipe.yaml", overrides or (), {"output": str(path)})
    return load_recipe(path, overrides or ())


def say(as_json: bool, facts: dict[str, Any], text: Any = None) -> None:
    """Prints a verb's result in the main process: `facts` as JSON, or else `text` (a string or a rich renderable)."""
    if not processes.is_main():
        return
    if as_json:
        print(json.dumps(facts))
    elif isinstance(text, str):
        print(printable(text))  # without rich, because a path may be long or contain [brackets]
    elif text is not None:
        from prunet.console import results

        results.print(text)
