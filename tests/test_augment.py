"""Each augmentation does what its name says, image by image, and repeats itself from its generator."""

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from data_modules import photographs
from data_modules.augment import AUGMENTATIONS, Augment, Draws

K = 10
SINGLE = [name for name in AUGMENTATIONS if name not in ("cutmix", "mixup")]


def batch(size: int = 64, channels: int = 3, height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (size, channels, height, width), dtype=torch.uint8, generator=generator)
    return images, torch.randint(K, (size,), generator=generator)


def smooth(size: int, channels: int, height: int, width: int) -> Tensor:
    """Images without fine detail, which ways of sampling agree about."""
    coarse = torch.rand(size, channels, 4, 4, generator=torch.Generator().manual_seed(7))
    return (255 * F.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)).to(torch.uint8)


def draws(seed: int = 0, rank: int = 0, world_size: int = 1) -> Draws:
    return Draws(torch.Generator().manual_seed(seed), rank, world_size)


def run(
    spec: str, images: Tensor, labels: Tensor, seed: int = 0, epoch: int = 0, size: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    return Augment(spec)(images, labels, K, draws(seed), epoch, size=size)


def assert_close(image: Tensor, expected: Tensor, levels: int) -> None:
    assert (image.int() - expected.int()).abs().max() <= levels


@pytest.mark.parametrize("spec", ["none", *AUGMENTATIONS, ",".join(AUGMENTATIONS)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 48, 20), (1, 1, 1)])
def test_keeps_its_promises(spec: str, shape: tuple[int, int, int]) -> None:
    images, labels = batch(64, *shape)
    before = images.clone()
    first, targets = run(spec, images, labels)
    assert first.dtype == torch.uint8
    assert first.shape == images.shape
    assert images.equal(before)  # the caller's batch is left alone
    again, targets_again = run(spec, images, labels)
    assert first.equal(again)
    assert targets.equal(targets_again)
    if "mix" in spec:
        assert targets.shape == (64, K)
        assert targets.min() >= 0
        torch.testing.assert_close(targets.sum(1), torch.ones(64))
    else:
        assert targets.equal(labels)
    if shape != (1, 1, 1) and spec != "flip_alternating":
        assert first.equal(run(spec, images, labels, seed=1)[0]) == (spec == "none")


@pytest.mark.parametrize("spec", [name for name in AUGMENTATIONS if name != "flip_alternating"])
def test_equal_images_come_out_different(spec: str) -> None:
    images, labels = batch(64)
    if "mix" in spec:  # mixing an image with itself changes nothing: let two images alternate
        same, labels = images[:2].repeat(32, 1, 1, 1), torch.arange(2).repeat(32)
    else:
        same = images[:1].expand(64, -1, -1, -1)
    augmented = run(spec, same, labels)[0]
    few = {"flip": 2, "vertical_flip": 2, "quarter_turn": 4}
    assert len(augmented.flatten(1).unique(dim=0)) >= few.get(spec, 15)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 20)])
@pytest.mark.parametrize("spec", ["flip", "vertical_flip", "quarter_turn"])
def test_flips_and_turns_move_each_pixel_to_its_place(spec: str, height: int, width: int) -> None:
    images, labels = batch(1000, 3, height, width)
    turns = [images.rot90(turns, (2, 3)) for turns in ((0, 1, 2, 3) if height == width else (0, 2))]
    places = {"flip": [images, images.flip(3)], "vertical_flip": [images, images.flip(2)], "quarter_turn": turns}[spec]
    augmented = run(spec, images, labels)[0]
    found = torch.stack([(augmented == place).flatten(1).all(1) for place in places])  # (places, B)
    assert found.any(0).all()
    assert found.sum(1).min() > 0.8 * len(images) / len(places)


