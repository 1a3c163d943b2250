"""Exit codes of the commands; 0: success."""

from __future__ import annotations

EXIT_OTHER = 1  # any other error
EXIT_BAD_SETTING = 2
EXIT_TRY_AGAIN = 75  # EX_TEMPFAIL: launchers restart a process that exits with 75
EXIT_INTERRUPTED = 130  # as shells report Ctrl-C
