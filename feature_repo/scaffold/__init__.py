"""`python -m feature_repo new` and `check`: what a stranger's files hold, the draft of a declaration, and a preview of what
it makes of them. Imports `contract`, `raw` and `datasets`.
"""