def test_flip_alternating_shows_both_sides_in_two_epochs() -> None:
    images, labels = batch(1000, 3, 8, 8)
    epochs = [run("flip_alternating", images, labels, seed=epoch, epoch=epoch)[0] for epoch in range(4)]
    mirrored = [(images.flip(3) == augmented).flatten(1).all(1) for augmented in epochs]
    assert 450 < mirrored[0].sum() < 550
    assert mirrored[1].equal(~mirrored[0])
    assert mirrored[2].equal(mirrored[0])
    order = torch.randperm(1000)  # the place in the batch does not matter
    assert run("flip_alternating", images[order], labels)[0].equal(epochs[0][order])


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (48, 20)])
def test_translate_equals_a_slow_reference(height: int, width: int) -> None:
    def mirrored(size: int, shift: int) -> list[int]:
        return [size - 1 - abs(size - 1 - abs(place + shift)) for place in range(size)]

    images, labels = batch(64, 3, height, width)
    augmented = run("translate", images, labels)[0]
    up, left = round(height / 16), round(width / 16)
    found, shifts = torch.zeros(64, dtype=torch.bool), 0
    for dy, dx in itertools.product(range(-up, up + 1), range(-left, left + 1)):
        is_it = (augmented == images[:, :, mirrored(height, dy)][..., mirrored(width, dx)]).flatten(1).all(1)
        found, shifts = found | is_it, shifts + int(is_it.any())
    assert found.all()
    assert shifts > 0.6 * (2 * up + 1) * (2 * left + 1)


