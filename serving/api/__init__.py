"""What goes over the wire and what is counted: messages, errors, degradation reasons, settings, metrics, spans. Imports
`feature_repo`.
"""
