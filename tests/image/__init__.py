"""Tests that need big tools: `make image-test`."""
