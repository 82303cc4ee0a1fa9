"""Tests that need large tools: `make image-test`."""
