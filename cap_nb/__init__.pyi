# Made by tools/stubs.py from the modules' __all__.
from cap_nb.all import *

__version__: str
