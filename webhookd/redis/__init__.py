"""Redis: connections that recover, the queue that adds jobs, and what protects both.

This package imports none of its modules: the configuration needs only `webhookd.redis.url` and
`webhookd.redis.settings`, and ``webhookd health`` must start without Twisted.
"""
