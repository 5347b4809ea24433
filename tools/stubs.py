"""Make cap_nb/all.pyi, cap_nb/__init__.pyi and cap_nb/methods.txt, or with --check see whether they are up to date.

`cap_nb` and `cap_nb.all` import a public name when it is first asked for, which type checkers and editors cannot follow.
The stubs say where each name lives; they are read and never run. The list of methods is what `cap methods` prints, so
that it need not load the methods.
"""
import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def stubs() -> dict[Path, str]:
    """The files by path."""
    sys.path.insert(0, str(ROOT))
    from cap_nb.all import public_names
    from cap_nb.methods.prune import method_list

    homes = public_names(ROOT / "cap_nb")
    lines = [f"from {home} import {name} as {name}" for name, home in sorted(homes.items())]
    text = "\n".join(["# Made by tools/stubs.py from the modules' __all__.", *lines, ""])
    here = ROOT / "cap_nb"
    return {here / "all.pyi": text, here / "__init__.pyi": text + "__version__: str\n", here / "methods.txt": method_list() + "\n"}


def main() -> None:
    """Write the stubs, or compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="say which file differs, and write nothing")
    checking = parser.parse_args().check
    for path, text in stubs().items():
        if checking and (not path.exists() or path.read_text(encoding="utf-8") != text):
            sys.exit(f"{path.relative_to(ROOT)} is not what the modules make: run python tools/stubs.py and commit it.")
        if not checking:
            path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
