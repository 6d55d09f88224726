"""One file a part: `checks(machine)` yields `bench.gpu.check.Check`s."""
