"""Everything that speaks to Postgres: pool, queue, migrations, notify listener, embedded server."""
