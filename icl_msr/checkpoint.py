"""What a run leaves for others: the encoder, without anything of this package."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save

from icl_msr.encoders import Backbone


def export_encoder(backbone: Backbone, folder: Path, facts: Mapping[str, Any]) -> Path:
    """Writes `encoder.safetensors` and `encoder.json` into a folder.

    The weights fit the plain torchvision or timm model that the Python under `load` builds; `facts` (data set, mean,
    standard deviation, image size, method, ...) are plain data that stand beside it.
    """
    path = folder / "encoder.safetensors"
    # safetensors keeps no strides: weights in channels_last are laid out again.
    path.write_bytes(save({name: tensor.cpu().contiguous() for name, tensor in backbone.net.state_dict().items()}))
    load = (
        f"{backbone.load}\n\nfrom safetensors.torch import load_file\n\n"
        'net.load_state_dict(load_file("encoder.safetensors"))\nnet.eval()'
    )
    about = {"channels": backbone.channels, **facts, "load": load}
    (folder / "encoder.json").write_text(json.dumps(about, indent=2) + "\n")
    return path
