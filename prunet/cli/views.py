"""Plans and estimates as text for the terminal: which parts of the denoiser stay, and what a run costs."""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from prunet.diagram import STEPS, Diagram, Part, Section
from prunet.plan.effect import Effect, Size
from prunet.words import command, many, number, percent

if TYPE_CHECKING:  # these import torch, which a plan's effect does not need
    from prunet.plan.derived import Derived
    from prunet.search.results import SearchResult, Sensitivity

if TYPE_CHECKING:
    from prunet.runs.estimate import Estimate

STAYS, GOES = "bold green", "red strike"
#: Styles for the error of a removal, from no error to a broken model, and a digit for each style.
COLOURS = ("bold green", "bold cyan", "bold yellow", "bold dark_orange", "bold red")
DIGITS = "₀₁₂₃₄"
#: Signs of each kind of part: if it stays, and if it is removed.
SIGNS = {"resnet": ("R", "r"), "attention": ("A", "a"), "downsampler": ("↓", "·"), "upsampler": ("↑", "·")}


def plan_view(effect: Effect, title: str) -> RenderableType:
    """Shows a plan's effect on the teacher: the denoiser's diagram, sizes, and programs that load the student."""
    return Group(
        Rule(Text(title, style="bold"), align="left"),
        Padding(_denoiser(effect.diagram), (0, 0, 1, 0)),
        Text.from_markup(_legend(effect.diagram)),
        Text(),
        _sizes(effect),
        _programs(effect),
    )


def sensitivity_view(result: "Sensitivity") -> RenderableType:
    """Shows the cost and error of removing each unit (`prunet.search.sensitivity`): a coloured diagram and a table."""
    from prunet.report.sensitivity import coloured_diagram, columns, conditions, label, rows

    legend = Text("Error without it: ")
    for place, style in enumerate(COLOURS):
        legend.append(f"{DIGITS[place]} {f'below {STEPS[place]:g}' if place < len(STEPS) else 'more'}  ", style=style)
    table = Table(box=None, padding=(0, 1))
    for title in ("error", "95 % interval", *columns(result).values()):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("removed", overflow="fold")
    for name, shares, error in sorted(rows(result), key=lambda row: row[2][0]):
        value, low, high = (number(part, 2) for part in error)
        table.add_row(value, f"{low} to {high}", *shares, Text(label(name)))
    return Group(
        Rule(Text(f"{result.teacher}: the error of each removal", style="bold"), align="left"),
        Padding(_denoiser(coloured_diagram(result)), (0, 0, 1, 0)),
        legend,
        Text(),
        table,
        Text(),
        Text(conditions(result), style="dim"),
    )


def search_view(result: "SearchResult", folder: Any) -> RenderableType:
    """Shows the plans of a search, the chosen one first, and the files that the search wrote."""
    table = Table(box=None, padding=(0, 1))
    kinds = [kind for kind in ("parameters", "macs", "latency") if kind in result.costs]
    for title in ("error", *(["after"] if result.recover_steps else []), *kinds):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("removed", overflow="fold")
    for row in [*result.plans[:8], *result.presets]:
        after = ["" if row.trained is None else number(row.trained, 2)] if result.recover_steps else []
        shares = [f"{100 * row.costs[kind] / result.costs[kind]:.0f} %" for kind in kinds]
        name = ", ".join(row.remove) if row.name == "found" else row.name
        style = "bold" if row is result.plans[0] else None
        table.add_row(number(row.error, 2), *after, *shares, Text(name), style=style)
    build = ("build", result.teacher, "--plan", f"{folder}/plan.yaml", "--output", f"{folder}/student")
    todo = ("Run", ("run", f"{folder}/recipe.yaml")) if result.is_trainable else ("Build", build)
    files = f"Page: {folder}/search.html\nPlan: {folder}/plan.yaml\n{todo[0]} it: {command(*todo[1])}".replace("`", "")
    title = f"{result.teacher} within {', '.join(result.budgets)}"
    warnings = [Text(f"{warning}\n", style="yellow") for warning in result.warnings]
    return Group(Rule(Text(title, style="bold"), align="left"), table, Text(), *warnings, Text(files))


