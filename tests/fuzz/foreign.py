"""Let atheris change the bytes of one kind of file, and watch which branches of the parser it reaches.

`python -m fuzz.foreign KIND RUNS SEED` ends with an exit code other than 0 if a file is not answered in one sentence.
"""

import sys
import tempfile
from pathlib import Path

import atheris


def main(kind: str, runs: str, seed: str) -> None:
    """Try many contents of a kind of file, which begin as a valid one."""
    with atheris.instrument_imports(include=["icl_msr.data", "icl_msr.core", "icl_msr.report.runs", "PIL"]):
        from fuzz import parsers
    folder = parsers.make_folder(Path(tempfile.mkdtemp()))
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "valid").write_bytes(parsers.PARSERS[kind].valid)
    options = [f"-runs={runs}", f"-seed={seed}", "-max_len=4096", "-rss_limit_mb=6000", "-timeout=60", "-verbosity=0"]
    options += ["-print_final_stats=1", f"-artifact_prefix={folder}/"]
    atheris.Setup(["fuzz", *options, str(corpus)], lambda content: parsers.read(kind, folder, content))
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
