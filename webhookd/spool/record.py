"""The bytes of one record on disk: a job, with a checksum over all of it.

A record is ``crc32 of the rest | version | length of header | length of options | header | options | data``.
The header is JSON, with the job's small values. A record is complete in itself: it can be read without the
table around it.
"""

from __future__ import annotations

import json
import struct
import zlib

from msgspec.structs import asdict

from webhookd.model import Job

_VERSION = 1
_CRC = struct.Struct(">I")
_HEAD = struct.Struct(">BII")


class CorruptRecord(ValueError):
    """A record differs from what was written."""


def encode_record(job: Job) -> bytes:
    """Encode a job, with all of its values, for the disk."""
    values = asdict(job)
    del values["options"], values["data"]
    header = json.dumps(values).encode()
    head = _HEAD.pack(_VERSION, len(header), len(job.options))
    rest = b"".join((head, header, job.options, job.data))
    return _CRC.pack(zlib.crc32(rest)) + rest


def decode_record(record: bytes) -> Job:
    """Decode what `encode_record` returned.

    :raises CorruptRecord: the checksum, the version or the content is wrong.
    """
    try:
        return _decode(record)
    except (TypeError, ValueError, struct.error) as error:
        raise CorruptRecord(str(error)) from error


def _decode(record: bytes) -> Job:
    (checksum,) = _CRC.unpack_from(record)
    if zlib.crc32(memoryview(record)[_CRC.size :]) != checksum:
        raise ValueError("wrong checksum")
    version, header_length, options_length = _HEAD.unpack_from(record, _CRC.size)
    if version != _VERSION:
        raise ValueError(f"unknown version {version}")
    header_at = _CRC.size + _HEAD.size
    options_at = header_at + header_length
    data_at = options_at + options_length
    header = json.loads(record[header_at:options_at])
    return Job(options=record[options_at:data_at], data=record[data_at:], **header)
