"""Mutants of real checkpoint files: a load of one is right or refused, and a refusal changes nothing.

`seeds` writes the real files, `mutate` changes them, `judge` says what became of one mutant, `workers` runs many of
them in a process that may die. `test_mutants.py` is the short run; `tools/fuzz.py` the long one.
"""
