"""Opening a teacher: every tensor finds its place, or the teacher is refused; no weight stays random."""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prunet import Teacher, UserError, build, export, load_plan
from prunet.cli import main
from prunet.exports.single_file import export_single_file
from prunet.student.student import state_hash
from prunet.teacher import placing
from prunet.teacher.copying import check_other_parts
from prunet.teacher.placing import Header
from prunet.teacher.space import check_same_space

UNET, VAE, TEXT = "diffusion_pytorch_model", "diffusion_pytorch_model", "model"
PARTS = {"unet": UNET, "vae": VAE, "text_encoder": TEXT, "text_encoder_2": TEXT}
LDM = {"unet": "model.", "vae": "first_stage_model.", "text_encoder": "conditioner.embedders.0."}
LDM["text_encoder_2"] = "conditioner.embedders.1."


@pytest.fixture(scope="module")
def teachers(sd, sdxl, tmp_path_factory) -> dict[str, Path]:
    """The SDXL pipeline in each form: parts of one file, parts of shards, a single file."""
    made = tmp_path_factory.mktemp("forms")
    sharded, opened = shutil.copytree(sdxl, made / "sharded"), Teacher(sdxl)
    for part, stem in PARTS.items():
        (sharded / part / f"{stem}.safetensors").unlink()
        module = getattr(opened, part) if part in ("unet", "vae") else opened.text_part(part)
        module.save_pretrained(sharded / part, max_shard_size="100KB" if part == "unet" else "20KB")
        assert len(list((sharded / part).glob("*-of-*.safetensors"))) > 1
    export_single_file(sdxl, made / "one.safetensors")
    return {"folder": sdxl, "shards": sharded, "file": made / "one.safetensors"}


def file_with(form: str, teacher: Path, part: str, key: str | None = None) -> Path:
    """The file of a part, or the one of its shards that has `key`."""
    if form == "file":
        return teacher
    if form == "folder":
        return teacher / part / f"{PARTS[part]}.safetensors"
    index = json.loads((teacher / part / f"{PARTS[part]}.safetensors.index.json").read_text())["weight_map"]
    return teacher / part / (index[key] if key else sorted(set(index.values()))[0])


def keys_of(form: str, teacher: Path, part: str) -> list[str]:
    if form == "file":
        return sorted(key for key in load_file(teacher) if key.startswith(LDM[part]))
    files = (teacher / part).glob("*.safetensors")
    return sorted(key for file in files for key in load_file(file))


def removed(tensors: dict, key: str) -> dict:
    return {k: v for k, v in tensors.items() if k != key}


def renamed(tensors: dict, key: str) -> dict:
    return {(f"{k}_" if k == key else k): v for k, v in tensors.items()}


