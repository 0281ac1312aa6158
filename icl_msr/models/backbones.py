"""Backbones with a stem that fits the image size."""

import difflib
import inspect
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from pydantic import ConfigDict, validate_call
from torch import Tensor, nn

from icl_msr.core.errors import UserError, reason
from icl_msr.models.weights import read_weights


class Origin(NamedTuple):
    """A model of another library."""

    library: str
    """`timm` or `torchvision`."""
    name: str
    options: Mapping[str, Any]
    """Further arguments for the library, beside the name."""
    seed: int
    """Seed of random weights."""


class Backbone(nn.Module):
    """A network from images (N, 3, H, W) to pooled features (N, c).

    `net` is a plain torchvision or timm model without its classifier, so other programs can load its state dict.
    """

    def __init__(self, net: nn.Module, channels: int, load: str = "", recipe: Mapping[str, Any] | None = None):
        super().__init__()
        self.net = net
        self.channels = channels
        self.load = load
        """Python code that builds `net` without this package. It is written beside every exported encoder."""
        self.recipe = recipe
        """The same as plain data, for `exported.load_encoder`: the name of a function under `builder`, and its
        arguments. None if another package built `net`."""
        self.pretrained: str | None = None
        """Source of its weights; None: they are random."""
        self.origin: Origin | None = None
        """The model of another library that it is, if any."""

    @property
    def name(self) -> str:
        """The model's name for messages."""
        if self.origin is not None:
            return f"{self.origin.library}:{self.origin.name}"
        recipe = self.recipe or {}
        return str(recipe.get("name") or recipe.get("builder") or type(self.net).__name__)

    def require_size(self, image_size: int, advice: str) -> None:
        """Check by one forward pass that the network takes square images and gives features (N, channels).

        Args:
            image_size: side of the images in pixels.
            advice: what the user can type instead, for the error message.

        Raises:
            UserError: the network does not take such images, or gives something else.
        """
        width = measured_width(self, self.name, image_size, advice)
        if width != self.channels:
            raise UserError(
                f"{self.name} gives features of {width} channels, and its `channels` says {self.channels}; correct it "
                "where the backbone is built."
            )

    def parts(self) -> dict[str, "Backbone"]:
        """Return encoders inside this one that are useful by themselves. They are exported beside the whole one."""
        return {}

    def forward(self, images: Tensor) -> Tensor:
        """Return pooled features (N, c) of images (N, 3, H, W)."""
        features: Tensor = self.net(images)
        return features

    def last_stage(self) -> list[nn.Parameter]:
        """Return the parameters of the last block of layers: layer4 of a ResNet, the last block of a transformer.

        Containers that hold nearly all parameters are opened. Layers after the block, such as a norm, belong to it.
        """
        inside: nn.Module = self.net
        after: list[nn.Parameter] = []
        while True:
            parts = [list(child.parameters()) for child in inside.children()]
            heavy = [i for i, part in enumerate(parts) if any(p.ndim > 1 for p in part)]
            if not heavy:
                return [*inside.parameters(), *after]
            last, whole = parts[heavy[-1]], list(inside.parameters())
            if sum(p.numel() for p in last) < 0.9 * sum(p.numel() for p in whole):
                return [p for part in [*parts[heavy[-1] :], after] for p in part]
            after = [p for part in [*parts[heavy[-1] + 1 :], after] for p in part]
            inside = list(inside.children())[heavy[-1]]

    def maps(self, images: Tensor) -> Tensor:
        """Return the last feature map (N, c, h, w) of images (N, 3, H, W), in the channels of the features.

        The patch tokens of a transformer are laid out as a grid.

        Raises:
            UserError: the network has no such map. For example, a layer behind the pooling makes other channels.
        """
        last = self._last_map(images)
        if last is None or last.ndim != 4 or last.shape[1] != self.channels:
            raise UserError(
                f"{self.name} has no last feature map of {self.channels} channels like its features; choose another "
                "backbone."
            )
        return last

    def _last_map(self, images: Tensor) -> Tensor | None:
        if not hasattr(self.net, "forward_features"):
            for layer in self.net.children():
                if isinstance(layer, nn.AdaptiveAvgPool2d | nn.Flatten):
                    break
                images = layer(images)
            return images
        net: Any = self.net
        features = net.forward_features(images)
        if not isinstance(features, Tensor):
            return None
        if features.ndim == 3:
            tokens = features[:, getattr(net, "num_prefix_tokens", 0) :]
            side = math.isqrt(tokens.shape[1])
            square = side > 1 and side * side == tokens.shape[1]  # a single token may be the class token
            return tokens.mT.reshape(len(tokens), -1, side, side) if square else None
        return features.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else features


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Set a network to evaluation mode inside the context, and restore the mode of every submodule afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        network.train()  # until this call, LeViT of older timm keeps what it computed from its weights
        for module, training in modes:
            module.training = training


