"""The lines of a prompt file one after the other, as JSON values, whatever the file's format is.

| suffix         | a line is                                   | in memory at a time |
| -------------- | ------------------------------------------- | ------------------- |
| .txt           | a prompt                                    | a line              |
| .jsonl .ndjson | an object                                   | a line              |
| .csv .tsv      | a row; the first one names the columns      | a row               |
| .parquet       | a row (needs the package `pyarrow`)         | BATCH rows          |

Text may be compressed (.txt.gz). Lines are counted from 0, without empty ones, whether they are
good or bad; those that `owns` does not want are counted, but not parsed.
"""

import contextlib
import csv
import importlib
import io
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxdiff.checkpoints.jsonfiles import parse_object
from jaxdiff.core.errors import InputError
from jaxdiff.core.text import ENCODINGS, MARK
from jaxdiff.core.validate import one_of
from jaxdiff.generation.input_files import input_suffix, open_input, unreadable
from jaxdiff.generation.prompt_spec import FIELDS, table_value

TEXT, JSON_LINES, TABLES, PARQUET = (".txt",), (".jsonl", ".ndjson"), (".csv", ".tsv"), ".parquet"
SUFFIXES = (*TEXT, *JSON_LINES, *TABLES, PARQUET)
MAX_LINE = 64 << 20  # bytes
BATCH = 256  # rows
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what decoding leaves of such bytes


class Row(NamedTuple):
    """A line: its values, or None and the sentence that says why it has none."""

    index: int
    source: str  # FILE:LINE, FILE:ROW of a Parquet file, both from 1
    values: Mapping[str, Any] | None
    problem: str = ""


def read_rows(
    where: str | pathlib.Path,
    *,
    owns: Callable[[int], bool] = lambda index: True,
    columns: Mapping[str, str] | None = None,
) -> Iterator[Row]:
    """The lines of the prompt file at `where`, a path or a URL, that `owns` wants by their index.

    `columns` has for fields of a line the columns of a table that hold them; no others are read
    then. Raises InputError for a file that cannot be read, of another suffix, or with columns that
    are no fields.
    """
    suffix = input_suffix(where)
    if suffix not in SUFFIXES:
        listed = ", ".join(SUFFIXES)
        raise InputError(f"prompts: got {where}, expected a file whose name ends in {listed}")
    if columns is not None and suffix not in (*TABLES, PARQUET):
        raise InputError(f"columns: got {where}, expected a .csv, .tsv or .parquet file")
    if columns is not None and "prompt" not in columns:
        raise InputError(f"columns: got none of prompt for {where}, expected one")
    with open_input(where) as file:
        if suffix == PARQUET:
            yield from _parquet_rows(where, file, owns, columns)
            return
        try:
            if suffix in TABLES:
                delimiter = "," if suffix == ".csv" else "\t"
                yield from _table_rows(where, file, owns, columns, delimiter)
            else:
                yield from _text_rows(where, file, owns, is_json=suffix in JSON_LINES)
        except (OSError, EOFError, zlib.error) as error:  # of a compressed file that is cut, too
            raise unreadable(where, error) from None


class _Line(NamedTuple):
    """A line of a text file, of which `problem` says what is wrong with it."""

    number: int  # from 1
    text: str
    problem: str = ""


def _lines(where: str | pathlib.Path, file: io.BufferedReader) -> Iterator[_Line]:
    """The lines, empty ones included, in UTF-8 or the encoding of the byte order mark."""
    encoding = _encoding(file)
    number = 0
    for raw in _raw_lines(file) if encoding is None else _decoded(where, file, encoding):
        problem = ""
        if raw is None:
            text, problem = "", f"a line of more than {MAX_LINE >> 20} MiB"
        else:
            text = raw.decode("UTF-8", "surrogateescape") if isinstance(raw, bytes) else raw
        if not text.isascii() and NOT_UTF8.search(text):
            problem = "bytes that are not UTF-8"
        elif "\0" in text:  # every second byte of UTF-16 without a mark
            problem = "a null byte"
        # Line ends of Windows, and of old Macs.
        for part in text.removesuffix("\n").removesuffix("\r").split("\r"):
            number += 1
            yield _Line(number, part.removeprefix(MARK), problem)


def _encoding(file: io.BufferedReader) -> str | None:
    """The encoding of UTF-16 and UTF-32 files; None: UTF-8, or no mark."""
    head = file.peek(4)[:4]
    found = next((name for mark, name in ENCODINGS.items() if head.startswith(mark)), None)
    return None if found == "UTF-8" else found


def _raw_lines(file: io.BufferedReader) -> Iterator[bytes | None]:
    """The lines as bytes; None for one that is too long to be a line."""
    while raw := file.readline(MAX_LINE):
        if len(raw) < MAX_LINE or raw.endswith(b"\n"):
            yield raw
            continue
        while (more := file.readline(MAX_LINE)) and not more.endswith(b"\n"):
            pass
        yield None


def _decoded(where: str | pathlib.Path, file: io.BufferedReader, encoding: str) -> Iterator[str]:
    """The lines of UTF-16 or UTF-32, which end at a newline only."""
    count = 0
    try:
        with io.TextIOWrapper(file, encoding, newline="\n") as lines:
            for line in lines:
                yield line.removeprefix(MARK)
                count += 1
    except UnicodeDecodeError:
        raise InputError(
            f"prompts: {where}: got bytes that are not {encoding} after line {count}, "
            "expected text to the end"
        ) from None


