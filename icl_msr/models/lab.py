"""Two encoders of half width: one for the lightness of an image, one for its colours (CMC; Tian et al. 2020)."""

import copy
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from icl_msr.core.errors import UserError
from icl_msr.models.backbones import Backbone, from_recipe, resnet, tiny, with_weights


def to_lab(images: Tensor) -> Tensor:
    """Convert images to CIE 1976 L*a*b* under the white point D65, scaled.

    Args:
        images: (N, 3, H, W) sRGB in [0, 1] (IEC 61966-2-1). Values outside are clamped.

    Returns:
        (N, 3, H, W): L / 50 - 1, within [-1, 1]; a / 100 and b / 100, zero for grays and within [-1.1, 1.1].
    """
    images = images.clamp(0, 1)
    linear = torch.where(images > 0.04045, ((images + 0.055) / 1.055) ** 2.4, images / 12.92)
    red, green, blue = linear.unbind(1)
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    # XYZ is relative to white, whose value is the sum of a row.
    xyz = torch.stack([(r * red + g * green + b * blue) / (r + g + b) for r, g, b in to_xyz], dim=1)
    edge = 6 / 29
    x, y, z = torch.where(xyz > edge**3, xyz ** (1 / 3), xyz / (3 * edge**2) + 4 / 29).unbind(1)
    return torch.stack([(116 * y - 16) / 50 - 1, 5 * (x - y), 2 * (y - z)], dim=1)


def half(network: nn.Module, inputs: int) -> nn.Module:
    """Return a convolutional network with half the channels everywhere, new weights, and `inputs` input channels."""
    network = copy.deepcopy(network)
    for name, layer in list(network.named_modules()):
        if isinstance(layer, nn.Conv2d):
            channels = inputs if layer.in_channels == 3 else layer.in_channels // 2
            same = {key: getattr(layer, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
            narrow = nn.Conv2d(channels, layer.out_channels // 2, **same, bias=layer.bias is not None)
            nn.init.kaiming_normal_(narrow.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's
            network.set_submodule(name, narrow)
        elif isinstance(layer, nn.BatchNorm2d):
            network.set_submodule(name, nn.BatchNorm2d(layer.num_features // 2))
    return network


class LabNetwork(nn.Module):
    """A network from normalised images (N, 3, H, W) to features (N, c), first those of L, then those of ab.

    `mean` and `std` are those that the images were normalised with.
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.l = half(network, 1)
        self.ab = half(network, 2)
        self.mean, self.std = list(mean), list(std)

    def split(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of `l` and `ab`, (N, 1, H, W) and (N, 2, H, W), of normalised images (N, 3, H, W)."""
        exact = images.float() if images.dtype.itemsize < 4 else images
        channels = zip(exact.unbind(1), self.mean, self.std, strict=True)
        rgb = torch.stack([channel * std + mean for channel, mean, std in channels], dim=1)
        lab = to_lab(rgb).to(images.dtype)
        return lab[:, :1], lab[:, 1:]

    def forward(self, images: Tensor) -> Tensor:
        """Return features (N, c) of normalised images (N, 3, H, W)."""
        lightness, colours = self.split(images)
        return torch.cat([self.l(lightness), self.ab(colours)], dim=1)


IMPORTS = """import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
"""
SOURCE = "\n\n".join([IMPORTS, *(inspect.getsource(part) for part in (to_lab, half, LabNetwork))])
"""Python code that is written beside exported encoders: all of the above. So it may use only PyTorch."""


class LabBackbone(Backbone):
    """A backbone of two copies of a network, each with half its channels. c stays the same.

    It is used as any other backbone: normalised images in, features (N, c) out, first those of L, then those of ab.

    Raises:
        UserError: the network cannot be halved, or has weights that would be lost.
    """

    net: LabNetwork

    def __init__(self, whole: Backbone, mean: Sequence[float], std: Sequence[float]):
        layers = {type(m) for m in whole.net.modules() if list(m.parameters(recurse=False))}
        if hasattr(whole.net, "forward_features") or not layers <= {nn.Conv2d, nn.BatchNorm2d}:
            raise UserError(
                "CMC halves the channels of a network, which works only for plain convolutional ones; choose "
                "backbone=tiny or one of torchvision's ResNets, such as backbone=resnet18."
            )
        if whole.pretrained is not None:
            raise UserError(
                f"CMC's two encoders of half width start from random weights, and backbone.weights={whole.pretrained} "
                "fit only a whole network; drop backbone.weights."
            )
        mean, std = [float(m) for m in mean], [float(s) for s in std]
        load = f"{whole.load}\n\n{SOURCE}\n\nnet = LabNetwork(net, mean={mean}, std={std})"
        recipe = {"builder": "lab_encoder", "whole": whole.recipe, "mean": mean, "std": std}
        net = LabNetwork(whole.net, mean, std)
        super().__init__(net, whole.channels // 2 * 2, load, recipe if whole.recipe else None)
        self.whole = (whole.load, whole.recipe)

    def maps(self, images: Tensor) -> Tensor:
        """Return the last feature maps of both encoders, (N, c, h, w), of images (N, 3, H, W)."""
        parts = zip(self.parts().values(), self.net.split(images), strict=True)
        return torch.cat([part.maps(channels) for part, channels in parts], dim=1)

    def parts(self) -> dict[str, Backbone]:
        """Return the encoder of L and the encoder of ab, which take channels of `to_lab`."""
        load, recipe = self.whole
        parts: dict[str, Backbone] = {}
        for name, net, inputs, channels in (("l", self.net.l, 1, ":1"), ("ab", self.net.ab, 2, "1:")):
            takes = f"# takes to_lab(images)[:, {channels}] of RGB images (N, 3, H, W) in [0, 1], not normalised"
            source = f"{load}\n\n{SOURCE}\n\nnet = half(net, {inputs})  {takes}"
            about = {"builder": "half_encoder", "whole": recipe, "inputs": inputs}
            parts[name] = Backbone(net, self.channels // 2, source, about if recipe else None)
        return parts


def lab_encoder(*, whole: dict[str, Any], mean: list[float], std: list[float], weights: str | None) -> Backbone:
    """Build a `LabBackbone` from the recipe of the network that it halves."""
    return with_weights(LabBackbone(_plain(whole), mean, std), weights)


def half_encoder(*, whole: dict[str, Any], inputs: Literal[1, 2], weights: str | None) -> Backbone:
    """Build one part of a `LabBackbone`: the encoder of L (`inputs` 1) or of ab (`inputs` 2)."""
    parts = LabBackbone(_plain(whole), (0, 0, 0), (1, 1, 1)).parts()
    return with_weights(parts["l" if inputs == 1 else "ab"], weights)


def _plain(recipe: dict[str, Any]) -> Backbone:
    return from_recipe(recipe, None, {"tiny": tiny, "resnet": resnet})
