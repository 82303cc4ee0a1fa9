"""The plugin: one statement, which must meet twistd's expectations."""

from __future__ import annotations

from twisted.application.service import IServiceMaker
from twisted.plugin import IPlugin, getPlugins
from twisted.trial.unittest import SynchronousTestCase
from zope.interface.verify import verifyObject

from twisted.plugins import webhookd_plugin


class PluginTests(SynchronousTestCase):
    def test_provides_what_twistd_looks_for(self) -> None:
        for interface in (IPlugin, IServiceMaker):
            verifyObject(interface, webhookd_plugin.webhookd)

    def test_twistd_finds_it_once(self) -> None:
        found = [maker for maker in getPlugins(IServiceMaker) if maker.tapname == "webhookd"]

        self.assertEqual(found, [webhookd_plugin.webhookd])

    def test_names_our_service_module(self) -> None:
        self.assertEqual(webhookd_plugin.webhookd.module, "webhookd.service")
