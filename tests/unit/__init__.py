"""Pure rules and single rooms, without a database."""
