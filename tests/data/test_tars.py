"""Tars from anybody: what is read, and what is refused before anything of it is used."""

import io
import json
import tarfile
from collections.abc import Callable

import pytest

from icl_msr.core.errors import UserError
from icl_msr.data import tars


def info(name: str, size: int = 0, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.size, made.type, made.linkname = size, kind, link
    return made


def tar(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=form) as made:
        for about, data in members:
            made.addfile(about, io.BytesIO(data))
    return file.getvalue()


def scan(data: bytes) -> list[tars.Sample]:
    def read(offset: int, length: int) -> bytes:
        assert length <= 1 << 20, "much is read at once"
        return data[offset : offset + length]

    samples = tars.parse(tars.scan(read, len(data), "a.tar"), len(data))
    assert samples is not None
    return samples


GOOD = (info("a/0.x.png", 3), b"abc"), (info("a/0.cls", 1), b"7"), (info("a/1.PNG", 600), b"y" * 600)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_and_their_places(form: int) -> None:
    long = (info("d/" * 120 + "ü.png", 2), b"zz")
    members = (
        (info("a", kind=tarfile.DIRTYPE), b""),
        *GOOD,
        (info("._0.png", 1), b"x"),
        (info("__MACOSX/0.png", 1), b"x"),
    )
    data = tar(*members, *([] if form == tarfile.USTAR_FORMAT else [long]), form=form)
    first, second, *rest = scan(data)
    assert (first.key, list(first.members), first.texts) == ("a/0", ["x.png", "cls"], {"cls": "7"})
    assert (second.key, list(second.members)) == ("a/1", ["png"])
    assert [data[o : o + n] for o, n in [*first.members.values(), *second.members.values()]] == [
        b"abc",
        b"7",
        b"y" * 600,
    ]
    assert [sample.key for sample in rest] == ([] if form == tarfile.USTAR_FORMAT else ["d/" * 120 + "ü"])


def test_what_is_written_is_indexed_as_it_is_scanned_and_equal_each_time() -> None:
    samples = [(f"{i:08d}", {"jpg": b"j" * i * 100, "cls": b"3", "json": b"{}", "mask.png": b"m"}) for i in range(9)]
    first, second = io.BytesIO(), io.BytesIO()
    index = tars.write(first, samples)
    assert tars.write(second, samples) == index
    data = first.getvalue()
    assert second.getvalue() == data
    assert tars.scan(lambda at, n: data[at : at + n], len(data), "a.tar") == index


def broken_header(data: bytes) -> bytes:
    return data[:1024] + b"\xff" * 512 + data[1536:]


def longname_of(size: int) -> bytes:
    head = info("././@LongLink", 0, tarfile.GNUTYPE_LONGNAME)
    head.size = size
    return head.tobuf(tarfile.GNU_FORMAT) + b"a" * 1024


def many_headers() -> bytes:
    head = info("././@LongLink", 2, tarfile.GNUTYPE_LONGNAME).tobuf(tarfile.GNU_FORMAT)
    return (head + b"a\0".ljust(512, b"\0")) * 3000 + tar(*GOOD)


def negative_size() -> bytes:
    about = info("a.png", 5)
    about.pax_headers = {"size": "-1024"}
    return tar((info("0.png", 3), b"abc"), (about, b"hello"))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "above": (tar((info("../a.png", 1), b"x")), r"holds the name '\.\./a\.png', which leads elsewhere"),
    "above inside": (tar((info("a/../../a.png", 1), b"x")), "leads elsewhere"),
    "absolute": (tar((info("/etc/a.png", 1), b"x")), r"holds the name '/etc/a\.png'"),
    "backslash": (tar((info("..\\a.png", 1), b"x")), "leads elsewhere or cannot be shown"),
    "terminal": (tar((info("\x1b[2Ja.png", 1), b"x")), "leads elsewhere or cannot be shown"),
    "long": (tar((info("a" * 2000 + ".png", 1), b"x")), "leads elsewhere or cannot be shown"),
    "link": (tar((info("a.png", 0, tarfile.SYMTYPE, "/etc/passwd"), b"")), r"holds 'a\.png', which is a link"),
    "hard link": (tar(*GOOD, (info("b.png", 0, tarfile.LNKTYPE, "a/1.png"), b"")), "which is a link"),
    "pipe": (tar((info("a.png", 0, tarfile.FIFOTYPE), b"")), "which is not a regular file"),
    "device": (tar((info("a.png", 0, tarfile.CHRTYPE), b"")), "which is not a regular file"),
    "twice": (tar(*GOOD, (info("a/1.png", 1), b"x")), r"holds 'a/1\.png' twice"),
    "two places": (tar(*GOOD, (info("a/0.png", 1), b"x")), "holds the sample 'a/0' in two places"),
    "cut in a member": (tar(*GOOD)[:2700], "is cut short"),
    "cut in a header": (tar(*GOOD)[:1100], "is cut short"),
    "cut at a member": (tar(*GOOD)[:1024], "is cut short"),
    "damaged": (broken_header(tar(*GOOD)), "is damaged at byte 1024"),
    "no tar": (b"hello" * 1000, "is not a tar that can be read"),
    "empty": (b"", "is not a tar that can be read"),
    "compressed": (b"\x1f\x8b" + b"\0" * 2000, "is compressed"),
    "huge member": (info("a.png", 1 << 40).tobuf(tarfile.GNU_FORMAT) + b"\0" * 2048, "is cut short|cannot be read"),
    "huge name": (longname_of(1 << 32), "a header of unreasonable size"),
    "endless headers": (many_headers(), "is not a tar that can be read"),
    "negative size": (negative_size(), "is cut short or damaged|cannot be read"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_tars_are_refused(name: str) -> None:
    data, sentence = HOSTILE[name]
    with pytest.raises(UserError, match=sentence) as refused:
        scan(data)
    assert str(refused.value).startswith("a.tar ")
    assert str(refused.value).isprintable()


def test_sparse_members_are_refused() -> None:
    head = bytearray(info("a.png", 0, tarfile.GNUTYPE_SPARSE).tobuf(tarfile.GNU_FORMAT))
    head[483:495] = b"%011o\0" % 700
    head[148:156] = b"        "
    head[148:156] = b"%06o\0 " % sum(head)
    with pytest.raises(UserError, match="which is not a regular file"):
        scan(bytes(head) + b"\0" * 2048)


def changed(change: Callable[[dict], object]) -> bytes:  # type: ignore[type-arg]
    data = tar(*GOOD)
    index = json.loads(tars.scan(lambda at, n: data[at : at + n], len(data), "a.tar"))
    change(index)
    return json.dumps(index).encode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not JSON",
        b"[1]",
        b"[" * 100_000,
        changed(lambda index: index.update(bytes=7)),
        changed(lambda index: index.update(format="icl-msr index 2")),
        changed(lambda index: index["samples"][0][1].update(png=[0, 10**9])),
        changed(lambda index: index["samples"][0][1].update(png=[-1, 10])),
        changed(lambda index: index["samples"][0][1].update(png=["0", 10])),
        changed(lambda index: index["samples"][0][1].update(png=[10])),
        changed(lambda index: index["samples"][0][2].update(cls=7)),
        changed(lambda index: index["samples"].append(7)),
    ],
)
def test_an_index_that_does_not_fit_is_made_anew(content: bytes) -> None:
    size = len(tar(*GOOD))
    assert tars.parse(changed(lambda index: None), size) is not None
    assert tars.parse(content, size) is None


def test_an_index_with_a_name_that_leads_elsewhere_is_refused() -> None:
    def change(index: dict) -> None:  # type: ignore[type-arg]
        index["samples"][0][0] = "../0"

    with pytest.raises(UserError, match="leads elsewhere"):
        tars.parse(changed(change), len(tar(*GOOD)))
