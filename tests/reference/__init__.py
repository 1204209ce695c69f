"""An independent reference of Moondream 3, written from the specification alone.

Plain float32 torch without caches, batches or fused anything: every decision recomputes the whole
sequence, every expert is a loop, every crop is encoded. It shares no line with `md3cli.model`, so
agreement of the two means something. Nothing here imports `md3cli`.

`network` (tensors in, tensors out) <- `skills` (prompts, greedy loops, traces) <- `preprocess`
(picture to crops); `reading` opens a checkpoint folder, `random_models` draws one, `writing` writes
it in any published format, `cases` draws pictures and requests.
"""
