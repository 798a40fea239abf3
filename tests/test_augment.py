"""Each augmentation does what its name says, image by image, and repeats itself from its generator."""

import re

import pytest
import torch
from torch import Tensor

from data_modules import OptionError
from data_modules.augment import AUGMENTATIONS, Augment, Draws

K = 10


def batch(size: int = 64, channels: int = 3, height: int = 32, width: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (size, channels, height, width), dtype=torch.uint8, generator=generator)
    return images, torch.randint(K, (size,), generator=generator)


def run(spec: str, images: Tensor, labels: Tensor, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor]:
    return Augment(spec)(images, labels, K, Draws(torch.Generator().manual_seed(seed)), epoch)


@pytest.mark.parametrize("spec", [*AUGMENTATIONS, ",".join(AUGMENTATIONS)])
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
        assert not first.equal(run(spec, images, labels, seed=1)[0])


@pytest.mark.parametrize("spec", [name for name in AUGMENTATIONS if name != "flip_alternating"])
def test_equal_images_come_out_different(spec: str) -> None:
    images, labels = batch(64)
    if "mix" in spec:  # mixing an image with itself changes nothing: let two images alternate
        same, labels = images[:2].repeat(32, 1, 1, 1), torch.arange(2).repeat(32)
    else:
        same = images[:1].expand(64, -1, -1, -1)
    augmented = run(spec, same, labels)[0]
    assert len(augmented.flatten(1).unique(dim=0)) >= (2 if spec == "flip" else 15)


def test_none_changes_nothing() -> None:
    images, labels = batch()
    assert Augment("none").names == []
    augmented, same_labels = run("none", images, labels)
    assert augmented.equal(images)
    assert same_labels.equal(labels)


def test_flip_mirrors_about_half() -> None:
    images, labels = batch(1000, 1, 4, 4)
    augmented = run("flip", images, labels)[0]
    mirrored = (augmented == images.flip(3)).flatten(1).all(1)
    kept = (augmented == images).flatten(1).all(1)
    assert (mirrored | kept).all()
    assert 450 < mirrored.sum() < 550


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
    images, labels = batch(64, 3, height, width)
    augmented = run("translate", images, labels)[0]
    up, left = round(height / 16), round(width / 16)
    shifts = set()
    for image, result in zip(images, augmented, strict=True):
        for dy in range(-up, up + 1):
            for dx in range(-left, left + 1):
                rows = [mirror(y + dy, height) for y in range(height)]
                columns = [mirror(x + dx, width) for x in range(width)]
                if result.equal(image[:, rows][:, :, columns]):
                    shifts.add((dy, dx))
                    break
            else:
                continue
            break
        else:
            pytest.fail("an image is not a shift of the original")
    assert len(shifts) > 0.6 * (2 * up + 1) * (2 * left + 1)


def mirror(place: int, size: int) -> int:
    return size - 1 - abs(size - 1 - abs(place))


def test_cutout_paints_half_of_the_sides_with_the_mean() -> None:
    images, labels = batch(200)
    augmented = run("cutout", images, labels)[0]
    mean = images.float().mean((2, 3), keepdim=True).to(torch.uint8)
    changed = (augmented != images).any(1)  # (B, H, W)
    assert (augmented == mean)[changed[:, None].expand_as(images)].all()
    heights, widths = changed.any(2).sum(1), changed.any(1).sum(1)
    assert heights.max() == widths.max() == 16
    assert heights.min() >= 8  # a box whose centre lies at the edge shows half of itself
    assert (changed.sum((1, 2)) >= heights * widths - 2).all()  # a pixel may have had the mean colour before


def test_brightness_contrast_is_one_line_for_each_image() -> None:
    ramp = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(500, 1, 1, 1)
    augmented = run("brightness_contrast", ramp, torch.zeros(500, dtype=torch.long))[0].float().flatten(1)  # (B, 256)
    slope = (augmented[:, 148] - augmented[:, 108]) / 40
    shift = augmented[:, 127:129].mean(1) - 127.5
    assert 0.77 < slope.min() < 0.83
    assert 1.17 < slope.max() < 1.23
    assert -52 < shift.min() < -45
    assert 45 < shift.max() < 52
    assert (augmented.diff(dim=1) >= 0).all()


def test_mixup_fades_images_and_targets_alike() -> None:
    images = torch.zeros(100, 1, 8, 8, dtype=torch.uint8)
    images[1::2] = 255
    labels = torch.arange(100) % 2
    augmented, targets = run("mixup", images, labels)
    whiteness = augmented.float().mean((1, 2, 3)) / 255
    assert (whiteness - targets[:, 1]).abs().max() < 0.003  # one level of gray
    assert targets[:, 1].std() > 0.2


def test_cutmix_pastes_the_neighbour_and_counts_its_area() -> None:
    images = torch.zeros(100, 1, 16, 24, dtype=torch.uint8)
    images[1::2] = 255
    labels = torch.arange(100) % 2
    augmented, targets = run("cutmix", images, labels)
    assert set(augmented.unique().tolist()) == {0, 255}
    torch.testing.assert_close(augmented.float().mean((1, 2, 3)) / 255, targets[:, 1])
    pasted = augmented != images
    heights, widths = pasted.any(3).sum((1, 2)), pasted.any(2).sum((1, 2))
    assert (pasted.sum((1, 2, 3)) == heights * widths).all()  # a rectangle


def test_order_of_the_names_does_not_matter() -> None:
    images, labels = batch()
    for one, other in [("flip,translate", "translate, flip"), ("mixup,cutout", "cutout,mixup")]:
        for left, right in zip(run(one, images, labels), run(other, images, labels), strict=True):
            assert left.equal(right)


@pytest.mark.parametrize(("spec", "word"), [("flop", "flip?"), ("flip,cut_out", "cutout?"), ("", "none"), ("x", "x")])
def test_unknown_names_are_refused(spec: str, word: str) -> None:
    with pytest.raises(OptionError, match=re.escape(word)) as error:
        Augment(spec)
    assert all(name in str(error.value) for name in AUGMENTATIONS)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", AUGMENTATIONS)
def test_the_device_changes_nothing(spec: str) -> None:
    images, labels = batch()
    cpu_images, cpu_targets = run(spec, images, labels)
    gpu_images, gpu_targets = run(spec, images.cuda(), labels.cuda())
    torch.testing.assert_close(gpu_targets.cpu(), cpu_targets)
    # Sums of floats in another order may turn a rounding over.
    assert (gpu_images.cpu().int() - cpu_images.int()).abs().max() <= 1
