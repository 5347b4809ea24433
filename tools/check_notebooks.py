"""nbdev_test on all notebooks, by two processes; the lab is read and encoded once, the pictures of runs are blank, and others small.

nbdev_test alone checks the same; about two hundred calibration sets are drawn, and each would encode 2,000 problems of a task anew.
"""
import sys
from pathlib import Path

from nbdev.test import nbdev_test

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from fixtures import blank_pictures, labs_read_once, pools_encoded_once, small_pictures  # noqa: E402

if __name__ == "__main__":
    with pools_encoded_once(), labs_read_once(), blank_pictures(), small_pictures():
        nbdev_test.__wrapped__(n_workers=2, do_print=True, timing=True)
