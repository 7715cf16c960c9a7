"""Train the small Stable Diffusion that ships with prunet, on the emoji shards of make_data.py.

    python emoji/train_teacher.py all --state ~/.cache/prunet/emoji

Four stages, each resumable: the same command goes on where it was stopped, and skips what is finished. With a
larger budget (--minutes, or the config) a finished stage goes on learning.

    autoencoder   pictures to latents
    text          tokenizer and text encoder, trained against the pictures, then frozen
    unet          the denoiser, on cached latents and cached prompt embeddings
    export        the pipeline folder, its model card and its sheet of samples

Works on two CPU cores; uses a GPU if there is one. On CPU cores that other programs use too, the denoiser
trains fastest with one process per core and one thread each:

    OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 emoji/train_teacher.py unet
"""

import argparse
from pathlib import Path

import torch
import yaml

STAGES = ("autoencoder", "text", "unet", "export")


def run_stage(stage: str, config: dict, args: argparse.Namespace) -> None:
    if stage == "autoencoder":
        import autoencoder

        autoencoder.train(config["autoencoder"], args.data, args.state, config["seed"])
    elif stage == "text":
        import text

        text.train(config["text"], args.data, args.state, config["seed"])
    elif stage == "unet":
        import unet

        unet.train(config, args.data, args.state)
    elif stage == "export":
        import export

        export.export(config, args.data, args.state, args.out)


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"), help="what to run")
    parser.add_argument("--config", type=Path, default=here / "emoji-sd.yaml", help="(%(default)s)")
    parser.add_argument("--data", type=Path, default=here / "data", help="folder of the shards (%(default)s)")
    parser.add_argument("--state", type=Path, default=Path.home() / ".cache/prunet/emoji", help="(%(default)s)")
    parser.add_argument("--out", type=Path, default=here / "emoji-sd", help="pipeline folder (%(default)s)")
    parser.add_argument("--minutes", type=float, help="budget of the stage, in place of the config's")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    args = parser.parse_args()
    if args.minutes and args.stage in ("all", "export"):
        parser.error("--minutes is the budget of one training stage: name the stage")

    config = yaml.safe_load(args.config.read_text())
    if args.minutes:
        config[args.stage]["minutes"] = args.minutes
    if args.threads:
        torch.set_num_threads(args.threads)
    args.state.mkdir(parents=True, exist_ok=True)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run_stage(stage, config, args)


if __name__ == "__main__":
    main()
