"""Past one process: a frozen plan of shards on disk, run by many processes, each request exactly once.

The reading path: `folder` (what lies where), `plan`, `shard_runner` (one shard to its commit), `workers` and `ray` (in
which processes), `finish` (the records in input order), `run` (the whole). Nothing here knows a model, and nothing
coordinates but the run folder: a shard is done when its commit marker is there, and whoever puts it first wins.
"""
