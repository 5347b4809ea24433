"""Models that are studied and not known by name: where they lie, and how they are asked; and what else was running."""
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cap_nb.core.files import read_checked, write_checked

MODELS = Path(__file__).resolve().parent.parent / "models"
FOLDERS = {"qwen": str(MODELS / "qwen-coder-0.5b")}
NOTE = os.environ.get("CAP_NB_NOTE", "what else was running was not said")


def source(name: str) -> str:
    "What `load_model` is given for a study's model: its own name, or a folder."
    return FOLDERS.get(name, name.replace("_", "-"))


@dataclass(frozen=True)
class Pieces:
    "Files of finished cells."
    work: Path  # Their folder
    until: float  # Time after which none is begun

    def get(self, name: str, measure: Callable[[], dict]) -> dict | None:
        "What a file holds, measured if it is not there; None when it is too late to begin."
        path = self.work / f"{name}.json"
        if not path.exists():
            if time.time() > self.until:
                return None
            began = time.process_time()
            write_checked(path, measure())
            print(f"{name}: {time.process_time() - began:.0f} s", flush=True)
        return read_checked(path)
