"""Which record answers which question: what `probes all` looks up before it computes.

One small file a question, `<results>/suite/<digest of the question>.json`. It is written after its record, so that
what a kill leaves behind is at worst a record that nothing names.
"""

import logging
from dataclasses import dataclass
from typing import Any

from featstore import files
from featstore.errors import CorruptError
from featstore.objects import Place, parse_place

FOLDER = "suite"


@dataclass(frozen=True, slots=True)
class Answer:
    """A record that answers a question, or why there is none; `task` is the digest of the task it was made for."""

    task: str
    record: dict[str, Any] | None
    why: str = ""


def _path(folder: Place, question: dict[str, Any]) -> Place:
    return folder / FOLDER / f"{files.digest(question)}.json"


def keep(folder: Place, question: dict[str, Any], answer: Answer) -> None:
    """Write down an answer.

    Raises:
        StoreError: it cannot be written.
    """
    body: dict[str, Any] = {"question": question, "task": answer.task, "why": answer.why, "record": None}
    if answer.record is not None:
        place = parse_place(answer.record["file"])
        body["record"] = answer.record["id"]
        body["predictions"] = files.digest(place.with_suffix(".parquet").read_bytes())
    files.write_atomic(_path(folder, question), files.sealed(body))


def find(folder: Place, question: dict[str, Any]) -> Answer | None:
    """The answer that is kept, its record whole and its predictions as they were; None if there is none such.

    Damage is told: the record is then made again.
    """
    path = _path(folder, question)
    try:
        body = files.unseal(path.read_bytes(), path)
        if body["record"] is None:
            return Answer(body["task"], None, body["why"])
        place = folder / f"{body['record']}.json"
        record = files.unseal(place.read_bytes(), place)
        table = place.with_suffix(".parquet")
        if files.digest(table.read_bytes()) != body["predictions"]:
            raise CorruptError(f"{table}: the predictions are not those that were written")
    except FileNotFoundError as error:
        if error.filename and str(error.filename) != str(path):
            logging.getLogger(__name__).warning("%s is gone; its record is made again", error.filename)
        return None
    except CorruptError as error:
        logging.getLogger(__name__).warning("made again: %s", error)
        return None
    return Answer(body["task"], {**record, "file": str(place)})
