"""The Hub: adapters up in one commit, and down from one, checked byte by byte."""
