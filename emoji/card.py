"""The model card: card.md, filled in. Every number in it comes from the records that the stages wrote."""

from pathlib import Path

TEMPLATE = Path(__file__).with_name("card.md")


def write_card(out: Path, config: dict, records: dict[str, dict], labels: list[str], num_heldout: int) -> None:
    ae, text, unet = records["autoencoder"], records["text_encoder"], records["unet"]
    card = TEMPLATE.read_text().format(
        example=labels[0].lower(),
        guidance=config["samples"]["guidance_scale"],
        steps=config["samples"]["num_inference_steps"],
        num_labels=len(labels),
        ae_parameters=_millions(ae),
        ae_hours=_hours(ae),
        ae_images=_count(ae),
        crop=config["autoencoder"]["crop"],
        vocab=text["vocab_size"],
        text_parameters=_millions(text),
        text_hours=_hours(text),
        text_images=_count(text),
        unet_parameters=_millions(unet),
        unet_hours=_hours(unet),
        unet_images=_count(unet),
        unet_pictures=unet["pictures"],
        psnr=ae["psnr_db"],
        heldout=num_heldout,
        loss=unet["loss"],
        gamma=config["unet"]["min_snr_gamma"],
        note=config.get("note", "One run, without changes on the way."),
        dropout=config["unet"]["caption_dropout"],
    )
    (out / "README.md").write_text(card)


def _millions(record: dict) -> str:
    return f"{record['parameters'] / 1e6:.1f} M"


def _hours(record: dict) -> str:
    return f"{record['hours']:.2f}"


def _count(record: dict) -> str:
    return f"{record['images']:,}"
