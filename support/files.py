"""Files that appear whole or not at all, and the error that a user can mend."""

import contextlib
import json
import os


class UserError(Exception):
    """A mistake that the user can mend: printed as one line without a traceback, exit status 2."""


@contextlib.contextmanager
def whole_file(path, mode="wb", **options):
    """Open a file that appears under its name whole or not at all: written beside it, then renamed.

    mode, options: as for `open`. Raises UserError if the folder cannot be written or the disk is
    full.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, mode, **options) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, path)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write {path}: {reason}; make room or use another --out") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def write_json(path, content):
    """Write a JSON file whole."""
    # A file's name may hold bytes that are no text; they become escapes such as \udcb5.
    with whole_file(path, "w", encoding="utf-8", errors="backslashreplace") as stream:
        json.dump(content, stream, ensure_ascii=False, indent=2, allow_nan=False)
        stream.write("\n")


def write_csv(path, frame):
    """Write a DataFrame as a CSV file, whole, in UTF-8 with BOM, so that Excel shows Chinese."""
    with whole_file(path, "w", encoding="utf-8-sig", newline="") as stream:
        # With this line end, pandas quotes a text that holds \r.
        frame.to_csv(stream, index=False, lineterminator="\r\n")
