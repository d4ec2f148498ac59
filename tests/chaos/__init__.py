"""Fault injection: kill, disconnect, fill up and confuse a round in every known way, and check that nothing is lost.

`python -m chaos` (`make chaos`) plays every scenario and writes `benchmarks/results/chaos.json`; `test_chaos.py` plays
a few of them. Every scenario begins with a copy of the same workspace. People's answers are a function of the push key,
so that the bytes must equal those of an undisturbed run.
"""
