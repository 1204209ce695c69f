"""INPUT that is not on this machine: `s3:// gs:// hf:// http(s)://`, listed, read by ranges, fetched ahead.

address.py   what an address is, how it is joined, and what of it may be shown (imported by all, standard library)
zones.py     which hosts may be spoken to
web.py       http(s), over aiohttp            stores.py    s3, gs and hf, over fsspec
failures.py  what went wrong, as a record says it, and whether to try again
reading.py   one door to both: facts, listings, bytes
files.py     an address as a seekable file    walking.py   a folder of them in natural order
fetching.py  the bytes of one picture: retries, limits, patience
inputs.py    INPUT that is an address: what it is, and how it is opened and walked
options.py   what a run says about fetching       patience.py  how long, and how often to try
calls.py     coroutines from ordinary threads     byte_budget.py  the memory that threads share

`picture_pool.py`, outside, fetches pictures ahead of the decode workers. Whatever imports a store or aiohttp (web,
stores, calls, and what stands on them) is imported when the first address is met, and needs the extra `remote`.
"""
