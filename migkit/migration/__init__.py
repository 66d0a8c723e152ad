"""How a guest moves: wire (no I/O), states (one table), source, destination, session.

A page's way: :mod:`source` finds it dirty, :mod:`wire` frames it, :mod:`channel` carries it,
:mod:`destination` places it. The session steers both sides and never touches a page.
"""
