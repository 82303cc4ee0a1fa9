"""webhookd receives Chatwoot's webhooks and turns each event, once, into a BullMQ job."""

__version__ = "0.1.0"
