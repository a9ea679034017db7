"""A trainer's own command line as a subject: only files go in and come out.

`file.py` reads the TOML, `asked.py` says what can be asked, `run.py` runs the program, `reading.py` and `log.py` read
what it wrote, `subject.py` puts these together.
"""

from dpocheck.command.file import CommandError, CommandFile, read
from dpocheck.command.run import CommandFailed
from dpocheck.command.subject import CommandSubject

__all__ = ["CommandError", "CommandFailed", "CommandFile", "CommandSubject", "read"]
