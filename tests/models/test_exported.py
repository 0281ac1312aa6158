"""Checkpoints survive any end of the process and are data alone; exported encoders are of use without icl_msr."""

import errno
import json
import multiprocessing
import os
import pickle
import signal
import zipfile
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny import dataset, trained

from icl_msr.core.errors import UserError
from icl_msr.core.storage import atomic_write
from icl_msr.models.backbones import Backbone, resnet, timm_model, tiny
from icl_msr.models.checkpoint import read_checkpoint
from icl_msr.models.exported import export_encoder, load_encoder
from icl_msr.training.checkpoint import AtomicCheckpoint
from icl_msr.training.checkpoints import Checkpoints
from icl_msr.training.online import OnlineEvaluation
from icl_msr.training.progress import EpochLines, Throughput

BACKBONES = {
    "tiny": lambda: tiny(32, weights=None),
    "resnet18": lambda: resnet(32, name="resnet18", stem="auto", weights=None),
    "test_resnet": lambda: timm_model(32, name="test_resnet", options={"drop_path_rate": 0.1}, weights=None),
    "test_vit": lambda: timm_model(32, name="test_vit", options={"patch_size": 8}, weights=None),
}


def checkpoint(fill: float, size: int = 300_000) -> dict[str, Any]:
    return {"state_dict": {"method.w": torch.full((size,), fill)}, "loops": {}, "global_step": int(fill)}


def fill(file: Path) -> float:
    return float(read_checkpoint(file)["state_dict"]["method.w"].unique())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A checkpoint in its run folder."""
    file = tmp_path / "run" / "checkpoints" / "last.ckpt"
    (tmp_path / "run").mkdir()
    AtomicCheckpoint().save_checkpoint(checkpoint(1), file)
    return file


# Written whole or not at all


def dies(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def dies_half_way(content: Any, stream: Any) -> None:
    stream.write(b"PK" + bytes(500_000))
    stream.flush()
    dies()


def in_a_process(work: Callable[[], None]) -> int | None:
    """Its exit code."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join()
    return process.exitcode


@pytest.mark.parametrize(
    ("module", "name", "death"),
    [(torch, "save", dies_half_way), (os, "fsync", dies), (os, "replace", dies)],
    ids=["half written", "not yet on the disk", "not yet in place"],
)
def test_a_killed_save_leaves_the_old_checkpoint(module: Any, name: str, death: Any, file: Path) -> None:
    def work() -> None:
        setattr(module, name, death)  # of the forked process
        AtomicCheckpoint().save_checkpoint(checkpoint(2), file)

    assert in_a_process(work) == -signal.SIGKILL
    assert fill(file) == 1
    assert len(list(file.parent.iterdir())) == 2
    AtomicCheckpoint().save_checkpoint(checkpoint(3), file)
    assert list(file.parent.iterdir()) == [file]
    assert fill(file) == 3


def test_the_content_is_on_the_disk_before_it_takes_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (did.append(os.readlink(f"/proc/self/fd/{number}")), fsync(number)))
    monkeypatch.setattr(os, "replace", lambda old, new: (did.append(f"-> {new}"), replace(old, new)))
    (tmp_path / "new").mkdir()
    atomic_write(tmp_path / "new" / "a.json", "{}")
    assert did == [f"{tmp_path}/new/.a.json.tmp", f"-> {tmp_path}/new/a.json", f"{tmp_path}/new"]


