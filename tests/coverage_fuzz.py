"""One reader fuzzed by atheris, which looks for inputs that reach new lines of cap_nb.

    python tests/coverage_fuzz.py READER RUNS FOLDER    exit code 0, or that of libFuzzer with the input that it found

It begins with inputs that hypothesis drew. One that takes ten seconds, or the process to 4 GiB, is a finding too.
atheris is no requirement: `make soak` installs it where there is a wheel, or where it builds.
"""
import sys
import warnings
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
with atheris.instrument_imports(include=["cap_nb"]):
    from test_nothing_let_in import READERS, lay_out

from cap_nb.core.errors import BadInput

LIMITS = ["-timeout=10", "-rss_limit_mb=4096", "-max_len=8192", "-print_final_stats=1", "-seed=1", "-verbosity=0"]


def main(reader, runs, folder):
    """Fuzz one reader in a folder, which its caller removes."""
    read, name, contents = READERS[reader]
    (folder / "seeds").mkdir()
    lay_out(folder, reader)
    warnings.simplefilter("ignore")  # hypothesis would rather have no examples drawn here
    for number in range(100):
        (folder / "seeds" / f"{number}").write_bytes(contents.example())

    def one(data):
        (folder / name).write_bytes(data)
        try:
            read(folder / name)
        except BadInput as error:
            assert len(str(error).splitlines()) == 1

    atheris.Setup([sys.argv[0], f"-runs={runs}", f"-artifact_prefix={folder}/", *LIMITS, str(folder / "seeds")], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
