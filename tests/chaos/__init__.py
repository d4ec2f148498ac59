"""Fault injection: kill, cut off, fill up and confuse a round in every way that we know, then see that nothing is lost.

`python -m chaos` (`make chaos`) plays every scenario and writes `benchmarks/results/chaos.json`; `test_chaos.py` plays
a few of them. Every scenario begins with a copy of the same workspace; people's answers are a function of the push key,
so that the bytes must come out as in the run that nobody disturbed.
"""
