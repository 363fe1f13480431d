"""How the DISK tier is doing, for reports and metrics.

Owns these types alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DirectoryState:
    """One directory, for reports. `failed` says why it is disabled, or could not be opened (it has no slots then); empty while
    it is in use."""

    path: Path
    num_slots: int
    journal_records: int
    direct_io: bool
    failed: str


@dataclass(frozen=True, slots=True)
class DiskStats:
    """The tier since it was opened. `recovered_blocks` were there then."""

    recovered_blocks: int
    stored_blocks: int
    not_stored_blocks: int
    loaded_blocks: int
    corrupt_blocks: int
    storing_blocks: int
    loading_blocks: int
    directories: tuple[DirectoryState, ...]
