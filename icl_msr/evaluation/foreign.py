"""Encoders that other programs made: by name from timm or torchvision, with their weights or with random ones."""

import difflib
import re
from collections.abc import Sequence

import torch
import torchvision
from torch import nn

from icl_msr.checkpoint import BUILDERS
from icl_msr.data.folders import IMAGENET_MEAN, IMAGENET_STD
from icl_msr.encoders import Backbone, from_recipe, resnet, timm_model, with_weights
from icl_msr.errors import UserError

LIBRARIES = ("timm", "torchvision")


def require_known(library: str, name: str) -> None:
    """Looks the name up, before anything is built.

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
        # Those for images: not for video, nor for boxes or masks, which lie in modules of their own.
        known = torchvision.models.list_models(torchvision.models)
        known = [] if name in known else known
    if known:
        near = difflib.get_close_matches(name, known, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else f"{library}'s list_models() lists them all."
        raise UserError(f"encoder={library}:{name} is no {library} model; {advice}")


def foreign_encoder(library: str, name: str, image_size: int, weights: str | None, seed: int) -> Backbone:
    """A model without its classifier, for images of `image_size` pixels.

    `weights` are the library's own, by its name, those in a .safetensors file, or, with None, random ones that depend
    on `seed` alone.

    Raises:
        UserError: there is no such model, or the weights cannot be had or do not fit.
    """
    require_known(library, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if library == "timm":
            return timm_model(image_size, name=name, options={}, weights=weights)
        if re.match(r"(wide_)?resne(x)?t\d", name):
            # As torchvision has it, whatever the size of the image.
            return resnet(image_size, name=name, stem="standard", weights=weights)
        return _torchvision(name, image_size, weights)


def _torchvision(name: str, image_size: int, weights: str | None) -> Backbone:
    """Any other model: its last linear layer is the classifier, and is taken off."""
    size = f", image_size={image_size}" if name.startswith("vit_") else ""
    net = torchvision.models.get_model(name, **({"image_size": image_size} if size else {}))
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
    """Mean and standard deviation of the channels, of values in [0, 1], that a model was made for."""
    if library == "timm":
        import timm

        about = timm.get_pretrained_cfg(name)
        if about is not None:
            return about.mean, about.std
    return IMAGENET_MEAN, IMAGENET_STD


def untrained_copy(backbone: Backbone, seed: int) -> Backbone | None:
    """The same network with random weights that depend on `seed` alone; None where its recipe is not known."""
    if backbone.recipe is None:
        return None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return from_recipe(backbone.recipe, None, BUILDERS)
