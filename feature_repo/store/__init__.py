"""All that touches Feast: the offline store, the online store, its rows, tokens, users and erasure. Imports `contract`,
`home` and `history`.
"""
