"""What serving reads of a trained model: the bundle, its summariser, the identity of its tokens, its promotion. Imports
`inputs` and `models`.
"""
