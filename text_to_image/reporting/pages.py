"""Pages of one HTML file each: rendered from a Jinja2 template with the style inside, and written whole."""

import sys
from pathlib import Path
from typing import Any

from runtime.errors import escape_control_chars, first_line
from runtime.files import atomic_write

TEMPLATES = Path(__file__).parent


def render(template: str, **content: Any) -> str:
    """The page of a template in this folder. All that it shows is escaped, but for what is marked as `Markup`.

    Raises ImportError where Jinja2 is not installed.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def write_page(path: Path, template: str, **content: Any) -> None:
    """Raises OSError or WriteError where the disk refuses it; the page that was there then stays as it is."""
    page = render(template, **content).encode("utf-8", "backslashreplace")  # names of files may have lone surrogates
    with atomic_write(path, durable=False) as partial:
        partial.write_bytes(page)


def try_write_page(path: Path, template: str, **content: Any) -> bool:
    """As `write_page`, where the page is not worth an error: False, and a line on stderr that says why."""
    try:
        write_page(path, template, **content)
    except Exception as error:  # a row that was edited by hand may make the template fail
        reason = "Jinja2 is not installed" if isinstance(error, ImportError) else first_line(error)
        print(escape_control_chars(f"warning: {path} is not written: {reason}"), file=sys.stderr)
        return False
    return True
