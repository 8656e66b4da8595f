"""The HTTP application: routes, middleware, API keys, admission, bodies, the page. Imports everything else of this room
but its commands.
"""
