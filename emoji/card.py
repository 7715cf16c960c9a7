"""The model card: card.md, filled in. Every number in it comes from training.json and measures.json.

python emoji/card.py emoji/emoji-sd.yaml writes it again, after measure.py.
"""

import json
import math
import sys
from pathlib import Path

import yaml

TEMPLATE = Path(__file__).with_name("card.md")
LAYOUTS = {
    "emoji-sd": "the Stable Diffusion v1 layout (four stages of two layers, cross-attention in three)",
    "emoji-xl": (
        "the SDXL layout (three stages, transformers of depth 0, 2 and 10, two text encoders with pooled embeddings, "
        "size and crop conditioning)"
    ),
}
TITLES = {
    "autoencoder": "autoencoder (128 px to 16x16x4)",
    "text_encoder": "text encoder",
    "text_encoder_2": "second text encoder",
    "unet": "U-Net",
}
ROWS = {
    "training": "pairs it was trained on",
    "heldout-combinations": "known labels in a style never seen of them",
    "heldout-labels": "labels never seen",
}


def measures_table(measures: dict) -> str:
    head = (
        "| prompts | pictures | R@1 | real pictures | shuffled prompts | score (real) | KID | KID of real halves |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for name, title in ROWS.items():
        row = measures[name]
        rows.append(
            f"| {title} ({row['pairs']}) | {row['pictures']:,} | {row['r_at_1']:.1%} | {row['real_r_at_1']:.1%} "
            f"| {row['shuffled_r_at_1']:.1%} | {row['score']:.3f} ({row['real_score']:.3f}) "
            f"| {row['kid']:.4f} | {row['real_kid']:.4f} |"
        )
    return head + "\n".join(rows)


def autoencoder_line(measures: dict) -> str:
    found = f"{measures['psnr_db']:.1f} dB on {measures['psnr_pictures']} held-out pictures"
    return f"The autoencoder gives back {found} (PSNR, mean over the pictures)."


def guidance_line(measures: dict) -> str:
    found = measures.get("r_at_1_by_guidance")
    if not found:
        return f"Guidance scale {measures['guidance_scale']:g}."
    by = ", ".join(f"{float(scale):g}: {value:.0%}" for scale, value in found.items())
    return f"Guidance scale {measures['guidance_scale']:g}, the best on training pairs (R@1 by scale: {by})."


def curve(log: list[dict], width: int = 640, height: int = 300) -> str:
    """The two losses of training-log.jsonl over hours, on a logarithmic axis, as SVG."""
    left, bottom, top = 46, 34, 14
    values = [point[key] for point in log for key in ("train", "heldout")]
    low, high, hours = math.log(min(values)), math.log(max(values)), log[-1]["hours"]

    def at(point: dict, key: str) -> str:
        x = left + (width - left - 10) * point["hours"] / hours
        y = top + (height - bottom - top) * (high - math.log(point[key])) / (high - low)
        return f"{x:.1f},{y:.1f}"

    def text(x: float, y: float, words: str, more: str = "") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" {more}>{words}</text>'

    lines = [
        f'<polyline fill="none" stroke="{color}" stroke-width="2" points="{" ".join(at(p, key) for p in log)}"/>'
        for key, color in (("train", "#2266cc"), ("heldout", "#cc5522"))
    ]
    end = 'text-anchor="end"'
    labels = [
        text(left - 6, top + 8, f"{math.exp(high):.2f}", end),
        text(left - 6, height - bottom, f"{math.exp(low):.2f}", end),
        text(left, height - 12, "0"),
        text(width - 10, height - 12, f"{hours:.1f} hours, {log[-1]['images']:,.0f} pictures", end),
        text(width - 12, top + 14, "training pairs", end + ' fill="#2266cc"'),
        text(width - 12, top + 32, "held-out combinations", end + ' fill="#cc5522"'),
    ]
    frame = f'<path d="M{left} {top}V{height - bottom}H{width - 10}" fill="none" stroke="#888"/>'
    view = f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {view}>'
    back = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, back, frame, *lines, *labels, "</svg>"]) + "\n"


def write_card(out: Path, config: dict) -> None:
    training = json.loads((out / "training.json").read_text())
    log = [json.loads(line) for line in (out / "training-log.jsonl").read_text().splitlines()]
    (out / "training-curve.svg").write_text(curve(log))
    path = out / "measures.json"
    measures = json.loads(path.read_text()) if path.exists() else None
    parts = [
        f"| {TITLES[name]} | {part['parameters'] / 1e6:.1f} M | {part['hours']:.2f} h | {part['images']:,} |"
        for name, part in training.items()
        if name in TITLES
    ]
    labels = (out / "labels.txt").read_text().splitlines()
    card = TEMPLATE.read_text().format(
        name=out.name,
        layout=LAYOUTS[out.name],
        guidance=config["samples"]["guidance_scale"],
        steps=config["samples"]["num_inference_steps"],
        num_labels=len(labels),
        pictures=training["unet"]["pictures"],
        parts="\n".join(parts),
        table=measures_table(measures) + "\n\n" + guidance_line(measures) if measures else "Not measured yet.",
        psnr=autoencoder_line(measures) if measures else "",
        gamma=config["unet"]["min_snr_gamma"],
        floor=config["unet"]["noise_floor"],
        dropout=config["unet"]["caption_dropout"],
        note=config.get("note", ""),
    )
    (out / "README.md").write_text(card)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "")
    if path.stem not in LAYOUTS or not path.is_file():
        sys.exit("give a teacher's settings: emoji/emoji-sd.yaml or emoji/emoji-xl.yaml")
    write_card(path.with_suffix(""), yaml.safe_load(path.read_text()))
