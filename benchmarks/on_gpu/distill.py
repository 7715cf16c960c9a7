"""Section b: distillation beside the published scripts' loop, each at the batch that suits it best."""

from collections.abc import Callable, Iterator

from on_gpu.models import Job, Speed, is_out_of_memory
from on_gpu.results import Result, Setting, check, failed, goal

BATCHES = {"sd-v1": (16, 64, 128), "sdxl": (4, 16, 32)}
STEPS = {"sd-v1": 4, "sdxl": 3}
#: Options that make prunet's loop faster, in the order of the tries. Compiling whole models takes minutes: last.
WAYS: dict[str, dict[str, bool]] = {
    "channels_last": {"channels_last": True},
    "compiled blocks, channels_last": {"compile_blocks": True, "channels_last": True},
    "teacher in fp8, compiled blocks": {"teacher_fp8": True, "compile_blocks": True},
    "compiled": {"compile": True},
    "compiled, channels_last": {"compile": True, "channels_last": True},
}


def results(setting: Setting, layout: str) -> Iterator[Result]:
    job = Job(layout, setting)
    steps, batches = (1, (2, 4)) if setting.smoke else (STEPS[layout], BATCHES[layout])
    peak = job.matmul_peak()
    yield Result("matmul peak", peak / 1e12, "TFLOP/s", note=f"{job.runtime.mixed_precision}, random numbers")

    def line(name: str, batch: int, found: Speed, note: str = "") -> Result:
        share = found.images_per_s * job.flops_per_image / peak
        return Result(
            f"{name}, batch {batch}", found.images_per_s, "images/s", note=f"{found}, {share:.0%} of peak; {note}"
        )

    made = job.cache()
    reference: dict[int, Speed] = {}
    yield from search("the published loop", batches, lambda n: job.reference(n, steps), reference, line)
    job.teacher.release("vae", "text")
    eager: dict[int, Speed] = {}
    yield from search("prunet", batches, lambda n: job.prunet(made, n, steps), eager, line)
    if not reference or not eager:
        return
    theirs = max(reference.values(), key=speed)
    batch, best = max(eager.items(), key=lambda item: speed(item[1]))
    yield verdict(best, theirs, job, peak, "eager", setting)
    plain = best
    ways = list(WAYS.items())
    if setting.smoke:  # one that compiles, of the smaller model
        ways = ways[1:2] if layout == "sd-v1" else ways[:1]
    for name, options in ways:
        try:
            found = job.prunet(made, batch, steps, **options)
        except Exception as error:  # an extra that is not installed, a device without fp8, out of memory
            yield Result(name, note=f"not measured: {type(error).__name__}: {error}")
            continue
        yield line(f"prunet, {name}", batch, found, f"{speed(found) / speed(plain):.2f} times eager")
        if found.loss is not None and plain.loss is not None:
            yield check(f"{name}: loss against eager's", abs(found.loss / plain.loss - 1), 0.05)
        best = max(best, found, key=speed)
        yield verdict(best, theirs, job, peak, "best so far", setting)
    smallest = min(reference.keys() & eager.keys())
    yield from memory(job, made, smallest, reference[smallest], steps, setting)


def speed(found: Speed) -> float:
    return found.images_per_s


def search(
    name: str,
    batches: tuple[int, ...],
    measure: Callable[[int], Speed],
    found: dict[int, Speed],
    line: Callable[[str, int, Speed], Result],
) -> Iterator[Result]:
    """Tries larger batches as long as they fit and are faster; fills `found`."""
    for batch in batches:
        try:
            found[batch] = measure(batch)
        except Exception as error:
            if is_out_of_memory(error):
                yield Result(f"{name}, batch {batch}", note="out of memory")
            else:
                yield failed(f"{name}, batch {batch}", error)
            return
        yield line(name, batch, found[batch])
        if len(found) > 1 and speed(found[batch]) < 1.02 * max(speed(v) for k, v in found.items() if k < batch):
            return


def verdict(best: Speed, theirs: Speed, job: Job, peak: float, name: str, setting: Setting) -> Result:
    """Returns a row with both goals: the ratio to the published loop, and the share of the matmul peak."""
    share = best.images_per_s * job.flops_per_image / peak
    times = speed(best) / speed(theirs)
    return goal(
        f"{name}: images/s over the published loop's",
        times,
        3,
        "times",
        f"{share:.0%} of peak (goal 45 %)",
        not setting.smoke,
    )


def memory(job: Job, made: object, batch: int, reference: Speed, steps: int, setting: Setting) -> Iterator[Result]:
    """Saves memory at equal batch by micro-batches and other options, the cheapest first."""
    micro = max(1, batch // 4)
    ways = {f"micro-batch {micro}": {"micro_batch": micro}}
    ways[f"micro-batch {micro}, average on the CPU"] = {"micro_batch": micro, "offload_ema": True}
    for name, options in list(ways.items())[-1:] if setting.smoke else ways.items():
        try:
            found = job.prunet(made, batch, steps, **options)  # type: ignore[arg-type]
        except Exception as error:
            yield failed(f"batch {batch}, {name}", error)
            continue
        share = found.peak_gb / reference.peak_gb if reference.peak_gb else 0.0
        times = speed(found) / speed(reference)
        yield Result(
            f"peak memory at batch {batch}, {name}, over the published loop's",
            share,
            goal="≤ 0.5",
            reached=None if setting.smoke else share <= 0.5,
            note=f"{found} against {reference}; {times:.2f} times as fast",
        )
