"""Folders of pictures of every kind, broken and hostile ones among them, become a data set or one clear message."""

import os
import signal
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from data_modules import picture_cache
from data_modules.base import DataError
from data_modules.image_folder import ImageFolder
from data_modules.pictures import SUFFIXES, PictureError, picture_header, prepare_picture

RED, BLUE = (220, 40, 30), (30, 50, 210)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("LIT_NN_CACHE", str(folder))
    return folder


def noise(size: int = 8, seed: int = 0, channels: int = 3) -> Image.Image:
    levels = np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)
    return Image.fromarray(levels.squeeze())


def make_folder(root: Path, parts: tuple[str, ...] = ("train", "test"), count: int = 10, channels: int = 3) -> Path:
    """Two classes of different pictures in each part; "" stands for the layout without parts."""
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


# --- one picture ------------------------------------------------------------------------------------------------------


def left_right(mode: str = "RGB") -> Image.Image:
    """Left half red, right half blue, 16 x 8."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    return image.convert(mode)


@pytest.mark.parametrize("suffix", sorted(SUFFIXES))
@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA", "CMYK", "L", "1"])
def test_every_format_and_mode(tmp_path: Path, suffix: str, mode: str) -> None:
    path = tmp_path / f"picture{suffix}"
    image = left_right(mode)
    try:
        image.save(path)
    except (OSError, ValueError):
        pytest.skip(f"{suffix} cannot hold {mode}")
    pixels = prepare_picture(path, 8, 3)  # the middle: columns 4 to 12
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == np.uint8
    gray = mode in ("L", "1")
    expected = np.asarray(image.convert("RGB")).transpose(2, 0, 1)[:, :, 4:12].astype(int)
    if mode == "CMYK":
        expected = np.asarray(left_right()).transpose(2, 0, 1)[:, :, 4:12].astype(int)
    lossy = suffix in (".jpg", ".jpeg", ".webp") or (suffix == ".gif" and not gray)
    if mode != "1":
        assert np.abs(pixels - expected)[:, :, [0, 1, 6, 7]].max() <= (60 if lossy else 0)
    assert prepare_picture(path, 8, 1).shape == (1, 8, 8)


def test_sixteen_bits_lose_the_lower_byte(tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    for name in ("deep.png", "deep.tiff"):
        Image.fromarray(levels).save(tmp_path / name)
        assert picture_header(tmp_path / name) == (8, 8, True)
        assert (prepare_picture(tmp_path / name, 8, 1)[0] == levels // 256).all()
        assert (prepare_picture(tmp_path / name, 8, 3) == levels // 256).all()


def tiff(levels: np.ndarray, photometric: int) -> bytes:
    """An uncompressed TIFF of unsigned levels (H, W), or of gray levels and how opaque they are (H, W, 2)."""
    height, width, samples = np.atleast_3d(levels).shape
    bits = 8 * levels.itemsize
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: samples, 278: height}
    tags |= {279: levels.nbytes}
    if samples == 2:
        tags |= {258: bits + (bits << 16), 338: 1}  # two numbers in one field; the levels are multiplied already
    entries = [struct.pack("<HHII", tag, 3, 1 + (tag == 258 and samples == 2), value) for tag, value in tags.items()]
    start = struct.pack("<2sHI", b"II", 42, 8 + levels.nbytes)
    return start + levels.tobytes() + struct.pack("<H", len(tags)) + b"".join(entries) + bytes(4)


def test_sixteen_bits_with_transparency_or_with_zero_for_white(tmp_path: Path) -> None:
    levels = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1024
    Image.fromarray(levels).save(tmp_path / "clear.png", transparency=2048)
    assert (prepare_picture(tmp_path / "clear.png", 8, 1)[0] == np.where(levels == 2048, 255, levels // 256)).all()
    (tmp_path / "negative.tiff").write_bytes(tiff(levels, 0))
    assert (prepare_picture(tmp_path / "negative.tiff", 8, 1)[0] == 255 - levels // 256).all()


@pytest.mark.skipif(int(PIL.__version__.partition(".")[0]) < 13, reason="Pillow 12 does not know such TIFFs")
def test_gray_that_is_multiplied_by_its_transparency(tmp_path: Path) -> None:
    levels = np.full((8, 8, 2), (64, 128), np.uint8)  # half of it white, through which the page is seen
    (tmp_path / "alpha.tiff").write_bytes(tiff(levels, 1))
    for channels in (1, 3):
        assert np.abs(prepare_picture(tmp_path / "alpha.tiff", 8, channels).astype(int) - 191).max() <= 1
    assert picture_header(tmp_path / "alpha.tiff") == (8, 8, True)


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
    pixels = prepare_picture(tmp_path / "alpha.png", 8, 3)
    assert pixels[:, 0, 0].tolist() == list(RED)
    assert pixels[:, 0, 5].tolist() == [255] * 3
    assert pixels[:, 0, 7].tolist() == [127] * 3
    pixels = prepare_picture(tmp_path / "palette.gif", 8, 3)
    assert pixels[:, 0, 0].tolist() == list(RED)
    assert pixels[:, 0, 5].tolist() == [255] * 3
    assert (prepare_picture(tmp_path / "gray.png", 8, 1) == 255).all()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_pictures_are_turned_upright(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    left_right().resize((32, 32)).save(tmp_path / f"turned{suffix}", exif=exif)
    pixels = prepare_picture(tmp_path / f"turned{suffix}", 32, 3).astype(int)
    assert np.abs(pixels[:, 4, 16] - RED).max() < 30  # left is now at the top
    assert np.abs(pixels[:, 28, 16] - BLUE).max() < 30


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
def test_a_picture_whose_exif_is_broken_is_seen(tmp_path: Path, suffix: str) -> None:
    noise(32).save(tmp_path / f"plain{suffix}")
    noise(32).save(tmp_path / f"broken{suffix}", exif=b"Exif\0\0this is no EXIF")
    plain, broken = (prepare_picture(tmp_path / f"{name}{suffix}", 32, 3) for name in ("plain", "broken"))
    assert np.array_equal(plain, broken)


def test_shorter_side_is_scaled_and_the_centre_cut(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 255, 300).astype(np.uint8), (100, 1))  # 100 x 300, darker on the left
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    row = prepare_picture(tmp_path / "ramp.png", 10, 1)[0, 5].astype(int)
    assert np.abs(row - np.linspace(89, 166, 10)).max() < 3  # the middle third


def test_a_large_jpeg_is_decoded_small_and_right(tmp_path: Path) -> None:
    left_right().resize((1600, 800), Image.Resampling.NEAREST).save(tmp_path / "large.jpg", quality=95)
    pixels = prepare_picture(tmp_path / "large.jpg", 16, 3).astype(int)
    assert np.abs(pixels[:, :, :6] - np.array(RED)[:, None, None]).max() < 8
    assert np.abs(pixels[:, :, 10:] - np.array(BLUE)[:, None, None]).max() < 8


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
    again, other = (ImageFolder(str(root), test_fraction=0.2, seed=seed) for seed in (3, 4))
    assert again.split("test")[2].equal(rows)
    assert not other.split("test")[2].equal(rows)


def test_mean_and_std_are_of_the_training_part(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    Image.new("RGB", (8, 8), "white").save(root / "test" / "ant" / "white.png")
    data = ImageFolder(str(root))
    images, _, rows = data.split("train")
    pixels = images[rows].double() / 255
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), abs=1e-6)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), abs=1e-6)


def test_gray_or_colour_and_size_come_from_the_pictures_unless_told(tmp_path: Path) -> None:
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


def test_the_cache_is_reused_and_made_again_when_a_picture_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_folder(tmp_path / "data")
    builds = []
    build = picture_cache._build

    def counted(*arguments: Any) -> None:
        builds.append(arguments)
        build(*arguments)

    monkeypatch.setattr(picture_cache, "_build", counted)

    def first_row() -> torch.Tensor:
        return ImageFolder(str(root)).split("train")[0][0]

    before = first_row()
    assert first_row().equal(before)
    assert len(builds) == 1
    picture = root / "train" / "ant" / "00.png"
    status = picture.stat()
    noise(seed=99).save(picture)
    os.utime(picture, ns=(status.st_atime_ns, status.st_mtime_ns))  # as some copying programs do
    assert not first_row().equal(before)
    assert len(builds) == 2
    noise(seed=98).save(root / "train" / "ant" / "new.png")
    first_row()
    assert len(builds) == 3
    (images,) = cache.glob("*.npy")
    images.write_bytes(images.read_bytes()[:-1])  # damaged
    first_row()
    assert len(builds) == 4
    assert len(list(cache.glob("*.npy"))) == 1
    ImageFolder(str(root), image_size=4).prepare_data()
    assert len(builds) == 5


def test_images_are_memory_mapped(tmp_path: Path) -> None:
    images, _, _ = ImageFolder(str(make_folder(tmp_path / "data"))).split("train")
    assert not images.numpy().flags.owndata
    with Path("/proc/self/maps").open() if Path("/proc/self/maps").exists() else pytest.skip("no /proc") as maps:
        assert str(tmp_path / "cache") in maps.read()


def test_other_files_hidden_ones_and_inner_folders(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    (root / "notes.txt").write_text("mine")
    (root / "ant" / "Thumbs.db").write_bytes(b"x")
    (root / "ant" / ".hidden.png").write_bytes(b"x")
    (root / ".git").mkdir()
    (root / "ant" / "inner").mkdir()
    noise(seed=77).save(root / "ant" / "inner" / "DEEP.PNG")
    data = ImageFolder(str(root))
    assert data.class_names == ["ant", "bee"]
    assert len(data.split("train")[1]) == 21


# --- what is wrong with a folder --------------------------------------------------------------------------------------


def test_messages_about_the_layout(tmp_path: Path) -> None:
    assert "is not a folder" in message(tmp_path / "nowhere")
    root = make_folder(tmp_path / "data")
    (root / "train" / "cow").mkdir()
    assert "without pictures: cow" in message(root)
    (root / "test" / "dog").mkdir()
    assert "train lacks: dog" in message(root)
    (root / "train").rename(root / "old")
    assert "no train" in message(root)
    (tmp_path / "single" / "ant").mkdir(parents=True)
    assert "only one class, ant" in message(tmp_path / "single")
    (tmp_path / "none").mkdir()
    noise().save(tmp_path / "none" / "a.png")
    assert "no folders of classes" in message(tmp_path / "none")


@pytest.mark.parametrize("names", [("train", "valid"), ("Train", "Test"), ("training", "val")])
def test_parts_of_another_name_are_not_passed_over(tmp_path: Path, names: tuple[str, ...]) -> None:
    root = make_folder(tmp_path / "data", names)
    assert "rename it to train, val or test" in message(root)


def test_an_empty_part_is_reported(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("train",))
    (root / "test").mkdir()
    noise(seed=5).save(root / "test" / "of_no_class.png")
    with pytest.warns(UserWarning, match="test has no pictures in folders of classes"):
        ImageFolder(str(root)).prepare_data()


def test_too_few_pictures(tmp_path: Path) -> None:
    assert "too few pictures" in message(make_folder(tmp_path / "data", ("",), count=1))
    root = make_folder(tmp_path / "more", ("",))
    for number in range(2, 10):
        (root / "ant" / f"{number:02}.png").unlink()
    with pytest.warns(UserWarning, match="the val part has no picture of ant"):
        ImageFolder(str(root)).prepare_data()


def test_the_same_picture_in_two_parts(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    with Image.open(root / "train" / "ant" / "03.png") as image:
        image.save(root / "test" / "ant" / "copy.bmp")
    with pytest.warns(UserWarning, match="train/ant/03.png = test test/ant/copy.bmp"):
        ImageFolder(str(root), val_fraction=0.05).prepare_data()
    (root / "test" / "ant" / "copy.bmp").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(str(root)).prepare_data()


@pytest.mark.parametrize(
    "wrong", [{"image_size": 0}, {"channels": 2}, {"test_fraction": 1.0}, {"on_error": "ignore"}, {"batch_size": 0}]
)
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImageFolder("anywhere", **wrong)


# --- broken and hostile pictures --------------------------------------------------------------------------------------


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a giant picture."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def test_unreadable_pictures_are_listed_then_stop_or_are_left_out(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    bad = root / "train" / "ant"
    whole = tmp_path / "whole.jpg"
    noise(64).save(whole)
    (bad / "cut.jpg").write_bytes(whole.read_bytes()[:500])
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.png").write_text("not a picture")
    (bad / "bomb.png").write_bytes(png_claiming(50_000, 50_000))
    (bad / "smaller_bomb.png").write_bytes(png_claiming(10_000, 10_000))
    Image.fromarray(np.zeros((8, 8), np.float32)).save(bad / "float.tiff")
    (bad / "program.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    (bad / "circle.png").symlink_to(bad / "circle.png")
    (bad / "broken.png").symlink_to(bad / "nowhere.png")
    reasons = {
        "cut.jpg": "runcated",
        "empty.jpg": "empty",
        "text.png": "not a picture",
        "bomb.png": "decompression bomb",
        "smaller_bomb.png": "decompression bomb",
        "float.tiff": "floating-point",
        "program.png": "not a picture",
        "circle.png": "symbolic links",
        "broken.png": "No such file",
    }
    text = message(root)
    assert "9 of 49 pictures" in text
    assert "--data.on_error skip" in text
    for name, reason in reasons.items():
        (line,) = [line for line in text.splitlines() if f"/{name}: " in line]
        assert reason in line
    skipping = ImageFolder(str(root), on_error="skip")
    with pytest.warns(UserWarning, match="9 of 49 pictures"):
        skipping.prepare_data()
    assert skipping.class_counts.sum() + len(skipping.split("val")[2]) == 20
    assert "9 of 49 pictures" in message(root)  # a cache made with skip does not silence stop


def test_a_part_of_unreadable_pictures_says_so(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    for path in (root / "test").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="20 of 40"):
        assert "too few pictures for a test part; none can be read" in message(root, on_error="skip")


def test_odd_shapes_are_pictures_too(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), RED).save(tmp_path / "dot.png")
    assert (prepare_picture(tmp_path / "dot.png", 32, 3) == np.array(RED)[:, None, None]).all()
    Image.new("RGB", (20_000, 10), BLUE).save(tmp_path / "strip.png")
    assert (prepare_picture(tmp_path / "strip.png", 224, 3) == np.array(BLUE)[:, None, None]).all()
    assert prepare_picture(tmp_path / "strip.png", 1, 3).shape == (3, 1, 1)
    # Scaled before it is cropped, this one would be 600,000,000 wide, more than Pillow can hold on any machine.
    Image.new("RGB", (1_000_000, 1), BLUE).save(tmp_path / "line.png")
    assert (prepare_picture(tmp_path / "line.png", 600, 3) == np.array(BLUE)[:, None, None]).all()


def test_a_picture_of_compressed_text_is_refused(tmp_path: Path) -> None:
    text = b"comment\0\0" + zlib.compress(bytes(200_000_000), 9)  # 200 kB that unpack to 200 MB
    chunk = struct.pack(">I", len(text)) + b"zTXt" + text + struct.pack(">I", zlib.crc32(b"zTXt" + text))
    noise().save(tmp_path / "text.png")
    plain = (tmp_path / "text.png").read_bytes()
    (tmp_path / "text.png").write_bytes(plain[:33] + chunk + plain[33:])
    with pytest.raises(PictureError):
        prepare_picture(tmp_path / "text.png", 8, 3)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data")
    (root / "train" / "bee").chmod(0)
    try:
        assert "bee cannot be looked into: Permission denied" in message(root)
    finally:
        (root / "train" / "bee").chmod(0o700)


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
    (Path(os.fsdecode(odd)) / os.fsdecode(b"\xfe.png")).write_text("no picture")
    assert "caf\\xe9/\\xfe.png: not a picture" in message(root)
    data = ImageFolder(str(root), on_error="skip")
    with pytest.warns(UserWarning, match="left out"):
        data.prepare_data()
    assert data.class_names == ["bee", "caf\\xe9"]
    assert len(data.split("train")[1]) == 22


def test_circles_of_links(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    (root / "ant" / "around").symlink_to(root, target_is_directory=True)  # not followed
    data = ImageFolder(str(root))
    assert len(data.split("train")[1]) == 20
    (root / "around").symlink_to(root, target_is_directory=True)
    assert "is a link to a folder that it lies in" in message(root)
    (root / "around").unlink()
    (root / "around").symlink_to(root / "around", target_is_directory=True)  # a link to itself is no folder
    assert ImageFolder(str(root)).class_names == ["ant", "bee"]


def test_a_class_folder_may_be_a_link(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "data", ("",))
    (root / "bee").rename(tmp_path / "elsewhere")
    (root / "bee").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert len(ImageFolder(str(root)).split("train")[1]) == 20


def test_a_full_or_read_only_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_folder(tmp_path / "data")
    assert "choose a smaller --data.image_size" in message(root, image_size=200_000)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LIT_NN_CACHE", str(tmp_path / "file"))
    assert "LIT_NN_CACHE" in message(root)


# --- several processes ------------------------------------------------------------------------------------------------

PROGRAM = """
import sys, threading, time
from data_modules import picture_cache
from data_modules.image_folder import ImageFolder
prepare, build = picture_cache.prepare_picture, picture_cache._build
one_at_a_time = threading.Lock()  # however many cores there are
def slow(*arguments):
    with one_at_a_time:
        time.sleep(0.02)
    return prepare(*arguments)
