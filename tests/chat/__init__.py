"""Tests of dsv4c.chat."""
