"""The log's tables, from any revision that an earlier version of this package left to the one that it needs.

database --revision()--> newest: nothing to do | older: upgrade() runs `versions` in order, in one transaction | unknown: refused

Alembic keeps the revision in a table beside the log's own. A revision may touch what an earlier one made and nothing else: the
database may be a team's own, with tables of theirs under any name.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from sqlalchemy.schema import CreateSchema

from causalrm_ray.data.log.tables import VERSION_TABLE, log_tables, table_name, table_schema
from causalrm_ray.errors import InputError


def is_current(connection: Connection) -> bool:
    """Whether the tables are there and of this package's revision: the quick look, which says nothing of any others."""
    return _context(connection).get_current_revision() == _scripts().get_current_head()


def needs_upgrade(connection: Connection) -> bool:
    """Whether the tables are missing or older than this package. Raises InputError where they are newer, or not ours.

    It takes more than one look: a caller that does not hold the lock under which tables are made could take those of another
    process, just made, for foreign.
    """
    revision = _context(connection).get_current_revision()
    if revision is None:
        dialect = connection.dialect.name
        there = inspect(connection).get_table_names(schema=table_schema(dialect))
        if foreign := sorted({table.name for table in log_tables(dialect).metadata.tables.values()}.intersection(there)):
            version = table_name(VERSION_TABLE, dialect)
            raise InputError(f"tables of the log must come with {version}, got {', '.join(foreign)} without it: not made by us")
    elif revision not in (known := [script.revision for script in _scripts().walk_revisions()]):
        raise InputError(f"its tables must be of a revision up to {known[0]}, got {revision}: a newer causalrm-ray made them")
    return revision != _scripts().get_current_head()


def upgrade(connection: Connection) -> None:
    """Run the revisions that are missing, in the connection's transaction, while no other process does the same."""
    schema = table_schema(connection.dialect.name)
    if schema and not inspect(connection).has_schema(schema):
        connection.execute(CreateSchema(schema))
    context = _context(connection)
    missing = list(_scripts().iterate_revisions("head", context.get_current_revision() or "base"))
    with Operations.context(context):
        for script in reversed(missing):
            script.module.upgrade()
            context.stamp(_scripts(), script.revision)


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory(str(Path(__file__).parent))


def _context(connection: Connection) -> MigrationContext:
    dialect = connection.dialect.name
    place = {"version_table": table_name(VERSION_TABLE, dialect), "version_table_schema": table_schema(dialect)}
    return MigrationContext.configure(connection, opts=place)
