"""Stage 2: tokenizer and text encoder, trained against pictures before any denoiser exists, then frozen.

A contrastive loss alone only teaches the end-of-text position, but the U-Net reads the states of all tokens. So
three linear heads also read single, randomly chosen states at or after the end of the text (with CLIP's
causal mask these have seen the whole caption): one draws a small thumbnail, one names the label, one names the
style. What a linear head can read, a cross-attention can read too: colours and rough shapes are there before
the U-Net's first step.

emoji-xl has two encoders, as SDXL: the first is that of emoji-sd, as SDXL's is that of SD v1; the second, with a
projection, is trained here (`with_projection: true`). SDXL's U-Net reads the last layer but one, so the heads do too.
"""

import json
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from shards import SPLITS, STYLES, Sample, read_known_labels, read_split, stack_images, to_model
from state import (
    autocast,
    is_finished,
    learning_rate,
    load_state,
    pick_device,
    save_record,
    save_state,
    smooth,
    timed_steps,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

TextEncoder: TypeAlias = CLIPTextModel | CLIPTextModelWithProjection

START, END = "<|startoftext|>", "<|endoftext|>"


def learn_tokenizer(captions: list[str], vocab_size: int, max_length: int) -> CLIPTokenizer:
    """Learns merges. Ids are in CLIP's order: bytes, bytes that end a word, merges, special tokens."""
    blank = CLIPTokenizer()  # for its normalizer and word splitting: merges must be learned on the same words
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    room = vocab_size - 2 * len(alphabet) - 2
    trainer = trainers.BpeTrainer(
        vocab_size=room + 2 * len(alphabet),
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]][:room]
    # The trainer only knows the word-final bytes that it has seen; a user may type others.
    tokens = [
        *alphabet,
        *(f"{byte}</w>" for byte in alphabet),
        *("".join(merge) for merge in merges),
        START,
        END,
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)


def check_tokenizer(tokenizer: CLIPTokenizer, captions: list[str]) -> None:
    """Checks that decoding loses only the spacing around punctuation and digits, as with CLIP's own tokenizer."""
    for caption in captions:
        ids = tokenizer(caption)["input_ids"]
        decoded = tokenizer.decode(ids, skip_special_tokens=True)
        assert decoded.replace(" ", "") == caption.replace(" ", ""), (caption, decoded)
        assert tokenizer(decoded)["input_ids"] == ids, (caption, decoded)
        assert len(ids) <= tokenizer.model_max_length, caption


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


class PictureTower(nn.Sequential):
    """A few convolutions on 32 px pictures. It only helps to train the text encoder, and is not kept."""

    def __init__(self, width: int):
        def down(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU()]

        super().__init__(
            *down(3, 64),
            *down(64, 128),
            *down(128, 192),
            nn.Flatten(),
            nn.Linear(192 * 16, width),
        )


class Heads(nn.Module):
    """All modules that read the text encoder during its training."""

    def __init__(self, width: int, thumbnail: int, num_labels: int):
        super().__init__()
        self.tower = PictureTower(width)
        self.project = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(2.5))  # log of the inverse temperature
        self.thumbnail = nn.Linear(width, 3 * thumbnail**2)
        self.label = nn.Linear(width, num_labels)
        self.style = nn.Linear(width, len(STYLES))


