"""Trains the small models that ship with prunet, on the emoji shards of make_data.py.

    python emoji/train.py emoji/emoji-clip.yaml       the scorer, by which the two teachers are measured
    python emoji/train.py emoji/emoji-sd.yaml         a Stable Diffusion of the SD v1 layout
    python emoji/train.py emoji/emoji-xl.yaml         one of the SDXL layout; needs emoji-sd first

The stages of a model are the sections of its config, in order: autoencoder, text_encoder(_2), unet, then export
(pipeline folder, model card, sheet of samples). The same command resumes a stage that was stopped and
skips what is finished. With a larger budget (--minutes, or the config) a finished stage is trained further.
With --from-shipped the U-Net is trained further from the weights in the repository, on a machine without any
state; the other parts stay unchanged.

Works on two CPU cores; uses a GPU if there is one (then with --batch-size 512). On CPU cores the denoiser trains
fastest with one process per core and one thread each:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 emoji/train.py emoji/emoji-sd.yaml unet
"""

import argparse
import math
from pathlib import Path

import yaml

STAGES = ("autoencoder", "text_encoder", "text_encoder_2", "unet", "scorer", "export")


def tutor_of(config: dict, args: argparse.Namespace) -> Path | None:
    """Returns the pipeline folder that the U-Net is distilled from, if any."""
    name = config.get("unet", {}).get("distil_from")
    return args.config.parent / name if name else None


def check_is_ours(stage: str, config: dict, root: Path) -> None:
    """Refuses to train a part from the start if a shipped one exists, because later parts were trained for that one."""
    from state import is_finished

    part, state = root / stage, root / f"{stage}.pt"
    if part.exists() and not state.exists() and not is_finished(part / "record.json", config[stage]["minutes"]):
        raise SystemExit(f"{part}: shipped weights, which only the U-Net can go on from: delete it to train it anew")


def run_stage(stage: str, config: dict, args: argparse.Namespace, root: Path) -> None:
    """Runs a stage; imports it here, because each stage needs only its own libraries."""
    if stage in ("autoencoder", "text_encoder", "text_encoder_2"):
        check_is_ours(stage, config, root)
    if stage == "autoencoder":
        import autoencoder

        autoencoder.train(config[stage], args.data, root, config["seed"])
    elif stage in ("text_encoder", "text_encoder_2"):
        import text

        text.train(config[stage], args.data, root, config["seed"], stage)
    elif stage == "unet":
        import unet

        parts = ["autoencoder", "tokenizer", "text_encoder", *({"text_encoder_2"} & config.keys())]
        if missing := [part for part in parts if not (root / part).exists()]:
            raise SystemExit(f"{root}: no {missing[0]} yet: run its stage first, or give --from-shipped")
        unet.train(config, args.data, root, tutor=tutor_of(config, args), compile_step=args.compile)
    elif stage == "scorer":
        import scorer

        scorer.train(config[stage], args.data, root, args.config.with_suffix(""), config["seed"])
    else:
        import export

        export.export(config, args.data, root, args.config.with_suffix(""))


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="a model's settings; its folder gets the same name, beside it")
    parser.add_argument("stage", nargs="?", choices=(*STAGES, "all"), default="all", help="what to run (all)")
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of the shards (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache/prunet/emoji", help="(%(default)s)")
    parser.add_argument("--minutes", type=float, help="budget of the stage, in place of the config's")
    parser.add_argument("--batch-size", type=int, help="of the stage, in place of the config's")
    parser.add_argument("--learning-rate", type=float, help="the stage's peak, in place of the config's")
    parser.add_argument(
        "--compile", action="store_true", help="the U-Net's step (CPU: 8 minutes first, then 1.5 times as fast)"
    )
    parser.add_argument("--from-shipped", action="store_true", help="take what the state lacks from the model's folder")
    args = parser.parse_intermixed_args()  # so that the stage may follow the options
    if not args.config.is_file():
        parser.error(f"no config at {args.config}; those that ship are emoji/*.yaml")
    config = yaml.safe_load(args.config.read_text())
    stages = [stage for stage in STAGES if stage in config or (stage == "export" and "unet" in config)]
    if args.stage != "all" and args.stage not in stages:
        parser.error(f"{args.config} has no stage {args.stage}: it has {', '.join(stages)}")
    for option in ("minutes", "batch_size", "learning_rate"):
        if (value := getattr(args, option)) is not None:
            name = f"--{option.replace('_', '-')}"
            if args.stage not in config:
                parser.error(f"{name} belongs to one training stage: name the stage")
            if not 0 < value < math.inf:
                parser.error(f"{name} {value}: give a number above 0")
            config[args.stage][option] = value
    tutor = tutor_of(config, args)
    if tutor and not (tutor / "unet" / "config.json").is_file():
        parser.error(f"{args.config}: unet.distil_from: no pipeline in {tutor}: train it first")

    root = args.state / args.config.stem
    root.mkdir(parents=True, exist_ok=True)
    if args.from_shipped or "shared_from" in config:
        import export
        from state import join_group, wait_for_all

        if join_group()[0] == 0:  # two processes would copy into each other's folders
            if "shared_from" in config:
                shared = args.config.parent / config["shared_from"]
                export.restore(shared, root, ("autoencoder", "tokenizer", "text_encoder"))
            if args.from_shipped:
                export.restore(args.config.with_suffix(""), root)
        wait_for_all()
    for stage in stages if args.stage == "all" else (args.stage,):
        run_stage(stage, config, args, root)


if __name__ == "__main__":
    main()
