"""All commands as one: ``mtnrec train model=esmm`` is ``python -m mtnrec.train model=esmm``."""

import runpy
import sys

from mtnrec.command.help import command_names, print_commands, print_version


def main() -> None:
    """Run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        print_commands()
    elif name == "--version":
        print_version()
    elif name in command_names():
        sys.argv = [sys.argv[0], *arguments]
        # As with `python -m`, so that DDP can start the other ranks by the same command.
        runpy.run_module(f"mtnrec.{name}", run_name="__main__", alter_sys=True)
    else:
        commands = ", ".join(command_names())
        sys.exit(f"mtnrec: the command must be one of {commands}; got {name!r}")


if __name__ == "__main__":
    main()
