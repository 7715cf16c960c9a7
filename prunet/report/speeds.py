"""The result of `prunet.speed.bench` as a table and as a chart."""

from collections.abc import Sequence
from pathlib import Path

from prunet.disk.files import write_text
from prunet.report.bars import Bar, Panel, draw_bars
from prunet.speed.bench import Bench, BenchModel, Row
from prunet.words import many, number

#: Below this share of the limit the report says which operations take the rest of the time.
ENOUGH = 0.9
KIND_NAMES = {
    "convolution": "convolutions",
    "matmul": "linear layers",
    "attention": "attention",
    "normalisation": "normalisations, activations",
    "other": "sums, copies, casts",
    "between": "between operations",
}
PART_NAMES = {"text": "text", "denoiser": "denoiser", "vae": "VAE"}


def write_speeds(result: Bench, folder: Path) -> None:
    """Writes `bench.json`, `bench.md` and `bench.svg`."""
    result.save(folder / "bench.json")
    write_text(folder / "bench.md", f"{markdown(result)}\n![The same as a chart](bench.svg)\n")
    write_text(folder / "bench.svg", chart(result))


# -- the table


def markdown(result: Bench) -> str:
    """Formats latency by part, speed-ups beside their limits, and the operations that keep a model from its limit."""
    rows = result.rows
    lines = [
        "| model | mode | batch | text (ms) | denoiser (ms) | VAE (ms) | all (s) | pictures/s | memory (MiB) |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [number(getattr(row, key)) for key in ("text_ms", "denoiser_ms", "vae_ms", "seconds", "pictures_per_s")]
        memory = "not measured" if row.peak_memory_mb is None else number(row.peak_memory_mb)
        lines.append(f"| {row.model} | {row.mode} | {row.batch_size} | {' | '.join(cells)} | {memory} |")
    lines += [
        "",
        f"{conditions(result)} Denoiser: one call; all: text, {_how(result)} and VAE; memory: the peak.",
        "",
    ]
    lines += _of_processes(result)
    others = _others(result)
    if others:
        lines += _against_limit(others)
    for row in others:
        if row.share < ENOUGH and row.interval[1] < ENOUGH * row.limit:
            lines += ["", *_explain(row, result)]
        elif row.share < ENOUGH:
            lines += ["", f"{_name(row, result)}: the interval is too wide to judge; more --repeats would narrow it."]
    if any(row.compile_s for row in rows):
        compiled = (f"{_name(row, result)} {number(row.compile_s)} s" for row in rows if row.compile_s)
        lines += ["", f"Compiling, with the first call: {'; '.join(compiled)}."]
    return "\n".join(lines) + "\n"


def conditions(result: Bench) -> str:
    """Names device, precision, size of pictures and number of repeats."""
    precisions = sorted({_precision(model) for model in result.models.values()})
    return f"{result.device}, {', '.join(precisions)}, {result.size} px; medians of {result.repeats} calls in turn."


def _precision(model: BenchModel) -> str:
    names = {"torch": "", "openvino": "OpenVINO ", "onnx": "ONNX Runtime ", "sd.cpp": "stable-diffusion.cpp "}
    return f"{names[model.runtime]}{model.precision}"


def _of_processes(result: Bench) -> list[str]:
    """Formats the table of pictures drawn in separate processes, if there are any."""
    rows = [(name, model) for name, model in result.models.items() if model.process_mb is not None]
    if not rows:
        return []
    lines = [
        "| model | computed by | weights (MiB) | memory of a process (MiB) | picture apart |",
        "|---|---|---:|---:|---:|",
    ]
    for name, model in rows:
        apart = "" if model.apart is None else number(model.apart)
        memory = f"{number(model.weights_mb or 0)} | {number(model.process_mb or 0)}"
        lines.append(f"| {name} | {_precision(model)} | {memory} | {apart} |")
    return [
        *lines,
        "",
        "Memory: the growth of a separate process that opens the model and draws a picture. Apart: root mean squared "
        "error, 0 to 1, from the picture of torch with the same U-Net, drawn in the same way from equal noise.",
        "",
    ]


def _against_limit(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| denoiser | mode | batch | speed-up | 95 % interval | limit by MACs | reached |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, high = row.interval
        lines.append(
            f"| {row.model} | {row.mode} | {row.batch_size} | {row.speed_up:.2f}× | {low:.2f} to "
            f"{high:.2f} | {row.limit:.2f}× | {100 * row.share:.0f} % |"
        )
    return lines


def _explain(row: Row, result: Bench) -> list[str]:
    """Explains the time that a student takes beyond its limit: in one sentence, and by kind of operation."""
    head = f"**{_name(row, result)} reaches {100 * row.share:.0f} % of its limit by MACs**"
    if not row.over_ms:
        return [f"{head}; the times of single operations are not available on this device."]
    baseline = _baseline(row, result)
    models = [result.models[name] for name in (row.model, baseline.model)]
    ours, theirs = ({kind: macs * model.rows for kind, macs in model.macs.items()} for model in models)
    over = row.over_ms
    worst = max(over, key=lambda kind: over[kind])
    time = row.kinds_ms[worst] / baseline.kinds_ms[worst] if baseline.kinds_ms[worst] else None
    sentence = f"{head}: most of the time over the limit goes into {KIND_NAMES[worst]}"
    if time is not None:
        macs = f" for {100 * ours[worst] / theirs[worst]:.0f} % of its MACs" if theirs.get(worst) else ""
        sentence += f" ({100 * time:.0f} % of the baseline's time{macs})"
    lines = [
        f"{sentence}.",
        "",
        f"| in a call | {baseline.model} (ms) | {row.model} (ms) | time | MACs | over the limit (ms) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for kind in sorted(over, key=lambda kind: -over[kind]):
        slow, fast = baseline.kinds_ms[kind], row.kinds_ms[kind]
        ratio = f"{100 * fast / slow:.0f} %" if slow else "–"
        macs = f"{100 * ours[kind] / theirs[kind]:.0f} %" if theirs.get(kind) else "–"
        lines.append(f"| {KIND_NAMES[kind]} | {number(slow)} | {number(fast)} | {ratio} | {macs} | {over[kind]:+.3g} |")
    slow, fast = baseline.denoiser_ms, row.denoiser_ms
    macs = f"{100 / row.limit:.0f} %"
    total = f"{100 * fast / slow:.0f} % | {macs} | {sum(over.values()):+.3g}"
    return [*lines, f"| all | {number(slow)} | {number(fast)} | {total} |"]


def _others(result: Bench) -> list[Row]:
    return [row for row in result.rows if row.model != result.baseline]


def _baseline(row: Row, result: Bench) -> Row:
    """Returns the baseline's row at the same batch size, in the same mode if it has one."""
    own = [r for r in result.rows if (r.model, r.batch_size) == (result.baseline, row.batch_size)]
    return next((r for r in own if r.mode == row.mode), own[0])


def _note(row: Row, result: Bench) -> str:
    """Returns mode and batch size where they distinguish rows of a model."""
    parts = [mode] if (mode := _mode(row, result.rows)) else []
    parts += [f"batch {row.batch_size}"] if len({r.batch_size for r in result.rows}) > 1 else []
    return ", ".join(parts)


def _name(row: Row, result: Bench) -> str:
    note = _note(row, result)
    return f"{row.model} ({note})" if note else row.model


# -- the chart


def chart(result: Bench) -> str:
    """Returns an SVG: speed-ups and limits, a picture by part, a call by kind of operation, throughput, memory."""
    rows, others = result.rows, _others(result)
    first = [row for row in rows if row.batch_size == rows[0].batch_size]
    panels = [[_speed_ups(others, result)]] if others else []
    panels.append([_pictures(first, result)])
    if all(row.kinds_ms for row in first):
        panels.append([_kinds(first, result)])
    last = [_lengths("Throughput", "pictures/s", "throughput", "pictures_per_s", rows, result)]
    if all(row.peak_memory_mb for row in rows):
        last.append(_lengths("Peak memory", "MiB", "memory", "peak_memory_mb", rows, result))
    title = "How fast they draw" if others else f"How fast {rows[0].model} draws"
    beside = max(len(_name(row, result)) for row in rows) <= 26  # longer names do not fit into half of the width
    return draw_bars(title, conditions(result), [*panels, *([last] if beside else [[panel] for panel in last])])


def _speed_ups(rows: Sequence[Row], result: Bench) -> Panel:
    bars = [
        Bar(
            label=row.model,
            note=_note(row, result),
            segments=[("reached" if row.share >= ENOUGH else "missed", row.speed_up)],
            track=row.limit,
            mark=row.limit,
            whisker=row.interval,
            text=f"{row.speed_up:.2f}× of {row.limit:.2f}×, {100 * row.share:.0f} %",
        )
        for row in rows
    ]
    key = {
        "reached": f"at least {100 * ENOUGH:.0f} % of the limit",
        "missed": "less",
    }
    return Panel(
        "Speed-up of a denoiser call",
        f"over {result.baseline}; the line is the limit by multiply-adds",
        bars,
        key,
    )


def _pictures(rows: Sequence[Row], result: Bench) -> Panel:
    bars = []
    for row in rows:
        parts = {"text": row.text_ms, "denoiser": _steps(row, result) * row.denoiser_ms, "vae": row.vae_ms}
        text = f"{number(row.seconds)} s"
        segments = [(part, ms / 1000) for part, ms in parts.items()]
        bars.append(Bar(row.model, segments, text, note=_mode(row, rows)))
    batch = rows[0].batch_size
    what = "One picture" if batch == 1 else f"{batch} pictures"
    return Panel(what, _how(result), bars, PART_NAMES)


def _kinds(rows: Sequence[Row], result: Bench) -> Panel:
    bars = []
    for row in rows:
        segments = [(kind, row.kinds_ms[kind]) for kind in KIND_NAMES]
        allowed = _baseline(row, result).denoiser_ms / row.limit if row.limit != 1 else None
        text = f"{number(row.denoiser_ms)} ms, {many(_macs(row, result))} MACs"
        bars.append(Bar(row.model, segments, text, note=_mode(row, rows), mark=allowed))
    soft = "the line is the limit by multiply-adds" if any(bar.mark for bar in bars) else ""
    return Panel("A denoiser call by operations", soft, bars, KIND_NAMES)


def _macs(row: Row, result: Bench) -> int:
    """Returns the multiply-adds of a call; guidance doubles the batch."""
    model = result.models[row.model]
    return model.rows * row.batch_size * sum(model.macs.values())


def _steps(row: Row, result: Bench) -> int:
    return result.models[row.model].steps


def _how(result: Bench) -> str:
    """Returns how the models draw, such as `25 steps with guidance`, and which models draw in another way."""
    ways: dict[str, list[str]] = {}
    for name, model in result.models.items():
        steps, guidance = model.steps, "with" if model.rows > 1 else "without a second call for"
        way = f"{steps} step{'s' if steps > 1 else ''} {guidance} guidance"
        ways.setdefault(way, []).append(name)
    (first, _), *others = ways.items()
    return "; ".join([first, *(f"{', '.join(names)}: {way}" for way, names in others)])


def _mode(row: Row, rows: Sequence[Row]) -> str:
    return row.mode if len({r.mode for r in rows}) > 1 else ""


def _lengths(title: str, unit: str, kind: str, field: str, rows: Sequence[Row], result: Bench) -> Panel:
    bars = [Bar(r.model, [(kind, getattr(r, field))], number(getattr(r, field)), note=_note(r, result)) for r in rows]
    return Panel(title, unit, bars, {})
