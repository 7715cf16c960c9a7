"""The verb that shows models in a browser."""

import ipaddress
import time
from typing import Annotated, Any

import typer

from prunet.cli.options import ConfigOption, Json, app, say, with_runtime
from prunet.console import say as tell


@app.command()
@with_runtime("device", "precision")
def play(
    runtime: Any,
    model: Annotated[str, typer.Argument(help="Run folder (its teacher and student), or any model.")],
    other: Annotated[str | None, typer.Argument(help="A second model, to show beside the first.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; by default only this machine can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: any free port.")] = 7860,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Show teacher and student side by side in a browser, with the same prompt and noise.

    The page can set steps, guidance, sampler, a picture to start from and a LoRA. It needs the extra `ui` (prunet
    doctor shows how to install it). Ctrl-C ends it.

    Example: prunet play runs/demo
    """
    from prunet.play.models import open_players
    from prunet.play.page import gradio, serve

    gradio()
    models = [model] if other is None else [model, other]
    players = open_players(models, config=config, device=runtime.torch_device, dtype=runtime.dtype)
    page = serve(players, host=host, port=port)
    if not _is_loopback(host):
        tell("[yellow]Anyone who reaches this address can draw and upload files:[/] there is no password")
    say(as_json, {"url": page.local_url}, f"{page.local_url} (Ctrl-C ends it)")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:  # the usual end
        pass
    finally:
        page.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
