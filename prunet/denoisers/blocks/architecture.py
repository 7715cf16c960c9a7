"""Denoisers with lists of blocks; the config has the length of each list."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, NoReturn

import diffusers
import torch
from typing_extensions import override

from prunet.denoisers.adapter_forms import AdapterForms
from prunet.denoisers.architecture import Architecture, Config, Net
from prunet.denoisers.blocks.compatibility import loads_in, works_with
from prunet.denoisers.blocks.diagram import lists_diagram
from prunet.denoisers.blocks.form import kept_blocks, weight_map
from prunet.denoisers.blocks.inputs import Inputs, Shape
from prunet.denoisers.diagram import Diagram
from prunet.denoisers.form import Form
from prunet.denoisers.pairs import Level, Pair
from prunet.errors import UserError

#: Most blocks in a list; the longest published list has 60.
DEEPEST = 200


class Stays(NamedTuple):
    """Blocks of the first list that must stay: their `numbers` from config and length, and `why`, for messages."""

    numbers: Callable[[Config, int], Iterable[int]] = lambda config, count: ()
    why: str = ""


class Blocks(Architecture):
    """A diffusers class of transformers.

    Args:
        class_name: its name in diffusers.
        lists: maps each config field to the lists with this length; several lists must lose equally many blocks.
        inputs: makes examples of its arguments.
        size: (height, width) of the latents that it was made for, if its config does not have them.
        packs: latents along a side of a token, if they are packed before the model sees them.
        numbers: a config field that names blocks of the first list by their numbers.
        stays: the blocks that must stay in the first list.
        adapters: its adapters, if prunet carries over more than LoRAs.
    """

    part = "transformer"
    levels = ("block",)
    only_form = True

    def __init__(
        self,
        class_name: str,
        lists: Mapping[str, tuple[str, ...]],
        inputs: Inputs,
        *,
        size: tuple[int, int] = (128, 128),
        packs: int | None = None,
        numbers: str | None = None,
        stays: Stays = Stays(),
        adapters: AdapterForms | None = None,
    ) -> None:
        self.class_name, self._lists, self._inputs = class_name, lists, inputs
        self._size, self._packs, self._numbers, self._stays = size, packs, numbers, stays
        self.adapters = adapters or AdapterForms()
        self.parts_help = f"blocks of {', '.join(name for names in lists.values() for name in names)}{stays.why}"

    @override
    @property
    def blocks(self) -> tuple[str, ...]:
        return tuple(getattr(diffusers, self.class_name)._no_split_modules)

    @override
    def make(self, config: Config) -> Net:
        for field in self._lists:
            if not 1 <= config.get(field, 1) <= DEEPEST:
                raise ValueError(f"{field}: {config[field]}, not 1 to {DEEPEST} blocks")
        fields = {key: value for key, value in config.items() if not key.startswith("_")}
        net: Net = getattr(diffusers, self.class_name)(**fields)
        return net

    def lists(self, config: Config) -> dict[str, tuple[str, ...]]:
        """Maps each config field to the lists with this length, among the lists that this config has."""
        net = self.skeleton(config)
        return {field: tuple(name for name in names if getattr(net, name)) for field, names in self._lists.items()}

    def counts(self, config: Config) -> dict[str, int]:
        """Maps each list to its number of blocks."""
        net = self.skeleton(config)
        return {name: len(getattr(net, name)) for names in self.lists(config).values() for name in names}

    @override
    def parts(self, config: Config) -> list[str]:
        counts = self.counts(config)
        first = next(iter(counts))
        stay = {f"{first}.{number}" for number in self._stays.numbers(self.skeleton(config).config, counts[first])}
        names = (f"{name}.{number}" for name, count in counts.items() for number in range(count))
        return [name for name in names if name not in stay]

    @override
    def outline(self, config: Config) -> str:
        counts = self.counts(config).items()
        return f"{self.class_name} with the blocks " + ", ".join(f"{n}.0 to .{count - 1}" for n, count in counts)

    @override
    def form(self, config: Config, removed: Mapping[str, str]) -> Form:
        kept = kept_blocks(self.lists(config), self.counts(config), removed)
        student = {**config, "_class_name": self.class_name}
        if removed:
            student |= {field: len(kept[names[0]]) for field, names in self.lists(config).items()}
        if removed and self._numbers:
            first, named = next(iter(kept.values())), self.skeleton(config).config[self._numbers]
            student[self._numbers] = [first.index(number) for number in named if number in first]
        mapping = {f"{name}.{i}": f"{name}.{number}" for name, ids in kept.items() for i, number in enumerate(ids)}
        return Form(student, mapping, weight_map(self.skeleton(config), self.skeleton(student), mapping, removed), ())

    @override
    def pairs(self, teacher: Config, form: Form, level: Level) -> tuple[Pair, ...]:
        return tuple(Pair(ours, theirs) for ours, theirs in form.module_map.items())

    @override
    def loads_in(self, config: Config) -> dict[str, str]:
        return loads_in(self.skeleton(config))

    @override
    def works_with(self, teacher: Config, form: Form) -> dict[str, str]:
        return works_with(self.skeleton(teacher), form.module_map, self.adapters.controlnet)

    @override
    def diagram(self, config: Config, gone: Iterable[str]) -> Diagram:
        return lists_diagram(self.skeleton(config), self.counts(config), gone)

    @override
    def native_latent_size(self, config: Config) -> tuple[int, int]:
        side = self.skeleton(config).config.get("sample_size")
        return (side, side) if side else self._size

    @override
    def side_step(self, config: Config) -> int:
        if self._packs is not None:
            return self._packs
        patch = self.skeleton(config).config["patch_size"]
        return int(patch[-1] if isinstance(patch, list | tuple) else patch)

    @override
    def example_inputs(
        self,
        config: Config,
        batch_size: int = 1,
        *,
        latent_size: tuple[int, int] | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Any]:
        shape = Shape(batch_size, *(latent_size or self.native_latent_size(config)), device, dtype)
        return self._inputs(self.skeleton(config).config, shape)

    @override
    def call(self, *_: Any) -> NoReturn:
        raise UserError(f"{self.class_name}: prunet only plans and builds its students; it cannot draw or train yet")
