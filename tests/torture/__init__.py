"""The torture suite: proof that nothing is lost and nothing stale, whatever crashes. ``python -m tests.torture``.

How it works, from the outside in:

* ``__main__``  reads argv, runs the faults, prints one JSON object, exits 1 on any violation.
* ``bench``     owns one embedded PostgreSQL and gives each fault an ``Arena``: a database of its own with a source
  table, its pipelines, audit triggers on every table that matters, and roles that log in with a password over TCP.
* ``fleet``     starts replicas: real processes of the real daemon (``replica``), whose two ports are made of test
  parts through the one seam that the daemon has: an embedder whose vector is a function of the text (``embedder``),
  and a queue with failpoints.
* ``client``    edits, inserts and deletes for as long as the fault lasts, and logs each operation as ok, failed or
  unknown.
* ``faults``    one module a fault, T1 to T17: what is done to the replicas, to the server and to the wire between.
* ``checker``   after quiesce asserts I1 to I10, once before and once after a sweep: the sweep may heal, so what it
  would have healed counts as a violation as well.
* ``scenes``    short scripted interleavings that run in this process (T12); ``mutants`` switches off one guard of the
  system after the other and requires that a named scene then fails (T17).

Everything random is drawn from ``--seed``. A violation is printed to stderr with the seed and with the history of the
document: what the client asked for, what the source held, what was leased, written and acknowledged, and when.
"""
