"""The program's first lines: until the run installs its own handlers, a signal ends it silently.

Ctrl-C during an import would otherwise be a traceback and status 1. `SIGHUP` stays ignored where `nohup` asked for it.
"""

from __future__ import annotations

import signal

for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
    _number = getattr(signal, _name, None)  # SIGHUP does not exist on Windows
    if _number is not None and not (_name == "SIGHUP" and signal.getsignal(_number) is signal.SIG_IGN):
        signal.signal(_number, signal.SIG_DFL)


def main() -> None:
    """Run the program (the `md3` script and `python -m md3cli`)."""
    from md3cli.signals import lasting_status, secure_streams

    secure_streams()
    with lasting_status():
        from md3cli.cli import app

        app(prog_name="md3")


if __name__ == "__main__":
    main()
