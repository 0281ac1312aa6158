"""`python -m icl_msr.export`: an encoder of any run's last checkpoint, of use without this package."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from support.tiny import DATA, MODEL, composed, trained

from icl_msr import __version__
from icl_msr.core.errors import UserError
from icl_msr.core.folder import FORMAT, RunFolder
from icl_msr.export import main
from icl_msr.methods import Method
from icl_msr.models.backbones import Backbone
from icl_msr.models.exported import export_encoder, load_encoder
from icl_msr.training.checkpoint import AtomicCheckpoint
from icl_msr.training.checkpoints import Checkpoints

IMAGES = {"image_size": 32, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.2], "dataset": "confounded"}
CHOICES = {"method": "moco", "dataset": "confounded"}
BACKBONES = {
    "tiny": ("backbone=tiny",),
    "resnet18": ("backbone=resnet18",),
    "timm": ("backbone=timm", "backbone.name=test_vit", "+backbone.options.patch_size=8"),
}


@dataclass
class Trained:
    folder: Path
    method: Any


def train(folder: Path, *words: str) -> Trained:
    """A run folder that was never finished: two steps, the last ones saved."""
    words = ("regularizer=none", *words)
    folder.mkdir(exist_ok=True)
    keep = Checkpoints(folder / "checkpoints" / "last.ckpt", every_n_epochs=1, every_n_minutes=None)
    module, _ = trained(*words, callbacks=[keep], plugins=[AtomicCheckpoint()])
    OmegaConf.save(composed(*DATA, *MODEL, *words), folder / "config.yaml")
    about = {"images": IMAGES, "choices": CHOICES, "icl_msr": __version__}
    RunFolder(folder).write_facts(about)
    return Trained(folder, module.method.eval())


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """MoCo with every backbone; the momentum of 0.5 keeps its two encoders apart."""
    return {
        name: train(tmp_path_factory.mktemp(name), "method=moco", "method.momentum=0.5", *words)
        for name, words in BACKBONES.items()
    }


@pytest.fixture
def run(runs: dict[str, Trained], tmp_path: Path) -> Trained:
    """One of them, to change."""
    return Trained(shutil.copytree(runs["tiny"].folder, tmp_path / "run"), runs["tiny"].method)


def images() -> torch.Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


ELSEWHERE = """
import json, os, sys
sys.modules["icl_msr"] = None  # an import of it fails
import torch
images = torch.load("images.pt")
for folder in sys.argv[1:]:
    os.chdir(folder)
    scope = {}
    exec(json.load(open("encoder.json"))["load"], scope)
    with torch.no_grad():
        torch.save(scope["net"](images), "features.pt")
