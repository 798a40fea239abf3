"""Heat maps lie where the class is decided: of planted weights to the number, of trained networks on the object."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import Refused, Said, script
from PIL import Image
from test_export import save_checkpoint
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from lit_nn.errors import UsageError
from lit_nn.model import ImageClassifier
from lit_nn.nets import NETS, build_net
from lit_nn.trained.explain import heat_maps

predict_command = script("predict")
SIDE, PATCH = 32, 8  # pixels


class TinyViT(nn.Module):
    """torchvision's vision transformer, small; its class token alone decides."""

    image_size = (SIDE, SIDE)

    def __init__(self) -> None:
        super().__init__()
        sizes: dict[str, Any] = {"num_layers": 4, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64, "num_classes": 3}
        self.vit = VisionTransformer(SIDE, 4, **sizes)
        nn.init.xavier_uniform_(self.vit.heads[0].weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.vit(x.expand(-1, 3, -1, -1))


def model_of(net: nn.Module, side: int, classes: int = 2, **arguments: Any) -> ImageClassifier:
    names = [f"class {label}" for label in range(classes)]
    return ImageClassifier(names, (1, side, side), [0.5], [0.25], net=net, **arguments).eval()


@pytest.mark.parametrize("flip", [False, True, "both"])
@pytest.mark.parametrize("size", [None, (32, 32)])
def test_planted_weights_give_the_map_by_hand(size: tuple[int, int] | None, flip: bool | str) -> None:
    conv, random = nn.Conv2d(1, 2, 1, bias=False), torch.Generator().manual_seed(0)
    conv.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)  # how bright an image is, and how dark
    net = nn.Sequential(conv, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    vars(net)["image_size"] = size  # (32, 32) puts a black frame around the images, which is not theirs
    bright, dark = torch.randint(110, 256, (2, 1, 28, 28), generator=random).split(1)
    images = torch.cat([bright, 365 - dark - 110]).to(torch.uint8)
    model = model_of(net, 28, flip_in_eval=flip)
    places = model.normalised(images)[:, 0] * torch.tensor([1, -1])[:, None, None]  # (2, h, w)
    frame = 2 if size else 0
    expected = (places - places.mean((1, 2), keepdim=True)).clamp(min=0)[:, frame : frame + 28, frame : frame + 28]
    expected /= expected.amax((1, 2), keepdim=True)
    torch.testing.assert_close(heat_maps(model, images), expected)


def patches(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Noise, in two of three classes with stripes at a random place; and where that is, bool (N, H, W)."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(78, 178, (count, 1, SIDE, SIDE), generator=random)
    labels = torch.arange(count) % 3
    stripes = (torch.arange(PATCH) // 2 % 2 * 255).expand(PATCH, PATCH)
    inside = torch.zeros(count, SIDE, SIDE, dtype=torch.bool)
    for row, (top, left) in enumerate(torch.randint(0, SIDE - PATCH + 1, (count, 2), generator=random).tolist()):
        inside[row, top : top + PATCH, left : left + PATCH] = True
        if labels[row]:
            images[row, 0, inside[row]] = (stripes if labels[row] == 1 else stripes.T).flatten()
    return images.to(torch.uint8), labels, inside


def trained(net: nn.Module, steps: int, **arguments: Any) -> ImageClassifier:
    model = model_of(net, SIDE, 3, **arguments).train()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        images, labels, _ = patches(24, step)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.eval()


NETWORKS = [  # steps of training; share of the map on the object, which is 1 / 16 of the area; of peaks that are
    ("lenet", 100, 0.5, 0.9),
    pytest.param("resnet9", 40, 0.45, 0.8, marks=pytest.mark.slow),
    pytest.param("conv3d_cnn", 60, 0.6, 0.85, marks=pytest.mark.slow),
    pytest.param("vit", 200, 0.35, 0.5, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "steps", "least_share", "least_peak"), NETWORKS)
def test_the_map_of_a_trained_network_lies_on_the_object(
    name: str, steps: int, least_share: float, least_peak: float
) -> None:
    if name not in {*NETS, "vit"}:
        pytest.skip("the tutorials' networks are deleted")
    torch.manual_seed(0)
    options = {"width": 8} if name == "resnet9" else None
    model = trained(TinyViT() if name == "vit" else build_net(name, 1, 3, (SIDE, SIDE), options), steps)
    images, labels, inside = patches(60, 10**6)
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    assert right.float().mean() >= 0.9
    images, inside = images[right & (labels > 0)], inside[right & (labels > 0)]
    maps = heat_maps(model, images)
    assert ((maps * inside).sum((1, 2)) / maps.sum((1, 2))).mean() >= least_share
    peak = inside.flatten(1).gather(1, maps.flatten(1).argmax(1, keepdim=True))
    assert peak.float().mean() >= least_peak


@pytest.mark.parametrize("net", [*NETS, "torchvision/resnet18", "torchvision/swin_t", "timm/test_vit"])
def test_every_network_with_places_has_maps(net: str) -> None:
    torch.manual_seed(0)
    model = ImageClassifier(["a", "b", "c"], (1, 28, 28), [0.5], [0.25], net=net).eval()
    images = torch.randint(0, 256, (2, 1, 40, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    if not any(isinstance(layer, nn.Conv2d | nn.Conv3d) for layer in model.modules()):
        with pytest.raises(UsageError, match="no layer with places"):
            heat_maps(model, images)
        return
    maps = heat_maps(model, images)
    assert maps.shape == (2, 28, 28)
    assert maps.amax((1, 2)).tolist() == [1, 1]
    assert (maps >= 0).all()
    assert maps.std() > 0.01
    assert not any(layer._forward_hooks for layer in model.modules())


def test_predict_writes_a_map_for_each_image(tmp_path: Path, refused: Refused, capsys: Said) -> None:
    checkpoint = save_checkpoint(tmp_path / "a.ckpt")
    names = ["a/x.png", "b/x.png", "b/x.jpg", "b/..png", f"b/{'é' * 120}.png"]
    for number, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.linear_gradient("L").resize((30 + number, 50)).save(tmp_path / name, "PNG")
    (tmp_path / "b" / "z.png").write_text("no image")
    words = [str(checkpoint), *(str(tmp_path / name) for name in [*names, "b/z.png"])]
    folder = tmp_path / "out" / "maps"
    assert predict_command([*words, "--heatmaps", str(folder), "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)) == 6
    maps = ["1-x.png.png", "2-x.png.png", "3-x.jpg.png", "4-..png.png", f"5-{'é' * 50}.png"]
    assert sorted(path.name for path in folder.iterdir()) == maps
    with Image.open(folder / "1-x.png.png") as image:
        assert (image.size, image.mode) == ((224, 224), "RGB")
        assert len(set(image.getdata())) > 20
