"""JPEGs: whole ones of every kind are taken with Pillow's pixels, those that lack data are told."""

from __future__ import annotations

import io

import numpy as np
import pytest
from corpus import encode, picture, turned_exif
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from md3cli.errors import ImageError
from md3cli.images import jpeg
from md3cli.images.pixels import decode_rgb

END = b"\xff\xd9"


def rgb(data: bytes) -> np.ndarray:
    return np.asarray(decode_rgb(data, 2**28, None, None))


def is_damaged(data: bytes) -> bool:
    try:
        rgb(data)
    except ImageError as error:
        return error.type == "decode"
    return False


def first_scan(data: bytes) -> int:
    at = data.index(b"\xff\xda")
    return at + 2 + int.from_bytes(data[at + 2 : at + 4])


KINDS = st.fixed_dictionaries(
    {"quality": st.integers(1, 100), "progressive": st.booleans(), "optimize": st.booleans()},
    optional={
        "subsampling": st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
        "restart_marker_blocks": st.integers(1, 20),
        "restart_marker_rows": st.integers(1, 3),
        "comment": st.binary(max_size=30),
        "exif": st.integers(1, 8).map(turned_exif),
    },
)
BEHIND = st.sampled_from([b"", b"\0", b"\xff", b"\xff\xd9", b"anything " * 99, b"\xff\xd8\xff\xe0", bytes(5000)])
BEFORE_THE_END = st.sampled_from([b"", b"\0", b"\xff\xff", b"few bytes", bytes(500)])


@pytest.mark.process
@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["RGB", "L", "CMYK", "YCbCr"]), st.tuples(*[st.integers(1, 140)] * 2), KINDS, BEHIND, BEFORE_THE_END
)
def test_whole_pictures_of_every_kind_are_taken_with_pillows_pixels(mode, size, options, behind, before_the_end):
    if mode != "RGB":
        options.pop("subsampling", None)
    data = encode(picture(mode, size), "JPEG", **options)
    data = data[:-2] + before_the_end + END + behind
    image = Image.open(io.BytesIO(data))
    jpeg.load_jpeg(image, data)
    assert image.tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize("colour", ["black", "white", "grey", "#808080", "#fedcba"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_flat_pictures_whose_data_are_all_alike_are_taken(colour, options):
    data = encode(Image.new("RGB", (700, 500), colour), "JPEG", **options)
    assert rgb(data).shape == (500, 700, 3)
    assert rgb(data[:-2]).shape == (500, 700, 3)


WAYS = [{}, {"optimize": True}, {"progressive": True}, {"subsampling": 0}, {"quality": 97}]
RESTARTS = [{"restart_marker_rows": 1}, {"restart_marker_blocks": 5}, {"restart_marker_rows": 2, "progressive": True}]


@pytest.mark.process
@pytest.mark.parametrize("options", [*WAYS, *RESTARTS])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("part", [0.2, 0.5, 0.8])
def test_a_cut_or_a_hole_is_damage_though_the_end_marker_is_there(options, mode, part):
    data = encode(picture(mode, (400, 300)), "JPEG", **options)
    cut = first_scan(data) + int((len(data) - first_scan(data)) * part)
    hole = (len(data) - cut) // 2
    assert not is_damaged(data)
    assert is_damaged(data[:cut]), "cut"
    assert is_damaged(data[:cut] + END), "cut, with an end marker"
    assert is_damaged(data[:cut] + data[cut + hole :]), "a part taken out"
    assert is_damaged(data[:cut] + b"\xff" * hole + data[cut + hole :]), "a hole of ones"
    assert is_damaged(data[:cut] + np.random.default_rng(1).bytes(hole) + data[cut + hole :]), "a hole of noise"
    assert is_damaged(data[:cut] + data[cut - hole // 2 :]), "a part twice"
    if "progressive" not in options:  # zeros fit into its last scans: libjpeg sees no fault either
        assert is_damaged(data[:cut] + bytes(hole) + data[cut + hole :]), "a hole of zeros"


def test_a_progressive_picture_that_ends_between_two_scans_is_damaged():
    data = encode(picture("RGB", (200, 150)), "JPEG", progressive=True)
    scans = [at for at in range(len(data)) if data[at : at + 2] == b"\xff\xda"]
    assert len(scans) >= 10
    for at in scans[1:]:
        assert is_damaged(data[:at] + END)
        assert is_damaged(data[:at])


@pytest.mark.parametrize("options", [*WAYS, *RESTARTS])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_only_the_end_marker_may_be_missing(options, mode):
    data = encode(picture(mode, (123, 77)), "JPEG", **options)
    np.testing.assert_array_equal(rgb(data[:-2]), rgb(data))
    np.testing.assert_array_equal(rgb(data[:-1]), rgb(data))
    for num_missing in (4, 5, 8, 20, 200):
        assert is_damaged(data[:-num_missing]), num_missing


def test_restart_markers_out_of_order_are_damage():
    data = encode(picture("RGB", (200, 200)), "JPEG", restart_marker_rows=1)
    assert not is_damaged(data)
    assert is_damaged(data.replace(b"\xff\xd3", b"\xff\xd5", 1))


def test_a_header_that_claims_more_rows_than_there_are_is_damage():
    data = bytearray(encode(picture("RGB", (200, 200)), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 2] = (240).to_bytes(2)
    assert is_damaged(bytes(data))


def test_the_first_picture_of_several_in_one_file_counts():
    first, second = picture("RGB", (90, 60), seed=1), picture("RGB", (40, 30), seed=2)
    data = encode(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).format == "MPO"
    np.testing.assert_array_equal(rgb(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))