def stairs_view(steps: "Sequence[Derived]", notes: Sequence[str]) -> RenderableType:
    """Shows the stages of a recipe: parameters and MACs after each stage's removal, and the removed parts."""
    table = Table(box=None, padding=(0, 2), title="[bold]Stages[/]", title_justify="left")
    for column in ("", "plan", "parameters", "MACs (G)", ""):
        table.add_column(column, justify="right" if column in ("parameters", "MACs (G)") else "left", no_wrap=True)
    teacher = steps[0].teacher_size
    table.add_row("teacher", "", f"{teacher.parameters:,}", f"{teacher.macs / 1e9:,.4g}", _bar(1.0))
    gone: set[str] = set()
    lines = []
    for count, (step, note) in enumerate(zip(steps, notes, strict=True), 1):
        size, new = step.student_size, set(step.removed) - gone
        share = _bar(size.parameters / teacher.parameters)
        table.add_row(
            f"{count}: {note}",
            Text(step.plan.name, style="bold"),
            f"{size.parameters:,}",
            f"{size.macs / 1e9:,.4g}",
            share,
        )
        lines.append(f"  {count} removes {summary(new) or 'nothing more'}")
        gone |= new
    return Group(table, Text(), *map(Text, lines))


def _bar(share: float) -> Text:
    full = round(share * 12)
    return Text("█" * full, style="cyan").append("░" * (12 - full), style="dim").append(f" {share:.0%}")


KINDS = ("resnets", "attentions", "transformer_blocks", "downsamplers", "upsamplers")


def summary(parts: Iterable[str]) -> str:
    """Counts parts by section and kind: `down_blocks.2: 2 attentions, 12 transformer blocks; mid_block`."""
    counts: dict[str, dict[str, int]] = {}
    for part in sorted(parts):
        names = part.split(".")
        section = names[0] if names[0] == "mid_block" else ".".join(names[:2])
        kind = next((name for name in reversed(names) if name in KINDS), "")
        counts.setdefault(section, {}).setdefault(kind, 0)
        counts[section][kind] += 1
    return "; ".join(section if "" in found else f"{section}: {_counted(found)}" for section, found in counts.items())


def _counted(found: Mapping[str, int]) -> str:
    names = {kind: kind.replace("_", " ") for kind in found}
    return ", ".join(f"{n} {names[kind] if n > 1 else names[kind].removesuffix('s')}" for kind, n in found.items())


def _legend(diagram: Diagram) -> str:
    if diagram.sections[0].is_list:
        return f"[{STAYS}]0 1 2[/] blocks that stay, by their numbers, [{GOES}]·[/] one that goes"
    stays, goes = f"[{STAYS}]R A[/] stays", f"[{GOES}]r a[/] goes"
    return f"{stays}, {goes}  R resnet, A attention (A4/10: 4 of 10 blocks), ↓ ↑ resize"


def _denoiser(diagram: Diagram) -> Table:
    """Shows the sections of the denoiser: mirrored ones side by side, others below each other."""
    table = Table.grid(padding=(0, 1))
    for _ in range(5):
        table.add_column(no_wrap=True)
    for row in diagram.rows:
        cells: list[Text] = []
        for section in row.sections:
            note = str(row.width) if row.width else "{} of {}\n{}".format(*section.stays, many(section.kept))
            cells += [_name(section), *([] if cells else [Text(note, style="dim")]), _section(section)]
        table.add_row(*cells)
    return table


def _name(section: Section) -> Text:
    return Text(f"({section.name})", style=GOES) if section.gone else Text(section.name, style="bold")


def _section(section: Section) -> Text:
    """Shows the layers of a section in order. Removed parts have their own signs, for readers who see no colours."""
    lines = [Text(" ").join(map(_mark, layer)) for layer in section.layers]
    return Text("\n" if section.is_list else " ").join(lines)


def _mark(part: Part) -> Text:
    number = part.name.rpartition(".")[2]
    sign, sign_gone = SIGNS.get(part.kind, (f"{number:>2}", " ·"))
    if part.gone:
        return Text(sign_gone, style=GOES)
    if part.colour is not None:  # the digit is for readers who see no colours
        return Text(sign + DIGITS[part.colour], style=COLOURS[part.colour])
    depth, kept = len(part.blocks), sum(part.blocks)
    text = Text(f"{sign}{kept}" if depth > 1 else sign, style=STAYS)
    return text.append(f"/{depth}", style="red") if kept < depth else text


