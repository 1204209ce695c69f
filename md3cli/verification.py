"""Whether the records of a run of one process are what they claim: lines whole, each id once, as the run left them.

Reads the records and run.json; knows nothing of INPUT. Memory: 40 bytes a record.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from md3cli.errors import InputError
from md3cli.finished_run import load_run_info
from md3cli.journal_scan import DamagedLines, scan_journal
from md3cli.records import printable
from md3cli.records_digest import change_since, is_finished, kept_digest
from md3cli.run_facts import counts_of

_MOST_NAMED = 20


class RecordsVerification:
    """One look at a records file; `num_records` is known once all `findings` have been asked for."""

    def __init__(self, records: Path) -> None:
        """Raises InputError: its run.json is not JSON."""
        self._records = records
        self._document = load_run_info(records).document
        self.num_records = 0

    def findings(self) -> Iterator[str]:
        """Yield what is wrong, in words; nothing where all is as it should be.

        Raises:
            InputError: the records cannot be read.
        """
        try:
            yield from self._line_findings()
            if change := change_since(self._document, self._records):
                yield f"{printable(str(self._records))} was changed after the run: {change}"
        except OSError as error:
            raise InputError(f"cannot read {printable(str(self._records))}: {error.strerror or error}") from error
        if not self._document:
            yield "no run.json stands beside the records, so nothing tells whether the run is finished"
        elif not is_finished(self._document):
            yield f"the run is not finished ({self.num_records:,} records so far); the same command goes on"
        elif kept_digest(self._document) is None:
            yield from self._count_findings()

    def _line_findings(self) -> Iterator[str]:
        with open(self._records, "rb", buffering=0) as file:
            scanned = scan_journal(file)
            size = self._records.stat().st_size
        self.num_records = len(scanned.found)
        for lines in scanned.damaged[:_MOST_NAMED]:
            yield f"{_damage(lines, printable(str(self._records)))}; the same command mends it"
        if len(scanned.damaged) > _MOST_NAMED:
            yield f"{len(scanned.damaged) - _MOST_NAMED:,} more places are damaged"
        if size > scanned.end:
            yield f"a torn end of {size - scanned.end:,} bytes; the same command repairs it"
        if scanned.found.has_superseded:
            yield "some requests have more than one record; the same command puts them in order"

    def _count_findings(self) -> Iterator[str]:
        """For a run of before digests were kept."""
        counts = counts_of(self._document)
        if counts is not None and counts["ok"] + counts["failed"] != self.num_records:
            noted = counts["ok"] + counts["failed"]
            yield f"the run was finished with {noted:,} records, and there are {self.num_records:,}"


def _damage(lines: DamagedLines, file: str) -> str:
    if lines.first == lines.last:
        return f"line {lines.first} of {file} is no whole record"
    return f"lines {lines.first} to {lines.last} of {file} are no whole records"
