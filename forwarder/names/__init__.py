"""An optional resolver on the gateway addresses: pods and services by name, all else from upstream.

It runs in a process of its own (`server`), fed by the daemon (`service`): answering takes a few hundred
microseconds of Python a query, which on the daemon's loop would be packets that wait.
"""
