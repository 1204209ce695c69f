"""Checkpoints on disk: found, judged, read, written, adapted. torch only in codes, read, write, adapters."""
