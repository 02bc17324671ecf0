"""How the state database came to its schema, one numbered step after the other (Alembic)."""
