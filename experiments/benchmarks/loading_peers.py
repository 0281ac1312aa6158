"""Peers of `loading.py`, which starts this in an environment that has them and nothing of ours.

It prints the names of the rows, then reads a name per line, reads an epoch, and prints the name again.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any


def read(loader: Any) -> None:
    """Read an epoch."""
    for _ in loader:
        pass


def dali(folder: Path, threads: int, batch: int, side: int) -> Callable[[], None]:
    """Return a call that reads an epoch by NVIDIA DALI on the CPU, which has threads in place of workers."""
    from nvidia.dali import fn, pipeline_def, types  # type: ignore[import-not-found,import-untyped,unused-ignore]

    @pipeline_def(batch_size=batch, num_threads=threads, device_id=None, prefetch_queue_depth=2)  # type: ignore[untyped-decorator]
    def views() -> Any:
        data, _ = fn.readers.file(file_root=str(folder), random_shuffle=True)
        image = fn.decoders.image(data, device="cpu", output_type=types.RGB)
        crops = [fn.random_resized_crop(image, size=(side, side), antialias=True) for _ in range(2)]
        flipped = [fn.flip(crop, horizontal=fn.random.coin_flip()) for crop in crops]
        return tuple(fn.transpose(view, perm=(2, 0, 1)) for view in flipped)

    pipeline, images = views(), len(list(folder.rglob("*.jpg")))
    pipeline.build()

    def epoch() -> None:
        for _ in range(images // batch):
            pipeline.run()

    return epoch


def main(words: Sequence[str] | None = None) -> None:
    """Answer on standard output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("shards", "folder"):
        parser.add_argument(name, type=Path)
    for name in ("workers", "batch", "side"):
        parser.add_argument(name, type=int)
    options = parser.parse_args(words)
    folder, workers, batch = options.folder, options.workers, options.batch
    out, sys.stdout = sys.stdout, sys.stderr  # the peers print too
    import litdata  # type: ignore[import-not-found]
    import torch
    import webdataset  # type: ignore[import-not-found]
    from PIL import Image
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    view = v2.Compose([v2.RandomResizedCrop(options.side, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])

    def two(content: bytes) -> tuple[Any, Any]:
        image = Image.open(BytesIO(content)).convert("RGB")
        return view(image), view(image)

    tars = sorted(str(file) for file in options.shards.glob("train-*.tar"))
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars), empty_check=False).shuffle(1000)
    samples = samples.to_tuple("jpg").map_tuple(two).map(lambda sample: sample[0])
    keys: dict[str, Any] = {"num_workers": workers, "persistent_workers": True}
    streams = str(folder.parent / "litdata")
    litdata.optimize(
        fn=Path.read_bytes,
        inputs=sorted((folder / "train").rglob("*.jpg")),
        output_dir=streams,
        chunk_bytes="16MB",
        num_workers=1,
    )

    multiprocessing.set_start_method("fork", force=True)  # litdata chooses spawn, which cannot take local functions

    class Streaming(litdata.StreamingDataset):  # type: ignore[misc]
        def __getitem__(self, index: Any) -> tuple[Any, Any]:
            return two(super().__getitem__(index))

    loaders: dict[str, Any] = {
        "webdataset": webdataset.WebLoader(samples, batch_size=batch, **keys),
        "litdata": litdata.StreamingDataLoader(Streaming(streams, shuffle=True), batch_size=batch, **keys),
    }
    calls: dict[str, Callable[[], None]] = {name: partial(read, loader) for name, loader in loaders.items()}
    with suppress(ImportError):
        calls["DALI"] = dali(folder / "train", workers, batch, options.side)
    print(", ".join(calls), file=out, flush=True)
    for line in sys.stdin:
        calls[line.strip()]()
        print(line.strip(), file=out, flush=True)


if __name__ == "__main__":
    main()
