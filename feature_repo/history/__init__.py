"""Histories of users: packed, in a log, summarised as statistics, sketches and token envelopes, and the features between
a history and a candidate. Imports `contract` and `home`.
"""
