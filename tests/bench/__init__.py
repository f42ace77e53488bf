"""The benchmark: how close to the limit of the machine the daemon is. ``python -m tests.bench``.

How it works, from the outside in:

* ``__main__``     reads argv, runs the measures one after the other, prints one JSON object. A missed goal is an
  answer, not an error: the exit status is 1 only where something broke.
* ``report``       the goals, and the object that is printed.
* ``measures``     one module a figure, P1 to P12.
* ``workplace``    what all measures share: sizes, corpora, models, the calibration, a server of their own.
* ``rounds``       interleaves contestants A B B A, with a calibration before each block.
* ``arithmetic``   ratios within rounds, dropped blocks, quantiles, slopes: pure, and tested.
* ``contestants``  every contestant is a process that speaks JSON lines over its standard streams: ours, the peers
  (each in an environment that only the benchmark makes: ``peers``), the matrix product of the calibration, the serial
  port of the system that was replaced, and the naive worker.
* ``server``       the embedded PostgreSQL with its default settings, one database a contestant.
* ``plot``         draws a picture from the committed JSON.

Everything random is drawn from ``--seed``. Ratios inside one run count; absolute figures are those of one machine.
"""
