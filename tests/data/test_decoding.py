"""One decoder: every kind of image by the rules of the table, the same on every path; masks in their own depth."""

import os
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo
from support.tiny import composed

from icl_msr.core.config import build, check
from icl_msr.core.errors import UserError
from icl_msr.data import sources
from icl_msr.data.arrays import arrays
from icl_msr.data.files import FileSplit
from icl_msr.data.sources import read_image, read_mask, read_size


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind, **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png16(values, colour_type):
    """A PNG file of 16 bits a channel, which Pillow does not write: values uint16 (H, W[, C])."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def shown(data):
    return read_image(data, "x").permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_format_is_turned_upright(kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = encoded(Image.fromarray(pixels(20, 30, 3)), kind, exif=exif)
    expected = np.array(ImageOps.exif_transpose(Image.open(BytesIO(data))).convert("RGB"))
    assert np.array_equal(shown(data), expected)
    assert expected.shape[:2] == ((30, 20) if turn >= 5 else (20, 30))
    assert read_size(data, "x") == expected.shape[:2]


XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    b'<rdf:Description rdf:about="" xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    b"</rdf:RDF></x:xmpmeta>"
)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_an_orientation_in_xmp_counts_in_every_format(kind):
    """Lightroom writes it there."""
    text = PngInfo()
    text.add_itxt("XML:com.adobe.xmp", XMP.decode())
    options = {"PNG": {"pnginfo": text}, "TIFF": {"tiffinfo": {700: XMP}}}.get(kind, {"xmp": XMP})
    data = encoded(Image.fromarray(pixels(20, 30, 3)), kind, **options)
    assert shown(data).shape == (30, 20, 3)
    assert read_size(data, "x") == (30, 20)


def test_an_orientation_that_means_nothing_turns_nothing():
    for turn in (0, 9, 200):
        exif = Image.Exif()
        exif[0x0112] = turn
        assert shown(encoded(Image.fromarray(pixels(20, 30, 3)), "PNG", exif=exif)).shape == (20, 30, 3)
    assert shown(encoded(Image.fromarray(pixels(20, 30, 3)), "JPEG", exif=b"Exif\0\0broken")).shape == (20, 30, 3)


def test_an_exif_without_an_orientation_changes_nothing(monkeypatch):
    exif = Image.Exif()
    exif[0x010F] = "a camera"
    data = encoded(Image.fromarray(pixels(20, 30, 3)), "JPEG", exif=exif)
    found = shown(data)
    monkeypatch.setattr(sources, "_jpeg_decoder", lambda: None)
    assert np.array_equal(found, shown(data))


def test_masks_are_turned_as_images_are(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    mask = np.zeros((20, 30), np.uint8)
    mask[:5, :10] = 255
    Image.fromarray(mask).save(tmp_path / "m.png", exif=exif)
    assert torch.equal(read_mask(tmp_path / "m.png", "m"), torch.from_numpy(np.rot90(mask, -1).copy()) > 0)


# ------------------------------------------------------------------------------------------------- transparency


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_what_is_transparent_is_white(kind):
    image = pixels(20, 30, 4)
    image[:, :10, 3], image[:, 10:20, 3], image[:, 20:, 3] = 0, 255, 128
    data = encoded(Image.fromarray(image), kind, **({"lossless": True, "exact": True} if kind == "WEBP" else {}))
    found = shown(data)
    assert (found[:, :10] == 255).all()
    assert np.array_equal(found[:, 10:20], image[:, 10:20, :3])
    half = image[:, 20:, :3] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(found[:, 20:] - half).max() <= 1


def test_transparent_palettes_and_greys_are_white_too():
    index = Image.fromarray(pixels(20, 30) % 4).convert("P")
    index.putpalette([255, 0, 255, 10, 20, 30, 40, 50, 60, 70, 80, 90])
    where = np.asarray(index) == 0
    for kind in ("PNG", "GIF"):
        assert (shown(encoded(index, kind, transparency=0))[where] == 255).all()
    grey = Image.fromarray(np.dstack([pixels(20, 30), np.where(where, 0, 255).astype(np.uint8)]), "LA")
    assert (shown(encoded(grey, "PNG"))[where] == 255).all()
    keyed = Image.fromarray(np.where(where, 7, 100).astype(np.uint8))
    found = shown(encoded(keyed, "PNG", transparency=7))
    assert (found[where] == 255).all()
    assert (found[~where] == 100).all()


# ------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_in_every_format(kind):
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    assert np.array_equal(shown(encoded(Image.fromarray(values), kind))[:, :, 1], values >> 8)


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bits_in_colour_are_scaled(colour_type, channels):
    values = np.random.default_rng(0).integers(0, 65536, (20, 30, channels), dtype=np.uint16)
    if channels != 3:
        values[:, :, -1] = 65535
    expected = values[:, :, :1] if channels == 2 else values[:, :, :3]
    assert np.abs(shown(png16(values, colour_type)).astype(int) - (expected >> 8)).max() <= 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.linspace(0, 1, 600, dtype=np.float32), np.linspace(0, 255, 600)),
        (np.linspace(0, 0.5, 600, dtype=np.float32), np.linspace(0, 127.5, 600)),
        (np.linspace(0, 255, 600, dtype=np.float32), np.linspace(0, 255, 600)),
        (np.linspace(-3, 5, 600, dtype=np.float32), np.linspace(0, 255, 600)),
        (np.linspace(0, 4095, 600).astype(np.int32), np.linspace(0, 255, 600)),
        (np.arange(600, dtype=np.int32) % 200, np.arange(600) % 200),
        (np.full(600, 1000.0, np.float32), np.zeros(600)),
    ],
)
def test_floats_and_wide_integers_are_scaled_by_their_own_range(values, expected):
    found = shown(encoded(Image.fromarray(values.reshape(20, 30)), "TIFF"))
    assert np.abs(found[:, :, 0] - expected.reshape(20, 30)).max() <= 1
    assert (found[:, :, 0] == found[:, :, 2]).all()


def test_values_that_are_not_finite_are_refused():
    values = np.ones((20, 30), np.float32)
    values[3, 4] = np.nan
    with pytest.raises(UserError, match=r"depth\.tif cannot be read as an image \(it has values that are not finite\)"):
        read_image(encoded(Image.fromarray(values), "TIFF"), "depth.tif")


# ------------------------------------------------------------------------------------------------- animations, JPEG


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "MPO", "AVIF"])
def test_the_first_frame_of_several_is_read(kind):
    frames = [Image.new("RGB", (30, 20), colour) for colour in ("red", "green", "blue")]
    try:
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    except (OSError, KeyError):
        pytest.skip(f"Pillow is built without {kind}")
    found = shown(data)
    assert found.shape == (20, 30, 3)
    assert np.abs(found.astype(int) - (255, 0, 0)).max() <= 3


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "YCbCr"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1, "quality": 95}])
def test_jpeg_has_pillows_bytes_with_and_without_torchcodec(monkeypatch, mode, options):
    data = encoded(Image.fromarray(pixels(45, 61, 3)).convert(mode), "JPEG", **options)
    expected = np.array(Image.open(BytesIO(data)).convert("RGB")).astype(int)
    fast = shown(data)
    monkeypatch.setattr(sources, "_jpeg_decoder", lambda: None)
    slow = shown(data)
    assert np.abs(slow - expected).max() == 0
    assert np.abs(fast - expected).max() <= 1


def test_a_jpeg_can_be_decoded_at_a_fraction_of_its_sides():
    image = Image.fromarray(pixels(9, 12, 3)).resize((401, 300), Image.Resampling.BICUBIC)
    turned = Image.Exif()
    turned[0x0112] = 6
    jpeg, png = encoded(image, "JPEG", quality=95), encoded(image, "PNG")
    for reduction in (2, 4, 8):
        small = read_image(jpeg, "small", reduction)
        means = F.avg_pool2d(read_image(jpeg, "whole").float(), reduction, ceil_mode=True)
        assert (means - small).abs().mean() < 2
        upright = read_image(encoded(image, "JPEG", quality=95, exif=turned), "turned", reduction)
        assert torch.equal(upright, small.rot90(-1, (1, 2)))
    assert read_image(png, "png", 4).shape == (3, 300, 401)


def test_formats_that_run_programs_are_no_images(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n")
    with pytest.raises(UserError, match=r"a\.png is not an image of a known format"):
        read_image(tmp_path / "a.png", "a.png")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM"])
def test_damaged_files_end_in_a_sentence(kind):
    """Random bytes are overwritten: the image or a sentence with the name of the file, and nothing else."""
    rng = np.random.default_rng(0)
    whole = encoded(Image.fromarray(pixels(24, 24, 3)), kind)
    for _ in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        words = ""
        try:
            assert read_image(bytes(data[: rng.integers(1, len(data) + 1)]), "bad.img").dtype == torch.uint8
        except UserError as error:
            words = str(error)
        assert not words or words.startswith("bad.img ")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_too_many_pixels_or_bytes_end_in_a_sentence(tmp_path):
    """Few bytes that would become gigabytes."""

    def declared(side):
        data = bytearray(png16(np.zeros((4, 4, 3), np.uint16), 2))
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
        return bytes(data)

    for read in (read_image, read_size):
        with pytest.raises(UserError, match=r"x has more pixels than the 178 million that are read; scale it down"):
            read(declared(30_000), "x")
    assert read_size(declared(12_000), "x") == (12_000, 12_000)
    with (tmp_path / "m.png").open("wb") as file:
        file.truncate(2**31)  # takes no room on the disk
    for read in (read_image, read_mask):
        with pytest.raises(UserError, match=r"m\.png is larger than 1073\.74 MB"):
            read(tmp_path / "m.png", "m")
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(UserError, match=r"pipe\.png is not a regular file"):
        read_image(tmp_path / "pipe.png", "x")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "AVIF"])
def test_all_paths_give_the_same_bytes(tmp_path, kind):
    """Folder, array, Hugging Face, resident and decoded by workers: within one level of Pillow."""
    exif = Image.Exif()
    exif[0x0112] = 3
    options = {"exif": exif} if kind in ("JPEG", "PNG", "WEBP", "TIFF") else {}
    files, contents = [], []
    for i in range(4):
        contents.append(encoded(Image.fromarray(pixels(32, 32, 3, seed=i)), kind, **options))
        files.append(str(tmp_path / f"{i}.img"))
        Path(files[-1]).write_bytes(contents[-1])
    split = FileSplit(files, torch.tensor([0, 1, 0, 1]), 32)
    np.savez(
        tmp_path / "x.npz",
        blob=np.frombuffer(b"".join(contents), np.uint8),
        offsets=np.cumsum([0, *map(len, contents)]),
        labels=np.array([0, 1, 0, 1]),
        is_train=np.array([True, True, False, False]),
    )
    data = arrays(path=str(tmp_path / "x.npz"), image_size=None, train_on="full")
    from_array = torch.cat([data.train.load(torch.arange(2)), data.tests["test"].load(torch.arange(2))])
    paths = [split.load(torch.arange(4)), split.in_memory().images, torch.stack([*map(split.image, range(4))])]
    datasets = pytest.importorskip("datasets", reason="needs the extra hf")
    rows = [{"bytes": content, "path": None} for content in contents]
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict({"image": rows}, features=features).save_to_disk(str(tmp_path / "set"))
    words = [f"dataset.name={tmp_path / 'set'}", "dataset.test=null", "dataset.label=null", "dataset.image_size=32"]
    table = build(check(composed("dataset=huggingface", "dataset.resident_size=0", *words)).dataset)
    everywhere = [table.train, *table.tests.values()]
    from_table = torch.cat([part.load(torch.arange(len(part))) for part in everywhere])
    assert sorted(map(_bytes, from_table)) == sorted(map(_bytes, from_array))  # a part is held out
    for images in paths:
        assert torch.equal(images, from_array)
    by_pillow = [ImageOps.exif_transpose(Image.open(BytesIO(content))).convert("RGB") for content in contents]
    for image, expected in zip(from_array, by_pillow, strict=True):
        assert np.abs(image.permute(1, 2, 0).numpy().astype(int) - np.array(expected).astype(int)).max() <= 1


def _bytes(image):
    return image.numpy().tobytes()


# ------------------------------------------------------------------------------------------------- masks

OBJECT = np.zeros((20, 30), bool)
OBJECT[5:15, 10:20] = True


def mask_of(tmp_path, content, values=None):
    (tmp_path / "m").write_bytes(content)
    return read_mask(tmp_path / "m", "m", values).numpy()


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(OBJECT.astype(np.uint8)), "PNG"),
        encoded(Image.fromarray(OBJECT), "PNG"),
        encoded(Image.fromarray(OBJECT.astype(np.uint16)), "PNG"),
        encoded(Image.fromarray(OBJECT.astype(np.uint16)), "TIFF"),
        encoded(Image.fromarray(OBJECT.astype(np.int32)), "TIFF"),
        encoded(Image.fromarray(OBJECT.astype(np.float32) / 1000), "TIFF"),
        png16(np.dstack([OBJECT * np.uint16(0), OBJECT.astype(np.uint16), OBJECT * np.uint16(0)]), 2),
        encoded(Image.fromarray(np.dstack([OBJECT * np.uint8(0), OBJECT * np.uint8(9), OBJECT * np.uint8(0)])), "BMP"),
        encoded(Image.fromarray(np.dstack([OBJECT * np.uint8(1), np.full((20, 30), 255, np.uint8)]), "LA"), "PNG"),
        png16(np.dstack([OBJECT.astype(np.uint16), np.full((20, 30), 65535, np.uint16)]), 4),
        encoded(Image.fromarray(np.dstack([OBJECT * np.uint8(1)] * 3)), "WEBP", lossless=True),
        encoded(Image.fromarray(np.dstack([pixels(20, 30, 3), OBJECT * np.uint8(255)])), "PNG"),
        encoded(Image.fromarray(np.dstack([np.zeros((20, 30, 3), np.uint8), OBJECT * np.uint8(255)])), "PNG"),
    ],
    ids=[
        *("8", "1", "16", "16 tif", "32 tif", "float", "16 colour", "colour", "opaque grey", "opaque grey 16", "webp"),
        *("cut out", "cut out black"),
    ],
)
def test_masks_are_read_in_their_own_depth(tmp_path, content):
    assert np.array_equal(mask_of(tmp_path, content), OBJECT)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "TIFF"])
def test_masks_of_lossy_formats_are_cut_at_half(tmp_path, kind):
    """An edge that rings has values that are not zero outside the object."""
    options = {"compression": "jpeg"} if kind == "TIFF" else {}
    content = encoded(Image.fromarray(OBJECT * np.uint8(255)), kind, quality=50, **options)
    assert (np.asarray(Image.open(BytesIO(content)).convert("L")) > 0).sum() > OBJECT.sum()
    assert (mask_of(tmp_path, content) != OBJECT).sum() <= 4
    with pytest.raises(UserError, match=r"its compression changes values, and dataset\.mask_values speaks of exact"):
        mask_of(tmp_path, content, [255])


def test_labels_in_a_lossless_webp_are_all_the_object(tmp_path):
    numbers = np.where(OBJECT, 1, 0).astype(np.uint8)
    numbers[5:8, 10:20] = 3
    content = encoded(Image.fromarray(np.dstack([numbers] * 3)), "WEBP", lossless=True)
    assert np.array_equal(mask_of(tmp_path, content), OBJECT)


def test_trimaps_and_palettes_by_their_values(tmp_path):
    trimap = np.full((20, 30), 2, np.uint8)
    trimap[4:16, 9:21], trimap[5:15, 10:20] = 3, 1
    content = encoded(Image.fromarray(trimap), "PNG")
    assert np.array_equal(mask_of(tmp_path, content, "trimap"), OBJECT)
    assert mask_of(tmp_path, content, [1, 3]).sum() == 144
    with pytest.raises(UserError, match=r"The mask m covers the whole image.*dataset\.mask_values"):
        mask_of(tmp_path, content)
    voc = Image.fromarray(np.where(OBJECT, 15, 0).astype(np.uint8)).convert("P")
    voc.putpalette([v for k in range(256) for v in (k * 37 % 256, k * 5 % 256, k * 11 % 256)])
    void = np.asarray(voc).copy()
    void[0] = 255
    palette = Image.fromarray(void, "L").convert("P")
    palette.putpalette(voc.getpalette())
    content = encoded(palette, "PNG")
    assert np.array_equal(mask_of(tmp_path, content, "voc"), OBJECT)
    assert mask_of(tmp_path, content).sum() == 100 + 30
    with pytest.raises(UserError, match=r"m cannot be read.*in colour.*mask_values"):
        mask_of(tmp_path, encoded(Image.fromarray(pixels(20, 30, 3)), "PNG"), [1])


@pytest.mark.parametrize(("value", "words"), [(0, "is empty"), (255, "covers the whole image")])
def test_masks_without_an_object_are_refused(tmp_path, value, words):
    with pytest.raises(UserError, match=rf"The mask m {words}"):
        mask_of(tmp_path, encoded(Image.new("L", (30, 20), value), "PNG"))
