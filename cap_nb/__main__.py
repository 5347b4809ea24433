"""The program `cap`, also as `python -m cap_nb`: a stop is one sentence, also while libraries are being read."""
import os
import sys

from cap_nb.core.stopping import answer_signals, leave_at_once

# What tqdm reads as numbers when it is imported
NUMBERS = ("DELAY", "INITIAL", "MAXINTERVAL", "MININTERVAL", "MINITERS", "NCOLS", "NROWS", "POSITION", "SMOOTHING",
           "TOTAL", "UNIT_DIVISOR")


def check_environment() -> None:
    "Pictures go into files, whatever MPLBACKEND says; a number of tqdm's that is none ends the program."
    os.environ["MPLBACKEND"] = "Agg"
    for name in (f"TQDM_{number}" for number in NUMBERS if os.environ.get(f"TQDM_{number}")):
        try: float(os.environ[name])
        except ValueError:
            print(f"cap: {name} is {os.environ[name]!r}: expected a number; change or unset it.", file=sys.stderr)
            sys.exit(2)


def main() -> None:
    "Answer the signals, then read the commands and run one."
    for channel in ("stdin", "stdout", "stderr"): # a daemon may have closed them; a record would get their numbers
        if getattr(sys, channel) is None: setattr(sys, channel, open(os.devnull, "r+"))
    answer_signals(leave_at_once)
    check_environment()
    from cap_nb.command_line import app
    app()


if __name__ == "__main__": main()
