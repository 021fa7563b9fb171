"""Every kind of image file becomes upright 8-bit RGB; tensors keep their stated range."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from tavq.data.images import UnreadableImageError, grid, load_image, squash, to_pil, to_tensor


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def centre(image):
    return image.getpixel((image.width // 2, image.height // 2))


@pytest.mark.parametrize(
    ("image", "name", "expected"),
    [
        (Image.new("L", (16, 16), 77), "grey.png", (77, 77, 77)),
        (Image.new("1", (16, 16), 1), "bits.png", (255, 255, 255)),
        (Image.new("RGB", (16, 16), (200, 30, 40)).quantize(4), "palette.png", (200, 30, 40)),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "cmyk.tif", (255, 0, 0)),
        (Image.fromarray(np.full((16, 16), 257 * 200, np.uint16)), "deep.png", (200, 200, 200)),
        (Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "clear.png", (255, 255, 255)),
        (Image.new("RGBA", (16, 16), (0, 0, 0, 128)), "half.png", (127, 127, 127)),
        (Image.new("LA", (16, 16), (0, 0)), "grey_clear.png", (255, 255, 255)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_becomes_rgb(tmp_path, image, name, expected):
    loaded = load_image(saved(tmp_path, image, name))
    assert loaded.mode == "RGB" and centre(loaded) == expected


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "P", "CMYK", "I;16"])
def test_a_large_image_is_converted_in_bands_without_a_trace(monkeypatch, mode):
    from tavq.data import images

    noise = np.random.default_rng(0).integers(0, 256, (30, 20, 4), dtype=np.uint8)
    image = Image.fromarray(noise)
    if mode == "I;16":
        image = Image.fromarray(noise[:, :, 0].astype(np.uint16) * 255)
    elif mode != "RGBA":
        image = image.convert("RGB" if mode in ("P", "CMYK") else mode).convert(mode)
    if mode == "P":
        image.info["transparency"] = 3
    whole = np.asarray(images.to_rgb(image))
    monkeypatch.setattr(images, "BAND_PIXELS", 7 * image.width)
    assert np.array_equal(np.asarray(images.to_rgb(image)), whole) and len(np.unique(whole)) > 2


def test_transparent_palette_is_laid_over_white(tmp_path):
    image = Image.new("P", (16, 16), 0)
    image.putpalette([9, 9, 9, 50, 60, 70])
    assert centre(load_image(saved(tmp_path, image, transparency=0))) == (255, 255, 255)


def test_exif_orientation_is_applied(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 10, 10))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by 90 degrees to see it upright
    loaded = load_image(saved(tmp_path, image, "turned.png", exif=exif))
    assert loaded.size == (10, 20)
    assert loaded.getpixel((5, 2)) == (255, 255, 255) and loaded.getpixel((5, 17)) == (0, 0, 0)


@pytest.mark.parametrize("size", [(1, 1), (7, 100)])
def test_tiny_image_is_refused_with_its_size(tmp_path, size):
    with pytest.raises(
        UnreadableImageError, match=rf"image is {size[0]} x {size[1]} px.*at least 8"
    ) as error:
        load_image(saved(tmp_path, Image.new("RGB", size)))
    assert "\n" not in str(error.value)


def test_eight_pixels_are_enough(tmp_path):
    assert load_image(saved(tmp_path, Image.new("RGB", (8, 8)))).size == (8, 8)


def test_truncated_and_foreign_files_are_unreadable(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = saved(tmp_path, noise, "photo.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.jpg"):
        with pytest.raises(UnreadableImageError, match=name):
            load_image(tmp_path / name)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        load_image(tmp_path / "none.png")


def test_open_file_is_read(tmp_path):
    buffer = io.BytesIO(saved(tmp_path, Image.new("RGB", (9, 9), (1, 2, 3))).read_bytes())
    assert centre(load_image(buffer)) == (1, 2, 3)


def test_tensor_and_picture_are_inverse():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tensor = to_tensor(Image.fromarray(pixels), 16)
    assert tensor.dtype == torch.float32 and tensor.shape == (3, 16, 16)
    assert torch.equal(tensor[0, 2], torch.from_numpy(pixels[2, :, 0].astype(np.float32)) / 127.5 - 1)
    assert np.array_equal(np.asarray(to_pil(tensor[None])[0]), pixels)


def test_range_ends_are_black_and_white():
    assert to_tensor(Image.new("RGB", (8, 8), "black"), 8).unique().tolist() == [-1.0]
    assert to_tensor(Image.new("RGB", (8, 8), "white"), 8).unique().tolist() == [1.0]
    overshoot = torch.tensor([-1.7, 1.7]).view(2, 1, 1, 1).expand(2, 3, 8, 8)
    assert [centre(image) for image in to_pil(overshoot)] == [(0, 0, 0), (255, 255, 255)]


def test_image_is_squashed_with_antialiasing():
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, ::2] = 255
    tensor = to_tensor(Image.fromarray(stripes), 16)
    assert tensor.shape == (3, 16, 16) and tensor.abs().max() < 0.05  # grey, no aliased stripes


def test_squashing_early_changes_no_bit():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    assert squash(image, 24).size == (24, 24)
    assert torch.equal(to_tensor(squash(image, 24), 24), to_tensor(image, 24))
    clear = Image.new("RGBA", (50, 70), (255, 0, 0, 0))
    assert torch.equal(to_tensor(squash(clear, 24), 24), to_tensor(clear, 24))


def test_picture_needs_a_batch():
    with pytest.raises(ValueError, match=r"\(3, 8, 8\).*add the batch axis"):
        to_pil(torch.zeros(3, 8, 8))


def test_grid_places_pictures_row_by_row():
    sheet = grid(
        [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")], columns=2, gap_px=2
    )
    assert sheet.size == (18, 18)
    places = [sheet.getpixel(at) for at in ((4, 4), (14, 4), (4, 14), (14, 14), (9, 4))]
    assert places == [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (255, 255, 255)]


def test_grid_refuses_nothing_and_unlike_sizes():
    with pytest.raises(ValueError, match="0 images"):
        grid([], columns=2)
    with pytest.raises(ValueError, match="differ in size"):
        grid([Image.new("RGB", (8, 8)), Image.new("RGB", (9, 8))], columns=2)
