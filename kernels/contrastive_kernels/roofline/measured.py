"""Rates of GPUs as `python -m bench gpu` measured them. Written by `python -m bench gpu --record DIR`, not by hand.

RATES[name of roofline.GPUS] replaces these fields of `roofline.Gpu`: achieved, achieved_fp32 (FLOP/s of large library products),
bandwidth (bytes/s), triton_share (main loop of a Triton product over the library's), launch (seconds from one small kernel to the
next). What is not listed was not measured, and roofline's assumption stands.
"""

RATES: dict[str, dict[str, float]] = {}
