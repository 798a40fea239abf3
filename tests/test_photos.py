"""Photographs: anybody's weights, a body that learns slower or not at all, features that are kept, images that fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Patch, Refused, Said, noise, script
from PIL import Image
from resume_runs import SMALL, differences, finished, stopped_and_continued
from safetensors.torch import save_file
from test_checkpoint import Runs
from torch import Tensor, nn

from data_modules.images.fit import FITS, fit_to
from lit_nn import LitClassifier
from lit_nn.checkpoint import load_classifier, load_weights
from lit_nn.errors import UsageError
from lit_nn.finetune import classify, head_names
from lit_nn.nets import build_net

train = script("train")
DATA: dict[str, Any] = {"class_names": ["cat", "dog"], "image_shape": (1, 32, 32), "mean": [0.5], "std": [0.2]}
RESNET = ["--net", "resnet9", "--model.net_args.width", "4"]


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Weights of a ResNet-9 for other classes, as somebody else may have saved them."""
    net = build_net("resnet9", 1, 1000, (28, 28), {"width": 4})
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    torch.save({f"module.{name}": tensor for name, tensor in net.state_dict().items()}, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of 50 images, 48 pixels high and 64 wide: bright to the left, or to the right."""
    for seed in range(100):
        pixels = np.asarray(noise(seed, 48, 64)) // 2
        pixels[:, 32 * (seed % 2) :][:, :32] += 100
        path = tmp_path / "photos" / ("left", "right")[seed % 2] / f"{seed // 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


# --- a file of weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", ["", "module.", "backbone.net."])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(("net", "head"), [("lenet", "fc3."), ("resnet9", "head.")])
def test_all_but_the_head_is_taken_from_any_file(around: str, suffix: str, net: str, head: str, tmp_path: Path) -> None:
    """Whatever stands before all the names in it."""
    source, target = (build_net(net, 1, classes, (28, 28)) for classes in (10, 3))
    tensors = {f"{around}{name}": tensor + 3 for name, tensor in source.state_dict().items()}  # as no fresh network has
    path, more = tmp_path / f"weights{suffix}", {"epoch": torch.tensor(3)}
    if suffix == ".safetensors":
        save_file(tensors | more, path)
    else:
        torch.save({".pth": tensors, ".pt": {"model": tensors}, ".ckpt": {"state_dict": tensors | more}}[suffix], path)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    first, *account = load_weights(target, path).splitlines()
    assert first == f"{len(before) - 2} of {len(before)} tensors taken from {path}"
    assert f"  not taken  {head}bias: (10,) in the file, (3,) in this network" in account
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name] if name.startswith(head) else tensors[f"{around}{name}"])


BAD: dict[str, Callable[[], object]] = {
    "is of another network": lambda: build_net("cifar_cnn", 3, 10, (32, 32)).state_dict(),
    "holds zeros": lambda: {k: 0 * t for k, t in build_net("lenet", 1, 10, (28, 28)).state_dict().items()},
    "refused, it holds more than tensors": lambda: {"state_dict": Runs(exec, "open('ran', 'w')")},
    "it holds no weights by name": lambda: {"epoch": 3},
    "no weights by name, no state_dict": lambda: torch.zeros(3),
    "cut off": lambda: build_net("lenet", 1, 10, (28, 28)).state_dict(),
}


@pytest.mark.parametrize("said", [*BAD, "no such file"])
def test_other_files_are_refused(said: str, tmp_path: Path, monkeypatch: Patch, refused: Refused) -> None:
    monkeypatch.chdir(tmp_path)
    if said in BAD:
        torch.save(BAD[said](), "bad.pth")
    if said == "cut off":
        Path("bad.pth").write_bytes(Path("bad.pth").read_bytes()[:-400])
    assert said in refused(train, [*SMALL, "--weights", "bad.pth", "--run_dir", "run"], 1)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.pth"}  # nothing ran, nothing was begun


# --- the networks of timm ---------------------------------------------------------------------------------------------

FAMILIES = [
    *("mobilenetv3_small_050", "resnet10t", "efficientnet_lite0", "regnetx_002", "ghostnet_100", "mobilevit_xxs"),
    *("convnext_atto", "vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "swin_tiny_patch4_window7_224"),
    *("mixer_s32_224", "levit_128s", "densenet121", "coatnet_nano_rw_224"),
]


@pytest.mark.parametrize("name", ["timm/resnet10t", "torchvision/resnet18"])
def test_the_size_of_the_weights_can_be_left(name: str) -> None:
    sizes = []
    for more in ({}, {"input_size": 64}, {"input_size": 28}):  # 28 is less than the libraries take by themselves
        net: Any = build_net(name, 3, 2, (32, 32), {"weights": "a.pth", **more})
        sizes += [net.image_size, build_net(name, 3, 2, (32, 32), net.rebuild_args).image_size]  # as in a checkpoint
    assert sizes[0] == sizes[1] != (64, 64)
    assert sizes[2:] == [(64, 64)] * 2 + [(28, 28)] * 2


def test_depthwise_layers_train_in_float32_on_a_cpu() -> None:
    net = build_net("timm/mobilenetv3_small_050", 3, 2, (32, 32))
    layer = next(layer for layer in net.modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1)
    x = torch.randn(2, layer.in_channels, 9, 9)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        trained = layer(x)
        with torch.no_grad():
            assert not layer(x).equal(trained)
    assert trained.equal(exact.bfloat16())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if number < 2 else pytest.mark.slow) for number, name in enumerate(FAMILIES)]
)
def test_networks_of_timm(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LitClassifier(**DATA, net=f"timm/{name}")
    images = torch.randint(256, (4, 1, 32, 32), dtype=torch.uint8)
    model(images).sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is None} == set()
    heads = {name for name, layer in model.net.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    assert set(head_names(model.net)) <= heads
    with pytest.raises(UsageError, match="1 or 3 channels, not 2"):
        build_net(f"timm/{name}", 2, 5, (32, 32))
    model.eval()
    torch.save({"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams)}, tmp_path / "a.ckpt")
    with torch.no_grad():
        assert torch.equal(load_classifier(tmp_path / "a.ckpt")(images), model(images))
    assert script("export")([str(tmp_path / "a.ckpt")]) == 0


# --- body and head ----------------------------------------------------------------------------------------------------


def test_body_and_head_have_rates_of_their_own(weights: Path) -> None:
    model = LitClassifier(**DATA, net="resnet9", net_args={"width": 4}, weights=str(weights), lr=0.1)
    groups = model._optimizer_and_schedule(False, bool)["optimizer"].param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [
        (pytest.approx(factor * 0.1 / 25), decay) for factor in (0.1, 1) for decay in (0.01, 0)
    ]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    heads = [[names[id(p)] for p in group["params"] if names[id(p)].startswith("net.head.")] for group in groups]
    assert heads == [[], [], ["net.head.weight"], ["net.head.bias"]]
    assert sum(len(group["params"]) for group in groups) == len(names)
    frozen = LitClassifier(**DATA, net="resnet9", weights="none", freeze_epochs=-1)
    assert {n for n, p in frozen.named_parameters() if p.requires_grad} == {"net.head.weight", "net.head.bias"}


def body(checkpoint: Path) -> dict[str, Tensor]:
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    return {name: tensor for name, tensor in state.items() if name.startswith("net.features.")}


@pytest.mark.parametrize("optimizer", ["adamw", "nesterov"])
def test_a_frozen_body_stays_as_it_was_to_the_last_bit(optimizer: str, weights: Path, tmp_path: Path) -> None:
    words = [*RESNET, "--weights", str(weights), "--optimizer", optimizer, "--freeze_epochs"]
    started = torch.load(weights, weights_only=True)
    always = body(finished([*words, "-1"], tmp_path / "always") / "checkpoints" / "last.ckpt")
    one = finished([*words, "1", "--max_epochs", "1"], tmp_path / "one")
    for state in (always, body(one / "checkpoints" / "last.ckpt")):
        assert all(torch.equal(tensor, started[name.replace("net.", "module.", 1)]) for name, tensor in state.items())
    assert train(["--resume", str(one), "--max_epochs", "2"]) == 0
    after = body(one / "checkpoints" / "last.ckpt")
    assert not any(torch.equal(tensor, always[name]) for name, tensor in after.items() if tensor.ndim)


@pytest.mark.parametrize(
    "words",
    [
        "--freeze_epochs 1 --augment crop,trivial,erase --ema 0.9",
        "--freeze_epochs 2",
        "--backbone_lr 0.5 --schedule cosine --precision bf16-mixed",
        "--freeze_epochs -1 --cache_features --augment none --flip_in_eval both",
    ],
)
def test_stopped_and_continued_is_the_same_run(words: str, weights: Path, tmp_path: Path) -> None:
    line = [*RESNET, "--weights", str(weights), *words.split()]
    straight, stopped = finished(line, tmp_path / "straight"), stopped_and_continued(line, tmp_path / "run", [2, 4, 6])
    assert differences(straight, stopped) == []
    assert (straight / "config.yaml").read_bytes() == (stopped / "config.yaml").read_bytes()
    weights.unlink()  # which nobody needs any more
    assert train([*line, "--resume", str(stopped), "--max_epochs", "3"]) == 0  # as a job that is queued again does


# --- features ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("views", ["false", "true", "both"])
def test_kept_features_give_what_the_whole_network_gives(views: str, photos: Path, tmp_path: Path) -> None:
    words = ["--data", "image_folder", "--data_dir", str(photos), "--net", "torchvision/resnet18", "--augment", "none"]
    words += ["--freeze_epochs", "-1", "--cache_features", "--flip_in_eval", views, "--data.image_size", "32"]
    run = finished([*words, "--max_epochs", "1", "--lr", "0.01"], tmp_path / "run")
    (file,) = (tmp_path / "cache").glob("features-*.npy")
    kept, made = torch.from_numpy(np.load(file)), file.stat().st_mtime_ns
    assert kept.shape == (100, {"false": 1, "true": 2, "both": 4}[views], 512)
    assert kept.dtype == torch.float16
    model = load_classifier(run / "checkpoints" / "best.ckpt")
    (images,) = (torch.from_numpy(np.load(path)) for path in (tmp_path / "cache").glob("photos-*.npy"))
    with torch.no_grad():
        whole, head = model(images), classify(model, kept.float())
    assert (whole - head).abs().max() <= 1e-3 * whole.abs().max()

    finished([*words, "--lr", "0.1"], tmp_path / "again")  # nothing is computed twice
    assert [path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("features-*.npy")] == [made]
    Image.new("RGB", (64, 48), "red").save(photos / "left" / "0.png")
    finished(words, tmp_path / "changed")
    assert len(list((tmp_path / "cache").glob("features-*.npy"))) == 2


def test_features_of_bfloat16_weights_are_kept(photos: Path, tmp_path: Path) -> None:
    words = ["--data", "image_folder", "--data_dir", str(photos), *RESNET, "--freeze_epochs", "-1", "--cache_features"]
    finished([*words, "--augment", "none", "--precision", "bf16-true", "--data.image_size", "32"], tmp_path / "run")


@pytest.mark.posix
def test_a_full_or_read_only_folder_for_features(tmp_path: Path, monkeypatch: Patch, refused: Refused) -> None:
    import resource

    line = [*SMALL, *RESNET, "--freeze_epochs", "-1", "--cache_features", "--augment", "none"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # bytes of a file
    try:
        said = refused(train, [*line, "--run_dir", str(tmp_path / "full")], 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the cache cannot be written to" in said
    assert not list((tmp_path / "cache").glob("*.npy"))
    monkeypatch.setenv("LIT_NN_CACHE", __file__)  # nobody, not even root, can write below a file
    assert "in the environment variable LIT_NN_CACHE" in refused(train, [*line, "--run_dir", str(tmp_path / "file")], 1)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_three_ways_to_fit() -> None:
    image = torch.zeros(1, 1, 40, 80, dtype=torch.uint8)
    image[..., 20:60] = 200  # the middle square
    crop, pad, squash = (fit_to(image, (20, 20), mode)[0, 0].round() for mode in FITS)
    for bright in (crop, pad[6:14, 7:13], squash[:, 7:13]):
        assert (bright == 200).all()
    for dark in (pad[:5], pad[15:], pad[:, :4], squash[:, :4]):
        assert (dark == 0).all()
    same = torch.randint(256, (2, 3, 20, 20), dtype=torch.uint8)
    for mode in FITS:
        assert torch.equal(fit_to(same, (20, 20), mode), same.float())


@pytest.mark.parametrize("fit", FITS)
def test_the_fit_of_the_training_is_that_of_the_answers(fit: str, photos: Path, tmp_path: Path) -> None:
    words = ["--data", "image_folder", "--data_dir", str(photos), "--net", "resnet9", "--model.net_args.width", "4"]
    run = finished([*words, "--data.image_size", "[24, 40]", "--fit", fit], tmp_path / "run")
    model = load_classifier(run / "checkpoints" / "best.ckpt")
    assert (model.fit, model.image_shape) == (fit, (3, 24, 40))
    files = sorted((photos / "left").iterdir())
    (cached,) = (np.load(path) for path in (tmp_path / "cache").glob("photos-*.npy"))  # (N, C, H, W), in their order
    whole = torch.stack([torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1) for file in files])
    with torch.no_grad():
        answers, expected = model(whole), model(torch.from_numpy(cached[:50]))
    assert (answers - expected).abs().max() < 0.02 * expected.abs().max()  # the cache keeps whole levels


def test_gray_images_for_weights_trained_with_colours() -> None:
    weights = {"image_size": [32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2] * 3}
    data = DATA | {"net": "torchvision/resnet18", "net_args": weights}
    gray, colour = (LitClassifier(**data | {"image_shape": (channels, 32, 32)}).eval() for channels in (1, 3))
    colour.load_state_dict(gray.state_dict())
    images = torch.randint(256, (2, 1, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(gray(images), colour(images.expand(-1, 3, -1, -1)))


def test_large_images_and_a_small_network_are_told_the_way(photos: Path, capsys: Said) -> None:
    words = ["--data", "image_folder", "--data_dir", str(photos), "--data.image_size", "64"]
    assert train([*SMALL, *words, "--fast_dev_run"]) == 0
    assert "lenet looks at images of 64 x 64 pixels at 32 x 32; for photographs:" in capsys.readouterr().out
