"""Builds the emoji text-image set: WebDataset shards of 128 px pictures with captions.

    python emoji/make_data.py --out emoji/data

Four npm packages are fetched with `npm pack` (nothing is installed), joined by code point, drawn on white at
128x128 and written as tar shards of `key.webp` + `key.json`. See SOURCES.md for what each package is and its
licence. The same packages and the same library versions give the same bytes.
"""

import argparse
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import resvg_py
from PIL import Image
from rich.progress import track
from shards import SPLITS, STYLES

PACKAGES = {  # name -> (npm spec, tarball, sha256 of the tarball)
    "labels": (
        "emojibase-data@17.0.0",
        "emojibase-data-17.0.0.tgz",
        "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a",
    ),
    "3d": (
        "@lobehub/fluent-emoji-3d@1.1.0",
        "lobehub-fluent-emoji-3d-1.1.0.tgz",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
    ),
    "noto": (
        "@iconify-json/noto@1.2.9",
        "iconify-json-noto-1.2.9.tgz",
        "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",
    ),
    "flat": (
        "@discordapp/twemoji@16.0.1",
        "discordapp-twemoji-16.0.1.tgz",
        "2278fd609501e20dc646a546c1d7bbcab86a4c38010ded12b45e61f9687b9d0a",
    ),
}
DEFAULT_STYLE = "3d"  # the style of captions without a style word
SIZE = 128
COMPONENT_GROUP = 2  # skin tones and hair pieces: not pictures on their own


def normalize(hexcode: str) -> str:
    """Removes what the packages write differently: the variation selector FE0F, and case."""
    return "-".join(part for part in hexcode.lower().split("-") if part != "fe0f")


def fetch(name: str, cache: Path) -> tarfile.TarFile:
    """Downloads a package with `npm pack` into the cache, once, and checks that it is the expected tarball."""
    spec, filename, sha256 = PACKAGES[name]
    path = cache / filename
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", spec, "--silent", "--pack-destination", str(cache)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path} is not the expected {spec}: sha256 {found}, expected {sha256}. Delete it and rerun.")
    return tarfile.open(path)


def read_json(package: tarfile.TarFile, member: str):
    return json.loads(package.extractfile(member).read())


def read_labels(package: tarfile.TarFile) -> dict[str, dict]:
    """Maps code points to entries, without the skin-tone variants, which are nested in their base emoji."""
    entries = read_json(package, "package/en/data.json")
    kept = [entry for entry in entries if entry.get("group", COMPONENT_GROUP) != COMPONENT_GROUP]
    return {normalize(entry["hexcode"]): entry for entry in kept}


# --- readers of the picture sets: each maps code points to functions that draw them


def on_white(image: Image.Image) -> Image.Image:
    """Puts a picture on white before resizing; otherwise hidden colours of transparent pixels show at the edges."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw_svg(svg: str) -> Image.Image:
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIZE, height=2 * SIZE, skip_system_fonts=True)
    return on_white(Image.open(io.BytesIO(png)))


def read_files(package: tarfile.TarFile, suffix: str, draw: Callable[[bytes], Image.Image]) -> dict[str, Callable]:
    members = [member for member in package.getmembers() if member.name.endswith(suffix)]

    def drawer(member: tarfile.TarInfo) -> Callable[[], Image.Image]:
        return lambda: draw(package.extractfile(member).read())

    return {normalize(Path(member.name).stem): drawer(member) for member in members}


def read_iconify(package: tarfile.TarFile) -> dict[str, Callable]:
    """Reads Iconify's format: SVG bodies by name, and a table from code points to names, which may be aliases."""
    icons = read_json(package, "package/icons.json")
    aliases = icons.get("aliases", {})
    width, height = icons["width"], icons["height"]

    def drawer(name: str) -> Callable[[], Image.Image]:
        while name not in icons["icons"]:
            name = aliases[name]["parent"]
        body = icons["icons"][name]["body"]
        namespaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
        svg = f'<svg {namespaces} viewBox="0 0 {width} {height}" width="{width}" height="{height}">{body}</svg>'
        return lambda: draw_svg(svg)

    return {normalize(code): drawer(name) for code, name in read_json(package, "package/chars.json").items()}


def read_pictures(cache: Path) -> dict[str, dict[str, Callable]]:
    return {
        "3d": read_files(fetch("3d", cache), ".webp", lambda data: on_white(Image.open(io.BytesIO(data)))),
        "noto": read_iconify(fetch("noto", cache)),
        "flat": read_files(fetch("flat", cache), ".svg", lambda data: draw_svg(data.decode())),
    }


