"""The versions that cap_nb runs with: every cell of a table in an environment of its own, with what is needed to run.

    python tools/matrix.py                        # every cell: about ten minutes and 6 GB of disk each, one at a time
    python tools/matrix.py 3.11/oldest/newest     # Python/torch/transformers: this cell alone; several may be named

For each cell a wheel of HEAD is installed in a temporary folder, with the oldest or the newest torch and transformers
that settings.ini admits and the newest of everything else. There every public name is imported, `cap --help` and `cap
methods` are called, and the lab's job is run on few examples. The result goes into figures/versions/versions.json,
which nbs/results/05_supported_families shows; a cell that cannot be had stays there with the reason. An interpreter is
found on PATH as python3.11 and the like.
"""
import argparse
import configparser
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement

from cap_nb.core.files import read_checked, write_checked

ROOT = Path(__file__).resolve().parents[1]
RECORD = ROOT / "figures" / "versions" / "versions.json"
ENDS = (("oldest", "oldest"), ("newest", "oldest"), ("newest", "newest"))  # Of torch and of transformers
CELLS = [f"{python}/{torch}/{transformers}" for python in ("3.10", "3.11", "3.12", "3.13") for torch, transformers in ENDS]
CELLS.append("3.11/oldest/newest")
IMPORTS = """
import importlib.metadata, json, platform, cap_nb.all
for name in cap_nb.all.__all__: getattr(cap_nb.all, name)
versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "pandas", "datasets")}
print(json.dumps({"python": platform.python_version(), "public names": len(cap_nb.all.__all__), "versions": versions}))
"""
DEMO = ["run", "--model", "lab", "--device", "cpu", "--n", "6", "--k", "2", "--evaluate-n", "4", "--loss-n", "12", "--max-new-tokens", "48",
        "--windows", "2", "--window-tokens", "64", "--sparsity", "0.2", "--methods", "cap,wanda,magnitude"]


class NotHad(Exception):
    "A cell that this machine cannot be given."


def asked(cell):
    "What a cell asks for."
    return {"asked": dict(zip(("python", "torch", "transformers"), cell.split("/")))}


def called(words, folder):
    "What a program prints; one that fails raises its last line."
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in words], cwd=folder, capture_output=True, text=True,
                          env=kept | {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "MPLBACKEND": "Agg"})
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise RuntimeError(next((line for line in said if line.startswith("ERROR: No matching")), said[-1]))
    return done.stdout


def interpreter(version):
    "The first program of that name on PATH that runs."
    for folder in os.environ["PATH"].split(os.pathsep):
        program = shutil.which(f"python{version}", path=folder)
        if program and subprocess.run([program, "-c", "import ensurepip, venv"], capture_output=True).returncode == 0: return program
    raise NotHad(f"no Python {version} here")


def pins(torch, transformers):
    "What pip is asked for besides the wheel."
    settings = configparser.ConfigParser()
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    admitted = {each.name: each.specifier for each in map(Requirement, settings["DEFAULT"]["requirements"].split())}
    oldest = {name: next(part.version for part in admitted[name] if part.operator == ">=") for name in ("torch", "transformers")}
    return [f"{name}=={oldest[name]}.*" for name, end in (("torch", torch), ("transformers", transformers)) if end == "oldest"]


def wheel_of_head(folder):
    "A wheel of what is committed."
    archive, source = folder / "head.tar", folder / "source"
    subprocess.run(["git", "-c", f"safe.directory={ROOT}", "archive", "--output", str(archive), "HEAD"], cwd=ROOT, check=True)
    source.mkdir()
    subprocess.run(["tar", "-xf", str(archive), "-C", str(source)], check=True)
    called([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, source], folder)
    return next(folder.glob("*.whl"))


def installed(cell, wheel, folder):
    "The folder of programs of a cell's environment; versions that do not exist for its Python raise `NotHad`."
    python, torch, transformers = cell.split("/")
    called([interpreter(python), "-m", "venv", folder / "venv"], folder)
    programs = folder / "venv" / "bin"
    try: called([programs / "python", "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check", wheel,
                 *pins(torch, transformers)], folder)
    except RuntimeError as error:
        if wanted := re.search(r"No matching distribution found for (\S+)", str(error)):
            raise NotHad(f"there is no {wanted[1]} for Python {python}") from None
        raise
    return programs


def checked(programs, folder):
    "What holds in an environment: the public names, the program's help and list, and the job on few examples."
    found = json.loads(called([programs / "python", "-c", IMPORTS], folder))
    for word, wanted in (("--help", "Usage: cap"), ("methods", "Sun et al. 2024")):
        if wanted not in called([programs / "cap", word], folder): raise RuntimeError(f"cap {word} does not say {wanted!r}")
    called([programs / "cap", *DEMO, "--out", folder / "demo"], folder)
    return found | {"table": called([programs / "cap", "table", folder / "demo", "--format", "csv"], folder)}


def measured(cell, wheel):
    "A cell's entry in the record."
    with tempfile.TemporaryDirectory(prefix="cap-matrix-") as folder:
        try: return asked(cell) | {"result": "passed"} | checked(installed(cell, wheel, Path(folder)), Path(folder))
        except NotHad as reason: return asked(cell) | {"result": f"not run: {reason}"}
        except RuntimeError as error: return asked(cell) | {"result": f"failed: {error}"}


def with_cell(record, cell, entry):
    "The record with a cell's new entry, every cell in order; what was run elsewhere stays if it cannot be run here."
    if entry["result"].startswith("not run") and record.get(cell, entry)["result"] == "passed": entry = record[cell]
    return {name: (record | {cell: entry}).get(name, asked(name) | {"result": "not run: not yet"}) for name in CELLS}


def main():
    "Measure the cells that are named, or all, and keep what came out; exit code 1 if one failed."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", metavar="CELL", help=f"any of {', '.join(CELLS)}; all if left out")
    cells = parser.parse_args().cells or CELLS
    if unknown := set(cells) - set(CELLS): parser.error(f"unknown cells {', '.join(sorted(unknown))}: expected some of {', '.join(CELLS)}")
    commit = subprocess.run(["git", "-c", f"safe.directory={ROOT}", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    stamp = {"commit": commit.stdout.strip(), "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat()}
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel_of_head(Path(folder))
        for cell in cells:
            entry = stamp | measured(cell, wheel)
            write_checked(RECORD, with_cell(read_checked(RECORD) if RECORD.exists() else {}, cell, entry))
            failed |= entry["result"].startswith("failed")
            print(f"{cell}: {entry['result']}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
