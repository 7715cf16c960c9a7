"""Writes the model card from card.md. Every number in it comes from training.json and measures.json.

python emoji/card.py emoji/emoji-sd.yaml writes it again, after measure.py.
"""

import json
import sys
from pathlib import Path

import yaml

from prunet.report.charts import draw_chart

TEMPLATE = Path(__file__).with_name("card.md")
CURVE = Path(__file__).with_name("training-curve.svg")
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


def curve(log: list[dict]) -> str:
    """Draws the two losses of training-log.jsonl over hours, on a logarithmic axis, as SVG."""
    losses = {key: [[(point["hours"], point[key]) for point in log]] for key in ("train", "heldout")}
    chart = draw_chart(losses, log[-1]["hours"], [])
    assert chart
    lines = {line["name"]: " ".join(line["points"][0]) for line in chart["lines"]}
    ticks = [f'<text x="40" y="{18 + 2.52 * at:.0f}" text-anchor="end">{text}</text>' for at, text in chart["y_ticks"]]
    return CURVE.read_text().format(**lines, ticks="\n".join(ticks), hours=log[-1]["hours"], images=log[-1]["images"])


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
