"""Copies of a process that has imported everything, where a test would start Python and import for seconds.

A zygote imports torch, transformers and our packages, and computes nothing. A process that has one asks it whenever
it starts ``python -m MODULE`` of ours: the zygote clones itself, and the clone becomes that module with the argv,
environment, working folder, streams and signals that were asked for. It is a child of the process that asked
(CLONE_PARENT), so process ids, parents, exit statuses, signals, PR_SET_PDEATHSIG and /proc are as after a real start:
there is no proxy. A clone that may start others has a zygote of its own, made before it ran anything.

What differs: hash seeds are equal in all clones, modules that nobody imported yet are imported, and variables that
libraries read while they are imported must be as in the zygote, else the start is a real one.
"""
