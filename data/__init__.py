"""Turns text into prepared data folders: tokens, four splits, byte counts and hashes.

Call `prepare` with a `DatasetRequest`; what comes back is all that the harness needs.
"""

from data.preparation import DatasetRequest, prepare
from data.prepared_folder import DataError, DataUnavailable, Meta, SplitMeta, read_meta, verify

__all__ = [
    "DataError",
    "DataUnavailable",
    "DatasetRequest",
    "Meta",
    "SplitMeta",
    "prepare",
    "read_meta",
    "verify",
]