def told(*arguments):
    print("building", flush=True)
    build(*arguments)
picture_cache.prepare_picture, picture_cache._build = slow, told
print(ImageFolder(sys.argv[1]).split("train")[0].sum().item(), flush=True)
"""


def start(root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(root)],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


@pytest.mark.parametrize("done", [0.0, 0.1, 0.3])
def test_a_killed_build_leaves_nothing_that_looks_complete(tmp_path: Path, cache: Path, done: float) -> None:
    root = make_folder(tmp_path / "data", count=30)  # 120 pictures: over two seconds
    process = start(root)
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    time.sleep(done)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list(cache.glob("*.index.npz"))
    images, _, _ = ImageFolder(str(root)).split("train")
    with Image.open(root / "test" / "bee" / "29.png") as last:
        assert images[-1].equal(torch.from_numpy(np.asarray(last).transpose(2, 0, 1).copy()))
    assert not list(cache.glob("*.part*"))


def test_two_processes_build_once(tmp_path: Path) -> None:
    processes = [start(make_folder(tmp_path / "data", count=30)), start(tmp_path / "data")]
    outputs = [process.communicate(timeout=120)[0].split() for process in processes]
    assert sum(output.count("building") for output in outputs) == 1
    assert outputs[0][-1] == outputs[1][-1]
