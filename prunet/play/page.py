"""The page, made with Gradio, and the server that shows it.

By default the server listens only on loopback. It sends nothing elsewhere: no sharing, no analytics, no fonts or
scripts from other servers. It draws one picture of each model at a time, lets few requests wait, and limits uploads.
"""

import os
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, NamedTuple

from prunet.data.pictures import read_mask, read_picture
from prunet.errors import UserError
from prunet.play.models import Asked, Drawn, Player
from prunet.recipe.values import Drawing
from prunet.sampling.pictures import picture_rmse
from prunet.sampling.samplers import SAMPLERS
from prunet.sampling.start import STRENGTH, StartPicture

#: Limits for the settings on the page.
MOST_STEPS, MOST_GUIDANCE, MOST_SEED, LONGEST_PROMPT = 100, 30.0, 2**31 - 1, 1000
#: Requests that wait while one is drawn; more are refused.
MOST_WAITING = 8
LARGEST_UPLOAD = "500mb"  # a LoRA of rank 128 for SDXL has about 400 MB
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
#: Pictures stay side by side on a phone too, because the page is for comparing them.
CSS = """
.pictures { flex-wrap: nowrap !important; }
.pictures > * { min-width: 0 !important; }
.pictures .image-frame { width: 100%; }
.pictures img { width: 100% !important; height: auto !important; aspect-ratio: 1; object-fit: contain; }
"""


class Settings(NamedTuple):
    """The settings on the page in their order there: controls, or the values of a request."""

    steps: Any
    guidance: Any
    sampler: Any
    image: Any
    mask: Any
    strength: Any
    lora: Any


def gradio() -> ModuleType:
    """Imports Gradio with its analytics off.

    Raises:
        UserError: it is not installed.
    """
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
    try:
        import gradio
    except ImportError:
        raise UserError("prunet play: needs Gradio: pip install 'prunet[ui]'") from None
    return gradio


def make_page(players: Sequence[Player]) -> Any:
    """Makes the page: settings on top, a picture of each model below."""
    gr = gradio()
    names = " and ".join(player.name for player in players)
    with gr.Blocks(title=f"{names} · prunet", analytics_enabled=False, delete_cache=(3600, 3600)) as page:
        gr.Markdown(f"# {names}\nEqual prompt, equal noise." if len(players) > 1 else f"# {names}")
        with gr.Row(equal_height=True):
            prompt = gr.Textbox(
                label="Prompt", max_length=LONGEST_PROMPT, autofocus=True, scale=4, elem_id="prompt", submit_btn=False
            )
            seed = gr.Number(label="Seed", value=0, precision=0, minimum=0, maximum=MOST_SEED, scale=1, min_width=100)
        button = gr.Button("Draw", variant="primary", elem_id="draw")
        with gr.Row(elem_classes="pictures"):
            shown = [_shown(gr, player) for player in players]
        apart = gr.Markdown(elem_id="distance")
        with gr.Accordion("Steps, guidance, picture to start from, mask, LoRA", open=False):
            settings = _settings(gr, players)
        outputs = [*(part for pair in shown for part in pair), apart]
        asked = {"fn": _answer(gr, players), "inputs": [prompt, seed, *settings], "outputs": outputs}
        for event in (button.click, prompt.submit):
            event(**asked, api_visibility="private", concurrency_id="draw", concurrency_limit=1)
    return page.queue(max_size=MOST_WAITING, default_concurrency_limit=1)


def _shown(gr: Any, player: Player) -> tuple[Any, Any]:
    """Returns the elements for a model's picture, its time and its memory."""
    with gr.Column(min_width=100):
        gr.Markdown(f"### {player.name}")
        picture = gr.Image(
            show_label=False,
            alt_text=f"What the {player.name} drew",
            interactive=False,
            format="png",
            buttons=["download"],
            min_width=100,
        )
        return picture, gr.Markdown()


