"""Errors that are the user's to mend: shown as one line, without a traceback, with exit status 2."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Names the thing that is wrong, what was expected and what came."""


class Busy(UserError):
    """Another process is at what was asked for."""


def guarded(main: Callable[[], int | None]) -> int:
    """Runs a command's main function; turns the errors a user can mend into one line and an exit status.

    Returns:
        What `main` returns (None is 0); 2 after a UserError or an error of the file system; 130 after Ctrl-C.
    """
    try:
        return main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"error: {error.filename or 'file system'}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; what is finished is recorded, run the same command to go on", file=sys.stderr)
        return 130
    return 2
