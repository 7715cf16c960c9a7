"""Pictures by stable-diffusion.cpp, a program of its own, for timing: from the log that it prints."""

import re
import shutil
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from prunet.console import progress
from prunet.errors import UserError
from prunet.recipe.values import Drawing
from prunet.speed.clock import Call, resident_kb
from prunet.teacher.teacher import Teacher

#: Pictures that the program draws; it opens the file again for each.
REPEATS = 3
#: Part of a picture -> what the program's log calls it.
PARTS = {"text": "get_learned_condition", "sd.cpp": "sampling", "vae": "decode_first_stage"}


class CppFile(Teacher):
    """A single file for stable-diffusion.cpp, known by the configs that its export wrote beside it.

    `program`: the command `sd-cli`.

    Raises:
        UserError: there is no such program, or the configs are missing.
    """

    def __init__(self, file: Path | str, program: str) -> None:
        self.single, found = Path(file), shutil.which(program)
        if found is None:
            raise UserError(f"--sd-cpp: no program {program}: give the path of stable-diffusion.cpp's sd-cli")
        self.program = found
        configs = self.single.with_suffix(".config")
        if not configs.is_dir():
            raise UserError(
                f"{file}: no {configs.name} beside it: export it with `prunet export RUN --gguf q8_0` or "
                "`--single-file --for sd.cpp`"
            )
        super().__init__(configs)

    def check_weights(self, *, headers_only: bool = False) -> None:
        """Checks nothing: the program itself checks the file."""


class CppModel:
    """A single file that stable-diffusion.cpp draws with; it has the fields of `TorchModel`.

    `process_mb`: the program's peak memory (MiB), known after `times`; None if the system does not report it.
    """

    runtime = mode = "sd.cpp"

    def __init__(self, file: CppFile) -> None:
        self._file, self.device = file, torch.device("cpu")
        self.config, self.scale = file.unet_config, file.vae_scale
        self.precision, self.weights_mb = file.single.suffix[1:], file.single.stat().st_size / 2**20
        self.process_mb: float | None = None

    def calls(self, batch: int, rows: int, latent_size: tuple[int, int]) -> dict[str, Call]:
        """Returns no calls: the parts are timed by the program (`times`)."""
        return {}

    def times(self, prompt: str, how: Drawing, size: int) -> dict[str, list[float]]:
        """Draws `REPEATS` pictures of `size` pixels; returns the milliseconds of each part, of the denoiser a step.

        Raises:
            UserError: the program fails, or does not print the seconds of its parts.
        """
        times: dict[str, list[float]] = defaultdict(list)
        with progress(f"Pictures by {Path(self._file.program).name}", REPEATS) as bar:
            for _ in range(REPEATS):
                log = self._log(prompt, how, size)
                for part, words in PARTS.items():
                    found = re.search(rf"\b{words} completed, taking ([\d.]+) ?(ms|s)\b", log)
                    if found is None:
                        raise UserError(
                            f"--sd-cpp: {self._file.program} does not print the seconds of {words}: build a newer one"
                        )
                    took = float(found[1]) * (1 if found[2] == "ms" else 1000)
                    times[part].append(took / (how.steps if part == self.mode else 1))
                bar.advance()
        return times

    def _log(self, prompt: str, how: Drawing, size: int) -> str:
        """Runs the program once, by Euler's method (any sampler of a call a step takes as long); returns its log."""
        single = self._file.single
        with TemporaryDirectory() as folder:
            command: list[object] = [self._file.program, "-m", single, "-p", prompt, "-o", Path(folder, "picture.png")]
            command += ["-W", size, "-H", size, "--steps", how.steps, "--cfg-scale", how.guidance_scale, "-s", 0]
            command += ["--sampling-method", "euler", "-t", torch.get_num_threads()]
            with Path(folder, "log").open("w+b") as log:
                with subprocess.Popen(list(map(str, command)), stdout=log, stderr=subprocess.STDOUT) as process:
                    # Not the system's own account: in it a process is never smaller than the one that started it.
                    while process.poll() is None:
                        peak_kb = resident_kb("VmHWM", process.pid)
                        self.process_mb = max(self.process_mb or 0, peak_kb / 1024) if peak_kb else self.process_mb
                        time.sleep(0.02)
                log.seek(0)
                text = log.read().decode(errors="replace")
            if process.returncode or not Path(folder, "picture.png").is_file():
                lines = [line for line in text.splitlines() if "error" in line.lower()] or text.splitlines() or [""]
                raise UserError(f"{single}: {self._file.program} does not draw with it: {lines[-1].strip()[:200]}")
        return text
