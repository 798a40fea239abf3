"""Folders of images of every kind, broken and hostile ones among them, become a data set or one clear message."""

import os
import re
import subprocess
import sys
import time
import unicodedata
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Patch, images_in, noise, png_claiming
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin
from torch import Tensor

from data_modules import DataError, DataNote
from data_modules.base import SPLITS
from data_modules.image_folder import ImageFolder
from data_modules.images import cache as image_cache
from data_modules.images.decode import SUFFIXES, ImageError, read_image, side_and_gray

RED, BLUE, WHITE = (220, 40, 30), (30, 50, 210), (255, 255, 255)


def prepare_file(path: Path, size: int, channels: int = 3, levels: int = 65535) -> NDArray[np.uint8]:
    return image_cache.prepare_file(path, (size, size), channels, levels, "crop")


def make_folder(root: Path, *parts: str, count: int = 10, channels: int = 3) -> Path:
    """Two classes of different images, in each of some parts."""
    places = [f"{part}/{name}".lstrip("/") for part in parts or ("",) for name in ("ant", "bee")]
    return images_in(root, *places, count=count, channels=channels)


def pixels_of(path: Path) -> Tensor:
    """The image of a file, uint8 (C, H, W)."""
    with Image.open(path) as image:
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def message(root: Path, **options: Any) -> str:
    with pytest.raises(DataError) as error:
        ImageFolder(str(root), **options).prepare_data()
    return str(error.value)


