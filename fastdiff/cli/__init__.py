"""The command line: `fastdiff COMMAND [OPTIONS]`, one file of this folder a command.

Top-level help and version are static text: they import neither torch nor tyro nor NumPy. A user's mistake is one
sentence on stderr and exit code 2; FASTDIFF_TRACEBACK=1 shows where it was raised.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Sequence

from fastdiff._version import __version__

COMMANDS = {
    "sample": "sample images from a model",
    "train": "train a U-Net and write a checkpoint folder",
    "convert": "write a model as a folder of ours, or of diffusers",
    "verify": "compare the fused path with the reference on a model",
    "doctor": "print what is installed, what runs here and why the rest does not",
}
"""name -> what it does; fastdiff/cli/<name>.py holds its `Options` and `run(options) -> exit code`."""

MISTAKES = (ValueError, TypeError, OSError, ArithmeticError, ImportError, MemoryError)
"""What is raised where the user, not the library, is wrong; with the two of NAMED, whose classes need torch."""

NAMED = ("BackendUnavailable", "OutOfMemoryError")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `fastdiff ARGV...` (default: this process's arguments); returns the exit code: 0, 1, 2, 130 or 141."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"fastdiff {__version__}")
        return 0
    if args[0] not in COMMANDS:
        print(f"fastdiff: {args[0]!r} is no command; accepted: {', '.join(COMMANDS)}; see fastdiff -h", file=sys.stderr)
        return 2
    return _guarded(args[0], args[1:])


def _usage() -> str:
    lines = "\n".join(f"  {name:9s}{what}" for name, what in COMMANDS.items())
    return (
        f"fastdiff {__version__}: sample from and train diffusion models\n\n"
        f"usage: fastdiff COMMAND [OPTIONS]\n\n{lines}\n\n"
        "fastdiff COMMAND --help lists its options; fastdiff --version prints the version"
    )


def _guarded(name: str, args: Sequence[str]) -> int:
    """Run a command; a user's mistake becomes one sentence and exit code 2."""
    from fastdiff.cli.options import parse

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = lambda message, *_, **__: print(f"fastdiff {name}: {message}", file=sys.stderr)
            command = importlib.import_module(f"fastdiff.cli.{name}")
            code = int(command.run(parse(command.Options, f"fastdiff {name}", args)))
            sys.stdout.flush()
            return code
    except KeyboardInterrupt:
        print(f"\nfastdiff {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader has enough, as in `fastdiff doctor | head`; stdout must not be flushed into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        known = isinstance(error, MISTAKES) or type(error).__name__ in NAMED
        if not known or os.environ.get("FASTDIFF_TRACEBACK"):
            raise
        print(f"fastdiff {name}: {_sentence(error)}", file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str:
    """One line that says what was wrong."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    if type(error).__name__ in ("OutOfMemoryError", "MemoryError"):
        return "out of memory; pass a smaller --batch"
    return " ".join(str(error).split()) or type(error).__name__