def transposed(tensors: dict, key: str) -> dict:
    """Returns the numbers in another shape: transposed, or, if that is the same shape, halved."""
    tensor = tensors[key]
    turned = tensor.transpose(0, -1).contiguous()
    return {**tensors, key: turned if turned.shape != tensor.shape else tensor[: len(tensor) // 2].clone()}


def with_nan(tensors: dict, key: str) -> dict:
    tensor = tensors[key].clone()
    tensor.view(-1)[-1] = float("nan")
    return {**tensors, key: tensor}


def with_integers(tensors: dict, key: str) -> dict:
    return {**tensors, key: tensors[key].to(torch.int8)}


def scaled(tensors: dict, key: str) -> dict:
    """Stores a scale beside the weight, as ComfyUI does for fp8."""
    half = {**tensors, key: tensors[key].to(torch.float8_e4m3fn)}
    return half | {key.removesuffix("weight") + "scale_weight": torch.ones(1)}


CHANGES = {"removed": removed, "renamed": renamed, "transposed": transposed, "NaN": with_nan}
MORE = {"integers": with_integers, "scaled": scaled}


def refusal(form: str, teacher: Path, part: str, key: str, change, tmp: Path, *, load: bool = True) -> str:
    """Returns the message for a teacher with one changed tensor, from the check and, with `load`, from loading."""
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir()
    if form == "file":
        again = tmp / "one.safetensors"
        (tmp / "one.config").symlink_to(teacher.with_suffix(".config"))
    else:
        again = tmp / "teacher"
        again.mkdir()
        for path in teacher.iterdir():
            if path.name == part:
                shutil.copytree(path, again / part)
            else:
                (again / path.name).symlink_to(path)
    source = file_with(form, teacher, part, key)
    target = again if form == "file" else again / part / source.name
    target.unlink(missing_ok=True)
    save_file(change(load_file(source), key), target)
    with pytest.raises(UserError) as found:
        if load:
            Teacher(again).check_weights()
        else:  # only this part, because there are many changes
            placing.check_finite(Teacher(again).place(part))
    assert "\n" not in str(found.value)
    if load:
        with pytest.raises(UserError) as loaded:
            opened = Teacher(again)
            _ = getattr(opened, part) if part in ("unet", "vae") else opened.text_part(part)
        assert str(loaded.value) == str(found.value)
    return str(found.value)


@pytest.mark.parametrize("form", ["folder", "shards", "file"])
def test_one_tensor_changed_is_refused(form, teachers, tmp_path) -> None:
    draw = random.Random(form)
    for part in PARTS:
        keys = keys_of(form, teachers[form], part)
        for turn, (name, change) in enumerate(draw.sample(list(CHANGES.items()), 2)):
            key = draw.choice(keys)
            said = refusal(form, teachers[form], part, key, change, tmp_path / "t", load=turn == 0)
            assert key in said, (part, name, key, said)
            assert Path(file_with(form, teachers[form], part, key)).name in said or name in ("removed", "renamed")


def changed_headers(found: dict[str, Header], key: str) -> Iterator[dict[str, Header]]:
    """Yields the headers that a file would have after each of `CHANGES` and `MORE` except NaN."""
    header, rest = found[key], removed(found, key)
    yield rest
    yield rest | {f"{key}_": header}
    turned = header.shape[::-1] if header.shape[::-1] != header.shape else (header.shape[0] // 2, *header.shape[1:])
    yield found | {key: header._replace(shape=turned)}
    yield found | {key: header._replace(dtype="I8")}
    if key.endswith("weight"):
        yield found | {key.removesuffix("weight") + "scale_weight": Header(header.file, (1,), "F32")}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["folder", "shards", "file"])
@pytest.mark.parametrize("part", PARTS)
def test_any_tensor_changed_is_refused(part, form, teachers, monkeypatch) -> None:
    """Checks all tensors through the headers; `refusal` writes real files, which would take long for all of them."""
    teacher, keys = Teacher(teachers[form]), keys_of(form, teachers[form], part)
    model, read = teacher.empty(part), placing.headers
    for key in keys:
        file = file_with(form, teachers[form], part, key)
        for found in changed_headers(read([file]), key):
            monkeypatch.setattr(
                placing, "headers", lambda files, file=file, found=found: read({*files} - {file}) | found
            )
            with pytest.raises(UserError) as error:
                teacher.place(part, model)
            assert "\n" not in str(error.value) and (key in str(error.value) or "scale_weight" in str(error.value))
    monkeypatch.setattr(placing, "headers", read)
    placed, seen = teacher.place(part, model), []
    monkeypatch.setattr(placing, "is_finite", lambda tensor: seen.append(tensor) or True)
    placing.check_finite(placed)  # searches every tensor for NaN
    assert all(placing.HARMLESS.search(key) for key in {*keys} - {key for _, key in placed.places.values()})
    assert len(seen) == len(set(placed.places.values()))


@pytest.mark.parametrize("part", PARTS)
def test_scaled_and_integer_weights_are_refused_by_name(part, teachers, tmp_path) -> None:
    form = {"unet": "file", "vae": "folder", "text_encoder": "shards", "text_encoder_2": "file"}[part]
    key = next(key for key in keys_of(form, teachers[form], part) if key.endswith("weight"))
    assert "stored scaled (fp8)" in refusal(form, teachers[form], part, key, scaled, tmp_path / "t")
    assert "stored as I8" in refusal(form, teachers[form], part, key, with_integers, tmp_path / "t")


def changed(teacher: Path, to: Path, part: str, change) -> Path:
    """A copy of a folder with the names of one part changed."""
    folder = Path(shutil.copytree(teacher, to))
    file = folder / part / f"{PARTS[part]}.safetensors"
    save_file(change(load_file(file)), file)
    return folder


def prefixed(prefix: str):
    return lambda tensors: {prefix + key: tensor for key, tensor in tensors.items()}


def inside(wrapper: str):
    """Renames as if every innermost module had a wrapper, as with PEFT."""
    return lambda tensors: {wrapper.join(key.rpartition(".")[::2]): tensor for key, tensor in tensors.items()}


def state(teacher: Teacher, part: str) -> str:
    return state_hash(getattr(teacher, part) if part in ("unet", "vae") else teacher.text_part(part))


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("unet", prefixed("_orig_mod.")),
        ("unet", prefixed("base_model.model.")),
        ("vae", prefixed("module._orig_mod.")),
        ("text_encoder", inside(".base_layer.")),
        ("text_encoder_2", prefixed("module.")),
    ],
)
def test_wrapped_names_are_unwrapped_and_reported(part, change, sdxl, tmp_path, capsys) -> None:
    folder = changed(sdxl, tmp_path / "wrapped", part, change)
    teacher = Teacher(folder)
    teacher.check_weights()
    assert "is read as" in capsys.readouterr().err
    assert state(teacher, part) == state(Teacher(sdxl), part)
    if part == "vae":  # what stock diffusers would not find is written under its names
        export(teacher, build(teacher, load_plan("vega")), tmp_path / "out")
        assert (
            load_file(tmp_path / "out/vae/diffusion_pytorch_model.safetensors").keys()
            == load_file(sdxl / "vae/diffusion_pytorch_model.safetensors").keys()
        )


