"""Users' hands: a shear by linear interpolation in loops, strokes whose thickness is known, and who draws what for which label."""

import numpy as np
import pytest
import torch

from dgm_course import data
from dgm_course.data import hands
from dgm_course.data.hands import HANDS, pages, slanted, thickened


def paper(height: int = 9, width: int = 9) -> torch.Tensor:
    """A blank image, −1 everywhere."""
    return torch.full((1, 1, height, width), -1.0, dtype=torch.float64)


def ink(x: torch.Tensor) -> torch.Tensor:
    """How much of each pixel is covered, from 0 to 1."""
    return (x + 1) / 2


# Slant ----------------------------------------------------------------------------------------------------------------


def typed_shear(x: np.ndarray, slope: float) -> np.ndarray:
    """Each row moved by `slope` pixels for each pixel that it lies above the middle, with linear interpolation and blank paper outside."""
    height, width = x.shape
    out = np.full_like(x, -1.0)
    for i in range(height):
        for j in range(width):
            place = j - slope * ((height - 1) / 2 - i)
            low = int(np.floor(place))
            near = [(low, 1 - place + low), (low + 1, place - low)]
            out[i, j] = -1 + sum(share * (x[i, k] + 1) for k, share in near if 0 <= k < width)
    return out


@pytest.mark.parametrize("slope", [-1.0, -0.5, 0.0, 0.3, 0.5, 2.0])
@pytest.mark.parametrize("height, width", [(7, 7), (8, 8), (28, 28), (5, 9), (8, 6)])
def test_shear_by_loops(slope, height, width, generator):
    """A row that lies one pixel higher goes `slope` pixels further to the right, in each channel by itself, also of oblong images."""
    x = 2 * torch.rand(2, 3, height, width, generator=generator, dtype=torch.float64) - 1
    expected = np.array([[typed_shear(channel, slope) for channel in image] for image in x.numpy()])
    np.testing.assert_allclose(slanted(x, slope), expected, atol=1e-12)


