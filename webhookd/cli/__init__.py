"""The operator's command, ``webhookd``.

``main.py`` is the command. Each subcommand is a module of the same name with a ``command`` in it, and is
imported when it is used. They share ``settings.py``, ``daemon.py``, ``reactor.py`` and ``terminal.py``.
"""