# --- captions and splits


def captions(label: str, style: str, tags: list[str]) -> list[str]:
    """Returns several captions of one picture: the word orders that a user may try, all in lower case.

    A caption must not promise two different pictures, so only the default style may leave its name out.
    """
    label = label.lower()
    # Tags that only repeat words of the label teach nothing.
    extra = [tag.lower() for tag in tags if tag.lower() not in label][:4]
    forms = [
        f"{label}, {style}",
        f"{style} {label}",
        f"a {style} emoji of {label}",
        f"{label} in {style} style",
    ]
    if extra:
        forms.append(f"{label}, {style}, {', '.join(extra)}")
        forms.append(f"{', '.join(reversed(extra[:2]))}, {label}, {style}")
    if style == DEFAULT_STYLE:
        forms.insert(0, label)
        forms.append(f"{label} emoji")
    return forms


def chance(*words: str) -> float:
    """Returns a number in [0, 1) that depends only on the words, so new emoji or another order keep the splits."""
    return int.from_bytes(hashlib.sha256("/".join(words).encode()).digest()[:8], "big") / 2**64


def split_of(label: str, style: str, seed: str) -> str:
    """Holds out 5 % of the labels in all styles, and 10 % of the remaining (label, style) pairs."""
    if chance(seed, label) < 0.05:
        return "heldout-labels"
    return "heldout-combinations" if chance(seed, label, style) < 0.10 else "train"


def samples(cache: Path, seed: str, quality: int) -> Iterator[tuple[str, str, bytes, bytes]]:
    """Yield (split, key, webp, json) in a fixed order."""
    labels, pictures = read_labels(fetch("labels", cache)), read_pictures(cache)
    jobs = [(code, style) for code in sorted(labels) for style in STYLES if code in pictures[style]]
    for code, style in track(jobs, description="drawing"):
        label, tags = labels[code]["label"], labels[code].get("tags", [])
        webp = io.BytesIO()
        pictures[style][code]().save(webp, "WEBP", quality=quality, method=6)
        record = {
            "captions": captions(label, style, tags),
            "label": label,
            "style": style,
            "tags": tags,
            "codepoint": code,
        }
        text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
        yield split_of(label, style, seed), f"{code}_{style}", webp.getvalue(), text


# --- shards


def add_file(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)  # mtime 0, owner 0, mode 644: the bytes do not depend on user and time
    info.size = len(data)
    shard.addfile(info, io.BytesIO(data))


def write_shards(out: Path, split: str, rows: list[tuple[str, bytes, bytes]], per_shard: int, first: set[str]) -> None:
    # The labels named in `first` come first, so that the small teacher's examples need one shard and a limit.
    # Both parts are shuffled by a hash of the key.
    rows = sorted(rows, key=lambda row: (json.loads(row[2])["label"] not in first, chance(row[0])))
    for index in range(0, len(rows), per_shard):
        path = out / f"{split}-{index // per_shard:04d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as shard:
            for key, webp, text in rows[index : index + per_shard]:
                add_file(shard, f"{key}.webp", webp)
                add_file(shard, f"{key}.json", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = Path(__file__).parent
    parser.add_argument("--out", type=Path, default=here / "data", help="folder of the shards (%(default)s)")
    parser.add_argument(
        "--cache", type=Path, default=Path.home() / ".cache/prunet/npm", help="npm tarballs (%(default)s)"
    )
    parser.add_argument("--seed", default="prunet", help="names the split; another word, another split (%(default)s)")
    parser.add_argument("--quality", type=int, default=88, help="WebP quality (%(default)s)")
    parser.add_argument("--per-shard", type=int, default=1000, help="samples in one tar (%(default)s)")
    args = parser.parse_args()

    rows: dict[str, list] = {split: [] for split in SPLITS}
    for split, *row in samples(args.cache, args.seed, args.quality):
        rows[split].append(row)
    args.out.mkdir(parents=True, exist_ok=True)
    for old in args.out.glob("*.tar"):
        old.unlink()
    first = set((here / "first-labels.txt").read_text(encoding="utf-8").split("\n"))
    for split in SPLITS:
        write_shards(args.out, split, rows[split], args.per_shard, first)
        labels = {json.loads(text)["label"] for _, _, text in rows[split]}
        print(f"{split}: {len(rows[split])} pictures of {len(labels)} labels")
    total = sum(path.stat().st_size for path in args.out.glob("*.tar"))
    print(f"{total / 1e6:.1f} MB in {args.out}")


if __name__ == "__main__":
    main()
