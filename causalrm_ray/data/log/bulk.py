"""Many rows at once into a table of the log, or out of it: what is known already is compared, what is new goes in fast.

What was forgotten leaves a hash of the impression's id: neither the impression nor events about it come in again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import closing
from operator import itemgetter
from typing import Any

from sqlalchemy import Connection, Table, delete, exists, insert, select

from causalrm_ray.data.log.tables import LogTables, digested_columns, id_hash, row_digest
from causalrm_ray.errors import InputError, brief, kind_of

_IDS_PER_QUERY = 500
PERSONAL = ("prompt", "response", "user", "context")  # columns whose values errors do not show


class ConflictError(InputError):
    """An id that is delivered again with other content: names what differs, without any text of a person."""


def insert_new(
    connection: Connection, table: Table, rows: Sequence[dict[str, Any]], position: int, repeated: Collection[str] = ()
) -> int:
    """Insert the rows that are not logged yet, from position + 1 on, and return their number. Raises ConflictError.

    `repeated` are ids of rows that may be repeated with another time: the first one's stays. The caller holds the log's lock:
    nobody else inserts meanwhile.
    """
    names = [column.name for column in table.c if column.name not in ("seq", "digest")]
    known = _known(connection, table, names, [row["id"] for row in rows])
    new = []
    for row, content in zip(rows, map(itemgetter(*names), rows), strict=True):
        before = known.setdefault(row["id"], content)
        if before is content:
            new.append(row)
        elif before != content and not (row["id"] in repeated and _without_time(names, before) == _without_time(names, content)):
            parts = [
                f"{name}={_shown(name, old)} then {_shown(name, row[name])}"
                for name, old in zip(names, before, strict=True)
                if old != row[name]
            ]
            kind = table.name.removeprefix("causalrm_")
            raise ConflictError(f"{kind}: id {brief(row['id'])} must keep its content, got {', '.join(parts)}")
    if new:
        _insert(connection, table, new, position)
    return len(new)


def forgotten_of(connection: Connection, tables: LogTables, ids: Collection[str]) -> set[str]:
    """Those of the ids of impressions that were forgotten."""
    if not connection.execute(select(exists(select(tables.forgotten.c.id_hash)))).scalar_one():
        return set()
    hashes, found = {id_hash(name): name for name in ids}, set()
    for page in _pages(list(hashes)):
        found |= set(connection.execute(select(tables.forgotten.c.id_hash).where(tables.forgotten.c.id_hash.in_(page))).scalars())
    return {hashes[found_hash] for found_hash in found}


def remove(connection: Connection, tables: LogTables, ids: Sequence[str], time: float) -> tuple[int, int]:
    """Delete impressions and all events about them, and keep hashes of their ids; returns the numbers of both that there were."""
    impressions, events = 0, 0
    known = forgotten_of(connection, tables, ids)
    new = [name for name in dict.fromkeys(ids) if name not in known]
    if new:
        connection.execute(insert(tables.forgotten), [{"id_hash": id_hash(name), "time": time} for name in new])
    for page in _pages(ids):
        impressions += connection.execute(delete(tables.impressions).where(tables.impressions.c.id.in_(page))).rowcount
        events += connection.execute(delete(tables.events).where(tables.events.c.impression_id.in_(page))).rowcount
    return impressions, events


def _known(connection: Connection, table: Table, names: Sequence[str], ids: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """The columns `names`, the first of them the id, of the rows that there are, by id.

    By the driver where it is known: SQLAlchemy's own rows take as long as all the rest.
    """
    preparer = connection.dialect.identifier_preparer
    query = f"SELECT {', '.join(map(preparer.quote, names))} FROM {preparer.format_table(table)} WHERE id"
    found: list[Any] = []
    if connection.dialect.driver == "psycopg":
        found += _fetched(connection, f"{query} = ANY(%s)", (list(ids),))
    elif connection.dialect.name == "sqlite":
        for page in _pages(ids):
            found += _fetched(connection, f"{query} IN ({', '.join('?' * len(page))})", tuple(page))
    else:
        columns = [table.c[name] for name in names]
        for page in _pages(ids):
            found += map(tuple, connection.execute(select(*columns).where(table.c.id.in_(page))))
    return {row[0]: row for row in found}


def _fetched(connection: Connection, query: str, values: tuple[Any, ...]) -> Sequence[Any]:
    """All rows of the driver's own."""
    with closing(connection.connection.cursor()) as cursor:
        cursor.execute(query, values)
        return cursor.fetchall()


def _pages(ids: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(ids), _IDS_PER_QUERY):
        yield ids[start : start + _IDS_PER_QUERY]


def _without_time(names: Sequence[str], content: Sequence[Any]) -> list[Any]:
    return [value for name, value in zip(names, content, strict=True) if name != "time"]


def _insert(connection: Connection, table: Table, rows: Sequence[Mapping[str, Any]], position: int) -> None:
    digested = [column.name for column in digested_columns(table)]
    columns_of = itemgetter(*digested)
    written = [columns_of({**row, "seq": seq}) for seq, row in enumerate(rows, position + 1)]
    values = [(*content, row_digest(*content)) for content in written]
    columns = [*digested, "digest"]
    if connection.dialect.driver == "psycopg":
        preparer = connection.dialect.identifier_preparer
        target = f"{preparer.format_table(table)} ({', '.join(map(preparer.quote, columns))})"
        with connection.connection.cursor() as cursor, cursor.copy(f"COPY {target} FROM STDIN") as copy:
            for value in values:
                copy.write_row(value)
    elif connection.dialect.name == "sqlite":
        preparer = connection.dialect.identifier_preparer
        places = ", ".join("?" * len(columns))
        quoted = ", ".join(map(preparer.quote, columns))
        connection.exec_driver_sql(f"INSERT INTO {preparer.format_table(table)} ({quoted}) VALUES ({places})", values)
    else:
        connection.execute(insert(table), [dict(zip(columns, value, strict=True)) for value in values])


def _shown(column: str, value: Any) -> str:
    return kind_of(value) if column in PERSONAL else brief(value)
