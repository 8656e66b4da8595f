"""A home on disk: tables with their manifests, the catalogue, digests of code, erased users, traces of ids. Imports
`contract`.
"""
