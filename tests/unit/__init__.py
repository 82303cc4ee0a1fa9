"""Unit tests. They judge no times: on a busy machine, each can exceed the 200 ms that Hypothesis allows."""

from hypothesis import settings

settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
