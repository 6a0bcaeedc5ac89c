"""Coverage-guided fuzzing of the same targets with atheris (libFuzzer for Python).

    python tests/fuzz/guided.py graph 600           ten minutes on one target; stops at the first finding

It is many times faster and goes deeper than hypothesis, but it finds one thing at a time, is not deterministic, and
runs only on Linux; so `make test` and `make fuzz` use hypothesis. It writes a finding to crash-… here, and
`python tests/fuzz/guided.py graph crash-…` reproduces it. Needs `pip install -e ".[fuzz]"`.
"""

import os
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[2]))
READERS = [
    f"qcompiler.{name}"
    for name in ("artefact", "calibration.store", "checkpoints", "dialects", "ir", "knobs", "pass_manager", "text")
]
with atheris.instrument_imports(include=READERS):
    from folder_targets import FOLDER_TARGETS
    from targets import TEXT_TARGETS, Target, folder

    from qcompiler import entry_points
    from qcompiler.errors import QCompilerError

LIMITS = ["-max_len=16384", "-timeout=20", "-rss_limit_mb=4096"]


def main(name: str, how_long: str) -> int:
    """Runs one target for some seconds, or on the input in a file; returns the exit status of libFuzzer."""
    target = {**TEXT_TARGETS, **FOLDER_TARGETS}[name]
    entry_points.entry_points = cache(metadata.entry_points)  # type: ignore[assignment, attr-defined]  # as in test_fuzz.py
    options = [how_long] if Path(how_long).is_file() else [*corpus(target), f"-max_total_time={how_long}"]
    child = os.fork()
    if child == 0:  # libFuzzer ends its process without removing the folder
        atheris.Setup([sys.argv[0], *LIMITS, *options], lambda data: read(target, data))
        atheris.Fuzz()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def corpus(target: Target) -> list[str]:
    """Options for libFuzzer: the seeds and the dictionary."""
    seeds, words = folder() / "corpus", folder() / "words"
    seeds.mkdir()
    for index, seed in enumerate(target.seeds):
        (seeds / str(index)).write_bytes(seed)
    spelled = ("".join(f"\\x{byte:02x}" for byte in word) for word in target.words if word)
    words.write_text("".join(f'"{word}"\n' for word in spelled))
    return [f"-dict={words}", str(seeds)]


def read(target: Target, data: bytes) -> None:
    """One input: accepted, or rejected with QCompilerError."""
    try:
        target.read(data)
    except QCompilerError as error:
        str(error)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
