"""Text files that people bring are UTF-8, with or without a byte order mark; others are refused by name."""

import codecs
from pathlib import Path

from runtime.errors import UserError

NOT_TEXT = "UTF-16, or no text at all; save the file as UTF-8"
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_file(path: Path) -> bytes:
    """The content without a UTF-8 byte order mark. UserError where the file cannot be read or is UTF-16."""
    try:
        content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    # UTF-16 often comes without its mark. Every other byte of English is a NUL then, a character of UTF-8, too.
    if content.startswith(UTF_16_MARKS) or b"\0" in content[:100]:
        raise UserError(f"{path}: {NOT_TEXT}")
    return content


def read_utf8(path: Path) -> str:
    """The text, without a byte order mark. UserError where the file cannot be read or is not UTF-8."""
    try:
        return decode_utf8(read_file(path))
    except ValueError as fault:
        raise UserError(f"{path}: {fault}") from None


def decode_utf8(content: bytes) -> str:
    """The text, without a byte order mark. Raises ValueError that says why there is none."""
    content = content.removeprefix(codecs.BOM_UTF8)
    if b"\0" in content or content.startswith(UTF_16_MARKS):
        raise ValueError(NOT_TEXT)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from None
