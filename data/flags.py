"""What the programs share before and after their work: flags with bounds, one-line errors, exit
codes. Needs no torch.

    parser = Flags(description="...")                    # a wrong flag is one line, exit code 2
    parser.add_argument("--steps", type=whole(0, 10**7), help="...")
    if __name__ == "__main__":
        args = read_flags(parser)         # above `import torch`, so that --help answers at once
    import torch
    ...
    if __name__ == "__main__":
        run_program(main, args)           # 0 done, 2 bad input, 130 Ctrl-C; a traceback is a bug

Messages say what is wrong, in which file or flag, and what to do, in one line on stderr.
"""
import argparse
import math
import os
import re
import signal
import sys

PRECISIONS = ("float32", "bfloat16", "float16")          # torch dtypes by name
BAD_INPUT = 2                                            # exit codes
INTERRUPTED = 130
# How torch says that memory is at its end.
OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


class Flags(argparse.ArgumentParser):
    """An argparse parser whose errors are one line without the usage, and that takes no shortened
    flags."""

    def __init__(self, **settings):
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str):
        fail(ValueError(message.removeprefix("argument ") + f"; see {self.prog} --help"))


def whole(least: int, most: int):
    """A type for argparse: a whole number from least to most."""
    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not between {least} and {most}")
        return value
    return read


def sizes(what: str):
    """A type for argparse: "4x512" -> (4, 512); what: the numbers in words, with an example."""
    def read(text: str) -> tuple[int, int]:
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", text):
            raise argparse.ArgumentTypeError(f"{text}: give {what}")
        first, second = text.split("x")
        return int(first), int(second)
    return read


def real(least: float, most: float, above: bool = False):
    """A type for argparse: a finite number from least (above=True: from just above it) to most."""
    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        is_inside = least <= value <= most and not (above and value == least)
        if not is_inside or not math.isfinite(value):
            low = f"above {least:g}" if above else f"at least {least:g}"
            raise argparse.ArgumentTypeError(f"{text} is not {low} and at most {most:g}")
        return value
    return read


def flag(name: str) -> str:
    """The flag of an attribute: max_new -> --max-new."""
    return "--" + name.replace("_", "-")


def read_flags(parser: Flags) -> argparse.Namespace:
    """The command line; words and flags in any order. From here to `run_program`, while packages
    load, Ctrl-C ends in one line as well."""
    args = parser.parse_intermixed_args()
    signal.signal(signal.SIGINT, stop_now)
    return args


def run_program(main, args, after_interrupt=lambda: "stopped",
                if_memory_ends="lower --batch-size or --seqlen, or take a smaller model") -> None:
    """main(args) with its errors turned into one line and an exit code. after_interrupt(): what
    Ctrl-C prints; if_memory_ends: what to do then."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):                  # a pipe on Windows is not UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(after_interrupt())
        sys.exit(INTERRUPTED)
    except BrokenPipeError:                    # who read our output, such as head, has gone
        os._exit(128 + 13)                     # as SIGPIPE ends a program, where there is one
    except (ValueError, OSError) as e:
        fail(e)
    except (MemoryError, RuntimeError) as e:
        said = str(e).split("\n")[0][:200] or "out of memory"
        is_memory = isinstance(e, MemoryError) or any(words in said for words in OUT_OF_MEMORY)
        if not is_memory:
            raise
        fail(ValueError(f"{said}: {if_memory_ends}"))


def fail(e: Exception) -> None:
    """The error as one line on stderr; ends the program with exit code 2."""
    say("error: " + " ".join(str(e).split("\n")))
    sys.exit(BAD_INPUT)


def say(line: str) -> None:
    """A line on stderr, over a progress bar that has not ended."""
    if sys.stderr.isatty():
        line = f"\r{line}\x1b[K"                         # to the line's begin; erase what follows
    print(line, file=sys.stderr, flush=True)


def stop_now(*_) -> None:
    """What Ctrl-C does while packages load: one line, at once."""
    os.write(2, b"\rstopped\n")
    os._exit(INTERRUPTED)
