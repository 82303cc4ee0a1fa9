"""Chatwoot, the sender: the format and the meaning of its webhooks."""
