"""The source distribution builds a wheel, and the wheel holds what a user needs: the modules, the lab's checkpoint, the command."""
import functools
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import cap_nb
from conftest import ROOT
from tools.notebooks import SETTINGS


def tracked_files():
    """The files a fresh clone would have, and those about to be added."""
    asked = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [Path(n) for n in names if n and (ROOT / n).is_file()]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A folder with the sdist, and the wheel made from that sdist, built without the network (build's own requirements are installed)."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in tracked_files():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    made = subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(clone)], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-2000:] + made.stderr[-2000:]
    return out


def checkpoint_files():
    return {str(p.relative_to(ROOT)) for p in (ROOT / "cap_nb/models").glob("lab_*checkpoint/*") if p.is_file()}


def test_sdist(built):
    [archive] = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {n.split("/", 1)[1] for n in opened.getnames() if "/" in n}
    assert {"settings.ini", "setup.py", "README.md", "LICENSE"} <= names
    assert checkpoint_files() and checkpoint_files() <= names


def test_wheel(built):
    [archive] = built.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        names = set(opened.namelist())
        [entry_points] = [opened.read(n).decode() for n in names if n.endswith("entry_points.txt")]
    modules = {str(name) for name in tracked_files() if name.parts[0] == "cap_nb" and name.suffix == ".py"}
    assert modules <= names
    assert checkpoint_files() | {"cap_nb/py.typed", "cap_nb/methods.txt", "cap_nb/names.json", "cap_nb/all.pyi", "cap_nb/__init__.pyi"} <= names
    assert archive.stat().st_size < 20_000_000
    assert "cap = cap_nb.__main__:main" in entry_points
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"cap_nb"}, "tools, tests and the site stay out"


def test_the_lab_model_loads_from_the_wheel(built, tmp_path):
    [archive] = built.glob("*.whl")
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "site")
    code = ("import sys; sys.path.insert(0, sys.argv[1]); import cap_nb; assert cap_nb.__file__.startswith(sys.argv[1]), cap_nb.__file__; "
            "from cap_nb.models.loading import load_model; model, tokenizer = load_model('lab'); print(sum(p.numel() for p in model.parameters()))")
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout.split()[-1]) > 100_000


def test_one_version():
    """A release names one number in every place, and the changes have a heading for it."""
    version = SETTINGS["DEFAULT"]["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    cited, [paper] = citation["version"], citation["references"]
    newest = re.findall(r"^## (.+)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[0]
    assert version == cited == cap_nb.__version__
    assert version in re.findall(r"[0-9.]*[0-9]", newest)
    assert {"cff-version", "message", "title", "authors"} <= citation.keys() and {"type", "title", "authors"} <= paper.keys()
    assert paper["title"] in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split()), "the paper's title is README's"


def test_the_package_says_what_it_is():
    """What `help(cap_nb)` opens with: the lines that it shows are run."""
    assert inspect.getdoc(cap_nb).startswith("Causal Attribution Pruning") and "`cap --help`" in cap_nb.__doc__
    lines = [line.strip() for line in cap_nb.__doc__.splitlines() if line.startswith("    ")]
    names = {name: getattr(cap_nb, name) for name in dir(cap_nb) if not name.startswith("_") and any(f"{name}(" in line for line in lines)}
    names["calibration_set"] = functools.partial(names["calibration_set"], n=1)
    exec("\n".join(lines), names)
    assert names["report"].reached == pytest.approx(0.5, abs=1e-4)
