"""Scores: the error of a removal, and the latency of the student; each is measured once and kept."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunet.denoisers.architecture import Net
from prunet.disk.files import read_label, write_json
from prunet.errors import NotFinite, UserError
from prunet.intervals import Array, Measure, bootstrap
from prunet.plan.derived import Derived
from prunet.search.examples import GUIDANCE, Examples
from prunet.speed.clock import denoiser_call, device_name, times_in_turn
from prunet.student.student import sharing
from prunet.teacher.teacher import Teacher, after_overflow
from prunet.words import difference

REPEATS = 5  # repeats of a timed call, in turn with the teacher's


def teacher_ms(teacher: Teacher) -> float:
    """Returns the milliseconds of a call of the teacher with batch 2 on its device."""
    with torch.no_grad():
        call = denoiser_call(teacher.unet, 2, device=teacher.device)
        return float(np.median(times_in_turn({"teacher": call}, REPEATS, teacher.device)["teacher"]))


class Scores:
    """Errors and latencies of students of `teacher`, each measured at its first use.

    `folder`: where they are kept (`scores.json`), so that a stopped search resumes; None keeps them in memory.

    Raises:
        UserError: the folder has scores of another teacher, or of other examples.
    """

    def __init__(self, teacher: Teacher, examples: Examples, folder: Path | None = None) -> None:
        self.teacher, self.examples = teacher, examples
        self._file = None if folder is None else folder / "scores.json"
        label = {"teacher": teacher.fingerprint([teacher.architecture.part]), "precision": str(teacher.dtype)}
        self._kept: dict[str, Any] = {"made_from": {**label, **examples.label}, "errors": {}, "latency": {}}
        if self._file is not None and self._file.is_file():
            found = read_label(self._file, self._kept)
            ours = self._kept["made_from"]
            older = {"schedule": ours.get("schedule"), "pipeline": ours.get("pipeline")}  # what older ones lack
            older |= {"guidance": GUIDANCE} if "guidance" in ours else {}
            if apart := difference({key: older[key] for key in older if key in ours} | found["made_from"], ours):
                raise UserError(f"{self._file}: scores of another search: {apart}: give another folder, or delete it")
            self._kept = found | {"made_from": ours}
        self._groups = np.unique(np.asarray(examples.groups), return_inverse=True)[1]
        self._outputs: list[torch.Tensor] | None = None

    def error(self, derived: Derived) -> Measure:
        """Returns the squared error of the untrained student's output divided by the teacher's squared output.

        Its 95 % interval is over the prompts or pictures.

        Raises:
            UserError: the student's output is not finite.
        """
        key = key_of(derived)
        if key not in self._kept["errors"]:
            self.keep("errors", key, self._errors(self._student(derived)).tolist())
        return self.measure(self._kept["errors"][key])

    def error_of(self, net: Net) -> list[float]:
        """Returns the squared errors of any student, one for each group of examples; see `measure`."""
        return list(self._errors(nn.Module.to(net, self.teacher.device, self.teacher.dtype).eval()))

    def measure(self, errors: Iterable[float]) -> Measure:
        """Returns the relative error from the squared errors of each group."""
        values, power = np.asarray(list(errors)), self._power
        return bootstrap(len(values), lambda which: values[which].sum(-1) / power[which].sum(-1))

    def latency(self, derived: Derived) -> float:
        """Returns the milliseconds of a call with batch 2, as for one picture with guidance.

        The call is timed in turn with the teacher's, and only their ratio counts, so a disturbance affects both.
        """
        device = self.teacher.device
        key = f"{device_name(device)} {key_of(derived)}"
        if key not in self._kept["latency"]:
            nets = {"teacher": self.teacher.unet, "student": self._student(derived)}
            with torch.no_grad():
                calls = {name: denoiser_call(net, 2, device=device) for name, net in nets.items()}
                times = times_in_turn(calls, REPEATS, device)
            ratios = [student / teacher for student, teacher in zip(times["student"], times["teacher"], strict=True)]
            self.keep("latency", key, [float(np.median(times["teacher"])), float(np.median(ratios))])
        return float(self._kept["latency"][key][1] * self.teacher_latency)

    @property
    def teacher_latency(self) -> float:
        """Returns the milliseconds of a call of the teacher on this device, from its first timing."""
        device = device_name(self.teacher.device)
        return float(next(pair[0] for key, pair in self._kept["latency"].items() if key.startswith(f"{device} ")))

    def keep(self, kind: str, key: str, value: Any) -> None:
        """Keeps a value."""
        self._kept.setdefault(kind, {})[key] = value
        if self._file is not None:
            write_json(self._file, self._kept)

    def kept(self, kind: str) -> Mapping[str, Any]:
        """Returns the kept values of a kind, by key."""
        return dict(self._kept.get(kind, {}))

    # -- measuring

    def _student(self, derived: Derived) -> Net:
        student = sharing(self.teacher.unet, derived)
        return nn.Module.to(student, self.teacher.device, self.teacher.dtype)

    @property
    def _power(self) -> Array:
        if "power" not in self._kept:
            self._kept["power"] = self._sums([output.square() for output in self._teachers()]).tolist()
        return np.asarray(self._kept["power"])

    @torch.no_grad()
    def _teachers(self) -> list[torch.Tensor]:
        if self._outputs is None:
            self._outputs = [call(self.teacher.unet).double().cpu() for call in self.examples.calls]
        return self._outputs

    @torch.no_grad()
    def _errors(self, net: Net) -> Array:
        """Returns the squared errors summed over each group (G,)."""
        apart = [
            (call(net).double().cpu() - theirs).square()
            for call, theirs in zip(self.examples.calls, self._teachers(), strict=True)
        ]
        errors, _ = self._sums(apart), self._power
        if not np.isfinite(errors).all():
            raise NotFinite(
                f"{self.teacher.source}: a student's output is not finite: {after_overflow(self.teacher.dtype)}"
            )
        return errors

    def _sums(self, squares: list[torch.Tensor]) -> Array:
        by_example = torch.cat([square.flatten(1).sum(1) for square in squares]).numpy()
        return np.bincount(self._groups, by_example).astype(np.float64)


def key_of(derived: Derived) -> str:
    """Returns a name for the parts that a plan removes, for any patterns that remove them."""
    return hashlib.sha256(json.dumps(sorted(derived.removed)).encode()).hexdigest()[:16]
