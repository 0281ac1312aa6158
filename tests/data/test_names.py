import pickle

import pytest
import torch

from icl_msr.data.files import FileSplit
from icl_msr.data.names import Names

WORDS = ["a/b.png", "", "Käse/Ωμέγα.jpg", "bad\udcff.png", "lone\ud800"]


def test_names_are_the_same_strings() -> None:
    names = Names(WORDS)
    assert list(names) == WORDS
    assert [names[-1], names[-5], names[1:4], names[::-2]] == [WORDS[-1], WORDS[0], WORDS[1:4], WORDS[::-2]]
    assert list(pickle.loads(pickle.dumps(names))) == WORDS
    assert names.index(WORDS[2]) == 2
    assert list(Names([])) == []
    for outside in (5, -6):
        with pytest.raises(IndexError, match="5 names"):
            names[outside]


def test_a_split_of_files_is_small_for_workers() -> None:
    """A list of strings costs each of them an object, which workers copy; names cost their letters and a number."""
    count = 20_000
    files = [f"{i:020d}" for i in range(count)]
    split = FileSplit(files, torch.zeros(count, dtype=torch.int64), 32, mask_files=files)
    for names in (split.files, split.part(torch.arange(count)).files, split.mask_files):
        assert isinstance(names, Names)
        assert len(pickle.dumps(names)) < 29 * count
        assert names[count - 1] == files[-1]