def _settings(gr: Any, players: Sequence[Player]) -> list[Any]:
    """Returns the controls of `Asked` and `Drawing` that have defaults."""
    default = Drawing()
    own = {player.name: how for player in players if (how := player.made_for)}
    if own:
        gr.Markdown("; ".join(f"{name} draws as it was made for: {how}" for name, how in own.items()))
    with gr.Row():
        steps = gr.Slider(1, MOST_STEPS, default.steps, step=1, label="Steps", min_width=200)
        guidance = gr.Slider(0, MOST_GUIDANCE, default.guidance_scale, step=0.1, label="Guidance scale", min_width=200)
        sampler = gr.Dropdown(list(SAMPLERS), value=default.sampler, label="Sampler", filterable=False, min_width=200)
    with gr.Row():
        upload = {"type": "filepath", "sources": ["upload"], "height": 220, "min_width": 200}
        image = gr.Image(label="Start from a picture", **upload)
        mask = gr.Image(label="Mask: only its white part is drawn", **upload)
        with gr.Column(min_width=200):
            strength = gr.Slider(0.05, 1, STRENGTH, step=0.05, label="Strength: how much of the picture changes")
            lora = gr.File(label="LoRA of the teacher (.safetensors)", file_types=[".safetensors"], height=120)
    return list(Settings(steps, guidance, sampler, image, mask, strength, lora))


def _answer(gr: Any, players: Sequence[Player]) -> Callable[..., list[Any]]:
    """Returns the function that answers a request with pictures, times and memory, and then their distance."""

    def answer(prompt: str, seed: int, *values: Any) -> list[Any]:
        try:
            asked = _asked(prompt, seed, Settings(*values), players[0].opened.native_size)
            drawn = [player.draw(asked) for player in players]
        except UserError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from error
        told = [part for one in drawn for part in (one.picture, _took(one))]
        return [*told, _distance(drawn)]

    return answer


def _asked(prompt: str, seed: int, given: Settings, size: int) -> Asked:
    steps, guidance, sampler = given.steps, given.guidance, given.sampler
    if not (1 <= steps <= MOST_STEPS and 0 <= guidance <= MOST_GUIDANCE and sampler in SAMPLERS):
        raise UserError(f"steps up to {MOST_STEPS}, guidance up to {MOST_GUIDANCE:g}, a sampler of the list")
    if given.mask and not given.image:
        raise UserError("mask: needs a picture to start from: give both, or take the mask away")
    picture = read_picture(Path(given.image), "picture") if given.image else None
    mask = read_mask(Path(given.mask), "mask") if given.mask else None
    return Asked(
        prompt=prompt,
        seed=int(seed or 0),
        size=size,
        drawing=Drawing(steps=int(steps), guidance_scale=guidance, sampler=sampler),
        start=StartPicture(picture, given.strength, mask) if picture else None,
        lora=Path(given.lora) if given.lora else None,
    )


def _took(drawn: Drawn) -> str:
    memory = f", peak {drawn.peak_memory_mb:,.0f} MiB" if drawn.peak_memory_mb is not None else ""
    return f"**{drawn.seconds:.2f} s**{memory}  \n{drawn.drawing}"


def _distance(drawn: Sequence[Drawn]) -> str:
    if len(drawn) < 2:
        return ""
    first, second = drawn
    apart = picture_rmse(first.picture, second.picture)
    return f"The pictures differ by **{apart:.3f}** (root mean squared error, 0 to 1)."


def serve(players: Sequence[Player], *, host: str, port: int) -> Any:
    """Shows the page at `host`:`port` (0: any free port) and returns it; the server runs in threads.

    Uploads and pictures lie in a temporary folder, which is deleted at the end.

    Raises:
        UserError: Gradio is not installed, or the port is in use.
    """
    folder = TemporaryDirectory(prefix="prunet-play-")
    os.environ["GRADIO_TEMP_DIR"] = folder.name
    gr = gradio()
    page = make_page(players)
    page.prunet_uploads = folder  # lasts as long as the page
    try:
        socket.create_server((host, port)).close()  # otherwise uvicorn ends its thread with a long traceback
        page.launch(
            server_name=host,
            server_port=port or None,
            theme=gr.themes.Base(font=FONTS, font_mono=["monospace"]),
            css=CSS,
            share=False,
            quiet=True,
            show_error=False,
            prevent_thread_lock=True,
            max_file_size=LARGEST_UPLOAD,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            strict_cors=True,
        )
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen at {host}:{port} ({error}): give another") from error
    return page
