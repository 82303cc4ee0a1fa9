"""The bytes of a record."""

from __future__ import annotations

import struct
import zlib

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from tests.support.spools import make_job
from webhookd.model import Job
from webhookd.spool.record import CorruptRecord, decode_record, encode_record

jobs = st.builds(
    Job,
    queue=st.text(),
    id=st.text(),
    name=st.text(),
    data=st.binary(),
    options=st.binary(),
    timestamp_ms=st.integers(0, 2**53),
    delay_ms=st.integers(0, 2**53),
    priority=st.integers(0, 2**21),
    lifo=st.booleans(),
)


class RecordTests(SynchronousTestCase):
    @given(jobs)
    def test_a_record_keeps_all_of_a_job(self, job: Job) -> None:
        self.assertEqual(decode_record(encode_record(job)), job)

    def test_each_flipped_bit_is_found(self) -> None:
        record = encode_record(make_job(1))
        for position in range(8 * len(record)):
            flipped = bytearray(record)
            flipped[position // 8] ^= 1 << position % 8
            self.assertRaises(CorruptRecord, decode_record, bytes(flipped))

    def test_each_torn_end_is_found(self) -> None:
        record = encode_record(make_job(1))
        for length in range(len(record)):
            self.assertRaises(CorruptRecord, decode_record, record[:length])

    def test_another_version_is_not_guessed_at(self) -> None:
        rest = struct.pack(">B", 2) + encode_record(make_job(1))[5:]
        self.assertRaises(CorruptRecord, decode_record, struct.pack(">I", zlib.crc32(rest)) + rest)