"""


def test_exports_load_without_this_package(runs: dict[str, Trained], tmp_path: Path) -> None:
    """Online and momentum encoders of every library, rebuilt in a process that cannot import icl_msr."""
    expected = {}
    for name, run in runs.items():
        method: Method = run.method
        for which, backbone in (("online", method.backbone), ("momentum", method.momentum_encoder.backbone.eval())):
            folder = tmp_path / name / which
            assert main([str(run.folder), "--encoder", which, "--to", str(folder)]) == 0
            with torch.no_grad():
                expected[str(folder)] = backbone(images())
    torch.save(images(), tmp_path / "images.pt")
    command = [sys.executable, "-I", "-c", ELSEWHERE, *expected]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for folder, features in expected.items():
        torch.testing.assert_close(torch.load(Path(folder) / "features.pt"), features, rtol=1e-5, atol=1e-6)
    online, momentum = list(expected.values())[:2]
    assert not torch.allclose(online, momentum, rtol=1e-2)


def test_what_it_prints_and_where_it_goes(run: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    for which, folder in (("online", run.folder), ("momentum", run.folder / "momentum")):
        assert main([str(run.folder), "--encoder", which]) == 0
        weights, about, empty, *lines = capsys.readouterr().out.splitlines()
        assert (weights, about, empty) == (f"{folder}/encoder.safetensors", f"{folder}/encoder.json", "")
        scope: dict[str, Any] = {}
        exec("\n".join(lines), scope)
        backbone, told = load_encoder(folder)
        assert torch.equal(scope["net"](images()), backbone(images()))
        assert told["encoder"] == which
        assert {**IMAGES, "choices": CHOICES, "icl_msr": __version__}.items() <= told.items()


def test_the_same_is_written_again_and_other_weights_are_not(run: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    method = run.method
    file = export_encoder(method.backbone, run.folder, {})  # as a finished run has it
    weights = file.read_bytes()
    assert main([str(run.folder)]) == 0
    assert file.read_bytes() == weights
    assert main([str(run.folder), "--encoder", "momentum", "--to", str(run.folder)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"{file} holds other weights; add --overwrite to replace them, or --to ANOTHER_FOLDER."
    assert file.read_bytes() == weights
    assert main([str(run.folder), "--encoder", "momentum", "--to", str(run.folder), "--overwrite"]) == 0
    assert file.read_bytes() != weights


def no_images(folder: Path) -> None:
    (folder / "environment.json").write_text(f'{{"format": {FORMAT}}}')


def another_backbone(folder: Path) -> None:
    config = OmegaConf.load(folder / "config.yaml")
    config.backbone = composed("backbone=resnet18").backbone
    OmegaConf.save(config, folder / "config.yaml")


def lost_package(folder: Path) -> None:
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("icl_msr.models.backbones.tiny", "mypkg.net"))


@pytest.mark.parametrize(
    ("change", "words", "parts"),
    [
        (shutil.rmtree, (), ["is not a run: it has no config.yaml"]),
        (lambda folder: (folder / "config.yaml").unlink(), (), ["is not a run: it has no config.yaml"]),
        (lambda folder: shutil.rmtree(folder / "checkpoints"), (), ["There is no checkpoint", "last.ckpt"]),
        (lambda folder: (folder / "checkpoints/last.ckpt").write_bytes(b"PK"), (), ["last.ckpt is damaged"]),
        (lambda folder: (folder / "environment.json").unlink(), (), ["does not say its format"]),
        (no_images, (), ["environment.json does not say what images"]),
        (another_backbone, (), ["cannot be rebuilt", "config.yaml"]),
        (lost_package, (), ["config.yaml is code of the package mypkg; if you trust it, add trust=mypkg."]),
        (lost_package, ("trust=mypkg",), ["cannot be rebuilt", "config.yaml", "No module named 'mypkg'"]),
        (lambda folder: None, ("other",), ["other is one word too many"]),
        (lambda folder: (folder / "config.yaml").write_text("seed: 0"), (), ["cannot be rebuilt", "'method'"]),
        (lambda folder: (folder / "config.yaml").write_text("a: ["), (), ["config.yaml is damaged"]),
        (lambda folder: (folder / "file").touch(), ("--to", "{run}/file"), ["file cannot be written", "--to FOLDER"]),
    ],
)
def test_mistakes(
    change: Callable[[Path], Any], words: tuple[str, ...], parts: list[str], run: Trained, capsys: Any
) -> None:
    change(run.folder)
    assert main([str(run.folder), *(word.format(run=run.folder) for word in words)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert all(part in line for part in parts), line
    assert line.endswith(".")
    assert not (run.folder / "encoder.safetensors").exists()


def test_a_method_without_a_momentum_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = train(tmp_path, "method=simclr")
    assert main([str(run.folder), "--encoder", "momentum"]) == 2
    assert "has no momentum encoder; type --encoder online." in capsys.readouterr().err
    assert main([str(run.folder)]) == 0


@pytest.mark.parametrize("method", ["supervised", "random"])
def test_a_method_without_a_projector(method: str, run: Trained) -> None:
    """How many classes a classifier has does not matter."""
    config = OmegaConf.load(run.folder / "config.yaml")
    config.method = composed(f"method={method}").method
    OmegaConf.save(config, run.folder / "config.yaml")
    assert main([str(run.folder)]) == 0
    assert torch.equal(load_encoder(run.folder)[0](images()), run.method.backbone(images()))


@torch.no_grad()
def test_a_method_with_two_encoders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CMC's: the two together, and each by itself."""
    run, out = train(tmp_path / "run", "method=cmc", "method.queue_size=16"), tmp_path / "out"
    backbone = run.method.backbone
    backbone.net.mean, backbone.net.std = IMAGES["mean"], IMAGES["std"]  # those that the folder tells of
    names = ("encoder", "encoder-l", "encoder-ab")
    files = [f"{out}/{name}.{kind}" for name in names for kind in ("safetensors", "json")]
    assert main([str(run.folder), "--to", str(out)]) == 0
    *printed, load = capsys.readouterr().out.split("\n", 7)
    assert printed == [*files, ""]
    scope: dict[str, Any] = {}
    exec(load, scope)
    expected = backbone(images())
    for net in (scope["net"], load_encoder(out)[0]):
        assert torch.equal(net(images()), expected)
    halves = [load_encoder(out / f"{name}.json")[0] for name in names[1:]]
    channels = backbone.net.split(images())
    assert torch.equal(torch.cat([net(c) for net, c in zip(halves, channels, strict=True)], dim=1), expected)

    assert main([str(run.folder), "--to", str(out)]) == 0
    (out / "encoder-ab.safetensors").write_bytes((out / "encoder-l.safetensors").read_bytes())
    assert main([str(run.folder), "--to", str(out)]) == 2
    assert "encoder-ab.safetensors holds other weights" in capsys.readouterr().err


