"""Tasks in files: parquet with the columns ``text`` and ``label``, alone or in a folder."""

from __future__ import annotations

from pathlib import Path

from llvlit.errors import InputError
from llvlit.prompts import is_label
from llvlit.tasks.grammars import clean_text
from llvlit.tasks.hub import OFFLINE_CHOICES


def task_files(data_dir: str | Path | None) -> dict[str, Path]:
    """Task files of a folder by task name, ``NAME.parquet`` being the file of task NAME.

    Raises
    ------
    InputError
        If ``data_dir`` is no folder.
    """
    if data_dir is None:
        return {}
    folder = Path(data_dir).expanduser()
    if not folder.is_dir():
        raise InputError(f"data_dir={str(data_dir)!r} is no folder. Pass a folder of files NAME.parquet.")
    return {path.stem: path for path in sorted(folder.glob("*.parquet")) if path.is_file()}


def check_file(path: Path) -> None:
    """InputError if there is no such file."""
    if not path.is_file():
        raise InputError(f"name={str(path)!r}: there is no such file. {OFFLINE_CHOICES}")


def read_parquet_examples(path: Path) -> tuple[list[str], list[int]]:
    """Texts, each on one line, and labels of a parquet file.

    Raises
    ------
    InputError
        If the file is missing, not parquet, cut short or empty, lacks a column, or has a text without content
        or a label other than 0 and 1; the sentence names the row.
    """
    from pyarrow import ArrowException, parquet  # here, since it is slow to import

    check_file(path)
    try:
        columns = parquet.read_schema(path).names
        if missing := sorted({"text", "label"} - set(columns)):
            raise InputError(
                f"{path} lacks {' and '.join(missing)}; its columns: {', '.join(columns)}. "
                "Name the columns text and label."
            )
        table = parquet.read_table(path, columns=["text", "label"])
        texts, labels = table["text"].to_pylist(), table["label"].to_pylist()
    except (ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a parquet file ({error}). Write or copy it again.") from error
    if not texts:
        raise InputError(f"{path} has no rows. Write at least one text of each label.")
    cleaned = []
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not isinstance(text, str) or not clean_text(text):
            raise InputError(
                f"{path}, row {row} (from 0): text={text!r} is not a string with content. Fix or drop the row."
            )
        if not is_label(label):
            raise InputError(
                f"{path}, row {row} (from 0): label={label!r} is neither 0 nor 1 (1: concept present). "
                "Fix or drop the row."
            )
        cleaned.append(clean_text(text))
    return cleaned, [int(label) for label in labels]
