"""Naive oracles: each says what the fast path must answer, in the plainest Python that can say it.

They share no code with `fastpath` and name drop reasons by their strings, so that a wrong enum shows too.
Nothing here is quick, and nothing here should be made quick.
"""
