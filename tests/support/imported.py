"""What every forked process finds imported (see processes.py). Nothing of it may start a thread."""

import gc

import datasets  # noqa: F401
import peft  # noqa: F401
import tiny  # noqa: F401
import trl  # noqa: F401

import amid_trl


for _name in amid_trl.__all__:
    getattr(amid_trl, _name)
gc.collect()
gc.freeze()  # as in conftest.py
