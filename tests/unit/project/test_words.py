"""The word check finds what ``words.txt`` lists, and nothing else."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.docs.words import RULES, findings


class WordsTests(SynchronousTestCase):
    def test_a_plain_line_passes(self) -> None:
        self.assertEqual(
            list(findings('"""Return the spool\'s directory, or None if there is none."""\n')), []
        )

    def test_a_bad_line_is_reported_with_its_number_and_with_advice(self) -> None:
        text = "Fine.\nThe spool is opened Anew.\n"

        self.assertEqual(list(findings(text)), ["2: 'Anew': write again"])

    def test_each_rule_finds_its_phrase(self) -> None:
        bad = [
            "opened anew",
            "kept beside it",
            "all but for one",
            "waits for ever",
            "whoever asks",
            "nobody looks",
            "the caller is told",
            "a port that cannot be had",
            "a thread of its own",
            "there need not be one",
            "None where it is empty",
            "retry where the server does",
            "so many of them",
            "what it makes of it",
            "what is to be sent",
            "0 if it is so",
            "the drain gets on",
            "the work goes on",
            "waits in vain",
            "all save for one",
            "amid the rest",
            "and thereby ends",
            '"""Whether the spool is empty."""',
            '"""The same, with a log line."""',
            "see L{Spool}",
            "@raise ValueError: never",
        ]

        self.assertEqual([len(list(findings(line))) for line in bad], [1] * len(bad))
        self.assertEqual([advice for rule, advice in RULES if not any(map(rule.search, bad))], [])

    def test_a_phrase_may_continue_on_the_next_line_of_a_comment(self) -> None:
        self.assertEqual(len(list(findings("    # All of them, but\n    # for the last.\n"))), 1)

    def test_words_are_whole(self) -> None:
        self.assertEqual(list(findings("besides; amidst; a manewer; foretold")), [])

    def test_a_name_in_quotes_is_no_word(self) -> None:
        self.assertEqual(list(findings('user = "nobody"; path = "/webhook/nobody"')), [])
