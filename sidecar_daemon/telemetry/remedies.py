"""What an operator can do about each of the world's faults, and each document's: one line a code, for the log."""

from __future__ import annotations

_CAPACITY = "raise max_connections on the server, or run fewer replicas or put a pooler in between"
_WAITING = "the daemon tries again by itself; if it lasts, look at the server's log"

REMEDIES = {
    "connection_lost": "start the database server or mend the network; check host and port of SIDECAR_DATABASE_URL",
    "timeout": "see whether the database server or the network is overloaded or unreachable",
    "starting_up": "wait: the database server is starting",
    "admin_shutdown": "start the database server again, if nobody does",
    "crash_shutdown": "look at the database server's log: a process of its crashed",
    "wrong_password": "correct the password in SIDECAR_DATABASE_URL and restart the daemon",
    "login_refused": "allow the login in pg_hba.conf, or correct the role in SIDECAR_DATABASE_URL and restart",
    "unknown_database": "create the database, or correct its name in SIDECAR_DATABASE_URL and restart",
    "disk_full": "free space on the database server's disk",
    "out_of_memory": "give the database server memory, or lower its work_mem and connections",
    "out_of_resources": "look at the database server's log: it lacks a resource",
    "too_many_connections": _CAPACITY,
    "read_only": "point SIDECAR_DATABASE_URL at the primary (target_session_attrs=read-write)",
    "permission_denied": "sidecar-daemon doctor says which right is missing; GRANT sidecar_runtime to its role",
    "schema_missing": "sidecar-daemon migrate; sidecar-daemon doctor says what is missing",
    "lock_timeout": "somebody holds a lock on our tables: see pg_stat_activity and pg_blocking_pids()",
    "deadlock": _WAITING,
    "serialization": _WAITING,
    "object_in_use": _WAITING,
    "not_ready": _WAITING,
    "stale_catalog": _WAITING,
    "statement_timeout": "see what slows the server, or raise statement_timeout of the daemon's role",
    "idle_timeout": "raise idle_in_transaction_session_timeout of the daemon's role",
    "transaction_timeout": "raise transaction_timeout of the daemon's role",
    "server_io": "look at the database server's disk and log: it cannot read or write a file",
    "data_corrupted": "a row or page is damaged: see the database server's log and check its disk; restore the row",
    "index_corrupted": "REINDEX the index that the cause names, and check the database server's disk",
    "not_null_violation": "give the column that the cause names a default, or let it be null",
    "wrong_dimensions": "the vectors' column was altered: give it the model's dimensions again, or detach and attach",
    "runtime_failed": "the model fails on any text: look at this machine's memory, then sidecar-daemon models verify",
    "bad_setting": "correct the setting and start the daemon again; the README lists all of them",
    "bad_database_url": "correct the URL and start the daemon again",
    "pooler": "set SIDECAR_POOLER=transaction behind a transaction pooler",
}
"""By the code of the fault."""

_REFUSED = "correct the text, or change what refuses it on the table of vectors"
POISON_REMEDIES = {
    "attempts_exhausted": "look for a process that was killed for memory, or shorten the text",
    "bad_vector": "change the text: this model makes no vector of it",
    "check_violation": _REFUSED,
    "exclusion_violation": _REFUSED,
    "inference_failed": "sidecar-daemon models verify; if all is well, change the text",
    "malformed": "mend whoever sends such messages: the triggers do not",
    "not_null_violation": _REFUSED,
    "not_unicode": "correct the text: it is not valid UTF-8",
    "program_limit_exceeded": "shorten the text: the server has no room for it in a column or an index",
    "raise": _REFUSED,
    "too_large": "shorten the text, or raise SIDECAR_MAX_DOCUMENT_BYTES and restart the daemon",
    "unique_violation": _REFUSED,
}
"""By the reason of the dead letter."""


def remedy(code: str) -> str:
    """What to do about a fault; for an unknown one, where to look."""
    return REMEDIES.get(code, "sidecar-daemon doctor looks at everything that the daemon stands on")


def poison_remedy(reason: str, pipeline: str) -> str:
    """What to do about a dead letter, where its details are, and how to have it tried again."""
    mend = POISON_REMEDIES.get(reason, "mend the cause")
    return f"{mend}; details: sidecar-daemon dead-letters list {pipeline}; again: dead-letters replay {pipeline} --all"
