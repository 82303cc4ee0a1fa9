"""Chatwoot, the sender: what its webhooks look like, and what they mean."""
