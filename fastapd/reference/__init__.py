"""Every op in plain PyTorch: the oracle of the tests, the fallback, and the baseline of the benchmarks.

Imports torch only. Arguments come in canonical form, with the instance axis: the ops check and complete them.
"""