def _sizes(effect: Effect) -> Table:
    table = Table(box=None, padding=(0, 2))
    for column in ("", "teacher", "student", ""):
        table.add_column(column, justify="left" if not column else "right")
    teacher, student = effect.teacher, effect.student
    for label, a, b, form in (
        ("parameters", teacher.parameters, student.parameters, "{:,.0f}"),
        ("size in fp16 (MB)", teacher.parameters * 2 / 1e6, student.parameters * 2 / 1e6, "{:,.1f}"),
        ("MACs of a call (G)", teacher.macs / 1e9, student.macs / 1e9, "{:,.4g}"),
        ("  with attention's", _all(teacher), _all(student), "{:,.4g}"),
    ):
        form = "{:,.0f}" if a >= 10_000 else form
        table.add_row(label, form.format(a), f"[bold]{form.format(b)}[/]", f"[cyan]{100 * b / a:.0f} %[/]")
    return table


def _all(size: Size) -> float:
    return (size.macs + size.attention_macs) / 1e9


def _programs(effect: Effect) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for title, answers in (("loads in", effect.loads_in), ("works with", effect.works_with)):
        table.add_row()
        table.add_row(Text(title, style="bold"))
        for name, answer in answers.items():
            said, _, why = answer.partition(": ")
            table.add_row(f"  {name}", Text(said, style="green" if said == "yes" else "yellow"), Text(why))
    return table


def estimate_view(this: Any, cost: "Estimate") -> RenderableType:
    """Shows the steps and costs of a run (`prunet estimate`)."""
    steps = Table(box=None, padding=(0, 2), title="[bold]Steps[/]", title_justify="left")
    for name, state in cost.steps.items():
        steps.add_row(
            name, "[green]done[/]" if state == "done" else state, Text(str(this.result_of(name)), style="dim")
        )
    memory = Table(box=None, padding=(0, 2), title="[bold]Memory of distillation[/]", title_justify="left")
    for name, count in filter(itemgetter(1), cost.memory_bytes.items()):
        memory.add_row(name, f"{count / 2**30:8.2f} GiB", style="bold" if name == "total" else None)
    speed = number(1 / cost.seconds_per_image)
    lines = Text.from_markup(
        f"[bold]Distillation[/]  {cost.images:,} images, {speed} images/s timed on "
        f"{this.runtime.torch_device} ({this.runtime.mixed_precision}, micro-batch {cost.timed_micro_batch}): "
        f"about [bold]{_hours(cost.distil_hours)}[/]"
    )
    if text_s := cost.text_seconds_per_image:
        lines.append(f"; {percent(text_s / cost.seconds_per_image)} of it embeds captions (data.text: live)")
    title = f"{this.teacher.source} by {this.recipe.plan.name}"
    drawing = [_drawing(cost)] if cost.drawing_hours != 0 else []
    return Group(_cache(cost), plan_view(this.derived.effect(), title), steps, memory, *drawing, lines, _data(cost))


def _hours(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"


def _drawing(cost: "Estimate") -> Text:
    """Shows how long the teacher draws before training."""
    what = "the teacher draws what the student learns from"
    if cost.drawing_hours is None:
        return Text.from_markup(
            f"[bold]Drawing[/]  {what}: a path for each sample, which are counted when they are read"
        )
    return Text.from_markup(
        f"[bold]Drawing[/]  {what}, before the training: about [bold]{_hours(cost.drawing_hours)}[/]"
    )


def _cache(cost: "Estimate") -> Text:
    """Shows the sizes of the cache and of the checkpoints on the disk."""
    parts = cost.cache_bytes_per_sample
    each = f"{many(sum(parts.values()))}B a sample ({', '.join(f'{many(b)}B {name}' for name, b in parts.items())})"
    whole = f"about {many(cost.cache_bytes)}B{' or more' if cost.or_more else ''}, " if cost.cache_bytes else ""
    paths = f"; about {many(cost.path_bytes)}B of the teacher's paths" if cost.path_bytes else ""
    checkpoints = f"\n[bold]Checkpoints[/]  {many(cost.checkpoint_bytes)}B at most" if cost.checkpoint_bytes else ""
    return Text.from_markup(f"[bold]Cache[/]  {whole}{each}{paths}{checkpoints}")


def _data(cost: "Estimate") -> Text:
    """Shows how often training sees each sample, and at which size."""
    size, native, samples = cost.size, cost.native_size, cost.samples
    seen = "counted when they are read"
    if samples:
        most, more = ("at most ", " or more") if cost.or_more else ("", "")
        about, times = "about " if cost.about else "", cost.images / samples
        seen = f"{about}{samples:,}{more}, each seen {most}{times:,.1f} times"
    text = Text.from_markup(f"[bold]Samples[/]  {seen}; {size} px")
    if size != native:
        text.append(f", not the {native} px that the teacher was trained on (data.size)", style="yellow")
    return text
