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
    other: Annotated[str | None, typer.Argument(help="A second model, to stand beside the first.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; by default this machine alone can reach it.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 7860,
    config: ConfigOption = None,
    as_json: Json = False,
) -> None:
    """Show teacher and student side by side in a browser, at equal prompt and noise.

    Steps, guidance, sampler, a picture to start from and a LoRA can be set. Needs the extra ui; Ctrl-C ends it.

    Example: prunet play runs/demo
    """
    from prunet.play.models import open_players
    from prunet.play.page import gradio, serve

    gradio()
    models = [model] if other is None else [model, other]
    players = open_players(models, config=config, device=runtime.torch_device, dtype=runtime.dtype)
    page = serve(players, host=host, port=port)
    if not _is_loopback(host):
        tell("[yellow]Whoever reaches this address can draw and upload files:[/] there is no password")
    say(as_json, {"url": page.local_url}, f"{page.local_url} (Ctrl-C ends it)")
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:  # this is how it ends
        pass
    finally:
        page.close()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