def old_attention(tensors: dict) -> dict:
    names = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, old in names.items():
        tensors = {key.replace(new, old): tensor for key, tensor in tensors.items()}
    return tensors


def other_text_names(tensors: dict) -> dict:
    """With `text_model.` added or removed, and with the tensors that other versions stored as well."""
    has = any(key.startswith("text_model.") for key in tensors)
    swapped = {
        key.removeprefix("text_model.") if has else key if key.startswith("text_proj") else f"text_model.{key}": tensor
        for key, tensor in tensors.items()
    }
    return swapped | {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.ones(())}


@pytest.mark.parametrize(
    ("part", "change"),
    [("vae", old_attention), ("text_encoder", other_text_names), ("text_encoder_2", other_text_names)],
)
def test_names_of_other_versions_open_as_in_stock_diffusers(part, change, sdxl, tmp_path, capsys) -> None:
    teacher = Teacher(changed(sdxl, tmp_path / "old", part, change))
    teacher.check_weights()
    assert state(teacher, part) == state(Teacher(sdxl), part)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_single_files_of_other_programs(kind, request, tmp_path, capsys) -> None:
    """Old text encoder names, wrappers, 2-dimensional attention of the VAE, and extra tensors of trainers."""
    source = request.getfixturevalue(kind)
    export_single_file(source, path := tmp_path / "a.safetensors")
    tensors = {key.replace("transformer.text_model.", "transformer."): v for key, v in load_file(path).items()}
    attention = {k: v[:, :, 0, 0] for k, v in tensors.items() if ".mid.attn_1." in k and v.ndim == 4}
    assert attention
    projection = "conditioner.embedders.1.model.text_projection"
    if projection in tensors:  # as kohya's scripts write it: named like a layer, transposed
        tensors[f"{projection}.weight"] = tensors.pop(projection).T
    extra = {"betas": torch.ones(5), "model_ema.decay": torch.ones(()), "model_ema.num_updates": torch.ones(())}
    extra["first_stage_model.loss.logvar"] = torch.ones(())
    tensors = {f"module.{key}": tensor.contiguous() for key, tensor in {**tensors, **attention, **extra}.items()}
    save_file(tensors, path)
    teacher = Teacher(path)
    teacher.check_weights()
    said = capsys.readouterr().err
    assert "are not used: model_ema (2)" in said and "is read as" in said
    for part in ("unet", "vae", *teacher.text_encoders):
        assert state(teacher, part) == state(Teacher(source), part)


