"""The gate: runs a pipeline, and between its passes checks, compares, rolls back, dumps, times and counts.

`run` is its way in, `stepwise` what happens after each pass. What models compute is compared in `verify`, on regions
that `region` cuts out, in a worker process behind `exchange`; `bisect` finds the pass, and the rewrite, to blame.
"""

from optframe.gate.records import OptimizeResult, PassRecord, Verified
from optframe.gate.run import Verify, optimize, until

__all__ = ["OptimizeResult", "PassRecord", "Verified", "Verify", "optimize", "until"]