def notes(root: Path, **options: Any) -> list[str]:
    """What is said of a folder, without its name; nobody else may warn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ImageFolder(str(root), **options).prepare_data()
    assert {warning.category for warning in caught} <= {DataNote}
    return [str(warning.message).replace(f"{root}: ", "").replace(f"{root}/", "") for warning in caught]


# --- one image ------------------------------------------------------------------------------------------------------


def columns(mode: str, *colours: Any, width: int = 8, height: int = 8) -> Image.Image:
    """An image in which each colour takes as many columns."""
    image = Image.new(mode, (width, height))
    for place, colour in enumerate(colours):
        image.paste(colour, (width * place // len(colours), 0, width, height))
    return image


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK", "L", "1"])
def test_every_format_and_mode(tmp_path: Path, suffix: str, mode: str) -> None:
    colours = columns("RGB", RED, BLUE, width=16)
    image = colours.convert(mode)
    try:
        image.save(path := tmp_path / f"image{suffix}")
    except (OSError, ValueError):
        pytest.skip(f"{suffix} cannot hold {mode}")
    pixels = prepare_file(path, 8)  # the middle: columns 4 to 12
    assert (pixels.shape, pixels.dtype) == ((3, 8, 8), np.uint8)
    assert prepare_file(path, 8, 1).shape == (1, 8, 8)
    shown = colours if mode == "CMYK" else image.convert("RGB")
    expected = np.asarray(shown).transpose(2, 0, 1)[:, :, 4:12].astype(int)
    lossy = suffix in (".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif") or (suffix == ".gif" and mode != "L")
    if mode != "1":
        assert np.abs(pixels - expected)[:, :, [0, 1, 6, 7]].max() <= (60 if lossy else 0)


def test_transparent_becomes_white(tmp_path: Path) -> None:
    clear = (0, 0, 0, 0)
    columns("RGBA", (*RED, 255), clear, clear, (0, 0, 0, 128)).save(tmp_path / "alpha.png")
    palette = columns("P", 0, 1)
    palette.putpalette([*RED, 9, 9, 9])
    palette.save(tmp_path / "palette.gif", transparency=1)
    columns("LA", (0, 0)).save(tmp_path / "gray.png")
    shown: dict[str, list[Any]] = {"alpha.png": [RED, WHITE, WHITE, [127] * 3], "palette.gif": [RED, WHITE]}
    for name, expected in {**shown, "gray.png": [WHITE]}.items():
        row = prepare_file(tmp_path / name, 8)[:, 0]  # (3, 8)
        assert (row == np.repeat(expected, 8 // len(expected), 0).T).all()
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(levels).save(tmp_path / "deep.png", transparency=2048)
    Image.fromarray(levels).save(tmp_path / "negative.tiff", tiffinfo={262: 0})  # zero is white
    assert (prepare_file(tmp_path / "deep.png", 8, 1)[0] == np.where(levels == 2048, 255, levels // 256)).all()
    assert (prepare_file(tmp_path / "negative.tiff", 8, 1)[0] == 255 - levels // 256).all()


COMMENT = PngImagePlugin.PngInfo()
COMMENT.add_text("workflow", "x" * 5_000_000, zip=True)
BESIDE: dict[str, tuple[str, dict[str, Any]]] = {  # what does not change what is seen
    "animation": (".gif .png .tiff .webp", {"save_all": True, "append_images": [noise(1, 32, 32)]}),
    "broken EXIF": (".jpg .png .webp", {"exif": b"Exif\0\0this is no EXIF"}),
    "long comment": (".png", {"pnginfo": COMMENT}),
}


@pytest.mark.parametrize(("kind", "suffix"), [(kind, suffix) for kind in BESIDE for suffix in BESIDE[kind][0].split()])
def test_what_a_file_holds_beside_its_first_image_does_not_count(tmp_path: Path, kind: str, suffix: str) -> None:
    image = columns("RGB", RED, BLUE, width=32, height=32)
    image.save(tmp_path / f"plain{suffix}")
    image.save(tmp_path / f"more{suffix}", **BESIDE[kind][1])
    plain, more = (prepare_file(tmp_path / f"{name}{suffix}", 32).astype(int) for name in ("plain", "more"))
    assert np.abs(plain - more).max() < (30 if kind == "animation" else 1)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp", "_with_an_odd_tag.jpg"])
def test_images_are_turned_upright(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    if suffix.endswith("odd_tag.jpg"):
        exif[0x010F] = "maker"
    odd = exif.tobytes().replace(b"\x01\x0f\0\x02", b"\x01\x25\0\x02")  # the text under a tag that holds a number
    columns("RGB", RED, BLUE, width=32, height=32).save(tmp_path / f"turned{suffix}", exif=odd)
    pixels = prepare_file(tmp_path / f"turned{suffix}", 32).astype(int)
    assert np.abs(pixels[:, 4, 16] - RED).max() < 30  # left is now at the top
    assert np.abs(pixels[:, 28, 16] - BLUE).max() < 30


@pytest.mark.parametrize(("suffix", "scale"), [(".png", 1), (".jpg", 10)])  # a large JPEG is decoded small
def test_shorter_side_is_scaled_and_the_centre_cut(tmp_path: Path, suffix: str, scale: int) -> None:
    ramp = np.tile(np.linspace(0, 255, 300 * scale).astype(np.uint8), (100 * scale, 1))  # darker on the left
    Image.fromarray(ramp).save(tmp_path / f"ramp{suffix}", quality=95)
    row = prepare_file(tmp_path / f"ramp{suffix}", 10, 1)[0, 5].astype(int)
    assert np.abs(row - np.linspace(89, 166, 10)).max() < 3  # the middle third


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


@pytest.mark.parametrize(
    ("image", "levels", "reason"),
    [
        (deep_levels(5000), 4095, "from 0 to 5000, which is another range than 0 to 4095"),
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), 65535, "from 0 to 0.5"),
        (Image.fromarray(np.full((8, 8), 0.01, np.float32)), 0, "from 0 to 0.01, which is another range than 0 to 1"),
        (Image.fromarray(np.full((8, 8), np.nan, np.float32)), 1, "undefined"),
        (Image.fromarray(np.full((8, 8), -5, np.int32)), 65535, "negative"),
    ],
)
def test_other_levels_are_refused_and_not_shown_black_or_white(image: Image.Image, levels: int, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        read_image(image, 1, levels)


def test_large_photographs_are_read_and_the_limit_can_be_raised(tmp_path: Path, monkeypatch: Patch) -> None:
    Image.new("L", (14_000, 14_000), 90).save(tmp_path / "phone.jpg")  # 196 megapixels
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (prepare_file(tmp_path / "phone.jpg", 8, 1) == 90).all()
        monkeypatch.setenv("LIT_NN_MAX_PIXELS", "1e8")
        with pytest.raises(ImageError, match=r"196,000,000 pixels, more than 100,000,000; .*LIT_NN_MAX_PIXELS"):
            prepare_file(tmp_path / "phone.jpg", 8, 1)


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_parts_from_folders(tmp_path: Path) -> None:
    data = ImageFolder(str(make_folder(tmp_path / "data", *SPLITS)))
    assert data.class_names == ["ant", "bee"]
    assert data.image_shape == (3, 8, 8)
    for split in SPLITS:
        images, labels, indices = data.split(split)
        files = [tmp_path / "data" / split / name / f"{n:02}.png" for name in data.class_names for n in range(10)]
        for index, file in zip(indices, files, strict=True):
            assert images[index].equal(pixels_of(file))
            assert labels[index] == data.class_names.index(file.parent.name)
    pixels = data.split("train")[0][data.split("train")[2]].double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_gray_or_colour_and_size_come_from_the_images_unless_told(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", "train", "test", channels=1)
    assert ImageFolder(str(root)).image_shape == (1, 8, 8)
    assert ImageFolder(str(root), channels=3, image_size=12).image_shape == (3, 12, 12)
    for number, suffix in enumerate([".jpg", ".png", ".webp", ".gif", ".bmp"]):
        noise(500 + number, channels=1).convert("RGB").save(root / "train" / "ant" / f"gray{suffix}")
    assert ImageFolder(str(root)).image_shape == (1, 8, 8)
    noise().save(root / "train" / "ant" / "colour.png")
    assert ImageFolder(str(root)).image_shape == (3, 8, 8)
    for path in root.rglob("*.png"):
        noise(0, 300, 300).save(path)
    assert ImageFolder(str(root)).image_shape == (3, 224, 224)


def test_the_cache_is_reused_and_made_again_when_an_image_changes(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "data", "train", "test")
    image, states = root / "train" / "ant" / "00.png", list[tuple[str, int]]()

    def build() -> None:
        assert ImageFolder(str(root)).split("train")[0][0].equal(pixels_of(image))
        (images,) = cache.glob("*.npy")
        states.append((images.name, images.stat().st_mtime_ns))

    build()
    build()
    assert states[0] == states[1]
    status = image.stat()
    noise(seed=99).save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns))  # as some copying programs do
    build()
    noise(seed=98).save(root / "train" / "ant" / "new.png")
    build()
    assert len({name for name, _ in states}) == 3  # a new name each time: Windows replaces no mapped file
    (images,) = cache.glob("*.npy")
    images.write_bytes(images.read_bytes()[:-1])  # damaged
    build()
    assert len(set(states)) == 4
    ImageFolder(str(root), image_size=4).prepare_data()
    assert len(list(cache.glob("*.npy"))) == 2


def test_images_are_memory_mapped_from_a_name_that_any_file_system_takes(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / ("猫" * 80))  # 240 bytes, nearly all that a name may have
    for number in range(11):
        (root / "ant" / f"bad{number}.png").write_bytes(b"x")
    assert "and 1 more; all are in" in message(root)
    images = ImageFolder(str(root), on_error="skip").split("train")[0]
    assert all(path.name.isascii() for path in cache.iterdir())
    assert not images.numpy().flags.owndata
    if Path("/proc/self/maps").exists():
        assert str(cache) in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_sixteen_bits_of_a_small_range_are_seen_like_eight(tmp_path: Path) -> None:
    for name, top in (("few", 255), ("camera", 3000), ("floats", 255)):
        for seed in range(20):
            folder = tmp_path / name / ("ant", "bee")[seed % 2]
            folder.mkdir(parents=True, exist_ok=True)
            image = deep_levels(top, seed)
            image = Image.fromarray(np.asarray(image) / np.float32(255)) if name == "floats" else image
            image.save(folder / f"{seed:02}.tiff")
    few, camera, floats = (ImageFolder(str(tmp_path / name)) for name in ("few", "camera", "floats"))
    assert [few.levels, camera.levels, floats.levels] == [255, 4095, 1]
    assert "scaled from 0..4095 to 0..255" in "".join(notes(tmp_path / "camera"))
    assert floats.split("train")[0].sub(few.split("train")[0]).max() <= 1
    assert (camera.split("train")[0][0, 0].numpy() == np.asarray(deep_levels(3000)) // 16).all()
    noise(5).save(tmp_path / "camera" / "ant" / "eight_bits.png")
    deep_levels(60_000, 77).save(tmp_path / "camera" / "ant" / "brighter.png")
    assert ImageFolder(str(tmp_path / "camera")).levels == 65535
    run = ImageFolder(str(tmp_path / "camera"), on_error="skip")
    run.known_parts = camera.parts()  # a run keeps its levels
    with pytest.warns(DataNote, match=r"brighter.png: has gray levels from 0 to 60000"):
        assert run.split("test")
    assert (run.levels, run.image_shape) == (4095, (1, 8, 8))


# --- what is not used, and said ---------------------------------------------------------------------------------------


def test_files_are_told_by_their_content_and_what_is_left_is_counted(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", "train")
    train = root / "train"
    for number, (name, kind) in enumerate([("a.jfif", "JPEG"), ("b.ppm", "PPM"), ("c", "PNG"), ("d.avif", "AVIF")]):
        noise(500 + number, 32, 32).save(train / "ant" / name, kind)
    noise(600).save(train / "ant" / "IMG.2024.001", "WEBP")
    for number in range(30):
        (train / "ant" / f"{number}.heic").write_bytes(b"x")
        (train / "bee" / f"{number}.TXT").write_bytes(b"x")
    for name in ("train/bee/Makefile", "train/bee/.hidden.png", "labels.csv", "train/ant/Thumbs.db"):
        (root / name).write_bytes(b"x")
    helpers = ("@eaDir", "train/ant/@eaDir", "train/ant/@eaDir/@eaDir", "__MACOSX", "lost+found", "more/__pycache__")
    images_in(root / "more", "cow")
    for number, folder in enumerate([".git", "train/ant/inner", *helpers, "test"]):
        (root / folder).mkdir()
        noise(700 + number).save(root / folder / "DEEP.PNG")
    noise(800).save(root / "loose.png")
    assert notes(root) == [
        "test has no images in folders of classes: the part is cut from train",
        "12 images in no folder of a class are not used: loose 1, more 10, test 1",
        "62 other files not looked at: .csv 1, .heic 30, .txt 30, without ending 1",
        "6 files and folders of other programs left out: @eaDir 2, Thumbs.db 1, __MACOSX 1, "
        "__pycache__ 1, lost+found 1",
    ]
    data = ImageFolder(str(root))
    assert data.class_names == ["ant", "bee"]
    assert len(data.split("train")[1]) == 26
    for number in range(10):
        (train / "bee" / f"one.{number}x").write_bytes(b"x")
    assert ".heic 30, .txt 30" in notes(root)[2]  # and not only those that come before them by name


@pytest.mark.posix
def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    images_in(tmp_path / "elsewhere", "ant", "bee", "more", count=6)
    noise(seed=800).save(tmp_path / "single.png")
    (root / "ant" / "single.png").symlink_to(tmp_path / "single.png")
    for name in ("once", "twice"):
        (root / "ant" / name).symlink_to(tmp_path / "elsewhere" / "more", target_is_directory=True)
    for place, target in {"up": root, "self": root / "ant", "once/up": root, "once/top": tmp_path}.items():
        (root / "ant" / place).symlink_to(target, target_is_directory=True)
    (root / "bee").rename(tmp_path / "bees")
    (root / "bee").symlink_to(tmp_path / "bees", target_is_directory=True)
    assert len(ImageFolder(str(root)).split("train")[1]) == 27
    for name, target in {"around": root, "itself": root / "itself"}.items():
        (root / name).symlink_to(target, target_is_directory=True)
    assert ImageFolder(str(root)).class_names == ["ant", "bee"]


@pytest.mark.posix
def test_what_is_linked_into_several_classes_or_parts_is_in_each(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", "train", "test")
    (root / "train" / "bee" / "night").mkdir()
    for number in range(5):
        noise(seed=900 + number).save(root / "train" / "bee" / "night" / f"{number}.png")
    links = {
        "favourites": "train/bee/night",
        "train/ant/bees": "train/bee/night",
        "val": "test",
        "train/bee/up": "train",
    }
    for place, target in links.items():
        (root / place).symlink_to(root / target, target_is_directory=True)
    listing = ImageFolder(str(root)).list_images()
    assert Counter(zip(listing.labels, listing.splits, strict=True)) == {
        **{(0, "train"): 15, (1, "train"): 15},
        **{(label, split): 10 for label in (0, 1) for split in ("val", "test")},
    }


def test_identical_images_of_two_classes_and_of_two_parts_are_named(tmp_path: Path, cache: Path) -> None:
    root = make_folder(tmp_path / "data", "train", "test")
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


LAYOUTS = {  # by the message: folders of images; one whose name ends in "/" is empty
    "is not a folder": [""],
    "without images: cow": ["train/ant train/bee train/cow/"],
    "train lacks: dog": ["train/ant train/bee test/ant test/dog"],
    "no train": ["old/ant old/bee test/ant"],
    "only one class, inner; perhaps data/inner is meant": ["inner/ant inner/bee"],
    "no folders of classes": ["./"],
    "rename it to train, val or test": ["train/a valid/a", "Train/a Test/a", "training/a val/a", "test_set/a"],
    "a class, put all classes into a folder train: train/CLASS/IMAGE": [
        *("ant train", "ant test", "ant val", "ant valid", "ant validation", "ant training")
    ],
    "has a folder test: parts come first, test/bee and not bee/test": ["ant bee bee/test/more"],
    "parts come first": ["ant bee bee/train", "ant bee bee/Validation", "ant bee bee/2024/train bee/2024/test_set"],
    # A class may be called like a part, or be about trains.
    "": ["train/ant train/val", "train/ant train/training", "ant bee bee/train/", "ant bee bee/2024/train"],
}


@pytest.mark.parametrize(("said", "layout"), [(said, layout) for said in LAYOUTS for layout in LAYOUTS[said]])
def test_messages_about_the_layout(said: str, layout: str, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    images_in(Path("data"), *(place for place in layout.split() if not place.endswith("/")))
    for place in layout.split():
        Path("data", place).mkdir(parents=True, exist_ok=True)
    if said:
        assert said in message(Path("data"))
    else:
        assert len(ImageFolder("data").class_names) == 2


def test_one_name_in_two_spellings_is_one_class(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", "train", "val")
    for part, form in (("train", "NFC"), ("val", "NFD")):
        (root / part / "bee").rename(root / part / unicodedata.normalize(form, "café"))  # type: ignore[arg-type]
    data = ImageFolder(str(root))
    assert data.class_names == ["ant", "café"]
    assert len(data.split("val")[2]) == 20


def test_too_few_images(tmp_path: Path) -> None:
    assert "too few images" in message(make_folder(tmp_path / "data", count=1))
    root = make_folder(tmp_path / "broken", "train", "test")
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.warns(DataNote, match="20 of 40"):
        assert "too few images for a test part; none can be read" in message(root, on_error="skip")
    root = make_folder(tmp_path / "more")
    for number in range(2, 10):
        (root / "ant" / f"{number:02}.png").unlink()
    assert notes(root) == ["the val part has no image of ant"]


# --- broken and hostile images ----------------------------------------------------------------------------------------


@pytest.mark.posix
def test_unreadable_images_are_listed_then_stop_or_are_left_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", "train", "test")
    bad = root / "train" / "ant"
    noise(0, 64, 64).save(tmp_path / "whole.jpg")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    contents = {
        "cut.jpg": ((tmp_path / "whole.jpg").read_bytes()[:500], "runcated"),
        "empty.jpg": (b"", "empty"),
        "text.png": (b"not an image", "not an image"),
        "bomb.png": (png_claiming(50_000, 50_000), "decompression bomb"),
        "smaller_bomb.png": (png_claiming(20_000, 20_000), "decompression bomb"),
        "program.png": (postscript, "not an image"),
    }
    for name, (content, _) in contents.items():
        (bad / name).write_bytes(content)
    (bad / "circle.png").symlink_to(bad / "circle.png")
    (bad / "broken.png").symlink_to(bad / "nowhere.png")
    for name in ("pipe", "pipe.png"):
        os.mkfifo(bad / name)
    reasons = {name: reason for name, (_, reason) in contents.items()}
    reasons |= {"circle.png": "symbolic links", "broken.png": "No such file", "pipe.png": "not a file"}
    text = message(root)
    assert "9 of 49 images" in text
    assert "--data.on_error skip" in text
    for name, reason in reasons.items():
        assert re.search(rf"/{name}: .*{reason}", text)
    _, said = notes(root, on_error="skip")  # and that "pipe" was not looked at
    assert "9 of 49 images" in said
    skipping = ImageFolder(str(root), on_error="skip")
    assert skipping.class_counts.sum() + len(skipping.split("val")[2]) == 20
    assert "9 of 49 images" in message(root)  # a cache made with skip does not silence stop


def test_odd_shapes_are_images_too(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "dot.png")
    assert (prepare_file(tmp_path / "dot.png", 32, 3) == np.array(RED)[:, None, None]).all()
    Image.new("RGB", (20_000, 10), BLUE).save(tmp_path / "strip.png")
    assert (prepare_file(tmp_path / "strip.png", 224, 3) == np.array(BLUE)[:, None, None]).all()
    assert prepare_file(tmp_path / "strip.png", 1, 3).shape == (3, 1, 1)
    # Scaled before it is cropped, this one would be 600,000,000 wide, more than Pillow can hold on any machine.
    Image.new("RGB", (1_000_000, 1), BLUE).save(tmp_path / "line.png")
    assert (prepare_file(tmp_path / "line.png", 600, 3) == np.array(BLUE)[:, None, None]).all()


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: Patch) -> None:
    root = make_folder(tmp_path / "data", "train", "test")
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if os.fspath(path).endswith("bee"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        assert "bee cannot be looked into: Permission denied" in message(root)


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
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


def test_a_full_or_read_only_cache(tmp_path: Path, monkeypatch: Patch) -> None:
    root = make_folder(tmp_path / "data", "train", "test")
    assert "choose a smaller --data.image_size" in message(root, image_size=200_000)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "file"))
    assert "LIT_NN_CACHE" in message(root)


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


@pytest.mark.parametrize("done", [0.0, 1.5])  # nothing yet, and some blocks
def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path: Path, cache: Path, done: float) -> None:
    root = make_folder(tmp_path / "data", "train", "test", count=30)  # 120 images: over two seconds
    process = start(root)
    assert process.stdout is not None
    assert process.stdout.readline() == "decoding\n"
    time.sleep(done)
    process.kill()
    process.wait()
    assert not list(cache.glob("*.index.npz"))
    images, _, _ = ImageFolder(str(root), 8, 3).split("train")
    assert images[-1].equal(pixels_of(root / "test" / "bee" / "29.png"))
    assert not list(cache.glob("*.part*"))


def test_two_processes_build_once(tmp_path: Path) -> None:
    processes = [start(make_folder(tmp_path / "data", "train", "test", count=30)), start(tmp_path / "data")]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sum(output.count("decoding") for output in outputs) == 120
    assert outputs[0][-1] == outputs[1][-1]
