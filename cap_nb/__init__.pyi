# Made by tools/stubs.py from the modules' __all__.
from cap_nb.all import *  # noqa: F403, in a stub a star exports again

__version__: str