@torch.no_grad()
def measured_width(network: nn.Module, name: str, image_size: int, advice: str) -> int:
    """Return the number of channels of a network's pooled features, from one forward pass of two black images.

    The network and the state of the random generators are not changed.

    Args:
        network: from images (N, 3, H, W) to features (N, c), on the CPU.
        name: the model's name, for the error message.
        image_size: H and W in pixels.
        advice: what the user can type instead, for the error message.

    Raises:
        UserError: the network does not take such images, or its result is not (N, c).
    """
    try:
        with evaluating(network), torch.random.fork_rng(devices=[]):
            features = network(torch.zeros(2, 3, image_size, image_size))
    except Exception as error:
        raise UserError(f"{name} cannot take images of {image_size} pixels ({reason(error)}); {advice}.") from None
    if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != 2:
        found = f"shape {tuple(features.shape)}" if isinstance(features, Tensor) else type(features).__name__
        raise UserError(
            f"{name} gives a result of {found} for two images, and pooled features (images, channels) are needed; "
            "choose another backbone or its options."
        )
    return features.shape[1]


def tiny_network() -> nn.Module:
    """Return a ResNet of three blocks: (N, 3, H, W) to (N, 128)."""
    from torchvision.models.resnet import BasicBlock  # here, because torchvision takes as long as torch

    def shortcut(width: int, wider: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, wider, 1, 2, bias=False), nn.BatchNorm2d(wider))

    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 32, 3, 2, 1, bias=False),
            bn1=nn.BatchNorm2d(32),
            relu=nn.ReLU(inplace=True),
            layer1=BasicBlock(32, 32),
            layer2=BasicBlock(32, 64, 2, shortcut(32, 64)),
            layer3=BasicBlock(64, 128, 2, shortcut(64, 128)),
            avgpool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
        )
    )


def tiny(image_size: int, *, weights: str | None) -> Backbone:
    """Build a small ResNet for studies on a CPU: 12 M multiply-adds at 32 px, c = 128, a 4 x 4 last map."""
    recipe = {"builder": "tiny", "image_size": image_size}
    return with_weights(Backbone(tiny_network(), 128, _TINY, recipe), weights)


_TINY = f"""from collections import OrderedDict

from torch import nn

{inspect.getsource(tiny_network)}
net = tiny_network()"""


def resnet(image_size: int, *, name: str, stem: Literal["auto", "small", "standard"], weights: str | None) -> Backbone:
    """Build a torchvision ResNet by name. Small images get a small stem.

    The small stem is a 3 x 3 convolution of stride 1. Up to 48 px the max-pool is removed too; at 64 and 96 px it stays
    (ICL-MSR, section 6.2). `auto` selects the small stem up to 96 px.

    Raises:
        UserError: torchvision has no ResNet of that name, or the weights do not fit.
    """
    import torchvision  # imported here, because it takes as long as torch, and many modules need only `Backbone`

    known = [n for n in torchvision.models.list_models() if n.startswith(("resnet", "resnext", "wide_resnet"))]
    if name not in known:
        raise UserError(f"backbone.name={name} is not a torchvision ResNet; choose one of {', '.join(sorted(known))}.")
    load = f"import torchvision\nfrom torch import nn\n\nnet = torchvision.models.{name}()\nnet.fc = nn.Identity()"
    net = getattr(torchvision.models, name)()
    net.fc = nn.Identity()
    if stem == "auto":
        stem = "small" if image_size <= 96 else "standard"
    if stem == "small":
        load += "\nnet.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)"
        net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        if image_size <= 48:
            load += "\nnet.maxpool = nn.Identity()"
            net.maxpool = nn.Identity()
    channels = 512 if name in ("resnet18", "resnet34") else 2048
    recipe = {"builder": "resnet", "image_size": image_size, "name": name, "stem": stem}
    return with_weights(Backbone(net, channels, load, recipe), weights, torchvision_name=name)