def painted(spec: str, size: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Height and width of the box in each image that is painted with its mean; 0 where there is none."""
    images, labels = batch(size, 3, height, width)
    augmented = run(spec, images, labels)[0]
    mean = images.float().mean((2, 3), keepdim=True).to(torch.uint8)
    changed = (augmented != images).any(1)  # (B, H, W)
    assert (augmented == mean)[changed[:, None].expand_as(images)].all()
    heights, widths = changed.any(2).sum(1), changed.any(1).sum(1)
    assert (changed.sum((1, 2)) >= heights * widths - 2).all()  # a pixel may have had the mean colour before
    return heights, widths


def test_cutout_and_erase_paint_a_box_with_the_mean() -> None:
    heights, widths = painted("cutout", 200, 32, 32)
    assert heights.max() == widths.max() == 16
    assert heights.min() >= 8  # a box whose centre lies at the edge shows half of itself
    heights, widths = painted("erase", 500, 60, 40)
    assert 200 < (heights > 0).sum() < 300  # of every other image
    area = (heights * widths)[heights > 0] / (60 * 40)
    assert [*area.aminmax()] == pytest.approx([0.03, 0.32], abs=0.04)


def test_brightness_contrast_is_one_line_for_each_image() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(500, 1, 1, 1)
    augmented = run("brightness_contrast", ramp, torch.zeros(500, dtype=torch.long))[0].float().flatten(1)  # (B, 256)
    slope = (augmented[:, 148] - augmented[:, 108]) / 40
    shift = augmented[:, 127:129].mean(1) - 127.5
    assert [*slope.aminmax()] == pytest.approx([0.8, 1.2], abs=0.03)
    assert [*shift.aminmax()] == pytest.approx([-51, 51], abs=6)
    assert (augmented.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("spec", ["mixup", "cutmix"])
def test_images_and_targets_are_mixed_alike(spec: str) -> None:
    images = torch.zeros(100, 1, 16, 24, dtype=torch.uint8)
    images[1::2] = 255
    augmented, targets = run(spec, images, torch.arange(100) % 2)
    whiteness = augmented.float().mean((1, 2, 3)) / 255
    assert (whiteness - targets[:, 1]).abs().max() < (0.003 if spec == "mixup" else 1e-5)  # one level of gray
    assert targets[:, 1].std() > 0.2
    pasted = (augmented != images).squeeze(1)  # (B, H, W)
    assert (pasted.sum((1, 2)) == pasted.any(2).sum(1) * pasted.any(1).sum(1)).all()  # a rectangle
    assert spec == "mixup" or set(augmented.unique().tolist()) == {0, 255}


# --- photographs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 40), (1, 30, 30)])
@pytest.mark.parametrize("size", [(64, 48), (57, 57), (20, 30), None])
def test_crop_is_a_resized_part(shape: tuple[int, int, int], size: tuple[int, int] | None) -> None:
    channels, height, width = shape
    images, labels = batch(200, *shape)
    columns, rows = torch.arange(width).expand(height, width), torch.arange(height)[:, None].expand(height, width)
    spec = "crop:scale=0.2..0.8:ratio=0.5..2"
    # Where nothing is scaled down, the least and the greatest number of columns and rows tell which part it was.
    target = torch.Size(size or (height, width))
    marks = [axis.to(torch.uint8).expand(200, channels, -1, -1) for axis in (columns, rows)]
    first = [run(spec, mark, labels, size=(100, round(100 * target[1] / target[0])))[0] for mark in marks]
    shares, ratios = [], []
    for index, (image, augmented) in enumerate(zip(images, run(spec, images, labels, size=size)[0], strict=True)):
        left, top = (int(mark[index].min()) for mark in first)
        w, h = int(first[0][index].max()) - left + 1, int(first[1][index].max()) - top + 1
        assert_close(augmented, tv.resized_crop(image, top, left, h, w, list(target), antialias=True), 1)
        shares.append(w * h / (width * height))
        ratios.append(w / h * target[0] / target[1])
    assert 0.15 < min(shares) < 0.3 < 0.6 < max(shares) < 0.85
    assert 0.4 < min(ratios) < 0.7 < 1.4 < max(ratios) < 2.4


def affine(image: Tensor, angle: float = 0, x: float = 0, y: float = 0, shear: tuple[float, float] = (0, 0)) -> Tensor:
    """Move the content by x and y, and the rest, about the centre; black from beyond the edges."""
    return tv.affine(image, angle, [x, y], 1.0, list(shear), tv.InterpolationMode.BILINEAR)


def by_torchvision(image: Tensor, number: int, strength: float) -> Tensor:
    """An operation of TrivialAugment, on an image of 56 x 70."""
    degrees = math.degrees(math.atan(0.99 * strength))
    return [
        lambda: tv.adjust_sharpness(image, 1 + 0.99 * strength),
        lambda: tv.posterize(image, 8 - round(6 * abs(strength))),
        lambda: tv.solarize(image, 255 * (1 - abs(strength))),
        lambda: tv.autocontrast(image),
        lambda: tv.equalize(image),
        lambda: affine(image, shear=(degrees, 0)),
        lambda: affine(image, shear=(0, degrees)),
        lambda: affine(image, x=-10 * strength),
        lambda: affine(image, y=-8 * strength),
        lambda: affine(image, angle=-135 * strength),
        lambda: tv.adjust_brightness(image, 1 + 0.99 * strength),
        lambda: tv.adjust_contrast(image, 1 + 0.99 * strength),
        lambda: tv.adjust_saturation(image, 1 + 0.99 * strength),
        lambda: image,
    ][number]()


def test_every_operation_of_trivial_is_torchvisions() -> None:
    images, labels = smooth(300, 3, 56, 70), torch.zeros(300, dtype=torch.long)
    again = draws()
    operations, strengths = (14 * again.rand(300)).long().tolist(), (2 * again.rand(300) - 1).tolist()
    assert set(operations) == set(range(14))
    results = run("trivial", images, labels)[0]
    for image, result, number, strength in zip(images, results, operations, strengths, strict=True):
        expected, levels = by_torchvision(image, number, strength), 2
        if 5 <= number <= 9:  # beyond the edges we mirror, and torchvision has black
            inside = by_torchvision(torch.full_like(image, 255), number, strength) == 255
            result, expected, levels = result * inside, expected * inside, 3
        assert_close(result, expected, levels if number < 13 else 0)


def test_color_multiplies_brightness_contrast_and_saturation() -> None:
    images, labels = 90 + smooth(100, 3, 32, 32) // 8, torch.zeros(100, dtype=torch.long)  # nothing reaches 0 or 255
    factors = 0.6 + 0.8 * draws().rand(3, 100).T
    for image, result, (b, c, s) in zip(images, run("color", images, labels)[0], factors.tolist(), strict=True):
        assert_close(result, tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(image, b), c), s), 3)


def test_rotate_and_translate_make_one_map() -> None:
    images, labels = smooth(100, 3, 48, 64), torch.zeros(100, dtype=torch.long)
    again = draws()
    shifts, angles = (again.rand(2, 100).T - 0.5).tolist(), (15 * (2 * again.rand(100) - 1)).tolist()
    results = run("rotate,translate", images, labels)[0]
    for image, result, angle, (x, y) in zip(images, results, angles, shifts, strict=True):
        expected = affine(affine(image, x=-8 * x, y=-6 * y), -angle)  # shifted by up to a sixteenth of its sides
        assert_close(result[:, 12:36, 16:48], expected[:, 12:36, 16:48], 4)  # nothing from beyond the edges is here


def test_fine_detail_does_not_turn_into_noise() -> None:
    board = (torch.arange(256)[:, None] + torch.arange(256)) % 2 * 255
    images = board.to(torch.uint8).expand(16, 3, 256, 256)
    for spec in ("crop:scale=0.9..1", "crop:scale=0.9..1,rotate"):
        small = run(spec, images, torch.zeros(16, dtype=torch.long), size=(64, 64))[0]
        assert_close(small, torch.full_like(small, 127), 12)


@pytest.mark.parametrize("change", [*photographs.FILTERS, photographs.recolour, photographs.erase, photographs.oblique])
def test_all_at_once_is_one_by_one(change: Callable[..., Tensor]) -> None:
    """Other devices than the CPU get the whole batch."""
    images, numbers = smooth(20, 3, 24, 30), torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    images[0] = 3  # of one level
    values = {
        photographs.recolour: photographs.colour_maps(2 * numbers[:, :3], 3),
        photographs.erase: ((40 * numbers[:, :4]).long() - 10,),
        photographs.oblique: (numbers.view(20, 2, 3),),
    }.get(change, (2 * numbers[:, 0] - 1,))
    if change is photographs.oblique:
        change = partial(change, size=(10, 12))
    each = [change(images[row : row + 1], *(value[row : row + 1] for value in values)) for row in range(20)]
    at_once = photographs.paint_all if change is photographs.erase else change
    assert_close(at_once(images, *values), torch.cat(each), 1)


def test_all_devices_resize_alike() -> None:
    """The product of matrices, which other devices compute, is what the CPU does image by image."""
    images, _ = batch(20, 3, 40, 50)
    part = torch.tensor([[3, 5, 30, 20]])
    centre = (2 * part[:, :2] + part[:, 2:]) / torch.tensor([50, 40]) - 1
    maps = torch.cat([torch.diag_embed(torch.tensor([[-0.6, 0.5]])), centre[..., None]], 2)
    for size in ((64, 70), (15, 8)):
        expected = photographs.cut(images, maps, part, size)
        assert_close(photographs.straight(images, maps.expand(20, 2, 3), part, size), expected, 1)


@pytest.mark.parametrize("spec", [",".join(SINGLE), "erase,trivial,flip,crop", "vertical_flip,quarter_turn,color"])
def test_the_number_of_processes_and_the_order_of_the_names_change_nothing(spec: str) -> None:
    images, labels = batch(64)
    whole = Augment(", ".join(reversed(spec.split(","))))(images, labels, K, draws(), size=(24, 20))[0]
    for rank in range(4):
        mine = images[rank::4], labels[rank::4]
        assert Augment(spec)(*mine, K, draws(0, rank, 4), size=(24, 20))[0].equal(whole[rank::4])


@pytest.mark.gpu
@pytest.mark.parametrize("spec", AUGMENTATIONS)
def test_the_device_changes_nothing(spec: str) -> None:
    images, labels = batch()
    cpu_images, cpu_targets = run(spec, images, labels)
    gpu_images, gpu_targets = run(spec, images.cuda(), labels.cuda())
    torch.testing.assert_close(gpu_targets.cpu(), cpu_targets)
    # Sums of floats in another order may turn a rounding over.
    assert (gpu_images.cpu().int() - cpu_images.int()).abs().max() <= 1
