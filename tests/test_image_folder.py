"""Folders of images of every kind, broken and hostile ones among them, become a data set or one clear message."""

import os
import pathlib
import struct
import subprocess
import sys
import time
import unicodedata
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from data_modules import DataError, DataNote, OptionError
from data_modules.image_folder import ImageFolder
from data_modules.images import cache as image_cache
from data_modules.images.cache import cache_folder
from data_modules.images.decode import SUFFIXES, ImageError, read_image, side_and_gray

RED, BLUE = (220, 40, 30), (30, 50, 210)


def prepare_file(path: Path, size: int, channels: int, levels: int = 65535) -> NDArray[np.uint8]:
    return image_cache.prepare_file(path, (size, size), channels, levels, "crop")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIT_NN_CACHE", str(folder))
    return folder


def noise(size: int = 8, seed: int = 0, channels: int = 3) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)
    return Image.fromarray(levels.squeeze())


def make_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), count: int = 10, channels: int = 3) -> Path:
    """Two classes of different images in each part; "" stands for the layout without parts."""
    for seed, part in enumerate(parts):
        for label, name in enumerate(("ant", "bee")):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise(8, 1000 * seed + 100 * label + number, channels).save(folder / f"{number:02}.png")
    return root


def message(root: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        ImageFolder(str(root), **options).prepare_data()
    return str(error.value)


# --- one image ------------------------------------------------------------------------------------------------------


def left_right(mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue, 16 x 8."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    return image.convert(mode)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK", "L", "1"])
def test_every_format_and_mode(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"image{suffix}"
    image = left_right(mode)
    try:
        image.save(path)
    except (OSError, ValueError):
        pytest.skip(f"{suffix} cannot hold {mode}")
    pixels = prepare_file(path, 8, 3)  # the middle: columns 4 to 12
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == np.uint8
    gray = mode in ("L", "1")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)[:, :, 4:12].astype(int)
    if mode == "CMYK":
        expected = np.asarray(left_right()).transpose(2, 0, 1)[:, :, 4:12].astype(int)
    lossy = suffix in (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif") or (suffix == ".gif" and not gray)
    if mode != "1":
        assert np.abs(pixels - expected)[:, :, [0, 1, 6, 7]].max() <= (60 if lossy else 0)
    assert prepare_file(path, 8, 1).shape == (1, 8, 8)


def test_sixteen_bits_with_transparency_or_with_zero_for_white(tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(levels).save(tmp_path / "clear.png", transparency=2048)
    assert (prepare_file(tmp_path / "clear.png", 8, 1)[0] == np.where(levels == 2048, 255, levels // 256)).all()
    Image.fromarray(levels).save(tmp_path / "negative.tiff", tiffinfo={262: 0})
    assert (prepare_file(tmp_path / "negative.tiff", 8, 1)[0] == 255 - levels // 256).all()


def test_transparent_becomes_white(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((*RED, 255), (0, 0, 4, 8))
    image.paste((0, 0, 0, 128), (7, 0, 8, 8))
    image.save(tmp_path / "alpha.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([*RED, 9, 9, 9])
    palette.paste(0, (0, 0, 4, 8))
    palette.save(tmp_path / "palette.gif", transparency=1)
    gray = Image.new("LA", (8, 8), (0, 0))
    gray.save(tmp_path / "gray.png")
    pixels = prepare_file(tmp_path / "alpha.png", 8, 3)
    assert pixels[:, 0, 0].tolist() == list(RED)
    assert pixels[:, 0, 5].tolist() == [255] * 3
    assert pixels[:, 0, 7].tolist() == [127] * 3
    pixels = prepare_file(tmp_path / "palette.gif", 8, 3)
    assert pixels[:, 0, 0].tolist() == list(RED)
    assert pixels[:, 0, 5].tolist() == [255] * 3
    assert (prepare_file(tmp_path / "gray.png", 8, 1) == 255).all()


@pytest.mark.parametrize("suffix", [".gif", ".png", ".tiff", ".webp"])
def test_of_an_animation_the_first_image_counts(tmp_path: Path, suffix: str) -> None:
    first, second = left_right().resize((32, 16)), noise(32).crop((0, 0, 32, 16))
    first.save(tmp_path / f"moving{suffix}", save_all=True, append_images=[second])
    first.save(tmp_path / f"still{suffix}")
    moving, still = (prepare_file(tmp_path / f"{name}{suffix}", 16, 3).astype(int) for name in ("moving", "still"))
    assert np.abs(moving - still).max() < 30


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_images_are_turned_upright(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    left_right().resize((32, 32)).save(tmp_path / f"turned{suffix}", exif=exif)
    pixels = prepare_file(tmp_path / f"turned{suffix}", 32, 3).astype(int)
    assert np.abs(pixels[:, 4, 16] - RED).max() < 30  # left is now at the top
    assert np.abs(pixels[:, 28, 16] - BLUE).max() < 30


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_an_image_whose_exif_is_broken_is_seen(tmp_path: Path, suffix: str) -> None:
    noise(32).save(tmp_path / f"plain{suffix}")
    noise(32).save(tmp_path / f"broken{suffix}", exif=b"Exif\0\0this is no EXIF")
    plain, broken = (prepare_file(tmp_path / f"{name}{suffix}", 32, 3) for name in ("plain", "broken"))
    assert np.array_equal(plain, broken)


def test_shorter_side_is_scaled_and_the_centre_cut(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 300).astype(np.uint8), (100, 1))  # 100 x 300, darker on the left
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    row = prepare_file(tmp_path / "ramp.png", 10, 1)[0, 5].astype(int)
    assert np.abs(row - np.linspace(89, 166, 10)).max() < 3  # the middle third


def test_a_large_jpeg_is_decoded_small_and_right(tmp_path: Path) -> None:
    left_right().resize((1600, 800), Image.Resampling.NEAREST).save(tmp_path / "large.jpg", quality=95)
    pixels = prepare_file(tmp_path / "large.jpg", 16, 3).astype(int)
    assert np.abs(pixels[:, :, :6] - np.array(RED)[:, None, None]).max() < 8
    assert np.abs(pixels[:, :, 10:] - np.array(BLUE)[:, None, None]).max() < 8


def deep_levels(top: int, seed: int = 0, dtype: type = np.uint16) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, top + 1, (8, 8))
    levels[0, 0] = top
    return Image.fromarray(levels.astype(dtype))


@pytest.mark.parametrize(("levels", "divisor"), [(65535, 256), (4095, 16), (255, 1)])
def test_levels_say_what_is_white(tmp_path: Path, levels: int, divisor: int) -> None:
    image = deep_levels(levels)
    for name in ("deep.png", "deep.tiff", "deep.jp2"):
        image.save(tmp_path / name)
        assert side_and_gray(tmp_path / name) == (8, True)
        assert (prepare_file(tmp_path / name, 8, 1, levels)[0] == np.asarray(image) // divisor).all()
    assert (read_image(image, 1, levels)[0] == np.asarray(image) // divisor).all()


@pytest.mark.parametrize(
    ("image", "levels", "reason"),
    [
        (deep_levels(5000), 4095, "from 0 to 5000, which is another range than 0 to 4095"),
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), 65535, "from 0 to 0.5"),
        (Image.fromarray(np.full((8, 8), np.nan, np.float32)), 1, "undefined"),
        (Image.fromarray(np.full((8, 8), -5, np.int32)), 65535, "negative"),
    ],
)
def test_other_levels_are_refused_and_not_shown_black_or_white(image: Image.Image, levels: int, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_image(image, 1, levels)


def test_a_long_comment_makes_no_image_worse(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 5_000_000, zip=True)
    noise().save(tmp_path / "text.png", pnginfo=info)
    assert np.array_equal(prepare_file(tmp_path / "text.png", 8, 3), np.asarray(noise()).transpose(2, 0, 1))


def test_large_photographs_are_read_and_the_limit_can_be_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (14_000, 14_000), 90).save(tmp_path / "phone.jpg")  # 196 megapixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (prepare_file(tmp_path / "phone.jpg", 8, 1) == 90).all()
        monkeypatch.setenv("LIT_NN_MAX_PIXELS", "1e8")
        with pytest.raises(ImageError, match=r"196,000,000 pixels, more than 100,000,000; .*LIT_NN_MAX_PIXELS"):
            prepare_file(tmp_path / "phone.jpg", 8, 1)


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_parts_from_folders(tmp_path: Path) -> None:
    data = ImageFolder(str(make_folder(tmp_path / "data", ("train", "val", "test"))))
    assert data.class_names == ["ant", "bee"]
    assert data.image_shape == (3, 8, 8)
    for split in ("train", "val", "test"):
        images, labels, indices = data.split(split)
        assert len(indices) == 20
        files = [tmp_path / "data" / split / name / f"{n:02}.png" for name in data.class_names for n in range(10)]
        for index, file in zip(indices, files, strict=True):
            assert images[index].equal(torch.from_numpy(np.asarray(Image.open(file)).transpose(2, 0, 1).copy()))
            assert labels[index] == data.class_names.index(file.parent.name)


def test_parts_cut_by_the_seed(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",), count=20)
    data = ImageFolder(str(root), test_fraction=0.2, val_fraction=0.25, seed=3)
    parts = {split: set(data.split(split)[2].tolist()) for split in ("train", "val", "test")}
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 24, "val": 8, "test": 8}
    assert set.union(*parts.values()) == set(range(40))
    assert data.class_counts.tolist() == [12, 12]
    _, labels, rows = data.split("test")
    assert labels[rows].bincount().tolist() == [4, 4]
    again, other, larger = (
        ImageFolder(str(root), s, test_fraction=0.2, seed=seed) for s, seed in [(8, 3), (8, 4), (12, 3)]
    )
    assert again.split("test")[2].equal(rows)
    assert larger.split("test")[2].equal(rows)  # whatever the size
    assert not other.split("test")[2].equal(rows)


def test_mean_and_std_are_of_the_training_part(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    Image.new("RGB", (8, 8), "white").save(root / "test" / "ant" / "white.png")
    data = ImageFolder(str(root))
    images, _, rows = data.split("train")
    pixels = images[rows].double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_gray_or_colour_and_size_come_from_the_images_unless_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", channels=1)
    assert ImageFolder(str(root)).image_shape == (1, 8, 8)
    assert ImageFolder(str(root), channels=3, image_size=12).image_shape == (3, 12, 12)
    for number, suffix in enumerate([".jpg", ".png", ".webp", ".gif", ".bmp"]):
        noise(8, 500 + number, 1).convert("RGB").save(root / "train" / "ant" / f"gray{suffix}")
    assert ImageFolder(str(root)).image_shape == (1, 8, 8)
    noise().save(root / "train" / "ant" / "colour.png")
    assert ImageFolder(str(root)).image_shape == (3, 8, 8)
    for path in root.rglob("*.png"):
        noise(300).save(path)
    assert ImageFolder(str(root)).image_shape == (3, 224, 224)


def test_the_cache_is_reused_and_made_again_when_an_image_changes(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "data")
    image = root / "train" / "ant" / "00.png"

    def built(**options: Any) -> tuple[str, int]:
        data = ImageFolder(str(root), **options)
        with Image.open(image) as first:
            assert data.split("train")[0][0].equal(torch.from_numpy(np.asarray(first).transpose(2, 0, 1).copy()))
        (images,) = cache.glob("*.npy")
        return images.name, images.stat().st_mtime_ns

    states = [built()]
    assert built() == states[0]
    status = image.stat()
    noise(seed=99).save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))  # as some copying programs do
    states.append(built())
    noise(seed=98).save(root / "train" / "ant" / "new.png")
    states.append(built())
    assert len({name for name, _ in states}) == 3  # a new name each time: Windows replaces no mapped file
    (images,) = cache.glob("*.npy")
    images.write_bytes(images.read_bytes()[:-1])  # damaged
    states.append(built())
    assert len(set(states)) == 4
    ImageFolder(str(root), image_size=4).prepare_data()
    assert len(list(cache.glob("*.npy"))) == 2


def test_images_are_memory_mapped(tmp_path: Path) -> None:
    images, _, _ = ImageFolder(str(make_folder(tmp_path / "data"))).split("train")
    assert not images.numpy().flags.owndata
    with Path("/proc/self/maps").open() if Path("/proc/self/maps").exists() else pytest.skip("no /proc") as maps:
        assert str(tmp_path / "cache") in maps.read()


def test_names_of_caches_suit_any_file_system(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / ("猫" * 80), ("",))  # 240 bytes, nearly all that a name may have
    for number in range(11):
        (root / "ant" / f"bad{number}.png").write_bytes(b"x")
    assert "and 1 more; all are in" in message(root)
    ImageFolder(str(root), on_error="skip").class_counts  # noqa: B018
    assert all(path.name.isascii() for path in cache.iterdir())


def test_the_folder_may_be_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(make_folder(tmp_path / "data", ("",)))
    assert len(ImageFolder(".").split("train")[1]) == 20


def test_sixteen_bits_of_a_small_range_are_seen_like_eight(tmp_path: Path) -> None:
    for name, top in (("few", 255), ("camera", 3000), ("floats", 1)):
        root = tmp_path / name
        for label in ("ant", "bee"):
            (root / label).mkdir(parents=True)
            for number in range(10):
                image = deep_levels(top, number + 100 * (label == "bee"))
                if name == "floats":
                    image = Image.fromarray(
                        np.asarray(deep_levels(255, number + 100 * (label == "bee"))) / np.float32(255)
                    )
                image.save(root / label / f"{number}.tiff")
    few, camera, floats = (ImageFolder(str(tmp_path / name)) for name in ("few", "camera", "floats"))
    assert [few.levels, camera.levels, floats.levels] == [255, 4095, 1]
    assert "scaled from 0..4095 to 0..255" in "".join(notes(tmp_path / "camera"))
    assert floats.split("train")[0].sub(few.split("train")[0]).max() <= 1
    with Image.open(tmp_path / "camera" / "ant" / "0.tiff") as first:
        assert (camera.split("train")[0][0, 0].numpy() == np.asarray(first) // 16).all()
    for path in (tmp_path / "floats").rglob("*.tiff"):
        with Image.open(path) as image:
            Image.fromarray(np.asarray(image) / np.float32(100)).save(path)
    assert "has gray levels from 0 to 0.01, which is another range than 0 to 1" in message(tmp_path / "floats")
    noise(8, 5).save(tmp_path / "camera" / "ant" / "eight_bits.png")
    deep_levels(60_000, 77).save(tmp_path / "camera" / "ant" / "brighter.png")
    assert ImageFolder(str(tmp_path / "camera")).levels == 65535
    run = ImageFolder(str(tmp_path / "camera"), on_error="skip")
    run.known_parts = camera.parts()  # a run keeps its levels
    with pytest.warns(DataNote, match="brighter.png: has gray levels from 0 to 60000"):
        assert run.split("test")
    assert run.levels == 4095
    assert run.image_shape == (1, 8, 8)


# --- what is not used, and said ---------------------------------------------------------------------------------------


def notes(root: Path, **options: Any) -> list[str]:
    """What is said of a folder, without its name; nobody else may warn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ImageFolder(str(root), **options).prepare_data()
    assert {warning.category for warning in caught} <= {DataNote}
    return [str(warning.message).replace(f"{root}: ", "").replace(f"{root}/", "") for warning in caught]


def test_files_are_told_by_their_content_and_what_is_left_is_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    for number, (name, kind) in enumerate([("a.jfif", "JPEG"), ("b.ppm", "PPM"), ("c", "PNG"), ("d.avif", "AVIF")]):
        noise(32, 500 + number).save(root / "ant" / name, kind)
    noise(8, 600).save(root / "ant" / "IMG.2024.001", "WEBP")
    for number in range(30):
        (root / "ant" / f"{number}.heic").write_bytes(b"x")
        (root / "bee" / f"{number}.TXT").write_bytes(b"x")
    (root / "bee" / "Makefile").write_text("all:")
    (root / "bee" / ".hidden.png").write_bytes(b"x")
    (root / ".git").mkdir()
    (root / "labels.csv").write_text("mine")
    noise(seed=700).save(root / "loose.png")
    (root / "ant" / "inner").mkdir()
    noise(seed=77).save(root / "ant" / "inner" / "DEEP.PNG")
    assert notes(root) == [
        "1 images in no folder of a class are not used: .png 1",
        "62 other files not looked at: .csv 1, .heic 30, .txt 30, without ending 1",
    ]
    data = ImageFolder(str(root))
    assert data.class_names == ["ant", "bee"]
    assert len(data.split("train")[1]) == 26
    for number in range(10):
        (root / "bee" / f"one.{number}x").write_bytes(b"x")
    assert ".heic 30, .txt 30" in notes(root)[1]  # and not only those that come before them by name


def test_folders_of_other_programs_are_no_classes(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    for folder in ("@eaDir", "ant/@eaDir", "ant/@eaDir/@eaDir", "__MACOSX", "lost+found", "bee/.ipynb_checkpoints"):
        (root / folder).mkdir()
        noise(seed=1).save(root / folder / "00.png")
    (root / "ant" / "Thumbs.db").write_bytes(b"x")
    said = "@eaDir 2, Thumbs.db 1, __MACOSX 1, lost+found 1"
    assert notes(root) == [f"6 files and folders of other programs left out: .ipynb_checkpoints 1, {said}"]
    assert len(ImageFolder(str(root)).split("train")[1]) == 20


def test_folders_beside_train_are_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("train",))
    make_folder(root / "more", ("",))
    (root / "notes").mkdir()
    (root / "test").mkdir()
    noise(seed=5).save(root / "test" / "of_no_class.png")
    assert notes(root) == [
        "test has no images in folders of classes: the part is cut from train",
        "1 images in no folder of a class are not used: .png 1",
        "20 images in folders beside train are not used: more 20, notes 0",
    ]


@pytest.mark.posix
def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    make_folder(tmp_path / "elsewhere", ("more",), count=6)
    noise(seed=800).save(tmp_path / "single.png")
    (root / "ant" / "single.png").symlink_to(tmp_path / "single.png")
    for name in ("once", "twice"):
        (root / "ant" / name).symlink_to(tmp_path / "elsewhere" / "more" / "ant", target_is_directory=True)
    for place, target in (
        ("ant/up", root),
        ("ant/self", root / "ant"),
        ("ant/once/up", root),
        ("ant/once/top", tmp_path),
    ):
        (root / place).symlink_to(target, target_is_directory=True)
    (root / "bee").rename(tmp_path / "bees")
    (root / "bee").symlink_to(tmp_path / "bees", target_is_directory=True)
    assert len(ImageFolder(str(root)).split("train")[1]) == 27
    (root / "around").symlink_to(root, target_is_directory=True)
    assert "is a link to a folder that it lies in" in message(root)
    (root / "around").unlink()
    (root / "around").symlink_to(root / "around", target_is_directory=True)  # a link to itself is no folder
    assert ImageFolder(str(root)).class_names == ["ant", "bee"]


def test_identical_images_of_two_classes_and_of_two_parts_are_named(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "data")
    for number in range(12):
        with Image.open(root / "train" / "ant" / "03.png") as image:
            image.putpixel((0, 0), (number, 0, 0))
            image.save(root / "train" / "ant" / f"x{number:02}.bmp")
            image.save(root / "test" / "ant" / f"x{number:02}.png")
            image.save(root / "test" / "ant" / "same.png") if number == 3 else None
    with Image.open(root / "test" / "bee" / "03.png") as image:
        image.save(root / "test" / "ant" / "bee.bmp")
    classes, parts = notes(root, val_fraction=0.05)
    assert classes.splitlines()[0] == "1 images lie in two classes, the same at 8 x 8 pixels: a label may be wrong"
    assert classes.splitlines()[1:] == ["  test test/ant/bee.bmp = test test/bee/03.png"]
    assert parts.startswith("12 images lie in two parts")
    assert "x03.bmp = test test/ant/same.png = test test/ant/x03.png" in parts
    assert len(parts.splitlines()) == 12
    (complete,) = cache.glob("*.txt")
    assert parts.endswith(f"... and 2 more; all are in {complete}")
    assert len(complete.read_text(encoding="utf-8").splitlines()) == 12


# --- what is wrong with a folder --------------------------------------------------------------------------------------


def test_messages_about_the_layout(tmp_path: Path) -> None:
    assert "is not a folder" in message(tmp_path / "nowhere")
    root = make_folder(tmp_path / "data")
    (root / "train" / "cow").mkdir()
    assert "without images: cow" in message(root)
    (root / "test" / "dog").mkdir()
    assert "train lacks: dog" in message(root)
    (root / "train").rename(root / "old")
    assert "no train" in message(root)
    root = make_folder(tmp_path / "single" / "inner", ("",)).parent
    assert f"only one class, inner; perhaps {root / 'inner'} is meant" in message(root)
    (tmp_path / "none").mkdir()
    noise().save(tmp_path / "none" / "a.png")
    assert "no folders of classes" in message(tmp_path / "none")


@pytest.mark.parametrize(
    "names", [("train", "valid"), ("Train", "Test"), ("training", "val"), ("training_set", "test_set")]
)
def test_parts_of_another_name_are_not_passed_over(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert "rename it to train, val or test" in message(make_folder(tmp_path / "data", names))


@pytest.mark.parametrize("name", ["train", "test", "val", "valid", "validation", "training"])
def test_a_class_may_be_called_like_a_part(tmp_path: Path, name: str) -> None:
    root = make_folder(tmp_path / "data", ("",))
    (root / "bee").rename(root / name)
    assert "a class, put all classes into a folder train: train/CLASS/IMAGE" in message(root)
    root.rename(tmp_path / "train")
    root.mkdir()
    (tmp_path / "train").rename(root / "train")
    assert ImageFolder(str(root)).class_names == sorted(["ant", name])


@pytest.mark.parametrize("part", ["train", "test", "Validation", "test_set"])
def test_parts_below_the_classes_are_refused(tmp_path: Path, part: str) -> None:
    root = make_folder(tmp_path / "data", ("",))
    (root / "bee" / part / "more").mkdir(parents=True)
    ImageFolder(str(root)).prepare_data()  # it is empty
    noise(seed=5).save(root / "bee" / part / "more" / "image.png")
    assert f"has a folder {part}: parts come first, {part}/bee and not bee/{part}" in message(root)


def test_parts_deep_in_a_class_are_refused_if_there_are_two(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    for part in ("train", "test"):
        (root / "bee" / "2024" / part).mkdir(parents=True)
        assert len(ImageFolder(str(root)).split("train")[1]) >= 20  # a class may have a folder about trains
        noise(seed=5 + len(part)).save(root / "bee" / "2024" / part / f"{part}.png")
    assert f"{root / 'bee' / '2024'} has a folder test: parts come first" in message(root)


def test_one_name_in_two_spellings_is_one_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("train", "val"))
    for part, form in (("train", "NFC"), ("val", "NFD")):
        (root / part / "bee").rename(root / part / unicodedata.normalize(form, "café"))  # type: ignore[arg-type]
    data = ImageFolder(str(root))
    assert data.class_names == ["ant", "café"]
    assert len(data.split("val")[2]) == 20


def test_classes_have_the_same_numbers_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "data", ("",))
    (root / "bee").rename(root / "Bee")
    monkeypatch.setattr(pathlib.PurePosixPath, "__lt__", lambda one, other: str(one).lower() < str(other).lower())
    assert ImageFolder(str(root)).class_names == ["Bee", "ant"]


def test_a_thousand_classes(tmp_path: Path) -> None:
    for label in range(1000):
        (tmp_path / "data" / f"class {label}").mkdir(parents=True)
        for number in range(3):
            noise(2, 3 * label + number).save(tmp_path / "data" / f"class {label}" / f"{number}.png")
    data = ImageFolder(str(tmp_path / "data"), image_size=2)
    for part in ("train", "val", "test"):
        assert data.split(part)[1][data.split(part)[2]].bincount().tolist() == [1] * 1000


def test_too_few_images(tmp_path: Path) -> None:
    assert "too few images" in message(make_folder(tmp_path / "data", ("",), count=1))
    root = make_folder(tmp_path / "more", ("",))
    for number in range(2, 10):
        (root / "ant" / f"{number:02}.png").unlink()
    assert notes(root) == ["the val part has no image of ant"]


@pytest.mark.parametrize(
    "wrong", [{"image_size": 0}, {"channels": 2}, {"test_fraction": 1.0}, {"on_error": "ignore"}, {"batch_size": 0}]
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(wrong))):
        ImageFolder("anywhere", **wrong)


# --- broken and hostile images ----------------------------------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a giant image."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.posix
def test_unreadable_images_are_listed_then_stop_or_are_left_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    bad = root / "train" / "ant"
    noise(64).save(tmp_path / "whole.jpg")
    (bad / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:500])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.png").write_text("not an image")
    (bad / "bomb.png").write_bytes(png_claiming(50_000, 50_000))
    (bad / "smaller_bomb.png").write_bytes(png_claiming(20_000, 20_000))
    (bad / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    (bad / "circle.png").symlink_to(bad / "circle.png")
    (bad / "broken.png").symlink_to(bad / "nowhere.png")
    reasons = {
        "cut.jpg": "runcated",
        "empty.jpg": "empty",
        "text.png": "not an image",
        "bomb.png": "decompression bomb",
        "smaller_bomb.png": "decompression bomb",
        "program.png": "not an image",
        "circle.png": "symbolic links",
        "broken.png": "No such file",
    }
    text = message(root)
    assert "8 of 48 images" in text
    assert "--data.on_error skip" in text
    for name, reason in reasons.items():
        (line,) = [line for line in text.splitlines() if f"/{name}: " in line]
        assert reason in line
    (said,) = notes(root, on_error="skip")
    assert "8 of 48 images" in said
    skipping = ImageFolder(str(root), on_error="skip")
    assert skipping.class_counts.sum() + len(skipping.split("val")[2]) == 20
    assert "8 of 48 images" in message(root)  # a cache made with skip does not silence stop


def test_a_part_of_unreadable_images_says_so(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.warns(DataNote, match="20 of 40"):
        assert "too few images for a test part; none can be read" in message(root, on_error="skip")


def test_odd_shapes_are_images_too(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "dot.png")
    assert (prepare_file(tmp_path / "dot.png", 32, 3) == np.array(RED)[:, None, None]).all()
    Image.new("RGB", (20_000, 10), BLUE).save(tmp_path / "strip.png")
    assert (prepare_file(tmp_path / "strip.png", 224, 3) == np.array(BLUE)[:, None, None]).all()
    assert prepare_file(tmp_path / "strip.png", 1, 3).shape == (3, 1, 1)
    # Scaled before it is cropped, this one would be 600,000,000 wide, more than Pillow can hold on any machine.
    Image.new("RGB", (1_000_000, 1), BLUE).save(tmp_path / "line.png")
    assert (prepare_file(tmp_path / "line.png", 600, 3) == np.array(BLUE)[:, None, None]).all()


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "data")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if os.fspath(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    assert "bee cannot be looked into: Permission denied" in message(root)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    odd = os.path.join(os.fsencode(root), b"caf\xe9")  # noqa: PTH118
    try:
        os.rename(root / "ant", odd)  # noqa: PTH104
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    noise(seed=55).save(os.fsdecode(os.path.join(odd, b"\xff.png")))  # noqa: PTH118
    (Path(os.fsdecode(odd)) / os.fsdecode(b"\xfe.png")).write_text("no image")
    assert "caf\\xe9/\\xfe.png: not an image" in message(root)
    data = ImageFolder(str(root), on_error="skip")
    with pytest.warns(DataNote, match="left out"):
        data.prepare_data()
    assert data.class_names == ["bee", "caf\\xe9"]
    assert len(data.split("train")[1]) == 22


@pytest.mark.posix
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_pipes_are_not_read(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    for name in ("pipe", "pipe.png"):
        os.mkfifo(root / "ant" / name)
    assert "pipe.png: not a file" in message(root)


def test_a_full_or_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "data")
    assert "choose a smaller --data.image_size" in message(root, image_size=200_000)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "file"))
    assert "LIT_NN_CACHE" in message(root)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIT_NN_CACHE")

    def nobody(path: str) -> str:
        return path

    monkeypatch.setattr(os.path, "expanduser", nobody)
    assert cache_folder().is_absolute()


# --- several processes ------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, threading, time
from data_modules.image_folder import ImageFolder
from data_modules.images import cache
prepare, one_at_a_time = cache.prepare_file, threading.Lock()  # however many cores there are
def slow(*arguments):
    with one_at_a_time:
        time.sleep(0.02)
        print("decoding", flush=True)
    return prepare(*arguments)
cache.prepare_file = slow
print(ImageFolder(sys.argv[1], 8, 3).split("train")[0].sum().item(), flush=True)
"""


def start(root: Path) -> subprocess.Popen[str]:
    words, place = [sys.executable, "-c", PROGRAM, str(root)], Path(__file__).parents[1]
    return subprocess.Popen(words, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


@pytest.mark.parametrize("done", [0.0, 0.3])
def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path: Path, cache: Path, done: float) -> None:
    root = make_folder(tmp_path / "data", count=30)  # 120 images: over two seconds
    process = start(root)
    assert process.stdout is not None
    assert process.stdout.readline() == "decoding\n"
    time.sleep(done)
    process.kill()
    process.wait()
    assert not list(cache.glob("*.index.npz"))
    images, _, _ = ImageFolder(str(root), 8, 3).split("train")
    with Image.open(root / "test" / "bee" / "29.png") as last:
        assert images[-1].equal(torch.from_numpy(np.asarray(last).transpose(2, 0, 1).copy()))
    assert not list(cache.glob("*.part*"))


def test_two_processes_build_once(tmp_path: Path) -> None:
    processes = [start(make_folder(tmp_path / "data", count=30)), start(tmp_path / "data")]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sum(output.count("decoding") for output in outputs) == 120
    assert outputs[0][-1] == outputs[1][-1]
