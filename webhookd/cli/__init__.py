"""The operator's command, ``webhookd``.

``main.py`` is the command itself; each of its parts is a module of the same name with a ``command``
in it, imported when it is asked for. Below them stands what they share: ``settings.py``, ``reactor.py`` and
``terminal.py``.
"""