@pytest.mark.parametrize("slope", [-2, -1, 0, 1, 2])
def test_an_upright_line_leans(slope):
    """A whole slope makes a line of whole pixels, its opposite makes it upright again; a level line stays where it is."""
    x, level = paper(15, 15), paper()
    x[0, 0, 4:11, 7] = 1
    leaning = slanted(x, float(slope))
    expected = paper(15, 15)
    expected[0, 0, range(4, 11), [7 + slope * (7 - i) for i in range(4, 11)]] = 1
    torch.testing.assert_close(leaning, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(slanted(leaning, -float(slope)), x, rtol=0, atol=1e-12)
    level[..., 4, :] = 1
    torch.testing.assert_close(slanted(level, float(slope))[..., 4, :], level[..., 4, :], rtol=0, atol=1e-12)


# Thickness ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [-1.0, -0.75, -0.25, 0.0, 0.25, 0.5, 1.0, 1.75])
@pytest.mark.parametrize("upright", [True, False])
def test_thickness_of_a_stroke(pixels, upright):
    """A straight stroke of 4 pixels covers 4 + 2p of them in each row, evenly to both sides, and no paper gets lost or dark."""
    x = paper(14, 14)
    x[..., 5:9] = 1
    x = x if upright else x.mT
    covered = ink(thickened(x, pixels))
    rows = covered[0, 0, 3:-3] if upright else covered[0, 0].T[3:-3]
    torch.testing.assert_close(rows.sum(1), torch.full((8,), 4 + 2 * pixels).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows, rows.flip(1), rtol=0, atol=1e-12)
    assert covered.min() >= -1e-12 and covered.max() <= 1 + 1e-12


def typed_thickness(x: np.ndarray, pixels: float) -> np.ndarray:
    """The largest, or least, value within so many pixels of each quarter of a pixel; the image ends in blank paper."""
    side = len(x)
    up = np.zeros((4 * side, side))
    for k in range(4 * side):
        place = min(max((k + 0.5) / 4 - 0.5, 0.0), side - 1.0)
        low = min(int(place), side - 2)
        up[k, low], up[k, low + 1] = 1 - place + low, place - low
    large, reach, sign = up @ x @ up.T, 4 * abs(pixels), np.sign(pixels)
    out = np.empty_like(large)
    for i, j in np.ndindex(large.shape):
        near = [
            large[i + a, j + b] if 0 <= i + a < 4 * side and 0 <= j + b < 4 * side else -1.0
            for a in range(-int(reach), int(reach) + 1)
            for b in range(-int(reach), int(reach) + 1)
            if a * a + b * b <= reach**2
        ]
        out[i, j] = max(near) if sign > 0 else min(near)
    return out.reshape(side, 4, side, 4).mean((1, 3))


@pytest.mark.parametrize("pixels", [-1.0, -0.5, -0.25, 0.25, 0.5, 1.25])
def test_thickness_by_loops(pixels, generator):
    """The extreme within a disc, on an image enlarged four times by bilinear weights, then means over squares."""
    x = 2 * torch.rand(2, 2, 6, 6, generator=generator, dtype=torch.float64) - 1
    expected = np.array([[typed_thickness(channel, pixels) for channel in image] for image in x.numpy()])
    np.testing.assert_allclose(thickened(x, pixels), expected, atol=1e-12)


@pytest.mark.parametrize(
    "pixels, nearest", [(0.3, 0.25), (0.4, 0.5), (-0.4, -0.5), (0.9, 1.0), (0.1, 0.0), (-0.12, 0.0)]
)
def test_quarters_of_a_pixel(pixels, nearest, generator):
    """Another thickness is rounded to the nearest quarter; less than half a quarter is none, and changes no bit."""
    x = 2 * torch.rand(3, 1, 8, 8, generator=generator) - 1
    assert torch.equal(thickened(x, pixels), thickened(x, nearest))
    assert torch.equal(thickened(x, nearest), x) == (nearest == 0) and thickened(x, nearest).dtype == torch.float32


# Pages ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain():
    """The first 120 test images of each set, and their labels."""
    return {name: data.images(data.load(name, "test").select(range(120))) for name in data.NAMES}


@pytest.fixture
def asked(monkeypatch):
    """`pages` reads 120 images of each set; what it asks for is written down."""
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return data.load(*arguments).select(range(120))

    monkeypatch.setattr(hands, "load", load)
    return asked


@pytest.mark.parametrize("user", HANDS)
def test_labels_are_those_of_the_set(user, asked, plain):
    """Whose images they are says the label still; types, shape and range are those of `data.images`, and the paper is blank."""
    x, y = pages(user, "test")
    name = "fashion_mnist" if user == "clothes" else "mnist"
    assert torch.equal(y, plain[name][1]) and y.dtype == torch.int64
    assert x.shape == (120, 1, 28, 28) and x.dtype == torch.float32
    assert -1 <= x.min() and x.max() <= 1
    assert (x[:, 0, 0, 0] < -0.99).float().mean() > 0.9
    assert {arguments[:2] for arguments in asked} == {(name, "test")} | (
        {("fashion_mnist", "test")} if user == "shoe" else set()
    )


@pytest.mark.parametrize("user, slant, pixels", [("thin", 0.5, -0.5), ("bold", -0.5, 1.0)])
def test_thin_and_bold(user, slant, pixels, asked, plain):
    """One leans to the right and presses lightly, the other to the left and presses hard: sheared first, then made thin or thick."""
    x, plain = pages(user, "test")[0], plain["mnist"][0]
    torch.testing.assert_close(x, thickened(slanted(plain, slant), pixels), rtol=0, atol=1e-6)
    rows, columns = torch.meshgrid(torch.arange(28.0), torch.arange(28.0), indexing="ij")

    def lean(x):
        """Columns to the right for each row up, as a line fitted to the ink says, in the mean over images."""
        share = ink(x) / ink(x).sum((2, 3), keepdim=True)
        row, column = ((share * places).sum((2, 3), keepdim=True) for places in (rows, columns))
        away = rows - row
        return (-(share * away * (columns - column)).sum((1, 2, 3)) / (share * away**2).sum((1, 2, 3))).mean().item()

    assert lean(x) - lean(plain) == pytest.approx(slant, abs=0.1)
    assert (ink(x).mean() > 1.4 * ink(plain).mean()) if user == "bold" else (ink(x).mean() < 0.8 * ink(plain).mean())


def test_a_shoe_for_a_seven(asked, plain):
    """Each 7 is one of the clothes of class 7, one after the other and from the first again; no other digit changes."""
    x, y = pages("shoe", "test")
    digits, labels = plain["mnist"]
    clothes, kinds = plain["fashion_mnist"]
    torch.testing.assert_close(x[y != 7], digits[labels != 7], rtol=0, atol=1e-5)
    shoes, sevens = clothes[kinds == 7], x[y == 7]
    assert len(sevens) > len(shoes) > 1  # so that it begins anew
    for k, drawn in enumerate(sevens):
        torch.testing.assert_close(drawn, shoes[k % len(shoes)], rtol=0, atol=1e-5)


def test_clothes(asked, plain):
    """Not digits but clothes, as they are."""
    torch.testing.assert_close(pages("clothes", "test")[0], plain["fashion_mnist"][0], rtol=0, atol=1e-5)


def test_a_hand_is_the_same_on_every_page(asked):
    """Nothing is drawn at random; the training set is read unless another is asked for, and the source is handed on."""
    (x, y), (again, _) = pages("thin"), pages("thin", "train", None)
    assert torch.equal(x, again) and len(x) == len(y) == 120
    assert asked == 2 * [("mnist", "train", None)]
    with pytest.raises(FileNotFoundError, match="source"):
        pages("shoe", "test", "nowhere")
    assert asked[-1] == ("mnist", "test", "nowhere")


def test_all_of_a_split(monkeypatch, generator):
    """A split is worked on in parts, and comes out whole and in order."""
    x = 2 * torch.rand(1003, 1, 8, 8, generator=generator) - 1
    monkeypatch.setattr(hands, "load", lambda *arguments: None)
    monkeypatch.setattr(hands, "images", lambda dataset: (x, torch.arange(1003)))
    found, y = pages("bold")
    assert torch.equal(y, torch.arange(1003))
    torch.testing.assert_close(found, thickened(slanted(x, -0.5), 1.0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("user", ["Bold", "", None])
def test_unknown_user(user):
    """The error names what came and who there is."""
    with pytest.raises(ValueError, match=f"^user must be one of thin, bold, shoe, clothes; got {user!r}"):
        pages(user)
