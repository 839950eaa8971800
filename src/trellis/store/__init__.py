"""Rows: plain functions of a connection, values in and out. It does not know what the rows mean."""
