"""Encoders of timm or torchvision by name, with their own weights or with random ones."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torchvision
from torch import nn

from icl_msr.core.errors import UserError
from icl_msr.core.imagenet import IMAGENET_CLASSES, IMAGENET_MEAN, IMAGENET_STD
from icl_msr.models.backbones import Backbone, Origin, from_recipe, resnet, timm_model, with_weights
from icl_msr.models.exported import BUILDERS
from icl_msr.models.weights import read_weights

LIBRARIES = ("timm", "torchvision")


def require_known(library: str, name: str) -> None:
    """Check that a library has a model of this name, before anything is built.

    Raises:
        UserError: the library has no such model, or is not installed.
    """
    if library == "timm":
        try:
            import timm
        except ImportError:
            raise UserError(
                f"encoder=timm:{name} needs timm, which is not installed; type: pip install 'icl-msr[timm]'."
            ) from None
        known = [] if timm.is_model(name) else timm.list_models()
    else:
        # Only models for images. Those for video, boxes or masks are in other modules.
        known = torchvision.models.list_models(torchvision.models)
        known = [] if name in known else known
    if known:
        near = difflib.get_close_matches(name, known, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else f"{library}'s list_models() lists them all."
        raise UserError(f"encoder={library}:{name} is not a {library} model; {advice}")


def foreign_encoder(library: str, name: str, image_size: int, weights: str | None, seed: int) -> Backbone:
    """Build a model of another library without its classifier, for images of `image_size` pixels.

    Args:
        library: `timm` or `torchvision`.
        name: the model's name there.
        image_size: side of the images in pixels.
        weights: the library's name for its own weights, or a .safetensors file, with or without the classifier. None:
            random weights.
        seed: seed of random weights, which depend on nothing else.

    Raises:
        UserError: there is no such model, or the weights are not available or do not fit.
    """
    require_known(library, name)
    own = weights in (None, library)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if library == "timm":
            backbone = timm_model(image_size, name=name, options={}, weights=weights if own else None)
            options = dict(backbone.recipe["options"]) if backbone.recipe else {}
        else:
            options = {"image_size": image_size} if name.startswith("vit_") else {}
            backbone = _torchvision(name, image_size, options, weights if own else None)
        backbone.origin = Origin(library, name, options, seed)
        if not own:
            classifier = _whole(backbone.origin).state_dict().keys() - backbone.net.state_dict().keys()
            with_weights(backbone, weights, beside=classifier)
    return backbone


def with_classifier(encoder: nn.Module) -> Backbone:
    """Build a whole model of another library: images to scores (N, 1000) of ImageNet's classes.

    All weights except the classifier's are those of `encoder`, which is not changed. A random classifier depends only
    on the seed.

    Raises:
        UserError: the encoder is not such a model, or its classifier has other classes or no weights.
    """
    if not isinstance(encoder, Backbone) or encoder.origin is None:
        raise UserError(
            "evaluation.head=true needs an encoder with a classifier of its own, encoder=timm:NAME or "
            "encoder=torchvision:NAME; leave it out."
        )
    origin, weights = encoder.origin, encoder.pretrained
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(origin.seed)
        net = _whole(origin, pretrained=weights == origin.library)
    layers = [layer for layer in net.modules() if isinstance(layer, nn.Linear)]
    classes = int(getattr(net, "num_classes", layers[-1].out_features if layers else 0))
    if classes != IMAGENET_CLASSES:
        raise UserError(
            f"The classifier of {origin.library}:{origin.name} has {classes} classes, and evaluation.head=true needs "
            f"ImageNet's {IMAGENET_CLASSES}; leave it out, or choose another encoder."
        )
    names, state = net.state_dict().keys(), encoder.net.state_dict()
    if weights not in (None, origin.library):
        read = read_weights(weights, encoder.net)
        lacking = sorted(names - state.keys() - read.keys())
        if lacking:
            raise UserError(f"{weights} has no classifier ({lacking[0]} is missing); leave out evaluation.head=true.")
        state = {**read, **state}
    net.load_state_dict({name: state[name] for name in names & state.keys()}, strict=False)
    return Backbone(net, classes, f"{encoder.load}\n# and the classifier")


def _whole(origin: Origin, pretrained: bool = False) -> nn.Module:
    """Return the model as its library builds it."""
    net: nn.Module
    if origin.library == "timm":
        import timm

        net = timm.create_model(origin.name, pretrained=pretrained, **origin.options)
    else:
        weights = "DEFAULT" if pretrained else None
        net = torchvision.models.get_model(origin.name, weights=weights, **origin.options)
    return net


def _torchvision(name: str, image_size: int, options: Mapping[str, Any], weights: str | None) -> Backbone:
    """Build a torchvision model without its last linear layer, the classifier."""
    if re.match(r"(wide_)?resne(x)?t\d", name):
        # The stem is torchvision's own at any image size.
        return resnet(image_size, name=name, stem="standard", weights=weights)
    size = "".join(f", {key}={value}" for key, value in options.items())
    net = torchvision.models.get_model(name, **options)
    last = [(where, layer) for where, layer in net.named_modules() if isinstance(layer, nn.Linear)]
    if not last:
        raise UserError(f"encoder=torchvision:{name} does not end with a linear layer; take it from timm, timm:NAME.")
    where, classifier = last[-1]
    net.set_submodule(where, nn.Identity())
    load = (
        f"import torchvision\nfrom torch import nn\n\nnet = torchvision.models.get_model({name!r}{size})\n"
        f"net.set_submodule({where!r}, nn.Identity())"
    )
    backbone = Backbone(net, classifier.in_features, load)
    if weights == "torchvision":
        try:
            whole = torchvision.models.get_model(name, weights="DEFAULT")
        except Exception as error:
            raise UserError(
                f"The weights of torchvision:{name} could not be downloaded ({str(error).splitlines()[0]}); fetch them "
                "where there is internet and give the path of a .safetensors file, or weights=null for random ones."
            ) from None
        state = {key: value for key, value in whole.state_dict().items() if not key.startswith(f"{where}.")}
        try:
            net.load_state_dict(state)
        except RuntimeError:
            raise UserError(
                f"The weights of torchvision:{name} do not fit images of {image_size} pixels; set dataset.image_size."
            ) from None
        backbone.pretrained = weights
        return backbone
    return with_weights(backbone, weights)


def statistics_of(library: str, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Return the mean and standard deviation of the channels, of values in [0, 1], that a model was trained with."""
    if library == "timm":
        import timm

        about = timm.get_pretrained_cfg(name)
        if about is not None:
            return about.mean, about.std
    return IMAGENET_MEAN, IMAGENET_STD


def image_size_of(library: str, name: str) -> int | None:
    """Return the side in pixels of the images that the library's own weights are meant for; None if it is not known."""
    if library == "timm":
        import timm

        about = timm.get_pretrained_cfg(name)
        return None if about is None else int(about.input_size[-1])
    size: int = torchvision.models.get_model_weights(name)["DEFAULT"].transforms().crop_size[0]
    return size


def untrained_copy(backbone: Backbone, seed: int) -> Backbone | None:
    """Return the same network with random weights that depend only on `seed`; None if its recipe is not known."""
    if backbone.recipe is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return from_recipe(backbone.recipe, None, BUILDERS)
