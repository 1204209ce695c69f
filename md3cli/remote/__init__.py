"""INPUT that is not on this machine: `s3:// gs:// hf:// http(s)://`, listed, read by ranges, fetched ahead.

address.py  says what an address is, how it is joined, and what of it may be shown (standard library only)
hosts.py    says which hosts may be spoken to, and how a run may fetch
http.py     reads http(s), over aiohttp
stores.py   reads s3, gs and hf, over fsspec
reader.py   is the one door to both: facts, listings, ranges, whole pictures
retry.py    says what went wrong as a record says it, how long to wait, and how many bytes may be under way

`md3cli/images/pool.py` fetches pictures ahead of the decode workers. http, stores and reader need the extra `remote`
and are imported when the first address is met.
"""
