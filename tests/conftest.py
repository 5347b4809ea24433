"""What several tests share: where the checkout is, and its notebooks in reading order."""
import importlib.util
import os
import sys
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # tests fork, and tokenizers that used threads before a fork say so on stderr
os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is first imported: no test may reach for the network

import matplotlib

matplotlib.use("Agg")
ROOT = Path(__file__).resolve().parent.parent


def tool(name: str):
    """A script of tools/ as a module."""
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
