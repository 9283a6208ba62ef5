"""A result for whoever reads it: tables on a terminal, Markdown in files and pipes."""

from rich.console import Console
from rich.markdown import Markdown


def show(markdown: str, console: Console | None = None) -> None:
    """Print a result.

    Args:
        markdown: headings, tables and text.
        console: where to; standard output if not given.
    """
    console = console or Console()
    if console.is_terminal:
        console.print(Markdown(markdown))
    else:
        console.file.write(f"{markdown}\n")