def test_a_file_without_a_part_or_of_another_layout(sd, sdxl, tmp_path) -> None:
    for kind, source in (("sd", sd), ("sdxl", sdxl)):
        export_single_file(source, tmp_path / f"{kind}.safetensors")
    tensors = load_file(tmp_path / "sd.safetensors")
    for stem in ("first_stage_model.", "cond_stage_model.", "model.diffusion_model."):
        save_file({k: v for k, v in tensors.items() if not k.startswith(stem)}, path := tmp_path / "less.safetensors")
        with pytest.raises(UserError, match=rf"less\.safetensors( has no {stem}| \(unknown layout\) has no text)"):
            Teacher(path, config=tmp_path / "sd.config").check_weights(headers_only=True)
    with pytest.raises(UserError, match=r"sdxl.*SD pipeline|text encoder"):
        Teacher(tmp_path / "sdxl.safetensors", config=tmp_path / "sd.config").check_weights()
    with pytest.raises(UserError):
        Teacher(tmp_path / "sd.safetensors", config=tmp_path / "sdxl.config").check_weights()
    other = Path(shutil.copytree(sd, tmp_path / "mixed"))
    shutil.copy(tmp_path / "sd.safetensors", other / "unet" / f"{UNET}.safetensors")
    with pytest.raises(UserError, match=r"has no conv_in\.weight, which this UNet2DConditionModel needs.*it has "):
        Teacher(other).check_weights()


def test_estimate_inspect_and_run_refuse_before_any_work(sd, pictures, tmp_path, capsys, monkeypatch) -> None:
    folder = changed(sd, tmp_path / "teacher", "text_encoder", prefixed("text_encoder."))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"{{teacher: {folder}, plan: bk-small, data: {{source: {pictures}}}, stages: [{{steps: 1, batch_size: 1}}], "
        f"evaluation: {{prompts: [a]}}, output: {tmp_path / 'run'}}}"
    )
    for args in (("inspect", folder), ("inspect", recipe), ("estimate", recipe), ("run", recipe)):
        flags = () if args[0] == "inspect" else ("--device", "cpu")
        monkeypatch.setattr("sys.argv", ["prunet", *map(str, (*args, *flags))])
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr().err
        assert end.value.code == 2, args
        assert "text_encoder/model.safetensors has no " in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_configs_of_other_versions(sd, tmp_path) -> None:
    """Keys that diffusers ignores are ignored, in every part; and it is the same teacher as before."""
    folder = Path(shutil.copytree(sd, tmp_path / "other"))
    for part in ("unet", "vae", "text_encoder", "scheduler"):
        path = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
        config = json.loads(path.read_text())
        config |= {"decay": 0.9999, "optimization_step": 100, "_name_or_path": "x", "quantisation": None}
        path.write_text(json.dumps(config))
    teacher, before = Teacher(folder), Teacher(sd)
    teacher.check_weights()
    check_other_parts(teacher)
    assert teacher.unet_config == before.unet_config
    assert state(teacher, "unet") == state(before, "unet")
    student = build(teacher, load_plan("bk-small"))
    assert "decay" not in student.config
    assert teacher.noise_scheduler.config.beta_end == before.noise_scheduler.config.beta_end


def test_a_config_that_cannot_make_a_model_is_one_line(sd, tmp_path) -> None:
    wrong = {"vae": {"norm_num_groups": 7}, "text_encoder": {"hidden_size": "x"}, "unet": {"layers_per_block": "x"}}
    for part, change in wrong.items():
        folder = Path(shutil.copytree(sd, tmp_path / part))
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(UserError, match=rf"{part}/config\.json(: \w+: Input should be a valid integer| makes no )"):
            Teacher(folder).check_weights()