def read_text(model: TextEncoder, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns the states that the U-Net reads (B, T, D), and the projected end-of-text state (B, D) if there is one."""
    output = model(tokens, output_hidden_states=True)
    if isinstance(model, CLIPTextModelWithProjection):
        return output.hidden_states[-2], output.text_embeds
    return output.last_hidden_state, None


def contrastive_loss(scale: Tensor, text: Tensor, pictures: Tensor) -> Tensor:
    """Returns CLIP's symmetric cross-entropy of two (B, D) (https://arxiv.org/abs/2103.00020, figure 3)."""
    a, b = F.normalize(text.float(), dim=-1), F.normalize(pictures.float(), dim=-1)
    logits = scale.exp().clamp(max=100) * a @ b.T
    target = torch.arange(len(a), device=a.device)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def states_after_end(states: Tensor, ids: Tensor, end_id: int, dice: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns the state at the end of the text, and a random one between there and the last position."""
    end = (ids == end_id).int().argmax(dim=1)
    where = end + (torch.rand(len(ids), generator=dice).to(ids.device) * (ids.shape[1] - end)).long()
    rows = torch.arange(len(ids), device=ids.device)
    return states[rows, end], states[rows, where]


def losses(
    heads: Heads, states: Tensor, pooled: Tensor | None, ids: Tensor, end_id: int, batch: dict, dice: torch.Generator
) -> dict[str, Tensor]:
    end, anywhere = states_after_end(states, ids, end_id, dice)
    pooled = heads.project(end) if pooled is None else pooled
    return {
        "contrastive": contrastive_loss(heads.scale, pooled, heads.tower(batch["picture"])),
        "thumbnail": F.mse_loss(heads.thumbnail(anywhere).float(), batch["thumbnail"].flatten(1)),
        "label": F.cross_entropy(heads.label(anywhere).float(), batch["label"]),
        "style": F.cross_entropy(heads.style(anywhere).float(), batch["style"]),
    }


WEIGHTS = {"contrastive": 0.5, "thumbnail": 10.0, "label": 0.5, "style": 0.5}


def make_model(config: dict, tokenizer: CLIPTokenizer) -> TextEncoder:
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    more = {"pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": tokenizer.model_max_length}
    kind = CLIPTextModelWithProjection if config["with_projection"] else CLIPTextModel
    model = kind(CLIPTextConfig(vocab_size=len(tokenizer), **config["model"], **ids, **more))
    model.set_attn_implementation("eager")  # fused attention is slow on CPUs where heads are narrow
    return model


def prepare(samples: list[Sample], thumbnail: int) -> dict[str, Tensor]:
    pictures = F.avg_pool2d(to_model(stack_images(samples)), 4)  # 32 px is enough to tell emoji apart
    labels = {label: index for index, label in enumerate(sorted({sample.label for sample in samples}))}
    return {
        "picture": pictures,
        "thumbnail": F.adaptive_avg_pool2d(pictures, thumbnail),
        "label": torch.tensor([labels[sample.label] for sample in samples]),
        "style": torch.tensor([STYLES.index(sample.style) for sample in samples]),
    }


def make_tokenizer(samples: list[Sample], data: Path, config: dict) -> CLIPTokenizer:
    tokenizer = learn_tokenizer([c for s in samples for c in s.captions], config["vocab_size"], config["max_length"])
    check_tokenizer(tokenizer, [c for split in SPLITS for s in read_split(data, split)[:200] for c in s.captions])
    return tokenizer


def train(config: dict, data: Path, root: Path, seed: int, name: str = "text_encoder") -> None:
    """Trains the encoder `root/NAME`; makes `root/tokenizer` if it does not exist."""
    device, state_path, out = pick_device(), root / f"{name}.pt", root / name
    if is_finished(out / "record.json", config["minutes"]):
        return
    samples = read_split(data, "train")
    if not (root / "tokenizer").exists():
        make_tokenizer(samples, data, config).save_pretrained(root / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")

    tensors = {part: tensor.to(device) for part, tensor in prepare(samples, config["thumbnail"]).items()}
    ids = [tokenize(tokenizer, sample.captions) for sample in samples]
    known = set(read_known_labels())
    weights = torch.tensor([float(sample.label in known) for sample in samples])
    weights = config["known_share"] * weights / weights.sum() + (1 - config["known_share"]) / len(samples)

    torch.manual_seed(seed)
    model = make_model(config, tokenizer).to(device)
    heads = Heads(config["model"]["hidden_size"], config["thumbnail"], int(tensors["label"].max()) + 1).to(device)
    both = nn.ModuleList([model, heads])
    optimizer = torch.optim.AdamW(both.parameters(), lr=0.0, betas=(0.9, 0.98), weight_decay=0.01)
    state = load_state(state_path)
    if "model" in state:
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    state["shown"] = {}

    for progress in timed_steps(name, state, config["minutes"]):
        lr = learning_rate(progress, config["learning_rate"])
        for group in optimizer.param_groups:
            group["lr"] = lr
        dice = torch.Generator().manual_seed(seed + state["step"])
        picked = torch.multinomial(weights, config["batch_size"], generator=dice)
        batch = {part: tensor[picked.to(device)] for part, tensor in tensors.items()}
        choice = torch.rand(len(picked), generator=dice).tolist()
        rows = [ids[i][int(u * len(ids[i]))] for i, u in zip(picked.tolist(), choice, strict=True)]
        tokens = torch.stack(rows).to(device)

        with autocast(device):
            states, pooled = read_text(model, tokens)
            parts = losses(heads, states, pooled, tokens, tokenizer.eos_token_id, batch, dice)
        loss = sum(WEIGHTS[part] * value for part, value in parts.items())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()

        state["images"] += len(picked)
        shown = state["shown"]
        state["shown"] = {part: smooth(shown.get(part), value.item(), 0.95) for part, value in parts.items()}
        if state["step"] % 200 == 199:
            save_state(state_path, state, model=both.state_dict(), optimizer=optimizer.state_dict())

    model.save_pretrained(out)
    record = {part: state[part] for part in ("images", "shown")} | {"steps": state["step"]}
    record |= {"hours": state["seconds"] / 3600, "parameters": sum(p.numel() for p in model.parameters())}
    save_record(record | {"vocab_size": len(tokenizer)}, out / "record.json")
    print(record, flush=True)
