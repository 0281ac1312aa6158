import itertools

import torch
import torchvision.transforms.v2.functional as F

from icl_msr.augment import colour
from icl_msr.core.randomness import keys, uniforms


def pictures(n):
    images = uniforms(keys(1, 0, torch.arange(n), 0), 3 * 16 * 16).view(n, 3, 16, 16)
    images[:, :, :2] = (images[:, :, :2] > 0.5).float()  # saturated corners of the colour cube
    images[:, :, 2:4] = images[:, :1, 2:4]  # grays
    images[:, 1, 4:6] = images[:, 2, 4:6]  # ties
    return images


def test_jitter_is_torchvisions_in_every_order():
    order = torch.tensor(list(itertools.permutations(range(4))))
    n = len(order)
    factors = torch.lerp(
        torch.tensor([0.2, 0.2, 0.2, -0.5]),
        torch.tensor([1.8, 1.8, 1.8, 0.5]),
        uniforms(keys(2, 0, torch.arange(n), 0), 4),
    )
    factors[0] = torch.tensor([1, 1, 1, 0])
    images = pictures(n)
    ours = colour.jitter(images, factors, order)
    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue]
    for image, factor, sequence, view in zip(images, factors.tolist(), order.tolist(), ours, strict=True):
        reference = image
        for operation in sequence:
            reference = steps[operation](reference, factor[operation])
        torch.testing.assert_close(view, reference, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours[0], images[0], atol=1e-6, rtol=0)


def test_grayscale_and_solarize_are_torchvisions():
    images = pictures(4)
    chosen = torch.tensor([True, False, True, False])
    gray, solarized = colour.grayscale(images, chosen), colour.solarize(images, chosen)
    for i in range(4):
        expected_gray = F.rgb_to_grayscale(images[i], 3) if chosen[i] else images[i]
        torch.testing.assert_close(gray[i], expected_gray, atol=1e-6, rtol=0)
        torch.testing.assert_close(
            solarized[i], F.solarize(images[i], 0.5) if chosen[i] else images[i], atol=1e-6, rtol=0
        )