def test_a_fingerprint_does_not_depend_on_where_files_lie(sd, tmp_path) -> None:
    export_single_file(sd, tmp_path / "m.safetensors")
    known = Teacher(tmp_path / "m.safetensors").fingerprint()
    for file, config in (("a/z.safetensors", "b/configs"), ("z/a.safetensors", "y"), ("q.safetensors", "q.config")):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        shutil.copy(tmp_path / "m.safetensors", tmp_path / file)
        shutil.copytree(tmp_path / "m.config", tmp_path / config)
        assert Teacher(tmp_path / file, config=tmp_path / config).fingerprint() == known
    assert Teacher(shutil.copytree(sd, tmp_path / "0")).fingerprint() == Teacher(sd).fingerprint()


def test_fingerprints_of_the_shipped_teachers_stay_what_they_were() -> None:
    emoji = Path(__file__).parent.parent / "emoji"
    assert Teacher(emoji / "emoji-sd").fingerprint(["vae"]) == "9c327f63a1a29a49"
    assert Teacher(emoji / "emoji-xl").fingerprint(["text_encoder", "text_encoder_2"]) == "eba31951228744be"


def test_weights_too_large_for_a_precision(sd, tmp_path) -> None:
    def large(tensors: dict) -> dict:
        tensors["decoder.conv_in.bias"][0] = 1e6
        return tensors

    folder = changed(sd, tmp_path / "large", "vae", large)
    assert Teacher(folder).vae.decoder.conv_in.bias[0] == 1e6
    with pytest.raises(UserError, match=r"decoder\.conv_in\.bias has numbers that torch\.float16 cannot hold"):
        _ = Teacher(folder, dtype=torch.float16).vae


@pytest.mark.parametrize(
    ("index", "file", "message"),
    [
        ({"../x": ["diffusers", "AutoencoderKL"]}, None, r"'\.\./x'"),
        ({"/tmp": ["diffusers", "AutoencoderKL"]}, None, "'/tmp'"),
        ({"x": ["diffusers"]}, None, "a name of letters, digits and _, a library and a class"),
        ({"_class_name": ["a", "b"]}, None, "_class_name: Input should be a valid string"),
        ({"text_encoder": [None, None]}, None, "text_encoder: None; prunet supports CLIPTextModel"),
        ({"text_encoder": 1e-05}, None, "text_encoder: None; prunet supports CLIPTextModel"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, None, "vae: AutoencoderTiny"),
        ({"unet": ["diffusers", "UNet2DModel"]}, None, "unet: UNet2DModel"),
        ({"scheduler": ["diffusers", "NoScheduler"]}, None, "NoScheduler"),
        ({"feature_extractor": ["transformers", "NoSuch"]}, "feature_extractor/preprocessor_config.json", "NoSuch"),
        (
            {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
            "safety_checker/model.safetensors",
            "stock diffusers cannot open",
        ),
    ],
)
def test_parts_that_could_not_be_exported_are_found_before(index, file, message, sd, tmp_path) -> None:
    folder = Path(shutil.copytree(sd, tmp_path / "teacher"))
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **index}))
    if file:
        (folder / file).parent.mkdir()
        (folder / file).write_text("{}")
    with pytest.raises(UserError, match=message):
        Teacher(folder).check_weights()
        check_other_parts(Teacher(folder))


def test_headers_are_looked_at_with_index_and_scheduler(sdxl, tmp_path) -> None:
    """`inspect` notices exchanged text encoders and a missing scheduler."""
    folder = Path(shutil.copytree(sdxl, tmp_path / "teacher"))
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    first, second = index["text_encoder"], index["text_encoder_2"]
    path.write_text(json.dumps({**index, "text_encoder": second, "text_encoder_2": first}))
    with pytest.raises(UserError, match="text_encoder: CLIPTextModelWithProjection; prunet supports CLIPTextModel"):
        Teacher(folder).check_weights(headers_only=True)
    path.write_text(json.dumps(index))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "_class_name": "NoSuchScheduler"}))
    with pytest.raises(UserError, match="'NoSuchScheduler' is not one of diffusers'"):
        Teacher(folder).check_weights(headers_only=True)
    scheduler.unlink()
    with pytest.raises(UserError, match="no readable scheduler/scheduler_config"):
        Teacher(folder).check_weights(headers_only=True)


