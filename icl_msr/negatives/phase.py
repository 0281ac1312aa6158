"""Phase negatives: noise with the spectrum and the colours of an image (Galerne, Gousseau and Morel 2011)."""

import math

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor

from icl_msr.core.randomness import uniforms
from icl_msr.core.views import AlphaMode, AlphaSchedule


class PhaseNegatives:
    """Gives every frequency of an image a random phase. Second-order statistics stay; places and shapes are lost.

    The three channels of a frequency are rotated by the same angle, so that the correlations of the colours are kept at
    every distance. A spectrum belongs to an image that is repeated without end, and the jump at its border would show
    as stripes. So the spectrum is that of the image's periodic component (Moisan 2011). Each channel is then scaled
    back to the mean and the standard deviation of the image.
    """

    def __init__(
        self,
        *,
        count: PositiveInt,
        alpha: PositiveFloat,
        alpha_mode: AlphaMode,
        alpha_schedule: AlphaSchedule,
        repulsion: NonNegativeFloat,
    ) -> None:
        self.count = count
        # The losses read these; see `icl_msr.core.views.NonSemantic`.
        self.alpha, self.alpha_mode, self.alpha_schedule = alpha, alpha_mode, alpha_schedule
        self.repulsion = repulsion

    def __call__(self, query: Tensor, keys: Tensor) -> Tensor:
        """Return m negatives of each image, (N, m, C, H, W).

        Args:
            query: floating point (N, C, H, W), usually the first view, augmented and normalised.
            keys: int64 (N,), from `icl_msr.core.randomness.keys`, on the device of the images.
        """
        n, _, height, width = query.shape
        with torch.autocast(query.device.type, enabled=False):
            images = query.float()
            numbers = uniforms(keys, self.count * height * (width // 2 + 1)).view(n, self.count, 1, height, -1)
            turned = periodic_spectrum(images)[:, None] * _random_phases(numbers, width)
            turned[..., 0, 0] = 0
            noise = torch.fft.irfft2(turned, s=(height, width))
            mean = images.mean((2, 3), keepdim=True)
            scale = (_power(images - mean)[:, None] / _power(noise).clamp(min=1e-12)).sqrt()
            return torch.addcmul(mean[:, None], noise, scale).to(query.dtype)


def periodic_spectrum(images: Tensor) -> Tensor:
    """Return `rfft2`, complex (N, C, H, W // 2 + 1), of the periodic component of images, float (N, C, H, W).

    The periodic component is the image minus a smooth component, whose Laplacian is the jump across the border (Moisan
    2011, eq. 11, 12). The jump is zero outside the first and last rows and columns, so one-dimensional transforms give
    its spectrum.
    """
    height, width = images.shape[-2:]
    q = 2 * math.pi * torch.fft.fftfreq(height, device=images.device)[:, None]
    r = 2 * math.pi * torch.fft.rfftfreq(width, device=images.device)
    rows = torch.fft.rfft(images[..., -1, :] - images[..., 0, :])[..., None, :]
    columns = torch.fft.fft(images[..., -1] - images[..., 0])[..., None]
    jump = rows * (1 - torch.polar(torch.ones_like(q), q)) + columns * (1 - torch.polar(torch.ones_like(r), r))
    laplacian = 2 * q.cos() + 2 * r.cos() - 4
    laplacian[0, 0] = 1  # the jump has no mean
    spectrum: Tensor = torch.fft.rfft2(images) - jump * laplacian.reciprocal()
    return spectrum


def _power(images: Tensor) -> Tensor:
    """Return the mean square of each channel: (..., H, W) to (..., 1, 1)."""
    return images.square().mean((-2, -1), keepdim=True)


def _random_phases(numbers: Tensor, width: int) -> Tensor:
    """Return exp(i phi) for the spectrum of a real image from uniform numbers in [0, 1), both (..., H, W // 2 + 1).

    Two columns hold both a frequency and its negative, whose phase is the opposite. The mean is not rotated.
    """
    phase = 2 * math.pi * numbers
    for column in {0, width // 2} if width % 2 == 0 else {0}:
        own = phase[..., column]
        phase[..., column] = own - own.flip(-1).roll(1, -1)
    return torch.polar(torch.ones_like(phase), phase)
