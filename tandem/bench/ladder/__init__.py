"""`tandem bench ladder`: what each technique buys, measured on one workload, rung by rung.

Rungs that the product no longer uses live in `benchmarks/ladder`; they run the product's model and numerics.
"""
