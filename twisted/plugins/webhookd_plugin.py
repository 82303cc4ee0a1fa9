"""The plugin through which ``twistd`` finds the ``webhookd`` command."""

from twisted.application.service import ServiceMaker

webhookd = ServiceMaker(
    "webhookd", "webhookd.service", "Chatwoot's webhooks, each once, as BullMQ jobs in Redis.", "webhookd"
)
