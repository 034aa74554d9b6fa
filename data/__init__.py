"""Turns text into prepared data folders: tokens, four splits, byte counts and hashes.

Call `prepare` with a `DatasetRequest`; what comes back is all that the harness needs. During a
run, `prepare_extra` adds training text that a person has approved.
"""

from data.extra import ExtraText, prepare_extra, verify_extra
from data.preparation import DatasetRequest, prepare
from data.prepared_folder import DataError, DataUnavailable, Meta, SplitMeta, read_meta, verify

__all__ = [
    "DataError",
    "DataUnavailable",
    "DatasetRequest",
    "ExtraText",
    "Meta",
    "SplitMeta",
    "prepare",
    "prepare_extra",
    "read_meta",
    "verify",
    "verify_extra",
]
