import numpy as np
import pytest
import torch

from icl_msr.core.randomness import keys, uniforms
from icl_msr.negatives import PhaseNegatives
from icl_msr.negatives.phase import periodic_spectrum

SIZES = [(16, 16), (9, 12), (12, 7), (5, 5)]


def generator(count=2):
    return PhaseNegatives(count=count, alpha=2.0, alpha_mode="exponent", alpha_schedule="constant", repulsion=0.25)


def pictures(n, height, width, seed=0):
    """Noise on a slope: borders that do not fit each other, and colours that belong together."""
    noise = torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(seed))
    slope = torch.linspace(0, 3, width) + torch.linspace(0, 1, height)[:, None]
    return noise + 0.7 * noise[:, :1] + slope * torch.tensor([1.0, -2.0, 0.5])[:, None, None]


def periodic_component(channel):
    """Moisan's definition, in numpy: the jump across the border as an image, and a Poisson equation."""
    height, width = channel.shape
    jump = np.zeros((height, width))
    for y, other in ((0, -1), (-1, 0)):
        jump[y] += channel[other] - channel[y]
    for x, other in ((0, -1), (-1, 0)):
        jump[:, x] += channel[:, other] - channel[:, x]
    q, r = np.meshgrid(np.arange(height) / height, np.arange(width) / width, indexing="ij")
    laplacian = 2 * np.cos(2 * np.pi * q) + 2 * np.cos(2 * np.pi * r) - 4
    laplacian[0, 0] = 1
    return channel - np.fft.ifft2(np.fft.fft2(jump) / laplacian).real


def one_by_one(image, numbers):
    """One negative: an angle for each frequency, the opposite one for its opposite, in full complex transforms."""
    _, height, width = image.shape
    phase = np.zeros((height, width))
    for q in range(height):
        for r in range(width // 2 + 1):
            angle = 2 * np.pi * numbers[q, r]
            if r == 0 or 2 * r == width:  # frequencies that meet their own opposites here
                angle -= 2 * np.pi * numbers[-q % height, r]
            phase[q, r], phase[-q % height, -r % width] = angle, -angle
    result = []
    for channel in image:
        turned = np.fft.ifft2(np.fft.fft2(periodic_component(channel)) * np.exp(1j * phase))
        assert abs(turned.imag).max() < 1e-9
        noise = turned.real
        result.append((noise - noise.mean()) * channel.std() / noise.std() + channel.mean())
    return np.stack(result)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_equals_the_loop_over_frequencies(height, width):
    n, m = 3, 2
    query, key = pictures(n, height, width), keys(0, 4, torch.arange(n), 9)
    numbers = uniforms(key, m * height * (width // 2 + 1)).view(n, m, height, -1).double().numpy()
    expected = [[one_by_one(query[i].double().numpy(), numbers[i, j]) for j in range(m)] for i in range(n)]
    ours = generator(m)(query, key)
    assert ours.shape == (n, m, 3, height, width)
    torch.testing.assert_close(ours.double(), torch.from_numpy(np.array(expected)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_mean_deviation_spectrum_and_colours_stay(height, width):
    query = pictures(4, height, width)
    ours = generator()(query, keys(0, 0, torch.arange(4), 9))
    torch.testing.assert_close(ours.mean((3, 4)), query.mean((2, 3))[:, None].expand(-1, 2, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(ours.std((3, 4)), query.std((2, 3))[:, None].expand(-1, 2, -1), rtol=1e-4, atol=0)
    # Of every pair of channels at every frequency, up to one factor a channel.
    source, shown = periodic_spectrum(query)[:, None], torch.fft.rfft2(ours)
    for a, b in ((0, 0), (0, 1), (1, 2)):
        before, after = (s[:, :, a] * s[:, :, b].conj() for s in (source, shown))
        before, after = (s.flatten(2)[..., 1:] for s in (before, after))  # without the means
        before, after = (s / s.abs().sum(-1, keepdim=True) for s in (before, after))
        torch.testing.assert_close(after, before.expand_as(after), rtol=1e-3, atol=1e-5)


def test_a_border_leaves_no_stripes():
    """Of a slope nothing but the jump at its border is periodic, and the jump is taken out."""
    slope = pictures(1, 32, 32) * 0.05 + torch.linspace(0, 10, 32)[:, None]
    stripes = torch.fft.rfft2(slope)[0, 0, 1:, 0].abs().sum()
    assert periodic_spectrum(slope)[0, 0, 1:, 0].abs().sum() < 0.2 * stripes


def test_phases_are_uniform_and_depend_on_the_key_alone():
    query, key = pictures(1, 8, 8).expand(4000, -1, -1, -1), keys(0, 0, torch.arange(4000), 9)
    ours = generator(1)(query, key)[:, 0]
    angle = (torch.fft.rfft2(ours[:, 0]) * periodic_spectrum(query[:1, :1])[0].conj()).angle()
    for q, r in ((1, 0), (0, 1), (3, 2), (2, 4)):
        share = torch.histc(angle[:, q, r] / torch.pi, 8, -1, 1) / 4000
        assert (share - 0.125).abs().max() < 0.03
    chosen = torch.tensor([31, 2])
    torch.testing.assert_close(generator(1)(query[chosen], key[chosen])[:, 0], ours[chosen])
    assert not torch.allclose(ours[0], ours[1])


def test_flat_images_and_half_precision():
    key = keys(0, 0, torch.arange(2), 9)
    flat = torch.tensor([0.5, -1.0])[:, None, None, None].expand(2, 3, 8, 8)
    torch.testing.assert_close(generator(1)(flat, key)[:, 0], flat)
    query = pictures(2, 8, 8)
    half = generator()(query.bfloat16(), key)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), generator()(query, key), rtol=0.05, atol=0.1)
