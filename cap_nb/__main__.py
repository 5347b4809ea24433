"""The program `cap`, also as `python -m cap_nb`: a stop is one sentence, also while libraries are being read."""
from cap_nb.core.stopping import answer_signals, leave_at_once


def main() -> None:
    "Answer the signals, then read the commands and run one."
    answer_signals(leave_at_once)
    from cap_nb.command_line import app
    app()


if __name__ == "__main__": main()
