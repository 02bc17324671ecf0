"""Run by Alembic: migrates over the connection it was given, inside that one's transaction."""

from alembic import context

from tasks.state.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,  # SQLite changes columns by copying the table
    transactional_ddl=False,  # the transaction is the caller's, who holds the lock
)
context.run_migrations()