def test_a_revision_needs_a_teacher_of_the_hub(sd, tmp_path) -> None:
    for source in (sd, "sd-v1"):
        with pytest.raises(UserError, match=r"teacher\.revision 'main' is only for a repository of the hub"):
            Teacher(source, revision="main")


def test_shards_lie_beside_their_index(teachers, tmp_path) -> None:
    folder = Path(shutil.copytree(teachers["shards"], tmp_path / "t"))
    path = folder / "vae" / f"{VAE}.safetensors.index.json"
    index = json.loads(path.read_text())
    for name in ("../unet/config.json", str(tmp_path / "x"), 5):
        first = next(iter(index["weight_map"]))
        path.write_text(json.dumps({"weight_map": {**index["weight_map"], first: name}}))
        with pytest.raises(UserError, match="names no files beside it"):
            Teacher(folder).check_weights()
    path.write_text(json.dumps(index))
    file_with("shards", folder, "vae").unlink()
    with pytest.raises(UserError, match="no such file"):
        Teacher(folder).check_weights()


def test_emoji_teachers_pass_every_check() -> None:
    for name in ("emoji-sd", "emoji-xl"):
        teacher = Teacher(Path(__file__).parent.parent / "emoji" / name)
        teacher.check_weights()
        check_other_parts(teacher)


def test_a_teacher_saved_by_another_version_is_the_same_teacher(sd, tmp_path) -> None:
    """A missing key means the default, which other versions write out."""
    folder = Path(shutil.copytree(sd, tmp_path / "older"))
    for part, keys in (
        ("unet", ("resnet_time_scale_shift", "mid_block_type", "dropout")),
        ("vae", ("scaling_factor",)),
    ):
        path = folder / part / "config.json"
        config = {key: value for key, value in json.loads(path.read_text()).items() if key not in keys}
        path.write_text(json.dumps(config | ({"decay": 0.5, "upcast_attention": None} if part == "unet" else {})))
    check_same_space(Teacher(sd), Teacher(folder))
    path = folder / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "act_fn": "gelu"}))
    with pytest.raises(UserError, match="its U-Net is not that of"):
        check_same_space(Teacher(sd), Teacher(folder))


def test_a_teacher_of_the_hub_is_checked_when_it_is_here(sd, tmp_path, monkeypatch) -> None:
    folder = changed(sd, tmp_path / "snapshot", "vae", prefixed("x."))
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **rest: asked.append(rest) or str(folder))
    teacher = Teacher("owner/name")
    teacher.check_weights(headers_only=True)
    assert not any("safetensors" in pattern for rest in asked for pattern in rest["allow_patterns"])
    with pytest.raises(UserError, match=r"vae/\S+ has no encoder\.\S+, which this AutoencoderKL needs"):
        teacher.check_weights()


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_a_tokenizer_of_another_text_encoder_is_refused(kind, request, tmp_path) -> None:
    folder = Path(shutil.copytree(request.getfixturevalue(kind), tmp_path / "teacher"))
    last = "tokenizer_2" if kind == "sdxl" else "tokenizer"
    path = folder / last / "tokenizer_config.json"
    config = json.loads(path.read_text())
    for wrong in ({**config, "model_max_length": 1000}, {k: v for k, v in config.items() if k != "model_max_length"}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=rf"{last}: makes [\d,]+ tokens at once"):
            Teacher(folder).check_weights()
    shutil.rmtree(folder / last)
    shutil.copytree(Path(__file__).parent.parent / "emoji" / "emoji-sd" / "tokenizer", folder / last)
    with pytest.raises(UserError, match="kinds of tokens"):
        Teacher(folder).check_weights()
