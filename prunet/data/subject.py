"""A cache from a folder of pictures with one prompt for all of them."""

from pathlib import Path

from prunet.console import progress
from prunet.data.cache import BLOCK, Cache, block_path, read_spec
from prunet.data.encoding import begin, cache_spec, encode_block, finish
from prunet.data.listing import walk
from prunet.data.pictures import PICTURE_FILES, BrokenPicture, Picture, make_picture
from prunet.disk.ownership import check_place, hold
from prunet.errors import UserError
from prunet.recipe.recipe import Data
from prunet.teacher.teacher import Teacher


def subject_pictures(folder: Path, prompt: str) -> list[Picture]:
    """Returns all pictures in `folder` and the folders below, each with `prompt` as its caption.

    Raises:
        UserError: the folder is missing or has no pictures, or a picture cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"--pictures {folder}: no such folder: give a folder with pictures of the subject")
    names = sorted(under + name for under, files in walk(folder) for name in files)
    names = [name for name in names if name.lower().endswith(PICTURE_FILES)]
    if not names:
        raise UserError(
            f"--pictures {folder}: no pictures in it ({', '.join(PICTURE_FILES[:3])}, ...): give some, such as 5"
        )
    pictures = [make_picture(name, (prompt,), "", folder / name) for name in names]
    for picture in pictures:
        try:
            picture.open()
        except BrokenPicture as error:
            raise UserError(f"--pictures {folder / error.key}: {error.why}: remove it or fix it") from error
    return pictures


def cache_subject(teacher: Teacher, source: Path, prompt: str, folder: Path, *, size: int, seed: int) -> Cache:
    """Encodes all pictures in `source` with one prompt into `folder`; resumes where it was stopped.

    Raises:
        UserError: `subject_pictures` refuses the pictures, the folder has another cache, or no space is left.
    """
    data = Data(source=str(source), size=size)
    spec = cache_spec(teacher, data, seed, folder) | {"caption": prompt}
    if (folder / "spec.json").is_file():
        if read_spec(folder) != spec:
            raise UserError(
                f"{folder}: a cache of other pictures or another model: delete it, or give another --output"
            )
        if (folder / "cache.json").is_file():
            return Cache.open(folder)
    pictures = subject_pictures(source, prompt)
    check_place(folder, "cache", "--output")
    with hold(folder, "cache"):
        begin(teacher, data, folder, spec)
        starts = range(0, len(pictures), BLOCK)
        with progress("Encoding pictures", len(pictures)) as bar:
            for block, start in enumerate(starts):
                if not (path := block_path(folder, block)).is_file():
                    encode_block(teacher, data, path, pictures[start : start + BLOCK], size, seed, {}, bar.advance)
        finish(teacher, data, folder, len(starts))
    return Cache.open(folder)
