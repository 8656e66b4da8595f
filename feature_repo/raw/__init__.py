"""Raw files of strangers and what becomes of their rows: sources, values, events and dead letters, requests. Imports
`contract`, `home` and `history`.
"""
