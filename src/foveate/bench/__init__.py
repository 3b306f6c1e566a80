"""How fast it is: tables of shapes, timed beside peers in one process, after every result was checked.

- command: `foveate bench`
- rows: what a row of a table is, and what it has to reach
- tables: the tables themselves, as data
- models: the table of whole models
- sparse, alignment: the table of selections and of additive scores, built, checked and timed
- modelling: one row of the table of models, built, checked and timed
- linear: the table of linear attention
- linear_measuring: one row of that, computed, checked and timed
- contestants: one function for each way to compute a row
- truth: float64, and how far from it a result may be
- measuring: check, then time in turn
- memory: the peak memory of one call, in a process of its own
- results: what was found, as JSON and CSV
- about: the machine, the versions, and how fast the machine can be at most
- terminal: a table to read
- picture: bars and curves
- preferences: which implementation to prefer where, from results
"""
