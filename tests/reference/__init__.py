"""An independent reference of Moondream 3, written from the specification alone.

Plain float32 torch without caches, batches or fused anything: every decision recomputes the whole
sequence, every expert is a loop, every crop is encoded. It shares no line with `md3cli.model`, so
agreement of the two means something. Nothing here imports `md3cli`.

`network` (tensors in, tensors out) and `preprocess` (picture to crops) <- `sequence` (one growing input)
<- `skills` (greedy loops, traces) with `texts` (what ids become). `reading` opens a checkpoint folder,
`random_models` draws one, `writing` writes it in any published format, `cases` draws pictures and
requests.
"""
