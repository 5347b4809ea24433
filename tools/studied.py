"""Models that are studied and not known by name: where they lie, and how they are asked; and what else was running."""
import os
from pathlib import Path

MODELS = Path(__file__).resolve().parent.parent / "models"
FOLDERS = {"qwen": str(MODELS / "qwen-coder-0.5b")}
NOTE = os.environ.get("CAP_NB_NOTE", "what else was running was not said")


def source(name: str) -> str:
    "What `load_model` is given for a study's model: its own name, or a folder."
    return FOLDERS.get(name, name.replace("_", "-"))
