"""Stock pipelines that start from a picture, made from the parts of a pipeline that starts from noise."""

from typing import Any

from prunet.console import quiet_libraries


@quiet_libraries()
def image_to_image(pipe: Any) -> Any:
    """Returns the stock pipeline for image to image with the parts of `pipe`."""
    from diffusers import AutoPipelineForImage2Image

    return _quiet(AutoPipelineForImage2Image.from_pipe(pipe))


@quiet_libraries()
def inpainting(pipe: Any) -> Any:
    """Returns the stock pipeline for inpainting with the parts of `pipe`."""
    from diffusers import AutoPipelineForInpainting

    return _quiet(AutoPipelineForInpainting.from_pipe(pipe))


def _quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