def own(image_size: int) -> Backbone:
    """What a user's package may have: no weights key, no recipe."""
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * image_size**2, 8))
    return Backbone(
        net, 8, f"from torch import nn\nnet = nn.Sequential(nn.Flatten(), nn.Linear({3 * image_size**2}, 8))"
    )


def test_a_backbone_of_another_package(run: Trained) -> None:
    backbone = own(32)
    config = OmegaConf.load(run.folder / "config.yaml")
    config.backbone = {"_target_": f"{__name__}.own"}
    OmegaConf.save(config, run.folder / "config.yaml")
    state = {f"method.backbone.{name}": value for name, value in backbone.state_dict().items()}
    content = {"state_dict": state, "loops": {}, "global_step": 1}
    AtomicCheckpoint().save_checkpoint(content, run.folder / "checkpoints" / "last.ckpt")
    assert main([str(run.folder)]) == 2
    assert main([str(run.folder), f"trust={__name__.partition('.')[0]}"]) == 0
    scope: dict[str, Any] = {}
    about = json.loads((run.folder / "encoder.json").read_text())
    exec(about["load"].replace("encoder.safetensors", f"{run.folder}/encoder.safetensors"), scope)
    assert torch.equal(scope["net"](images()), backbone(images()))
    with pytest.raises(UserError, match="belongs to another package"):
        load_encoder(run.folder)


class Picky(torch.nn.Identity):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no images today")


def picky(image_size: int) -> Backbone:
    return Backbone(torch.nn.Sequential(torch.nn.Linear(2, 3), Picky()), 3, "")


def test_an_encoder_is_tried_before_it_is_written(run: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    config = OmegaConf.load(run.folder / "config.yaml")
    config.backbone = {"_target_": f"{__name__}.picky"}
    OmegaConf.save(config, run.folder / "config.yaml")
    state = {f"method.backbone.{name}": value for name, value in picky(32).state_dict().items()}
    content = {"state_dict": state, "loops": {}, "global_step": 1}
    AtomicCheckpoint().save_checkpoint(content, run.folder / "checkpoints" / "last.ckpt")
    assert main([str(run.folder), f"trust={__name__.partition('.')[0]}"]) == 2
    assert "cannot take images of 32 pixels" in capsys.readouterr().err
    assert not (run.folder / "encoder.safetensors").exists()