def timm_model(image_size: int, *, name: str, options: dict[str, Any], weights: str | None) -> Backbone:
    """Build a timm model by name. `options` go to `timm.create_model`; transformers also get the image size.

    Raises:
        UserError: timm is missing or has no such model, or the model refuses the image size or an option.
    """
    try:
        import timm
    except ImportError:
        raise UserError(
            "backbone=timm needs timm, which is not installed; type: pip install 'icl-msr[timm]'."
        ) from None
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() lists them all."
        raise UserError(f"backbone.name={name} is not a timm model; {advice}")
    _require_plain(options)
    options = dict(options)
    if "img_size" in inspect.signature(timm.create_model(name).__class__.__init__).parameters:
        options.setdefault("img_size", image_size)
    arguments = "".join(f", {key}={value!r}" for key, value in options.items())
    load = f"import timm\n\nnet = timm.create_model({name!r}, num_classes=0{arguments})"
    recipe = {"builder": "timm_model", "image_size": image_size, "name": name, "options": options}
    try:
        net = timm.create_model(name, num_classes=0, **options)
    except Exception as error:
        raise UserError(f"timm cannot build {name} with {options}: {reason(error)}.") from error
    # num_features is not the width of every model, and a size that does not fit fails only in a forward pass.
    made_for = int(getattr(net, "pretrained_cfg", {}).get("input_size", (3, image_size))[-1])
    advice = f"set dataset.image_size={made_for}" if made_for != image_size else "choose another model"
    channels = measured_width(net, name, image_size, advice)
    return with_weights(Backbone(net, channels, load, recipe), weights, timm_name=name)


_NO_OPTIONS = ("cache_dir", "num_classes", "features_only", "out_indices", "feature_cls", "exportable", "scriptable")
"""Keywords of `timm.create_model` that are not keywords of a model, or that prevent pooled features."""


def _require_plain(options: Mapping[str, Any]) -> None:
    """Check that options are plain data. They become Python source, and an encoder.json may be of unknown origin."""
    for key, value in options.items():
        if not key.isidentifier() or key in _NO_OPTIONS or key.startswith(("pretrained", "checkpoint")):
            raise UserError(
                f"backbone.options.{key} is not possible; options are keywords of the model, which gives pooled "
                "features, and weights come by backbone.weights."
            )
        try:
            plain = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError):
            plain = False
        if not plain:
            raise UserError(
                f"backbone.options.{key}={value!r} is not plain data; give text, numbers, lists or mappings."
            )


def from_recipe(
    recipe: Mapping[str, Any], weights: str | None, builders: Mapping[str, Callable[..., Backbone]]
) -> Backbone:
    """Build the network of a recipe with the given functions. Their annotations are checked.

    Raises:
        AttributeError, KeyError, TypeError, ValidationError: the recipe is not valid.
        UserError: there is no such network, or the weights do not fit.
    """
    keys = {key: value for key, value in recipe.items() if key != "builder"}
    build = validate_call(config=ConfigDict(strict=True))(builders[recipe["builder"]])
    return build(**{**keys, "weights": weights})


def with_weights(
    backbone: Backbone,
    weights: str | None,
    torchvision_name: str | None = None,
    timm_name: str | None = None,
    beside: Collection[str] = (),
) -> Backbone:
    """Load weights into a backbone and return it.

    Args:
        backbone: the network that is loaded.
        weights: a .safetensors file, a run folder, `torchvision` or `timm`. None: the weights stay random.
        torchvision_name: the network's name in torchvision, if it has one.
        timm_name: the network's name in timm, if it has one.
        beside: names of tensors that a file may hold in addition, such as those of a classifier. A file's layers of
            which the network has none, by the first part of their names, are left out too.

    Raises:
        UserError: there are no such weights, or they do not fit.
    """
    if weights is None:
        return backbone
    if weights == "torchvision" and torchvision_name:
        import torchvision

        state = _download(lambda: torchvision.models.get_model(torchvision_name, weights="DEFAULT"), weights)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        if state["conv1.weight"].shape != backbone.net.get_parameter("conv1.weight").shape:
            raise UserError("backbone.weights=torchvision fits the standard stem only; add backbone.stem=standard.")
    elif weights == "timm" and timm_name:
        import timm

        state = _download(lambda: timm.create_model(timm_name, pretrained=True, num_classes=0), weights)
    else:
        state = read_weights(weights, backbone.net)
    layers = {name.partition(".")[0] for name in backbone.net.state_dict()}  # others are left out, such as a projector
    state = {n: tensor for n, tensor in state.items() if n not in beside and n.partition(".")[0] in layers}
    missing = backbone.net.state_dict().keys() ^ state.keys()
    shapes = [n for n, t in backbone.net.state_dict().items() if n in state and state[n].shape != t.shape]
    if missing or shapes:
        raise UserError(
            f"backbone.weights={weights} belongs to another backbone (it differs in {sorted(missing or shapes)[0]}); "
            "choose the backbone that it was trained with."
        )
    backbone.net.load_state_dict(state)
    backbone.pretrained = weights
    return backbone


def _download(build: Callable[[], nn.Module], source: str) -> dict[str, Tensor]:
    try:
        return build().state_dict()
    except Exception as error:
        raise UserError(
            f"backbone.weights={source} could not be downloaded ({error}); fetch the weights where there is "
            "internet and give the path of a .safetensors file."
        ) from None
