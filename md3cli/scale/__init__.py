"""Past one process: a frozen plan of shards on disk, run by many processes, each request exactly once.

The reading path: `layout` (what lies where), `plan` (what is to be done), `shards` (one shard run to
its commit), `shard_queue` (which is next), `here`, `supervisor` and `ray_engine` (in which processes),
`export` (the records in input order), `run` (the whole, as the commands call it).
Nothing here knows a model, and nothing coordinates but the run folder: a shard is done
when its commit marker is there, and whoever puts the marker first wins.
"""