@pytest.mark.parametrize(
    ("write", "advice"),
    [
        (lambda file: AtomicCheckpoint().save_checkpoint(checkpoint(2), file), "continue with resume={run}."),
        (lambda file: atomic_write(file, b"x" * 100_000), "repeat the command."),
        (lambda file: atomic_write(file, "x"), "repeat the command."),
    ],
)
def test_a_full_disk(write: Callable[[Path], None], advice: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said by the kernel itself: what is written beside the file goes to /dev/full."""
    temporary = file.parent / ".last.ckpt.tmp"
    monkeypatch.setattr(Path, "open", lambda path, mode: FileIO("/dev/full", "w") if path == temporary else None)
    with pytest.raises(
        UserError, match=r"The disk of .*/checkpoints is full; the previous last\.ckpt.* is kept"
    ) as told:
        write(file)
    assert str(told.value).endswith("free space and " + advice.format(run=file.parents[1]))
    assert not temporary.exists()
    assert fill(file) == 1


def test_a_link_in_the_way_is_not_followed(file: Path, tmp_path: Path) -> None:
    """The file that is written first has a known name; a link of that name leads nowhere."""
    (tmp_path / "victim").write_text("precious")
    (file.parent / ".last.ckpt.tmp").symlink_to(tmp_path / "victim")
    AtomicCheckpoint().save_checkpoint(checkpoint(2), file)
    assert (tmp_path / "victim").read_text() == "precious"
    assert fill(file) == 2


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EDQUOT, UserError),
        (errno.EFBIG, UserError),
        (errno.EROFS, UserError),
        (errno.EIO, UserError),
        (errno.ENXIO, OSError),
    ],
)
def test_what_cannot_be_written_is_said(number: int, kind: type, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(kind):
        AtomicCheckpoint().save_checkpoint(checkpoint(2), file)
    assert list(file.parent.iterdir()) == [file]
    assert fill(file) == 1


def test_a_deleted_folder_is_not_made_again(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/gone was deleted while it was in use; keep it and repeat the command\.$"
    ):
        atomic_write(tmp_path / "gone" / "a.json", "{}")
    assert not (tmp_path / "gone").exists()


def test_text_and_bytes(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "Wörter\n")
    assert (tmp_path / "a").read_bytes() == "Wörter\n".encode()
    atomic_write(tmp_path / "a", b"\0")
    assert (tmp_path / "a").read_bytes() == b"\0"


# Read as data alone


@pytest.mark.parametrize("method", ["moco", "byol", "simclr"])
def test_a_run_is_saved_and_continued_as_plain_data(method: str, tmp_path: Path) -> None:
    """All that a real checkpoint holds, callbacks included, is read with weights_only."""
    file = tmp_path / "last.ckpt"

    def fit(epochs: int) -> dict[str, Any]:
        throughput = Throughput(8)
        trained(
            f"method={method}",
            "negatives=patch",
            "regularizer.every=1",
            callbacks=[
                Checkpoints(file, every_n_epochs=1, every_n_minutes=None),
                throughput,
                OnlineEvaluation(dataset(), 128, every_n_epochs=1, seed=0, bank=4000, queries=1000),
                EpochLines(throughput),
            ],
            plugins=[AtomicCheckpoint()],
            max_epochs=epochs,
            ckpt_path=file if file.exists() else None,
        )
        return read_checkpoint(file)

    first = fit(1)
    assert torch.serialization.get_unsafe_globals_in_checkpoint(file) == []
    saved = {name.partition("{")[0] for name in first["callbacks"]}
    assert (first["global_step"], saved) == (2, {"Checkpoints", "OnlineEvaluation", "Throughput"})
    assert fit(2)["global_step"] == 4


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def damaged(content: bytes, *, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda file: file.unlink(), "There is no checkpoint"),
        (lambda file: file.write_bytes(b""), "is damaged, cut short"),
        (lambda file: file.write_bytes(os.urandom(10_000)), "is damaged, cut short"),
        (lambda file: os.truncate(file, 1000), "is damaged, cut short"),
        (lambda file: os.truncate(file, file.stat().st_size - 1), "is damaged, cut short"),
        (lambda file: file.write_bytes(damaged(file.read_bytes(), at=100_000)), "is damaged, cut short"),
        (lambda file: torch.save({"state_dict": {"method.w": torch.ones(1)}}, file), "is not a checkpoint of icl_msr"),
        (lambda file: torch.save({**checkpoint(1), "state_dict": {"w": 1}}, file), "is not a checkpoint of icl_msr"),
        (lambda file: torch.save({**checkpoint(1), "state_dict": None}, file), "is not a checkpoint of icl_msr"),
        (lambda file: torch.save([1], file), "is not a checkpoint of icl_msr"),
        (lambda file: zipfile.ZipFile(file, "w").writestr("a", "b"), "is not a checkpoint of icl_msr"),
        (lambda file: torch.save({**checkpoint(1), "net": torch.nn.Linear(1, 1)}, file), "could execute code"),
    ],
)
def test_other_files_are_refused(change: Callable[[Path], Any], sentence: str, file: Path) -> None:
    change(file)
    with pytest.raises(UserError, match=sentence) as told:
        read_checkpoint(file)
    assert str(file) in str(told.value)
    with pytest.raises(UserError, match=sentence):  # nor does Lightning get it
        AtomicCheckpoint().load_checkpoint(file, weights_only=False)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_bombs_do_not_go_off(form: str, tmp_path: Path) -> None:
    file, crater = tmp_path / "last.ckpt", tmp_path / "crater"
    bomb = {**checkpoint(1), "callbacks": {"x": Bomb(crater)}}
    if form == "pickle":
        file.write_bytes(pickle.dumps(bomb))
    else:
        torch.save(bomb, file, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match="could execute code" if form == "zip" else "is damaged"):
        read_checkpoint(file)
    assert not crater.exists()
    torch.load(file, weights_only=False) if form != "pickle" else pickle.loads(file.read_bytes())
    assert crater.exists()


# The encoder


@pytest.mark.parametrize("name", list(BACKBONES))
@torch.no_grad()
def test_what_the_json_says_rebuilds_the_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone: Backbone = BACKBONES[name]()
    for _ in range(2):
        backbone(torch.randn(4, 3, 32, 32))  # running statistics of their own
    backbone.to(memory_format=torch.channels_last)
    path = export_encoder(backbone, tmp_path, {"mean": (0.5, 0.5, 0.5), "dataset": "toys"})
    assert path == tmp_path / "encoder.safetensors"
    about: dict[str, Any] = json.loads((tmp_path / "encoder.json").read_text())
    assert (about["channels"], about["dataset"], about["mean"]) == (backbone.channels, "toys", [0.5, 0.5, 0.5])

    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(about["load"], scope)
    assert "icl_msr" not in about["load"]
    assert not scope["net"].training
    images = torch.randn(4, 3, 32, 32)
    backbone.to(memory_format=torch.contiguous_format)  # sums in another order differ in the last bit
    expected = backbone.eval()(images)
    assert torch.equal(scope["net"](images), expected)

    for given in (tmp_path, path, tmp_path / "encoder.json"):
        again, told = load_encoder(given)
        assert told == about
        assert (again.channels, again.load, again.recipe) == (backbone.channels, backbone.load, backbone.recipe)
        assert not again.training
        assert torch.equal(again(images), expected)


def test_the_file_holds_the_plain_networks_tensors(tmp_path: Path) -> None:
    backbone = tiny(32, weights=None)
    path = export_encoder(backbone, tmp_path, {})
    tensors = load_file(path)
    assert tensors.keys() == backbone.net.state_dict().keys()
    assert all(torch.equal(tensors[name], value) for name, value in backbone.net.state_dict().items())


def test_a_network_of_another_package_is_exported_and_not_rebuilt(tmp_path: Path) -> None:
    backbone = Backbone(torch.nn.Linear(2, 3), 3, "from mypkg import net")
    export_encoder(backbone, tmp_path, {})
    assert load_file(tmp_path / "encoder.safetensors").keys() == {"weight", "bias"}
    with pytest.raises(UserError, match=r"encoder\.json belongs to another package, whose own function"):
        load_encoder(tmp_path)


RESNET = {"builder": "resnet", "image_size": 32, "name": "resnet18", "stem": "small"}
TIMM = {"builder": "timm_model", "image_size": 32, "name": "test_resnet", "options": {}}
UNKNOWN = "has a recipe that is unknown here"


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ({"builder": "os.system", "command": "true"}, UNKNOWN),
        ({"builder": ["tiny"], "image_size": 32}, UNKNOWN),
        ({"image_size": 32}, UNKNOWN),
        ("tiny", UNKNOWN),
        ([], UNKNOWN),
        ({"builder": "tiny"}, UNKNOWN),
        ({"builder": "tiny", "image_size": "32"}, UNKNOWN),
        ({"builder": "tiny", "image_size": 32, "width": 2}, UNKNOWN),
        ({**RESNET, "stem": "large"}, UNKNOWN),
        ({**RESNET, "name": "resnet18();import os;os.mkdir('crater')#"}, "is not a torchvision ResNet"),
        ({**TIMM, "name": "hf-hub:someone/test_resnet"}, "is not a timm model"),
        ({**TIMM, "name": "local-dir:/tmp"}, "is not a timm model"),
        ({**TIMM, "options": {"a=__import__('os').mkdir('crater'), b": 1}}, "is not possible"),
        ({**TIMM, "options": {"checkpoint_path": "bomb.pth"}}, r"backbone\.options\.checkpoint_path is not possible"),
        ({**TIMM, "options": {"pretrained": True}}, r"backbone\.options\.pretrained is not possible"),
        ({**TIMM, "options": {"pretrained_cfg": {"file": "bomb.pth"}}}, "is not possible"),
        ({**TIMM, "options": {"features_only": True}}, r"backbone\.options\.features_only is not possible"),
        ({**TIMM, "options": {"depth": 1}}, "timm cannot build test_resnet"),
        (RESNET, "belongs to another backbone"),
    ],
)
def test_recipes_are_data(recipe: Any, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the known functions are called, and with what they take."""
    monkeypatch.chdir(tmp_path)
    torch.save(Bomb(tmp_path / "crater"), "bomb.pth")
    export_encoder(tiny(32, weights=None), tmp_path, {})
    about = json.loads(Path("encoder.json").read_text())
    bomb = "import os; os.mkdir('crater')"
    Path("encoder.json").write_text(json.dumps({**about, "recipe": recipe, "load": bomb}))
    with pytest.raises(UserError, match=sentence) as told:
        load_encoder(tmp_path)
    assert "encoder.json" in str(told.value)
    assert "\n" not in str(told.value)
    assert not Path("crater").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: (folder / "encoder.json").unlink(), r"encoder\.json is missing"),
        (lambda folder: (folder / "encoder.safetensors").unlink(), r"encoder\.safetensors is missing"),
        (lambda folder: (folder / "encoder.json").write_text('{"channels": 1'), r"encoder\.json is damaged"),
        (lambda folder: (folder / "encoder.json").write_text("[]"), r"encoder\.json is damaged"),
        (lambda folder: (folder / "encoder.json").write_text("{}"), r"encoder\.json is damaged"),
        (lambda folder: (folder / "encoder.json").write_bytes(b"\xff"), r"encoder\.json is damaged"),
        (lambda folder: os.truncate(folder / "encoder.safetensors", 5000), "cannot be read as safetensors"),
        (lambda folder: os.truncate(folder / "encoder.safetensors", 0), "cannot be read as safetensors"),
    ],
)
def test_incomplete_exports_are_refused(change: Callable[[Path], Any], sentence: str, tmp_path: Path) -> None:
    export_encoder(tiny(32, weights=None), tmp_path, {})
    change(tmp_path)
    for given in (tmp_path, tmp_path / "encoder.safetensors", tmp_path / "encoder.json"):
        with pytest.raises(UserError, match=sentence):
            load_encoder(given)
