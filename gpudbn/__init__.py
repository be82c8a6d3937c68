"""Deep belief networks trained on GPUs, across machines.

    from gpudbn import DBN, RBM, load
"""

__version__ = "0.1.0"
