"""Everything that changes lives in settings.ini; this file only hands it to setuptools."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser()
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    python_requires=f">={settings['min_python']},<3.14",
    packages=find_packages(include=["cap_nb", "cap_nb.*"]),
    package_data={"cap_nb": ["models/lab_checkpoint/*", "models/lab_moe_checkpoint/*", "experiments/harness_tasks/*.yaml", "experiments/*.csv", "py.typed", "*.pyi", "methods.txt", "names.json"]},
    install_requires=settings["requirements"].split(),
    extras_require={"gguf": settings["gguf_requirements"].split(), "speed": settings["speed_requirements"].split(),
                    "dev": settings["dev_requirements"].split(), "docs": settings["docs_requirements"].split(),
                    "smollm2": settings["smollm2_requirements"].split(),
                    "harness": settings["harness_requirements"].split(), "math": settings["math_requirements"].split(), "recover": settings["recover_requirements"].split()},
    entry_points={"console_scripts": settings["console_scripts"].split()},
)
