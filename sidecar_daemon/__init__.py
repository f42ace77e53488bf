"""Keeps embeddings true and fresh inside Postgres."""