def _text_rows(
    where: str | pathlib.Path,
    file: io.BufferedReader,
    owns: Callable[[int], bool],
    *,
    is_json: bool,
) -> Iterator[Row]:
    index = -1
    for line in _lines(where, file):
        text = line.text.strip()
        if not (text or line.problem):
            continue
        index += 1
        if not owns(index):
            continue
        source = f"{where}:{line.number}"
        if line.problem:
            yield _not_text(index, source, line.problem)
        elif is_json:
            try:
                yield Row(index, source, parse_object(text.encode(), source))
            except InputError as error:
                yield Row(index, source, None, str(error))
        elif text.startswith('{"'):
            problem = f"{source}: got an object, expected it in a .jsonl file"
            yield Row(index, source, None, problem)
        else:
            yield Row(index, source, {"prompt": text})


def _not_text(index: int, source: str, problem: str) -> Row:
    expected = "expected UTF-8, or UTF-16 with a byte order mark"
    return Row(index, source, None, f"{source}: got {problem}, {expected}")


class _Columns:
    """Which columns of a table are read, by field."""

    def __init__(
        self,
        where: str | pathlib.Path,
        found: Sequence[str],
        columns: Mapping[str, str] | None,
    ) -> None:
        twice = sorted({name for name in found if found.count(name) > 1})
        if twice:
            raise InputError(
                f"prompts: {where}: got {_listed(twice)} twice, expected each column once"
            )
        if columns is None:
            columns = {name: name for name in found}
            unknown = [name for name in found if name not in FIELDS]
            if unknown:
                from jaxdiff.families.options import request_options  # only now: waits for jax

                unknown = [name for name in unknown if name not in request_options()]
            if unknown or "prompt" not in found:
                names = f"the columns {_listed(unknown)}" if unknown else "no column prompt"
                raise InputError(
                    f"prompts: {where}: got {names}, expected the names of fields, such as prompt "
                    "and seed; --columns prompt=CAPTION seed=ID says which column is which field"
                )
        for name, column in columns.items():
            if name not in FIELDS:
                from jaxdiff.families.options import request_options

                one_of("columns: field", name, (*FIELDS, *request_options()))
            if column not in found:
                listed = _listed(found)
                raise InputError(
                    f"columns: got {name}={column}, expected a column of {where}: {listed}"
                )
        self.names = dict(columns)

    def values(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row says, without empty cells."""
        values = {name: table_value(name, row[column]) for name, column in self.names.items()}
        return {name: value for name, value in values.items() if value is not None}


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _table_rows(
    where: str | pathlib.Path,
    file: io.BufferedReader,
    owns: Callable[[int], bool],
    columns: Mapping[str, str] | None,
    delimiter: str,
) -> Iterator[Row]:
    problems: list[str] = []  # of the lines of a row

    def texts() -> Iterator[str]:
        for line in _lines(where, file):
            problems.extend([line.problem] if line.problem else [])
            yield line.text.replace("\0", "") + "\n"

    rows = csv.reader(texts(), delimiter=delimiter)
    header: list[str] | None = None
    chosen: _Columns | None = None
    index, number = -1, 0
    while True:
        first, problem = number + 1, ""
        problems.clear()
        try:
            row = next(rows, None)
        except csv.Error as error:
            row, problem = [""], f"{error}, expected a row"
        if row is None:
            break
        number = rows.line_num
        if not (problem or problems or any(row)):
            continue
        if header is None or chosen is None:
            if problem or problems:
                got = problem or problems[0]
                raise InputError(f"prompts: {where}:{first}: got {got}, expected names of columns")
            header = [name.strip() for name in row]
            chosen = _Columns(where, header, columns)
            continue
        index += 1
        if not owns(index):
            continue
        source = f"{where}:{first}"
        if problems:
            yield _not_text(index, source, problems[0])
        elif problem:
            yield Row(index, source, None, f"{source}: got {problem}")
        elif len(row) != len(header):
            got = f"got {len(row)} cells, expected {len(header)}"
            yield Row(index, source, None, f"{source}: {got}")
        else:
            yield Row(index, source, chosen.values(dict(zip(header, row, strict=True))))


def _parquet_rows(
    where: str | pathlib.Path,
    file: io.BufferedReader,
    owns: Callable[[int], bool],
    columns: Mapping[str, str] | None,
) -> Iterator[Row]:
    try:
        package = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"prompts: got {where} without the package pyarrow, expected it: pip install pyarrow"
        ) from None
    with _parquet_errors(where):
        table = package.ParquetFile(file)
        chosen = _Columns(where, list(table.schema_arrow.names), columns)
        batches = table.iter_batches(BATCH, columns=list(dict.fromkeys(chosen.names.values())))
    index = 0
    while True:
        with _parquet_errors(where):
            batch = next(batches, None)
        if batch is None:
            return
        for start, end in _runs(index, batch.num_rows, owns):
            for offset, row in enumerate(batch.slice(start, end - start).to_pylist(), start):
                number = index + offset
                yield Row(number, f"{where}:{number + 1}", chosen.values(row))
        index += batch.num_rows


@contextlib.contextmanager
def _parquet_errors(where: str | pathlib.Path) -> Iterator[None]:
    """Turns what pyarrow says of a file that is damaged, or none of Parquet, into an InputError."""
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's own are ValueErrors too
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(f"prompts: got {where} ({reason:.160}), expected a Parquet file") from None


def _runs(first: int, count: int, owns: Callable[[int], bool]) -> Iterator[tuple[int, int]]:
    """Begin and end of the rows behind one another that are wanted, of `count` from `first` on."""
    start = None
    for offset in range(count + 1):
        is_wanted = offset < count and owns(first + offset)
        if is_wanted and start is None:
            start = offset
        elif not is_wanted and start is not None:
            yield start, offset
            start = None
